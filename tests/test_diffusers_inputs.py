"""What does not fit a fused scheduler is refused, by the name that it has in `step`."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("diffusers", reason="diffusers is not installed")

from tests.scheduler_runs import SCHEDULERS, ours, scheduled, start

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:__array:DeprecationWarning"),
]

ALL = (*SCHEDULERS, "DDIMScheduler")


@pytest.mark.parametrize("name", ALL)
def test_inputs_are_named_as_in_step(name: str) -> None:
    scheduler, x = scheduled(ours(name)), start()
    t, short = scheduler.timesteps[0], x[:1]
    shape = r"must have the shape of sample, \(2, 3, 4, 4\), got \(1, 3, 4, 4\)"
    for kind, message, inputs, options in [
        (ValueError, f"model_output {shape}", (short, t, x), {}),
        (TypeError, "model_output must be a torch.Tensor, got NoneType", (None, t, x), {}),
        (TypeError, "sample must be a torch.Tensor, got list", (x, t, [1.0]), {}),
        (TypeError, "sample must be real floating point", (x, t, x.long()), {}),
        (ValueError, "model_output on meta", (x.to("meta"), t, x), {}),
        (ValueError, f"unconditional {shape}", (x, t, x), {"unconditional": short, "guidance": 2}),
        (TypeError, "guidance must be a number", (x, t, x), {"unconditional": x, "guidance": "a"}),
    ]:
        with pytest.raises(kind, match=message):
            scheduler.step(*inputs, **options)
    assert bool(scheduler.step(x, t, x).prev_sample.isfinite().all())


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_failed_step_leaves_the_place_in_the_schedule(name: str) -> None:
    scheduler, twin, x = scheduled(ours(name)), scheduled(ours(name)), start()
    with pytest.raises(ValueError, match="model_output must have the shape of sample"):
        scheduler.step(x[:1], scheduler.timesteps[1], x)
    assert scheduler.step_index is None
    for t in scheduler.timesteps[:3]:
        assert torch.equal(scheduler.step(x, t, x)[0], twin.step(x, t, x)[0])
        with pytest.raises(TypeError, match="sample must be real floating point"):
            scheduler.step(x, t, x.long())
        assert scheduler.step_index == twin.step_index


def test_noise_of_ones_own_is_checked() -> None:
    name, sde = "DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}
    scheduler, x = scheduled(ours(name, **sde)), start()
    for kind, message, noise in [
        (ValueError, r"variance_noise must have the shape of sample, \(2, 3, 4, 4\), got", x[:1]),
        (TypeError, "variance_noise must be a torch.Tensor, got float", 1.0),
        (TypeError, "variance_noise must be real floating point", x.long()),
    ]:
        with pytest.raises(kind, match=message):
            scheduler.step(x, scheduler.timesteps[0], x, variance_noise=noise)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_another_batch_in_the_middle_of_a_run(name: str) -> None:
    scheduler, x = scheduled(ours(name)), start()
    scheduler.step(x, scheduler.timesteps[0], x)
    with pytest.raises(ValueError, match=r"sample has shape \(1, 3, 4, 4\), but .* call set_time"):
        scheduler.step(x[:1], scheduler.timesteps[1], x[:1])


@pytest.mark.parametrize("order", [0, -1, 9])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_orders_that_do_not_exist(name: str, order: int) -> None:
    with pytest.raises(
        ValueError, match=f"solver_order must be from 1 to [78] for .*, got {order}"
    ):
        scheduled(ours(name, solver_order=order))


@pytest.mark.parametrize("timestep", [-1, 1000])
def test_ddim_refuses_timesteps_without_a_signal(timestep: int) -> None:
    scheduler, x = scheduled(ours("DDIMScheduler")), start()
    with pytest.raises(ValueError, match=f"timestep must be from 0 to 999, got {timestep}"):
        scheduler.step(x, timestep, x)


def test_inputs_of_ddim_are_named_as_in_step() -> None:
    scheduler, x = scheduled(ours("DDIMScheduler")), start()
    with pytest.raises(TypeError, match="eta must be a number, got 'a'"):
        scheduler.step(x, scheduler.timesteps[0], x, eta="a")
    with pytest.raises(ValueError, match="variance_noise must have the shape of sample"):
        scheduler.step(x, scheduler.timesteps[0], x, eta=1.0, variance_noise=x[:1])
