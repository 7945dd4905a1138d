"""Training runs that are killed with SIGKILL, and what the next run makes of them."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
import torch

pytest.importorskip("safetensors")
pytest.importorskip("tqdm")
pytest.importorskip("matplotlib")

from dsno_kernels.training import checkpoint
from dsno_kernels.training.history import History
from tests import ranks
from tests.training_runs import Task, kill, run, same_end


def at_an_update(out: Path) -> None:
    run(out, Task(lambda update: kill() if update == 5 else None))


def with_half_a_checkpoint(out: Path) -> None:
    """In the second checkpoint, when its file is written but not yet in its place."""
    replace = os.replace

    def replace_or_die(source: Path, target: Path) -> None:
        if Path(target).name == checkpoint.NAME and Path(target).exists():
            kill()
        replace(source, target)

    with mock.patch("os.replace", replace_or_die):
        run(out)


def between_losses_and_checkpoint(out: Path) -> None:
    """When the losses of the second checkpoint are written and it is not."""
    add = History.add
    calls: list[int] = []

    def add_and_die(history: History, rows: list[tuple[int, float, float, float]]) -> None:
        add(history, rows)
        calls.append(len(rows))
        if len(calls) == 2:
            kill()

    with mock.patch.object(History, "add", add_and_die):
        run(out)


def before_any_checkpoint(out: Path) -> None:
    run(out, Task(lambda update: kill() if update == 1 else None))


def unharmed(out: Path) -> None:
    run(out)


def code_of(work: Callable[[Path], None], out: Path) -> int | None:
    """The exit code of a process of its own that does the work."""
    process = ranks.processes().Process(target=alone, args=(work, out))
    process.start()
    process.join()
    return process.exitcode


def alone(work: Callable[[Path], None], out: Path) -> None:
    torch.set_num_threads(1)
    work(out)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole")
    assert code_of(unharmed, out) == 0
    return out


@pytest.mark.parametrize(
    ("killed", "saved"),
    [
        (before_any_checkpoint, False),
        (at_an_update, True),
        (with_half_a_checkpoint, True),
        (between_losses_and_checkpoint, True),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_the_next_run_continues_to_the_bit(
    killed: Callable[[Path], None], saved: bool, tmp_path: Path, whole: Path
) -> None:
    assert code_of(killed, tmp_path) == -signal.SIGKILL
    assert (tmp_path / checkpoint.NAME).exists() is saved
    assert code_of(unharmed, tmp_path) == 0
    assert same_end(tmp_path, whole)
    assert sorted(p.name for p in tmp_path.iterdir()) == [checkpoint.NAME, "loss.csv"]
