"""The two thin transforms, alone and as steps of `spectral_conv`."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dsno_kernels import _layout
from dsno_kernels._layout import Axes
from dsno_kernels.backends.triton import kernels_general, launch, weights
from dsno_kernels.backends.triton.configs import Architecture
from dsno_kernels.backends.triton.launch import Launch
from dsno_kernels.backends.triton.weights import Packing

# Beyond this length k * t no longer fits 32 bits.
_LONGEST_NARROW = 46340


class Rfft(NamedTuple):
    """A planned launch of `truncated_rfft_kernel` and its table of one turn."""

    launch: Launch
    twiddles: Tensor

    def run(
        self,
        x: Tensor,
        x_positive: Tensor | None,
        spectrum: Tensor,
        weight: Tensor | None = None,
        packed: Tensor | None = None,
    ) -> None:
        launch.run(self.launch, x, x_positive, weight, self.twiddles, spectrum, packed)


class Irfft(NamedTuple):
    """A planned launch of `truncated_irfft_kernel` and its table of one turn."""

    launch: Launch
    twiddles: Tensor

    def run(
        self,
        spectrum: Tensor,
        bias: Tensor | None,
        residual: Tensor | None,
        y: Tensor,
        y_positive: Tensor | None,
    ) -> None:
        launch.run(self.launch, spectrum, self.twiddles, bias, residual, y, y_positive)


def truncated_rfft(x: Tensor, modes: int, *, dim: int) -> Tensor:
    """See `backends.reference.truncated_rfft`."""
    shape = [*x.shape, 2]
    shape[dim] = modes
    out = torch.empty(shape, dtype=torch.float32, device=x.device)
    # With a channel axis of size 1 beside it, the transformed axis is the time axis of the
    # canonical four.
    x, axes = _layout.canonical(x.unsqueeze(dim + 1), dim, dim + 1)
    out_axes = _layout.canonical(out[..., 0].unsqueeze(dim + 1), dim, dim + 1)[1]
    plan = _plan_rfft_alone(launch.architecture(x.device), x.device, x.dtype, axes, out_axes)
    plan.run(x, None, out)
    return out


@functools.lru_cache(maxsize=launch.PLANS)
def _plan_rfft_alone(
    table: Architecture, device: torch.device, dtype: torch.dtype, axes: Axes, out_axes: Axes
) -> Rfft:
    """The plan of a call; the dtype, which only the kernel sees, is a key."""
    return plan_rfft(device, table, axes, out_axes, 1, 1.0, padded=False)


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
    plan = _plan_irfft_alone(
        launch.architecture(out.device),
        out.device,
        spectrum.dtype,
        axes,
        spectrum.stride(-1),
        out_axes,
    )
    plan.run(spectrum, None, None, out, None)
    return out


@functools.lru_cache(maxsize=launch.PLANS)
def _plan_irfft_alone(
    table: Architecture,
    device: torch.device,
    dtype: torch.dtype,
    axes: Axes,
    stride_part: int,
    out_axes: Axes,
) -> Irfft:
    """The plan of a call; the dtype, which only the kernel sees, is a key."""
    epilogue = {
        "negative_slope": 1.0,
        "ACTIVATION": False,
        **launch.named_strides("r", None),
        **launch.named_strides("y", out_axes),
    }
    n = out_axes.T
    return plan_irfft(device, table, axes, stride_part, n, n, epilogue)


def plan_rfft(
    device: torch.device,
    table: Architecture,
    axes: Axes,
    spectrum_axes: Axes,
    stride_part: int,
    slope: float,
    padded: bool = True,
    packing: Packing | None = None,
) -> Rfft:
    """The first bins of x, written to a spectrum whose axes are those of its real parts.

    With `packing`, further programs of the launch pack a weight.
    """
    K = spectrum_axes.T
    pixels = launch.padded_pixels(axes.P)
    if padded:  # the padding is written too: of one pixel, the stride counts
        spectrum_axes = spectrum_axes._replace(P=pixels)
    rows = axes.B * pixels
    config = table.rows["truncated_rfft", table.transform_method, ""]
    block_r, block_m, block_t = launch.blocks((rows * axes.C, 2 * K, axes.T), config)
    planned = Launch(
        kernels_general.truncated_rfft_kernel,
        launch.cdiv(rows * axes.C, block_r) * launch.cdiv(2 * K, block_m)
        + (0 if packing is None else packing.programs),
        config,
        device,
        B=axes.B,
        C=axes.C,
        P=axes.P,
        rows=rows,
        padded_pixels=pixels,
        pixel_groups=pixels // 8,
        T=axes.T,
        K=K,
        negative_slope=slope,
        **launch.named_strides("x", axes),
        **_spectrum_arguments(spectrum_axes, stride_part),
        **(weights.NOTHING if packing is None else packing.arguments),
        METHOD=table.transform_method,
        WIDE=axes.T > _LONGEST_NARROW,
        PADDED=padded,
        BLOCK_R=block_r,
        BLOCK_M=block_m,
        BLOCK_T=block_t,
    )
    return Rfft(planned, launch.twiddles(axes.T, device))


def plan_irfft(
    device: torch.device,
    table: Architecture,
    axes: Axes,
    stride_part: int,
    n: int,
    scale_length: int,
    epilogue: Mapping[str, Any],
) -> Irfft:
    """The inverse of a spectrum whose axes are those of its real parts."""
    pixels = launch.padded_pixels(axes.P)
    rows = axes.B * pixels
    config = table.rows["truncated_irfft", table.transform_method, ""]
    block_r, block_t, block_m = launch.blocks((rows * axes.C, n, 2 * axes.T), config)
    planned = Launch(
        kernels_general.truncated_irfft_kernel,
        launch.cdiv(rows * axes.C, block_r) * launch.cdiv(n, block_t),
        config,
        device,
        B=axes.B,
        C=axes.C,
        P=axes.P,
        rows=rows,
        padded_pixels=pixels,
        pixel_groups=pixels // 8,
        N=n,
        K=axes.T,
        scale_length=scale_length,
        **_spectrum_arguments(axes, stride_part),
        METHOD=table.transform_method,
        WIDE=n > _LONGEST_NARROW,
        BLOCK_R=block_r,
        BLOCK_T=block_t,
        BLOCK_M=block_m,
        **epilogue,
    )
    return Irfft(planned, launch.twiddles(n, device))


def _spectrum_arguments(axes: Axes, stride_part: int) -> dict[str, Any]:
    """Strides of a spectrum's real parts, by bin instead of time, and the way to the imaginary."""
    strides = launch.named_strides("s", axes)
    regular = axes.T == 1 or axes.stride_t == 2 * stride_part
    return {
        "stride_sk": strides.pop("stride_st"),
        **strides,
        "stride_part": stride_part,
        "REGULAR": regular,
    }
