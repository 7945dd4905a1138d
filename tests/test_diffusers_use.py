"""The fused schedulers in use: what is right where diffusers is not, state, gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import traffic
from tests.helpers import assert_close, rel_rms

pytest.importorskip("diffusers", reason="diffusers is not installed")

from tests.scheduler_runs import (
    SCHEDULERS,
    denoise,
    original,
    ours,
    run,
    run_wide,
    scheduled,
    start,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:__array:DeprecationWarning"),
]

SINGLE = 1e-5  # float32 on both sides
KARRAS_LIKE = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_flow_sigmas")
ALL = (*SCHEDULERS, "DDIMScheduler")


# Published numbers of diffusers' own tests (tests/schedulers): the model x t / (t + 1) on a ramp.


def ramp() -> Tensor:
    """4 samples of 3 x 8 x 8, the batch innermost in the ramp."""
    return (torch.arange(768).reshape(3, 8, 8, 4) / 768).permute(3, 0, 1, 2)


def published_run(scheduler: Any, x: Tensor, timesteps: Tensor) -> Tensor:
    for t in timesteps:
        x = scheduler.step(x * t / (t + 1), t, x).prev_sample
    return x


@pytest.mark.parametrize(("prediction", "mean"), [("epsilon", 0.23916), ("v_prediction", 0.091)])
def test_published_means(prediction: str, mean: float) -> None:
    scheduler = ours("DEISMultistepScheduler", solver_order=2, prediction_type=prediction)
    scheduled(scheduler, 10)
    found = published_run(scheduler, ramp(), scheduler.timesteps).abs().mean()
    assert abs(float(found) - mean) < 1e-3


def test_published_sum_with_noise() -> None:
    scheduler = scheduled(ours("DEISMultistepScheduler", solver_order=2), 10)
    noise = (torch.arange(768).flip(0).reshape(3, 8, 8, 4) / 768).permute(3, 0, 1, 2)
    timesteps = scheduler.timesteps[8:]
    x = scheduler.add_noise(ramp(), noise, timesteps[:1])
    found = published_run(scheduler, x, timesteps).abs()
    assert abs(float(found.sum()) - 315.3016) < 1e-2
    assert abs(float(found.mean()) - 0.41054) < 1e-3


# Where diffusers is not right


@pytest.mark.parametrize("schedule", KARRAS_LIKE)
def test_last_step_of_deis_denoises(schedule: str) -> None:
    """diffusers wastes the last evaluation; here it takes the sample to the predicted x0."""
    config = {schedule: True, "solver_order": 3}
    if schedule == "use_flow_sigmas":
        config["prediction_type"] = "flow_prediction"
    x, results = start(), {}
    for match in (True, False):
        scheduler = scheduled(ours("DEISMultistepScheduler", **config, match_diffusers=match), 20)
        before = run(scheduler, x, scheduler.timesteps[:-1])
        t = scheduler.timesteps[-1]
        m = denoise(before, t)
        results[match] = before, m, scheduler.step(m, t, before).prev_sample, scheduler.sigmas
    (before, _, after, _), (mine, m, x0, sigmas) = results[True], results[False]
    assert_close(after, before, 1e-12)  # the defect
    assert_close(mine, before, 1e-12)
    sigma = float(sigmas[-2])
    alpha = 1.0 if schedule == "use_flow_sigmas" else (1 + sigma**2) ** -0.5
    assert sigmas[-1] == 0
    assert_close(x0, (before - sigma * alpha * m) / alpha, 1e-6)


@pytest.mark.parametrize("schedule", KARRAS_LIKE)
@pytest.mark.parametrize("name", SCHEDULERS[1:])
def test_no_step_without_length(name: str, schedule: str) -> None:
    """sigma_min with such sigmas: the same ends, one step more between them."""
    config = {schedule: True, "final_sigmas_type": "sigma_min"}
    theirs, mine = (scheduled(make(name, **config), 12) for make in (original, ours))
    assert len(mine.timesteps) == len(theirs.timesteps) == 12
    assert mine.num_inference_steps == 12 and len(mine.sigmas) == 13
    assert bool((mine.sigmas.diff() < 0).all())
    assert_close(mine.sigmas[0], theirs.sigmas[0], 1e-6)
    if schedule != "use_flow_sigmas":
        assert_close(mine.sigmas[-1], theirs.sigmas[-1], 1e-5)
    assert bool(torch.isfinite(run(mine, start())).all())


@pytest.mark.parametrize(
    ("solver_type", "predict_x0"), [("bh1", True), ("bh1", False), ("bh2", False)]
)
def test_unipc_is_finite_at_sigma_zero(solver_type: str, predict_x0: bool) -> None:
    """The default end of the original, where it gives NaN."""
    config = {"solver_type": solver_type, "predict_x0": predict_x0, "solver_order": 3}
    theirs = run(scheduled(original("UniPCMultistepScheduler", **config)), start())
    assert bool(theirs.isnan().any())  # or this test says nothing
    for lower in (True, False):
        mine = scheduled(ours("UniPCMultistepScheduler", **config, lower_order_final=lower))
        before = run(mine, start(), mine.timesteps[:-1])
        t = mine.timesteps[-1]
        assert bool(mine.step(denoise(before, t), t, before).prev_sample.isfinite().all())


def test_dynamic_thresholding_is_dynamic() -> None:
    """The threshold of each sample is its own quantile; diffusers' default clamps to [-1, 1]."""
    x = torch.stack([0.5 * torch.ones(3, 4, 4), 3 * torch.rand(3, 4, 4)])
    config = {"thresholding": True, "prediction_type": "sample", "solver_order": 1}
    results = {}
    for match in (True, False):
        scheduler = ours("DPMSolverMultistepScheduler", **config, match_diffusers=match)
        scheduled(scheduler, 1)
        results[match] = scheduler.step(x, scheduler.timesteps[0], x).prev_sample
    assert_close(results[True], x.clamp(-1, 1), 1e-6)
    s = torch.quantile(x[1].flatten(), 0.995)
    assert_close(results[False], torch.stack([x[0], x[1].clamp(-s, s) / s]), 1e-6)
    with pytest.raises(ValueError, match="sample_max_value must be at least 1"):
        ours("DPMSolverMultistepScheduler", thresholding=True, sample_max_value=0.5).set_timesteps(
            4
        )


