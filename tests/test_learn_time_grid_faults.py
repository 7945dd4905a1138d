"""Learning of time grids: bad input, and runs that do not end as they should."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from dsno_kernels.diffusion import (
    EDM,
    LearnedGrid,
    LearningOptions,
    SolverPlan,
    VPLinear,
    dmn_grid,
    learn_time_grid,
    sample,
    time_grid,
    trajectory_costs,
)
from tests.learning_problems import SHORT, VP, Network, improves, learned, starts


@pytest.mark.parametrize(
    ("model", "names"),
    [
        (lambda x, t: 0.1 * x.detach() + t, "x"),
        (lambda x, t: 0.1 * x + 0.1 * t.detach(), "t"),
        (lambda x, t: (1e-3 * x + torch.cos(t)).detach(), "x and t"),
    ],
)
def test_a_denoiser_without_gradients_is_named_or_its_rest_is_learned(
    model: Callable[[Tensor, Tensor], Tensor], names: str
) -> None:
    x_T = starts()
    with pytest.raises(ValueError, match=f"not differentiable in {names}: .*partial=True"):
        learn_time_grid(model, VP, 4, x_T, options=SHORT)
    grid = learn_time_grid(
        model, VP, 4, x_T, options=dataclasses.replace(SHORT, partial=True, iterations=20)
    )
    assert improves(grid)
    if "t" in names:
        assert grid.denoiser_times == tuple(time_grid(VP, 4, "log_snr")[:-1].tolist())
        assert grid.times[:-1] != grid.denoiser_times


def test_a_denoiser_in_inference_mode_is_learned_around() -> None:
    @torch.inference_mode()
    def model(x: Tensor, t: Tensor) -> Tensor:
        return 1e-3 * x + torch.cos(t)

    with pytest.raises(ValueError, match="not differentiable in x and t"):
        learn_time_grid(model, VP, 4, starts(), options=SHORT)
    options = dataclasses.replace(SHORT, partial=True)
    plain = learn_time_grid(
        lambda x, t: (1e-3 * x + torch.cos(t)).detach(), VP, 4, starts(), options=options
    )
    for recompute in (False, True):
        more = dataclasses.replace(options, recompute=recompute)
        found = learn_time_grid(model, VP, 4, starts(), options=more)
        assert found.times == plain.times


@pytest.mark.parametrize(
    ("process", "why"),
    [
        ("vp", "'vp': it has no alpha"),
        (VPLinear, "it is a class, make one of it"),
        (SimpleNamespace(alpha=VP.alpha, sigma=VP.sigma), "it has no rho"),
    ],
    ids=["name", "class", "part of one"],
)
def test_what_is_no_process_is_said(process: Any, why: str, tmp_path: Path) -> None:
    path = tmp_path / "grid.json"
    grid = learned(out=path)
    for call in (
        lambda: learn_time_grid(Network(), process, 3, starts()),
        lambda: dmn_grid(process, 4),
        lambda: trajectory_costs(Network(), process, starts()),
        lambda: grid.plan(process),
        lambda: LearnedGrid.load(path, process),
    ):
        with pytest.raises(TypeError, match=f"process must be one of dk.diffusion.*{why}"):
            call()


def teacher_of(process: Any, start: float, **more: Any) -> SolverPlan:
    return SolverPlan.build(process, [start, 0.3, 0.1], "ddim", prediction="x0", **more)


@pytest.mark.parametrize(
    ("use", "error", "message"),
    [
        ({"steps": 1}, ValueError, "steps must be at least 2, got 1"),
        ({"steps": 2.5}, TypeError, "steps must be an integer"),
        ({"denoiser": 3}, TypeError, "denoiser must be callable, got int"),
        ({"decode": 3}, TypeError, "decode must be callable, got int"),
        ({"callback": 3}, TypeError, "callback must be callable, got int"),
        ({"kwargs": 3}, TypeError, "kwargs must be a mapping from names, got int"),
        ({"options": {}}, TypeError, "options must be LearningOptions, got dict"),
        ({"out": 3}, TypeError, "out must be a path, got int"),
        ({"solver": "sde_dpmpp_2"}, ValueError, "'sde_dpmpp_2' adds noise"),
        ({"targets": torch.zeros(8, 5)}, ValueError, r"pairs, got shapes \(8, 6\) and \(8, 5\)"),
        ({"targets": torch.zeros(7, 6)}, ValueError, r"pairs, got shapes \(8, 6\) and \(7, 6\)"),
        ({"targets": torch.zeros(8, 6).long()}, TypeError, "targets"),
        ({"x_T": torch.zeros(8)}, ValueError, r"x_T must have shape \(B, ...\)"),
        ({"x_T": torch.zeros(1, 6).double()}, ValueError, "1 sample cannot both teach and"),
        ({"grid": [1.0, 0.5, 0.6, 0.1]}, ValueError, "grid must decrease strictly"),
        ({"targets": "teacher"}, TypeError, "a tensor or the SolverPlan of a teacher, got str"),
        ({"targets": teacher_of(EDM(), 1.0)}, ValueError, "plan is of EDM.*, not of VPLinear"),
        (
            {"targets": teacher_of(VP, 1.0), "prediction": "eps"},
            ValueError,
            "output as 'x0', the student as 'eps'",
        ),
        (
            {"targets": teacher_of(VP, 1.0, eta=1.0)},
            ValueError,
            "teacher's plan, of solver 'ddim', adds noise",
        ),
        ({"targets": teacher_of(VP, 0.5)}, ValueError, "plan starts at t = 0.5, the states x_T"),
        ({"out": "nowhere/grid.json"}, ValueError, "folder that exists, got 'nowhere/grid.json'"),
        ({"out": "."}, ValueError, r"out must be a file in a folder that exists, got '\.'"),
        ({"decode": lambda x: x.detach()}, ValueError, "no gradient comes back from the loss"),
    ],
)
def test_bad_arguments(use: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {"denoiser": Network(), "steps": 3, "x_T": starts(), "options": SHORT, **use}
    with pytest.raises(error, match=message):
        learn_time_grid(process=VP, **arguments)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"mode": "sigma"}, "unknown mode 'sigma'; known are auto, log_snr, time"),
        ({"optimizer": "sgd"}, "unknown optimizer 'sgd'"),
        ({"iterations": 0}, "iterations must be at least 1"),
        ({"radius": -1.0}, "radius must be positive"),
        ({"validation": 1.0}, r"validation must be in \[0, 1\)"),
        ({"seed": -1}, r"seed must be in 0 .. 2\*\*64 - 1, got -1"),
        ({"seed": 2**64}, "seed must be in 0"),
        ({"optimizer": "adam"}, "optimizer 'adam' needs a batch"),
        ({"match_official": True, "coefficients": True}, "match_official learns no coefficients"),
    ],
)
def test_bad_options(option: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LearningOptions(**option)


@pytest.mark.parametrize(
    "option",
    [
        {"iterations": 2.5},
        {"batch": "4"},
        {"seed": 0.5},
        {"rounds": None},
        {"radius": "1"},
        {"decoupled": "no"},
        {"soft": 0},
    ],
)
def test_options_of_another_type(option: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match=f"{next(iter(option))} must be "):
        LearningOptions(**option)


@pytest.mark.parametrize(("iterations", "rounds"), [(3, 4), (4, 4), (5, 4)])
def test_the_iterations_are_those_of_all_rounds(iterations: int, rounds: int) -> None:
    options = LearningOptions(
        iterations=iterations, rounds=rounds, optimizer="adam", batch=4, soft=False
    )
    assert len(learned(options=options).losses) == iterations


def test_the_official_parametrization_has_one_call_a_step() -> None:
    with pytest.raises(ValueError, match="one call a step, which dpmpp_2s is not"):
        learned(solver="dpmpp_2s", options=LearningOptions(match_official=True))


class Breaks:
    """A model that does something else from its n-th call on."""

    def __init__(self, call: int, then: Callable[[Tensor], Tensor]) -> None:
        self.call, self.then, self.count, self.network = call, then, 0, Network()

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        self.count += 1
        output = self.network(x, t)
        return self.then(output) if self.count >= self.call else output


def test_a_loss_that_is_not_finite_keeps_the_best_grid(tmp_path: Path) -> None:
    path = tmp_path / "grid.json"
    options = dataclasses.replace(SHORT, iterations=40, rounds=8, soft=False)
    model = Breaks(150, lambda output: output * torch.nan)
    teacher = starts()
    with pytest.warns(UserWarning, match="not finite after .* evaluations; the best grid before"):
        grid = learn_time_grid(model, VP, 4, starts(), teacher, options=options, out=path)
    assert improves(grid, 1.0) and "not finite" in grid.provenance["stopped"]
    assert LearnedGrid.load(path) == grid
    with pytest.raises(ValueError, match="the first grid is not finite"):
        learn_time_grid(Breaks(2, lambda y: y * torch.inf), VP, 4, starts(), teacher, options=SHORT)


def interrupt(output: Tensor) -> Tensor:
    raise KeyboardInterrupt


@pytest.mark.parametrize("call", [40, 100])
def test_an_interrupted_run_leaves_its_best_grid(call: int, tmp_path: Path) -> None:
    path = tmp_path / "grid.json"
    options = dataclasses.replace(SHORT, iterations=40, rounds=4, soft=False)
    with pytest.raises(KeyboardInterrupt):
        learn_time_grid(
            *(Breaks(call, interrupt), VP, 4, starts(), starts()), options=options, out=path
        )
    grid = LearnedGrid.load(path)
    assert grid.provenance["stopped"] == "interrupted"
    model = Network().requires_grad_(False)
    made = sample(model, starts(), grid.plan())
    hand = SolverPlan.build(VP, time_grid(VP, 4, "log_snr"), grid.solver, prediction="x0")
    before = sample(model, starts(), hand)
    assert float((made - starts()).norm()) < float((before - starts()).norm())


def test_a_run_interrupted_before_it_learned_anything_leaves_the_file_of_before(
    tmp_path: Path,
) -> None:
    path = tmp_path / "grid.json"
    learned(out=path)
    before = path.read_bytes()
    for call in (1, 3):  # the probe, the first validation
        with pytest.raises(KeyboardInterrupt):
            learn_time_grid(Breaks(call, interrupt), VP, 4, starts(), starts(), out=path)
    assert path.read_bytes() == before


def test_a_callback_ends_learning_with_the_best_so_far(tmp_path: Path) -> None:
    path = tmp_path / "grid.json"
    grid = learned(callback=lambda i, loss: i == 2, out=path)
    assert len(grid.losses) == 3 and "by the callback" in grid.provenance["stopped"]
    assert improves(grid, 1.0) and LearnedGrid.load(path) == grid
