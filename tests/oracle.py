"""The formula, transcribed as literally as it can be written: float64 torch.fft, autograd's own
derivatives.

It shares no code with the package, so that a mistake in the reference backend shows as well.
"""

from __future__ import annotations

import torch
from torch import Tensor


def spectral_conv(
    x: Tensor, weight: Tensor, time_dim: int = 1, channel_dim: int = 2, n: int | None = None
) -> Tensor:
    """irfft(rfft(x)[:K] @ W, n) in float64, without epilogue."""
    x, weight = x.double(), weight.double()
    modes = weight.shape[2]
    moved = x.movedim((time_dim, channel_dim), (0, 1))  # [T, I, ...]
    spectrum = torch.fft.rfft(moved, dim=0)[:modes]
    mixed = torch.einsum(
        "ki...,iok->ko...", spectrum, torch.complex(weight[..., 0], weight[..., 1])
    )
    h = torch.fft.irfft(mixed, n=x.shape[time_dim] if n is None else n, dim=0)
    return h.movedim((0, 1), (time_dim, channel_dim))


def official_layer(x: Tensor, weights1: Tensor) -> Tensor:
    """The temporal layer of DSNO as published: x is (B, T, C, H, W), all in the dtype of x."""
    spectrum = torch.fft.rfftn(x, dim=[1])
    mixed = torch.einsum(
        "bmihw,iom->bmohw", spectrum[:, : weights1.shape[2]], torch.view_as_complex(weights1)
    )
    return torch.fft.irfftn(mixed, s=[x.shape[1]], dim=[1])
