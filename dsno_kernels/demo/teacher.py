"""The demo's teacher: the exact denoiser of the images, and its trajectories; nothing is trained.

The probability-flow ODE runs along DSNO's own schedule, a cosine between log-SNR -20 and 20, with
DEIS (arXiv 2204.13902) of order 3.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dsno_kernels.diffusion import (
    ExactDenoiser,
    SolverPlan,
    VPCosine,
    for_process,
    sample,
    time_grid,
)

# Where the log-SNR of alpha = cos(pi t / 2) is 20: that of `models.logsnr_schedule` at 0.
_EDGE = math.atan(math.exp(-10.0)) * 2.0 / math.pi
PROCESS = VPCosine(s=0.0, t_min=_EDGE, t_max=1.0 - _EDGE)


def plan(steps: int) -> SolverPlan:
    """DEIS on evenly spaced times; one evaluation of the denoiser a step."""
    return SolverPlan.build(PROCESS, time_grid(PROCESS, steps), "tab3", prediction="x0")


@torch.no_grad()
def trajectories(
    noise: Tensor, images: Tensor, steps: int, frames: int, batch: int = 512
) -> tuple[Tensor, Tensor]:
    """The ODE's states on the way from noise to data, at `frames` evenly spaced times.

    Args:
        noise: ``(B, C, H, W)``, standard normal: the state at t = 1.
        images: the data, ``(N, C, H, W)``.
        steps: of the solver from noise to data, a multiple of `frames`.
        frames: how many states to keep; the last is the sample.
        batch: noises integrated at a time.

    Returns:
        The states, ``(B, frames, C, H, W)``, and their log-SNR, ``(frames,)``.
    """
    denoiser = for_process(ExactDenoiser(images), PROCESS)
    solver = plan(steps)
    kept = list(range(steps // frames, steps + 1, steps // frames))
    states = [sample(denoiser, part, solver, frames=kept) for part in noise.split(batch)]
    return torch.cat(states), 2.0 * PROCESS.log_snr(solver.grid[kept]).to(noise)
