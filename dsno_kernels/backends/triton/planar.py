"""Plans and launches of `spectral_conv` for many coefficients: a transform, products, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dsno_kernels._layout import Axes
from dsno_kernels.backends.triton import kernels_general, launch
from dsno_kernels.backends.triton.configs import Architecture
from dsno_kernels.backends.triton.launch import Buffer, Launch, Operand
from dsno_kernels.backends.triton.transforms import Irfft, Rfft, plan_irfft, plan_rfft
from dsno_kernels.backends.triton.weights import Packing, Weight, choose_row, plan_weight


class Spectrum(NamedTuple):
    """The first bins of a tensor as planes, and the launch that writes them."""

    buffer: Buffer
    rfft: Rfft

    def run(
        self,
        x: Tensor,
        x_positive: Tensor | None,
        weight: Tensor | None = None,
        packed: Tensor | None = None,
    ) -> Tensor:
        spectrum = self.buffer.empty()
        self.rfft.run(x, x_positive, spectrum, weight, packed)
        return spectrum


class Planar(NamedTuple):
    """A transform, beside which the weight is packed, products of channels, a transform back."""

    spectrum: Spectrum
    weight: Weight
    mixed: Buffer
    mix: Launch
    irfft: Irfft

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
        if packed is None:
            spectrum = self.spectrum.run(x, x_positive)
        else:
            spectrum = self.spectrum.run(x, x_positive, weight, packed)
        mixed = self.mixed.empty()
        launch.run(self.mix, spectrum, weight if packed is None else packed, mixed)
        self.irfft.run(mixed, bias, residual, y, positive)


def plan_planar(
    device: torch.device,
    table: Architecture,
    axes: Axes,
    weight: Operand,
    adjoint: bool,
    n: int,
    scale_length: int,
    method: str,
    epilogue: Mapping[str, Any],
) -> Planar:
    """The three launches of a convolution."""
    I, O, K = axes.C, weight[0][0 if adjoint else 1], weight[0][2]
    rows = axes.B * launch.padded_pixels(axes.P)
    config, packed = choose_row(table, "spectral_conv_mix", method, "", rows, O, planes=K)
    block_r, block_i, block_o = launch.blocks((rows, I, O), config)
    read = plan_weight(device, weight, adjoint, method, block_i, block_o, packed)
    mix = Launch(
        kernels_general.spectral_conv_mix_kernel,
        launch.cdiv(rows, block_r) * launch.cdiv(O, block_o) * K,
        config,
        device,
        I=I,
        O=O,
        rows=rows,
        T=axes.T,
        N=n,
        **read.arguments,
        K=K,
        METHOD=method,
        REAL_BINS=table.real_bins,
        BLOCK_R=block_r,
        BLOCK_I=block_i,
        BLOCK_O=block_o,
    )
    mixed, mixed_axes = _planes(device, axes.B, K, O, axes.P, method)
    irfft = plan_irfft(device, table, mixed_axes, O * rows, n, scale_length, epilogue)
    slope = epilogue["negative_slope"]
    spectrum = plan_spectrum(device, table, axes, K, slope, method, read.packing)
    return Planar(spectrum, read, mixed, mix, irfft)


def plan_spectrum(
    device: torch.device,
    table: Architecture,
    axes: Axes,
    K: int,
    slope: float,
    method: str,
    packing: Packing | None = None,
) -> Spectrum:
    """The first K bins of a tensor as planes; packs a weight besides."""
    buffer, planes = _planes(device, axes.B, K, axes.C, axes.P, method)
    part = planes.stride_c * axes.C
    return Spectrum(buffer, plan_rfft(device, table, axes, planes, part, slope, packing=packing))


def _planes(
    device: torch.device, B: int, K: int, C: int, P: int, method: str
) -> tuple[Buffer, Axes]:
    """Planar spectra `[K, 1 or 2, C, rows]`, and the axes of their real parts.

    What products round anyway is stored in half the bytes: bfloat16, or both parts of a bin in one
    int32 (`arithmetic.pack_complex`).
    """
    pixels = launch.padded_pixels(P)
    rows = B * pixels
    dtype = {"bf16": torch.bfloat16, "tf32": torch.int32}.get(method, torch.float32)
    parts = 1 if dtype == torch.int32 else 2
    axes = Axes(B, K, C, P, pixels, parts * C * rows, rows, 1)
    return Buffer((K, parts, C, rows), dtype, device), axes
