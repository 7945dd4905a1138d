"""Frames: which rows of a plan they come from, and the tensor that collects them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from numbers import Integral, Real

import numpy as np
import torch
from torch import Tensor

from dsno_kernels import _dense
from dsno_kernels.diffusion.plan import SolverPlan
from dsno_kernels.functional import step_checks

# Times of frames may come from float32.
_SAME_TIME = 1e-6


class Frames:
    """States of a trajectory, ``(B, T, ...)``.

    Where no graph is recorded they share one buffer, in which a step writes its state itself and
    the next step reads it (`slot`). Time is outermost there: each state is dense, as the steps and
    most models want it.

    Args:
        x_T: the state before the first row.
        rows: the row after which each frame is taken, -1 for x_T.
    """

    def __init__(self, x_T: Tensor, rows: Sequence[int]) -> None:
        if x_T.ndim == 0:
            raise ValueError("frames need an x_T with a batch axis, got a tensor without axes")
        self.rows = list(rows)
        self._dtype = x_T.dtype
        self._found: dict[int, Tensor] = {}
        self._memory: Tensor | None = None
        if step_checks.may_write():
            layout = _dense.output_like(x_T, x_T.dtype, per_sample=True)
            size = (len(self.rows), *x_T.shape)
            strides = (max(x_T.numel(), 1), *layout.stride())
            self._memory = x_T.new_empty_strided(size, strides)
        self.add(-1, x_T)

    def slot(self, row: int) -> Tensor | None:
        """Where the state after a row may be written for `add`; None: in a tensor of its own."""
        if self._memory is None or row not in self.rows:
            return None
        self._found[row] = self._memory[self.rows.index(row)]
        return self._found[row]

    def add(self, row: int, base: Tensor) -> None:
        """Take the state after a row, where a frame wants it."""
        places = [place for place, wanted in enumerate(self.rows) if wanted == row]
        if not places:
            return
        if self._memory is None:
            self._found[row] = base.to(self._dtype)
            return
        if base is self._found.get(row):  # its slot, where the step has written it
            places = places[1:]
        for place in places:
            self._found[row] = self._memory[place].copy_(base)

    def result(self) -> Tensor:
        """The frames that were reached, in the order asked for."""
        if self._memory is not None and len(self._found) == len(set(self.rows)):
            return self._memory.transpose(0, 1)
        return torch.stack([self._found[row] for row in self.rows if row in self._found], 1)


def _numbers(frames: object) -> list[int | float]:
    """Positions stay integers, times become floats."""
    given = frames.tolist() if isinstance(frames, (Tensor, np.ndarray)) else frames
    numbers: list[int | float] = []
    for frame in given if isinstance(given, Iterable) else [None]:
        if isinstance(frame, Tensor) and frame.ndim == 0:
            frame = frame.item()
        if isinstance(frame, bool) or not isinstance(frame, Real):
            raise TypeError(
                "frames must be numbers in one sequence, floats for times and integers for"
                f" positions in the grid, got {frames!r}"
            )
        numbers.append(int(frame) if isinstance(frame, Integral) else float(frame))
    return numbers


def frame_rows(plan: SolverPlan, frames: Sequence[int] | Sequence[float] | Tensor) -> list[int]:
    """The row after which base stands at each frame; -1 for x_T."""
    grid = plan.grid.detach()
    given = _numbers(frames)
    if not given:
        raise ValueError("frames must name at least one time, got none")
    after: dict[float, int] = {float(grid[0]): -1}
    for i, (time, advances) in enumerate(
        zip(plan.times.tolist(), plan.advances.tolist(), strict=True)
    ):
        if advances:
            after.setdefault(time, i)
    rows = []
    for frame in given:
        if isinstance(frame, int):
            if not 0 <= frame < len(grid):
                raise ValueError(f"frame {frame} is not a position in the grid, 0..{len(grid) - 1}")
            time = float(grid[frame])
        else:
            time = min(grid.tolist(), key=lambda t: abs(t - frame))
            if not abs(time - frame) <= _SAME_TIME * max(abs(time), float(grid.abs().max())):
                raise ValueError(
                    f"frame time {frame} is not in the grid of the plan; the nearest is {time}"
                )
        if time not in after:
            raise ValueError(
                f"{plan.solver} never stands at t = {time}; its states are at"
                f" {', '.join(f'{t:.6g}' for t in after)}"
            )
        rows.append(after[time])
    return rows
