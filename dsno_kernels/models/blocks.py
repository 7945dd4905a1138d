r"""The blocks of DSNO's U-Net, on ``(B, T, C, H, W)``; all but the temporal layer see B*T images.

With silu the SiLU, s and b the scale and shift that the embedding gives each channel, and R the
resampling by 2 (mean of 2x2 pixels, nearest neighbor, or none), a residual block is

.. math::
    h = \mathrm{conv}(R(\mathrm{silu}(\mathrm{norm}(x)))), \quad
    y = R(x) + \mathrm{conv}(\mathrm{silu}(\mathrm{norm}(h) \cdot (s + 1) + b))

and an attention block y = x + proj(softmax(q k / sqrt(d)) v) over the pixels of one image.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsno_kernels.nn import NEGATIVE_SLOPE, NIN, variance_scaling_

NORM_EPS = 1e-6


def linear(in_features: int, out_features: int) -> nn.Linear:
    """A linear layer with DDPM's initialization."""
    layer = nn.Linear(in_features, out_features)
    variance_scaling_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def conv3x3(in_channels: int, out_channels: int, scale: float = 1.0) -> nn.Conv2d:
    """A 3x3 convolution with DDPM's initialization."""
    layer = nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1)
    variance_scaling_(layer.weight, scale)
    assert layer.bias is not None
    nn.init.zeros_(layer.bias)
    return layer


def group_norm(channels: int, groups: int) -> nn.GroupNorm:
    return nn.GroupNorm(groups, channels, eps=NORM_EPS)


def images(x: Tensor) -> Tensor:
    """``(B, T, C, H, W)`` as B*T images, without a copy where the layout allows."""
    return x.flatten(0, 1)


def frames(x: Tensor, T: int) -> Tensor:
    """B*T images as ``(B, T, C, H, W)``, without a copy."""
    return x.view(-1, T, *x.shape[1:])


class ResidualBlock(nn.Module):
    """Two convolutions, modulated by the embedding, and a sum; `resample` is "down", "up" or None.

    Args of ``forward``: x ``(B, T, I, H, W)``, or ``(B, 1, I, H, W)`` for the same image at all
    times (then all that does not depend on time is computed once); embedding ``(B or 1, T, D)``,
    after its SiLU.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        embedding_dim: int,
        dropout: float,
        init_scale: float = 0.0,
        resample: str | None = None,
    ) -> None:
        super().__init__()
        self.resample = resample
        self.GroupNorm_0 = group_norm(in_channels, min(in_channels // 4, 32))
        self.Conv_0 = conv3x3(in_channels, out_channels)
        self.Dense_0 = linear(embedding_dim, 2 * out_channels)
        self.GroupNorm_1 = group_norm(out_channels, min(out_channels // 4, 32))
        self.Dropout_0 = nn.Dropout(dropout)
        self.Conv_1 = conv3x3(out_channels, out_channels, init_scale)
        if in_channels != out_channels:
            self.NIN_0 = NIN(in_channels, out_channels)
        self.projects = in_channels != out_channels

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        T = x.shape[1]
        skip = images(x)
        h = F.silu(self.GroupNorm_0(skip))
        if self.resample == "up":
            h, skip = (F.interpolate(a, scale_factor=2, mode="nearest") for a in (h, skip))
        elif self.resample == "down":
            h, skip = F.avg_pool2d(h, 2), F.avg_pool2d(skip, 2)
        h = frames(self.GroupNorm_1(self.Conv_0(h)), T)
        scale, shift = self.Dense_0(embedding)[..., None, None].chunk(2, dim=2)
        h = F.silu(h * (scale + 1.0) + shift)
        h = frames(self.Conv_1(self.Dropout_0(images(h))), h.shape[1])
        if self.projects:
            skip = self.NIN_0(skip)
        return frames(skip, T) + h


class AttentionBlock(nn.Module):
    """Self-attention over the pixels of each image."""

    def __init__(self, channels: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.NINs = NIN(channels, 3 * channels)
        self.NIN_3 = NIN(channels, channels, scale=0.0)
        self.GroupNorm_0 = group_norm(channels, 32)

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.NINs(self.GroupNorm_0(images(x)))
        # Channels are ordered (head, one of q k v, channel d); attention wants rows of channels.
        N, C, H, W = h.shape
        h = h.reshape(N, self.num_heads, 3, C // (3 * self.num_heads), H * W)
        q, k, v = h.transpose(-1, -2).contiguous().unbind(2)  # each [N, heads, P, d]
        h = F.scaled_dot_product_attention(q, k, v)
        h = self.NIN_3(h.transpose(-1, -2).reshape(-1, *x.shape[2:]))
        return x + h.view(x.shape)


class EagerSpectralConv1d(nn.Module):
    """The official spectral convolution, on ``torch.fft``: what the kernels are compared with."""

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
