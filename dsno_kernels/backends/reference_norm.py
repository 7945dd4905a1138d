"""What `group_norm_silu` means, in plain PyTorch: any float dtype, differentiable to any order.

x `[B, T, C, *pixels]`, normalized over the pixels and the channels of each of G groups:

    xhat = (x - mean) rstd,  u = (xhat w + b) (1 + scale) + shift,  y = silu(u)

with w and b `[C]`, scale and shift `[B, T, C]`, mean and rstd = 1 / sqrt(var + eps) `[B, T, G]`.
For the backward let h = dy silu'(u), a = w (1 + scale), and over the pixels S1 = sum h and
S2 = sum h xhat:

    dx = rstd (a h - mean_g(a h) - xhat mean_g(a h xhat))
    dw = sum (1 + scale) S2,  db = sum (1 + scale) S1       over B and T
    dscale = w S2 + b S1,     dshift = S1
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dsno_kernels.precision import compute_dtype


def channels_last_strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Strides of a dense `[B, T, C, *pixels]` with its channels last in memory."""
    strides, step = [0] * len(shape), 1
    for axis in (2, *reversed(range(3, len(shape))), 1, 0):
        strides[axis] = step
        step = step * shape[axis]
    return tuple(strides)


def _per_channel(values: Tensor, like: Tensor) -> Tensor:
    """`[C]` or `[B, T, C]` in the dtype of `like`, with an axis of 1 for each axis of pixels."""
    return values.to(like.dtype).reshape(*values.shape, *[1] * (like.ndim - 3))


def forward(
    x: Tensor,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    eps: float = 1e-5,
    silu: bool = True,
    channels_last: bool = False,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """y; with `channels_last`, dense and with its channels last in memory."""
    dtype = compute_dtype(x.dtype)
    images = x.to(dtype).flatten(0, 1)
    y = F.group_norm(images, groups, weight.to(dtype), bias.to(dtype), eps).view(x.shape)
    if scale is not None:
        y = y * (_per_channel(scale, y) + 1.0)
    if shift is not None:
        y = y + _per_channel(shift, y)
    if silu:
        y = F.silu(y)
    y = y.to(out_dtype or x.dtype)
    return y.movedim(2, -1).contiguous().movedim(-1, 2) if channels_last else y


def group_norm_silu(
    x: Tensor, groups: int, weight: Tensor, bias: Tensor, *, eps: float = 1e-5, **options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """y, mean and rstd."""
    return forward(x, groups, weight, bias, eps=eps, **options), *statistics(x, groups, eps)


def statistics(x: Tensor, groups: int, eps: float) -> tuple[Tensor, Tensor]:
    """mean and rstd `[B, T, G]`, differentiable in x."""
    rows = x.to(compute_dtype(x.dtype)).reshape(*x.shape[:2], groups, -1)
    mean = rows.mean(-1)
    variance = (rows - mean[..., None]).square().mean(-1)
    return mean, torch.rsqrt(variance + eps)


def group_norm_silu_backward(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    silu: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of x, weight, bias, scale and shift (None where there is none), each in the dtype
    of its tensor; differentiable in all arguments.
    """
    dtype = compute_dtype(x.dtype)
    B, T, C = x.shape[:3]
    groups = mean.shape[2]
    rows = x.to(dtype).reshape(B, T, groups, C // groups, -1)
    xhat = ((rows - mean[..., None, None]) * rstd[..., None, None]).reshape(B, T, C, -1)
    w, b = weight.to(dtype)[:, None], bias.to(dtype)[:, None]
    gain = 1.0 if scale is None else scale.to(dtype)[..., None] + 1.0
    u = (xhat * w + b) * gain
    if shift is not None:
        u = u + shift.to(dtype)[..., None]
    h = grad.to(dtype).reshape(u.shape)
    if silu:
        sigmoid = torch.sigmoid(u)
        h = h * sigmoid * (1.0 + u * (1.0 - sigmoid))
    sum_h, sum_h_xhat = h.sum(-1, keepdim=True), (h * xhat).sum(-1, keepdim=True)  # [B, T, C, 1]

    def mean_of_group(sums: Tensor) -> Tensor:
        means = (sums * w * gain).reshape(B, T, groups, -1).mean(-1, keepdim=True)
        return means.expand(B, T, groups, C // groups).reshape(B, T, C, 1) / x[0, 0, 0].numel()

    inner = h * w * gain - mean_of_group(sum_h) - xhat * mean_of_group(sum_h_xhat)
    grad_x = inner * rstd.repeat_interleave(C // groups, 2)[..., None]
    grad_scale = None if scale is None else (w * sum_h_xhat + b * sum_h)[..., 0].to(scale.dtype)
    return (
        grad_x.reshape(x.shape).to(x.dtype),
        (sum_h_xhat * gain).sum((0, 1, 3)).to(weight.dtype),
        (sum_h * gain).sum((0, 1, 3)).to(bias.dtype),
        grad_scale,
        None if shift is None else sum_h[..., 0].to(shift.dtype),
    )