def test_dpm_solver_of_order_3_is_of_order_3() -> None:
    """It is then UniP-3, another derivation of the one exact method in log-SNR."""
    settings = {"solver_order": 3, "lower_order_final": False, "final_sigmas_type": "sigma_min"}
    unip = ours("UniPCMultistepScheduler", **settings, disable_corrector=list(range(30)))
    heun = {"solver_type": "heun", **settings}
    mine, shipped = (
        ours("DPMSolverMultistepScheduler", **heun, match_diffusers=match)
        for match in (False, True)
    )
    # the warm-up step of order 2 is the published shortcut in UniP: from the third step on
    results = []
    for scheduler in (unip, mine, shipped):
        scheduled(scheduler, 30)
        for seed, t in enumerate(scheduler.timesteps[:4]):
            moved = scheduler.step(start(seed=seed), t, start(seed=9)).prev_sample
        results.append(moved)
    assert_close(results[1], results[0], 1e-9)
    assert rel_rms(results[2], results[0]) > 1e-5


def test_sde_of_order_3() -> None:
    """The weight of the second difference vanishes with the step, as diffusers' does not."""
    config = {"algorithm_type": "sde-dpmsolver++", "solver_order": 3, "lower_order_final": False}
    config["final_sigmas_type"] = "sigma_min"
    second = scheduled(ours("DPMSolverMultistepScheduler", **config | {"solver_order": 2}), 400)
    x, away = start(), {}
    expected = _fourth_step(second)
    for match in (False, True):
        third = ours("DPMSolverMultistepScheduler", **config, match_diffusers=match)
        away[match] = rel_rms(_fourth_step(scheduled(third, 400)), expected)
    assert away[False] < 0.1 * away[True], away
    algorithm = config | {"algorithm_type": "sde-dpmsolver"}  # the original raises
    assert bool(torch.isfinite(run(scheduled(ours(SCHEDULERS[1], **algorithm)), x)).all())


def _fourth_step(scheduler: Any) -> Tensor:
    """A step of full order in the middle, from outputs that a parabola does not describe."""
    scheduler.set_begin_index(200)
    for seed, t in enumerate(scheduler.timesteps[200:204]):
        moved = scheduler.step(
            start(seed=seed), t, start(seed=9), variance_noise=torch.zeros_like(start())
        ).prev_sample
    return moved


def test_many_steps_do_not_cancel() -> None:
    """Coefficients are float64's: 500 steps in float32 stay where float64 is, diffusers' do not."""
    config, x = {"solver_order": 3}, start(torch.float32)
    exact = run_wide("DEISMultistepScheduler", x, 500, **config)
    mine = rel_rms(run(scheduled(ours("DEISMultistepScheduler", **config), 500), x), exact)
    theirs = rel_rms(run(scheduled(original("DEISMultistepScheduler", **config), 500), x), exact)
    assert mine < 1e-4 < theirs, (mine, theirs)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_equal_steps_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"sigma \d+ and sigma \d+ of the schedule are both"):
        ours(name).set_timesteps(1000)


def test_deis_of_diffusers_has_no_order_above_3() -> None:
    name, x = "DEISMultistepScheduler", start(torch.float32)
    expected = run(scheduled(original(name, solver_order=5)), x)
    assert_close(
        run(scheduled(ours(name, solver_order=5, match_diffusers=True)), x), expected, SINGLE
    )
    assert rel_rms(run(scheduled(ours(name, solver_order=5)), x), expected) > 4 * SINGLE


# State


