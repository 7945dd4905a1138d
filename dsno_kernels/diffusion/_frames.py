"""Frames: which rows of a plan they come from, and the tensor that collects them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dsno_kernels.diffusion.plan import SolverPlan

# Times of frames may come from float32.
_SAME_TIME = 1e-6


class Frames:
    """States of a trajectory, ``(B, T, ...)``.

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
        if not torch.is_grad_enabled():
            self._memory = x_T.new_empty((len(self.rows), *x_T.shape))
        self.add(-1, x_T)

    def add(self, row: int, base: Tensor) -> None:
        """Take the state after a row, where a frame wants it."""
        if row not in self.rows:
            return
        if self._memory is None:
            self._found[row] = base.to(self._dtype)
            return
        for place, wanted in enumerate(self.rows):
            if wanted == row:
                self._found[row] = self._memory[place].copy_(base)

    def result(self) -> Tensor:
        """The frames that were reached, in the order asked for."""
        if self._memory is not None and len(self._found) == len(set(self.rows)):
            return self._memory.transpose(0, 1)
        return torch.stack([self._found[row] for row in self.rows if row in self._found], 1)


def frame_rows(plan: SolverPlan, frames: Sequence[int] | Sequence[float] | Tensor) -> list[int]:
    """The row after which base stands at each frame; -1 for x_T."""
    grid = plan.grid.detach()
    given = frames.tolist() if isinstance(frames, Tensor) else list(frames)
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
        if isinstance(frame, int) and not isinstance(frame, bool):
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
