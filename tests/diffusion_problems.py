"""Problems with known solutions for the solver tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dsno_kernels.diffusion import DiscreteVP, FlowMatching, Process, solvers

GOLDEN = Path(__file__).parent / "golden"

# One evaluation a step at the state itself: what it takes for a seeded history to be its own type.
SEVERAL_STAGES = ("rhork", "heun", "euler", "dpm_1s", "dpm_2s", "dpm_3s", "dpmpp_1s", "dpmpp_2s")


def names(process: Process) -> list[str]:
    """Every solver that works on the process."""
    return [n for n in solvers() if n != "flow_euler" or isinstance(process, FlowMatching)]


class Gaussian:
    """Data N(mu, diag(s^2)), whose trajectories are known: x_t = alpha mu +
    sqrt((alpha^2 s^2 + sigma^2) / (alpha_T^2 s^2 + sigma_T^2)) (x_T - alpha_T mu).
    """

    def __init__(self, process: Process, start: float, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.process, self.start = process, start
        self.mu = torch.randn(6, generator=generator, dtype=torch.float64)
        self.s = 0.3 + torch.rand(6, generator=generator, dtype=torch.float64)
        noise = torch.randn(4, 6, generator=generator, dtype=torch.float64)
        t = torch.tensor(start, dtype=torch.float64)
        self.x_T = process.alpha(t) * self.mu + self._std(t) * noise

    def _std(self, t: Tensor) -> Tensor:
        return torch.sqrt((self.process.alpha(t) * self.s) ** 2 + self.process.sigma(t) ** 2)

    def at(self, t: Tensor | float) -> Tensor:
        """The trajectory of x_T."""
        t, start = (torch.as_tensor(v, dtype=torch.float64) for v in (t, self.start))
        z = (self.x_T - self.process.alpha(start) * self.mu) / self._std(start)
        return self.process.alpha(t) * self.mu + self._std(t) * z

    def eps(self, x: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = self.process.alpha(t), self.process.sigma(t)
        return sigma * (x - alpha * self.mu) / self._std(t) ** 2

    def prediction(self, kind: str, x: Tensor, t: Tensor) -> Tensor:
        """What a perfect model of this kind returns at x."""
        eps, alpha, sigma = self.eps(x, t), self.process.alpha(t), self.process.sigma(t)
        x0 = self.mu + alpha * self.s**2 * (x - alpha * self.mu) / self._std(t) ** 2
        if kind == "edm":
            c_skip, c_out, _ = self.process.preconditioning(t)
            return (x0 - c_skip * x) / c_out
        return {
            "eps": eps,
            "x0": x0,
            "v": alpha * eps - sigma * x0,
            "flow": eps - x0,
            "score": -eps / sigma,
        }[kind]


class Mixture:
    """The toy of the FDM and LD3 golden values: a mixture of Gaussians in R^12, alpha = 1."""

    def __init__(self, values: dict[str, Tensor]) -> None:
        self.mu, self.s, self.log_w = (values[f"toy_{k}"] for k in ("mu", "sk", "logw"))
        self.latents = values["toy_latents"].double()

    def denoise(self, x: Tensor, t: Tensor) -> Tensor:
        y = x.flatten(1)[:, None]  # [B, 1, D]
        variance = self.s**2 + t**2
        distance = (y - self.mu).square().sum(-1) / variance
        weights = torch.softmax(self.log_w - 0.5 * (distance + 12 * variance.log()), -1)
        means = (self.s[:, None] ** 2 * y + t**2 * self.mu) / variance[:, None]
        return (weights[..., None] * means).sum(1).reshape(x.shape)


def golden(name: str) -> dict[str, Tensor]:
    with np.load(GOLDEN / name) as file:
        return {key: torch.from_numpy(file[key]) for key in file.files}


def grid_for(process: Process) -> Tensor:
    """Six uneven times away from both ends."""
    fractions = torch.tensor([0.93, 0.71, 0.52, 0.37, 0.16, 0.06], dtype=torch.float64)
    if isinstance(process, DiscreteVP):
        return fractions * 999 + 0.35
    return process.t_max * fractions


def table_of(process: Process, grid: Tensor, name: str, **options: Any) -> Tensor:
    from dsno_kernels.diffusion import SolverPlan

    return SolverPlan.build(process, grid, name, **options).table
