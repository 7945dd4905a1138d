"""Op `spectral_conv`: the truncated-mode spectral convolution, its adjoint, and their derivatives.

All derivatives come from one trilinear form, tau(x, W, g) = <g, S(x, W)>:

    S(x, W)   = d tau / d g    spectral_conv
    S*(g, W)  = d tau / d x    spectral_conv with adjoint=True
    D(x, g)   = d tau / d W    spectral_conv_weight_grad

so the derivatives of each of the three are the other two. Where both S* and D are wanted, in the
backward pass, they are one op (ops/spectral_conv_backward.py).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# The ops are each other's derivatives, so each file needs the others' modules (at call time only).
import dsno_kernels.ops.spectral_conv_backward as both
import dsno_kernels.ops.spectral_conv_weight_grad as weight_grad
from dsno_kernels import _layout
from dsno_kernels import precision as precisions
from dsno_kernels.backends import Request, reference, select
from dsno_kernels.ops import define, distinct, on_reference, under_transform


def run(
    x: Tensor,
    weight: Tensor,
    time_dim: int,
    channel_dim: int,
    n: int,
    adjoint: bool,
    bias: Tensor | None,
    residual: Tensor | None,
    negative_slope: float | None,
    out_dtype: torch.dtype,
    save_positive: bool,
    x_positive: Tensor | None,
    precision: str,
    backend: str,
) -> tuple[Tensor, Tensor]:
    channels = weight.shape[0 if adjoint else 1]
    shape, strides = _layout.output_layout(x, time_dim, channel_dim, n, channels)
    if 0 in shape:
        y = x.new_empty_strided(shape, strides, dtype=out_dtype)
        return y, _empty_positive(y, time_dim, channel_dim, save_positive)
    dtype = torch.promote_types(x.dtype, weight.dtype) if weight.dtype == torch.float64 else x.dtype
    precision = precisions.resolve(precision, x.device.type)
    request = Request(
        "spectral_conv", x.device, dtype, precision, max(x.shape[time_dim], n), weight.shape[2]
    )
    y, positive = select(backend, request).spectral_conv(
        x,
        weight,
        time_dim=time_dim,
        channel_dim=channel_dim,
        n=n,
        adjoint=adjoint,
        bias=bias,
        residual=residual,
        negative_slope=negative_slope,
        out_dtype=out_dtype,
        save_positive=save_positive,
        x_positive=x_positive,
        precision=precision,
    )
    if y.stride() != strides:
        y = y.new_empty_strided(shape, strides).copy_(y)
    return y, positive if positive is not None else _empty_positive(y, time_dim, channel_dim, False)


def _empty_positive(out: Tensor, time_dim: int, channel_dim: int, save: bool) -> Tensor:
    """Storage for the sign bits of `out`; without `save`, none (an op cannot return an optional
    tensor).
    """
    if not save:
        return out.new_empty((0,), dtype=torch.uint8)
    batch, pixels = _layout.group_sizes(out.shape, time_dim, channel_dim)
    shape = _layout.positive_shape(batch, out.shape[time_dim], out.shape[channel_dim], pixels)
    return out.new_empty(shape, dtype=torch.uint8)


def _fake(
    x: Tensor,
    weight: Tensor,
    time_dim: int,
    channel_dim: int,
    n: int,
    adjoint: bool,
    bias: Tensor | None,
    residual: Tensor | None,
    negative_slope: float | None,
    out_dtype: torch.dtype,
    save_positive: bool,
    x_positive: Tensor | None,
    precision: str,
    backend: str,
) -> tuple[Tensor, Tensor]:
    channels = weight.shape[0 if adjoint else 1]
    out = _layout.fake_empty(x, time_dim, channel_dim, n, channels, out_dtype)
    return out, _empty_positive(out, time_dim, channel_dim, save_positive)


op = define(
    "spectral_conv(Tensor x, Tensor weight, int time_dim, int channel_dim, SymInt n, bool adjoint,"
    " Tensor? bias, Tensor? residual, float? negative_slope, ScalarType out_dtype,"
    " bool save_positive, Tensor? x_positive, str precision, str backend) -> (Tensor, Tensor)",
    run,
    _fake,
)


class SpectralConvFunction(torch.autograd.Function):
    """Autograd of `spectral_conv` and of its adjoint. Saves x, W and, with an activation, one bit
    an element of y.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        residual: Tensor | None,
        time_dim: int,
        channel_dim: int,
        n: int,
        adjoint: bool,
        negative_slope: float | None,
        out_dtype: torch.dtype,
        precision: str,
        backend: str,
    ) -> Tensor:
        save_positive = negative_slope is not None and any(ctx.needs_input_grad[:3])
        y, positive = op(
            x,
            weight,
            time_dim,
            channel_dim,
            n,
            adjoint,
            bias,
            residual,
            negative_slope,
            out_dtype,
            save_positive,
            None,
            precision,
            backend,
        )
        ctx.save_for_backward(x, weight, positive if save_positive else None)
        ctx.axes = time_dim, channel_dim
        ctx.adjoint, ctx.negative_slope = adjoint, negative_slope
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.residual_dtype = None if residual is None else residual.dtype
        ctx.precision, ctx.backend = precision, backend
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, positive = ctx.saved_tensors
        time_dim, channel_dim = ctx.axes
        g, slope = grad, None
        if positive is not None:
            if torch.is_grad_enabled() or ctx.needs_input_grad[2]:
                g, positive = (
                    reference.apply_positive(grad, positive, ctx.negative_slope, *ctx.axes),
                    None,
                )
            else:
                slope = ctx.negative_slope
        grad_x = grad_weight = grad_bias = grad_residual = None
        if all(ctx.needs_input_grad[:2]) and not ctx.adjoint:
            grad_x, grad_weight = both.differentiable_backward(
                x,
                g,
                weight,
                time_dim=time_dim,
                channel_dim=channel_dim,
                grad_positive=positive,
                negative_slope=slope,
                precision=ctx.precision,
                backend=ctx.backend,
            )
            grad_weight = grad_weight.to(weight.dtype)
        elif ctx.needs_input_grad[0]:
            grad_x = differentiable_spectral_conv(
                g,
                weight,
                time_dim=time_dim,
                channel_dim=channel_dim,
                n=x.shape[time_dim],
                adjoint=not ctx.adjoint,
                out_dtype=x.dtype,
                x_positive=positive,
                negative_slope=slope,
                precision=ctx.precision,
                backend=ctx.backend,
            )
        if ctx.needs_input_grad[1] and grad_weight is None:
            first, second = (g, x) if ctx.adjoint else (x, g)
            grad_weight = weight_grad.differentiable_weight_grad(
                first,
                second,
                weight.shape[2],
                time_dim=time_dim,
                channel_dim=channel_dim,
                grad_positive=positive,
                negative_slope=slope,
                precision=ctx.precision,
                backend=ctx.backend,
            ).to(weight.dtype)
        if ctx.needs_input_grad[2]:
            axes = [axis for axis in range(g.ndim) if axis != channel_dim]
            grad_bias = g.sum(axes, dtype=ctx.bias_dtype)
        if ctx.needs_input_grad[3]:
            grad_residual = grad.to(ctx.residual_dtype)
        return grad_x, grad_weight, grad_bias, grad_residual, *(None,) * 8


