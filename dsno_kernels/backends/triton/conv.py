"""Launchers of `spectral_conv`: one kernel for few coefficients, three for the rest."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dsno_kernels import _layout
from dsno_kernels._layout import Axes
from dsno_kernels._modes import coefficients
from dsno_kernels.backends.triton import configs, kernels_general, kernels_small, launch
from dsno_kernels.backends.triton.configs import Architecture, Config
from dsno_kernels.backends.triton.transforms import irfft_into, rfft_into


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
    O = weight.shape[0 if adjoint else 1]
    y = _layout.empty(x, time_dim, channel_dim, n, O, out_dtype or torch.float32)
    x, x_axes = _layout.canonical(x, time_dim, channel_dim)
    y_axes = _layout.canonical(y, time_dim, channel_dim)[1]
    residual_strides = (0, 0, 0, 0)
    if residual is not None:
        residual, residual_axes = _layout.canonical(residual, time_dim, channel_dim)
        residual_strides = residual_axes.strides
    positive = None
    if save_positive:
        shape = _layout.positive_shape(y_axes.B, n, O, y_axes.P)
        positive = torch.empty(shape, dtype=torch.uint8, device=x.device)
    if x_positive is not None:
        x_positive = x_positive.contiguous()
    table = launch.architecture(x.device)
    epilogue = {
        "bias_ptr": bias if bias is None else bias.contiguous(),
        "residual_ptr": residual,
        "y_ptr": y,
        "y_positive_ptr": positive,
        "negative_slope": 1.0 if negative_slope is None else negative_slope,
        "ACTIVATION": negative_slope is not None and x_positive is None,
        **named_strides("r", residual_strides),
        **named_strides("y", y_axes.strides),
    }
    method = launch.method_of(precision, table)
    scale_length = x_axes.T if adjoint else n
    kind = fused_class(table, "spectral_conv", method, x_axes.T, n, weight.shape[2])
    common = x, x_axes, x_positive, weight, adjoint, n, scale_length, method, table, epilogue
    if kind is None:
        _planar(*common)
    else:
        _fused(kind, *common)
    return y, positive


def fused_class(
    table: Architecture, kernel: str, method: str, T: int, n: int, K: int
) -> str | None:
    """The shape class of the fused kernel, or None where the planar kernels have to serve."""
    length, count = max(T, n), max(len(coefficients(T, K)), len(coefficients(n, K)))
    if length > configs.MAX_LENGTH:
        return None
    kind = configs.shape_class(length, count)
    return kind if (kernel, method, kind) in table.rows else None


def named_strides(tensor: str, strides: tuple[int, int, int, int]) -> dict[str, int]:
    """Strides of `[B, T, C, P]` as kernel arguments."""
    return {f"stride_{tensor}{axis}": stride for axis, stride in zip("btcp", strides, strict=True)}


def pack_weight(
    weight: Tensor,
    adjoint: bool,
    method: str,
    padded_in: int,
    padded_out: int,
    I: int,
    O: int,
) -> Tensor:
    """The weight as zero-padded planes of rounded operands, input channels contiguous."""
    K = weight.shape[2]
    halves = 2 if method.endswith("x3") else 1
    shape = (halves, K, 2, padded_out, padded_in)
    packed = torch.empty(shape, dtype=launch.operand_dtype(method), device=weight.device)
    size = 16 if min(padded_in, padded_out) <= 16 else 32
    stride_wi, stride_wo, stride_wk, stride_wc = weight.stride()
    launch.submit(
        kernels_small.pack_weight_kernel,
        launch.cdiv(padded_in, size) * launch.cdiv(padded_out, size) * 2 * K,
        configs.PACK_WEIGHT,
        weight.device,
        weight_ptr=weight,
        packed_ptr=packed,
        I=weight.shape[0],
        O=weight.shape[1],
        padded_in=padded_in,
        padded_out=padded_out,
        stride_wi=stride_wi,
        stride_wo=stride_wo,
        stride_wk=stride_wk,
        stride_wc=stride_wc,
        K=K,
        ADJOINT=adjoint,
        METHOD=method,
        BLOCK=size,
    )
    return packed


def _tiles(
    table: Architecture, kernel: str, method: str, kind: str, rows: int, O: int, planes: int
) -> Config:
    """The wide row of the table, or the narrow one where wide tiles leave the GPU idle."""
    config = table.rows[kernel, method, kind]
    programs = launch.cdiv(rows, config.tile[0]) * launch.cdiv(O, config.tile[2]) * planes
    return (
        config
        if programs >= table.programs
        else table.rows[kernel, method, f"{kind} narrow".strip()]
    )


def _fused(
    kind: str,
    x: Tensor,
    axes: Axes,
    x_positive: Tensor | None,
    weight: Tensor,
    adjoint: bool,
    n: int,
    scale_length: int,
    method: str,
    table: Architecture,
    epilogue: Mapping[str, Any],
) -> None:
    K = weight.shape[2]
    I, O = axes.C, weight.shape[0 if adjoint else 1]
    pixels = launch.padded_pixels(axes.P)
    rows = axes.B * pixels
    config = _tiles(table, "spectral_conv", method, kind, rows, O, 1)
    block_p, block_i, block_o = (
        launch.block(*pair) for pair in zip((rows, I, O), config.tile, strict=True)
    )
    padded_in, padded_out = launch.cdiv(I, block_i) * block_i, launch.cdiv(O, block_o) * block_o
    launch.submit(
        kernels_small.spectral_conv_kernel,
        launch.cdiv(rows, block_p) * launch.cdiv(O, block_o),
        config,
        x.device,
        x_ptr=x,
        x_positive_ptr=x_positive,
        packed_ptr=pack_weight(weight, adjoint, method, padded_in, padded_out, I, O),
        B=axes.B,
        I=I,
        O=O,
        P=axes.P,
        padded_pixels=pixels,
        padded_in=padded_in,
        padded_out=padded_out,
        **named_strides("x", axes.strides),
        T=axes.T,
        N=n,
        K=K,
        SCALE_LENGTH=scale_length,
        METHOD=method,
        BLOCK_P=block_p,
        BLOCK_I=block_i,
        BLOCK_O=block_o,
        **epilogue,
    )


def _planar(
    x: Tensor,
    axes: Axes,
    x_positive: Tensor | None,
    weight: Tensor,
    adjoint: bool,
    n: int,
    scale_length: int,
    method: str,
    table: Architecture,
    epilogue: Mapping[str, Any],
) -> None:
    K = weight.shape[2]
    I, O = axes.C, weight.shape[0 if adjoint else 1]
    pixels = launch.padded_pixels(axes.P)
    rows = axes.B * pixels
    slope = epilogue["negative_slope"]
    spectrum = planar_spectrum(x, axes, K, x_positive, slope, method, table)
    mixed = torch.empty((K, 2, O, rows), dtype=torch.float32, device=x.device)
    config = _tiles(table, "spectral_conv_mix", method, "", rows, O, K)
    block_r, block_i, block_o = (
        launch.block(*pair) for pair in zip((rows, I, O), config.tile, strict=True)
    )
    padded_in, padded_out = launch.cdiv(I, block_i) * block_i, launch.cdiv(O, block_o) * block_o
    launch.submit(
        kernels_general.spectral_conv_mix_kernel,
        launch.cdiv(rows, block_r) * launch.cdiv(O, block_o) * K,
        config,
        x.device,
        z_ptr=spectrum,
        packed_ptr=pack_weight(weight, adjoint, method, padded_in, padded_out, I, O),
        y_ptr=mixed,
        I=I,
        O=O,
        rows=rows,
        padded_in=padded_in,
        padded_out=padded_out,
        K=K,
        METHOD=method,
        BLOCK_R=block_r,
        BLOCK_I=block_i,
        BLOCK_O=block_o,
    )
    spectrum_axes = planar_axes(axes.B, K, O, axes.P)
    irfft_into(mixed, spectrum_axes, spectrum_axes.stride_c * O, n, scale_length, table, epilogue)


def planar_axes(B: int, K: int, C: int, P: int) -> Axes:
    """Axes of planar spectra `[K, 2, C, rows]`; imaginary parts lie C * rows further."""
    pixels = launch.padded_pixels(P)
    rows = B * pixels
    return Axes(B, K, C, P, pixels, 2 * C * rows, rows, 1)


def planar_spectrum(
    x: Tensor,
    axes: Axes,
    K: int,
    x_positive: Tensor | None,
    slope: float,
    method: str,
    table: Architecture,
) -> Tensor:
    """The first K bins of x as planes `[K, 2, C, rows]`, rounded for bfloat16 products."""
    out_axes = planar_axes(axes.B, K, axes.C, axes.P)
    dtype = torch.bfloat16 if method == "bf16" else torch.float32
    spectrum = torch.empty((K, 2, axes.C, out_axes.stride_c), dtype=dtype, device=x.device)
    rfft_into(x, axes, spectrum, out_axes, out_axes.stride_c * axes.C, table, x_positive, slope)
    return spectrum
