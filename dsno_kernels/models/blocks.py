r"""The blocks of DSNO's U-Net, on ``(B, T, C, H, W)``; all but the temporal layer see B*T images.

With silu the SiLU, s and b the scale and shift that the embedding gives each channel, and R the
resampling by 2 (mean of 2x2 pixels, nearest neighbor, or none), a residual block is

.. math::
    h = \mathrm{conv}(R(\mathrm{silu}(\mathrm{norm}(x)))), \quad
    y = R(x) + \mathrm{conv}(\mathrm{silu}(\mathrm{norm}(h) \cdot (s + 1) + b))

and an attention block y = x + proj(softmax(q k / sqrt(d)) v) over the pixels of one image.

Between the layers there are views only: every layer keeps the memory order of its input (contiguous
or channels last), and attention, which wants rows of channels, has its normalization write them.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsno_kernels.functional.group_norm_silu import group_norm_silu
from dsno_kernels.nn import NIN, variance_scaling_

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


def norm_silu(norm: nn.GroupNorm, x: Tensor, **options: Any) -> Tensor:
    """The module `norm` and what follows it, in one pass; see `dsno_kernels.group_norm_silu`.

    Under autocast the result has autocast's dtype: it goes to a convolution that would round it.
    """
    kind = x.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        options["out_dtype"] = torch.get_autocast_dtype(kind)
    return group_norm_silu(x, norm.num_groups, norm.weight, norm.bias, eps=norm.eps, **options)


def concatenate(h: Tensor, skip: Tensor) -> Tensor:
    """Two ``(B, T, C, H, W)`` along their channels, in the memory order of h."""
    if h.stride(2) != 1:
        return torch.cat([h, skip], dim=2)
    # torch.cat writes the order of the dimensions: give it channels last as its last.
    return torch.cat([h.movedim(2, -1), skip.movedim(2, -1)], dim=-1).movedim(-1, 2)


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
        skip = images(x)
        h, skip = self.resampled(norm_silu(self.GroupNorm_0, skip), skip)
        h = frames(self.Conv_0(h), x.shape[1])
        scale, shift = self.Dense_0(embedding).chunk(2, dim=2)  # each [B or 1, T, C]
        h = norm_silu(self.GroupNorm_1, h, scale=scale, shift=shift, channel_dim=2)
        h = frames(self.Conv_1(self.Dropout_0(images(h))), h.shape[1])
        if self.projects:
            skip = self.NIN_0(skip)
        return frames(skip, x.shape[1]) + h

    def resampled(self, h: Tensor, skip: Tensor) -> tuple[Tensor, Tensor]:
        """Both branches at the resolution of the output."""
        if self.resample == "up":
            return F.interpolate(h, scale_factor=2), F.interpolate(skip, scale_factor=2)
        if self.resample == "down":
            return F.avg_pool2d(h, 2), F.avg_pool2d(skip, 2)
        return h, skip


class AttentionBlock(nn.Module):
    """Self-attention over the pixels of each image."""

    def __init__(self, channels: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.NINs = NIN(channels, 3 * channels)
        self.NIN_3 = NIN(channels, channels, scale=0.0)
        self.GroupNorm_0 = group_norm(channels, 32)

    def forward(self, x: Tensor) -> Tensor:
        h = norm_silu(self.GroupNorm_0, images(x), activation=None, channels_last=True)
        h = self.NINs(h)
        # Channels are ordered (head, one of q k v, channel d); attention takes rows of channels,
        # and channels last has them.
        N, C, H, W = h.shape
        h = h.flatten(2).transpose(1, 2).unflatten(2, (self.num_heads, 3, -1))
        q, k, v = (rows.transpose(1, 2) for rows in h.unbind(3))  # each [N, heads, P, d]
        h = F.scaled_dot_product_attention(q, k, v)
        h = h.transpose(1, 2).reshape(N, H, W, C // 3).permute(0, 3, 1, 2)
        return x + self.NIN_3(h).view(x.shape)