def differentiable_spectral_conv(
    x: Tensor,
    weight: Tensor,
    *,
    time_dim: int,
    channel_dim: int,
    n: int,
    adjoint: bool = False,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    negative_slope: float | None = None,
    out_dtype: torch.dtype,
    x_positive: Tensor | None = None,
    precision: str = "",
    backend: str = "",
) -> Tensor:
    """The op with autograd. `x_positive` (the backward of LeakyReLU, fused) is for calls that
    record no graph.
    """
    if under_transform():
        return on_reference(
            reference.spectral_conv,
            backend,
            x,
            weight,
            time_dim=time_dim,
            channel_dim=channel_dim,
            n=n,
            adjoint=adjoint,
            bias=bias,
            residual=residual,
            negative_slope=negative_slope,
            out_dtype=out_dtype,
            x_positive=x_positive,
        )[0]
    if torch.is_grad_enabled() and x_positive is None:
        return SpectralConvFunction.apply(
            x,
            weight,
            bias,
            distinct(x, residual),
            time_dim,
            channel_dim,
            n,
            adjoint,
            negative_slope,
            out_dtype,
            precision,
            backend,
        )
    return op(
        x,
        weight,
        time_dim,
        channel_dim,
        n,
        adjoint,
        bias,
        residual,
        negative_slope,
        out_dtype,
        False,
        x_positive,
        precision,
        backend,
    )[0]
