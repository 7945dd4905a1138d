"""Training on a CUDA device: the losses of the CPU, autocast, and runs that are continued."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("safetensors")
pytest.importorskip("tqdm")
pytest.importorskip("matplotlib")

from dsno_kernels import commands
from tests.helpers import assert_close
from tests.on_device import DEVICE, marks
from tests.training_runs import OPTIONS, losses, run

pytestmark = marks

# A loss of float32 whose convolutions have operands of 11 (TF32) or 8 bits of mantissa, after some
# updates.
LOSS = {"fp32": 1e-2, "bf16": 5e-2}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_losses_of_the_cpu(precision: str, tmp_path: Path) -> None:
    run(tmp_path / "host", dropout=0.0)
    result = run(tmp_path / "device", device=DEVICE, dropout=0.0, precision=precision)
    for parameter in result.parameters():
        assert (parameter.device.type, parameter.dtype) == (DEVICE.type, torch.float32)
    expected, made = (losses(tmp_path / name)[:, 0] for name in ("host", "device"))
    assert_close(made, expected, LOSS[precision])


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "recomputed"])
def test_a_run_is_continued(checkpointing: bool, tmp_path: Path) -> None:
    """The losses after a checkpoint, dropout included, are those of a run that nothing stopped."""
    run(tmp_path / "whole", device=DEVICE)
    run(tmp_path / "part", device=DEVICE, steps=3, activation_checkpointing=checkpointing)
    run(tmp_path / "part", device=DEVICE, activation_checkpointing=checkpointing)
    assert len(losses(tmp_path / "part")) == OPTIONS.steps
    assert_close(losses(tmp_path / "part"), losses(tmp_path / "whole"), LOSS["fp32"])


def test_the_command_trains_a_teacher(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (20, 8, 8, 3), dtype=np.uint8)
    np.savez(tmp_path / "images.npz", images=pixels)
    command = f"train teacher --data {tmp_path / 'images.npz'} --out {tmp_path / 'out'}"
    more = f"--device {DEVICE.type} --steps 4 --batch 16 --attention 4 --warm-up 1"
    assert commands.main([*command.split(), *more.split()]) == 0
    assert losses(tmp_path / "out").isfinite().all()
    assert (tmp_path / "out" / "teacher.safetensors").exists()
