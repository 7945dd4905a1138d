"""The shapes that are measured, the work and traffic each needs, and the speed-ups aimed at.

Letters: B batch, T time points, K kept modes, I and O channels, P pixels, N = B * P signals of a
channel. Of K modes `R = n_real + 4 n_complex` real I x O products reach y (bin 0 and Nyquist are
real). So forward takes `2 N I O R` flop and reads x and W and writes y; backward takes twice that,
reads x, dy and W and writes dx and dW.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

from benchmarks import targets

PASSES = ("forward", "forward_backward")


@dataclass(frozen=True)
class Shape:
    """One spectral convolution with I = O: the size of x, its time and channel axes, and K."""

    name: str
    title: str
    size: tuple[int, ...]
    modes: int
    time_dim: int = 1
    channel_dim: int = 2
    # Speed-up over the eager layer that this library aims at, for each (precision, pass).
    targets: dict[tuple[str, str], float] = field(default_factory=dict, compare=False)
    # Whether every peer is measured, or the eager layer and this library only.
    all_peers: bool = True
    # Whether peers that torch.compile makes are among them: each takes half a minute.
    compiled: bool = True

    @property
    def T(self) -> int:
        return self.size[self.time_dim]

    @property
    def channels(self) -> int:
        return self.size[self.channel_dim]

    @property
    def elements(self) -> int:
        return math.prod(self.size)

    @property
    def real_coefficients(self) -> int:
        """M: real numbers that describe the kept modes of one real signal."""
        return 2 * self.modes - 1 - (2 * (self.modes - 1) == self.T)

    @property
    def real_products(self) -> int:
        """R: real I x O products that reach y."""
        n_real = 1 + (2 * (self.modes - 1) == self.T)
        return n_real + 4 * (self.modes - n_real)

    def flop(self, direction: str) -> float:
        signals = self.elements // (self.T * self.channels)
        forward = 2.0 * signals * self.channels**2 * self.real_products
        return forward * (1 if direction == "forward" else 3)

    def least_bytes(self, direction: str, itemsize: int = 4) -> float:
        """Bytes that must move, x, y and their gradients in `itemsize` bytes an element.

        Backward reads x and dy once for both gradients.
        """
        x = self.elements * itemsize
        weight = self.real_coefficients * self.channels**2 * 4
        return 2.0 * x + weight if direction == "forward" else 5.0 * x + 3 * weight

    def small(self) -> Shape:
        """The same kind of shape in a few thousand elements, for smoke tests."""
        size = list(self.size)
        size[0] = min(size[0], 2)
        size[self.channel_dim] = min(size[self.channel_dim], 6)
        size[3:] = [min(length, 5) for length in size[3:]]
        if self.time_dim == 2:
            size[2] = min(size[2], 70)
        return replace(self, size=tuple(size), compiled=False)


CPU_SHAPES = (
    Shape(
        "A",
        "DSNO, 4 x 4 x 256 x 32 x 32, K=2",
        (4, 4, 256, 32, 32),
        2,
        targets={
            ("fp32", "forward"): 4.0,
            ("fp32", "forward_backward"): 4.5,
            ("bf16", "forward"): 6.0,
            ("bf16", "forward_backward"): 7.0,
        },
    ),
    Shape(
        "B",
        "2 x 16 x 64 x 16 x 16, K=8",
        (2, 16, 64, 16, 16),
        8,
        targets={("fp32", "forward"): 2.0, ("fp32", "forward_backward"): 1.8},
    ),
    Shape(
        "C",
        "FNO-1d, 8 x 64 x 1024, K=32",
        (8, 64, 1024),
        32,
        time_dim=2,
        channel_dim=1,
        targets={("fp32", "forward"): 1.3, ("fp32", "forward_backward"): 1.3},
    ),
)


def _cifar(batch: int, side: int) -> Shape:
    title = f"CIFAR-10, B={batch}, {side} x {side}, C=256"
    return Shape(f"cifar_b{batch}_{side}", title, (batch, 4, 256, side, side), 2)


def _imagenet(batch: int, side: int, channels: int) -> Shape:
    title = f"ImageNet-64, B={batch}, {side} x {side}, C={channels}"
    return Shape(f"imagenet_b{batch}_{side}", title, (batch, 4, channels, side, side), 2)


def _long(T: int, batch: int, side: int, channels: int, modes: int) -> Shape:
    title = f"T={T}, B={batch}, {side} x {side}, C={channels}, K={modes}"
    name = f"t{T}_{side}_c{channels}_k{modes}"
    return Shape(name, title, (batch, T, channels, side, side), modes)


def _fno(modes: int) -> Shape:
    title = f"FNO-1d, B=64, L=1024, C=64, K={modes}"
    return Shape(f"fno_k{modes}", title, (64, 64, 1024), modes, time_dim=2, channel_dim=1)


_GPU_SHAPES = (
    *(_cifar(batch, side) for batch in (32, 128) for side in (32, 16, 8)),
    *(
        _imagenet(batch, side, C)
        for batch in (8, 32)
        for side, C in ((64, 192), (32, 384), (16, 576), (8, 768))
    ),
    _long(16, 8, 32, 256, 8),
    _long(16, 8, 16, 64, 8),
    _long(64, 4, 32, 256, 16),
    _long(64, 4, 16, 128, 16),
    _long(64, 4, 32, 128, 33),
    *(_fno(modes) for modes in (16, 32, 64)),
)

# On a GPU every peer is measured at one shape of each kind: a whole run has minutes.
REPRESENTATIVE = ("cifar_b32_32", "imagenet_b32_32", "t16_32_c256_k8", "t64_32_c256_k16", "fno_k32")
GPU_SHAPES = tuple(
    replace(
        shape,
        all_peers=shape.name in REPRESENTATIVE,
        compiled=shape.name in REPRESENTATIVE,
        targets=targets.speedups(shape.name),
    )
    for shape in _GPU_SHAPES
)

SAVED_TARGET = (
    "A",
    1.1,
)  # tensors of x's size that forward may keep for backward at that shape, weight included


def shapes(device: str) -> tuple[Shape, ...]:
    return GPU_SHAPES if device == "cuda" else CPU_SHAPES


def find(name: str) -> Shape | None:
    return next((shape for shape in (*CPU_SHAPES, *GPU_SHAPES) if shape.name == name), None)
