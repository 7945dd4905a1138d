"""Plans and launches of `group_norm_silu` and its backward."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dsno_kernels import _layout
from dsno_kernels._layout import Axes
from dsno_kernels.backends.reference_norm import channels_last_strides
from dsno_kernels.backends.triton import group_norm_kernels, launch
from dsno_kernels.backends.triton.configs import Config
from dsno_kernels.backends.triton.launch import Launch, Operand

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

    def config(self, silu: bool, stride_p: int) -> Config:
        """16 elements a thread, 8 beside running sums. Without SiLU, and where pixels are no
        neighbors in memory, the largest tiles have 32: the compiler then keeps more alive than the
        registers of 32 warps hold.
        """
        warps = self.channels * self.pixels // (512 if self.whole else 256)
        most = 32 if silu and stride_p == 1 else 16
        return Config((self.channels, self.pixels, 1), min(most, max(1, warps)), 1)

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


class Plan(NamedTuple):
    """What a call copies first, what it allocates, and what it launches."""

    copy_x: bool
    y_strides: tuple[int, ...]
    statistics: tuple[int, ...]
    launch: Launch


class BackwardPlan(NamedTuple):
    """The same of a backward call: the kernel of dx, and that of the parameters' gradients."""

    copy_x: bool
    copy_grad: bool
    grad_x_strides: tuple[int, ...]
    sums: tuple[int, ...]
    launch: Launch
    parameters: Launch


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
    device, out_dtype = x.device, out_dtype or x.dtype
    plan = plan_forward(
        device,
        launch.operand(x),
        groups,
        (weight.dtype, bias.dtype),
        launch.operand(scale),
        launch.operand(shift),
        eps,
        silu,
        channels_last,
        out_dtype,
    )
    if plan.copy_x:
        x = _layout.canonical(x, *_AXES)[0]
    y = torch.empty_strided(x.shape, plan.y_strides, dtype=out_dtype, device=device)
    mean, rstd = torch.empty(plan.statistics, dtype=torch.float32, device=device).unbind()
    launch.run(plan.launch, x, weight.contiguous(), bias.contiguous(), scale, shift, y, mean, rstd)
    return y, mean, rstd


