"""Schedules of the fused schedulers: one's own, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from tests.helpers import assert_close, rel_rms

pytest.importorskip("diffusers", reason="diffusers is not installed")

from tests.scheduler_runs import SCHEDULERS, original, ours, run, scheduled, start

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:__array:DeprecationWarning"),
]

SINGLE = 1e-5  # float32 on both sides
ALL = (*SCHEDULERS, "DDIMScheduler")


@pytest.mark.parametrize("name", SCHEDULERS)
def test_own_timesteps(name: str) -> None:
    usual, own = (scheduled(ours(name, solver_order=3)) for _ in range(2))
    own.set_timesteps(timesteps=usual.timesteps.tolist())
    assert own.timesteps.equal(usual.timesteps) and own.sigmas.equal(usual.sigmas)
    assert own.num_inference_steps == 8
    assert run(own, start()).equal(run(usual, start()))
    uneven = [999, 850, 736, 645, 545, 455, 343, 233, 124, 24]
    own.set_timesteps(timesteps=uneven)
    assert own.timesteps.tolist() == uneven
    if name.startswith("DPM"):
        theirs = original(name, solver_order=3)
        theirs.set_timesteps(timesteps=uneven)
        assert own.sigmas.equal(theirs.sigmas)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_own_sigmas(name: str) -> None:
    """Align-your-steps sigmas, with their final 0 and without."""
    sigmas = [14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152]
    scheduler = ours(
        name, beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, solver_order=3
    )
    for given in ([*sigmas, 0.0], sigmas):
        scheduler.set_timesteps(sigmas=given)
        assert_close(scheduler.sigmas, torch.tensor([*sigmas, 0.0]), 1e-7)
        assert scheduler.timesteps.tolist()[:3] == [999, 850, 736]
        assert bool(torch.isfinite(run(scheduler, start())).all())


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_own_sigmas_of_a_flow(name: str, dynamic: bool) -> None:
    """As Flux calls it: sigmas from 1, shifted by mu; the schedule is that of diffusers' UniPC."""
    given = torch.linspace(1, 0.1, 10).tolist()
    config = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}
    config["use_dynamic_shifting"] = dynamic
    mu = {"mu": 0.8} if dynamic else {}
    expected = original("UniPCMultistepScheduler", **config)
    expected.set_timesteps(sigmas=np.array(given), **mu)
    scheduler = ours(name, **config, solver_order=3)
    scheduler.set_timesteps(sigmas=given, **mu)
    assert_close(scheduler.sigmas, expected.sigmas, 1e-6)
    assert bool((scheduler.timesteps - expected.timesteps).abs().max() <= 1)
    assert scheduler.config.flow_shift == 3.0
    # the exact flow of one point: straight lines, whatever the solver
    x1, x0 = start(torch.float32), start(torch.float32, 1)
    x = x1
    for t in scheduler.timesteps:
        x = scheduler.step(x1 - x0, t, x).prev_sample
    assert_close(x, x0, 1e-4)


def test_mu_does_not_stay() -> None:
    config = {"use_flow_sigmas": True, "use_dynamic_shifting": True}
    scheduler = scheduled(ours("DEISMultistepScheduler", **config), 8)
    expected = scheduler.sigmas.clone()
    assert not scheduled(scheduler, 8, mu=1.5).sigmas.equal(expected)
    assert scheduled(scheduler, 8).sigmas.equal(expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give num_inference_steps, timesteps or sigmas"),
        ({"timesteps": [9, 5], "sigmas": [2.0, 1.0]}, "give timesteps or sigmas, not both"),
        ({"num_inference_steps": 2, "timesteps": [9, 5]}, "only one of them"),
        ({"num_inference_steps": 3, "sigmas": [2.0, 1.0]}, "only one of them"),
        ({"timesteps": [9, 9, 5]}, r"timesteps must .*: timesteps\[0\] is 9, timesteps\[1\] is 9"),
        ({"sigmas": [3.0, 1.0, 2.0]}, r"sigmas must .*: sigmas\[1\] is 1, sigmas\[2\] is 2"),
        ({"sigmas": [3.0, -1.0]}, "sigmas must be positive, .* got .3.0, -1.0"),
        ({"sigmas": [3.0, 0.0, 0.0]}, "sigmas must be positive"),
        ({"sigmas": []}, "sigmas must be a list of finite numbers"),
        ({"sigmas": [float("inf"), 3.0, 1.0]}, "sigmas must be a list of finite numbers, got .inf"),
        ({"sigmas": torch.tensor([3.0, 1.0], requires_grad=True)}, "must not require gradients"),
        ({"timesteps": [[9, 5]]}, "timesteps must be a list of finite numbers"),
        ({"timesteps": [900, -5]}, "timesteps must be integers from 0 to 999, got .*-5"),
        ({"timesteps": [1500, 900]}, "timesteps must be integers from 0 to 999"),
        ({"timesteps": [900.7, 300.2]}, "timesteps must be integers .* give sigmas"),
    ],
)
@pytest.mark.parametrize("name", SCHEDULERS)
def test_bad_schedules(name: str, options: dict[str, Any], message: str) -> None:
    for match in (False, True):
        with pytest.raises(ValueError, match=message):
            ours(name, match_diffusers=match).set_timesteps(**options)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_sigmas_of_a_flow_beyond_pure_noise(name: str) -> None:
    scheduler = ours(name, use_flow_sigmas=True, prediction_type="flow_prediction")
    with pytest.raises(ValueError, match="sigmas must be positive, with use_flow_sigmas at most 1"):
        scheduler.set_timesteps(sigmas=[3.0, 0.5])


