"""The student's training on a CUDA device: trajectories held there or read, losses of the CPU."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.optim.swa_utils import AveragedModel

pytest.importorskip("safetensors")

from dsno_kernels.models import DSNO
from dsno_kernels.training import loop
from dsno_kernels.training.checkpoint import State
from dsno_kernels.training.options import Options
from dsno_kernels.training.trajectory_loss import StudentTask
from dsno_kernels.training.trajectory_source import HELD, Source
from tests.on_device import DEVICE, marks
from tests.test_training_student import TINY, MadeUp, drawn, logsnr_schedule

pytestmark = marks

CONFIG = dataclasses.replace(TINY, num_classes=6)
# Convolutions in TF32 (11 bits of mantissa) or bfloat16 (8 bits), a few updates long.
LOSS = {"fp32": 5e-3, "bf16": 5e-2}


def source(device: torch.device, held: int = HELD) -> Source:
    logsnr = logsnr_schedule(torch.linspace(0.9, 0.0, 4))
    return Source(MadeUp(6, 4, labels=True), logsnr, device, held)


def losses(device: torch.device, precision: str = "fp32", held: int = HELD) -> list[float]:
    """Of three updates from the same weights."""
    model = drawn(DSNO(CONFIG)).to(device).train()
    options = Options(steps=3, batch=4, learning_rate=1e-4, precision=precision)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4, fused=True)
    state, task = State(model, AveragedModel(model), optimizer), StudentTask(source(device, held))
    return [float(loop.update(model, state, task, options, step)[0]) for step in range(3)]


def test_held_and_read_batches_are_those_of_the_cpu() -> None:
    index = torch.tensor([5, 0, 5, 2])
    expected = source(torch.device("cpu")).batch(index)
    for held in (HELD, 0):
        for ours, other in zip(source(DEVICE, held).batch(index), expected, strict=True):
            assert ours is not None and other is not None and ours.device.type == DEVICE.type
            assert torch.equal(ours.cpu(), other)


@pytest.mark.parametrize("precision", LOSS)
@pytest.mark.parametrize("held", [HELD, 0], ids=["held", "read"])
def test_losses_are_those_of_the_cpu(precision: str, held: int) -> None:
    expected = losses(torch.device("cpu"))
    assert losses(DEVICE, precision, held) == pytest.approx(expected, rel=LOSS[precision])
