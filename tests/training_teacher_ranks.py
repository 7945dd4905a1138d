"""`train teacher` on few images, and a process that dies: run by torchrun in a test."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor

from dsno_kernels import commands
from dsno_kernels.training.teacher import TeacherTask
from tests.training_runs import kill

ARGUMENTS = "--device cpu --steps 8 --batch 8 --channel-mult 1 --checkpoint-every 4 --embedding 32"


def train(out: Path, dies_at: int = -1) -> int:
    """The exit code of the command; the second process is killed at an update (the first is 0),
    unless torchrun has started it again.
    """
    draw, drawn = TeacherTask.draw, [0]

    def draw_or_die(task: TeacherTask, generator: torch.Generator, batch: int) -> dict[str, Tensor]:
        second = os.environ.get("RANK") == "1"
        if second and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and drawn[0] == dies_at:
            kill()
        drawn[0] += 1
        return draw(task, generator, batch)

    with mock.patch.object(TeacherTask, "draw", draw_or_die):
        data = ["--data", str(out.parent / "images.npz")]
        return commands.main(["train", "teacher", "--out", str(out), *data, *ARGUMENTS.split()])


if __name__ == "__main__":
    sys.exit(train(Path(sys.argv[1]), int(sys.argv[2])))
