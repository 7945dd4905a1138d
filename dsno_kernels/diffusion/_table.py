"""The numbers of a plan: choices checked, coefficients and conversions put into one table."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dsno_kernels.diffusion.grids import stacked
from dsno_kernels.diffusion.predictions import HISTORIES, PREDICTIONS, conversion, input_scale
from dsno_kernels.diffusion.solvers import Solver, find
from dsno_kernels.diffusion.solvers._problem import END_POLICIES, Churn, Points, Problem


@dataclass(frozen=True)
class Settings:
    """The arguments of `SolverPlan.build` that are not times: hashable, for the cache."""

    process: Any
    solver: str
    history: str
    end: str
    prediction: str
    eta: float | None
    churn: Churn


class Numbers(NamedTuple):
    """The tensors of a `SolverPlan`; its docstring says what they are."""

    table: Tensor
    history_length: int
    model_times: Tensor
    times: Tensor
    initial: Tensor
    initial_c_in: Tensor


def numbers(settings: Settings, grid: Tensor, seeds: Tensor, model_times: Tensor | None) -> Numbers:
    """The table of the solver on the grid, as `SolverPlan.build` describes its arguments."""
    process = settings.process
    problem = Problem(
        process=process,
        points=Points.at(process, grid),
        seeds=Points.at(process, seeds),
        history=settings.history,
        end=settings.end,
        eta=settings.eta,
        churn=settings.churn,
    )
    if settings.history == "flow":
        _check_flow(problem)
    rows = find(settings.solver).make(problem)
    calls = rows.model_times if model_times is None else model_times
    if calls.shape != rows.model_times.shape:
        raise ValueError(
            f"denoiser_times must hold one time an evaluation, shape "
            f"{tuple(rows.model_times.shape)}, got {tuple(calls.shape)}"
        )
    A, B = conversion(settings.prediction, settings.history, process, calls)
    c_in = input_scale(settings.prediction, process, calls)
    after = torch.cat([c_in[1:], torch.ones_like(c_in[:1])])
    parts = (A, B, rows.a_b, rows.c_b, rows.s, rows.a_p, rows.c_p, after)
    table = torch.cat([part if part.ndim == 2 else part[:, None] for part in parts], 1)
    K = rows.c_b.shape[1]
    _check_finite(settings, table, K, calls)
    return Numbers(table, K, calls, rows.times, rows.initial, c_in[0])


def columns_of(K: int) -> dict[str, slice]:
    """Where each column is in the table of a plan with K history entries."""
    columns, first = {}, 0
    for name in ("A", "B", "a_b", "c_b", "s", "a_p", "c_p", "c_in"):
        width = K if name in ("c_b", "c_p") else 1
        columns[name] = slice(first, first + width)
        first += width
    return columns


def _check_flow(problem: Problem) -> None:
    total = (problem.points.alpha + problem.points.sigma).detach()
    if not bool(((total - 1).abs() < 1e-12).all()):
        raise ValueError(
            f"flow history needs alpha + sigma = 1, which {problem.process!r} does not have; "
            "use prediction='flow' with another history"
        )


def _check_finite(settings: Settings, table: Tensor, K: int, calls: Tensor) -> None:
    bad = (~torch.isfinite(table.detach())).nonzero()
    if len(bad) == 0:
        return
    row, column = bad[0].tolist()
    name = next(name for name, where in columns_of(K).items() if column < where.stop)
    t = float(calls[row].detach())
    alpha, sigma = (
        float(of(calls[row].detach())) for of in (settings.process.alpha, settings.process.sigma)
    )
    raise ValueError(
        f"{name} of row {row} is not finite: solver {settings.solver!r} on "
        f"{settings.history} history from {settings.prediction} predictions at t = {t}, where "
        f"alpha = {alpha:.3g} and sigma = {sigma:.3g}; use another history or move that "
        "time inwards"
    )


def check_seeds(grid: Tensor, start: object) -> Tensor:
    seeds = stacked("start", start)
    if seeds.ndim != 1:
        raise ValueError(f"start must hold times, shape (m,), got {tuple(seeds.shape)}")
    chain = [float(grid[0].detach()), *seeds.detach().tolist()]
    for i in range(1, len(chain)):
        if not chain[i] > chain[i - 1]:
            raise ValueError(
                f"start must hold ever earlier times before grid[0] = {chain[0]}, newest first: "
                f"start[{i - 1}] = {chain[i]}"
            )
    return seeds


def check_choices(
    solver: Solver,
    process: Any,
    history: str | None,
    end: str,
    prediction: str,
    eta: float | None,
    churn: Churn,
) -> None:
    if history is not None and history not in HISTORIES:
        raise ValueError(f"unknown history {history!r}; known are {', '.join(HISTORIES)}")
    if history is not None and history not in solver.histories:
        raise ValueError(
            f"solver {solver.name!r} works on {' or '.join(solver.histories)} history, not on "
            f"{history!r}"
        )
    if prediction not in PREDICTIONS:
        raise ValueError(f"unknown prediction {prediction!r}; known are {', '.join(PREDICTIONS)}")
    if prediction == "edm" and not callable(getattr(process, "preconditioning", None)):
        raise ValueError(f"prediction 'edm' needs a process with preconditioning, got {process!r}")
    if end not in END_POLICIES:
        raise ValueError(f"unknown end {end!r}; known are {', '.join(END_POLICIES)}")
    if eta is not None and solver.noise is None:
        raise ValueError(f"solver {solver.name!r} takes no eta")
    if eta is not None and not (0 <= eta < math.inf and (solver.name != "ddim" or eta <= 1)):
        raise ValueError(f"eta must be finite, at least 0, and at most 1 for ddim, got {eta}")
    if not (churn.S_churn >= 0 and 0 <= churn.S_noise < math.inf):
        raise ValueError(
            "S_churn and S_noise must be at least 0, and S_noise finite, got"
            f" {churn.S_churn} and {churn.S_noise}"
        )
    if not churn.S_min <= churn.S_max:
        raise ValueError(f"S_min must be at most S_max, got {churn.S_min} and {churn.S_max}")
    if churn.S_churn > 0 and not solver.churn:
        raise ValueError(f"solver {solver.name!r} takes no churn; 'euler' and 'heun' do")
