"""Plans and launches of `spectral_conv`: one kernel for few coefficients, three for the rest.

All that follows from shapes, strides, dtypes and options is planned once (`_plan`, which touches no
tensor); a call looks its plan up, allocates, and launches.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dsno_kernels import _layout
from dsno_kernels._layout import Axes
from dsno_kernels._modes import coefficients
from dsno_kernels.backends.triton import configs, kernels_general, kernels_small, launch
from dsno_kernels.backends.triton.configs import Architecture, Config
from dsno_kernels.backends.triton.launch import Launch, Operand
from dsno_kernels.backends.triton.transforms import Irfft, Rfft, plan_irfft, plan_rfft


class Buffer(NamedTuple):
    """A tensor to allocate."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    def empty(self) -> Tensor:
        return torch.empty(self.shape, dtype=self.dtype, device=self.device)


class Spectrum(NamedTuple):
    """The first bins of a tensor as planes `[K, 2, C, rows]`, and the launch that writes them."""

    buffer: Buffer
    rfft: Rfft

    def run(self, x: Tensor, x_positive: Tensor | None) -> Tensor:
        spectrum = self.buffer.empty()
        self.rfft.run(x, x_positive, spectrum)
        return spectrum


class Weight(NamedTuple):
    """How the kernels read the weight: as it is, or from planes that a launch packs first."""

    buffer: Buffer | None
    launch: Launch | None
    arguments: dict[str, Any]

    def run(self, weight: Tensor) -> Tensor:
        if self.buffer is None or self.launch is None:
            return weight
        packed = self.buffer.empty()
        launch.run(self.launch, weight, packed)
        return packed


class Fused(NamedTuple):
    """All in one kernel."""

    weight: Weight
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
        operand = self.weight.run(weight)
        launch.run(self.launch, x, x_positive, operand, bias, residual, y, positive)


class Planar(NamedTuple):
    """A transform, products of channels, a transform back."""

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
        spectrum, operand = self.spectrum.run(x, x_positive), self.weight.run(weight)
        mixed = self.mixed.empty()
        launch.run(self.mix, spectrum, operand, mixed)
        self.irfft.run(mixed, bias, residual, y, positive)


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
    kernels: Fused | Planar
    if kind is None:
        kernels = _plan_planar(*common)
    else:
        kernels = _plan_fused(kind, *common, signs=save_positive)
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


def choose_row(
    table: Architecture,
    kernel: str,
    method: str,
    kind: str,
    rows: int,
    O: int,
    *,
    planes: int = 1,
    signs: bool = False,
) -> tuple[Config, bool]:
    """The row of the table that serves a problem, and whether to pack the weight for it.

    Large tiles, where the table has them, cannot write `signs`. Where large or wide tiles take more
    than one wave, programs read the weight again and again: it is worth a launch to round and pack
    it once. Tiles that all run at once read it as it is, but for those of class "8", whose
    registers are full. This is a model: it is not measured.
    """
    for size in (kind,) if signs else (f"{kind} large", kind):
        if (kernel, method, size) in table.rows:
            config = table.rows[kernel, method, size]
            programs = launch.cdiv(rows, config.tile[0]) * launch.cdiv(O, config.tile[2]) * planes
            if programs > table.multiprocessors:
                return config, True
    return table.rows[kernel, method, f"{kind} narrow".strip()], kind == "8"


def plan_weight(
    device: torch.device,
    weight: Operand,
    adjoint: bool,
    method: str,
    block_i: int,
    block_o: int,
    packed: bool,
) -> Weight:
    """The weight as it is, or packed: input channels contiguous and padded to whole tiles."""
    (first, second, K, _), strides, _ = weight
    I, O = (second, first) if adjoint else (first, second)
    if not packed:
        order = (1, 0, 2, 3) if adjoint else (0, 1, 2, 3)
        in_place = _weight_arguments([strides[axis] for axis in order], False, adjoint)
        return Weight(None, None, in_place)
    padded_in, padded_out = launch.cdiv(I, block_i) * block_i, launch.cdiv(O, block_o) * block_o
    halves = 2 if method.endswith("x3") else 1
    shape = (halves, K, 2, padded_out, padded_in)
    size = 16 if min(padded_in, padded_out) <= 16 else 32
    pack = Launch(
        kernels_small.pack_weight_kernel,
        launch.cdiv(padded_in, size) * launch.cdiv(padded_out, size) * 2 * K,
        configs.PACK_WEIGHT,
        device,
        I=first,
        O=second,
        padded_in=padded_in,
        padded_out=padded_out,
        stride_wi=strides[0],
        stride_wo=strides[1],
        stride_wk=strides[2],
        stride_wc=strides[3],
        K=K,
        ADJOINT=adjoint,
        METHOD=method,
        BLOCK=size,
    )
    plane = padded_in * padded_out
    arguments = _weight_arguments((1, padded_in, 2 * plane, plane), True, adjoint)
    return Weight(Buffer(shape, launch.operand_dtype(method), device), pack, arguments)


def _weight_arguments(strides: Sequence[int], packed: bool, adjoint: bool) -> dict[str, Any]:
    """How kernels find W[i, o, k, part]; packed planes are conjugated and transposed already."""
    named = dict(zip(("stride_wi", "stride_wo", "stride_wk", "stride_wc"), strides, strict=True))
    return {**named, "PACKED": packed, "ADJOINT": adjoint and not packed}


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
    *,
    signs: bool,
) -> Fused:
    I, O, K = axes.C, weight[0][0 if adjoint else 1], weight[0][2]
    pixels = launch.padded_pixels(axes.P)
    rows = axes.B * pixels
    config, packed = choose_row(table, "spectral_conv", method, kind, rows, O, signs=signs)
    block_p, block_i, block_o = launch.blocks((rows, I, O), config)
    read = plan_weight(device, weight, adjoint, method, block_i, block_o, packed)
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
    return Fused(read, kernel)


def _plan_planar(
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
        **read.arguments,
        K=K,
        METHOD=method,
        BLOCK_R=block_r,
        BLOCK_I=block_i,
        BLOCK_O=block_o,
    )
    mixed = Buffer((K, 2, O, rows), spectrum_dtype(method), device)
    mixed_axes = planar_axes(axes.B, K, O, axes.P)
    irfft = plan_irfft(device, table, mixed_axes, O * rows, n, scale_length, epilogue)
    spectrum = plan_spectrum(device, table, axes, K, epilogue["negative_slope"], method)
    return Planar(spectrum, read, mixed, mix, irfft)


def planar_axes(B: int, K: int, C: int, P: int) -> Axes:
    """Axes of planar spectra `[K, 2, C, rows]`; imaginary parts lie C * rows further."""
    pixels = launch.padded_pixels(P)
    rows = B * pixels
    return Axes(B, K, C, P, pixels, 2 * C * rows, rows, 1)


def spectrum_dtype(method: str) -> torch.dtype:
    """Spectra between kernels: products in bfloat16 round their operands anyway."""
    return torch.bfloat16 if method == "bf16" else torch.float32


def plan_spectrum(
    device: torch.device, table: Architecture, axes: Axes, K: int, slope: float, method: str
) -> Spectrum:
    """The first K bins of a tensor as planes."""
    out_axes = planar_axes(axes.B, K, axes.C, axes.P)
    rows = out_axes.stride_c
    rfft = plan_rfft(device, table, axes, out_axes, rows * axes.C, slope)
    return Spectrum(Buffer((K, 2, axes.C, rows), spectrum_dtype(method), device), rfft)
