"""Op `group_norm_silu`: group normalization, a scale and shift for each sample and channel, SiLU.

Its backward is an op of its own that reads x and the gradient once; a backward that is itself
differentiated runs on the formulas of `backends.reference_norm`, in plain PyTorch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dsno_kernels import _layout
from dsno_kernels.backends import Request, reference, reference_norm, select
from dsno_kernels.ops import define, on_reference, under_transform
from dsno_kernels.precision import compute_dtype

# x is `[B, T, C, *pixels]`.
TIME, CHANNEL = 1, 2


def _strides(x: Tensor, channels_last: bool, find: Any = _layout.find_output_layout) -> Any:
    """Strides of y: dense in the memory order of x, or with its channels last."""
    if channels_last:
        return reference_norm.channels_last_strides(x.shape)
    return find(x.shape, x.stride(), TIME, CHANNEL, x.shape[TIME], x.shape[CHANNEL])[1]


def _with_strides(y: Tensor, x: Tensor, channels_last: bool) -> Tensor:
    """y itself, or a copy with the strides that the op promises."""
    strides = _strides(x, channels_last, _layout._cached_output_layout)
    if y.stride() == strides:
        return y
    return y.new_empty_strided(y.shape, strides).copy_(y)


def _request(x: Tensor, op: str = "group_norm_silu") -> Request:
    return Request(op, x.device, x.dtype)


def _run(
    x: Tensor,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    eps: float,
    silu: bool,
    channels_last: bool,
    out_dtype: torch.dtype,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    if x.numel() == 0:
        return _fake(x, groups, channels_last, out_dtype, backend)
    y, mean, rstd = select(backend, _request(x)).group_norm_silu(
        x,
        groups,
        weight,
        bias,
        scale=scale,
        shift=shift,
        eps=eps,
        silu=silu,
        channels_last=channels_last,
        out_dtype=out_dtype,
    )
    return _with_strides(y, x, channels_last), mean, rstd


def _fake(x: Tensor, groups: int, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    channels_last, out_dtype, _ = others[-3:]
    statistics = x.shape[0], x.shape[1], groups
    dtype = compute_dtype(x.dtype)
    return (
        x.new_empty_strided(x.shape, _strides(x, channels_last), dtype=out_dtype),
        x.new_empty(statistics, dtype=dtype),
        x.new_empty(statistics, dtype=dtype),
    )


def _run_backward(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    silu: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    if x.numel() == 0:
        results = _fake_backward(grad, x, mean, rstd, weight, bias, scale, shift)
        for result in results:
            result.zero_()
        return results
    module = select(backend, _request(x, "group_norm_silu_backward"))
    grad_x, grad_weight, grad_bias, grad_scale, grad_shift = module.group_norm_silu_backward(
        grad, x, mean, rstd, weight, bias, scale=scale, shift=shift, silu=silu
    )
    # An op cannot return an optional tensor: without a scale, its gradient is empty.
    grad_scale, grad_shift = (
        x.new_empty((0,)) if t is None else t.contiguous() for t in (grad_scale, grad_shift)
    )
    grad_x = _with_strides(grad_x, x, channels_last=False)
    return grad_x, grad_weight, grad_bias, grad_scale, grad_shift


def _fake_backward(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    grad_scale, grad_shift = (
        x.new_empty((0,)) if t is None else t.new_empty(x.shape[:3]) for t in (scale, shift)
    )
    return (
        x.new_empty_strided(x.shape, _strides(x, channels_last=False)),
        weight.new_empty(weight.shape),
        bias.new_empty(bias.shape),
        grad_scale,
        grad_shift,
    )


op = define(
    "group_norm_silu(Tensor x, int groups, Tensor weight, Tensor bias, Tensor? scale,"
    " Tensor? shift, float eps, bool silu, bool channels_last, ScalarType out_dtype,"
    " str backend) -> (Tensor, Tensor, Tensor)",
    _run,
    _fake,
)
backward_op = define(
    "group_norm_silu_backward(Tensor grad, Tensor x, Tensor mean, Tensor rstd, Tensor weight,"
    " Tensor bias, Tensor? scale, Tensor? shift, bool silu, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _run_backward,
    _fake_backward,
)


class GroupNormSiluFunction(torch.autograd.Function):
    """Autograd of `group_norm_silu`. Saves x and two numbers a group, no normalized copy."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        """`arguments` are those of the op."""
        x, groups, weight, bias, scale, shift, eps, silu, *_, backend = arguments
        y, mean, rstd = op(*arguments)
        ctx.save_for_backward(x, mean, rstd, weight, bias, scale, shift)
        ctx.groups, ctx.eps, ctx.silu, ctx.backend = groups, eps, silu, backend
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, rstd, weight, bias, *modulation = ctx.saved_tensors
        scale, shift = modulation
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            # Differentiated once more: the statistics depend on x.
            mean, rstd = reference_norm.statistics(x, ctx.groups, ctx.eps)
            grads = reference_norm.group_norm_silu_backward(
                grad, x, mean, rstd, weight, bias, scale=scale, shift=shift, silu=ctx.silu
            )
        else:
            grads = backward_op(
                grad, x, mean, rstd, weight, bias, scale, shift, ctx.silu, ctx.backend
            )
        grad_x, grad_weight, grad_bias, *others = grads
        grad_scale, grad_shift = (
            None if given is None else found
            for given, found in zip(modulation, others, strict=True)
        )
        return grad_x, None, grad_weight, grad_bias, grad_scale, grad_shift, *(None,) * 5


def differentiable_group_norm_silu(
    x: Tensor,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    *,
    scale: Tensor | None,
    shift: Tensor | None,
    eps: float,
    silu: bool,
    channels_last: bool,
    out_dtype: torch.dtype,
    backend: str,
) -> Tensor:
    """The op with autograd.

    Where no kernel serves the call, PyTorch's own operators run one by one, with their own
    backward: on the CPU that is faster than the formulas of the reference.
    """
    options: dict[str, Any] = {
        "scale": scale,
        "shift": shift,
        "eps": eps,
        "silu": silu,
        "channels_last": channels_last,
        "out_dtype": out_dtype,
    }
    given = x, groups, weight, bias
    if under_transform():
        return on_reference(reference_norm.forward, backend, *given, **options)
    compiling = torch.compiler.is_compiling()
    if not compiling and x.numel() > 0 and select(backend, _request(x)) is reference:
        return reference_norm.forward(*given, **options)
    if torch.is_grad_enabled():
        return GroupNormSiluFunction.apply(*given, *options.values(), backend)
    return op(*given, *options.values(), backend)[0]
