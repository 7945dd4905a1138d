"""Plans and launches of `spectral_conv`: one kernel for few coefficients, three for the rest.

All that follows from shapes, strides, dtypes and options is planned once (`_plan`, which touches no
tensor); a call looks its plan up, allocates, and launches.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dsno_kernels import _layout
from dsno_kernels._layout import Axes
from dsno_kernels._modes import coefficients
from dsno_kernels.backends.triton import configs, kernels_small, launch
from dsno_kernels.backends.triton.configs import Architecture
from dsno_kernels.backends.triton.launch import Buffer, Launch, Operand
from dsno_kernels.backends.triton.planar import Planar, plan_planar
from dsno_kernels.backends.triton.weights import Weight, choose_row, plan_weight


class Fused(NamedTuple):
    """All in one kernel, behind the launch that packs the weight if that pays."""

    weight: Weight
    pack: Launch | None
    launch: Launch

    def run(
        self,
        x: Tensor,
        x_positive: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        residual: Tensor | None,
        y: Tensor,
        positive: Tensor | None,
    ) -> None:
        packed = self.weight.buffer()
        if packed is not None and self.pack is not None:
            launch.run(self.pack, weight, packed)
            weight = packed
        launch.run(self.launch, x, x_positive, weight, bias, residual, y, positive)


class Plan(NamedTuple):
    """What a call allocates, what it copies first, and what it launches."""

    y_shape: tuple[int, ...]
    y_strides: tuple[int, ...]
    positive: Buffer | None
    copy_x: bool
    copy_residual: bool
    kernels: Fused | Planar


def spectral_conv(
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
    out_dtype: torch.dtype | None = None,
    save_positive: bool = False,
    x_positive: Tensor | None = None,
    precision: str = "fp32",
) -> tuple[Tensor, Tensor | None]:
    """See `backends.reference.spectral_conv`."""
    device, out_dtype = x.device, out_dtype or torch.float32
    plan = _plan(
        launch.architecture(device),
        device,
        launch.operand(x),
        launch.operand(weight),
        launch.operand(residual),
        bias if bias is None else bias.dtype,
        time_dim,
        channel_dim,
        n,
        adjoint,
        negative_slope,
        out_dtype,
        save_positive,
        x_positive is not None,
        precision,
    )
    if plan.copy_x:
        x = _layout.canonical(x, time_dim, channel_dim)[0]
    if plan.copy_residual and residual is not None:
        residual = _layout.canonical(residual, time_dim, channel_dim)[0]
    y = torch.empty_strided(plan.y_shape, plan.y_strides, dtype=out_dtype, device=device)
    positive = None if plan.positive is None else plan.positive.empty()
    plan.kernels.run(
        x,
        x_positive if x_positive is None else x_positive.contiguous(),
        weight,
        bias if bias is None else bias.contiguous(),
        residual,
        y,
        positive,
    )
    return y, positive


@functools.lru_cache(maxsize=launch.PLANS)
def _plan(
    table: Architecture,
    device: torch.device,
    x: Operand,
    weight: Operand,
    residual: Operand | None,
    bias: torch.dtype | None,
    time_dim: int,
    channel_dim: int,
    n: int,
    adjoint: bool,
    negative_slope: float | None,
    out_dtype: torch.dtype,
    save_positive: bool,
    masked: bool,
    precision: str,
) -> Plan:
    """The plan of a call; dtypes that only kernels see are keys."""
    axes, copy_x = launch.axes_of(x, time_dim, channel_dim)
    O, K = weight[0][0 if adjoint else 1], weight[0][2]
    y_shape, y_strides = _layout.find_output_layout(*x[:2], time_dim, channel_dim, n, O)
    y_axes, _ = launch.axes_of((y_shape, y_strides, out_dtype), time_dim, channel_dim)
    residual_axes, copy_residual = None, False
    if residual is not None:
        residual_axes, copy_residual = launch.axes_of(residual, time_dim, channel_dim)
    positive = None
    if save_positive:
        shape = _layout.positive_shape(y_axes.B, n, O, y_axes.P)
        positive = Buffer(shape, torch.uint8, device)
    epilogue = {
        "negative_slope": 1.0 if negative_slope is None else float(negative_slope),
        "ACTIVATION": negative_slope is not None and not masked,
        **launch.named_strides("r", residual_axes),
        **launch.named_strides("y", y_axes),
    }
    method = launch.method_of(precision, table)
    scale_length = axes.T if adjoint else n
    kind = fused_class(table, "spectral_conv", method, axes.T, n, K)
    common = device, table, axes, weight, adjoint, n, scale_length, method, epilogue
    kernels = plan_planar(*common) if kind is None else _plan_fused(kind, *common)
    return Plan(y_shape, y_strides, positive, copy_x, copy_residual, kernels)


def fused_class(
    table: Architecture, kernel: str, method: str, T: int, n: int, K: int
) -> str | None:
    """The shape class of the fused kernel, or None where the planar kernels have to serve."""
    length, count = max(T, n), max(len(coefficients(T, K)), len(coefficients(n, K)))
    if length > configs.MAX_LENGTH:
        return None
    kind = configs.shape_class(length, count)
    return kind if (kernel, method, kind) in table.rows else None


def _plan_fused(
    kind: str,
    device: torch.device,
    table: Architecture,
    axes: Axes,
    weight: Operand,
    adjoint: bool,
    n: int,
    scale_length: int,
    method: str,
    epilogue: Mapping[str, Any],
) -> Fused:
    I, O, K = axes.C, weight[0][0 if adjoint else 1], weight[0][2]
    pixels = launch.padded_pixels(axes.P)
    rows = axes.B * pixels
    config, packed = choose_row(table, "spectral_conv", method, kind, rows, O)
    block_p, block_i, block_o = launch.blocks((rows, I, O), config)
    read = plan_weight(device, weight, adjoint, method, block_i, block_o, packed)
    packing, pack = read.packing, None
    if packing is not None:
        pack = Launch(
            kernels_small.pack_weight_kernel,
            packing.programs,
            configs.PACK_WEIGHT,
            device,
            **packing.arguments,
            K=K,
        )
    kernel = Launch(
        kernels_small.spectral_conv_kernel,
        launch.cdiv(rows, block_p) * launch.cdiv(O, block_o),
        config,
        device,
        B=axes.B,
        I=I,
        O=O,
        P=axes.P,
        padded_pixels=pixels,
        pixel_groups=pixels // 8,
        **launch.named_strides("x", axes),
        **read.arguments,
        **epilogue,
        T=axes.T,
        N=n,
        K=K,
        SCALE_LENGTH=scale_length,
        METHOD=method,
        BLOCK_P=block_p,
        BLOCK_I=block_i,
        BLOCK_O=block_o,
    )
    return Fused(read, pack, kernel)