@functools.lru_cache(maxsize=launch.PLANS)
def plan_forward(
    device: torch.device,
    x: Operand,
    groups: int,
    parameters: tuple[torch.dtype, torch.dtype],
    scale: Operand | None,
    shift: Operand | None,
    eps: float,
    silu: bool,
    channels_last: bool,
    out_dtype: torch.dtype,
) -> Plan:
    """The plan of a call; dtypes that only the kernel sees are keys."""
    axes, copy_x = launch.axes_of(x, *_AXES)
    y_strides = channels_last_strides(x[0]) if channels_last else _strides_like(x, axes)
    tile = tile_of(axes.C // groups, axes.P)
    y_axes = launch.axes_of((x[0], y_strides, out_dtype), *_AXES)[0]
    planned = Launch(
        group_norm_kernels.group_norm_silu_kernel,
        axes.B * axes.T * groups,
        tile.config(silu, axes.stride_p),
        device,
        **_sizes(axes, groups),
        eps=eps,
        **launch.named_strides("x", axes),
        **launch.named_strides("y", y_axes),
        **_modulation_strides(scale, shift),
        SILU=silu,
        WIDE=_is_wide(groups, axes, y_axes),
        **tile.constants,
    )
    return Plan(copy_x, y_strides, (2, axes.B, axes.T, groups), planned)


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
    device = x.device
    plan = plan_backward(
        device,
        launch.operand(grad),
        launch.operand(x),
        mean.shape[2],
        (weight.dtype, bias.dtype),
        launch.operand(scale),
        launch.operand(shift),
        silu,
    )
    if plan.copy_x:
        x = _layout.canonical(x, *_AXES)[0]
    if plan.copy_grad:
        grad = _layout.canonical(grad, *_AXES)[0]
    weight, bias = weight.contiguous(), bias.contiguous()
    grad_x = torch.empty_strided(x.shape, plan.grad_x_strides, dtype=x.dtype, device=device)
    sums = torch.empty(plan.sums, dtype=torch.float32, device=device)
    launch.run(
        plan.launch,
        grad,
        x,
        mean.contiguous(),
        rstd.contiguous(),
        weight,
        bias,
        scale,
        shift,
        grad_x,
        sums,
    )
    grad_weight, grad_bias = torch.empty_like(weight), torch.empty_like(bias)
    grad_scale, grad_shift = (
        None if t is None else torch.empty(x.shape[:3], dtype=t.dtype, device=device)
        for t in (scale, shift)
    )
    launch.run(
        plan.parameters,
        sums,
        weight,
        bias,
        scale,
        grad_weight,
        grad_bias,
        grad_scale,
        grad_shift,
    )
    return grad_x, grad_weight, grad_bias, grad_scale, grad_shift


@functools.lru_cache(maxsize=launch.PLANS)
def plan_backward(
    device: torch.device,
    grad: Operand,
    x: Operand,
    groups: int,
    parameters: tuple[torch.dtype, torch.dtype],
    scale: Operand | None,
    shift: Operand | None,
    silu: bool,
) -> BackwardPlan:
    """The plan of a backward call; dtypes that only the kernels see are keys."""
    axes, copy_x = launch.axes_of(x, *_AXES)
    grad_axes, copy_grad = launch.axes_of(grad, *_AXES)
    grad_x_strides = _strides_like(x, axes)
    samples = axes.B * axes.T
    tile = tile_of(axes.C // groups, axes.P)
    modulation = _modulation_strides(scale, shift)
    grad_x_axes = launch.axes_of((x[0], grad_x_strides, x[2]), *_AXES)[0]
    planned = Launch(
        group_norm_kernels.group_norm_silu_backward_kernel,
        samples * groups,
        tile.config(silu, axes.stride_p),
        device,
        samples=samples,
        **_sizes(axes, groups),
        **launch.named_strides("g", grad_axes),
        **launch.named_strides("x", axes),
        **launch.named_strides("y", grad_x_axes),
        **modulation,
        SILU=silu,
        WIDE=_is_wide(groups, axes, grad_axes, grad_x_axes),
        **tile.constants,
    )
    of_parameters = Launch(
        group_norm_kernels.group_norm_silu_parameters_kernel,
        launch.cdiv(axes.C, _PARAMETERS.tile[1]),
        _PARAMETERS,
        device,
        samples=samples,
        T=axes.T,
        C=axes.C,
        **{name: modulation[name] for name in ("stride_sb", "stride_st", "stride_sc")},
        BLOCK_N=_PARAMETERS.tile[0],
        BLOCK_C=_PARAMETERS.tile[1],
    )
    sums = (2, samples, axes.C)
    return BackwardPlan(copy_x, copy_grad, grad_x_strides, sums, planned, of_parameters)


def _strides_like(x: Operand, axes: Axes) -> tuple[int, ...]:
    """Strides of a dense tensor in the shape and memory order of x."""
    return _layout.find_output_layout(x[0], x[1], *_AXES, axes.T, axes.C)[1]


def _sizes(axes: Axes, groups: int) -> dict[str, int]:
    return {"T": axes.T, "C": axes.C, "P": axes.P, "groups": groups}


def _is_wide(groups: int, *tensors: Axes) -> bool:
    """Whether an offset inside a group of one of the tensors needs more than 32 bits."""
    return any(
        (axes.C // groups - 1) * axes.stride_c + (axes.P - 1) * axes.stride_p >= 2**31
        for axes in tensors
    )


def _modulation_strides(scale: Operand | None, shift: Operand | None) -> dict[str, int]:
    """Strides of scale and shift `[B, T, C]`."""
    return {
        f"stride_{name}{axis}": 0 if values is None else values[1][place]
        for name, values in (("s", scale), ("h", shift))
        for place, axis in enumerate("btc")
    }
