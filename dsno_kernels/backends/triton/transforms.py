"""Launchers of the two thin transforms, alone and as steps of `spectral_conv`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dsno_kernels import _layout
from dsno_kernels._layout import Axes
from dsno_kernels.backends.triton import kernels_general, launch
from dsno_kernels.backends.triton.configs import Architecture

# Beyond this length k * t no longer fits 32 bits.
_LONGEST_NARROW = 46340


def truncated_rfft(x: Tensor, modes: int, *, dim: int) -> Tensor:
    """See `backends.reference.truncated_rfft`."""
    shape = [*x.shape, 2]
    shape[dim] = modes
    out = torch.empty(shape, dtype=torch.float32, device=x.device)
    # With a channel axis of size 1 beside it, the transformed axis is the time axis of the
    # canonical four.
    x, axes = _layout.canonical(x.unsqueeze(dim + 1), dim, dim + 1)
    out_axes = _layout.canonical(out[..., 0].unsqueeze(dim + 1), dim, dim + 1)[1]
    rfft_into(x, axes, out, out_axes, 1, launch.architecture(x.device), None, 1.0, padded=False)
    return out


def truncated_irfft(spectrum: Tensor, n: int, *, dim: int) -> Tensor:
    """See `backends.reference.truncated_irfft`."""
    real = spectrum[..., 0].unsqueeze(dim + 1)
    axes = _layout.find_axes(real.shape, real.stride(), dim, dim + 1)
    if axes is None:
        spectrum = spectrum.contiguous()
        axes = _layout.canonical(spectrum[..., 0].unsqueeze(dim + 1), dim, dim + 1)[1]
    shape = list(spectrum.shape[:-1])
    shape[dim] = n
    out = torch.empty(shape, dtype=torch.float32, device=spectrum.device)
    out_axes = _layout.canonical(out.unsqueeze(dim + 1), dim, dim + 1)[1]
    plain = {
        "bias_ptr": None,
        "residual_ptr": None,
        "y_ptr": out,
        "y_positive_ptr": None,
        "negative_slope": 1.0,
        "ACTIVATION": False,
        **{f"stride_r{axis}": 0 for axis in "btcp"},
        **{
            f"stride_y{axis}": stride for axis, stride in zip("btcp", out_axes.strides, strict=True)
        },
    }
    irfft_into(
        spectrum, axes, spectrum.stride(-1), n, n, launch.architecture(spectrum.device), plain
    )
    return out


def rfft_into(
    x: Tensor,
    axes: Axes,
    spectrum: Tensor,
    spectrum_axes: Axes,
    stride_part: int,
    table: Architecture,
    x_positive: Tensor | None,
    slope: float,
    padded: bool = True,
) -> None:
    """Write the first bins of x to `spectrum`, whose axes are those of its real parts."""
    K = spectrum_axes.T
    pixels = launch.padded_pixels(axes.P)
    rows = axes.B * pixels
    config = table.rows["truncated_rfft", table.transform_method, ""]
    sizes = rows * axes.C, 2 * K, axes.T
    block_r, block_m, block_t = (
        launch.block(*pair) for pair in zip(sizes, config.tile, strict=True)
    )
    launch.submit(
        kernels_general.truncated_rfft_kernel,
        launch.cdiv(rows * axes.C, block_r) * launch.cdiv(2 * K, block_m),
        config,
        x.device,
        x_ptr=x,
        x_positive_ptr=x_positive,
        table_ptr=launch.twiddles(axes.T, x.device),
        spectrum_ptr=spectrum,
        B=axes.B,
        C=axes.C,
        P=axes.P,
        rows=rows,
        padded_pixels=pixels,
        T=axes.T,
        K=K,
        negative_slope=slope,
        stride_xb=axes.stride_b,
        stride_xt=axes.stride_t,
        stride_xc=axes.stride_c,
        stride_xp=axes.stride_p,
        stride_sb=spectrum_axes.stride_b,
        stride_sk=spectrum_axes.stride_t,
        stride_sc=spectrum_axes.stride_c,
        stride_sp=spectrum_axes.stride_p,
        stride_part=stride_part,
        METHOD=table.transform_method,
        WIDE=axes.T > _LONGEST_NARROW,
        PADDED=padded,
        BLOCK_R=block_r,
        BLOCK_M=block_m,
        BLOCK_T=block_t,
    )


def irfft_into(
    spectrum: Tensor,
    axes: Axes,
    stride_part: int,
    n: int,
    scale_length: int,
    table: Architecture,
    epilogue: Mapping[str, Any],
) -> None:
    """Write the inverse of `spectrum`, whose axes are those of its real parts."""
    pixels = launch.padded_pixels(axes.P)
    rows = axes.B * pixels
    config = table.rows["truncated_irfft", table.transform_method, ""]
    sizes = rows * axes.C, n, 2 * axes.T
    block_r, block_t, block_m = (
        launch.block(*pair) for pair in zip(sizes, config.tile, strict=True)
    )
    launch.submit(
        kernels_general.truncated_irfft_kernel,
        launch.cdiv(rows * axes.C, block_r) * launch.cdiv(n, block_t),
        config,
        spectrum.device,
        spectrum_ptr=spectrum,
        table_ptr=launch.twiddles(n, spectrum.device),
        B=axes.B,
        C=axes.C,
        P=axes.P,
        rows=rows,
        padded_pixels=pixels,
        N=n,
        K=axes.T,
        scale_length=scale_length,
        stride_sb=axes.stride_b,
        stride_sk=axes.stride_t,
        stride_sc=axes.stride_c,
        stride_sp=axes.stride_p,
        stride_part=stride_part,
        METHOD=table.transform_method,
        WIDE=n > _LONGEST_NARROW,
        BLOCK_R=block_r,
        BLOCK_T=block_t,
        BLOCK_M=block_m,
        **epilogue,
    )
