"""The data of learning a grid: starts of trajectories, what their ends should be, and arguments."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dsno_kernels.diffusion.learning import distances
from dsno_kernels.diffusion.plan import SolverPlan
from dsno_kernels.diffusion.sample import sample


@dataclass(frozen=True)
class Pairs:
    """Samples at the first time with their targets; tensors of B rows among the arguments go with
    them.
    """

    x_T: Tensor
    targets: Tensor
    kwargs: Mapping[str, Any] | None
    unconditional: Mapping[str, Any] | None
    guidance: float | Tensor | None

    def __len__(self) -> int:
        return len(self.x_T)

    def part(self, rows: slice | Tensor) -> Pairs:
        def taken(value: Any) -> Any:
            if isinstance(value, Tensor) and value.ndim > 0 and len(value) == len(self):
                return value[rows]
            return value

        kwargs, unconditional = (
            given if given is None else {name: taken(value) for name, value in given.items()}
            for given in (self.kwargs, self.unconditional)
        )
        return Pairs(
            self.x_T[rows], self.targets[rows], kwargs, unconditional, taken(self.guidance)
        )

    def parts(self, size: int | None) -> Iterator[tuple[slice, Pairs]]:
        """Of at most `size` samples each."""
        for first in range(0, len(self), size or max(len(self), 1)):
            rows = slice(first, first + (size or len(self)))
            yield rows, self.part(rows)

    def share(self) -> Pairs:
        """Those of this process; all of them without a group."""
        if processes() == 1:
            return self
        rows = torch.arange(len(self), device=self.x_T.device)
        return self.part(rows[dist.get_rank() :: processes()])


@dataclass(frozen=True)
class Student:
    """A sampler with few steps, and how far its samples are from their targets.

    Args:
        denoiser, split_guidance: as in `sample`.
        decode: of samples and of nothing else, before they are compared.
        distance: one number a sample.
    """

    denoiser: Callable[..., Tensor]
    split_guidance: bool
    decode: Callable[[Tensor], Tensor] | None
    distance: distances.Loss

    def samples(self, pairs: Pairs, plan: SolverPlan, recompute: bool = False) -> Tensor:
        return sample(
            self.denoiser,
            pairs.x_T,
            plan,
            kwargs=pairs.kwargs,
            unconditional=pairs.unconditional,
            guidance=pairs.guidance,
            split_guidance=self.split_guidance,
            check_finite=False,  # the loss is looked at
            recompute=recompute,
        )

    def losses(self, pairs: Pairs, plan: SolverPlan, recompute: bool = False) -> Tensor:
        """One a sample, float64.

        Raises:
            ValueError: the samples have a gradient, and `decode` or the distance passes none on.
        """
        made = self.samples(pairs, plan, recompute)
        shown = made if self.decode is None else self.decode(made)
        losses = distances.each(self.distance, shown, pairs.targets)
        if made.requires_grad and not losses.requires_grad:
            raise ValueError("no gradient comes back from the loss: decode and loss must have one")
        return losses

    @torch.no_grad()
    def taught(self, pairs: Pairs, teacher: SolverPlan, batch: int | None) -> Pairs:
        """The pairs with what the teacher makes of their starts."""
        made = [self.samples(part, teacher) for _, part in pairs.parts(batch)]
        decoded = made if self.decode is None else [self.decode(one) for one in made]
        return replace(pairs, targets=torch.cat(decoded)) if decoded else pairs


def summed(values: Tensor) -> Tensor:
    """Over all processes, the same in each."""
    if processes() > 1:
        dist.all_reduce(values)
    return values


def mean(total: Tensor, count: int) -> float:
    """Of a sum and a count in each process."""
    both = summed(torch.stack([total, torch.full_like(total, count)]))
    return float(both[0] / both[1])


def processes() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def first_process() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0
