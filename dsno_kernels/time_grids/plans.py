"""The solver plans that the options of commands ask for: a kind of time grid, or a grid's file."""

from __future__ import annotations

import math
from pathlib import Path

from dsno_kernels.diffusion import LearnedGrid, SolverPlan, VPCosine, VPLinear, time_grid

# Where the log-SNR of alpha = cos(pi t / 2) is 20: the ends of DSNO's own schedule.
_EDGE = math.atan(math.exp(-10.0)) * 2.0 / math.pi
PROCESSES = {
    "vp_cosine": VPCosine(),
    "vp_linear": VPLinear(),
    "dsno": VPCosine(s=0.0, t_min=_EDGE, t_max=1.0 - _EDGE),
}
PROCESS, SOLVER = "vp_cosine", "tab3"


def is_file(grid: str) -> bool:
    """Whether a grid is named as a file of `learn-grid`, not as a kind of `time_grid`."""
    return Path(grid).suffix.lower() == ".json"


def plan_of(
    grid: str,
    steps: int | None,
    *,
    process: str | None = None,
    solver: str | None = None,
    order: float | None = None,
    t_start: float | None = None,
    t_end: float | None = None,
) -> SolverPlan:
    """The plan of a teacher's sampling, of x0 prediction.

    Args:
        grid: a kind of :func:`dk.diffusion.time_grid`, or the file of a :class:`LearnedGrid`.
        steps: of the solver.
        process: a name in `PROCESSES`.
        solver: a name of ``dk.diffusion.solvers()``.
        order, t_start, t_end: of a kind of time grid.

    What is None is as the file has it, or the default of a kind.

    Raises:
        ValueError: names that are unknown, or what a file has otherwise.
    """
    if is_file(grid):
        for name, value in {"order": order, "t_start": t_start, "t_end": t_end}.items():
            if value is not None:
                raise ValueError(f"{grid} is a grid with its own times: leave {name} out")
        known = None if process is None else PROCESSES[process]
        learned = LearnedGrid.load(grid)
        return learned.plan(known, solver=solver, steps=steps, prediction="x0")
    if steps is None:
        raise ValueError(f"grid {grid!r} needs a number of steps")
    noising = PROCESSES[process or PROCESS]
    times = time_grid(noising, steps, grid, order, t_start, t_end)
    return SolverPlan.build(noising, times, solver or SOLVER, prediction="x0")
