"""`dynamic_threshold`: what it accepts, what it promises, and every check."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dsno_kernels.functional import checks, step_checks
from dsno_kernels.ops import dynamic_threshold as _threshold


def dynamic_threshold(
    x0: Tensor,
    ratio: float = 0.995,
    max_value: float = 1.0,
    definition: str = "dpm_solver",
    *,
    backend: str | None = None,
) -> Tensor:
    r"""Dynamic thresholding: clamp each sample to its own quantile, and divide by it.

    .. math:: y = \mathrm{clamp}(x_0, -s, s) / s

    With q the quantile of |x0| in a sample (axis 0), interpolated linearly, s is, by definition:

    - "dpm_solver" (DPM-Solver, UniPC): ``max(q, max_value)``;
    - "diffusers": ``clamp(q, 1, max_value)``, which with max_value=1 is a static clamp to [-1, 1].

    The quantile is found by selection, not by a sort, for samples of any size.

    Args:
        x0: ``[B, ...]``, real, floating point, any strides; ``[B]`` is samples of one element.
        ratio: of the quantile, 0 to 1.
        max_value: positive; of "diffusers" at least 1.
        definition: "dpm_solver" or "diffusers".
        backend: as in :func:`exp_step`.

    Returns:
        y, the shape and dtype of x0.

    Raises:
        TypeError: x0 is not floating point. ValueError: shapes or values that do not fit.
        NotImplementedError: a backend that was asked for and cannot run this.

    Differentiable to any order, s included: its gradient is that of ``torch.quantile``, weights of
    the linear interpolation on the two elements between which q lies, and 0 where max_value or 1
    takes the place of q. A sample with NaN gives NaN.

    Equivalent to::

        q = torch.quantile(x0.abs().flatten(1), ratio, dim=1)
        s = q.clamp(min=max_value).view(-1, 1, 1, 1)
        y = x0.clamp(-s, s) / s

    Source: Imagen (arXiv 2205.11487), section 2.3.

    Example:
        >>> dk.dynamic_threshold(3 * torch.randn(2, 3, 8, 8)).abs().amax() <= 1
        tensor(True)
    """
    checks.real("x0", x0)
    check_threshold("", ratio, max_value, definition, x0)
    s = _threshold.threshold_scale(
        _widened(x0), float(ratio), float(max_value), definition, checks.backend(backend)
    )
    return _threshold.divide_by_scale(x0, s.to(x0.dtype))


def _widened(x0: Tensor) -> Tensor:
    return x0.float() if x0.dtype in (torch.float16, torch.bfloat16) else x0


def check_threshold(
    prefix: str, ratio: float, max_value: float, definition: str, x0: Tensor
) -> None:
    """Refuse what is no threshold; `prefix` names the argument that they came in."""
    if definition not in _threshold.DEFINITIONS:
        names = ", ".join(map(repr, _threshold.DEFINITIONS))
        raise ValueError(f"unknown {prefix}definition {definition!r}; accepted: {names}")
    for name, value in (("ratio", ratio), ("max_value", max_value)):
        if not step_checks.is_number(value):
            raise TypeError(f"{prefix}{name} must be a number, got {value!r}")
    if not 0.0 <= ratio <= 1.0:
        raise ValueError(f"{prefix}ratio must be in 0..1, got {ratio!r}")
    least = 1.0 if definition == "diffusers" else 0.0
    if not (max_value > 0.0 and max_value >= least and max_value < math.inf):
        bound = "at least 1" if least else "positive"
        raise ValueError(f"{prefix}max_value must be {bound} for {definition!r}, got {max_value!r}")
    if x0.ndim == 0 or (x0.shape[0] > 0 and 0 in x0.shape[1:]):
        raise ValueError(
            f"x0 must have a batch axis and elements in each sample, got {tuple(x0.shape)}"
        )
