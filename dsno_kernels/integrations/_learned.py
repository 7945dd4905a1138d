"""Learned time grids as schedules of diffusers."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from dsno_kernels.diffusion import DiscreteVP, FlowMatching, LearnedGrid
from dsno_kernels.integrations._tables import Solver, name_of

Grid = LearnedGrid | str | Path


class LearnedSchedule(NamedTuple):
    """A learned grid as a scheduler counts its times.

    Args:
        sigmas: N + 1, of the steps, as diffusers counts them.
        model_sigmas: N, at which the model is called.
        timesteps: N, the same in training timesteps, between which they may lie.
    """

    sigmas: Tensor
    model_sigmas: Tensor
    timesteps: Tensor


def learned(grid: Grid) -> LearnedGrid:
    """A grid, or that of a file."""
    if isinstance(grid, LearnedGrid):
        return grid
    if not isinstance(grid, (str, Path)):
        raise TypeError(f"grid must be a LearnedGrid or a file of one, got {type(grid).__name__}")
    return LearnedGrid.load(grid)


def learned_schedule(
    grid: LearnedGrid, solver: Solver, config: Any, alphas_cumprod: Tensor, mu: float | None
) -> LearnedSchedule:
    """The schedule of a grid that was learned for this solver and process.

    Raises:
        ValueError: it was learned for others. NotImplementedError: it has learned coefficients.
    """
    if grid.corrections is not None:
        raise NotImplementedError(
            "schedulers take the times of a grid, not the coefficients that this one has learned:"
            " learn it without coefficients=True, or sample with LearnedGrid.plan"
        )
    process: DiscreteVP | FlowMatching
    if solver.flow:
        process = FlowMatching(shift=config.flow_shift if mu is None else math.exp(mu))
    else:
        process = DiscreteVP(alphas_cumprod.double())
    name = name_of(solver)
    if name is None:
        raise ValueError(
            f"the grid was learned for solver {grid.solver!r}, and the configuration of this"
            f" scheduler is none of dk.diffusion.solvers(): {solver}"
        )
    plan = grid.plan(process, solver=name)
    if (plan.history, plan.end) != (solver.history, solver.end):
        raise ValueError(
            f"the grid was learned on {plan.history} history with end {plan.end!r}, this scheduler"
            f" is configured for {solver.history} and {solver.end!r}"
        )
    ratio = process.sigma if solver.flow else process.rho
    calls = plan.model_times
    timesteps = ratio(calls) * config.num_train_timesteps if solver.flow else calls
    return LearnedSchedule(ratio(plan.grid), ratio(calls), timesteps)
