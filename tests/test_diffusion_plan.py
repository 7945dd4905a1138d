"""SolverPlan: the meaning of its table, gradients, ends (T10), options, cache, and refusals."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable

import numpy as np
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
    solvers,
    time_grid,
)
from dsno_kernels.diffusion.predictions import PREDICTIONS
from dsno_kernels.diffusion.solvers import find
from tests.diffusion_problems import Gaussian, grid_for, names, table_of
from tests.helpers import assert_close

VP = VPLinear()
GRID = torch.tensor([0.95, 0.7, 0.55, 0.31, 0.2, 0.05], dtype=torch.float64)
STOCHASTIC = {"ddim": {"eta": 0.7}, "heun": {"S_churn": 1.0}, "euler": {"S_churn": 1.0}}


def build(name: str = "tab3", process: Process = VP, **options: object) -> SolverPlan:
    return SolverPlan.build(process, GRID, name, **options)


def test_columns_and_counts() -> None:
    plan = build("unipc2")
    K = plan.history_length
    assert (plan.evaluations, K) == (5, 3)
    assert list(plan.columns) == ["A", "B", "a_b", "c_b", "s", "a_p", "c_p", "c_in"]
    starts = [columns.start for columns in plan.columns.values()]
    assert starts == [0, 1, 2, 3, 3 + K, 4 + K, 5 + K, 5 + 2 * K]
    assert plan.table.shape == (5, 6 + 2 * K) and plan.table.dtype == torch.float64
    assert plan.looks_ahead.tolist() == [True, True, True, True, False]
    assert plan.advances.tolist() == [False, True, True, True, True]
    assert plan.times.tolist() == [*GRID[:4].tolist(), float(GRID[5])]
    heun = build("heun")
    assert (heun.evaluations, heun.history_length) == (10, 2)
    assert heun.looks_ahead.tolist() == [True, False] * 5
    assert heun.advances.tolist() == [False, True] * 5
    assert not build("tab3").looks_ahead.any()
    with pytest.raises(ValueError, match="known are A, B"):
        plan.column("d")


def unipc_2_in_words(problem: Gaussian, grid: Tensor) -> Tensor:
    """UniPC-2 (bh2, x0) as the paper has it: predict, evaluate, correct."""
    process, x = problem.process, problem.x_T
    lam, sigma, alpha = (of(grid) for of in (process.log_snr, process.sigma, process.alpha))
    m = [problem.prediction("x0", x, grid[0])]
    for i in range(len(grid) - 1):
        h = lam[i + 1] - lam[i]
        z, B = -h, torch.expm1(-h)
        linear = sigma[i + 1] / sigma[i] * x - alpha[i + 1] * B * m[-1]
        predicted, differences, r = linear, [], []
        if i > 0:
            r = [(lam[i - 1] - lam[i]) / h]
            differences = [(m[-2] - m[-1]) / r[0]]
            predicted = linear - alpha[i + 1] * B * 0.5 * differences[0]
        if i == len(grid) - 2:
            return predicted
        new = problem.prediction("x0", predicted, grid[i + 1])
        differences.append(new - m[-1])
        weights = torch.tensor([0.5], dtype=torch.float64)
        if i > 0:
            b1 = (B / z - 1) / z * z / B
            b2 = 2 * ((B / z - 1) / z - 0.5) / z * z / B
            R = torch.stack(
                [torch.ones(2, dtype=torch.float64), torch.stack([r[0], lam[0] * 0 + 1])]
            )
            weights = torch.linalg.solve(R, torch.stack([b1, b2]))
        x = linear - alpha[i + 1] * B * sum(
            w * d for w, d in zip(weights, differences, strict=True)
        )
        m.append(new)
    raise AssertionError


def test_unipc_row_corrects_then_predicts() -> None:
    problem = Gaussian(VP, 0.95)
    plan = build("unipc2", prediction="eps")
    assert_close(plan.replay(problem.eps, problem.x_T), unipc_2_in_words(problem, GRID), 1e-12)


@pytest.mark.parametrize("process", [VP, EDM(), FlowMatching()], ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("name", ["tab2", "dpmpp_2m", "unipc3", "heun", "dpmpp_3s"])
def test_every_prediction_type_gives_the_same_sample(process: Process, name: str) -> None:
    grid = grid_for(process)
    problem = Gaussian(process, float(grid[0]))
    samples = []
    for kind in PREDICTIONS:
        plan = SolverPlan.build(process, grid, name, prediction=kind)

        def model(x: Tensor, t: Tensor, kind: str = kind) -> Tensor:
            if kind == "edm":  # the network sees the scaled input
                x = x / process.preconditioning(t)[2]
            return problem.prediction(kind, x, t)

        samples.append(plan.replay(model, problem.x_T))
    for sample in samples[1:]:
        assert_close(sample, samples[0], 1e-11)


def edm_heun_in_words(
    denoise: Callable[[Tensor, Tensor], Tensor], x: Tensor, t: Tensor, noise: list[Tensor]
) -> Tensor:
    """Algorithm 2 of EDM, transcribed, with S_churn 30, S_min 0.05, S_max 50, S_noise 1.003."""
    steps = len(t) - 1
    for i in range(steps):
        gamma = min(30 / steps, 2**0.5 - 1) if 0.05 <= t[i] <= 50 else 0.0
        t_hat = t[i] * (1 + gamma)
        x_hat = x + (t_hat**2 - t[i] ** 2).sqrt() * 1.003 * noise[i]
        d = (x_hat - denoise(x_hat, t_hat)) / t_hat
        x = x_hat + (t[i + 1] - t_hat) * d
        if i < steps - 1:
            d_next = (x - denoise(x, t[i + 1])) / t[i + 1]
            x = x_hat + (t[i + 1] - t_hat) * (d + d_next) / 2
    return x


def test_churn_is_that_of_edm() -> None:
    process = EDM()
    problem = Gaussian(process, 80.0)
    grid = time_grid(process, 7, "karras", append_zero=True)
    plan = SolverPlan.build(
        *(process, grid, "heun"),
        prediction="x0", S_churn=30, S_min=0.05, S_max=50, S_noise=1.003,
    )  # fmt: skip
    assert plan.evaluations == 13
    draws = [torch.randn_like(problem.x_T) for _ in range(7)]
    # the noise of a step is added by the last row of the step before
    rows = {-1: 0, **{2 * i - 1: i for i in range(1, 7)}}

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        return problem.prediction("x0", x, t)

    sample = plan.replay(denoise, problem.x_T, noise=lambda row: draws[rows[row]])
    assert_close(sample, edm_heun_in_words(denoise, problem.x_T, grid, draws), 1e-12)


@pytest.mark.parametrize("name", ["sde_dpmpp_1", "sde_dpmpp_2", "sde_dpmpp_3", "ddim"])
def test_stochastic_samples_have_the_variance_of_the_data(name: str) -> None:
    """The distribution is kept: Gaussian data keep their mean and spread."""
    options = {"eta": 1.0} if name == "ddim" else {}
    plan = SolverPlan.build(VP, time_grid(VP, 100, "log_snr"), name, **options)
    problem = Gaussian(VP, 1.0)
    x = torch.randn(20000, 6, dtype=torch.float64)
    sample = plan.replay(problem.eps, x, generator=torch.Generator().manual_seed(1))
    # 20,000 draws: standard errors of 0.7 % and 0.5 % of s, and 5 % from steps of first order
    assert float(((sample.mean(0) - problem.mu) / problem.s).abs().max()) < 0.03
    first_order = name in ("sde_dpmpp_1", "ddim")
    assert float((sample.std(0) / problem.s - 1).abs().max()) < (0.07 if first_order else 0.02)
    again = plan.replay(problem.eps, x, generator=torch.Generator().manual_seed(1))
    assert torch.equal(again, sample)


@pytest.mark.parametrize("history", ["eps", "x0"])
@pytest.mark.parametrize(
    "process", [VP, VPCosine(), EDM(), DiscreteVP.linear()], ids=lambda p: type(p).__name__
)
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_the_last_step_to_zero_returns_the_data(process: Process, history: str, steps: int) -> None:
    """T10: finite at sigma = 0, and x' = x0 there for a model that knows x0."""
    grid = time_grid(process, steps, append_zero=True)
    target = torch.linspace(-1, 1, 5, dtype=torch.float64)
    for name in names(process):
        if history not in find(name).histories:
            continue
        plan = SolverPlan.build(process, grid, name, history=history, prediction="x0")
        assert bool(torch.isfinite(plan.table).all())
        x = float(process.sigma(grid[0])) * torch.randn(5, dtype=torch.float64)
        sample = plan.replay(lambda x, t: target, x)
        # eps = (x - alpha x0) / sigma is taken back apart: digits go where alpha is small
        assert_close(sample, target, 1e-9 if history == "eps" else 1e-12)
        if history == "x0" and not plan.stochastic():
            last = plan.column("c_b")[-1]
            if plan.history_length == 1 or "pc" not in name:
                assert float(plan.column("a_b")[-1]) == 0
                assert last.tolist() == [1.0] + [0.0] * (len(last) - 1)