@pytest.mark.parametrize("name", SCHEDULERS)
def test_runs_leave_nothing_behind(name: str) -> None:
    scheduler, x = scheduled(ours(name, solver_order=3)), start()
    expected = run(scheduler, x)
    with pytest.raises(ValueError, match="call set_timesteps before the next run"):
        scheduler.step(x, scheduler.timesteps[0], x)
    scheduled(scheduler)
    run(scheduler, 5 * x, scheduler.timesteps[:5])  # a run that is given up
    assert run(scheduled(scheduler), x).equal(expected)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_instances_share_nothing(name: str) -> None:
    expected = run(scheduled(ours(name, solver_order=3)), start())
    one, other = (scheduled(ours(name, solver_order=3)) for _ in range(2))
    x, y = start(), start(seed=1)
    for t in one.timesteps:
        x = one.step(denoise(x, t), t, x).prev_sample
        y = other.step(denoise(y, t), t, y).prev_sample
    assert x.equal(expected)
    if name.startswith("UniPC"):
        one.disable_corrector.append(3)
        assert other.disable_corrector == ours(name).disable_corrector == []


@pytest.mark.parametrize("name", SCHEDULERS)
def test_sigmas_put_in_place_by_hand(name: str) -> None:
    results = []
    for scheduler in (original(name), ours(name)):
        scheduled(scheduler)
        scheduler.sigmas = 1.5 * scheduler.sigmas
        results.append(run(scheduler, start(torch.float32)))
    assert_close(results[1], results[0], SINGLE)


@pytest.mark.parametrize("inference", [False, True], ids=["usual", "inference_mode"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_sigmas_changed_in_place(name: str, inference: bool) -> None:
    """They were not noticed, as the tensor is the same."""
    results = []
    with torch.inference_mode(inference):
        for scheduler in (original(name), ours(name)):
            scheduled(scheduler)
            scheduler.sigmas *= 1.5
            results.append(run(scheduler, start(torch.float32)))
    assert_close(results[1], results[0], SINGLE)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_nothing_is_left_after_the_last_step(name: str) -> None:
    scheduler = scheduled(ours(name))
    scheduler.set_begin_index(8)
    with pytest.raises(ValueError, match="step 8 of a schedule of 8 steps"):
        scheduler.step(start(), 1, start())


@pytest.mark.parametrize("name", ALL)
def test_no_schedule_yet(name: str) -> None:
    with pytest.raises(ValueError, match="call set_timesteps before step"):
        ours(name).step(start(), 1, start())


@pytest.mark.parametrize("begin", ["index", "timestep"])
@pytest.mark.parametrize("steps", [10, 20])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_from_the_middle(name: str, steps: int, begin: str) -> None:
    """As image-to-image pipelines do: noise of a later time, and no history there."""
    results = []
    for scheduler in (original(name, solver_order=3), ours(name, solver_order=3)):
        scheduled(scheduler, steps)
        timesteps = scheduler.timesteps[4:]
        if begin == "index":
            scheduler.set_begin_index(4)
        x, noise = start(torch.float32), start(torch.float32, 1)
        x = scheduler.add_noise(x, noise, timesteps[:1].repeat(2))
        first = scheduler.step(denoise(x, timesteps[0]), timesteps[0], x).prev_sample
        again = scheduler.add_noise(x, noise, timesteps[1:2].repeat(2))  # as inpainting does
        results.append((x, first, again, scheduler.begin_index, scheduler.step_index))
    for a, e in zip(results[1], results[0], strict=True):
        if isinstance(a, Tensor):
            assert_close(a, e, SINGLE)
        else:
            assert a == e


@pytest.mark.parametrize("name", SCHEDULERS)
def test_whole_runs_from_the_middle(name: str) -> None:
    results = []
    for make, match in ((original, {}), (ours, {"match_diffusers": True})):
        scheduler = scheduled(make(name, solver_order=3, **match), 20)
        scheduler.set_begin_index(6)
        results.append(run(scheduler, start(torch.float32), scheduler.timesteps[6:]))
    assert_close(results[1], results[0], SINGLE)


@pytest.mark.parametrize("name", ALL)
def test_a_guided_step_moves_each_tensor_once(name: str) -> None:
    scheduler, (x, m, u) = scheduled(ours(name)), torch.randn(3, 2, 3, 4, 4)
    options = {"unconditional": u, "guidance": 2.0}
    found = traffic.of(lambda: scheduler.step(m, scheduler.timesteps[0], x, **options), x)
    assert found == {"read": 3.0, "written": 2.0}  # x, m, u; the next sample, history or x0


# Gradients


@pytest.mark.parametrize("name", ALL)
def test_gradients(name: str) -> None:
    """Of the sample and of each model output, through steps with history."""
    config = {"solver_order": 3} if name in SCHEDULERS else {"clip_sample": False}

    def steps(x: Tensor, *outputs: Tensor) -> Tensor:
        scheduler = scheduled(ours(name, **config), 12)
        for m, t in zip(outputs, scheduler.timesteps, strict=False):
            x = scheduler.step(m, t, x, return_dict=False)[0]
        return x

    inputs = [torch.randn(1, 2, 2, dtype=torch.float64, requires_grad=True) for _ in range(5)]
    assert torch.autograd.gradcheck(steps, inputs)
