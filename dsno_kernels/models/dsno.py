r"""DSNO: a U-Net that maps noise to the images at T times of the probability-flow trajectory, in
one evaluation.

The image x and the log-SNR :math:`\lambda_1..\lambda_T` of the times go in; blocks act on the B*T
images, and a temporal layer after each block mixes the times. The cosine schedule is

.. math:: \lambda(t) = -2 \log \tan(a t + b), \quad
    b = \arctan e^{-\lambda_{max}/2}, \quad a = \arctan e^{-\lambda_{min}/2} - b

and time enters as :math:`u = \frac{2}{\pi} \arctan e^{-\lambda/2}`, embedded as sines and cosines
of :math:`1000\, u\, 10^{-4 i / (half - 1)}`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsno_kernels.models.blocks import (
    AttentionBlock,
    ResidualBlock,
    concatenate,
    conv3x3,
    frames,
    group_norm,
    images,
    linear,
    norm_silu,
)
from dsno_kernels.models.config import DSNOConfig
from dsno_kernels.models.eager import EagerAttentionBlock, EagerResidualBlock, EagerTimeConv
from dsno_kernels.nn import TimeConv


def logsnr_schedule(t: Tensor, min: float = -20.0, max: float = 20.0) -> Tensor:
    r"""Log-SNR of the cosine schedule, :math:`-2 \log \tan(a t + b)`.

    Args:
        t: times in [0, 1], any shape; 0 is the data, 1 the noise.
        min, max: log-SNR at t = 1 and at t = 0.

    Returns:
        The shape and dtype of t.

    Source: progressive distillation (arXiv 2202.00512), appendix; the official
    ``get_logsnr_schedule``.

    Example:
        >>> dk.models.logsnr_schedule(torch.tensor([0.0, 0.5])).round()
        tensor([20., -0.])
    """
    b = math.atan(math.exp(-0.5 * max))
    a = math.atan(math.exp(-0.5 * min)) - b
    return -2.0 * torch.log(torch.tan(a * t + b))


class DSNO(nn.Module):
    """The network of DSNO, with the state dict and the results of the official one.

    Args:
        config: its shape; `DSNOConfig.cifar10()` and `.imagenet64()` are the published ones.
        kernels: whether its layers run on this library's kernels; False computes in plain PyTorch
            what the official network computes, for comparison.

    Returns of ``forward``:
        The images at the T times, ``(B, T, 3, H, W)``.

    Raises:
        TypeError: config is not a DSNOConfig. ValueError: inputs that do not fit it.

    Equivalent to: the official ``TDDPMm(config)``, ``load_state_dict(strict=True)`` both ways.

    Source: DSNO (arXiv 2211.13449), section 3 and appendix.

    Example:
        >>> model = dk.models.DSNO(dk.models.DSNOConfig.cifar10()).eval()
        >>> logsnr = dk.models.logsnr_schedule(torch.linspace(0.9, 0.0, 4))
        >>> image = model(torch.randn(1, 3, 32, 32), logsnr)[:, -1].clamp(-1, 1)
    """

    def __init__(self, config: DSNOConfig, kernels: bool = True) -> None:
        super().__init__()
        if not isinstance(config, DSNOConfig):
            raise TypeError(f"config must be a DSNOConfig, got {type(config).__name__}")
        self.config = config
        self.kernels = kernels
        self.all_modules = nn.ModuleList(_modules(config, kernels))

    def forward(self, x: Tensor, logsnr: Tensor, y: Tensor | None = None) -> Tensor:
        """One evaluation.

        Args:
            x: noise, ``(B, C, H, W)``.
            logsnr: log-SNR of the times wanted, ``(T,)``, or ``(B, T)`` for each image its own.
            y: classes, ``(B,)`` integers (-1 is none) or ``(B, num_classes)`` weights (one-hot, or
                a mixture).
        """
        config = self.config
        self._check(x, logsnr, y)
        modules = iter(self.all_modules)
        embedding = F.silu(self._embed(modules, logsnr, y, x.dtype))  # [B or 1, T, D]
        T = logsnr.shape[-1]
        h = next(modules)(x)[:, None]  # [B, 1, C, H, W]: the first block broadcasts it over T
        if not self.kernels:
            h = h.expand(-1, T, -1, -1, -1)
        skips = [h]
        for level, resolution in enumerate(config.resolutions):
            for _ in range(config.num_res_blocks):
                h = self._stage(modules, h, embedding, config.has_attention(resolution))
                skips.append(h)
            if level < config.levels - 1:
                h = next(modules)(h, embedding)
                skips.append(h)
        h = self._stage(modules, h, embedding, attention=True)
        h = next(modules)(h, embedding)
        for level, resolution in reversed(list(enumerate(config.resolutions))):
            for _ in range(config.num_res_blocks + 1):
                h = concatenate(h, skips.pop().expand(-1, T, -1, -1, -1))
                h = self._stage(modules, h, embedding, config.has_attention(resolution))
            if level > 0:
                h = next(modules)(h, embedding)
        norm = next(modules)
        assert isinstance(norm, nn.GroupNorm)
        h = norm_silu(norm, images(h)) if self.kernels else F.silu(norm(images(h)))
        out = frames(next(modules)(h), T)
        return x.unsqueeze(1) - out if config.predict_noise else out

    def _stage(
        self, modules: Iterator[nn.Module], h: Tensor, embedding: Tensor, attention: bool
    ) -> Tensor:
        """Residual block, attention where this resolution has it, temporal layer."""
        h = next(modules)(h, embedding)
        if attention:
            h = next(modules)(h)
        if self.config.time_conv:
            h = next(modules)(h)
        return h

    def _embed(
        self, modules: Iterator[nn.Module], logsnr: Tensor, y: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        """Embedding of log-SNR and class, ``(B, T, D)``, or ``(1, T, D)`` where all images share
        the times and there are no classes.
        """
        config = self.config
        u = _logsnr_input(logsnr.float(), config.logsnr_input)
        embedding: Tensor = next(modules)(_sinusoids(u * 1000.0, config.channels).to(dtype))
        embedding = next(modules)(F.silu(embedding))
        if logsnr.ndim == 1:
            embedding = embedding.unsqueeze(0)
        if y is not None:
            classes = y
            if not y.is_floating_point():  # no class, -1, is a row of zeros
                classes = F.one_hot(y.long() + 1, config.num_classes + 1)[:, 1:]
            embedding = embedding + next(modules)(classes.to(dtype)).unsqueeze(1)
        return embedding

    def _check(self, x: Tensor, logsnr: Tensor, y: Tensor | None) -> None:
        config = self.config
        image = (config.image_channels, config.image_size, config.image_size)
        if x.ndim != 4 or tuple(x.shape[1:]) != image:
            raise ValueError(
                f"x must have shape (B, {', '.join(map(str, image))}), got {tuple(x.shape)}"
            )
        fits = logsnr.ndim == 1 or (logsnr.ndim == 2 and len(logsnr) == len(x))
        if not fits or logsnr.shape[-1] == 0:
            raise ValueError(
                f"logsnr must have shape (T,) or ({len(x)}, T) with T >= 1,"
                f" got {tuple(logsnr.shape)}"
            )
        T = logsnr.shape[-1]
        if config.time_conv and config.modes > T // 2 + 1:
            raise ValueError(
                f"{config.modes} modes need at least {2 * config.modes - 2} times, got {T}"
            )
        if config.num_classes == 0:
            if y is not None:
                raise ValueError("y was given, but this network has no classes (num_classes=0)")
            return
        if y is None:
            raise ValueError(
                f"this network is conditional: pass y, labels in 0..{config.num_classes - 1}"
            )
        expected = (x.shape[0], config.num_classes) if y.is_floating_point() else (x.shape[0],)
        if tuple(y.shape) != expected:
            raise ValueError(
                f"y must have shape {expected} for dtype {y.dtype}, got {tuple(y.shape)}"
            )


def _modules(config: DSNOConfig, kernels: bool) -> Iterator[nn.Module]:
    """The layers in the order of `forward`, which is that of the official state dict."""
    residual_block = ResidualBlock if kernels else EagerResidualBlock
    attention_block = AttentionBlock if kernels else EagerAttentionBlock
    time_conv = TimeConv if kernels else EagerTimeConv

    def residual(in_channels: int, out_channels: int, resample: str | None = None) -> nn.Module:
        options = (config.embedding_dim, config.dropout, config.init_scale, resample)
        return residual_block(in_channels, out_channels, *options)

    def stage(in_channels: int, out_channels: int, attention: bool) -> Iterator[nn.Module]:
        yield residual(in_channels, out_channels)
        if attention:
            heads = config.num_heads if config.head_dim is None else out_channels // config.head_dim
            yield attention_block(out_channels, heads)
        if config.time_conv:
            yield time_conv(out_channels, out_channels, config.modes)

    yield linear(config.channels, config.embedding_dim)
    yield linear(config.embedding_dim, config.embedding_dim)
    if config.num_classes > 0:
        yield nn.Linear(config.num_classes, config.embedding_dim)
    yield conv3x3(config.image_channels, config.channels)
    current = config.channels
    skips = [current]
    for level, resolution in enumerate(config.resolutions):
        width = config.widths[level]
        for _ in range(config.num_res_blocks):
            yield from stage(current, width, config.has_attention(resolution))
            current = width
            skips.append(current)
        if level < config.levels - 1:
            yield residual(current, current, "down")
            skips.append(current)
    yield from stage(current, current, attention=True)
    yield residual(current, current)
    for level, resolution in reversed(list(enumerate(config.resolutions))):
        width = config.widths[level]
        for _ in range(config.num_res_blocks + 1):
            yield from stage(current + skips.pop(), width, config.has_attention(resolution))
            current = width
        if level > 0:
            yield residual(current, current, "up")
    yield group_norm(current, 32)
    yield conv3x3(current, config.image_channels, scale=0.0)


def _logsnr_input(logsnr: Tensor, kind: str) -> Tensor:
    """Log-SNR mapped to [0, 1]."""
    if kind == "sigmoid":
        return torch.sigmoid(logsnr)
    return torch.atan(torch.exp(-0.5 * logsnr.clamp(-20.0, 20.0))) / (0.5 * math.pi)


def _sinusoids(u: Tensor, dim: int) -> Tensor:
    """``(..., T) -> (..., T, dim)``: sines, then cosines, of dim/2 frequencies from 1 to 1e-4."""
    half = dim // 2
    index = torch.arange(half, dtype=u.dtype, device=u.device)
    frequencies = torch.exp(index * (-math.log(10000.0) / (half - 1)))
    angles = u[..., None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=-1)