@pytest.mark.parametrize("name", [n for n in solvers() if n != "flow_euler"])
def test_fewer_steps_than_the_order(name: str) -> None:
    problem = Gaussian(VP, 0.95)
    for times in ([0.95, 0.9], [0.95, 0.92, 0.9]):
        plan = SolverPlan.build(VP, times, name, **({"eta": 0.0} if "sde" in name else {}))
        sample = plan.replay(problem.eps, problem.x_T)
        assert float((sample - problem.at(0.9)).abs().max()) < 0.1
        assert plan.history_length <= 4


@pytest.mark.parametrize("name", [*solvers(), "tab5"])
@pytest.mark.parametrize(
    "process",
    [VP, EDM(), FlowMatching(), DiscreteVP.scaled_linear()],
    ids=lambda p: type(p).__name__,
)
def test_gradient_in_the_grid(process: Process, name: str) -> None:
    """d table / d grid in a random direction against central differences of fourth order."""
    if name == "flow_euler" and not isinstance(process, FlowMatching):
        pytest.skip("works on flows")
    grid = grid_for(process)
    options = STOCHASTIC.get(name, {})
    direction = torch.tensor([0.3, -1.0, 0.7, 0.9, -0.5, 0.4], dtype=torch.float64)
    if isinstance(process, EDM):
        direction = direction * grid  # times of five orders of magnitude

    base = table_of(process, grid, name, **options)
    size = base.abs().amax(0)  # so that every column counts
    weights = torch.randn(base.shape, dtype=torch.float64) / torch.where(size > 0, size, 1.0)

    def total(grid: Tensor) -> Tensor:
        return (weights * table_of(process, grid, name, **options)).sum()

    e = 1e-4 if isinstance(process, EDM) else 3e-5
    if isinstance(process, DiscreteVP):
        e = 1e-3
    free = grid.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(total(free), free)
    points = [float(total(grid + k * e * direction)) for k in (-2, -1, 1, 2)]
    numeric = (points[0] - 8 * points[1] + 8 * points[2] - points[3]) / (12 * e)
    # sums of terms of size 1 are rounded to 1e-15, over e
    assert float(gradient @ direction) == pytest.approx(numeric, rel=1e-8, abs=3e-15 / e)


