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

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

Real = float | Tensor
_Function = TypeVar("_Function", bound=Callable[..., Any])


def outside_inference_mode(function: _Function) -> _Function:
    """Make no inference tensors, which autograd refuses later; the gradient mode stays the caller's
    (`torch.inference_mode(False)` alone turns it on).
    """

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        recorded = torch.is_grad_enabled()
        with torch.inference_mode(False), torch.set_grad_enabled(recorded):
            return function(*args, **kwargs)

    return call  # type: ignore[return-value]


def as_float64(name: str, value: object) -> Tensor:
    """A real float64 tensor, never an inference tensor; the graph of a tensor is kept."""
    if not isinstance(value, Tensor):
        try:
            value = torch.as_tensor(value, dtype=torch.float64, device="cpu")
        except (TypeError, ValueError, RuntimeError):
            raise TypeError(f"{name} must be a real number or a tensor, got {value!r}") from None
    if value.is_complex() or value.dtype == torch.bool:
        raise TypeError(f"{name} must be real, got {value.dtype}")
    # a compiler cannot ask that of a tensor, and makes no inference tensors
    if not torch.compiler.is_compiling() and value.is_inference():
        value = value if torch.is_inference_mode_enabled() else value.clone()
    return value.to(torch.float64)


def integer(name: str, value: object) -> int:
    """A Python or NumPy integer, no bool."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    return int(value)


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
        """Whether equal processes have equal plans, which are then shared: it is a frozen dataclass
        of numbers, strings and such processes, with no other attributes. Other processes get a new
        plan each time.
        """
        if not is_dataclass(self):
            return False
        made = self.__dataclass_params__
        attributes = vars(self)
        return (
            made.frozen
            and made.eq
            and attributes.keys() == {field.name for field in fields(self) if field.compare}
            and all(
                value.plain()
                if isinstance(value, Process)
                else value is None or isinstance(value, (int, float, str))
                for value in attributes.values()
            )
        )


class VP(Process):
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
class VPLinear(VP):
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
        if one_number("s", self.s) < 0:
            raise ValueError(f"s must be at least 0, got {self.s}")

    @property
    def t_zero(self) -> float | None:  # type: ignore[override]
        return 0.0 if self.normalized else None

    def _angles(self, t: Real) -> tuple[Tensor, Tensor]:
        """theta_0, where sigma vanishes, and theta(t) - theta_0, which must not cancel."""
        t = as_float64("t", t)
        scale = 0.5 * math.pi / (1.0 + self.s)
        if self.normalized:
            return torch.zeros_like(t) + self.s * scale, t * scale
        return torch.zeros_like(t), (t + self.s) * scale

    def _cos(self, t: Real) -> Tensor:
        """cos theta(t), which must not cancel near t = 1."""
        return torch.sin((1.0 - as_float64("t", t)) * (0.5 * math.pi / (1.0 + self.s)))

    def alpha(self, t: Real) -> Tensor:
        return self._cos(t) / torch.cos(self._angles(t)[0])

    def sigma(self, t: Real) -> Tensor:
        start, angle = self._angles(t)
        # cos^2 b - cos^2 a = sin(a - b) sin(a + b)
        return torch.sqrt(torch.sin(angle) * torch.sin(2.0 * start + angle)) / torch.cos(start)

    def log_snr(self, t: Real) -> Tensor:
        start, angle = self._angles(t)
        noise = torch.sin(angle) * torch.sin(2.0 * start + angle)
        return torch.log(self._cos(t)) - 0.5 * torch.log(noise)

    def inverse(self, log_snr: Real) -> Tensor:
        doubled = 2.0 * as_float64("log_snr", log_snr)
        start, _ = self._angles(torch.zeros_like(doubled))
        signal, noise = torch.sigmoid(doubled), torch.sigmoid(-doubled)  # alpha^2, sigma^2
        cos0, sin0 = torch.cos(start), torch.sin(start)
        cos, sin = cos0 * torch.sqrt(signal), torch.sqrt(sin0**2 * signal + noise)
        # sin(a - b) = (sin^2 a - sin^2 b) / sin(a + b)
        angle = torch.atan2(cos0**2 * noise / (sin * cos0 + cos * sin0), cos * cos0 + sin * sin0)
        t = angle * (2.0 / math.pi) * (1.0 + self.s)
        return t if self.normalized else t - self.s


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
    t_zero = None

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
        if not one_number("sigma_data", self.sigma_data) > 0:
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
        if not one_number("shift", self.shift) > 0:
            raise ValueError(f"shift must be positive, got {self.shift}")
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
    x, y = one_number(low, a), one_number(high, b)
    if not (x < y and (x > 0 if positive else x >= 0) and math.isfinite(y)):
        sign = "<" if positive else "<="
        raise ValueError(f"0 {sign} {low} < {high} is required, got {low}={x}, {high}={y}")


def one_number(name: str, value: object) -> float:
    """A number, or what a tensor of one element without axes holds."""
    number = as_float64(name, value).detach()
    if number.ndim:
        raise ValueError(f"{name} must be one number, got shape {tuple(number.shape)}")
    return float(number)
