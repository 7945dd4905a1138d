"""The shape of a DSNO network, and the two published ones."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class DSNOConfig:
    """Everything that determines the parameters and the function of a :class:`DSNO`.

    Args:
        image_size: height and width of the image, divisible by ``2**(levels - 1)``.
        image_channels: 3 for RGB.
        channels: width of the first level ("nf"); a multiple of 32, even.
        channel_mult: width of each level, as a multiple of `channels`; one level an entry, each
            half the resolution of the one before.
        num_res_blocks: residual blocks a level on the way down; one more on the way up.
        attention_resolutions: the image sizes at which self-attention follows each residual block.
        num_heads: attention heads; unused where `head_dim` is given.
        head_dim: channels a head.
        embedding_dim: width of the embedding of log-SNR and class.
        dropout: share in [0, 1), before the second convolution of each residual block.
        num_classes: 0 for an unconditional network.
        time_conv: whether a temporal layer follows each block; without it every time is computed
            alone.
        modes: Fourier modes kept along time.
        logsnr_min, logsnr_max: ends of the cosine log-SNR schedule.
        logsnr_input: how log-SNR enters the embedding, "inv_cos" or "sigmoid".
        predict_noise: return ``x - network`` (the official ``pred_eps``).
        init_scale: of the last convolution of each residual block; 0 means 1e-10.

    Raises:
        ValueError: a combination that makes no network.

    Source: DSNO (arXiv 2211.13449), appendix; the official configuration files.

    Example:
        >>> dk.models.DSNOConfig.cifar10().channel_mult
        (1, 1, 1)
    """

    image_size: int
    channels: int
    channel_mult: tuple[int, ...]
    num_res_blocks: int
    attention_resolutions: tuple[int, ...]
    embedding_dim: int
    num_heads: int = 1
    head_dim: int | None = None
    dropout: float = 0.0
    num_classes: int = 0
    image_channels: int = 3
    time_conv: bool = True
    modes: int = 2
    logsnr_min: float = -20.0
    logsnr_max: float = 20.0
    logsnr_input: str = "inv_cos"
    predict_noise: bool = False
    init_scale: float = 0.0

    def __post_init__(self) -> None:
        sizes = ("image_size", "channels", "num_res_blocks", "embedding_dim", "image_channels")
        for name in (*sizes, "num_heads", "modes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.channel_mult or min(self.channel_mult) < 1:
            raise ValueError(
                f"channel_mult must hold multiples of at least 1, got {self.channel_mult}"
            )
        if self.image_size % 2 ** (self.levels - 1):
            raise ValueError(
                f"image_size {self.image_size} cannot be halved {self.levels - 1} times"
            )
        if self.channels % 32:
            raise ValueError(
                f"channels must be a multiple of 32 (group normalization), got {self.channels}"
            )
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")
        if self.logsnr_input not in ("inv_cos", "sigmoid"):
            raise ValueError(
                f"unknown logsnr_input {self.logsnr_input!r}; accepted: 'inv_cos', 'sigmoid'"
            )
        for level, width in enumerate(self.widths):
            attended = self.has_attention(self.resolutions[level]) or level == self.levels - 1
            if attended and width % (self.head_dim or self.num_heads):
                raise ValueError(f"{width} channels do not split into {self.describe_heads()}")

    @property
    def levels(self) -> int:
        return len(self.channel_mult)

    @property
    def resolutions(self) -> tuple[int, ...]:
        """Image size of each level."""
        return tuple(self.image_size // 2**level for level in range(self.levels))

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each level."""
        return tuple(self.channels * mult for mult in self.channel_mult)

    def has_attention(self, resolution: int) -> bool:
        return resolution in self.attention_resolutions

    def describe_heads(self) -> str:
        if self.head_dim is None:
            return f"{self.num_heads} heads"
        return f"heads of {self.head_dim} channels"

    @classmethod
    def cifar10(cls) -> DSNOConfig:
        """The published network for CIFAR-10: 22 temporal layers, T = 4."""
        return cls(
            image_size=32,
            channels=256,
            channel_mult=(1, 1, 1),
            num_res_blocks=3,
            attention_resolutions=(8, 16),
            embedding_dim=1024,
            num_heads=1,
            dropout=0.2,
        )

    @classmethod
    def imagenet64(cls) -> DSNOConfig:
        """The published class-conditional network for ImageNet-64: 29 temporal layers, T = 4."""
        return cls(
            image_size=64,
            channels=192,
            channel_mult=(1, 2, 3, 4),
            num_res_blocks=3,
            attention_resolutions=(8, 16, 32),
            embedding_dim=768,
            head_dim=64,
            dropout=0.1,
            num_classes=1000,
        )