def test_gradients_of_schedule_and_denoiser_times() -> None:
    def table(beta: Tensor, calls: Tensor, name: str) -> Tensor:
        process = VPLinear(beta_max=beta)
        return table_of(process, GRID, name, denoiser_times=calls, prediction="eps", history="x0")

    beta = torch.tensor(20.0, dtype=torch.float64, requires_grad=True)
    calls = (GRID[:5] - 0.01).requires_grad_()
    for name in ("tab2", "logrhoab2", "dpmpp_3m", "unipc3"):
        assert torch.autograd.gradcheck(
            lambda b, c, n=name: table(b, c, n), (beta, calls), atol=1e-4
        )


def test_gradient_is_finite_where_the_grid_ends_at_zero() -> None:
    """No gradient flows to the end itself, and none is NaN."""
    for process in (VP, EDM(), FlowMatching(), DiscreteVP.linear()):
        for name in ("tab3", "rhoab2", "deis3", "dpmpp_3m", "unipc3", "dpmpp_3s", "ddim"):
            ends = {"t_start": 0.99, "t_end": 0.1} if isinstance(process, FlowMatching) else {}
            grid = time_grid(process, 5, append_zero=True, **ends).requires_grad_()
            table = table_of(process, grid, name)
            weights = torch.randn(table.shape, dtype=torch.float64)
            (gradient,) = torch.autograd.grad((weights * table).sum(), grid)
            assert bool(torch.isfinite(gradient).all()) and float(gradient[-1]) == 0
            assert bool((gradient[1:-1] != 0).all())
    flow = torch.linspace(1, 0, 6, dtype=torch.float64, requires_grad=True)
    for name in ("tab2", "rhoab2", "dpmpp_3m", "unipc3", "dpmpp_2s"):
        table = table_of(FlowMatching(), flow, name, history="x0", prediction="flow")
        (gradient,) = torch.autograd.grad(table.square().sum(), flow)
        assert bool(torch.isfinite(gradient).all()) and float(gradient[2]) != 0


