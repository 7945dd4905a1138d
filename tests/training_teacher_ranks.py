"""`train teacher` on few images in one of several processes, of which the second dies."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

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
        places = ["--out", str(out), "--data", str(out.parent / "images.npz")]
        return commands.main(["train", "teacher", *places, *ARGUMENTS.split()])


def alone(out: Path, dies_at: int) -> None:
    """As a process of torchrun: its environment is given; ends with the exit code."""
    torch.set_num_threads(1)
    sys.exit(train(out, dies_at))


def survivor(out: Path, dies_at: int, said: Path, environment: dict[str, str]) -> None:
    """:func:`alone` where nobody ends the process that is left; what it says goes into a file."""
    os.environ |= environment
    with open(said, "w") as file, contextlib.redirect_stderr(file):
        alone(out, dies_at)


def under_torchrun(out: Path, dies_at: int, said: Path) -> None:
    """What ``torchrun --standalone --nproc-per-node=2 --max-restarts=1`` does, with processes that
    are forked; what it and they say goes into this folder.
    """
    said.mkdir()
    with open(said / "torchrun.log", "w") as file:
        os.dup2(file.fileno(), 2)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=2,
        max_restarts=1,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        run_id="test",
        start_method="forkserver",
        logs_specs=DefaultLogsSpecs(log_dir=str(said), redirects=Std.ALL),
    )
    elastic_launch(config, alone)(out, dies_at)
