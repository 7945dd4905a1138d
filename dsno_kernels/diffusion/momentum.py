r"""FDM: momentum diffusion, another process whose data decay like a damped oscillator.

With :math:`\sigma = \sigma_{min} + t (\sigma_{max} - \sigma_{min})` the noise level
:math:`\rho` of the base process, on a clock of its own, the state is

.. math:: x_t = s(t)\, (x_0 + \sigma \epsilon), \qquad s = y(m B(t)), \qquad
    B(t) = 0.1\, t + \tfrac{1}{2} 19.9\, t^2

where y is the position of an oscillator of damping :math:`\zeta` that starts at rest at 1,

.. math:: y'' + 2 \zeta y' + y = 0, \qquad
    y(\tau) = e^{-\zeta\tau} \left(\cosh \sqrt q + \zeta\tau \frac{\sinh \sqrt q}{\sqrt q}\right),
    \quad q = (\zeta^2 - 1)\, \tau^2

:math:`\zeta = 1` is critical damping, :math:`e^{-\tau} (1 + \tau)`, as in the paper. s cancels in
:math:`\lambda = -\log\sigma`, so a solver's step keeps its phi-functions: of the coefficients of
the base process only :math:`a\, s'/s` and :math:`c_j s'` change.

Source: FDM (arXiv 2306.06991), table 1 and its official code.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dsno_kernels.diffusion.processes import (
    EDM,
    VE,
    VP,
    Process,
    Real,
    VPCosine,
    as_float64,
    one_number,
)

BETA_MIN, BETA_MAX = 0.1, 20.0
# |q| < 1 takes the series: 11 terms leave 1/22!, 1e-21.
_TERMS = 11
# Where B is compared with what it has to be.
_PROBES = 65
_FAMILIES = {"vp": (VP, VPCosine), "ve": (VE,), "edm": (EDM,)}


def oscillator(tau: Real, damping: Real = 1.0) -> Tensor:
    r"""The position at time tau of an oscillator that starts at rest at 1,
    :math:`y'' + 2 \zeta y' + y = 0`.

    Args:
        tau: any shape.
        damping: zeta: 1 is critical, below it the position swings through 0, above it creeps.

    Returns:
        float64, the shape of tau (and damping); differentiable in both, smooth at zeta = 1.
    """
    tau = as_float64("tau", tau)
    if not isinstance(damping, Tensor) and damping == 1:
        return torch.exp(-tau) * (1.0 + tau)
    zeta = as_float64("damping", damping)
    q = (zeta - 1.0) * (zeta + 1.0) * tau.square()
    near, over = q.abs() < 1.0, q >= 1.0
    z = torch.where(near, q, 0.0)
    cosh, sinh = torch.zeros_like(z), torch.zeros_like(z)  # sinh is that of sqrt(q), over sqrt(q)
    for k in range(_TERMS - 1, -1, -1):
        cosh = cosh * z + 1.0 / math.factorial(2 * k)
        sinh = sinh * z + 1.0 / math.factorial(2 * k + 1)
    r = torch.where(near, 1.0, q.abs()).sqrt()
    grown = torch.exp(-2.0 * torch.where(over, r, 1.0))  # cosh and sinh without e^r
    cosh = torch.where(near, cosh, torch.where(over, 0.5 + 0.5 * grown, r.cos()))
    sinh = torch.where(near, sinh, torch.where(over, 0.5 - 0.5 * grown, r.sin()) / r)
    exponent = torch.where(over, r, 0.0) - zeta * tau
    # The same for an oscillator that creeps, without the difference of two large numbers.
    creeps = over & (tau > 0) & (zeta > 0)
    root = torch.where(creeps, (zeta - 1.0) * (zeta + 1.0), 1.0).sqrt()
    exponent = torch.where(creeps, -tau / torch.where(creeps, zeta + root, 1.0), exponent)
    return torch.exp(exponent) * (cosh + zeta * tau * sinh)


@dataclass(frozen=True)
class FDM(Process):
    """Momentum diffusion of a variance-preserving, variance-exploding or EDM process.

    Times t' are linear in the noise level sigma / alpha: 0 at `sigma_min`, 1 at `sigma_max`. All
    functions go on outside of [0, 1], as training needs whose levels are not clipped; a plan's
    grid that leaves the process is a ValueError, as of every process. Where sigma is 0, at a t' a
    little below 0, alpha is 1 to within 1e-9.

    Args:
        base: `VPLinear`, `VPCosine`, `DiscreteVP`, `VE` or `EDM`.
        multiplier: m, how fast the data decay; number or 0-d tensor.
        damping: zeta; 1 is the paper's; number or 0-d tensor.
        B: increasing function of t', a float64 tensor of any shape, with B(0) = 0; it is called
            outside of [0, 1], too. None is that of the paper.
        sigma_min, sigma_max: noise levels at t' = 0 and 1; None takes those of `base` at its t_min
            and t_max. (The official VP code has its sigma_min in float32, 1/1024.)

    Raises:
        TypeError: another base; arguments of a wrong type.
        ValueError: m <= 0; damping <= 0; not 0 <= sigma_min < sigma_max; a B that does not
            increase from 0; a mean that vanishes by t' = 1, of too large an m or, below critical
            damping, of an oscillator that swings through 0.

    Source: FDM (arXiv 2306.06991), table 1. There m is not applied to VE; here it is.

    Example:
        >>> process = dk.diffusion.FDM(dk.diffusion.EDM())
        >>> round(float(process.alpha(0.5)), 6)
        0.279688
    """

    base: Process
    multiplier: Real = 1.0
    damping: Real = 1.0
    B: Callable[[Tensor], Tensor] | None = None
    sigma_min: Real | None = None
    sigma_max: Real | None = None
    t_min = 0.0
    t_max = 1.0

    def __post_init__(self) -> None:
        if isinstance(self.base, FDM) or not isinstance(self.base, sum(_FAMILIES.values(), ())):
            raise TypeError(f"base must be a VP, VE or EDM process, got {self.base!r}")
        for name in ("multiplier", "damping"):
            value = one_number(name, getattr(self, name))
            if not 0 < value < math.inf:
                raise ValueError(f"{name} must be positive and finite, got {value}")
        for name in ("sigma_min", "sigma_max"):
            if getattr(self, name) is not None:
                one_number(name, getattr(self, name))
        if self.B is not None and not callable(self.B):
            raise TypeError(f"B must be a function of t' or None, got {self.B!r}")
        low, span = (float(value.detach()) for value in self._levels())
        if not (low >= 0 and 0 < span < math.inf):
            raise ValueError(
                f"0 <= sigma_min < sigma_max is required, got sigma_min={low},"
                f" sigma_max={low + span}; give both, or a base with noise at both ends"
            )
        self._check_mean()

    @property
    def t_zero(self) -> float | None:  # type: ignore[override]
        low, span = self._levels()
        return float(-(low / span).detach())

    @property
    def sigma_data(self) -> float:  # type: ignore[override]
        return self.base.sigma_data

    def alpha(self, t: Real) -> Tensor:
        return oscillator(self._tau(t), self.damping)

    def sigma(self, t: Real) -> Tensor:
        return self.alpha(t) * self.rho(t)

    def rho(self, t: Real) -> Tensor:
        low, span = self._levels()
        return (as_float64("t", t) + low / span) * span  # exactly 0 at t_zero

    def log_snr(self, t: Real) -> Tensor:
        return -torch.log(self.rho(t))

    def inverse(self, log_snr: Real) -> Tensor:
        return self.clock(torch.exp(-as_float64("log_snr", log_snr)))

    def clock(self, rho: Real) -> Tensor:
        """The time t' at which sigma / alpha has this value."""
        low, span = self._levels()
        return as_float64("rho", rho) / span - low / span

    def preconditioning(self, t: Real) -> tuple[Tensor, Tensor, Tensor]:
        """c_skip, c_out, c_in of :class:`dsno_kernels.diffusion.Preconditioner`, in which the state
        itself is what the network sees: c_in = 1.
        """
        alpha = self.alpha(t)
        c_skip, c_out = skip_and_out(self.base, self.rho(t))
        return c_skip / alpha, c_out, torch.ones_like(alpha)

    def _levels(self) -> tuple[Tensor, Tensor]:
        """sigma_min, and sigma_max - sigma_min."""
        base = self.base
        low = base.rho(base.t_min) if self.sigma_min is None else self.sigma_min
        high = base.rho(base.t_max) if self.sigma_max is None else self.sigma_max
        low = as_float64("sigma_min", low)
        return low, as_float64("sigma_max", high) - low

    def _tau(self, t: Real) -> Tensor:
        t = as_float64("t", t)
        if self.B is None:
            return self.multiplier * (t * (BETA_MIN + 0.5 * t * (BETA_MAX - BETA_MIN)))
        return self.multiplier * self.B(t)

    def _check_mean(self) -> None:
        """Whether B increases from 0 and the mean stays positive up to t' = 1."""
        t = torch.linspace(0, 1, _PROBES, dtype=torch.float64, device="cpu")
        with torch.no_grad():
            found = t if self.B is None else self.B(t)
            if not isinstance(found, Tensor) or found.shape != t.shape:
                raise TypeError(f"B must return a tensor of the shape of t', got {found!r}")
            tau = self._tau(t)
            if not (abs(float(tau[0])) < 1e-12 and bool((tau.diff() > 0).all())):
                raise ValueError(
                    f"B must increase from B(0) = 0, got B(0) = {float(tau[0]):.3g} and B(1) ="
                    f" {float(tau[-1]):.3g} times the multiplier"
                )
            zeta = one_number("damping", self.damping)
            root = math.inf
            if zeta < 1:
                root = (math.pi - math.acos(zeta)) / math.sqrt(1 - zeta**2)
            if float(tau[-1]) >= root or float(oscillator(tau[-1], zeta)) == 0:
                raise ValueError(
                    f"the mean must be positive up to t' = 1, and vanishes with damping {zeta} and"
                    f" multiplier * B(1) = {float(tau[-1]):.4g}; give a smaller multiplier, or"
                    " more damping"
                )


def family(process: object) -> str:
    """ "vp", "ve" or "edm", of such a process or of its :class:`FDM`.

    Raises:
        TypeError: any other process.
    """
    base = process.base if isinstance(process, FDM) else process
    for name, kinds in _FAMILIES.items():
        if isinstance(base, kinds):
            return name
    raise TypeError(f"a VP, VE or EDM process is required, got {process!r}")


def skip_and_out(process: Process, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """c_skip and c_out of :class:`dsno_kernels.diffusion.Preconditioner` at noise levels sigma."""
    kind = family(process)
    if kind == "edm":
        total = sigma.square() + process.sigma_data**2
        return process.sigma_data**2 / total, sigma * process.sigma_data * total.rsqrt()
    return torch.ones_like(sigma), -sigma if kind == "vp" else sigma
