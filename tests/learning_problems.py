"""Small problems of learning a time grid."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dsno_kernels.diffusion import LearnedGrid, LearningOptions, VPLinear, learn_time_grid
from tests.diffusion_problems import Gaussian

VP = VPLinear()
SHORT = LearningOptions(iterations=8, rounds=2, validation=0.25)


def learned(
    process: Any = VP, steps: int = 4, options: LearningOptions = SHORT, **more: Any
) -> LearnedGrid:
    """Of a Gaussian's exact model, with the exact ends of the trajectories."""
    problem = Gaussian(process, float(process.t_max))
    x_T = torch.cat([problem.x_T, problem.x_T.flip(0) * 0.9])
    problem.x_T = x_T
    kind = more.setdefault("prediction", "x0")

    def denoiser(x: Tensor, t: Tensor, **kwargs: Any) -> Tensor:
        return problem.prediction(kind, x, t)

    return learn_time_grid(
        denoiser, process, steps, x_T, problem.at(process.t_min), options=options, **more
    )


def improves(grid: LearnedGrid, by: float = 0.9) -> bool:
    assert grid.loss is not None
    return grid.loss < by * grid.baselines["initial"]


class Network(nn.Module):
    """A small conditional model; its weights ask for gradients, as those of others do."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(6, width), nn.Linear(width, 6)
        self.double()
        self.calls: list[int] = []

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        self.calls.append(len(x))
        labels = torch.zeros(len(x)).double() if y is None else y.double()
        return x + 0.1 * self.down(torch.tanh(self.up(x) + 3 * t + labels[:, None]))


def starts(count: int = 8) -> Tensor:
    return torch.randn(count, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