def test_replay_is_differentiable_through_the_grid() -> None:
    problem = Gaussian(VP, 0.95)

    def sample(inner: Tensor) -> Tensor:
        grid = torch.cat([GRID[:1], inner, GRID[-1:]])
        return SolverPlan.build(VP, grid, "unipc2").replay(problem.eps, problem.x_T[:1])

    inner = GRID[1:-1].clone().requires_grad_()
    assert torch.autograd.gradcheck(sample, inner, atol=1e-5)


def test_end_policies() -> None:
    full, lower, euler = (
        build("tab2", end=end) for end in ("full", "lower_order_final", "euler_at_final")
    )
    orders = [[int((row != 0).sum()) for row in p.column("c_b")] for p in (full, lower, euler)]
    assert orders == [[1, 2, 3, 3, 3], [1, 2, 3, 2, 1], [1, 2, 3, 3, 1]]
    assert build("heun", end="euler_at_final").evaluations == 9
    assert build("dpmpp_3s", end="lower_order_final").evaluations == 13


def test_denoiser_times_move_the_calls_alone() -> None:
    calls = GRID[:-1] - 0.02
    plain, moved = build("dpmpp_2m"), build("dpmpp_2m", denoiser_times=calls)
    assert torch.equal(moved.model_times, calls)
    assert torch.equal(moved.table[:, 2:], plain.table[:, 2:])
    torch.testing.assert_close(moved.column("A"), 1 / VP.alpha(calls))


def test_a_process_of_ones_own() -> None:
    """Anything with alpha, sigma, log_snr and inverse: here alpha shrinks, the log-SNR is EDM's."""

    class Scaled:
        def alpha(self, t: Tensor) -> Tensor:
            return torch.exp(-t)

        def sigma(self, t: Tensor) -> Tensor:
            return torch.exp(-t) * t

        def log_snr(self, t: Tensor) -> Tensor:
            return -torch.log(t)

        def inverse(self, log_snr: Tensor) -> Tensor:
            return torch.exp(-log_snr)

    t = torch.tensor([2.0, 1.0, 0.4, 0.1], dtype=torch.float64)
    scale = torch.exp(-t)
    for name in ("tab2", "deis3", "rhork_3kutta", "dpmpp_2m", "unipc2"):
        ours, edm = (SolverPlan.build(p, t, name) for p in (Scaled(), EDM()))
        if name == "rhork_3kutta":
            assert_close(ours.column("a_b")[2::3], scale[1:] / scale[:-1], 1e-14)
        elif name != "unipc2":
            ratio = (scale[1:] / scale[:-1])[:, None]
            assert_close(ours.column("a_b")[:, None], edm.column("a_b")[:, None] * ratio, 1e-14)
            assert_close(ours.column("c_b"), edm.column("c_b") * scale[1:, None], 1e-13)
        assert ours is not SolverPlan.build(Scaled(), t, name)


def test_equal_arguments_share_a_plan() -> None:
    assert build("unipc3") is SolverPlan.build(VPLinear(), GRID.tolist(), "unipc3_bh2")
    for order in (6, np.int64(6)):
        assert build("tab", order=order) is build("tab6")
    assert build("tab3") is not build("tab2")
    assert build("tab3") is not SolverPlan.build(VPLinear(beta_max=19.0), GRID, "tab3")
    free = GRID.clone().requires_grad_()
    assert SolverPlan.build(VP, free).table.requires_grad
    learned = VPLinear(beta_max=torch.tensor(20.0, dtype=torch.float64))
    assert SolverPlan.build(learned, GRID) is not SolverPlan.build(learned, GRID)


