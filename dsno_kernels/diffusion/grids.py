"""Time grids: the N + 1 decreasing times between which a solver takes its N steps."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from dsno_kernels.diffusion.discrete import DiscreteVP
from dsno_kernels.diffusion.processes import Process, Real, as_float64, integer, one_number

KINDS = (
    *("uniform", "quadratic", "power", "log_snr", "exponential", "rho", "karras", "beta"),
    *("trailing", "leading", "linspace"),
)
# A last bit beyond t_max, from a power and its root, say, is no mistake.
_SLACK = 1e-12
_DISCRETE = ("trailing", "leading", "linspace")
_DEFAULT_ORDER = {"quadratic": 2.0, "power": 1.0, "rho": 1.0, "karras": 7.0, "beta": 0.6}


def time_grid(
    process: Process,
    steps: int,
    kind: str = "uniform",
    order: float | None = None,
    t_start: float | None = None,
    t_end: float | None = None,
    append_zero: bool = False,
) -> Tensor:
    r"""Times from noise to data, :math:`t_0 > t_1 > \dots > t_N`.

    With :math:`u = i/N` and :math:`o` the order:

    =============  =================================================================================
    uniform        t linear in u
    power          :math:`t^{1/o}` linear in u; "quadratic" is o = 2
    log_snr        :math:`\log(\alpha/\sigma)` linear in u; also called "exponential"
    rho            :math:`\rho^{1/o}` linear in u, :math:`\rho = \sigma/\alpha`; "karras" is o = 7
    beta           t at the quantiles of the Beta(o, o) distribution, o = 0.6 by default (needs
                   scipy)
    trailing       a discrete model's times n-1, n-1-n/N, .., then `t_end`
    leading        k n//(N+1) for k = N..0
    linspace       n-1 to 0 in equal steps, rounded
    =============  =================================================================================

    Args:
        process: gives the range of times; the last three kinds need a `DiscreteVP`.
        steps: N.
        kind: one of the above.
        order: o of "power", "rho" and "beta"; 1 by default, or as said above. "quadratic" and
            "karras" take another one as well; the other kinds have none.
        t_start, t_end: the ends; `process.t_max` and `process.t_min` by default.
        append_zero: let the last step go to sigma = 0 (`process.t_zero`), after N - 1 steps of the
            grid, as EDM does.

    Returns:
        float64, ``(N + 1,)``, strictly decreasing.

    Raises:
        TypeError: arguments of a wrong type.
        ValueError: an unknown kind (lists the known ones), N < 1, an order for a kind without one,
            ends outside of the process, or rounded times that coincide.

    Source: DEIS (arXiv 2204.13902), section 4; EDM (arXiv 2206.00364), equation 5; arXiv 2305.08891
    (trailing); arXiv 2407.12173 (beta).

    Example:
        >>> dk.diffusion.time_grid(dk.diffusion.EDM(), 3, "karras", append_zero=True)
        tensor([8.0000e+01, 2.5152e+00, 2.0000e-03, 0.0000e+00], dtype=torch.float64)
    """
    if kind not in KINDS:
        raise ValueError(f"unknown kind of time grid {kind!r}; known are {', '.join(KINDS)}")
    steps = integer("steps", steps)
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    o = _order(kind, order)
    low, high = time_range(process)
    end = one_number("t_end", process.t_min if t_end is None else t_end)
    t_end = None if t_end is None else end
    inner = steps - append_zero
    if kind in _DISCRETE:
        if t_start is not None:
            raise ValueError(f"kind {kind!r} starts where it does; leave t_start out")
        times = _discrete(process, max(inner, 1), kind, t_end)[: inner + 1]
    else:
        start = one_number("t_start", process.t_max if t_start is None else t_start)
        if not low <= end < start <= high:
            raise ValueError(
                f"{low} <= t_end < t_start <= {high} is required of {process}, got "
                f"t_start={start}, t_end={end}"
            )
        times = _continuous(process, max(inner, 1), kind, o, start, end)[: inner + 1]
    if append_zero:
        if process.t_zero is None:
            raise ValueError(f"append_zero needs a time at which sigma is 0; {process} has none")
        if float(times[-1]) == process.t_zero:
            raise ValueError(f"sigma is 0 at t_end={end} already; leave append_zero out")
        times = torch.cat([times, times.new_tensor([process.t_zero])])
    return check_times(process, times)


def _order(kind: str, order: float | None) -> float:
    if order is None:
        return _DEFAULT_ORDER.get(kind, 1.0)
    if kind not in _DEFAULT_ORDER:
        raise ValueError(
            f"kind {kind!r} has no order, got order={order!r}: leave it out, or take one of"
            f" {', '.join(_DEFAULT_ORDER)}"
        )
    o = one_number("order", order)
    if not (o > 0 and math.isfinite(o)):
        raise ValueError(f"order must be positive and finite, got {order}")
    return o


def check_times(process: object, times: object, name: str = "grid") -> Tensor:
    """The times as a float64 tensor ``(N + 1,)``, if they are finite, strictly decreasing and
    inside the process's range; otherwise an error that names the index.
    """
    given = stacked(name, times)
    if given.ndim != 1 or len(given) < 2:
        raise ValueError(
            f"{name} must hold N + 1 times for N >= 1 steps, got shape {tuple(given.shape)}"
        )
    check_range(process, given, name)
    values = given.detach().tolist()
    for i in range(1, len(values)):
        if values[i] >= values[i - 1]:
            relation = "equals" if values[i] == values[i - 1] else "is larger than"
            raise ValueError(
                f"{name} must decrease strictly: {name}[{i}] = {values[i]} {relation} "
                f"{name}[{i - 1}] = {values[i - 1]}"
            )
    return given


def check_range(process: object, times: Tensor, name: str) -> None:
    """Raise unless every time is finite and inside the process's range."""
    low, high = time_range(process)
    for i, t in enumerate(times.detach().tolist()):
        if not math.isfinite(t):
            raise ValueError(f"{name} must be finite: {name}[{i}] = {t}")
        if not low <= t <= high * (1 + _SLACK):
            raise ValueError(
                f"{name}[{i}] = {t} lies outside of the times [{low}, {high}] of {process}"
            )


