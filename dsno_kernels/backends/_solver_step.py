"""What a backend's `solver_step` takes, besides the dtypes of its results."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor


class Step(NamedTuple):
    """The inputs of one step, in the order of the op's arguments; `reference_steps.solver_step`
    says what it computes.
    """

    point: Tensor
    output: Tensor
    unconditional: Tensor | None = None
    base: Tensor | None = None
    history: Sequence[Tensor] = ()  # h_1, h_2, ..; with `head` the slots of a ring buffer
    head: Tensor | None = None
    noise: Tensor | None = None
    seed: Tensor | None = None  # int64 [2]
    table: Tensor | None = None
    values: Sequence[float] = ()  # the row, where there is no table
    index: Tensor | None = None  # type: ignore[assignment]  # not that of a tuple
    guidance: Tensor | None = None
    guidance_value: float = 1.0
    scale: Tensor | None = None
    low: float | None = None
    high: float | None = None
    looks_ahead: bool = False

    @property
    def order(self) -> int:
        """K, the entries of history with the new one."""
        columns = len(self.values) if self.table is None else self.table.shape[-1]
        return columns // 2 - 3

    @property
    def per_sample(self) -> bool:
        """Whether each sample (axis 0) has numbers of its own."""
        if self.table is not None:
            rows = self.table.ndim == 2 if self.index is None else self.index.ndim == 1
            if rows:
                return True
        return self.scale is not None or (self.guidance is not None and self.guidance.ndim == 1)

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """What has the shape of point."""
        named = (self.point, self.output, self.unconditional, self.base, self.noise)
        return (*named, *self.history)


class Memory(NamedTuple):
    """Where results are written in place of new tensors: base', and h_0 as a slot of a ring."""

    base: Tensor | None = None
    ring: Tensor | None = None
    slot: int = 0  # where there is no head; else slot head + 1


NEW = Memory()  # new tensors for all results
