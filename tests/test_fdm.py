"""Momentum diffusion: the process, its oscillator, and the plans of every solver on it."""

from __future__ import annotations

import functools
from collections.abc import Callable

import mpmath as mp
import pytest
import torch
from torch import Tensor

from dsno_kernels.diffusion import (
    EDM,
    FDM,
    VE,
    DiscreteVP,
    FlowMatching,
    Process,
    SolverPlan,
    VPCosine,
    VPLinear,
    for_process,
    sample,
    time_grid,
)
from dsno_kernels.diffusion.momentum import oscillator
from dsno_kernels.diffusion.solvers import find
from tests.diffusion_problems import Gaussian, Mixture, golden, names
from tests.helpers import FLOAT64, assert_close

# A few roundings of float64, times the 40 by which a rounding of t' grows in the exponent at m = 2.
ROUNDING = 1e-13
BASES: dict[str, Process] = {
    "edm": EDM(),
    "ve": VE(),
    "vp": VPLinear(t_min=1e-5),
    "cosine": VPCosine(),
    "discrete": DiscreteVP.linear(),
}


def exact(tau: mp.mpf, zeta: mp.mpf) -> mp.mpf:
    """The oscillator from the roots of its characteristic polynomial."""
    if zeta == 1:
        return mp.exp(-tau) * (1 + tau)
    root = mp.sqrt(mp.mpc(zeta**2 - 1))
    fast, slow = -zeta - root, -zeta + root
    return mp.re((fast * mp.exp(slow * tau) - slow * mp.exp(fast * tau)) / (fast - slow))


@pytest.mark.parametrize("name", ["edm", "vp"])
def test_golden_mean_and_deviation(name: str) -> None:
    """Of the official code: at equal steps of its own clock, and at times of the base's sampler."""
    values = golden("fdm.npz")
    ends = values[f"{name}_m1_sigma_range"]
    low, high = ends.tolist()  # float32 of the official code, which loses digits to cancellation
    process = FDM(EDM()) if name == "edm" else FDM(VPLinear(), sigma_min=low, sigma_max=high)
    assert_close(process.rho(torch.tensor([0.0, 1.0])), ends, FLOAT64)
    t = values["fdm_t_grid"]
    assert_close(process.rho(t), values[f"{name}_m1_uni_sigma"], FLOAT64)
    assert_close(process.alpha(t), values[f"{name}_m1_uni_mean"], FLOAT64)
    assert_close(process.sigma(t), values[f"{name}_m1_uni_std"], FLOAT64)
    t = process.clock(values[f"{name}_m1_native_sigma"])
    assert_close(t, values[f"{name}_m1_native_tprime"], FLOAT64)
    assert_close(process.alpha(t), values[f"{name}_m1_native_mean"], FLOAT64)
    assert_close(process.sigma(t), values[f"{name}_m1_native_std"], FLOAT64)


@pytest.mark.parametrize("multiplier", [1.0, 2.0])
@pytest.mark.parametrize("name", BASES)
def test_values_with_any_multiplier(name: str, multiplier: float) -> None:
    """The multiplier works on all of them, VE too."""
    process = FDM(BASES[name], multiplier)
    with mp.workdps(50):
        low, high = (mp.mpf(float(process.rho(t))) for t in (0.0, 1.0))
        for t in (0.0, 1e-9, 0.125, 0.5, 1.0):
            B = mp.mpf(0.1) * t + (mp.mpf(20.0) - mp.mpf(0.1)) * mp.mpf(t) ** 2 / 2
            s, sigma = exact(multiplier * B, mp.mpf(1)), low + mp.mpf(t) * (high - low)
            assert abs(mp.mpf(float(process.alpha(t))) / s - 1) <= ROUNDING, t
            assert abs(mp.mpf(float(process.sigma(t))) / (s * sigma) - 1) <= ROUNDING, t
            assert abs(mp.mpf(float(process.log_snr(t))) + mp.log(sigma)) <= ROUNDING, t


def test_golden_oscillator() -> None:
    """A Runge-Kutta solution of the oscillator whose frequency is the rate of B."""
    values = golden("fdm.npz")
    assert_close(FDM(EDM()).alpha(values["fdm_t_grid"]), values["osc_rk4"], FLOAT64)


@pytest.mark.parametrize("zeta", [0.2, 0.9, 1 - 1e-9, 1.0, 1 + 1e-13, 1 + 1e-5, 1.1, 3.0, 30.0])
def test_oscillators_of_any_damping(zeta: float) -> None:
    """No jump and no cancellation where the two roots meet, nor where the formulas change."""
    for tau in (-0.01, 0.0, 1e-8, 0.3, 0.6, 2.2, 2.4, 10.0, 20.0):
        with mp.workdps(60):
            expected = exact(mp.mpf(tau), mp.mpf(zeta))
            error = abs(mp.mpf(float(oscillator(tau, zeta))) - expected)
        assert error <= ROUNDING * abs(expected) + 1e-16, tau


