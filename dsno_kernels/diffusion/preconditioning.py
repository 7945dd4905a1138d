r"""What stands around a network that denoises: how it is scaled, trained and told the noise level.

Of :math:`x = x_0 + \sigma \epsilon` the denoiser is
:math:`D(x, \sigma) = c_{skip} x + c_{out} F(c_{in} x, c_{noise})`, and the loss
:math:`w(\sigma)\, |D - x_0|^2` at levels of a distribution of its own:

=======  ======================  ==============  ========================  =====================
..       VP                      VE              EDM                       FDM of each
=======  ======================  ==============  ========================  =====================
c_skip   1                       1               sd^2 / v                  the same
c_out    -sigma                  sigma           sigma sd / sqrt(v)        the same
c_in     1 / sqrt(sigma^2 + 1)   1               1 / sqrt(v)               s(t'), t' of sigma
c_noise  999 t                   log(sigma / 2)  log(sigma) / 4            the same
w        1 / sigma^2             1 / sigma^2     v / (sigma sd)^2          the same
sigma    t uniform               log uniform     log normal                the same
=======  ======================  ==============  ========================  =====================

with sd the standard deviation of the data and :math:`v = \sigma^2 + sd^2`. F predicts the noise
(VP), the noise with a minus (VE), or a mixture of noise and data (EDM). FDM differs by c_in alone,
with which the network sees the state of its process.

Source: EDM (arXiv 2206.00364), table 1; FDM (arXiv 2306.06991) and its official code.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dsno_kernels.diffusion.discrete import DiscreteVP
from dsno_kernels.diffusion.momentum import FDM, family, skip_and_out
from dsno_kernels.diffusion.processes import Process, Real, as_float64, one_number

# Times of the official VP networks are numbered 0 .. 999.
_LAST = 999.0


class Coefficients(NamedTuple):
    """Each of the shape of sigma, float64."""

    c_skip: Tensor
    c_out: Tensor
    c_in: Tensor
    c_noise: Tensor


@dataclass(frozen=True)
class Preconditioner:
    """The table above for one process.

    Args:
        process: `EDM`, `VE`, a VP process, or `FDM` of one; EDM has sigma_data.
        mean, std: of log sigma in training, for EDM.

    Raises:
        TypeError: another process. ValueError: a mean that is not finite; std <= 0 or infinite.

    Example:
        >>> table = dk.diffusion.Preconditioner(dk.diffusion.FDM(dk.diffusion.EDM()))
        >>> c_skip, c_out, c_in, c_noise = table.coefficients(torch.tensor([0.1, 1.0, 10.0]))
    """

    process: Process
    mean: float = -1.2
    std: float = 1.2

    def __post_init__(self) -> None:
        family(self.process)
        if not math.isfinite(one_number("mean", self.mean)):
            raise ValueError(f"mean must be finite, got {self.mean}")
        if not 0 < one_number("std", self.std) < math.inf:
            raise ValueError(f"std must be positive and finite, got {self.std}")

    @property
    def base(self) -> Process:
        """The process, without its momentum."""
        return self.process.base if isinstance(self.process, FDM) else self.process

    def coefficients(self, sigma: Real) -> Coefficients:
        """c_skip, c_out, c_in and c_noise at noise levels sigma, any shape; differentiable.

        At sigma = 0 the denoiser is the identity: c_skip = 1, c_out = 0. Nothing is clamped: levels
        beyond those of the process, as training draws them, take the same formulas.

        Raises:
            ValueError: a number below 0 (a tensor is not looked at).
        """
        if isinstance(sigma, (int, float)) and sigma < 0:
            raise ValueError(f"sigma must be at least 0, got {sigma}")
        sigma = as_float64("sigma", sigma)
        c_skip, c_out = skip_and_out(self.base, sigma)
        return Coefficients(c_skip, c_out, self._c_in(sigma), self._c_noise(sigma))

    def weight(self, sigma: Real) -> Tensor:
        """Of the squared error at noise levels sigma, float64."""
        sigma = as_float64("sigma", sigma)
        if family(self.base) == "edm":
            sd = self.base.sigma_data
            return (sigma.square() + sd**2) / (sigma * sd).square()
        return sigma.square().reciprocal()

    def levels(self, quantiles: Real) -> Tensor:
        """The noise levels at quantiles in (0, 1) of their distribution in training, float64."""
        u, base = as_float64("quantiles", quantiles), self.base
        if family(base) == "edm":
            return torch.exp(self.mean + self.std * torch.special.ndtri(u))
        return base.rho(base.t_min + u * (base.t_max - base.t_min))

    def _c_in(self, sigma: Tensor) -> Tensor:
        if isinstance(self.process, FDM):
            return self.process.alpha(self.process.clock(sigma))
        kind = family(self.base)
        if kind == "ve":
            return torch.ones_like(sigma)
        return torch.rsqrt(sigma.square() + (self.base.sigma_data**2 if kind == "edm" else 1.0))

    def _c_noise(self, sigma: Tensor) -> Tensor:
        kind = family(self.base)
        if kind == "vp":
            t = self.base.inverse(-torch.log(sigma))
            return t if isinstance(self.base, DiscreteVP) else _LAST * t
        return torch.log(sigma) / 4.0 if kind == "edm" else torch.log(sigma / 2.0)