class Scaled(VPLinear):
    """Not a dataclass of its own: b takes no part in its hash."""

    def __init__(self, b: float) -> None:
        super().__init__()
        self.b = b

    def sigma(self, t: float | Tensor) -> Tensor:
        return self.b * super().sigma(t)


def test_a_process_that_changes_gets_a_new_plan() -> None:
    process = Scaled(0.5)
    before = SolverPlan.build(process, GRID, "dpmpp_2m")
    assert SolverPlan.build(Scaled(0.25), GRID, "dpmpp_2m").table.ne(before.table).any()
    process.b = 2.0
    assert SolverPlan.build(process, GRID, "dpmpp_2m").table.ne(before.table).any()


def test_discrete_processes_share_plans_by_their_values() -> None:
    process, grid = DiscreteVP.linear(), [900.0, 400.0, 0.0]
    plan = SolverPlan.build(process, grid)
    assert SolverPlan.build(DiscreteVP.linear(), grid) is plan
    assert SolverPlan.build(DiscreteVP.scaled_linear(), grid) is not plan
    process.alphas_cumprod.mul_(0.9)
    changed = SolverPlan.build(process, grid)
    assert changed.table.ne(plan.table).any()
    assert torch.equal(changed.table, SolverPlan.build(copy.deepcopy(process), grid).table)
    process.sigma_data = 1.0  # an attribute that is no value of the class
    assert not process.plain()


def test_the_gradient_mode_of_the_caller_stays() -> None:
    """Leaving inference mode turned it on."""
    free = GRID.clone().requires_grad_()
    learned = torch.linspace(0.9, 0.1, 9, dtype=torch.float32, requires_grad=True)
    with torch.no_grad():
        plan = SolverPlan.build(VP, free)
        assert not plan.table.requires_grad and not plan.reversed().table.requires_grad
        assert not DiscreteVP(learned).alphas_cumprod.requires_grad
    assert SolverPlan.build(VP, free).table.requires_grad
    assert DiscreteVP(learned).alphas_cumprod.requires_grad


def test_plans_can_be_copied_and_pickled() -> None:
    plan = build("unipc3")
    for other in (copy.deepcopy(plan), pickle.loads(pickle.dumps(plan))):
        assert torch.equal(other.table, plan.table) and str(other) == str(plan)


def test_plans_made_in_inference_mode_take_part_in_autograd() -> None:
    """A shared plan of inference tensors would break whoever trains with it next."""
    with torch.inference_mode():
        process = DiscreteVP.linear()
        plan = SolverPlan.build(process, time_grid(process, 7), "tab2")
    x = torch.ones(3, dtype=torch.float64, requires_grad=True)
    plan.replay(lambda x, t: 0.1 * x, x).sum().backward()
    assert bool(torch.isfinite(x.grad).all())


def test_the_default_device_does_not_matter() -> None:
    with torch.device("meta"):
        process = DiscreteVP.linear()
        for name in ("tab2", "unipc3", "dpmpp_3s"):
            plan = SolverPlan.build(process, time_grid(process, 7), name)
            assert plan.table.device.type == "cpu"


def test_low_precision_states_stay_so() -> None:
    x = torch.ones(4, dtype=torch.bfloat16)
    assert build("tab3").replay(lambda x, t: 0.1 * x, x).dtype == torch.bfloat16


def test_a_plan_prints_itself() -> None:
    lines = str(build("tab1")).splitlines()
    assert lines[0].startswith("SolverPlan(tab1, steps=5, evaluations=5, history=eps")
    assert lines[1].split() == ["row", "model", "time", "time", "after", "a_b", "c_b[0]", "c_b[1]"]
    assert len(lines) == 7
    assert lines[2].split()[:3] == ["0", "0.95", "0.7"]


