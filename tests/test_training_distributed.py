"""Training in two processes on the CPU: the loss of one process, with DDP and with FSDP2."""

from __future__ import annotations

import signal
import socket
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


@pytest.fixture
def images(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (20, 4, 4), dtype=np.uint8)
    np.savez(tmp_path / "images.npz", images=pixels)


@pytest.mark.usefixtures("images")
def test_a_process_that_dies_under_torchrun(tmp_path: Path) -> None:
    """The second of two is killed after a checkpoint; torchrun starts both again."""
    out, said = tmp_path / "two", tmp_path / "said"
    torchrun = ranks.processes().Process(
        target=training_teacher_ranks.under_torchrun, args=(out, 5, said)
    )
    torchrun.start()
    torchrun.join()
    assert torchrun.exitcode == 0
    # torchrun names the process that it sees end first: the killed one, or the other, which says so
    (other,) = said.rglob("attempt_0/0/stderr.log")
    killed = "exitcode: -9" in (said / "torchrun.log").read_text()
    assert killed or "another process of this run has ended" in other.read_text()
    printed = "".join(path.read_text() for path in said.rglob("stdout.log"))
    assert printed.count(f"Wrote {out}") == 1
    assert len(list(said.rglob("stderr.log"))) == 4
    assert not any("Traceback" in path.read_text() for path in said.rglob("stderr.log"))
    assert training_teacher_ranks.train(tmp_path / "one") == 0
    assert_close(losses(out), losses(tmp_path / "one"), LOSS)


@pytest.mark.usefixtures("images")
def test_who_outlives_another_process_says_so(tmp_path: Path) -> None:
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    started = []
    for rank in range(2):
        mine = {"RANK": str(rank), "LOCAL_RANK": str(rank), "TORCHELASTIC_RESTART_COUNT": "0"}
        words = (tmp_path / "two", 5, tmp_path / f"{rank}.txt", shared | mine)
        process = ranks.processes().Process(target=training_teacher_ranks.survivor, args=words)
        process.start()
        started.append(process)
    for process in started:
        process.join(300)
        process.kill()
    assert [process.exitcode for process in started] == [2, -signal.SIGKILL]
    said = (tmp_path / "0.txt").read_text()
    assert said.splitlines()[-1] == (
        "train teacher (rank 0): another process of this run has ended; what it said is the"
        " reason, and the same command continues"
    )
    assert "Traceback" not in said