def time_range(process: object) -> tuple[float, float]:
    """The times that the process has; everything for an object that does not say."""
    zero = getattr(process, "t_zero", None)
    low = getattr(process, "t_min", -math.inf) if zero is None else zero
    return float(low), float(getattr(process, "t_max", math.inf))


def stacked(name: str, times: object) -> Tensor:
    """A float64 tensor on the CPU, of a tensor, of numbers, or of a list with 0-d tensors."""
    if isinstance(times, Sequence) and any(isinstance(t, Tensor) for t in times):
        return torch.stack([as_float64(f"{name}[{i}]", t).cpu() for i, t in enumerate(times)])
    return as_float64(name, times).cpu()


def _continuous(
    process: Process, steps: int, kind: str, order: float, start: float, end: float
) -> Tensor:
    u = torch.linspace(0, 1, steps + 1, dtype=torch.float64, device="cpu")

    def between(a: Real, b: Real) -> Tensor:
        return a + u * (b - a)

    if kind in ("uniform", "quadratic", "power"):
        times = between(start ** (1 / order), end ** (1 / order)) ** order
    elif kind in ("log_snr", "exponential"):
        times = process.inverse(between(process.log_snr(start), process.log_snr(end)))
    elif kind in ("rho", "karras"):
        rho = between(process.rho(start) ** (1 / order), process.rho(end) ** (1 / order)) ** order
        times = process.inverse(-torch.log(rho))
    else:
        times = _beta(start, end, u, order)
    if not bool(torch.isfinite(times).all()):
        raise ValueError(
            f"kind {kind!r} needs alpha > 0 and sigma > 0 at both ends, t_start={start} and "
            f"t_end={end}; move them inwards, or use append_zero"
        )
    # rounding must not push the ends out of the range
    return torch.cat([u.new_tensor([start]), times[1:-1], u.new_tensor([end])])


def _beta(start: float, end: float, u: Tensor, order: float) -> Tensor:
    try:
        from scipy.stats import beta
    except ImportError:
        raise ImportError("time grids of kind 'beta' need scipy: pip install scipy") from None
    quantiles = torch.from_numpy(beta.ppf(1 - u.numpy(), order, order))
    return end + (start - end) * quantiles


def _discrete(process: Process, steps: int, kind: str, end: float | None) -> Tensor:
    if not isinstance(process, DiscreteVP):
        raise ValueError(f"kind {kind!r} is for the integer times of a DiscreteVP, got {process}")
    n = len(process.alphas_cumprod)
    k = torch.arange(steps, -1, -1, dtype=torch.float64, device="cpu")
    if kind == "trailing":
        times = torch.round(n * k / steps) - 1
        times[-1] = process.t_min
    elif kind == "leading":
        times = k * (n // (steps + 1))
    else:
        times = torch.round((n - 1) * k / steps)
    if end is not None:
        times[-1] = end
    elif bool((times[1:] >= times[:-1]).any()):
        raise ValueError(
            f"kind {kind!r} has no {steps} steps between different ones of {n} integer times: take"
            " fewer, or a kind such as 'uniform', whose times lie between them"
        )
    return times
