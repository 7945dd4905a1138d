"""What a grid is learned and judged on: noises, where a teacher's fine solver takes them, and the
hand-made grids that a learned one must beat.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dsno_kernels._noise import standard_normal
from dsno_kernels.diffusion import (
    SolverPlan,
    dmn_grid,
    gits_grid,
    sample,
    time_grid,
    trajectory_costs,
)
from dsno_kernels.diffusion.learning.pairs import Pairs, Student, mean, summed
from dsno_kernels.training import distributed
from dsno_kernels.training.manifest import noise_scale

# Noises to learn from and to judge by, apart from each other and from those of samples.
LEARNING, HELD_OUT = 0x4C443354, 0x4C443356
KINDS = ("uniform", "quadratic", "log_snr", "karras")
HAND_MADE = (*KINDS, "gits", "dmn")
GITS_SAMPLES, GITS_STEPS = 256, 60


@dataclass(frozen=True)
class Teacher:
    """A denoiser, and the fine solver that says where its trajectories end.

    Args:
        model: ``model(x, t, **kwargs)`` predicts x0.
        plan: of the fine solver, from noise to image.
        shape: of a sample.
        device: of the model.
        classes: of the samples, in turn; None without.
        guidance: scale of classifier-free guidance; None without.
    """

    model: Callable[..., Tensor]
    plan: SolverPlan
    shape: tuple[int, ...]
    device: torch.device
    classes: list[int] | None = None
    guidance: float | None = None

    @torch.no_grad()
    def pairs(self, count: int, seed: int, stream: int, batch: int | None = None) -> Pairs:
        """Samples 0 .. count - 1 of a stream; each depends on the seed and its number alone. Each
        process makes its share of the targets.
        """
        starts = self._starts(count, seed, stream)
        targets = torch.zeros_like(starts.x_T)
        for rows in _shares(count, batch):
            targets[rows] = self._targets(starts.part(rows))
        return dataclasses.replace(starts, targets=summed(targets))

    def calls(self, counts: Sequence[int], batch: int | None) -> int:
        """How often one process calls the model for pairs of these counts."""
        return self.plan.evaluations * sum(len(_shares(count, batch)) for count in counts)

    def _starts(self, count: int, seed: int, stream: int) -> Pairs:
        """Noise as large as the process has it, and labels; the noise in the place of targets."""
        noise = standard_normal(self.shape, range(count), seed, stream)
        noise = noise.mul_(noise_scale(self.plan)).to(self.device)
        if self.classes is None:
            return Pairs(noise, noise, None, None, None)
        labels = torch.tensor([self.classes[i % len(self.classes)] for i in range(count)])
        y = labels.to(self.device)
        none = None if self.guidance is None else {"y": torch.full_like(y, -1)}
        return Pairs(noise, noise, {"y": y}, none, self.guidance)

    def _targets(self, starts: Pairs) -> Tensor:
        return sample(
            self.model,
            starts.x_T,
            self.plan,
            kwargs=starts.kwargs,
            unconditional=starts.unconditional,
            guidance=starts.guidance,
        )

    def costs(self, count: int, seed: int, steps: int) -> tuple[Tensor, Tensor]:
        """What `gits_grid` needs for grids of at most so many steps, of the first noises to learn
        from.
        """
        process = self.plan.process
        start, end = self.plan.grid[[0, -1]].tolist()
        times = time_grid(process, steps, "karras", t_start=start, t_end=end)
        starts = self._starts(count, seed, LEARNING)
        return trajectory_costs(
            self.model,
            process,
            starts.x_T,
            times=times,
            kwargs=starts.kwargs,
            unconditional=starts.unconditional,
            guidance=starts.guidance,
        )


def hand_made(
    plan: SolverPlan, costs: tuple[Tensor, Tensor], steps: int, solver: str, end: str
) -> dict[str, SolverPlan]:
    """Plans of x0 prediction on each of the `HAND_MADE` grids.

    Args:
        plan: of the teacher, for the process and the ends of the grids.
        costs: of :meth:`Teacher.costs`.
        steps, solver, end: of the plans.
    """
    process = plan.process
    first, last = plan.grid[[0, -1]].tolist()
    grids = {kind: time_grid(process, steps, kind, t_start=first, t_end=last) for kind in KINDS}
    grids["gits"] = gits_grid(*costs, steps)
    grids["dmn"] = dmn_grid(process, steps, t_start=first, t_end=last)
    return {
        name: SolverPlan.build(process, times, solver, end=end, prediction="x0")
        for name, times in grids.items()
    }


@torch.no_grad()
def loss_of(student: Student, pairs: Pairs, plan: SolverPlan, batch: int | None = None) -> float:
    """The mean distance of a plan's samples from their targets; each process takes its share."""
    share = pairs.share()
    total = torch.zeros((), dtype=torch.float64, device=pairs.x_T.device)
    for _, part in share.parts(batch):
        total += student.losses(part, plan).sum()
    return mean(total, len(share))


def _shares(count: int, batch: int | None) -> list[Tensor]:
    """The rows of this process, at most `batch` at a time."""
    rows = torch.arange(count)[distributed.rank() :: distributed.size()]
    return list(rows.split(batch or count)) if len(rows) else []


@contextlib.contextmanager
def bar(total: int, text: str, unit: str = "call") -> Iterator[Any]:
    """A progress bar of the first process, here from the start."""
    from tqdm import tqdm

    hidden = distributed.rank() > 0
    with tqdm(total=total, desc=text, unit=unit, dynamic_ncols=True, disable=hidden) as shown:
        yield shown


def counted(model: Callable[..., Tensor], shown: Any) -> Callable[..., Tensor]:
    """The model, each call of which moves a bar."""

    def call(*args: Any, **kwargs: Any) -> Tensor:
        output = model(*args, **kwargs)
        shown.update()
        return output

    return call


def moves(shown: Any) -> Callable[[int, float], None]:
    """The callback of `learn_time_grid` that moves a bar."""

    def callback(i: int, loss: float) -> None:
        shown.update()  # what it returns would end the learning

    return callback
