"""Launchers of `group_norm_silu` and its backward."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from dsno_kernels import _layout
from dsno_kernels._layout import Axes
from dsno_kernels.backends.reference_norm import channels_last_strides
from dsno_kernels.backends.triton import group_norm_kernels, launch
from dsno_kernels.backends.triton.configs import Config

# Elements of the largest tile that one program holds on chip, and of the tile in which larger
# groups are walked: as large as compiles without spills (tests/test_group_norm_triton.py); not
# timed.
WHOLE, TILE = 16384, 2048
MOST_CHANNELS = 64  # of a tile in which a group is walked
_PARAMETERS = Config((32, 16, 1), 4, 1)  # rows and channels of a step
_AXES = 1, 2  # time and channels: x is [B, T, C, *pixels]


class Tile(NamedTuple):
    """How one program sees a group: at once, or in tiles of channels and pixels."""

    whole: bool
    channels: int
    pixels: int

    @property
    def config(self) -> Config:
        """16 elements a thread (up to 32 in the largest tiles), 8 beside running sums."""
        warps = min(16, max(1, self.channels * self.pixels // (512 if self.whole else 256)))
        return Config((self.channels, self.pixels, 1), warps, 1)

    @property
    def constants(self) -> dict[str, Any]:
        return {"WHOLE": self.whole, "BLOCK_C": self.channels, "BLOCK_P": self.pixels}


def tile_of(channels: int, pixels: int) -> Tile:
    """The tile for groups of some channels and pixels."""
    c, p = (1 << (size - 1).bit_length() for size in (channels, pixels))
    if c * p <= WHOLE:
        return Tile(True, c, p)
    c = min(c, MOST_CHANNELS)
    return Tile(False, c, min(p, TILE // c))


def group_norm_silu(
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
) -> tuple[Tensor, Tensor, Tensor]:
    """See `backends.reference_norm.group_norm_silu`."""
    x, axes = _layout.canonical(x, *_AXES)
    if channels_last:
        strides = channels_last_strides(x.shape)
        y = torch.empty_strided(x.shape, strides, dtype=out_dtype or x.dtype, device=x.device)
    else:
        y = _layout.empty(x, *_AXES, axes.T, axes.C, out_dtype or x.dtype)
    mean, rstd = torch.empty(
        (2, axes.B, axes.T, groups), dtype=torch.float32, device=x.device
    ).unbind()
    tile = tile_of(axes.C // groups, axes.P)
    launch.submit(
        group_norm_kernels.group_norm_silu_kernel,
        axes.B * axes.T * groups,
        tile.config,
        x.device,
        x_ptr=x,
        weight_ptr=weight.contiguous(),
        bias_ptr=bias.contiguous(),
        scale_ptr=scale,
        shift_ptr=shift,
        y_ptr=y,
        mean_ptr=mean,
        rstd_ptr=rstd,
        **_sizes(axes, groups),
        eps=eps,
        **_strides("x", axes),
        **_strides("y", _layout.canonical(y, *_AXES)[1]),
        **_modulation_strides(scale, shift),
        SILU=silu,
        **tile.constants,
    )
    return y, mean, rstd


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
    """See `backends.reference_norm.group_norm_silu_backward`."""
    x, axes = _layout.canonical(x, *_AXES)
    grad, grad_axes = _layout.canonical(grad, *_AXES)
    weight, bias = weight.contiguous(), bias.contiguous()
    groups, samples = mean.shape[2], axes.B * axes.T
    grad_x = _layout.empty(x, *_AXES, axes.T, axes.C, x.dtype)
    sums = torch.empty((2, samples, axes.C), dtype=torch.float32, device=x.device)
    tile = tile_of(axes.C // groups, axes.P)
    modulation = _modulation_strides(scale, shift)
    launch.submit(
        group_norm_kernels.group_norm_silu_backward_kernel,
        samples * groups,
        tile.config,
        x.device,
        grad_ptr=grad,
        x_ptr=x,
        mean_ptr=mean.contiguous(),
        rstd_ptr=rstd.contiguous(),
        weight_ptr=weight,
        bias_ptr=bias,
        scale_ptr=scale,
        shift_ptr=shift,
        grad_x_ptr=grad_x,
        sums_ptr=sums,
        samples=samples,
        **_sizes(axes, groups),
        **_strides("g", grad_axes),
        **_strides("x", axes),
        **_strides("y", _layout.canonical(grad_x, *_AXES)[1]),
        **modulation,
        SILU=silu,
        **tile.constants,
    )
    grad_weight, grad_bias = torch.empty_like(weight), torch.empty_like(bias)
    grad_scale, grad_shift = (
        None if t is None else torch.empty(x.shape[:3], dtype=t.dtype, device=x.device)
        for t in (scale, shift)
    )
    launch.submit(
        group_norm_kernels.group_norm_silu_parameters_kernel,
        launch.cdiv(axes.C, _PARAMETERS.tile[1]),
        _PARAMETERS,
        x.device,
        sums_ptr=sums,
        weight_ptr=weight,
        bias_ptr=bias,
        scale_ptr=scale,
        grad_weight_ptr=grad_weight,
        grad_bias_ptr=grad_bias,
        grad_scale_ptr=grad_scale,
        grad_shift_ptr=grad_shift,
        samples=samples,
        T=axes.T,
        C=axes.C,
        **{name: modulation[name] for name in ("stride_sb", "stride_st", "stride_sc")},
        BLOCK_N=_PARAMETERS.tile[0],
        BLOCK_C=_PARAMETERS.tile[1],
    )
    return grad_x, grad_weight, grad_bias, grad_scale, grad_shift


def _sizes(axes: Axes, groups: int) -> dict[str, int]:
    return {"T": axes.T, "C": axes.C, "P": axes.P, "groups": groups}


def _strides(tensor: str, axes: Axes) -> dict[str, int]:
    """Strides as kernel arguments; 0 for an axis of one element, whose stride says nothing but
    would cost the compiler what it knows of alignment.
    """
    return {
        f"stride_{tensor}{name}": stride if size > 1 else 0
        for name, size, stride in zip("btcp", axes[:4], axes.strides, strict=True)
    }


def _modulation_strides(scale: Tensor | None, shift: Tensor | None) -> dict[str, int]:
    """Strides of scale and shift `[B, T, C]`."""
    return {
        f"stride_{name}{axis}": 0 if values is None else values.stride(place)
        for name, values in (("s", scale), ("h", shift))
        for place, axis in enumerate("btc")
    }
