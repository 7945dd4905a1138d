"""The U-Net of EDM's and FDM's published weights: DDPM++ and NCSN++, in plain PyTorch.

Parameters have the names of the official ``SongUNet``, so its state dicts load as they are. It is
there to sample; dropout, label dropout and the official initialization are left out.

Source: score SDEs (arXiv 2011.13456), appendix H; EDM (arXiv 2206.00364), table 7 and its official
code, whose variants these are.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EPS = 1e-6  # of group normalization
HALF = math.sqrt(0.5)  # keeps the variance of a sum of two branches
_BLOCK = re.compile(r"enc\.(\d+)x\d+_block(\d+)\.conv1\.weight")


@dataclass(frozen=True)
class SongUNetConfig:
    """Everything that determines the parameters and the function of a :class:`SongUNet`.

    Args:
        image_size, image_channels: of the images.
        channels: width of the first level.
        channel_mult: width of each level in multiples of it; each has half the size of the last.
        num_blocks: a level on the way down; one more on the way up.
        attention_resolutions: image sizes with self-attention, beside the middle.
        num_classes: 0 for an unconditional network.
        augment_dim: numbers that describe an augmentation in training; 0 without.
        ncsnpp: NCSN++ instead of DDPM++: random Fourier features of the noise level, the image
            added at every level on the way down, and a wider filter where sizes change.
    """

    image_size: int
    image_channels: int
    channels: int
    channel_mult: tuple[int, ...]
    num_blocks: int
    attention_resolutions: tuple[int, ...]
    num_classes: int = 0
    augment_dim: int = 0
    ncsnpp: bool = False

    @classmethod
    def of(cls, state: Mapping[str, Tensor]) -> SongUNetConfig:
        """The configuration of a state dict, by the names and shapes in it.

        Raises:
            ValueError: there is no such network in it.
        """
        sizes: dict[int, int] = {}
        blocks: dict[int, int] = {}
        for name, tensor in state.items():
            if tensor.ndim and (found := _BLOCK.fullmatch(name)):
                size = int(found[1])
                sizes[size], blocks[size] = len(tensor), blocks.get(size, 0) + 1
        first = state.get(f"enc.{max(sizes, default=0)}x{max(sizes, default=0)}_conv.weight")
        shaped = first is not None and first.ndim == 4 and len(first) >= 4
        if first is None or not shaped or len(set(blocks.values())) != 1:
            raise ValueError(
                "no SongUNet of DDPM++ or NCSN++: it has no enc.<size>x<size>_conv.weight with"
                " as many blocks enc.<size>x<size>_block<n> at every size"
            )
        levels = sorted(sizes, reverse=True)

        def inputs(name: str) -> int:
            return state[name].shape[1] if name in state and state[name].ndim == 2 else 0

        return cls(
            image_size=levels[0],
            image_channels=first.shape[1],
            channels=len(first),
            channel_mult=tuple(sizes[size] // len(first) for size in levels),
            num_blocks=blocks[levels[0]],
            attention_resolutions=tuple(
                size for size in levels if f"enc.{size}x{size}_block0.qkv.weight" in state
            ),
            num_classes=inputs("map_label.weight"),
            augment_dim=inputs("map_augment.weight"),
            ncsnpp="map_noise.freqs" in state,
        )


class SongUNet(nn.Module):
    """The raw network F of a preconditioner, as `dk.diffusion.from_edm` takes it.

    Args:
        config: see :class:`SongUNetConfig`.

    Args of ``forward``:
        x: ``(B, C, H, W)``, any floating dtype.
        noise_labels: c_noise, ``(B,)``.
        class_labels: one-hot ``(B, num_classes)``; None is no class.
        augment_labels: ``(B, augment_dim)``; None is no augmentation.

    Returns of ``forward``:
        F, the shape of x, in the dtype of the weights.
    """

    def __init__(self, config: SongUNetConfig) -> None:
        super().__init__()
        self.config = config
        self.label_dim = config.num_classes
        width = config.channels
        noise, embedding = width * (2 if config.ncsnpp else 1), 4 * width
        self.map_noise = Fourier(noise) if config.ncsnpp else Positional(noise)
        if config.num_classes:
            self.map_label = nn.Linear(config.num_classes, noise)
        if config.augment_dim:
            self.map_augment = nn.Linear(config.augment_dim, noise, bias=False)
        self.map_layer0 = nn.Linear(noise, embedding)
        self.map_layer1 = nn.Linear(embedding, embedding)

        taps = (1, 3, 3, 1) if config.ncsnpp else (1, 1)

        def block(inputs: int, outputs: int, attention: bool = False, resample: str = "") -> Block:
            return Block(inputs, outputs, embedding, attention, resample, taps)

        self.enc = nn.ModuleDict()
        now, skips, image = width, [width], config.image_channels
        for level, mult in enumerate(config.channel_mult):
            size = config.image_size >> level
            name = f"{size}x{size}"
            if level == 0:
                self.enc[f"{name}_conv"] = nn.Conv2d(config.image_channels, now, 3, padding=1)
            else:
                self.enc[f"{name}_down"] = block(now, now, resample="down")
                skips.append(now)
                if config.ncsnpp:
                    self.enc[f"{name}_aux_residual"] = Residual(image, now, taps)
                    image = now
            for i in range(config.num_blocks):
                attention = size in config.attention_resolutions
                self.enc[f"{name}_block{i}"] = block(now, width * mult, attention)
                now = width * mult
                skips.append(now)
        self.dec = nn.ModuleDict()
        last = len(config.channel_mult) - 1
        for level in range(last, -1, -1):
            size, outputs = config.image_size >> level, width * config.channel_mult[level]
            name = f"{size}x{size}"
            if level == last:
                self.dec[f"{name}_in0"] = block(now, now, attention=True)
                self.dec[f"{name}_in1"] = block(now, now)
            else:
                self.dec[f"{name}_up"] = block(now, now, resample="up")
            for i in range(config.num_blocks + 1):
                attention = i == config.num_blocks and size in config.attention_resolutions
                self.dec[f"{name}_block{i}"] = block(now + skips.pop(), outputs, attention)
                now = outputs
        self.dec[f"{name}_aux_norm"] = norm(now)
        self.dec[f"{name}_aux_conv"] = nn.Conv2d(now, config.image_channels, 3, padding=1)

    def forward(
        self,
        x: Tensor,
        noise_labels: Tensor,
        class_labels: Tensor | None = None,
        augment_labels: Tensor | None = None,
    ) -> Tensor:
        """F; see the class."""
        dtype = self.map_layer0.weight.dtype
        x, embedding = x.to(dtype), self.map_noise(noise_labels).to(dtype)
        if self.config.num_classes:
            if class_labels is None:
                class_labels = embedding.new_zeros(len(x), self.config.num_classes)
            scale = math.sqrt(self.config.num_classes)
            embedding = embedding + self.map_label(class_labels.to(embedding) * scale)
        if augment_labels is not None:
            if not self.config.augment_dim:
                raise ValueError("augment_labels were given, but the network has none")
            embedding = embedding + self.map_augment(augment_labels.to(embedding))
        embedding = F.silu(self.map_layer1(F.silu(self.map_layer0(embedding))))
        image, skips = x, list[Tensor]()
        for layer in self.enc.values():
            if isinstance(layer, Residual):
                x = image = HALF * (x + layer(image))
                skips[-1] = x
                continue
            x = layer(x, embedding) if isinstance(layer, Block) else layer(x)
            skips.append(x)
        for layer in self.dec.values():
            if isinstance(layer, Block):
                if layer.inputs != x.shape[1]:
                    x = torch.cat([x, skips.pop()], 1)
                x = layer(x, embedding)
            elif isinstance(layer, nn.GroupNorm):
                x = F.silu(layer(x))
            else:
                x = layer(x)
        return x


class Positional(nn.Module):
    """Sines and cosines of the noise level, at frequencies from 1 to 1e-4."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.count = channels // 2

    def forward(self, level: Tensor) -> Tensor:
        place = torch.arange(self.count, dtype=torch.float32, device=level.device)
        angle = level[:, None] * torch.pow(1e-4, place / (self.count - 1)).to(level.dtype)
        return torch.cat([angle.sin(), angle.cos()], 1)


