"""What learning costs: passes over memory in a step, and bytes that are alive at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dsno_kernels.diffusion import (
    EDM,
    LearningOptions,
    SolverPlan,
    learn_time_grid,
    sample,
    time_grid,
)
from dsno_kernels.ops import exp_step as op
from tests.diffusion_problems import Gaussian
from tests.helpers import assert_close
from tests.learning_problems import VP

# Float64; the sums of the gradients run in another order.
FLOAT64 = 1e-10


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("name", ["dpmpp_3m", "unipc3", "dpmpp_2s", "tab3", "heun"])
def test_gradients_without_conversions_are_those_of_replay(name: str, recompute: bool) -> None:
    problem = Gaussian(VP, 0.95)

    def model(x: Tensor, t: Tensor) -> Tensor:
        return problem.prediction("x0" if plan.history == "x0" else "eps", x, t)

    results = []
    for run in (SolverPlan.replay, None):
        x = problem.x_T.clone().requires_grad_()
        grid = torch.linspace(0.95, 0.05, 8, dtype=torch.float64).requires_grad_()
        history = SolverPlan.build(VP, grid.detach(), name).history
        plan = SolverPlan.build(VP, grid, name, prediction=history)
        made = run(plan, model, x) if run else sample(model, x, plan, recompute=recompute)
        results.append((made, *torch.autograd.grad(made.square().sum(), [x, grid])))
    for expected, found in zip(*results, strict=True):
        assert_close(found, expected, FLOAT64)


def counted(monkeypatch: pytest.MonkeyPatch, name: str, found: list[str]) -> None:
    original = getattr(op, name)

    def call(*args: Any) -> Any:
        found.append(name)
        return original(*args)

    monkeypatch.setattr(op, name, call)


def test_a_step_of_order_3_is_two_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    grid = time_grid(VP, 6, "log_snr").requires_grad_()
    plan = SolverPlan.build(VP, grid, "dpmpp_3m", prediction="x0")
    passes: list[str] = []
    counted(monkeypatch, "_run", passes)
    counted(monkeypatch, "backward_op", passes)
    made = sample(lambda x, t: torch.tanh(x) * t, torch.randn(2, 3, 4, 4), plan)
    assert passes == ["_run"] * 6
    torch.autograd.grad(made.sum(), grid)
    assert passes == ["_run"] * 6 + ["backward_op"] * 6


class Wide(nn.Module):
    """A denoiser whose insides are hundreds of times its input."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(4, 400), nn.Tanh(), nn.Linear(400, 400), nn.Tanh())
        self.last = nn.Linear(800, 4)
        self.requires_grad_(False)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        inside = self.layers(x + t)
        return self.last(torch.cat([inside, torch.tanh(2 * inside)], 1))


def peak(run: Callable[[], object]) -> int:
    """Most bytes that it has allocated at a time."""
    run()  # what is made once
    with torch.profiler.profile(profile_memory=True) as profile:
        run()
    alive = most = 0
    for event in profile.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            alive += event.nbytes()
            most = max(most, alive)
    return most


def test_memory_does_not_grow_with_the_number_of_steps() -> None:
    model, process = Wide(), EDM()
    x_T = 80.0 * torch.randn(256, 4, generator=torch.Generator().manual_seed(0))

    def one_backward() -> None:
        x, t = x_T.clone().requires_grad_(), torch.tensor(3.0, requires_grad=True)
        torch.autograd.grad(model(x, t).square().sum(), [x, t])

    least = peak(one_backward)

    def learn(steps: int, recompute: bool) -> int:
        options = LearningOptions(iterations=1, rounds=1, recompute=recompute, validation=0.0)
        return peak(lambda: learn_time_grid(model, process, steps, x_T, x_T / 80, options=options))

    for steps in (4, 10, 20):
        assert learn(steps, True) <= 1.3 * least
    assert learn(10, False) > 4 * least
