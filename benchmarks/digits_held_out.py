"""How close student and ablation come to trajectories of the teacher that neither has seen."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import dsno_kernels as dk
from dsno_kernels.training.trajectory_data import TrajectoryDataset
from dsno_kernels.training.trajectory_loss import l1

FOLDER = "digits/held_out"
COUNT = 3000
BATCH = 500


def measure(folder: Path, teacher: str, models: dict[str, str], count: int) -> dict[str, Any]:
    """Write trajectories from another seed, and compare two models on them, state by state.

    Args:
        folder: where `teacher` and the files of `models` are.
        models: the student and its ablation, by name.
        count: of trajectories.

    Returns:
        ``logsnr`` of the T states; of each model the mean absolute ``errors`` (T); of the first
        minus the second ``difference`` and its ``standard_error`` over the samples (T).
    """
    words = f"train trajectories --teacher {teacher} --count {count} --steps 16 --seed 1"
    command = [sys.executable, "-m", "dsno_kernels", *words.split(), "--out", FOLDER]
    subprocess.run(command, cwd=folder, check=True)
    data = TrajectoryDataset(folder / FOLDER)
    assert data.logsnr is not None
    logsnr = data.logsnr[1:]
    errors = {
        name: torch.cat(list(_errors(dk.models.load(folder / path), data, logsnr.float())))
        for name, path in models.items()
    }
    first, second = errors.values()
    difference = first - second
    return {
        "logsnr": logsnr.tolist(),
        "count": count,
        "errors": {name: values.mean(0).tolist() for name, values in errors.items()},
        "difference": difference.mean(0).tolist(),
        "standard_error": (difference.std(0) / count**0.5).tolist(),
    }


@torch.no_grad()
def _errors(model: Any, data: TrajectoryDataset, logsnr: Tensor) -> Iterator[Tensor]:
    """Of each sample and state, ``(B, T)``."""
    model.eval()
    for start in range(0, len(data), BATCH):
        frames, labels = data.batch(range(start, min(start + BATCH, len(data))))
        made = model(frames[:, 0] / data.noise_scale, logsnr, labels).float()
        yield torch.stack(
            [l1(m[None], w[None]) for m, w in zip(made, frames[:, 1:], strict=True)]
        ).double()