class Fourier(nn.Module):
    """Sines and cosines of the noise level, at random frequencies that the weights hold."""

    freqs: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("freqs", torch.zeros(channels // 2))

    def forward(self, level: Tensor) -> Tensor:
        angle = level[:, None] * (2.0 * math.pi * self.freqs).to(level.dtype)
        return torch.cat([angle.sin(), angle.cos()], 1)


class Resampling(nn.Conv2d):
    """A convolution of the image at half or twice its size ("" leaves it).

    Args:
        resample: "down", "up" or "".
        taps: of the filter along each axis; their squared sum scales it.
    """

    resample_filter: Tensor

    def __init__(
        self, inputs: int, outputs: int, kernel: int, resample: str, taps: tuple[int, ...]
    ) -> None:
        super().__init__(inputs, outputs, kernel, padding=kernel // 2)
        self.resample, self.reach = resample, (len(taps) - 1) // 2
        if resample:
            line = torch.tensor(taps, dtype=torch.float32)
            square = torch.outer(line, line) / line.sum().square()
            self.register_buffer("resample_filter", square[None, None])

    def forward(self, x: Tensor) -> Tensor:
        if self.resample:
            x = self.resampled(x, self.reach)
        return super().forward(x)

    def resampled(self, x: Tensor, padding: int) -> Tensor:
        """x, filtered and taken at half or twice as many places."""
        channels = x.shape[1]
        weight = self.resample_filter.to(x.dtype).expand(channels, -1, -1, -1)
        if self.resample == "up":
            return F.conv_transpose2d(x, 4.0 * weight, None, 2, padding, groups=channels)
        return F.conv2d(x, weight, None, 2, padding, groups=channels)


class Residual(Resampling):
    """The image on its way down beside the network: convolved first, then halved."""

    def __init__(self, inputs: int, outputs: int, taps: tuple[int, ...]) -> None:
        super().__init__(inputs, outputs, 3, "down", taps)

    def forward(self, x: Tensor) -> Tensor:
        x = self.resampled(F.conv2d(x, self.weight, padding=1 + self.reach), 0)
        assert self.bias is not None
        return x + self.bias[:, None, None]


class Block(nn.Module):
    """A residual block, with self-attention behind it where that is asked for."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        embedding: int,
        attention: bool,
        resample: str,
        taps: tuple[int, ...],
    ) -> None:
        super().__init__()
        self.inputs, self.attention = inputs, attention
        self.norm0 = norm(inputs)
        self.conv0 = Resampling(inputs, outputs, 3, resample, taps)
        self.affine = nn.Linear(embedding, outputs)
        self.norm1 = norm(outputs)
        self.conv1 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.skip: nn.Module | None = None
        if inputs != outputs or resample:
            self.skip = Resampling(inputs, outputs, 1, resample, taps)
        if attention:
            self.norm2 = norm(outputs)
            self.qkv = nn.Conv2d(outputs, 3 * outputs, 1)
            self.proj = nn.Conv2d(outputs, outputs, 1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        h = self.conv0(F.silu(self.norm0(x))) + self.affine(embedding)[:, :, None, None]
        h = self.conv1(F.silu(self.norm1(h)))
        x = HALF * (h + (x if self.skip is None else self.skip(x)))
        if not self.attention:
            return x
        # the three of a channel lie together, channels first
        query, key, value = self.qkv(self.norm2(x)).unflatten(1, (-1, 3)).flatten(3).unbind(2)
        h = F.scaled_dot_product_attention(query.mT, key.mT, value.mT).mT
        return HALF * (x + self.proj(h.reshape(x.shape)))


def norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(min(32, channels // 4), channels, eps=EPS)