@pytest.mark.parametrize("zeta", [1e3, 1e6])
def test_oscillators_that_creep(zeta: float) -> None:
    """Large damping loses no digits: the two large exponents never meet."""
    for tau in (1e-3, 0.3, 20.0):
        with mp.workdps(60):
            expected = exact(mp.mpf(tau), mp.mpf(zeta))
            error = abs(mp.mpf(float(oscillator(tau, zeta))) - expected)
        assert error <= ROUNDING * abs(expected), tau


def test_the_oscillator_obeys_its_equation_and_is_smooth_in_its_damping() -> None:
    zeta = torch.tensor([0.3, 0.999999, 1.0, 1.0001, 2.5], dtype=torch.float64)[:, None]
    tau = torch.tensor([-0.01, 0.0, 0.5, 3.0, 11.0], dtype=torch.float64).expand(5, 5)
    tau, zeta = tau.clone().requires_grad_(), zeta.clone().requires_grad_()
    y = oscillator(tau, zeta)
    (rate,) = torch.autograd.grad(y.sum(), tau, create_graph=True)
    (force,) = torch.autograd.grad(rate.sum(), tau)
    assert float((force + 2 * zeta * rate + y).detach().abs().max()) < 1e-12
    assert float(rate[:, 1].detach().abs().max()) == 0
    with mp.workdps(50):  # at critical damping, where the two formulas meet
        slope = mp.diff(lambda z: exact(mp.mpf(3), z), mp.mpf(1) + mp.mpf(10) ** -12)
    one = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    (found,) = torch.autograd.grad(oscillator(3.0, one), one)
    assert float(found) == pytest.approx(float(slope), rel=1e-9)
    assert torch.autograd.gradcheck(oscillator, (tau, zeta))
    assert torch.autograd.gradgradcheck(oscillator, (tau, zeta))


