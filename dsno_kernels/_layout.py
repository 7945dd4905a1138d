"""Canonical axes: every tensor of an op is seen as `[B, T, C, P]` with four sizes and four strides.

B are the batch axes, T time, C channels and P the pixels. Which axes are pixels follows from the
shape alone (so x, y, their gradients and the residual always agree): of the axes that are neither
time nor channel, those behind both of them are pixels; where there are none, those between the two;
where there are none either, all of them. The rest is batch. `(B, T, C, H, W)` has P = H*W;
`(B, C, L)` and `(B, T, C)` have P = B and one batch.

Kernels take pointers and strides, so no view is ever created. A tensor whose batch or pixel axes
cannot be merged into one stride is copied once, at the door of the op.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Axes(NamedTuple):
    """Sizes and strides (in elements) of a tensor seen as `[B, T, C, P]`."""

    B: int
    T: int
    C: int
    P: int
    stride_b: int
    stride_t: int
    stride_c: int
    stride_p: int

    @property
    def strides(self) -> tuple[int, int, int, int]:
        return self.stride_b, self.stride_t, self.stride_c, self.stride_p


def axis_groups(
    ndim: int, time_dim: int, channel_dim: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The batch axes and the pixel axes of a tensor, from the places of time and channels."""
    first, second = sorted((time_dim, channel_dim))
    slots = [range(first), range(first + 1, second), range(second + 1, ndim)]
    pixels = next((slot for slot in reversed(slots) if len(slot)), range(0))
    batch = [axis for slot in slots if slot is not pixels for axis in slot]
    return tuple(batch), tuple(pixels)


def group_sizes(shape: Sequence[int], time_dim: int, channel_dim: int) -> tuple[int, int]:
    """B and P of a shape."""
    batch_group, pixel_group = axis_groups(len(shape), time_dim, channel_dim)
    batch = pixels = 1  # plain loops: Dynamo traces them, with symbols too
    for axis in batch_group:
        batch = batch * shape[axis]
    for axis in pixel_group:
        pixels = pixels * shape[axis]
    return batch, pixels


def merged(
    shape: Sequence[int], strides: Sequence[int], group: Sequence[int]
) -> tuple[int, int] | None:
    """Size and stride of axes seen as one, or None where one stride does not reach them all."""
    size, stride = 1, 0
    for axis in reversed(group):
        if shape[axis] == 1:
            continue
        if size == 1:
            stride = strides[axis]
        elif strides[axis] != size * stride:
            return None
        size *= shape[axis]
    return size, stride


def find_axes(
    shape: Sequence[int], strides: Sequence[int], time_dim: int, channel_dim: int
) -> Axes | None:
    """Canonical axes of a tensor, or None where its batch or pixel axes cannot be merged."""
    batch_group, pixel_group = axis_groups(len(shape), time_dim, channel_dim)
    batch = merged(shape, strides, batch_group)
    pixels = merged(shape, strides, pixel_group)
    if batch is None or pixels is None:
        return None
    return Axes(
        batch[0],
        shape[time_dim],
        shape[channel_dim],
        pixels[0],
        batch[1],
        strides[time_dim],
        strides[channel_dim],
        pixels[1],
    )


_cached_axes = functools.lru_cache(maxsize=4096)(find_axes)


def canonical(x: Tensor, time_dim: int, channel_dim: int) -> tuple[Tensor, Axes]:
    """`x` itself and its canonical axes; a dense copy where the axes of `x` cannot be merged."""
    axes = _cached_axes(x.shape, x.stride(), time_dim, channel_dim)
    if axes is None:
        copy = empty(x, time_dim, channel_dim, x.shape[time_dim], x.shape[channel_dim], x.dtype)
        x = copy.copy_(x)
        axes = _cached_axes(x.shape, x.stride(), time_dim, channel_dim)
        assert axes is not None
    return x, axes


def find_output_layout(
    shape: Sequence[int],
    strides: Sequence[int],
    time_dim: int,
    channel_dim: int,
    n: int,
    channels: int,
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shape and strides of an output with `n` times and `channels` channels: dense, in the memory
    order of the input.

    The order of the four canonical axes in memory is that of the input (so contiguous stays
    contiguous and channels-last stays channels-last); an input that has no canonical axes gives the
    order of its dimensions.
    """
    batch_group, pixel_group = axis_groups(len(shape), time_dim, channel_dim)
    groups = [batch_group, (time_dim,), (channel_dim,), pixel_group]
    order = sorted((0, 1, 2, 3), key=lambda g: groups[g][0] if groups[g] else -1)
    axes = find_axes(shape, strides, time_dim, channel_dim)
    if axes is not None:
        # An axis of size 1 or stride 0 says nothing about the order: it keeps the place of its
        # dimension.
        ranked = [g for g in order if axes[g] > 1 and axes.strides[g] > 0]
        by_stride = iter(sorted(ranked, key=lambda g: axes.strides[g], reverse=True))
        order = [next(by_stride) if g in ranked else g for g in order]
    out_shape = list(shape)
    out_shape[time_dim], out_shape[channel_dim] = n, channels
    out_strides = [0] * len(out_shape)
    step = 1
    for g in reversed(order):
        for axis in reversed(groups[g]):
            out_strides[axis] = step
            step = step * max(out_shape[axis], 1)
    return tuple(out_shape), tuple(out_strides)


_cached_output_layout = functools.lru_cache(maxsize=4096)(find_output_layout)


def output_layout(
    x: Tensor, time_dim: int, channel_dim: int, n: int, channels: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """`find_output_layout` for the input `x`."""
    return _cached_output_layout(x.shape, x.stride(), time_dim, channel_dim, n, channels)


def empty(
    x: Tensor, time_dim: int, channel_dim: int, n: int, channels: int, dtype: torch.dtype
) -> Tensor:
    """An uninitialized output for the input `x`, in the memory order of `x`."""
    shape, strides = output_layout(x, time_dim, channel_dim, n, channels)
    return torch.empty_strided(shape, strides, dtype=dtype, device=x.device)


def fake_empty(
    x: Tensor, time_dim: int, channel_dim: int, n: int, channels: int, dtype: torch.dtype
) -> Tensor:
    """`empty` for fake tensors, whose sizes may be symbols (which no cache can hold)."""
    shape, strides = find_output_layout(x.shape, x.stride(), time_dim, channel_dim, n, channels)
    return x.new_empty_strided(shape, strides, dtype=dtype)


def positive_shape(B: int, n: int, O: int, P: int) -> tuple[int, int, int, int]:
    """Shape of the sign bits of the pre-activation: one bit a pixel, a row of bytes for each (b, t,
    o).
    """
    return B, n, O, (P + 7) // 8
