"""Op `spectral_conv_backward`: both gradients of `spectral_conv`, of x and of the gradient g of y,

    dx = S*(g, W)      dW = D(x, g)

in the words of ops/spectral_conv.py, in one pass over both. A backend that has no kernel for the
two together runs the two ops. With u and V the cotangents of dx and of dW, its derivatives are

    d/dx = S*(g, V)    d/dg = S(u, W) + S(x, V)    d/dW = D(u, g)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# The ops are each other's derivatives, so each file needs the others' modules (at call time only).
import dsno_kernels.ops.spectral_conv as conv
import dsno_kernels.ops.spectral_conv_weight_grad as weight_grad
from dsno_kernels import _layout
from dsno_kernels import precision as precisions
from dsno_kernels.backends import Request, select_whole
from dsno_kernels.ops import define, distinct, under_transform


def _run(
    x: Tensor,
    grad_output: Tensor,
    weight: Tensor,
    time_dim: int,
    channel_dim: int,
    grad_positive: Tensor | None,
    negative_slope: float | None,
    precision: str,
    backend: str,
) -> tuple[Tensor, Tensor]:
    if x.numel() and grad_output.numel():
        dtype = torch.promote_types(x.dtype, grad_output.dtype)
        if weight.dtype == torch.float64:
            dtype = weight.dtype
        request = Request(
            "spectral_conv_backward",
            x.device,
            dtype,
            precisions.resolve(precision, x.device.type),
            max(x.shape[time_dim], grad_output.shape[time_dim]),
            weight.shape[2],
            max(weight.shape[:2]),
        )
        module = select_whole(backend, request)
        if module is not None:
            grads: tuple[Tensor, Tensor] = module.spectral_conv_backward(
                x,
                grad_output,
                weight,
                time_dim=time_dim,
                channel_dim=channel_dim,
                grad_positive=grad_positive,
                negative_slope=negative_slope,
                precision=request.precision,
            )
            return grads
    grad_x, _ = conv.run(
        grad_output,
        weight,
        time_dim,
        channel_dim,
        x.shape[time_dim],
        True,
        None,
        None,
        negative_slope,
        x.dtype,
        False,
        grad_positive,
        precision,
        backend,
    )
    grad_weight = weight_grad.run(
        x,
        grad_output,
        weight.shape[2],
        time_dim,
        channel_dim,
        grad_positive,
        negative_slope,
        precision,
        backend,
    )
    return grad_x, grad_weight


def _fake(
    x: Tensor,
    grad_output: Tensor,
    weight: Tensor,
    time_dim: int,
    channel_dim: int,
    grad_positive: Tensor | None,
    negative_slope: float | None,
    precision: str,
    backend: str,
) -> tuple[Tensor, Tensor]:
    grad_x = _layout.fake_empty(
        grad_output, time_dim, channel_dim, x.shape[time_dim], weight.shape[0], x.dtype
    )
    dtype = precisions.compute_dtype(torch.promote_types(x.dtype, grad_output.dtype))
    return grad_x, x.new_empty(weight.shape, dtype=dtype)


op = define(
    "spectral_conv_backward(Tensor x, Tensor grad_output, Tensor weight, int time_dim,"
    " int channel_dim, Tensor? grad_positive, float? negative_slope, str precision, str backend)"
    " -> (Tensor, Tensor)",
    _run,
    _fake,
)


class SpectralConvBackwardFunction(torch.autograd.Function):
    """Autograd of the pair: each of its derivatives is one of the ops, or a sum of two."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        g: Tensor,
        weight: Tensor,
        time_dim: int,
        channel_dim: int,
        precision: str,
        backend: str,
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, g, weight)
        ctx.options = {
            "time_dim": time_dim,
            "channel_dim": channel_dim,
            "precision": precision,
            "backend": backend,
        }
        return op(x, g, weight, time_dim, channel_dim, None, None, precision, backend)

    @staticmethod
    def backward(ctx: Any, u: Tensor | None, v: Tensor | None) -> tuple[Tensor | None, ...]:
        x, g, weight = ctx.saved_tensors
        T, n = (tensor.shape[ctx.options["time_dim"]] for tensor in (x, g))
        grad_x = grad_g = grad_weight = None
        if v is not None and ctx.needs_input_grad[0]:
            grad_x = conv.differentiable_spectral_conv(
                g, v, n=T, adjoint=True, out_dtype=x.dtype, **ctx.options
            )
        if ctx.needs_input_grad[1]:
            terms = [
                conv.differentiable_spectral_conv(a, w, n=n, out_dtype=g.dtype, **ctx.options)
                for a, w in ((u, weight), (x, v))
                if a is not None and w is not None
            ]
            grad_g = sum(terms[1:], terms[0]) if terms else None
        if u is not None and ctx.needs_input_grad[2]:
            grad_weight = weight_grad.differentiable_weight_grad(
                u, g, weight.shape[2], **ctx.options
            ).to(weight.dtype)
        return grad_x, grad_g, grad_weight, *(None,) * 4


def differentiable_backward(
    x: Tensor,
    grad_output: Tensor,
    weight: Tensor,
    *,
    time_dim: int,
    channel_dim: int,
    grad_positive: Tensor | None = None,
    negative_slope: float | None = None,
    precision: str = "",
    backend: str = "",
) -> tuple[Tensor, Tensor]:
    """The op with autograd: dx in the dtype of x, dW in float32 or float64. `grad_positive` (the
    backward of LeakyReLU, fused) is for calls that record no graph.
    """
    if under_transform():
        options: dict[str, Any] = {
            "time_dim": time_dim,
            "channel_dim": channel_dim,
            "negative_slope": negative_slope,
            "precision": precision,
            "backend": backend,
        }
        return conv.differentiable_spectral_conv(
            grad_output,
            weight,
            n=x.shape[time_dim],
            adjoint=True,
            out_dtype=x.dtype,
            x_positive=grad_positive,
            **options,
        ), weight_grad.differentiable_weight_grad(
            x, grad_output, weight.shape[2], grad_positive=grad_positive, **options
        )
    if torch.is_grad_enabled() and grad_positive is None:
        return SpectralConvBackwardFunction.apply(
            x, distinct(x, grad_output), weight, time_dim, channel_dim, precision, backend
        )
    return op(
        x,
        grad_output,
        weight,
        time_dim,
        channel_dim,
        grad_positive,
        negative_slope,
        precision,
        backend,
    )
