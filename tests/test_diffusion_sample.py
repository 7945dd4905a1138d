"""`sample`: the same numbers as `SolverPlan.replay`, guidance, frames, noise, and low precision."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dsno_kernels import diffusion
from dsno_kernels.diffusion import EDM, FlowMatching, Process, SolverPlan, VPLinear, time_grid
from dsno_kernels.training.images import digits
from tests.diffusion_problems import Gaussian, grid_for, names
from tests.helpers import assert_close, rel_rms

VP = VPLinear()
PROCESSES = [VP, EDM(), FlowMatching()]
# The order of the sums differs from replay's; a trajectory grows rounding by less than 100.
FLOAT64 = 1e-13
FLOAT32 = 1e-5
# Facts 3.5: DPM-Solver++ 2M of diffusers, which upcasts the state in each step, bf16, 20 steps.
BF16_OF_DIFFUSERS = 6.4e-3
NOISY = {
    "ddim": {"eta": 0.7},
    "euler": {"S_churn": 3.0},
    "heun": {"S_churn": 3.0},
}


def noise_of(x: Tensor) -> Callable[[int], Tensor]:
    """A fixed noise for each row."""

    def draw(row: int) -> Tensor:
        generator = torch.Generator().manual_seed(row + 7)
        return torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype)

    return draw


def in_float64(model: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda x, t: model(x.double(), t.double()).to(x.dtype)


@pytest.mark.parametrize("process", PROCESSES, ids=lambda p: type(p).__name__)
def test_every_solver_samples_as_its_plan_replays(process: Process) -> None:
    grid = grid_for(process)
    problem = Gaussian(process, float(grid[0]))
    for name in names(process):
        plan = SolverPlan.build(process, grid, name, **NOISY.get(name, {}))
        noise = noise_of(problem.x_T)
        expected = plan.replay(problem.eps, problem.x_T, noise=noise)
        ours = diffusion.sample(problem.eps, problem.x_T, plan, noise=noise)
        assert rel_rms(ours, expected) <= FLOAT64, name
        x = problem.x_T.float()
        ours = diffusion.sample(in_float64(problem.eps), x, plan, noise=noise_of(x))
        assert ours.dtype == torch.float32
        assert rel_rms(ours, expected) <= FLOAT32, name


@functools.cache
def real_digits() -> Tensor:
    return digits().images[:300].double()


@functools.cache
def digit_denoiser() -> Callable[..., Tensor]:
    """The exact x0 prediction of 300 digits."""
    return diffusion.for_process(diffusion.ExactDenoiser(real_digits()), VP)


@pytest.mark.parametrize("name", ["tab3", "unipc3", "dpmpp_3m", "rhork_3kutta", "dpmpp_2s"])
def test_digits_in_float64_and_float32(name: str) -> None:
    plan = SolverPlan.build(VP, time_grid(VP, 8, "log_snr"), name, prediction="x0")
    x = torch.randn(4, 1, 8, 8, dtype=torch.float64)
    expected = plan.replay(digit_denoiser(), x)
    assert_close(diffusion.sample(digit_denoiser(), x, plan), expected, FLOAT64)
    assert_close(diffusion.sample(digit_denoiser(), x.float(), plan), expected, FLOAT32)
    nearest = torch.cdist(expected.flatten(1), real_digits().flatten(1)).amin(1)
    assert (nearest < 0.5).all()  # images lie about 5 apart


@pytest.mark.parametrize("prediction", ["x0", "edm"])
def test_a_bfloat16_model_and_state(prediction: str) -> None:
    """T8, against the same model on a float64 state: 20 steps of tab2 and DPM-Solver++ 2M."""
    process = EDM() if prediction == "edm" else VP
    grid = time_grid(process, 20, "log_snr")
    problem = Gaussian(process, float(grid[0]))

    def model(x: Tensor, t: Tensor) -> Tensor:
        assert x.dtype == torch.bfloat16 and t.dtype == torch.float32 and t.ndim == 0
        x, t = x.double(), t.double()
        if prediction == "edm":
            x = x / process.preconditioning(t)[2]
        return problem.prediction(prediction, x, t).to(torch.bfloat16)

    for name in ("tab2", "dpmpp_2m"):
        plan = SolverPlan.build(process, grid, name, history="x0", prediction=prediction)
        eps_plan = SolverPlan.build(process, grid, name, history="x0")
        exact = eps_plan.replay(problem.eps, problem.x_T)
        low = diffusion.sample(model, problem.x_T.bfloat16(), plan)
        assert low.dtype == torch.bfloat16
        assert_close(low, exact, BF16_OF_DIFFUSERS)
        mixed = diffusion.sample(model, problem.x_T.float(), plan, model_dtype=torch.bfloat16)
        assert mixed.dtype == torch.float32
        assert_close(mixed, exact, BF16_OF_DIFFUSERS)


def labeled(x: Tensor, t: Tensor, label: Tensor, scale: float = 1.0) -> Tensor:
    """Noise predictions that differ by label, `[B]`."""
    return scale * torch.tanh(x + label.reshape(-1, *[1] * (x.ndim - 1)) + t)


@pytest.mark.parametrize("g", [2.5, torch.tensor(2.5), torch.tensor([2.5, 0.0, 1.0])], ids=str)
def test_guidance_in_one_call_and_in_two(g: float | Tensor) -> None:
    x = torch.randn(3, 2, 4, dtype=torch.float64)
    label, none = torch.tensor([1.0, 2.0, 3.0]), torch.zeros(3)
    plan = SolverPlan.build(VP, time_grid(VP, 6), "unipc2")
    scale = g.reshape(-1, *[1] * 2 * g.ndim) if isinstance(g, Tensor) else g

    def guided(x: Tensor, t: Tensor) -> Tensor:
        u = labeled(x, t, none, 0.5)
        return u + scale * (labeled(x, t, label, 0.5) - u)

    sizes = []

    def counted(x: Tensor, t: Tensor, label: Tensor, scale: float) -> Tensor:
        sizes.append(len(x))
        return labeled(x, t, label, scale)

    for split in (False, True):
        ours = diffusion.sample(
            *(counted, x, plan),
            kwargs={"label": label, "scale": 0.5},
            unconditional={"label": none, "scale": 0.5},
            guidance=g,
            split_guidance=split,
        )
        assert_close(ours, plan.replay(guided, x), FLOAT64)
    assert sizes == [6] * 6 + [3] * 12


def stands_at(plan: SolverPlan, model: Callable[[Tensor, Tensor], Tensor], x: Tensor) -> Tensor:
    """base at every time of the grid where the plan has it, `[T, *x.shape]`, in plain PyTorch."""
    base = point = x
    entries: list[Tensor] = []
    found = [x]
    for i, row in enumerate(plan.table):
        A, B, a_b, a_p = (row[plan.columns[name].start] for name in ("A", "B", "a_b", "a_p"))
        entries = [A * point + B * model(point, plan.model_times[i]), *entries]
        c_b, c_p = row[plan.columns["c_b"]], row[plan.columns["c_p"]]
        base = a_b * base + sum(c * h for c, h in zip(c_b, entries, strict=False))
        point = a_p * base + sum(c * h for c, h in zip(c_p, entries, strict=False))
        if plan.advances[i]:
            found.append(base)
    return torch.stack(found)


@pytest.mark.parametrize("name", ["tab2", "heun", "rhork_3kutta"])
def test_frames_by_time_and_by_position(name: str) -> None:
    grid = grid_for(VP)
    problem = Gaussian(VP, float(grid[0]))
    plan = SolverPlan.build(VP, grid, name)
    expected = stands_at(plan, problem.eps, problem.x_T).transpose(0, 1)
    assert expected.shape[1] == len(grid)
    ours = diffusion.sample(problem.eps, problem.x_T, plan, frames=range(len(grid)))
    assert_close(ours, expected, FLOAT64)
    assert torch.equal(ours[:, 0], problem.x_T)
    times = grid[[5, 2, 2]].float()  # as a data set stores them
    ours = diffusion.sample(problem.eps, problem.x_T, plan, frames=times)
    assert_close(ours, expected[:, [5, 2, 2]], FLOAT64)


def test_frames_where_a_corrector_stands() -> None:
    """UniPC corrects a state at the next evaluation, but never the last one but one."""
    grid = grid_for(VP)
    problem = Gaussian(VP, float(grid[0]))
    plan = SolverPlan.build(VP, grid, "unipc2")
    expected = stands_at(plan, problem.eps, problem.x_T).transpose(0, 1)
    ours = diffusion.sample(problem.eps, problem.x_T, plan, frames=[0, 1, 2, 3, 5])
    assert_close(ours, expected, FLOAT64)
    with pytest.raises(ValueError, match=r"unipc2_bh2 never stands at t = 0.16\d*; its states"):
        diffusion.sample(problem.eps, problem.x_T, plan, frames=[4])


@pytest.mark.parametrize("name", ["sde_dpmpp_2", "heun"])
def test_noise_comes_from_the_generator(name: str) -> None:
    grid = grid_for(VP)
    problem = Gaussian(VP, float(grid[0]))
    plan = SolverPlan.build(VP, grid, name, **NOISY.get(name, {}))

    def drawn(seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return diffusion.sample(problem.eps, problem.x_T, plan, generator=generator)

    assert torch.equal(drawn(1), drawn(1))
    assert rel_rms(drawn(2), drawn(1)) > 0.01
    torch.manual_seed(3)
    first = diffusion.sample(problem.eps, problem.x_T, plan)
    assert rel_rms(diffusion.sample(problem.eps, problem.x_T, plan), first) > 0.01
    torch.manual_seed(3)
    assert torch.equal(diffusion.sample(problem.eps, problem.x_T, plan), first)


def test_noise_has_the_plan_s_variance() -> None:
    """From one point, rows of fresh noise: the spread of the samples is that of replay."""
    plan = SolverPlan.build(VP, [0.9, 0.5, 0.2], "sde_dpmpp_1", prediction="x0")
    x = torch.zeros(40000)

    def model(x: Tensor, t: Tensor) -> Tensor:
        return 0.3 * x

    ours, expected = diffusion.sample(model, x, plan).std(), plan.replay(model, x).std()
    assert float(ours) == pytest.approx(float(expected), rel=0.03)  # each is 0.35 % uncertain


def test_data_to_noise_and_back() -> None:
    grid = time_grid(VP, 200, "log_snr", t_end=1e-2)
    problem = Gaussian(VP, 1.0)
    plan = SolverPlan.build(VP, grid, "dpmpp_3m_exact")
    x0 = diffusion.sample(problem.eps, problem.x_T, plan)
    x_T = diffusion.sample(problem.eps, x0, plan.reversed())
    assert_close(x_T, problem.x_T, 1e-5)


def test_a_given_history() -> None:
    times = torch.tensor([0.99, 0.95, 0.9, 0.7, 0.5], dtype=torch.float64)
    problem = Gaussian(VP, 0.9)
    plan = SolverPlan.build(VP, times[2:], "tab2", start=times[:2].flip(0))
    history = [problem.prediction("eps", problem.at(t), t) for t in (0.95, 0.99)]
    ours = diffusion.sample(problem.eps, problem.x_T, plan, history=history)
    assert_close(ours, plan.replay(problem.eps, problem.x_T, history), FLOAT64)
    with pytest.raises(ValueError, match="starts from 2 history entries, got 0"):
        diffusion.sample(problem.eps, problem.x_T, plan)


def test_callback_sees_every_row_and_may_stop() -> None:
    grid = grid_for(VP)
    problem = Gaussian(VP, float(grid[0]))
    plan = SolverPlan.build(VP, grid, "dpmpp_2m")
    seen: list[tuple[int, Tensor, Tensor]] = []

    def callback(i: int, t: Tensor, x: Tensor, h: Tensor) -> bool:
        assert t == grid[i + 1]
        seen.append((i, x, h))
        return i == 2

    stopped = diffusion.sample(problem.eps, problem.x_T, plan, callback=callback)
    assert [i for i, _, _ in seen] == [0, 1, 2]
    path = stands_at(plan, problem.eps, problem.x_T)
    assert_close(stopped, path[3], FLOAT64)
    for i, x, h in seen:
        assert_close(x, path[i + 1], FLOAT64)
        assert_close(h, problem.prediction("x0", path[i], grid[i]), FLOAT64)
    frames = diffusion.sample(
        problem.eps, problem.x_T, plan, callback=callback, frames=[0, 2, 4, 5]
    )
    assert_close(frames, path[[0, 2]].transpose(0, 1), FLOAT64)


def test_clip_and_threshold_act_on_x0() -> None:
    x = 3 * torch.randn(2, 3, 5, dtype=torch.float64)
    plan = SolverPlan.build(VP, time_grid(VP, 5), "dpmpp_2m", prediction="x0")

    def clipped(x: Tensor, t: Tensor) -> Tensor:
        return x.clamp(-1, 0.5)

    ours = diffusion.sample(lambda x, t: x, x, plan, clip=(-1, 0.5))
    assert_close(ours, plan.replay(clipped, x), FLOAT64)

    def thresholded(x: Tensor, t: Tensor) -> Tensor:
        s = torch.quantile(x.abs().flatten(1), 0.8, dim=1).clamp(min=1.0).reshape(-1, 1, 1)
        return x.clamp(-s, s) / s

    ours = diffusion.sample(lambda x, t: x, x, plan, threshold=(0.8, 1.0, "dpm_solver"))
    assert_close(ours, plan.replay(thresholded, x), FLOAT64)


@pytest.mark.parametrize("shape", [(), (3,), (0, 2, 3)], ids=str)
def test_states_of_few_axes_and_of_no_samples(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, dtype=torch.float64)
    for name in ("tab2", "unipc2", "heun"):
        plan = SolverPlan.build(VP, time_grid(VP, 4), name)
        ours = diffusion.sample(lambda x, t: torch.tanh(x), x, plan)
        assert_close(ours, plan.replay(lambda x, t: torch.tanh(x), x), FLOAT64)


def test_other_memory_orders_and_no_write_into_the_input() -> None:
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    plan = SolverPlan.build(VP, time_grid(VP, 4), "tab2")
    expected = diffusion.sample(lambda x, t: torch.tanh(x), x, plan)
    last = x.contiguous(memory_format=torch.channels_last)
    before = last.clone()
    ours = diffusion.sample(lambda x, t: torch.tanh(x), last, plan)
    assert_close(ours, expected, FLOAT64)
    assert ours.stride() == last.stride() and torch.equal(last, before)
    expanded = x[:1, :1].expand(2, 3, 4, 5)
    ours = diffusion.sample(lambda x, t: torch.tanh(x), expanded, plan)
    assert_close(ours, plan.replay(lambda x, t: torch.tanh(x), expanded), FLOAT64)


def good(x: Tensor, t: Tensor) -> Tensor:
    return torch.tanh(x)


PLAN = SolverPlan.build(VP, time_grid(VP, 5), "tab2")
X = torch.zeros(2, 3, 4)


@pytest.mark.parametrize(
    ("denoiser", "error", "text"),
    [
        (lambda x, t: x[:1], ValueError, r"returns at row 0 of the plan must have the shape"),
        (lambda x, t: x.to("meta"), ValueError, r"\(2, 3, 4\) on cpu, got \(2, 3, 4\) on meta"),
        (lambda x, t: x.long(), TypeError, r"returns at row 0 of the plan must be real floating"),
        (lambda x, t: (x,), TypeError, r"row 0 of the plan must be a torch.Tensor, got tuple"),
        (lambda x, t: x.add_(1), ValueError, "changed its input in place at row 0"),
        (
            lambda x, t: torch.full_like(x, torch.inf if t < 0.5 else 1.0),
            ValueError,
            "NaN or infinity at row 3 of the plan, t = 0.4006",
        ),
        (None, TypeError, "denoiser must be callable, got NoneType"),
    ],
    ids=["shape", "device", "dtype", "tuple", "in_place", "infinity", "none"],
)
def test_denoisers_that_are_refused(
    denoiser: Callable[..., Tensor], error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        diffusion.sample(denoiser, X + 0, PLAN)


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"x_T": X.long()}, TypeError, "x_T must be real floating point"),
        ({"plan": PLAN.table}, TypeError, "plan must be a SolverPlan, got Tensor"),
        ({"model_dtype": torch.int64}, TypeError, "model_dtype must be one of"),
        ({"guidance": 2.0}, ValueError, "unconditional and guidance come together"),
        ({"clip": (-1, 1)}, ValueError, "act on x0, but the plan combines eps"),
        ({"frames": []}, ValueError, "at least one time, got none"),
        ({"frames": [6]}, ValueError, r"frame 6 is not a position in the grid, 0..5"),
        ({"frames": [0.51]}, ValueError, "0.51 is not in the grid of the plan; the nearest is 0.6"),
        ({"frames": [float("nan")]}, ValueError, "frame time nan is not in the grid"),
        ({"frames": [0], "x_T": X[0, 0, 0]}, ValueError, "frames need an x_T with a batch axis"),
        ({"recompute": True, "progress": True}, ValueError, "takes no callback and no progress"),
        ({"history": [X]}, ValueError, "starts from 0 history entries, got 1"),
        ({"history": None}, TypeError, r"newest first, got NoneType; give \(\) for none"),
        ({"kwargs": [1]}, TypeError, "kwargs must be a mapping .* got list"),
        ({"unconditional": 1}, TypeError, "unconditional must be a mapping .* got int"),
        ({"generator": 5, "plan": "sde"}, TypeError, "must be a torch.Generator or None, got 5"),
        ({"noise": X, "plan": "sde"}, TypeError, "noise must be callable, got Tensor"),
        ({"callback": 3}, TypeError, "callback must be callable, got int"),
        ({"noise": lambda i: X[:1], "plan": "sde"}, ValueError, r"noise must have the shape"),
        ({"history": [X[:1]], "plan": "seeded"}, ValueError, r"history\[0\] must have the shape"),
    ],
    # Not the arguments themselves: every process must give a test the same name.
    ids=lambda given: "-".join(given) if isinstance(given, dict) else "",
)
def test_arguments_that_are_refused(
    options: dict[str, Any], error: type[Exception], text: str
) -> None:
    plans = {
        "sde": SolverPlan.build(VP, PLAN.grid, "sde_dpmpp_1"),
        "seeded": SolverPlan.build(VP, PLAN.grid[1:], "tab1", start=PLAN.grid[:1]),
    }
    plan = options.pop("plan", PLAN)
    plan = plans[plan] if isinstance(plan, str) else plan
    x_T = options.pop("x_T", X)
    with pytest.raises(error, match=text):
        diffusion.sample(good, x_T, plan, **options)


@pytest.mark.parametrize(
    ("kwargs", "unconditional"),
    [
        ({"label": torch.zeros(3)}, {"label": torch.zeros(2)}),
        ({"label": torch.zeros(2)}, {}),
        ({"label": 1}, {"label": 2}),
        ({"label": torch.tensor(1.0)}, {"label": torch.tensor(2.0)}),
    ],
    ids=["batch", "missing", "number", "scalar"],
)
def test_guidance_in_one_call_needs_arguments_that_fit(
    kwargs: dict[str, Any], unconditional: dict[str, Any]
) -> None:
    def model(x: Tensor, t: Tensor, label: float | Tensor = 0.0) -> Tensor:
        return torch.tanh(x + torch.as_tensor(label).sum())

    options = {"kwargs": kwargs, "unconditional": unconditional, "guidance": 2.0}
    with pytest.raises(ValueError, match="argument 'label' of the denoiser cannot serve"):
        diffusion.sample(model, X, PLAN, **options)
    assert diffusion.sample(model, X, PLAN, split_guidance=True, **options).isfinite().all()


def test_checks_for_finite_values_can_be_left_out() -> None:
    bad = diffusion.sample(lambda x, t: x * torch.nan, X, PLAN, check_finite=False)
    assert bad.isnan().all()


def test_progress_bar(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    diffusion.sample(good, X, PLAN, progress=True)
    assert "5/5" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    with pytest.raises(ImportError, match="pip install tqdm"):
        diffusion.sample(good, X, PLAN, progress=True)
