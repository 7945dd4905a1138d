"""What a grid is learned and judged on: noises, where a teacher's fine solver takes them, and the
hand-made grids that a learned one must beat.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

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
from dsno_kernels.diffusion._teacher_pairs import Pairs, Student
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
        """Samples 0 .. count - 1 of a stream; each depends on the seed and its number alone."""
        starts = self._starts(count, seed, stream)
        targets = [self._targets(part) for _, part in starts.parts(batch)]
        return dataclasses.replace(starts, targets=torch.cat(targets))

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

    def costs(self, count: int, seed: int) -> tuple[Tensor, Tensor]:
        """What `gits_grid` needs, of the first noises to learn from."""
        process = self.plan.process
        start, end = self.plan.grid[[0, -1]].tolist()
        times = time_grid(process, GITS_STEPS, "karras", t_start=start, t_end=end)
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
def loss_of(student: Student, held_out: Pairs, plan: SolverPlan, batch: int | None = None) -> float:
    """The mean distance of a plan's samples from their targets."""
    parts = [student.losses(part, plan) for _, part in held_out.parts(batch)]
    return float(torch.cat(parts).mean())
