"""Launchers of `spectral_conv_weight_grad`: partial sums over pixels, added in order."""

from __future__ import annotations

import torch
from torch import Tensor

from dsno_kernels import _layout
from dsno_kernels.backends.triton import configs, kernels_weight_grad, launch
from dsno_kernels.backends.triton.configs import Architecture
from dsno_kernels.backends.triton.conv import (
    fused_class,
    named_strides,
    planar_spectrum,
)

# The least number of steps worth a program of its own.
_STEPS = 4


def spectral_conv_weight_grad(
    x: Tensor,
    grad_output: Tensor,
    modes: int,
    *,
    time_dim: int,
    channel_dim: int,
    grad_positive: Tensor | None = None,
    negative_slope: float | None = None,
    precision: str = "fp32",
) -> Tensor:
    """See `backends.reference.spectral_conv_weight_grad`."""
    K = modes
    x, x_axes = _layout.canonical(x, time_dim, channel_dim)
    grad_output, g_axes = _layout.canonical(grad_output, time_dim, channel_dim)
    if grad_positive is not None:
        grad_positive = grad_positive.contiguous()
    slope = 1.0 if negative_slope is None else negative_slope
    table = launch.architecture(x.device)
    method = launch.method_of(precision, table)
    T, n, I, O = x_axes.T, g_axes.T, x_axes.C, g_axes.C
    pixels = launch.padded_pixels(x_axes.P)
    rows = x_axes.B * pixels
    name = "spectral_conv_weight_grad"
    kind = fused_class(table, name, method, T, n, K)
    if kind is None:
        name = "spectral_conv_weight_grad_planes"
    config = table.rows[name, method, kind or ""]
    block_i, block_o, block_r = (
        launch.block(*pair) for pair in zip((I, O, rows), config.tile, strict=True)
    )
    tiles = launch.cdiv(I, block_i) * launch.cdiv(O, block_o) * (K if kind is None else 1)
    per_split, splits = split_rows(rows, block_r, tiles, table)
    partial = torch.empty((splits, K, 2, I, O), dtype=torch.float32, device=x.device)
    common = {
        "partial_ptr": partial,
        "I": I,
        "O": O,
        "rows": rows,
        "rows_per_split": per_split,
        "K": K,
        "METHOD": method,
        "BLOCK_I": block_i,
        "BLOCK_O": block_o,
        "BLOCK_R": block_r,
    }
    if kind is not None:
        launch.submit(
            kernels_weight_grad.spectral_conv_weight_grad_kernel,
            tiles * splits,
            config,
            x.device,
            x_ptr=x,
            grad_ptr=grad_output,
            grad_positive_ptr=grad_positive,
            B=x_axes.B,
            P=x_axes.P,
            padded_pixels=pixels,
            negative_slope=slope,
            T=T,
            N=n,
            **named_strides("x", x_axes.strides),
            **named_strides("g", g_axes.strides),
            **common,
        )
    else:
        launch.submit(
            kernels_weight_grad.spectral_conv_weight_grad_planes_kernel,
            tiles * splits,
            config,
            x.device,
            z_ptr=planar_spectrum(x, x_axes, K, None, slope, method, table),
            g_ptr=planar_spectrum(grad_output, g_axes, K, grad_positive, slope, method, table),
            **common,
        )
    grad_weight = torch.empty((I, O, K, 2), dtype=torch.float32, device=x.device)
    size = launch.block(I * O, configs.REDUCE.tile[0])
    launch.submit(
        kernels_weight_grad.spectral_conv_weight_grad_reduce_kernel,
        launch.cdiv(I * O, size) * 2 * K,
        configs.REDUCE,
        x.device,
        partial_ptr=partial,
        grad_weight_ptr=grad_weight,
        size=I * O,
        splits=splits,
        T=T,
        N=n,
        K=K,
        BLOCK=size,
    )
    return grad_weight


def split_rows(rows: int, block_r: int, tiles: int, table: Architecture) -> tuple[int, int]:
    """Rows a program sums, in whole steps, and how many programs share all rows."""
    steps = launch.cdiv(rows, block_r)
    splits = max(1, min(launch.cdiv(table.programs, tiles), steps // _STEPS))
    per_split = launch.cdiv(steps, splits) * block_r
    return per_split, launch.cdiv(rows, per_split)
