"""`group_norm_silu`: what it accepts, what it promises, and every check."""

from __future__ import annotations

import torch
from torch import Tensor

from dsno_kernels.functional import checks
from dsno_kernels.ops import group_norm_silu as _norm


def group_norm_silu(
    x: Tensor,
    num_groups: int,
    weight: Tensor,
    bias: Tensor,
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    eps: float = 1e-5,
    activation: str | None = "silu",
    channel_dim: int = 1,
    channels_last: bool = False,
    out_dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Tensor:
    r"""Group normalization, a scale and shift for each sample and channel, and SiLU, in one pass.

    .. math:: y = \mathrm{silu}(\mathrm{norm}_G(x; w, b) \cdot (1 + s) + h)

    The arithmetic is float32 (float64 where an input is float64), whatever the dtypes of x and y.

    Args:
        x: ``(N, C, ...)``, or with ``channel_dim=2`` ``(B, T, C, ...)``: batch axes, channels,
            pixels; real, floating point, any strides.
        num_groups: G, a divisor of C; mean and variance are those of C/G channels and all pixels.
        weight, bias: w and b, ``(C,)``.
        scale, shift: s and h, ``(N, C)`` or ``(B, T, C)``, as x up to its channels; an axis of
            length 1 is broadcast, in x too.
        eps: added to the variance.
        activation: "silu" or None.
        channel_dim: 1 or 2.
        channels_last: whether y has its channels last in memory; else it has the memory order of x.
        out_dtype: dtype of y; default that of x.
        backend: the name of one; None takes the fastest that can run here.

    Returns:
        y, the shape of x (its batch axes broadcast with those of scale and shift), dense.

    Raises:
        TypeError: a dtype that is not floating point. ValueError: shapes, devices or names that do
            not fit.
        NotImplementedError: a backend that was asked for and cannot run this.

    Equivalent to::

        y = F.group_norm(x, num_groups, weight, bias, eps)  # x (N, C, H, W)
        y = F.silu(y * (1 + scale[:, :, None, None]) + shift[:, :, None, None])

    Gradients of second and higher order run on plain PyTorch.

    Source: group normalization (arXiv 1803.08494); the residual block of DSNO (arXiv 2211.13449).

    Example:
        >>> x, s, w, b = torch.randn(2, 8, 5, 5), torch.randn(2, 8), torch.ones(8), torch.zeros(8)
        >>> dk.group_norm_silu(x, 4, w, b, scale=s, shift=s).shape
        torch.Size([2, 8, 5, 5])
    """
    checks.real("x", x)
    checks.integer("channel_dim", channel_dim)
    if channel_dim not in (1, 2) or x.ndim <= channel_dim:
        raise ValueError(
            "x must have shape (N, C, ...), or (B, T, C, ...) with channel_dim=2;"
            f" got {tuple(x.shape)} and channel_dim={channel_dim}"
        )
    C = x.shape[channel_dim]
    checks.integer("num_groups", num_groups)
    if num_groups < 1 or C % num_groups or C == 0:
        raise ValueError(f"num_groups must divide the {C} channels of x, got {num_groups}")
    if activation not in (None, "silu"):
        raise ValueError(f"unknown activation {activation!r}; accepted: None, 'silu'")
    if isinstance(eps, bool) or not isinstance(eps, (int, float)):
        raise TypeError(f"eps must be a number, got {eps!r}")
    if out_dtype is not None and out_dtype not in checks.REAL_DTYPES:
        raise TypeError(
            f"out_dtype must be one of {checks.names(checks.REAL_DTYPES)}, got {out_dtype}"
        )
    tensors = {"x": x, "weight": weight, "bias": bias}
    for name in ("weight", "bias"):
        checks.real(name, tensors[name])
        if tensors[name].shape != (C,):
            raise ValueError(f"{name} must have shape ({C},), got {tuple(tensors[name].shape)}")
    batch: tuple[int, ...] = tuple(x.shape[:channel_dim])
    for name, value in (("scale", scale), ("shift", shift)):
        if value is None:
            continue
        checks.real(name, value)
        batch = _broadcast(name, value, batch, C)
        tensors[name] = value
    checks.same_device(tensors)
    y_dtype = out_dtype or x.dtype
    if any(tensor.dtype == torch.float64 for tensor in tensors.values()):
        x = x.to(torch.float64)
    # [B, T, C, pixels, ...] from here on; T or the pixels may be an axis of length 1.
    dense = x if x.ndim > channel_dim + 1 else x.unsqueeze(-1)
    dense = dense.expand(*batch, *dense.shape[channel_dim:])
    if scale is not None:
        scale = scale.expand(*batch, C)
    if shift is not None:
        shift = shift.expand(*batch, C)
    if channel_dim == 1:
        dense = dense.unsqueeze(1)
        scale, shift = (None if s is None else s.unsqueeze(1) for s in (scale, shift))
    y = _norm.differentiable_group_norm_silu(
        dense,
        num_groups,
        weight,
        bias,
        scale=scale,
        shift=shift,
        eps=float(eps),
        silu=activation == "silu",
        channels_last=channels_last,
        out_dtype=y_dtype,
        backend=checks.backend(backend),
    )
    if channel_dim == 1:
        y = y.squeeze(1)
    return y if x.ndim > channel_dim + 1 else y.squeeze(-1)


def _broadcast(name: str, value: Tensor, batch: tuple[int, ...], C: int) -> tuple[int, ...]:
    """The batch axes of x broadcast with those of a scale or shift."""
    pairs = list(zip(value.shape, batch, strict=False))
    fits = all(a == b or 1 in (a, b) for a, b in pairs)
    if value.ndim != len(batch) + 1 or value.shape[-1] != C or not fits:
        expected = ", ".join(map(str, (*batch, C)))
        raise ValueError(
            f"{name} must have shape ({expected}), or 1 for a batch axis that is broadcast;"
            f" got {tuple(value.shape)}"
        )
    return tuple(b if a == 1 else a for a, b in pairs)
