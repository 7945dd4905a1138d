"""Batches of trajectories on the device of a training: held there whole, or read as they are asked
for.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

IN_MEMORY = 2 << 30  # bytes of float32 states that are kept on the device


@dataclass(frozen=True)
class Source:
    """Noises, the teacher's states and labels.

    Args:
        logsnr: of the states, ``(T,)``, on the device.
        noise: ``(N, C, H, W)`` on the device; None where the data is read batch by batch.
        states: ``(N, T, C, H, W)``, likewise.
        labels: ``(N,)`` on the device, or None.
    """

    logsnr: Tensor
    noise: Tensor
    states: Tensor
    labels: Tensor | None = None

    def __len__(self) -> int:
        return len(self.noise)

    def batch(self, index: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Noises ``(B, C, H, W)``, states ``(B, T, C, H, W)`` and labels ``(B,)`` or None of the
        samples `index`, ``(B,)`` on the CPU.
        """
        place = index.to(self.noise.device, non_blocking=True)
        labels = None if self.labels is None else self.labels[place]
        return self.noise[place], self.states[place], labels
