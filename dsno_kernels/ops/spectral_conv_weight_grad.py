"""Op `spectral_conv_weight_grad`: D(x, g), the derivative of the trilinear form of `spectral_conv`
by its weight.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import dsno_kernels.ops.spectral_conv as conv
from dsno_kernels import precision as precisions
from dsno_kernels.backends import Request, reference, select
from dsno_kernels.ops import define, distinct, on_reference, under_transform


def run(
    x: Tensor,
    grad_output: Tensor,
    modes: int,
    time_dim: int,
    channel_dim: int,
    grad_positive: Tensor | None,
    negative_slope: float | None,
    precision: str,
    backend: str,
) -> Tensor:
    dtype = torch.promote_types(x.dtype, grad_output.dtype)
    if x.numel() == 0 or grad_output.numel() == 0:
        return _fake(
            x,
            grad_output,
            modes,
            time_dim,
            channel_dim,
            grad_positive,
            negative_slope,
            precision,
            backend,
        ).zero_()
    precision = precisions.resolve(precision, x.device.type)
    length = max(x.shape[time_dim], grad_output.shape[time_dim])
    request = Request("spectral_conv_weight_grad", x.device, dtype, precision, length, modes)
    grad: Tensor = select(backend, request).spectral_conv_weight_grad(
        x,
        grad_output,
        modes,
        time_dim=time_dim,
        channel_dim=channel_dim,
        grad_positive=grad_positive,
        negative_slope=negative_slope,
        precision=precision,
    )
    return grad.contiguous()


def _fake(
    x: Tensor,
    grad_output: Tensor,
    modes: int,
    time_dim: int,
    channel_dim: int,
    grad_positive: Tensor | None,
    negative_slope: float | None,
    precision: str,
    backend: str,
) -> Tensor:
    dtype = precisions.compute_dtype(torch.promote_types(x.dtype, grad_output.dtype))
    return x.new_empty(
        (x.shape[channel_dim], grad_output.shape[channel_dim], modes, 2), dtype=dtype
    )


op = define(
    "spectral_conv_weight_grad(Tensor x, Tensor grad_output, SymInt modes, int time_dim,"
    " int channel_dim, Tensor? grad_positive, float? negative_slope, str precision, str backend)"
    " -> Tensor",
    run,
    _fake,
)


class SpectralConvWeightGradFunction(torch.autograd.Function):
    """Autograd of D(x, g): with V the cotangent of dW, d/dx = S*(g, V) and d/dg = S(x, V)."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        g: Tensor,
        modes: int,
        time_dim: int,
        channel_dim: int,
        precision: str,
        backend: str,
    ) -> Tensor:
        ctx.save_for_backward(x, g)
        ctx.options = {
            "time_dim": time_dim,
            "channel_dim": channel_dim,
            "precision": precision,
            "backend": backend,
        }
        return op(x, g, modes, time_dim, channel_dim, None, None, precision, backend)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        x, g = ctx.saved_tensors
        time_dim = ctx.options["time_dim"]
        grad_x = grad_g = None
        if ctx.needs_input_grad[0]:
            grad_x = conv.differentiable_spectral_conv(
                g, cotangent, n=x.shape[time_dim], adjoint=True, out_dtype=x.dtype, **ctx.options
            )
        if ctx.needs_input_grad[1]:
            grad_g = conv.differentiable_spectral_conv(
                x, cotangent, n=g.shape[time_dim], out_dtype=g.dtype, **ctx.options
            )
        return grad_x, grad_g, None, None, None, None, None


def differentiable_weight_grad(
    x: Tensor,
    grad_output: Tensor,
    modes: int,
    *,
    time_dim: int,
    channel_dim: int,
    grad_positive: Tensor | None = None,
    negative_slope: float | None = None,
    precision: str = "",
    backend: str = "",
) -> Tensor:
    """The op with autograd. `grad_positive` (the backward of LeakyReLU, fused) is for calls that
    record no graph.
    """
    if under_transform():
        return on_reference(
            reference.spectral_conv_weight_grad,
            backend,
            x,
            grad_output,
            modes,
            time_dim=time_dim,
            channel_dim=channel_dim,
            grad_positive=grad_positive,
            negative_slope=negative_slope,
        )
    if torch.is_grad_enabled() and grad_positive is None:
        grad_output = distinct(x, grad_output)
        return SpectralConvWeightGradFunction.apply(
            x, grad_output, modes, time_dim, channel_dim, precision, backend
        )
    return op(
        x,
        grad_output,
        modes,
        time_dim,
        channel_dim,
        grad_positive,
        negative_slope,
        precision,
        backend,
    )
