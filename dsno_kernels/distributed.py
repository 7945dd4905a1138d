r"""How the ops shard over a `DeviceMesh`: import this module, and they take DTensors.

    import dsno_kernels.distributed

The spectral convolution acts on each batch element and pixel alone, and is linear in its weight, so
with x ``(B, T, I, H, W)`` and W ``(I, O, K, 2)`` these need no communication:

=====================  ==================  ==================  =====================================
sharded                x                   weight              results
=====================  ==================  ==================  =====================================
batch, pixels          that axis           replicated          y, dx: that axis; dW: partial sums
output channels        replicated          axis O              y: channels; dx: partial; dW: axis O
input channels         channels            axis I              y: partial sums; without an epilogue
=====================  ==================  ==================  =====================================

`group_norm_silu` shards over batch and time; its statistics mix channels and pixels.

Where LeakyReLU has a gradient, one bit a pixel is kept for it, eight pixels a byte. Such a call
shards over the first batch axis, or over the first pixel axis (H) where each shard is whole bytes;
over others DTensor gathers x first. Layouts that no line above names are redistributed by DTensor
too: right, with communication.

Source: `torch.distributed.tensor.experimental.register_sharding`.

Example:
    >>> import dsno_kernels.distributed
    >>> layer = distribute_module(dk.nn.TimeConv(8, 8, 2), mesh)  # replicates the weight
    >>> y = layer(distribute_tensor(x, mesh, [Shard(0)]))  # y has [Shard(0)], too
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.distributed.tensor import Partial, Replicate, Shard
from torch.distributed.tensor.experimental import register_sharding
from torch.distributed.tensor.placement_types import Placement

from dsno_kernels import _layout
from dsno_kernels.ops import group_norm_silu as _norm
from dsno_kernels.ops import spectral_conv as _conv
from dsno_kernels.ops import spectral_conv_backward as _backward
from dsno_kernels.ops import spectral_conv_weight_grad as _weight_grad

__all__: list[str] = []

# The placements of all outputs and of all arguments along one axis of the mesh; None for a number.
Option = tuple[list[Placement | None], list[Placement | None]]

# Sign bits are [B, T, C, bytes].
BITS_BATCH, BITS_CHANNELS, BITS_PIXELS = 0, 2, 3


def _pointwise_axes(ndim: int, time_dim: int, channel_dim: int) -> list[int]:
    """The batch and pixel axes."""
    return [axis for axis in range(ndim) if axis not in (time_dim, channel_dim)]


def _axis_of_bits(x: Any, axis: int, time_dim: int, channel_dim: int) -> int | None:
    """The axis of the sign bits whose shards are those of this axis of x; None where there is none:
    shards of bits must be slices of all bits, or DTensor could not move them.
    """
    batch_group, pixel_group = _layout.axis_groups(x.ndim, time_dim, channel_dim)
    shards = x.mesh.size()
    even = x.shape[axis] % shards == 0
    if batch_group and axis == batch_group[0] and (even or len(batch_group) == 1):
        return BITS_BATCH
    _, pixels = _layout.group_sizes(x.shape, time_dim, channel_dim)
    if pixel_group and axis == pixel_group[0] and even and pixels // shards % 8 == 0:
        return BITS_PIXELS
    return None


def _given(argument: object, placement: Placement) -> Placement | None:
    """The placement of an optional tensor."""
    return None if argument is None else placement


def _spectral_conv(
    x: Any,
    weight: Any,
    time_dim: int,
    channel_dim: int,
    n: int,
    adjoint: bool,
    bias: Any,
    residual: Any,
    negative_slope: float | None,
    out_dtype: torch.dtype,
    save_positive: bool,
    x_positive: Any,
    precision: str,
    backend: str,
) -> list[Option]:
    def option(
        y: Placement,
        x: Placement,
        weight: Placement,
        bits: Placement = Replicate(),  # noqa: B008
        x_bits: Placement = Replicate(),  # noqa: B008
        channels: Placement = Replicate(),  # noqa: B008
    ) -> Option:
        numbers = [None] * 4
        extra = [_given(bias, channels), _given(residual, y)]
        arguments = [x, weight, *numbers, *extra, None, None, None, _given(x_positive, x_bits)]
        return [y, bits if save_positive else Replicate()], [*arguments, None, None]

    options = [option(Replicate(), Replicate(), Replicate())]
    for axis in _pointwise_axes(x.ndim, time_dim, channel_dim):
        placement, bits = Shard(axis), _axis_of_bits(x, axis, time_dim, channel_dim)
        if bits is not None:
            options.append(option(placement, placement, Replicate(), Shard(bits), Shard(bits)))
        elif not save_positive and x_positive is None:
            options.append(option(placement, placement, Replicate()))
    rows, columns = (1, 0) if adjoint else (0, 1)
    channels, bits_channels = Shard(channel_dim), Shard(BITS_CHANNELS)
    options.append(option(channels, Replicate(), Shard(columns), bits_channels, channels=Shard(0)))
    activated = negative_slope is not None and x_positive is None
    if bias is None and residual is None and not activated:
        options.append(option(Partial(), channels, Shard(rows), x_bits=bits_channels))
    return options


def _spectral_conv_weight_grad(
    x: Any,
    grad_output: Any,
    modes: int,
    time_dim: int,
    channel_dim: int,
    grad_positive: Any,
    negative_slope: float | None,
    precision: str,
    backend: str,
) -> list[Option]:
    def option(grad: Placement, x: Placement, grad_output: Placement, bits: Placement) -> Option:
        return [grad], [x, grad_output, *[None] * 3, _given(grad_positive, bits), *[None] * 3]

    replicated, channels = Replicate(), Shard(channel_dim)
    options = [option(replicated, replicated, replicated, replicated)]
    for axis in _pointwise_axes(x.ndim, time_dim, channel_dim):
        bits = _axis_of_bits(x, axis, time_dim, channel_dim)
        if grad_positive is None or bits is not None:
            options.append(option(Partial(), Shard(axis), Shard(axis), Shard(bits or 0)))
    options.append(option(Shard(0), channels, replicated, replicated))
    options.append(option(Shard(1), replicated, channels, Shard(BITS_CHANNELS)))
    return options


def _spectral_conv_backward(
    x: Any,
    grad_output: Any,
    weight: Any,
    time_dim: int,
    channel_dim: int,
    grad_positive: Any,
    negative_slope: float | None,
    precision: str,
    backend: str,
) -> list[Option]:
    def option(
        grads: tuple[Placement, Placement],
        x: Placement,
        grad_output: Placement,
        weight: Placement,
        bits: Placement = Replicate(),  # noqa: B008
    ) -> Option:
        arguments = [x, grad_output, weight, None, None, _given(grad_positive, bits)]
        return [*grads], [*arguments, *[None] * 3]

    replicated, channels = Replicate(), Shard(channel_dim)
    options = [option((replicated, replicated), replicated, replicated, replicated)]
    for axis in _pointwise_axes(x.ndim, time_dim, channel_dim):
        place, bits = Shard(axis), _axis_of_bits(x, axis, time_dim, channel_dim)
        if grad_positive is None or bits is not None:
            options.append(option((place, Partial()), place, place, replicated, Shard(bits or 0)))
    bits_channels = Shard(BITS_CHANNELS)
    options.append(option((channels, Shard(0)), channels, replicated, Shard(0)))
    options.append(option((Partial(), Shard(1)), replicated, channels, Shard(1), bits_channels))
    return options


def _group_norm_silu(
    x: Any,
    groups: int,
    weight: Any,
    bias: Any,
    scale: Any,
    shift: Any,
    eps: float,
    silu: bool,
    channels_last: bool,
    out_dtype: torch.dtype,
    backend: str,
) -> list[Option]:
    def option(p: Placement) -> Option:
        arguments = [p, None, Replicate(), Replicate(), _given(scale, p), _given(shift, p)]
        return [p, p, p], [*arguments, *[None] * 5]

    return [option(p) for p in (Replicate(), Shard(0), Shard(_norm.TIME))]


def _group_norm_silu_backward(
    grad: Any,
    x: Any,
    mean: Any,
    rstd: Any,
    weight: Any,
    bias: Any,
    scale: Any,
    shift: Any,
    silu: bool,
    backend: str,
) -> list[Option]:
    def option(p: Placement, summed: Placement) -> Option:
        # Without a scale its gradient is an empty tensor.
        absent = [Replicate() if t is None else p for t in (scale, shift)]
        arguments = [p, p, p, p, Replicate(), Replicate(), _given(scale, p), _given(shift, p)]
        return [p, summed, summed, *absent], [*arguments, None, None]

    sharded = [option(Shard(axis), Partial()) for axis in (0, _norm.TIME)]
    return [option(Replicate(), Replicate()), *sharded]


_RULES: dict[torch._ops.OpOverload, Callable[..., list[Option]]] = {
    _conv.op: _spectral_conv,
    _backward.op: _spectral_conv_backward,
    _weight_grad.op: _spectral_conv_weight_grad,
    _norm.op: _group_norm_silu,
    _norm.backward_op: _group_norm_silu_backward,
}
for _op, _rule in _RULES.items():
    register_sharding(_op)(_rule)
