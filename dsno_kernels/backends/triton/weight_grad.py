"""Plans and launches of `spectral_conv_weight_grad`: partial sums over pixels, added in order."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from dsno_kernels import _layout
from dsno_kernels.backends.triton import configs, kernels_weight_grad, launch
from dsno_kernels.backends.triton.configs import Architecture
from dsno_kernels.backends.triton.conv import fused_class
from dsno_kernels.backends.triton.launch import Buffer, Launch, Operand
from dsno_kernels.backends.triton.planar import Spectrum, plan_spectrum

# The least number of steps worth a program of its own.
_STEPS = 4


class Plan(NamedTuple):
    """What a call copies first, what it allocates, and what it launches.

    The partial sums are those of x and the gradient themselves or, with `spectra`, of their planes.
    """

    copy_x: bool
    copy_grad: bool
    spectra: tuple[Spectrum, Spectrum] | None
    partial: Buffer
    sums: Launch
    grad_weight: Buffer
    reduce: Launch


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
    plan = _plan(
        launch.architecture(x.device),
        x.device,
        launch.operand(x),
        launch.operand(grad_output),
        modes,
        time_dim,
        channel_dim,
        grad_positive is not None,
        negative_slope,
        precision,
    )
    if plan.copy_x:
        x = _layout.canonical(x, time_dim, channel_dim)[0]
    if plan.copy_grad:
        grad_output = _layout.canonical(grad_output, time_dim, channel_dim)[0]
    if grad_positive is not None:
        grad_positive = grad_positive.contiguous()
    partial, grad_weight = plan.partial.empty(), plan.grad_weight.empty()
    if plan.spectra is None:
        launch.run(plan.sums, x, grad_output, grad_positive, partial)
    else:
        z, g = plan.spectra
        launch.run(plan.sums, z.run(x, None), g.run(grad_output, grad_positive), partial)
    launch.run(plan.reduce, partial, grad_weight)
    return grad_weight


@functools.lru_cache(maxsize=launch.PLANS)
def _plan(
    table: Architecture,
    device: torch.device,
    x: Operand,
    grad_output: Operand,
    modes: int,
    time_dim: int,
    channel_dim: int,
    masked: bool,
    negative_slope: float | None,
    precision: str,
) -> Plan:
    """The plan of a call; what only kernels see is a key too."""
    x_axes, copy_x = launch.axes_of(x, time_dim, channel_dim)
    g_axes, copy_grad = launch.axes_of(grad_output, time_dim, channel_dim)
    slope = 1.0 if negative_slope is None else float(negative_slope)
    method = launch.method_of(precision, table)
    T, n, K, I, O = x_axes.T, g_axes.T, modes, x_axes.C, g_axes.C
    pixels = launch.padded_pixels(x_axes.P)
    rows = x_axes.B * pixels
    name = "spectral_conv_weight_grad"
    kind = fused_class(table, name, method, T, n, K)
    if kind is None:
        name = "spectral_conv_weight_grad_planes"
    config = table.rows[name, method, kind or ""]
    block_i, block_o, block_r = launch.blocks((I, O, rows), config)
    tiles = launch.cdiv(I, block_i) * launch.cdiv(O, block_o) * (K if kind is None else 1)
    per_split, splits = split_rows(rows, block_r, tiles, table.multiprocessors)
    common = {
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
    spectra = None
    if kind is not None:
        sums = Launch(
            kernels_weight_grad.spectral_conv_weight_grad_kernel,
            tiles * splits,
            config,
            device,
            B=x_axes.B,
            P=x_axes.P,
            padded_pixels=pixels,
            pixel_groups=pixels // 8,
            negative_slope=slope,
            T=T,
            N=n,
            **launch.named_strides("x", x_axes),
            **launch.named_strides("g", g_axes),
            **common,
        )
    else:
        spectra = (
            plan_spectrum(device, table, x_axes, K, slope, method),
            plan_spectrum(device, table, g_axes, K, slope, method),
        )
        sums = Launch(
            kernels_weight_grad.spectral_conv_weight_grad_planes_kernel,
            tiles * splits,
            config,
            device,
            T=T,
            N=n,
            REAL_BINS=table.real_bins,
            **common,
        )
    size = launch.block(I * O, configs.REDUCE.tile[0])
    reduce = Launch(
        kernels_weight_grad.spectral_conv_weight_grad_reduce_kernel,
        launch.cdiv(I * O, size) * 2 * K,
        configs.REDUCE,
        device,
        size=I * O,
        splits=splits,
        T=T,
        N=n,
        K=K,
        BLOCK=size,
    )
    partial = Buffer((splits, K, 2, I, O), torch.float32, device)
    grad_weight = Buffer((I, O, K, 2), torch.float32, device)
    return Plan(copy_x, copy_grad, spectra, partial, sums, grad_weight, reduce)


def split_rows(rows: int, block_r: int, tiles: int, multiprocessors: int) -> tuple[int, int]:
    """Rows a program sums, in whole steps, and how many programs share all rows.

    A multiprocessor runs one program at a time, whose tile fills its registers, so programs run in
    waves. The fewest splits win, up to two waves, for which the steps of all waves together are
    fewest. This is a model: it is not measured.
    """
    steps = launch.cdiv(rows, block_r)
    most = max(1, min(launch.cdiv(2 * multiprocessors, tiles), steps // _STEPS))

    def steps_in_turn(splits: int) -> int:
        return launch.cdiv(tiles * splits, multiprocessors) * launch.cdiv(steps, splits)

    per_split = launch.cdiv(steps, min(range(1, most + 1), key=steps_in_turn)) * block_r
    return per_split, launch.cdiv(rows, per_split)
