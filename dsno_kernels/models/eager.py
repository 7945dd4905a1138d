"""The blocks of the official DSNO as it computes them: what the fast ones are compared with.

Same parameters, same state dict, plain PyTorch in the official order: each function of a chain
alone, attention with its matrix of logits in memory, the first image repeated for each time.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsno_kernels.models.blocks import AttentionBlock, ResidualBlock, frames, images
from dsno_kernels.nn import NEGATIVE_SLOPE, NIN


class EagerResidualBlock(ResidualBlock):
    """The official residual block; x ``(B, T, I, H, W)``, embedding ``(B or 1, T, D)``."""

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        B, T = x.shape[:2]
        skip = images(x)
        h, skip = self.resampled(F.silu(self.GroupNorm_0(skip)), skip)
        h = self.Conv_0(h)
        scale, shift = images(self.Dense_0(embedding).expand(B, -1, -1))[..., None, None].chunk(
            2, 1
        )
        h = F.silu(self.GroupNorm_1(h) * (scale + 1.0) + shift)
        h = self.Conv_1(self.Dropout_0(h))
        if self.projects:
            skip = eager_nin(self.NIN_0, skip)
        return frames(skip, T) + frames(h, T)


class EagerAttentionBlock(AttentionBlock):
    """The official self-attention, written out: the logits of all pairs of pixels are stored."""

    def forward(self, x: Tensor) -> Tensor:
        h = eager_nin(self.NINs, self.GroupNorm_0(images(x)))
        N, C, H, W = h.shape
        h = h.reshape(N, self.num_heads, C // self.num_heads, H * W).transpose(-1, -2)
        q, k, v = h.chunk(3, dim=-1)  # each [N, heads, P, d]
        logits = torch.matmul(q, k.transpose(-1, -2)) / math.sqrt(q.shape[-1])
        h = torch.matmul(F.softmax(logits, dim=-1), v)
        h = h.transpose(-1, -2).reshape(N, C // 3, H, W)
        return x + eager_nin(self.NIN_3, h).view(x.shape)


def eager_nin(layer: NIN, x: Tensor) -> Tensor:
    """The official 1x1 convolution: an einsum and a sum."""
    y = torch.einsum("bchw,co->bohw", x, layer.W) + layer.b[:, None, None]
    return y.contiguous() if y.stride(1) == 1 else y


class EagerSpectralConv1d(nn.Module):
    """The official spectral convolution, on ``torch.fft``."""

    def __init__(self, in_channels: int, out_channels: int, modes: int) -> None:
        super().__init__()
        self.modes1 = modes
        scale = 1.0 / (in_channels * out_channels)
        self.weights1 = nn.Parameter(scale * torch.rand(in_channels, out_channels, modes, 2))

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            spectrum = torch.fft.rfftn(x.float(), dim=[1])[:, : self.modes1]
            weight = torch.view_as_complex(self.weights1)
            spectrum = torch.einsum("bkihw,iok->bkohw", spectrum, weight)
            y: Tensor = torch.fft.irfftn(spectrum, s=[x.shape[1]], dim=[1])
        return y


class EagerTimeConv(nn.Module):
    """The temporal layer of DSNO in plain PyTorch; `dsno_kernels.swap_layers` knows it."""

    def __init__(self, in_channels: int, out_channels: int, modes: int) -> None:
        super().__init__()
        self.with_nin = False
        self.t_conv = EagerSpectralConv1d(in_channels, out_channels, modes)
        self.act = nn.LeakyReLU(NEGATIVE_SLOPE)

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.act(self.t_conv(x))
        return x + h
