"""Noise that belongs to a sample, whatever batch, process or run it is drawn in."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def standard_normal(shape: Sequence[int], indices: range, seed: int, stream: int) -> Tensor:
    """Standard normal noise, float32 ``(len(indices), *shape)`` on the CPU; that of sample i
    depends on (seed, stream, i) alone.

    Args:
        shape: of one sample.
        indices: the numbers of the samples.
        seed: in 0 .. 2**64 - 1.
        stream: apart from any other use of the same seed.

    Raises:
        ValueError: a seed out of range.
    """
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed must be in 0 .. 2**64 - 1, got {seed}")
    noise = np.empty((len(indices), *shape), np.float32)
    for row, i in zip(noise, indices, strict=True):
        # Counter-based: key and counter say which numbers come, nothing is skipped to get there.
        source = np.random.Philox(key=np.array([seed, stream], np.uint64), counter=[0, 0, i, 0])
        np.random.Generator(source).standard_normal(out=row, dtype=np.float32)
    return torch.from_numpy(noise)