@pytest.mark.parametrize("name", BASES)
def test_inverse_and_clock(name: str) -> None:
    process = FDM(BASES[name])
    t = torch.tensor([-1e-6, 0.0, 1e-6, 0.3, 1.0, 1.7], dtype=torch.float64)
    torch.testing.assert_close(process.inverse(process.log_snr(t)), t, rtol=1e-13, atol=1e-15)
    torch.testing.assert_close(process.clock(process.rho(t)), t, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("name", BASES)
def test_the_end_without_noise(name: str) -> None:
    process = FDM(BASES[name], 2.0)
    zero = process.t_zero
    assert zero is not None and zero < 0
    assert float(process.rho(zero)) == 0 and float(process.log_snr(zero)) == torch.inf
    assert float(process.alpha(zero)) == pytest.approx(1.0, abs=1e-9)
    assert float(process.inverse(torch.inf)) == zero


def test_levels_outside_of_the_range() -> None:
    """EDM's training levels are not clipped: functions go on there; a plan's grid may not."""
    process = FDM(EDM())
    t = process.clock(torch.tensor([0.001, 200.0], dtype=torch.float64))
    assert float(t[0]) < 0 and float(t[1]) > 1
    with mp.workdps(50):
        for time in t.tolist():
            B = mp.mpf(0.1) * time + (mp.mpf(20.0) - mp.mpf(0.1)) * mp.mpf(time) ** 2 / 2
            s = exact(B, mp.mpf(1))
            assert abs(mp.mpf(float(process.alpha(time))) / s - 1) <= 10 * ROUNDING
    with pytest.raises(ValueError, match=r"grid\[0\] = 1\.5 lies outside of the times"):
        SolverPlan.build(process, [1.5, 0.5])
    with pytest.raises(ValueError, match="lies outside of the times"):
        SolverPlan.build(process, [1.0, 2 * process.t_zero])


@pytest.mark.parametrize("damping", [0.97, 1.0, 1.5], ids=["under", "critical", "over"])
@pytest.mark.parametrize("field", ["time", "multiplier", "damping", "sigma_max"])
def test_gradients(field: str, damping: float) -> None:
    t = torch.tensor([-1e-5, 0.02, 0.4, 0.9], dtype=torch.float64)
    values = {"multiplier": 0.9, "damping": damping, "sigma_max": 70.0}
    for method in ("alpha", "sigma", "log_snr", "inverse"):

        def call(p: Tensor, m: str = method) -> Tensor:
            if field == "time":
                return getattr(FDM(EDM(), damping=damping), m)(p)
            return getattr(FDM(EDM(), **{**values, field: p}), m)(t) + 0.0 * p

        start = t.abs() if field == "time" else torch.tensor(values[field], dtype=torch.float64)
        assert torch.autograd.gradcheck(call, start.requires_grad_(), eps=1e-7, atol=1e-4)


def test_gradients_in_the_base() -> None:
    beta = torch.tensor(20.0, dtype=torch.float64, requires_grad=True)
    t = torch.tensor([0.1, 0.6], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda b: FDM(VPLinear(beta_max=b)).log_snr(t), beta)


def test_a_clock_of_your_own() -> None:
    """B(t') may be any function that increases from 0."""
    process = FDM(EDM(), 3.0, B=lambda t: 2.0 * t)
    t = torch.linspace(0, 1, 5, dtype=torch.float64)
    assert_close(process.alpha(t), torch.exp(-6 * t) * (1 + 6 * t), FLOAT64)


def scaled(plan: SolverPlan, process: FDM) -> dict[str, Tensor]:
    """The columns that the plan of an unscaled state must have in the state s x."""
    base_after = process.alpha(process.clock(plan.times))
    base = torch.cat([process.alpha(process.clock(plan.grid[:1])), base_after[:-1]])
    at = process.alpha(process.clock(plan.model_times))
    ahead = torch.where(plan.looks_ahead, torch.cat([at[1:], at[-1:]]), base_after)
    return {
        "a_b": plan.column("a_b") * base_after / base,
        "c_b": plan.column("c_b") * base_after[:, None],
        "s": plan.column("s") * base_after,
        "a_p": plan.column("a_p") * ahead / base_after,
        "c_p": plan.column("c_p") * ahead[:, None],
    }


@pytest.mark.parametrize("clean", [False, True], ids=["noise left", "to sigma 0"])
@pytest.mark.parametrize("multiplier", [1.0, 2.0])
def test_every_solver_is_that_of_the_base_rescaled(multiplier: float, clean: bool) -> None:
    """a s'/s and c s', of every solver: also of those in time, which is linear in sigma here."""
    process = FDM(EDM(), multiplier)
    sigmas = time_grid(EDM(), 7, "karras", append_zero=clean)
    grid = process.clock(sigmas)
    if clean:
        grid[-1] = process.t_zero
    for name in names(EDM()):
        for history in [kind for kind in find(name).histories if kind != "flow"]:
            plain = SolverPlan.build(EDM(), sigmas, name, history=history, prediction="x0")
            ours = SolverPlan.build(process, grid, name, history=history, prediction="x0")
            assert_close(process.rho(ours.model_times), plain.model_times, FLOAT64)
            for column, expected in scaled(plain, process).items():
                rows = expected.reshape(len(plain.table), -1)
                size = rows.abs().amax(1, keepdim=True).clamp(min=1e-300)
                error = (ours.column(column).reshape(rows.shape) - rows).abs() / size
                assert float(error.max()) < 1e-12, (name, column)


def test_golden_dpmpp_2m_coefficients() -> None:
    values, process = golden("fdm.npz"), FDM(EDM())
    grid = process.clock(time_grid(EDM(), 12, "karras"))
    plan = SolverPlan.build(process, grid.clamp(max=1.0), "dpmpp_2m", prediction="x0")
    ours = torch.cat([plan.column("a_b")[:, None], plan.column("c_b")], 1)
    expected = values["dpmpp2m_coef_fdm_scaled"]
    assert float(((ours - expected).abs() / expected.abs().clamp(min=1e-300)).max()) < 1e-12


def test_golden_heun_in_the_state_of_the_momentum_process() -> None:
    """The official sampler works on x; with momentum the same steps work on s x."""
    values = golden("fdm.npz")
    toy, process = Mixture(values), FDM(EDM())
    grid = time_grid(process, 13, "karras", append_zero=True)
    plan = SolverPlan.build(process, grid, "heun", prediction="x0")
    model = for_process(lambda x, sigma: toy.denoise(x, sigma), process)
    start = process.sigma(1.0) * toy.latents
    assert plan.evaluations == 25
    s = process.alpha(grid[-1])  # 1 - 3e-12 where sigma is 0
    assert_close(plan.replay(model, start) / s, values["toy_heun_edm_13"], FLOAT64)
    assert_close(sample(model, start, plan) / s, values["toy_heun_edm_13"], FLOAT64)


@pytest.mark.parametrize("prediction", ["eps", "x0", "v", "score", "edm"])
@pytest.mark.parametrize("name", ["edm", "ve", "vp"])
def test_plans_convert_every_prediction(name: str, prediction: str) -> None:
    """A perfect network of any kind ends at the same sample; c_in of "edm" is 1 on this state."""
    process = FDM(BASES[name])
    problem = Gaussian(process, 0.9)
    grid = time_grid(process, 40, "log_snr", t_start=0.9)
    plan = SolverPlan.build(process, grid, "dpmpp_3m_exact", prediction=prediction)

    def model(x: Tensor, t: Tensor) -> Tensor:
        return problem.prediction(prediction, x, t)

    assert torch.equal(plan.column("c_in"), torch.ones(40, dtype=torch.float64))
    found = plan.replay(model, problem.x_T)
    assert_close(found, problem.at(0.0), 5e-3)
    same = SolverPlan.build(process, grid, "dpmpp_3m_exact", prediction="x0")
    assert_close(found, same.replay(lambda x, t: problem.prediction("x0", x, t), problem.x_T), 1e-9)


@pytest.mark.parametrize("multiplier", [1.0, 2.0])
def test_a_grid_is_learned_through_sampling(multiplier: float) -> None:
    """Gradients in the grid, with and without keeping the states, against differences."""
    process = FDM(EDM(sigma_max=10.0), multiplier)
    problem = Gaussian(process, 1.0)
    inner = torch.tensor([0.5, 0.2, 0.03], dtype=torch.float64)

    def loss(inner: Tensor, recompute: bool) -> Tensor:
        grid = torch.cat([inner.new_ones(1), inner, inner.new_zeros(1)])
        plan = SolverPlan.build(process, grid, "dpmpp_3m", prediction="x0")
        x = sample(
            lambda x, t: problem.prediction("x0", x, t), problem.x_T, plan, recompute=recompute
        )
        return (x - problem.at(0.0)).square().sum()

    for recompute in (False, True):
        call = functools.partial(loss, recompute=recompute)
        assert torch.autograd.gradcheck(call, inner.clone().requires_grad_(), atol=1e-6)


def test_equal_processes_share_plans() -> None:
    grid = [1.0, 0.4, 0.1]
    plan = SolverPlan.build(FDM(VE(), 2.0), grid)
    assert SolverPlan.build(FDM(VE(), 2.0), grid) is plan
    assert SolverPlan.build(FDM(VE(), 1.0), grid) is not plan
    assert SolverPlan.build(FDM(VE(sigma_max=90.0), 2.0), grid) is not plan
    own = FDM(VE(), B=lambda t: t)
    assert not own.plain() and SolverPlan.build(own, grid) is not SolverPlan.build(own, grid)


class Changed(VE):
    """A base that is not what its fields say."""

    extra = 1.0

    def __init__(self) -> None:
        super().__init__()
        object.__setattr__(self, "extra", 2.0)


def test_a_base_with_values_of_its_own_shares_no_plans() -> None:
    assert FDM(VE()).plain() and not FDM(Changed()).plain()


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: FDM(EDM(), 0.0), ValueError, "multiplier must be positive and finite, got 0.0"),
        (lambda: FDM(EDM(), -1.0), ValueError, "multiplier must be positive"),
        (lambda: FDM(EDM(), damping=0.0), ValueError, "damping must be positive"),
        (lambda: FDM(EDM(), B=3), TypeError, "B must be a function of t' or None, got 3"),
        (lambda: FDM(EDM(), B=lambda t: None), TypeError, "B must return a tensor"),
        (
            lambda: FDM(EDM(), sigma_min=torch.ones(2)),
            ValueError,
            r"sigma_min must be one number, got shape \(2,\)",
        ),
        (lambda: FDM(EDM(), "fast"), TypeError, "multiplier must be a real number"),
        (lambda: FDM(FlowMatching()), TypeError, "base must be a VP, VE or EDM process"),
        (lambda: FDM(FDM(EDM())), TypeError, "base must be a VP, VE or EDM process"),
        (lambda: FDM(None), TypeError, "base must be a VP, VE or EDM process"),
        (lambda: FDM(EDM(), sigma_min=90.0), ValueError, "0 <= sigma_min < sigma_max is required"),
        (lambda: FDM(VPCosine(t_max=1.0), 1.0), ValueError, "sigma_max"),
        (lambda: FDM(EDM(), damping=0.5), ValueError, "mean must be positive up to t' = 1"),
        (lambda: FDM(EDM(), 1e3), ValueError, "give a smaller multiplier"),
        (lambda: FDM(EDM(), B=lambda t: 1.0 - t), ValueError, r"B must increase from B\(0\) = 0"),
        (lambda: FDM(EDM(), B=lambda t: t + 1.0), ValueError, r"got B\(0\) = 1"),
        (lambda: FDM(EDM(), B=lambda t: t.sum()), TypeError, "B must return a tensor"),
        (lambda: FDM(EDM()).clock(1j), TypeError, "rho must be a real number"),
        (
            lambda: SolverPlan.build(FDM(EDM()), [1.0, 0.1], history="flow"),
            ValueError,
            "flow history needs alpha",
        ),
    ],
)
def test_refusals(make: Callable[[], object], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        make()
