"""Training in two processes on the CPU: the loss of one process, with DDP and with FSDP2."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("safetensors")
pytest.importorskip("tqdm")
pytest.importorskip("matplotlib")

import torch.distributed as dist

from dsno_kernels.training import loop
from dsno_kernels.training.errors import CommandError
from tests import ranks, training_teacher_ranks
from tests.helpers import assert_close
from tests.training_runs import OPTIONS, Task, losses, run

# Sums in another order, and what Adam makes of it in a few updates.
LOSS = 1e-5
KINDS = ("ddp", "fsdp")


def train(folder: Path) -> list[dict[str, Tensor]]:
    """Each kind: a whole run, and one that continues that of a single process."""
    results = []
    for kind in KINDS:
        result = run(folder / kind, dropout=0.0, parallel=kind, accumulate=2)
        run(folder / f"{kind} continued", dropout=0.0, parallel=kind)
        results.append(result.state_dict())
    return results


class PoisonedOnOne(Task):
    """The loss of the second process is not a number from the fifth update on."""

    def loss(self, model: nn.Module, part: dict[str, Tensor]) -> Tensor:
        poisoned = dist.get_rank() == 1 and self.updates[-1] >= 4
        return super().loss(model, part) * (float("nan") if poisoned else 1.0)


def fail(folder: Path) -> list[str]:
    """What each process says to a loss that is not finite on one of them, to an old file, and to
    a signal that only the second one gets.
    """
    said = []
    for task, options in ((PoisonedOnOne(), {}), (Task(), {"seed": 1})):
        try:
            run(folder, task, parallel="fsdp", **options)
        except CommandError as error:
            said.append(str(error))

    def send(update: int) -> None:
        if update == 4 and dist.get_rank() == 1:
            signal.raise_signal(signal.SIGTERM)

    with mock.patch.object(loop, "LOOK_EVERY", 2):
        try:
            run(folder, Task(send), parallel="fsdp", steps=50, checkpoint_every=50)
        except KeyboardInterrupt as stop:
            said.append(str(stop))
    return said


def test_two_processes_learn_as_one(tmp_path: Path) -> None:
    whole = run(tmp_path / "one", dropout=0.0)
    for kind in KINDS:
        run(tmp_path / f"{kind} continued", dropout=0.0, steps=3)
    first, second = ranks.run(train, tmp_path, tmp_path)
    for kind, mine, others in zip(KINDS, first, second, strict=True):
        assert_close(losses(tmp_path / kind), losses(tmp_path / "one"), LOSS)
        assert_close(losses(tmp_path / f"{kind} continued"), losses(tmp_path / "one"), LOSS)
        assert mine.keys() == others.keys() == whole.state_dict().keys()
        for name, value in mine.items():
            assert torch.equal(value, others[name])
            if value.abs().max() > 1e-2:
                assert_close(value, whole.state_dict()[name], 1e-3)
        # One process continues what two have saved.
        task = Task()
        run(tmp_path / kind, task, dropout=0.0, steps=OPTIONS.steps + 1)
        assert task.updates == [OPTIONS.steps]
    assert losses(tmp_path / "ddp")[-1].isfinite().all()


def test_all_processes_stop_together(tmp_path: Path) -> None:
    said = ranks.run(fail, tmp_path, tmp_path)
    assert said[0] == said[1]
    assert "the loss of update 5 is not finite; the checkpoint of step 3 is in" in said[0][0]
    assert "seed was 0, now it is 1" in said[0][1]
    assert "the checkpoint of step 5 is in" in said[0][2]


def test_a_process_that_dies_under_torchrun(tmp_path: Path) -> None:
    """The second of two is killed after a checkpoint; torchrun starts both again."""
    pixels = np.random.default_rng(0).integers(0, 256, (20, 4, 4), dtype=np.uint8)
    np.savez(tmp_path / "images.npz", images=pixels)
    out, elastic = tmp_path / "two", "--standalone --nproc-per-node=2 --max-restarts=1"
    module = f"-m tests.training_teacher_ranks {out} 5"
    run = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *elastic.split(), *module.split()],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert "exitcode: -9" in run.stderr
    assert run.stdout.count(f"Wrote {out}") == 1
    assert training_teacher_ranks.train(tmp_path / "one") == 0
    assert_close(losses(out), losses(tmp_path / "one"), LOSS)