@pytest.mark.parametrize("name", ALL)
def test_numbers_of_steps(name: str) -> None:
    """0 and -1 gave an empty schedule, or divided by 0."""
    for steps in (0, -1):
        with pytest.raises(
            ValueError, match=f"num_inference_steps must be at least 1, got {steps}"
        ):
            ours(name).set_timesteps(steps)
    for other in (2.5, "8", True):
        with pytest.raises(TypeError, match="num_inference_steps must be an integer"):
            ours(name).set_timesteps(other)
    scheduler = scheduled(ours(name), np.int64(8))
    assert scheduler.timesteps.equal(scheduled(ours(name), 8).timesteps)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_own_schedules_of_any_type(name: str) -> None:
    expected = ours(name)
    expected.set_timesteps(sigmas=[3.0, 1.0, 0.5])
    for given in (
        torch.tensor([3.0, 1.0, 0.5]),
        np.array([3.0, 1.0, 0.5], dtype=np.float32),
        [torch.tensor(3.0), torch.tensor(1.0), 0.5],
    ):
        scheduler = ours(name)
        scheduler.set_timesteps(sigmas=given)
        assert scheduler.sigmas.equal(expected.sigmas)
    with pytest.raises(TypeError, match="sigmas must be a real number or a tensor"):
        ours(name).set_timesteps(sigmas=["late", "early"])


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_schedule_that_is_refused_leaves_none(name: str) -> None:
    scheduler = scheduled(ours(name))
    with pytest.raises(ValueError, match="are both"):
        scheduler.set_timesteps(1000)
    with pytest.raises(ValueError, match="call set_timesteps before step"):
        scheduler.step(start(), 999, start())


def test_own_timesteps_that_end_at_0() -> None:
    """The sigma of timestep 0 is the smallest: the last step goes on to 0."""
    name, config = "DPMSolverMultistepScheduler", {"final_sigmas_type": "sigma_min"}
    results = []
    for match in (False, True):
        scheduler = ours(name, **config, match_diffusers=match)
        scheduler.set_timesteps(timesteps=[800, 400, 0])
        results.append(run(scheduler, start()))
        assert (float(scheduler.sigmas[-1]) == 0) is not match
    theirs = original(name, **config)
    theirs.set_timesteps(timesteps=[800, 400, 0])
    assert_close(results[1], run(theirs, start()), SINGLE)
    assert rel_rms(results[0], results[1]) > 4 * SINGLE


def test_own_schedule_and_configured_sigmas_exclude_each_other() -> None:
    with pytest.raises(ValueError, match="exclude use_karras_sigmas=True"):
        ours("DEISMultistepScheduler", use_karras_sigmas=True).set_timesteps(timesteps=[9, 5])


@pytest.mark.parametrize(
    ("config", "options"),
    [
        (
            {"use_beta_sigmas": True, "beta_start": 0.00085, "beta_end": 0.012}
            | {"beta_schedule": "scaled_linear"},
            {"num_inference_steps": 50},
        ),
        (
            {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 12.0},
            {"num_inference_steps": 100},
        ),
        ({}, {"sigmas": [3.0, 2.9999, 2.9998, 1.0]}),
    ],
    ids=["beta", "flow", "own"],
)
@pytest.mark.parametrize("name", SCHEDULERS)
def test_first_timesteps_that_coincide(
    name: str, config: dict[str, Any], options: dict[str, Any]
) -> None:
    """The run started with step 1, and had no row for the last timestep."""
    scheduler, x = ours(name, **config), start(torch.float32)
    scheduler.set_timesteps(**options)
    times = scheduler.timesteps
    assert times[0] == times[1]  # or this test says nothing
    expected_noise = scheduler.add_noise(x, x, times[:1].repeat(2))
    found = run(scheduler, x)
    assert scheduler.step_index == len(times) and bool(found.isfinite().all())
    scheduler.set_timesteps(**options)
    scheduler.set_begin_index(0)
    assert scheduler.add_noise(x, x, times[:1].repeat(2)).equal(expected_noise)
    assert run(scheduler, x).equal(found)