def test_names() -> None:
    known = solvers()
    assert "tab3" in known and "unipc3_bh2" in known and all(known.values())
    assert find("unipc", 3).name == "unipc3_bh2"
    assert find("unipc_bh1", 2).name == "unipc2_bh1"
    assert find("sde_dpmpp", 2).name == "sde_dpmpp_2"
    assert find("rhoab7").name == "rhoab7"


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"name": "tab9"}, ValueError, "degree of solver 'tab' must be at most 7, got 9"),
        ({"name": "rhoab", "order": 8}, ValueError, "'rhoab' must be at most 7, got 8"),
        ({"name": "magic"}, ValueError, "unknown solver 'magic'; known are"),
        ({"name": "tab3", "order": 2}, ValueError, "order=2 contradicts the 3"),
        ({"name": "tab", "order": 1.5}, TypeError, "order must be an integer"),
        ({"name": "ddim", "eta": "a"}, TypeError, "eta must be a real number or a tensor, got 'a'"),
        ({"name": "heun", "S_churn": [1, 2]}, ValueError, "S_churn must be one number, got shape"),
        ({"history": "x1"}, ValueError, "unknown history 'x1'; known are eps, x0, flow"),
        ({"name": "heun", "history": "x0"}, ValueError, "works on eps history, not on 'x0'"),
        ({"history": "flow"}, ValueError, r"alpha \+ sigma = 1"),
        ({"prediction": "noise"}, ValueError, "unknown prediction 'noise'; known are eps"),
        ({"end": "soon"}, ValueError, "unknown end 'soon'; known are full"),
        ({"start": "cold"}, ValueError, "start must be 'warm_up' or times"),
        ({"start": [0.9]}, ValueError, r"earlier times.*start\[0\] = 0.9"),
        ({"start": [0.97, 0.96]}, ValueError, r"start\[1\] = 0.96"),
        ({"denoiser_times": [0.9, 0.5]}, ValueError, r"one time an evaluation, shape \(5,\)"),
        ({"denoiser_times": [9.0] * 5}, ValueError, r"denoiser_times\[0\] = 9.0 lies outside"),
        ({"eta": 1.0}, ValueError, "'tab3' takes no eta"),
        ({"name": "ddim", "eta": 2.0}, ValueError, "at most 1 for ddim"),
        ({"S_churn": 1.0}, ValueError, "'tab3' takes no churn"),
        ({"name": "sde_dpmpp_2", "eta": math.inf}, ValueError, "eta must be finite"),
        ({"name": "heun", "S_churn": -1.0}, ValueError, "at least 0"),
        ({"name": "heun", "S_noise": math.inf}, ValueError, "S_noise finite, got 0.0 and inf"),
        ({"name": "heun", "S_min": math.nan}, ValueError, "S_min must be at most S_max, got nan"),
        ({"process": object()}, TypeError, "process must have a method alpha"),
    ],
)
def test_refusals(options: dict[str, object], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        build(**options)


def test_coefficients_that_do_not_exist_are_refused() -> None:
    flow = torch.linspace(1, 0, 5)
    with pytest.raises(ValueError, match=r"a_b of row 0 is not finite: .*alpha = 0"):
        SolverPlan.build(FlowMatching(), flow, "tab3")
    with pytest.raises(ValueError, match=r"A of row 0 is not finite: .*alpha = 0"):
        SolverPlan.build(FlowMatching(), flow, "dpmpp_2m", prediction="eps")
    plan = SolverPlan.build(VP, [1.0, 0.5, 0.0], "dpmpp_2m")
    with pytest.raises(ValueError, match=r"a_b of row 0 is not finite: .*sigma = 0"):
        plan.reversed()


def test_reversal_and_history_are_refused_where_they_mean_nothing() -> None:
    for plan in (build("sde_dpmpp_2"), build("tab1", start=[0.97]), build(denoiser_times=GRID[:5])):
        with pytest.raises(ValueError, match="can be reversed"):
            plan.reversed()
    with pytest.raises(ValueError, match="starts from 1 history entries, got 0"):
        build("tab1", start=[0.97]).replay(lambda x, t: x, torch.ones(2))


def test_edm_predictions_need_preconditioning() -> None:
    class Bare:
        alpha = sigma = log_snr = inverse = staticmethod(torch.exp)

    with pytest.raises(ValueError, match="preconditioning"):
        SolverPlan.build(Bare(), [0.9, 0.5], prediction="edm")
