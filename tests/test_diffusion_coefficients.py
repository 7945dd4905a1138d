"""T2-T4 and T6: sum rules, equivalences, polynomial exactness, accuracy against mpmath."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import mpmath as mp
import pytest
import torch
from torch import Tensor

from dsno_kernels.diffusion import (
    EDM,
    DiscreteVP,
    FlowMatching,
    Process,
    SolverPlan,
    VPCosine,
    VPLinear,
    time_grid,
)
from dsno_kernels.diffusion.solvers import find
from dsno_kernels.diffusion.solvers._phi import phi

VP = VPLinear()
FLOW = FlowMatching(shift=3.0, t_min=1e-3, t_max=0.999)
PROCESSES = {"linear": VP, "cosine": VPCosine(), "edm": EDM(), "flow": FLOW}
# Relative to the largest size in the comparison, at 20 steps.
IDENTITY = 1e-14
# Relative to the largest coefficient of the row, for any number of steps: what rounding log_snr to
# float64 leaves of a difference between 1000 of them.
COEFFICIENT = 1e-12


def close(actual: Tensor, expected: Tensor, tolerance: float = IDENTITY) -> None:
    size = expected.abs().max()
    assert float((actual - expected).abs().max()) <= tolerance * float(size)


def plan(name: str, steps: int = 20, process: Process = VP, **options: object) -> SolverPlan:
    return SolverPlan.build(process, time_grid(process, steps, "log_snr"), name, **options)


def same(a: SolverPlan, b: SolverPlan, first: int = 0) -> None:
    """From this row on."""
    assert a.history_length == b.history_length
    for name in a.columns:
        close(a.column(name)[first:], b.column(name)[first:])


ONE_ROW_A_STEP = [
    *("ddim", "tab0", "tab1", "tab3", "tab5", "rhoab2", "logrhoab2", "ipndm4", "dpm_2m"),
    *("dpm_2m_heun", "dpm_3m", "dpmpp_2m", "dpmpp_3m", "dpmpp_3m_exact", "unip3_bh1", "unip2_bh2"),
]


@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
@pytest.mark.parametrize("history", ["eps", "x0", "flow"])
@pytest.mark.parametrize("name", ONE_ROW_A_STEP)
def test_sum_rule(process: Process, history: str, name: str) -> None:
    """A constant history is integrated exactly: x = alpha x0 + sigma eps with constant eps and x0
    stays so."""
    if history not in find(name).histories or (history == "flow" and process is not FLOW):
        with pytest.raises(ValueError, match="history"):
            plan(name, process=process, history=history)
        return
    p = plan(name, process=process, history=history)
    alpha, sigma = process.alpha(p.grid), process.sigma(p.grid)
    x0, eps = 0.7, -1.3
    x = alpha * x0 + sigma * eps
    h = {"eps": eps, "x0": x0, "flow": eps - x0}[history]
    predicted = p.column("a_b") * x[:-1] + p.column("c_b").sum(1) * h
    size = (p.column("a_b") * x[:-1]).abs() + p.column("c_b").abs().sum(1) * abs(h)
    assert float(((predicted - x[1:]).abs() / size).max()) <= 5e-15


def test_equivalences() -> None:
    """Of the published solvers (facts: one exact method of each order and history type)."""
    same(plan("tab0"), plan("ddim"))
    same(plan("rhoab0"), plan("ddim"))
    same(plan("deis3"), plan("logrhoab2"))
    same(plan("deis2"), plan("dpm_2m_heun"))
    same(plan("deis3"), plan("dpm_3m_exact"))
    same(plan("dpm_1m"), plan("ddim"))
    same(plan("dpmpp_1m"), plan("ddim", history="x0"))
    same(plan("dpmpp_2m"), plan("unip2_bh2"))
    same(plan("dpmpp_2m_heun"), plan("logrhoab1", history="x0"))
    # UniP starts with its own order 2
    same(plan("dpmpp_3m_exact"), plan("unip3_bh1"), first=2)
    same(plan("dpmpp_3m_exact"), plan("unip3_bh2"), first=2)
    same(plan("dpmpp_3m_exact"), plan("logrhoab2", history="x0"))
    same(plan("sde_dpmpp_2", eta=0.0), plan("dpmpp_2m"))
    same(plan("sde_dpmpp_3_exact", eta=0.0), plan("dpmpp_3m_exact"))
    same(plan("sde_dpmpp_1"), plan("ddim", eta=1.0, history="x0"))
    same(plan("rhork_2heun"), plan("heun"))
    same(plan("rhork_1euler", process=EDM()), plan("ddim", process=EDM()))
    same(plan("dpm_1s"), plan("ddim"))
    same(plan("dpmpp_1s"), plan("ddim", history="x0"))
    same(plan("flow_euler", process=FLOW), plan("tab0", process=FLOW, history="flow"))


def test_one_step_is_the_same_in_every_history() -> None:
    """DDIM, DPM-Solver++ and Euler on a flow are one method, seen through the conversions."""
    t = torch.linspace(0.95, 0.05, 9, dtype=torch.float64)
    kinds = ("eps", "x0", "flow")
    a, b, c = (SolverPlan.build(FLOW, t, "tab0", history=kind, prediction="flow") for kind in kinds)
    for p in (a, b):
        total_x = p.column("a_b") + p.column("c_b")[:, 0] * p.column("A")
        total_m = p.column("c_b")[:, 0] * p.column("B")
        close(total_x, c.column("a_b"), 1e-14)
        close(total_m, c.column("c_b")[:, 0], 1e-13)


def test_shipped_and_exact_third_order_differ_by_half_the_curvature() -> None:
    """The published DPM-Solver++(3M) has half the exact weight of the second difference."""
    shipped, exact = plan("dpmpp_3m"), plan("dpmpp_3m_exact")
    lam = VP.log_snr(shipped.grid)
    for i in range(2, 20):
        h = lam[i + 1] - lam[i]
        r = (lam[i] - lam[i - 1]) / h, (lam[i - 1] - lam[i - 2]) / h
        second = torch.stack([1 / r[0], -1 / r[0] - 1 / r[1], 1 / r[1]]) / (r[0] + r[1])
        weight = VP.alpha(shipped.grid[i + 1]) * h * phi(3, -h)
        close(exact.column("c_b")[i] - shipped.column("c_b")[i], weight * second, 1e-11)


def test_wrong_sign_of_diffusers_is_selectable() -> None:
    """diffusers' D2 weight of SDE-DPM-Solver++(3M) tends to -alpha', the right one to 0."""
    right, wrong = (plan(f"sde_dpmpp_3{shipper}", steps=2000) for shipper in ("", "_diffusers"))
    i = 1000
    difference = (wrong.column("c_b")[i] - right.column("c_b")[i]) / VP.alpha(right.grid[i + 1])
    # second differences of equal steps: (1, -2, 1) / 2
    close(difference, -torch.tensor([0.5, -1.0, 0.5], dtype=torch.float64), 1e-9)


def test_polynomials_are_integrated_exactly() -> None:
    """T4: degree r in its own variable, for rows that have their full order."""
    cases: list[tuple[str, Callable[[Process, Tensor], Tensor]]] = [
        ("tab", lambda p, t: t),
        ("rhoab", lambda p, t: p.rho(t)),
        ("logrhoab", lambda p, t: p.log_snr(t)),
    ]
    with mp.workdps(30):
        for family, variable in cases:
            for degree in range(4):
                p = SolverPlan.build(VP, time_grid(VP, 7), f"{family}{degree}")
                u = variable(VP, p.grid)
                i = 5
                nodes = u[i - degree : i + 1].flip(0)
                for power in range(degree + 1):
                    actual = (p.column("c_b")[i] * nodes**power).sum()
                    expected = mp.quad(
                        lambda t, k=power, v=family: _power(t, v) ** k * _rho_rate(t),
                        [mp.mpf(float(p.grid[i])), mp.mpf(float(p.grid[i + 1]))],
                    )
                    expected *= _vp(mp.mpf(float(p.grid[i + 1])))[0]
                    size = float((p.column("c_b")[i] * nodes**power).abs().sum())
                    assert abs(float(actual) - float(expected)) <= 1e-13 * size, (family, power)


def test_midpoint_is_not_exact_of_degree_one() -> None:
    """A control: DPM-Solver++(2M) of midpoint type misses a linear history by O(h^3)."""
    defects = []
    for steps in (20, 40, 80):
        p = plan("dpmpp_2m", steps=steps)
        exact = plan("dpmpp_2m_heun", steps=steps)
        lam, i = VP.log_snr(p.grid), steps // 2
        nodes = lam[i - 1 : i + 1].flip(0) - lam[i]
        defects.append(float(((p.column("c_b") - exact.column("c_b"))[i] * nodes).sum().abs()))
    assert math.log2(defects[0] / defects[1]) == pytest.approx(3, abs=0.3)
    assert math.log2(defects[1] / defects[2]) == pytest.approx(3, abs=0.15)


def test_phi() -> None:
    z = torch.cat([torch.linspace(-12, 12, 97), torch.tensor([-1e-9, 1e-300, 1e-5, 1 - 1e-16])])
    z = z.double()
    with mp.workdps(40):
        for k in (1, 2, 3, 4):
            for value, at in zip(phi(k, z).tolist(), z.tolist(), strict=True):
                exact = mp.hyp1f1(1, k + 1, at) / mp.factorial(k)
                assert abs(value / exact - 1) <= 1e-13, (k, at)


def _vp(t: mp.mpf) -> tuple[mp.mpf, mp.mpf]:
    y = mp.mpf(0.1) * t + (mp.mpf(20.0) - mp.mpf(0.1)) * t**2 / 2
    return mp.exp(-y / 2), mp.sqrt(1 - mp.exp(-y))


def _rho(t: mp.mpf) -> mp.mpf:
    alpha, sigma = _vp(t)
    return sigma / alpha


def _rho_rate(t: mp.mpf) -> mp.mpf:
    rate = mp.mpf(0.1) + (mp.mpf(20.0) - mp.mpf(0.1)) * t
    return rate * _vp(t)[0] ** -2 / (2 * _rho(t))  # rho^2 = exp(y) - 1


def _power(t: mp.mpf, family: str) -> mp.mpf:
    return {"tab": t, "rhoab": _rho(t), "logrhoab": -mp.log(_rho(t))}[family]


@pytest.mark.parametrize("steps", [1, 2, 20, 100, 250, 999])
@pytest.mark.parametrize("kind", ["uniform", "log_snr", "karras"])
def test_accuracy(steps: int, kind: str) -> None:
    """T6: every Adams-Bashforth integral and every closed form in log_snr, to 1e-12."""
    grid = time_grid(VP, steps, kind)
    families = {"tab": 3, "rhoab": 3, "logrhoab": 2}
    rows = sorted({0, min(3, steps - 1), steps // 2, steps - 1})
    with mp.workdps(30):
        times = {k: mp.mpf(float(grid[k])) for i in rows for k in range(max(i - 3, 0), i + 2)}
        for family, degree in families.items():
            c = SolverPlan.build(VP, grid, f"{family}{degree}").column("c_b")
            for i in rows:
                order = min(degree, i) + 1
                u = [_power(times[i - k], family) for k in range(order)]
                exact = [
                    _vp(times[i + 1])[0]
                    * mp.quad(
                        lambda t, j=j, u=u, v=family: _cardinal(u, j, _power(t, v)) * _rho_rate(t),
                        [times[i], times[i + 1]],
                    )
                    for j in range(order)
                ]
                size = max(abs(value) for value in exact)
                for j, value in enumerate(exact):
                    assert abs(float(c[i, j]) - value) <= COEFFICIENT * size, (family, i, j)
        exact_x0 = SolverPlan.build(VP, grid, "dpmpp_3m_exact").column("c_b")
        quadrature = SolverPlan.build(VP, grid, "logrhoab2", history="x0").column("c_b")
        unip = SolverPlan.build(VP, grid, "unip3_bh2").column("c_b")
        size = quadrature.abs().amax(1)
        assert float(((exact_x0 - quadrature).abs().amax(1) / size).max()) <= COEFFICIENT
        ahead = slice(2, None)  # UniP's own weight 1/2 at order 2
        if steps > 2:
            error = (unip - quadrature).abs().amax(1) / size
            assert float(error[ahead].max()) <= COEFFICIENT


def _cardinal(u: list[mp.mpf], j: int, at: mp.mpf) -> mp.mpf:
    return mp.fprod((at - v) / (u[j] - v) for k, v in enumerate(u) if k != j)


def test_accuracy_of_a_discrete_process() -> None:
    """Log alpha is piecewise linear: the integral of each piece by mpmath, summed."""
    process = DiscreteVP.scaled_linear()
    grid = torch.tensor([60.2, 44.6, 31.3, 20.7, 12.4, 1.5], dtype=torch.float64)
    c = SolverPlan.build(process, grid, "tab2").column("c_b")
    i = 4
    with mp.workdps(30):
        ys = [-mp.log(mp.mpf(float(a))) for a in process.alphas_cumprod]
        u = [mp.mpf(float(grid[i - k])) for k in range(3)]
        knots = [float(grid[i + 1])]
        knots += [float(n) for n in range(1000) if grid[i + 1] < n < grid[i]] + [float(grid[i])]
        exact = [mp.mpf(0)] * 3
        for low, high in pairwise(knots):
            n = int(low)
            slope = ys[n + 1] - ys[n]

            def rate(t: mp.mpf, n: int = n, slope: mp.mpf = slope) -> mp.mpf:
                y = ys[n] + (t - n) * slope
                return slope * mp.exp(y) / (2 * mp.sqrt(mp.expm1(y)))

            for j in range(3):
                piece = mp.quad(lambda t, j=j, r=rate: _cardinal(u, j, t) * r(t), [high, low])
                exact[j] += piece
        alpha = mp.mpf(float(process.alpha(grid[i + 1])))
    for j in range(3):
        assert abs(float(c[i, j]) - alpha * exact[j]) <= COEFFICIENT * max(map(abs, exact))
