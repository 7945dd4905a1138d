"""A small model and task for tests of the training engine."""

from __future__ import annotations

import dataclasses
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn

from dsno_kernels.models import DSNO, DSNOConfig
from dsno_kernels.models.files import read_tensors
from dsno_kernels.training import checkpoint
from dsno_kernels.training.history import History
from dsno_kernels.training.loop import fit
from dsno_kernels.training.options import Options

CONFIG = DSNOConfig(
    image_size=4,
    image_channels=1,
    channels=32,
    channel_mult=(1,),
    num_res_blocks=1,
    attention_resolutions=(),
    embedding_dim=32,
    dropout=0.1,
)
LOGSNR = torch.tensor([-1.0, 1.0])
OPTIONS = Options(
    steps=7,
    batch=8,
    learning_rate=1e-3,
    warm_up=3,
    clip_norm=0.5,
    ema_decay=0.9,
    checkpoint_every=3,
)


class Task:
    """Two frames of a noise; `before(update)` is called before each update draws its batch, the
    first of which is 0.
    """

    def __init__(self, before: Callable[[int], None] = lambda update: None) -> None:
        self.before = before
        self.updates: list[int] = []
        self.factor = 1.0

    def draw(self, generator: torch.Generator, batch: int) -> dict[str, Tensor]:
        """A batch; the update is what the engine seeded the generator with."""
        update = SEEDS.index(generator.initial_seed())
        self.updates.append(update)
        self.before(update)
        return {"x": torch.randn(batch, 1, 4, 4, generator=generator)}

    def loss(self, model: nn.Module, part: dict[str, Tensor]) -> Tensor:
        device = next(model.parameters()).device
        x = part["x"].to(device)
        frames = torch.stack([x.sin(), x.cos()], dim=1)
        return self.factor * (model(x, LOGSNR.to(device)) - frames).square().mean()


# Of the generators with which the engine draws the batches of a run with seed 0.
SEEDS = [int(np.random.SeedSequence((0, update)).generate_state(2)[0]) for update in range(60)]


def model(**fields: Any) -> DSNO:
    """The same weights at each call."""
    torch.manual_seed(3)
    return DSNO(dataclasses.replace(CONFIG, **fields))


def run(
    out: Path, task: Task | None = None, device: str | torch.device = "cpu", **options: Any
) -> nn.Module:
    """`fit` of the small model, without the picture of its losses."""
    dropout = options.pop("dropout", CONFIG.dropout)
    metadata = {"config": dataclasses.asdict(CONFIG), "data": "noise"}
    learning = dataclasses.replace(OPTIONS, **options)
    with mock.patch.object(History, "draw"):
        return fit(model(dropout=dropout).to(device), task or Task(), learning, out, metadata)


def curve(out: Path) -> str:
    return (out / "loss.csv").read_text()


def losses(out: Path) -> Tensor:
    rows = curve(out).splitlines()[1:]
    return torch.tensor([[float(value) for value in row.split(",")[1:3]] for row in rows])


def same_end(out: Path, other: Path) -> bool:
    """Whether two runs have the same loss curve and the same last state, to the bit."""
    (mine, _), (theirs, _) = (read_tensors(folder / checkpoint.NAME) for folder in (out, other))
    equal = all(torch.equal(value, theirs[name]) for name, value in mine.items())
    return curve(out) == curve(other) and mine.keys() == theirs.keys() and equal


def kill() -> None:
    """As kill -9."""
    os.kill(os.getpid(), signal.SIGKILL)
