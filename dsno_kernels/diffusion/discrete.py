"""The process of a model that was trained at discrete times."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from dsno_kernels.diffusion.processes import VP, as_float64, integer, outside_inference_mode


class DiscreteVP(VP):
    """Variance preserving, given at the integer times 0..n-1 of a discrete model; log alpha is
    linear between them, and sigma from 0 at t = -1 to t = 0.

    Args:
        alphas_cumprod: alpha^2 at the integer times, ``(n,)``, strictly decreasing inside (0, 1).

    Equal values are equal processes, and share plans.

    Raises:
        TypeError: not real numbers. ValueError: not such a sequence.

    Source: DDPM (arXiv 2006.11239); the interpolation is that of DPM-Solver (arXiv 2206.00927).

    Example:
        >>> process = dk.diffusion.DiscreteVP.scaled_linear()  # Stable Diffusion
        >>> dk.diffusion.time_grid(process, 4, kind="leading")
        tensor([800., 600., 400., 200.,   0.], dtype=torch.float64)
    """

    t_min = 0.0
    t_zero = -1.0

    @outside_inference_mode
    def __init__(self, alphas_cumprod: Tensor | np.ndarray | Sequence[float]) -> None:
        given = as_float64("alphas_cumprod", alphas_cumprod).cpu()
        values = given.detach()
        if values.ndim != 1 or len(values) < 2:
            raise ValueError(
                f"alphas_cumprod must have shape (n,), n >= 2, got {tuple(values.shape)}"
            )
        inside = bool(((values > 0) & (values < 1)).all())
        if not inside or bool((values[1:] >= values[:-1]).any()):
            raise ValueError("alphas_cumprod must be strictly decreasing and inside (0, 1)")
        self.alphas_cumprod = given
        self.t_max = float(len(values) - 1)

    @classmethod
    def linear(cls, n: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> DiscreteVP:
        """beta from beta_start to beta_end in equal steps (DDPM)."""
        return cls.from_betas(np.linspace(beta_start, beta_end, _count(n)))

    @classmethod
    def scaled_linear(
        cls, n: int = 1000, beta_start: float = 0.00085, beta_end: float = 0.012
    ) -> DiscreteVP:
        """sqrt(beta) in equal steps (latent diffusion)."""
        return cls.from_betas(np.linspace(beta_start**0.5, beta_end**0.5, _count(n)) ** 2)

    @classmethod
    def squaredcos_cap_v2(cls, n: int = 1000, max_beta: float = 0.999) -> DiscreteVP:
        """The ratios of squared cosines, capped (improved DDPM)."""
        n = _count(n)
        signal = np.cos((np.arange(n + 1) / n + 0.008) / 1.008 * (np.pi / 2)) ** 2
        return cls.from_betas(np.minimum(1 - signal[1:] / signal[:-1], max_beta))

    @classmethod
    def from_betas(cls, betas: Tensor | np.ndarray | Sequence[float]) -> DiscreteVP:
        """alphas_cumprod = cumprod(1 - betas)."""
        return cls(torch.exp(torch.cumsum(torch.log1p(-as_float64("betas", betas)), 0)))

    def __repr__(self) -> str:
        return f"DiscreteVP(n={len(self.alphas_cumprod)})"

    def _values(self) -> tuple[float, bytes]:
        return self.t_max, self.alphas_cumprod.detach().cpu().numpy().tobytes()

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and self._values() == other._values()

    def __hash__(self) -> int:
        return hash(self._values())

    def plain(self) -> bool:
        given = vars(self).keys() == {"alphas_cumprod", "t_max"}
        return given and not self.alphas_cumprod.requires_grad

    def kinks(self) -> Tensor:
        return -0.5 * torch.log(torch.expm1(self._exponents.detach()))

    @property
    def _exponents(self) -> Tensor:
        return -torch.log(self.alphas_cumprod)

    def _exponent(self, t: Tensor) -> Tensor:
        y = self._exponents.to(t.device)
        low = t.detach().floor().long().clamp(0, len(y) - 2)
        inside = y[low] + (t - low) * (y[low + 1] - y[low])
        first = t < 0
        power = (1 - self.alphas_cumprod[0]) * torch.where(first, t + 1, 0.0).square()
        return torch.where(first, -torch.log1p(-power), inside)

    def _time(self, exponent: Tensor) -> Tensor:
        y = self._exponents.to(exponent.device)
        low = torch.searchsorted(y.detach(), exponent.detach().contiguous(), right=True) - 1
        first = low < 0
        low = low.clamp(0, len(y) - 2)
        inside = low + (exponent - y[low]) / (y[low + 1] - y[low])
        power = -torch.expm1(-torch.where(first, exponent, y[0])) / (1 - self.alphas_cumprod[0])
        return torch.where(first, power.sqrt() - 1, inside)


def _count(n: object) -> int:
    """The number of times of a discrete model."""
    number = integer("n", n)
    if number < 2:
        raise ValueError(f"n must be at least 2, got {n}")
    return number
