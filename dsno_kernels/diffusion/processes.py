r"""Noising processes :math:`x_t = \alpha(t)\, x_0 + \sigma(t)\, \epsilon`.

Conventions, used everywhere in this package:

.. math:: \lambda(t) = \log \frac{\alpha(t)}{\sigma(t)} \quad\text{(log_snr: half the log of the
    signal-to-noise ratio of powers)}, \qquad
    \rho(t) = \frac{\sigma(t)}{\alpha(t)} = e^{-\lambda(t)}

Noise grows with t. Times may be floats or tensors of any dtype; results are float64 tensors of the
shape of t on its device, differentiable in t and in parameters that are given as tensors. A plan
accepts any object with `alpha`, `sigma`, `log_snr` and `inverse`; :class:`Process` adds what can be
derived from them.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

Real = float | Tensor


def as_float64(name: str, value: object) -> Tensor:
    """A real float64 tensor; the graph of a tensor is kept."""
    if not isinstance(value, Tensor):
        try:
            value = torch.as_tensor(value, dtype=torch.float64)
        except (TypeError, ValueError, RuntimeError):
            raise TypeError(f"{name} must be a real number or a tensor, got {value!r}") from None
    if value.is_complex() or value.dtype == torch.bool:
        raise TypeError(f"{name} must be real, got {value.dtype}")
    return value.to(torch.float64)


class Process(ABC):
    """What every process of this module has.

    Attributes:
        t_min, t_max: where sampling ends and starts by default.
        t_zero: the time at which sigma is 0, None where there is none. Times lie in
            ``[t_zero, t_max]``, or in ``[t_min, t_max]`` without a t_zero.
        sigma_data: standard deviation of the data that `preconditioning` assumes.
    """

    t_min: float
    t_max: float
    t_zero: float | None = 0.0
    sigma_data: float = 0.5

    @abstractmethod
    def alpha(self, t: Real) -> Tensor:
        """Scale of the data at time t."""

    @abstractmethod
    def sigma(self, t: Real) -> Tensor:
        """Standard deviation of the noise at time t."""

    @abstractmethod
    def log_snr(self, t: Real) -> Tensor:
        """log(alpha / sigma) at time t, without cancellation at either end; +inf at sigma = 0."""

    @abstractmethod
    def inverse(self, log_snr: Real) -> Tensor:
        """The time at which log(alpha / sigma) has this value."""

    def rho(self, t: Real) -> Tensor:
        """sigma / alpha at time t."""
        return self.sigma(t) / self.alpha(t)

    def kinks(self) -> Tensor | None:
        """The log-SNRs at which `inverse` is not smooth, so that quadratures stop there."""
        return None

    def preconditioning(self, t: Real) -> tuple[Tensor, Tensor, Tensor]:
        """c_skip, c_out, c_in of EDM: x0 = c_skip * x + c_out * F(c_in * x).

        Source: EDM (arXiv 2206.00364), table 1, applied to x / alpha.
        """
        alpha, rho = self.alpha(t), self.rho(t)
        total = rho.square() + self.sigma_data**2
        c_skip = self.sigma_data**2 / total / alpha
        return c_skip, rho * self.sigma_data * total.rsqrt(), total.rsqrt() / alpha

    def plain(self) -> bool:
        """Whether no parameter is a tensor, so that equal processes have equal plans."""
        return not any(isinstance(value, Tensor) for value in vars(self).values())


class _VP(Process):
    """alpha^2 + sigma^2 = 1, given y(t) = -log alpha^2 and its inverse."""

    @abstractmethod
    def _exponent(self, t: Tensor) -> Tensor: ...

    @abstractmethod
    def _time(self, exponent: Tensor) -> Tensor: ...

    def alpha(self, t: Real) -> Tensor:
        return torch.exp(-0.5 * self._exponent(as_float64("t", t)))

    def sigma(self, t: Real) -> Tensor:
        return torch.sqrt(-torch.expm1(-self._exponent(as_float64("t", t))))

    def log_snr(self, t: Real) -> Tensor:
        return -0.5 * torch.log(torch.expm1(self._exponent(as_float64("t", t))))

    def inverse(self, log_snr: Real) -> Tensor:
        doubled = -2.0 * as_float64("log_snr", log_snr)
        # softplus, which PyTorch's own rounds to the identity from 20 on
        return self._time(torch.logaddexp(torch.zeros_like(doubled), doubled))


@dataclass(frozen=True)
class VPLinear(_VP):
    """Variance preserving, beta(t) = beta_min + t (beta_max - beta_min).

    Args:
        beta_min, beta_max: rate of noise at t = 0 and t = 1; floats or 0-d tensors.
        t_min, t_max: where sampling ends and starts by default.

    Raises:
        ValueError: not 0 <= beta_min < beta_max, or not 0 <= t_min < t_max.

    Source: score SDEs (arXiv 2011.13456), appendix C.

    Example:
        >>> process = dk.diffusion.VPLinear()
        >>> round(float(process.log_snr(1.0)), 3)
        -5.025
    """

    beta_min: Real = 0.1
    beta_max: Real = 20.0
    t_min: float = 1e-3
    t_max: float = 1.0

    def __post_init__(self) -> None:
        _ordered("beta_min", self.beta_min, "beta_max", self.beta_max)
        _ordered("t_min", self.t_min, "t_max", self.t_max)

    def _exponent(self, t: Tensor) -> Tensor:
        return t * (self.beta_min + 0.5 * t * (self.beta_max - self.beta_min))

    def _time(self, exponent: Tensor) -> Tensor:
        # the root of the quadratic that does not cancel
        slope = 2.0 * (self.beta_max - self.beta_min) * exponent
        return 2.0 * exponent / (self.beta_min + torch.sqrt(self.beta_min**2 + slope))


@dataclass(frozen=True)
class VPCosine(Process):
    """Variance preserving, alpha(t) = cos(theta(t)) / cos(theta(0)),
    theta(t) = (t + s) / (1 + s) * pi / 2.

    Args:
        s: offset of the angle; float or 0-d tensor.
        normalized: False leaves out the denominator, as the official DEIS code does: then sigma
            does not vanish at t = 0.
        t_min, t_max: where sampling ends and starts by default; alpha vanishes at t = 1.

    Raises:
        ValueError: s < 0, or not 0 <= t_min < t_max <= 1.

    Source: improved DDPM (arXiv 2102.09672), equation 17.
    """

    s: Real = 0.008
    normalized: bool = True
    t_min: float = 1e-3
    t_max: float = 0.9946

    def __post_init__(self) -> None:
        _ordered("t_min", self.t_min, "t_max", self.t_max)
        if self.t_max > 1:
            raise ValueError(f"t_max must be at most 1, got {self.t_max}")
        if float(self.s) < 0:
            raise ValueError(f"s must be at least 0, got {float(self.s)}")

    @property
    def t_zero(self) -> float | None:  # type: ignore[override]
        return 0.0 if self.normalized else None

    def _angle(self, t: Real) -> Tensor:
        return (as_float64("t", t) + self.s) / (1.0 + self.s) * (0.5 * math.pi)

    def _start(self, like: Tensor) -> Tensor:
        """The angle at which sigma vanishes."""
        return self._angle(torch.zeros_like(like)) if self.normalized else torch.zeros_like(like)

    def alpha(self, t: Real) -> Tensor:
        angle = self._angle(t)
        return torch.cos(angle) / torch.cos(self._start(angle))

    def sigma(self, t: Real) -> Tensor:
        angle = self._angle(t)
        start = self._start(angle)
        # cos^2 b - cos^2 a = sin(a - b) sin(a + b)
        return torch.sqrt(torch.sin(angle - start) * torch.sin(angle + start)) / torch.cos(start)

    def log_snr(self, t: Real) -> Tensor:
        angle = self._angle(t)
        start = self._start(angle)
        noise = torch.sin(angle - start) * torch.sin(angle + start)
        return torch.log(torch.cos(angle)) - 0.5 * torch.log(noise)

    def inverse(self, log_snr: Real) -> Tensor:
        doubled = 2.0 * as_float64("log_snr", log_snr)
        start = self._start(doubled)
        signal = torch.sigmoid(doubled)
        sine = torch.sqrt(torch.sin(start) ** 2 * signal + torch.sigmoid(-doubled))
        angle = torch.atan2(sine, torch.cos(start) * torch.sqrt(signal))
        return angle * (2.0 / math.pi) * (1.0 + self.s) - self.s


class DiscreteVP(_VP):
    """Variance preserving, given at the integer times 0..n-1 of a discrete model; log alpha is
    linear between them, and from alpha = 1 at t = -1 to t = 0.

    Args:
        alphas_cumprod: alpha^2 at the integer times, ``(n,)``, strictly decreasing inside (0, 1).

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

    def __init__(self, alphas_cumprod: Tensor | np.ndarray | Sequence[float]) -> None:
        given = as_float64("alphas_cumprod", alphas_cumprod)
        values = given.detach()
        if values.ndim != 1 or len(values) == 0:
            raise ValueError(f"alphas_cumprod must have shape (n,), got {tuple(values.shape)}")
        inside = bool(((values > 0) & (values < 1)).all())
        if not inside or bool((values[1:] >= values[:-1]).any()):
            raise ValueError("alphas_cumprod must be strictly decreasing and inside (0, 1)")
        self.alphas_cumprod = given
        self.t_max = float(len(values) - 1)
        self._exponents = torch.cat([-torch.log(given.new_ones(1)), -torch.log(given)])
        self._kinks = self.log_snr(torch.arange(len(values), dtype=torch.float64)).detach()

    @classmethod
    def linear(cls, n: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> DiscreteVP:
        """beta from beta_start to beta_end in equal steps (DDPM)."""
        return cls.from_betas(torch.linspace(beta_start, beta_end, n, dtype=torch.float64))

    @classmethod
    def scaled_linear(
        cls, n: int = 1000, beta_start: float = 0.00085, beta_end: float = 0.012
    ) -> DiscreteVP:
        """sqrt(beta) in equal steps (latent diffusion)."""
        roots = torch.linspace(beta_start**0.5, beta_end**0.5, n, dtype=torch.float64)
        return cls.from_betas(roots.square())

    @classmethod
    def squaredcos_cap_v2(cls, n: int = 1000, max_beta: float = 0.999) -> DiscreteVP:
        """The ratios of squared cosines, capped (improved DDPM)."""
        angle = (torch.arange(n + 1, dtype=torch.float64) / n + 0.008) / 1.008 * (math.pi / 2)
        signal = torch.cos(angle).square()
        return cls.from_betas((1 - signal[1:] / signal[:-1]).clamp(max=max_beta))

    @classmethod
    def from_betas(cls, betas: Tensor) -> DiscreteVP:
        """alphas_cumprod = cumprod(1 - betas)."""
        return cls(torch.exp(torch.cumsum(torch.log1p(-as_float64("betas", betas)), 0)))

    def __repr__(self) -> str:
        return f"DiscreteVP(n={len(self.alphas_cumprod)})"

    def plain(self) -> bool:
        return not self.alphas_cumprod.requires_grad

    def kinks(self) -> Tensor:
        return self._kinks

    def _exponent(self, t: Tensor) -> Tensor:
        y = self._exponents.to(t.device)
        low = t.detach().floor().long().clamp(-1, len(y) - 3 if len(y) > 2 else -1)
        below, above = y[low + 1], y[low + 2]
        return below + (t - low) * (above - below)

    def _time(self, exponent: Tensor) -> Tensor:
        y = self._exponents.to(exponent.device)
        low = torch.searchsorted(y.detach(), exponent.detach().contiguous(), right=True) - 1
        low = low.clamp(0, len(y) - 2)
        return low - 1 + (exponent - y[low]) / (y[low + 1] - y[low])


@dataclass(frozen=True)
class VE(Process):
    """Variance exploding: alpha = 1, sigma(t) = sigma_min (sigma_max / sigma_min)^t.

    Args:
        sigma_min, sigma_max: noise at t = 0 and t = 1; floats or 0-d tensors.
        t_min, t_max: where sampling ends and starts by default.

    Raises:
        ValueError: not 0 < sigma_min < sigma_max, or not 0 <= t_min < t_max.

    Source: score SDEs (arXiv 2011.13456), appendix C.
    """

    sigma_min: Real = 0.02
    sigma_max: Real = 100.0
    t_min: float = 0.0
    t_max: float = 1.0
    t_zero: float | None = None

    def __post_init__(self) -> None:
        _ordered("sigma_min", self.sigma_min, "sigma_max", self.sigma_max, positive=True)
        _ordered("t_min", self.t_min, "t_max", self.t_max)

    def _logs(self) -> tuple[Tensor, Tensor]:
        low = as_float64("sigma_min", self.sigma_min).log()
        return low, as_float64("sigma_max", self.sigma_max).log() - low

    def alpha(self, t: Real) -> Tensor:
        return torch.ones_like(as_float64("t", t))

    def sigma(self, t: Real) -> Tensor:
        return torch.exp(-self.log_snr(t))

    def log_snr(self, t: Real) -> Tensor:
        low, span = self._logs()
        return -(low + as_float64("t", t) * span)

    def inverse(self, log_snr: Real) -> Tensor:
        low, span = self._logs()
        return (-as_float64("log_snr", log_snr) - low) / span


@dataclass(frozen=True)
class EDM(Process):
    """alpha = 1, sigma(t) = t: time is the noise level.

    Args:
        sigma_min, sigma_max: where sampling ends and starts by default.
        sigma_data: standard deviation of the data that `preconditioning` assumes.

    Raises:
        ValueError: not 0 < sigma_min < sigma_max, or sigma_data <= 0.

    Source: EDM (arXiv 2206.00364), table 1.
    """

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    sigma_data: float = 0.5

    def __post_init__(self) -> None:
        _ordered("sigma_min", self.sigma_min, "sigma_max", self.sigma_max, positive=True)
        if not self.sigma_data > 0:
            raise ValueError(f"sigma_data must be positive, got {self.sigma_data}")

    @property
    def t_min(self) -> float:  # type: ignore[override]
        return self.sigma_min

    @property
    def t_max(self) -> float:  # type: ignore[override]
        return self.sigma_max

    def alpha(self, t: Real) -> Tensor:
        return torch.ones_like(as_float64("t", t))

    def sigma(self, t: Real) -> Tensor:
        return as_float64("t", t).clone()

    def log_snr(self, t: Real) -> Tensor:
        return -torch.log(as_float64("t", t))

    def inverse(self, log_snr: Real) -> Tensor:
        return torch.exp(-as_float64("log_snr", log_snr))


@dataclass(frozen=True)
class FlowMatching(Process):
    """The straight path: sigma = shift t / (1 + (shift - 1) t), alpha = 1 - sigma, t in [0, 1].

    Args:
        shift: larger spends more of t at high noise; a network trained on sigma is called with
            ``process.sigma(t)``; float or 0-d tensor.
        t_min, t_max: where sampling ends and starts by default.

    Raises:
        ValueError: shift <= 0, or not 0 <= t_min < t_max <= 1.

    Source: rectified flow (arXiv 2209.03003); the shift is that of arXiv 2403.03206, section 5.3.2.
    """

    shift: Real = 1.0
    t_min: float = 0.0
    t_max: float = 1.0

    def __post_init__(self) -> None:
        if not float(self.shift) > 0:
            raise ValueError(f"shift must be positive, got {float(self.shift)}")
        _ordered("t_min", self.t_min, "t_max", self.t_max)
        if self.t_max > 1:
            raise ValueError(f"t_max must be at most 1, got {self.t_max}")

    def alpha(self, t: Real) -> Tensor:
        t = as_float64("t", t)
        return (1.0 - t) / (1.0 + (self.shift - 1.0) * t)

    def sigma(self, t: Real) -> Tensor:
        t = as_float64("t", t)
        return self.shift * t / (1.0 + (self.shift - 1.0) * t)

    def log_snr(self, t: Real) -> Tensor:
        t = as_float64("t", t)
        return torch.log1p(-t) - torch.log(self.shift * t)

    def inverse(self, log_snr: Real) -> Tensor:
        shift = as_float64("shift", self.shift)
        return torch.sigmoid(-(as_float64("log_snr", log_snr) + torch.log(shift)))


def _ordered(low: str, a: Real, high: str, b: Real, positive: bool = False) -> None:
    x, y = float(a), float(b)
    if not (x < y and (x > 0 if positive else x >= 0) and math.isfinite(y)):
        sign = "<" if positive else "<="
        raise ValueError(f"0 {sign} {low} < {high} is required, got {low}={x}, {high}={y}")
