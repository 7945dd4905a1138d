"""Trajectories: runs that end early, other settings, damaged files."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

lmdb = pytest.importorskip("lmdb", reason="lmdb is not installed")
pytest.importorskip("tqdm", reason="tqdm is not installed")

from dsno_kernels.diffusion import SolverPlan  # noqa: E402
from dsno_kernels.training.trajectories import (  # noqa: E402
    TrajectoryDataset,
    TrajectoryError,
)
from dsno_kernels.training.trajectory_files import ShardReader, ShardWriter  # noqa: E402
from tests.faults import full_disk  # noqa: E402
from tests.helpers import assert_close  # noqa: E402
from tests.trajectory_runs import (  # noqa: E402
    BATCH,
    COUNT,
    PLAN,
    PROCESS,
    SHAPE,
    denoiser,
    everything,
    write,
)

ROOT = Path(__file__).parents[1]
FRAMES = 5  # the noise and 4 states
# The same sums in another order of a batch.
FLOAT32 = 1e-6


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole")
    write(folder)
    return folder


# Runs that end early


def started(folder: Path, *how: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "tests.trajectory_runs", str(folder), *how],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def stored(folder: Path) -> list[int]:
    """Samples in each shard."""
    return [ShardReader(path).length or 0 for path in sorted(folder.glob("shard-*"))]


def test_kill_between_batches(tmp_path: Path, whole: Path) -> None:
    process = started(tmp_path, "hang")
    assert process.stdout is not None and process.stdout.readline() == "hanging\n"
    process.send_signal(signal.SIGKILL)
    process.communicate()
    (there,) = stored(tmp_path)
    assert there in (BATCH, 2 * BATCH)  # the second may be on its way
    with pytest.raises(TrajectoryError, match=f"has {there} of 20 samples: run the command"):
        TrajectoryDataset(tmp_path)
    calls = []

    def counted(x: Tensor, t: Tensor) -> Tensor:
        calls.append(len(x))
        return denoiser(x, t)

    with one_thread():
        write(tmp_path, counted)
    assert sum(calls) == (COUNT - there) * PLAN.evaluations  # nothing is made twice
    assert torch.equal(everything(tmp_path)[0], everything(whole)[0])
    assert TrajectoryDataset(tmp_path).checksum == TrajectoryDataset(whole).checksum
    write(tmp_path, lambda x, t: pytest.fail("there is nothing left to do"))


def test_kill_inside_a_transaction(tmp_path: Path, whole: Path) -> None:
    process = started(tmp_path, "kill")
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert stored(tmp_path) == [BATCH]
    with one_thread():
        write(tmp_path)
    assert torch.equal(everything(tmp_path)[0], everything(whole)[0])


@pytest.mark.parametrize("left", ["nothing", "empty file", "all but the checksum"])
def test_kill_at_the_ends(left: str, tmp_path: Path, whole: Path) -> None:
    shard = tmp_path / "shard-00000-of-00001"
    if left == "all but the checksum":
        write(tmp_path)
        (shard / "sha256.txt").unlink()
        with pytest.raises(TrajectoryError, match="run the command that made it again"):
            TrajectoryDataset(tmp_path)
    else:
        shard.mkdir()
        if left == "empty file":
            (shard / "data.mdb").touch()
            (shard / "lock.mdb").touch()
    write(tmp_path)
    assert TrajectoryDataset(tmp_path, verify=True).checksum == TrajectoryDataset(whole).checksum


def test_two_processes_and_one_that_dies(
    tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    second = started(tmp_path, "kill", RANK="1", WORLD_SIZE="2")
    monkeypatch.setenv("WORLD_SIZE", "2")
    write(tmp_path)
    second.communicate()
    assert second.returncode == -signal.SIGKILL
    assert stored(tmp_path) == [10, 6]
    monkeypatch.setenv("RANK", "1")
    write(tmp_path)
    frames, _ = everything(tmp_path)
    expected, _ = everything(whole)
    assert torch.equal(frames[:, 0], expected[:, 0])
    assert_close(frames, expected, FLOAT32)


def test_one_process_ends_what_two_began(
    tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    write(tmp_path)
    assert stored(tmp_path) == [10]
    with pytest.raises(TrajectoryError, match="shard-00001-of-00002 has 0 of 10"):
        TrajectoryDataset(tmp_path)
    monkeypatch.delenv("WORLD_SIZE")
    write(tmp_path)
    assert torch.equal(everything(tmp_path)[0][:, 0], everything(whole)[0][:, 0])


def test_interrupt_says_how_far_it_came(tmp_path: Path) -> None:
    calls = []

    def interrupted(x: Tensor, t: Tensor) -> Tensor:
        calls.append(t)
        if len(calls) > 2 * PLAN.evaluations:
            raise KeyboardInterrupt
        return denoiser(x, t)

    with pytest.raises(KeyboardInterrupt, match="has 12 of 20 trajectories; the same command"):
        write(tmp_path, interrupted)
    assert stored(tmp_path) == [12]


def test_a_full_disk(tmp_path: Path, whole: Path) -> None:
    size = (whole / "shard-00000-of-00001" / "data.mdb").stat().st_size
    error = r"cannot be written.*MiB of the disk.*run the same"
    with full_disk(size - 1), pytest.raises(TrajectoryError, match=error):
        write(tmp_path)
    (there,) = stored(tmp_path)
    assert 0 < there < COUNT
    write(tmp_path)
    assert torch.equal(everything(tmp_path)[0], everything(whole)[0])


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(TrajectoryError, match=r"manifest.json cannot be written"):
        write(tmp_path / "file")


def test_the_map_grows(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, map_size=1)
    values = np.random.default_rng(0).random((300, 2000)).astype(np.float32)
    writer.append(0, values[:100])
    writer.append(100, values[100:])
    writer.close()
    with ShardReader(tmp_path).values() as get:
        for i, value in enumerate(values):
            assert bytes(get(b"%d" % i)) == value.tobytes()


def test_two_runs_in_one_folder(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, map_size=1)
    writer.append(0, np.zeros((3, 4), np.float32))
    with pytest.raises(TrajectoryError, match="has 3 samples, not the 2"):
        writer.append(2, np.zeros((3, 4), np.float32))
    with pytest.raises(
        TrajectoryError, match="is open in this process; delete the TrajectoryDataset"
    ):
        ShardReader(tmp_path)
    writer.close()


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """As in the process that was killed: sums in the same order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"seed": 1}, "seed is 0 there and 1 now"),
        ({"count": 21}, "count is 20 there and 21 now"),
        ({"shards": 2}, "shards is 1 there and 2 now"),
        ({"shape": (1, 3, 4)}, r"shape\[0\] is 2 there and 1 now"),
        ({"positions": [8]}, r"positions is a list of 5 there and \[0, 8\] now"),
        ({"teacher": "b"}, "teacher is '' there and 'b' now"),
        ({"classes": [1, 2]}, r"classes is absent there and \[1, 2\] now"),
        ({"precision": "bf16"}, "precision is 'fp32' there and 'bf16' now"),
        (
            {"plan": SolverPlan.build(PROCESS, PLAN.grid, "tab2", prediction="x0")},
            "plan.solver is 'tab3' there and 'tab2' now",
        ),
        (
            {
                "plan": SolverPlan.build(
                    PROCESS, PLAN.grid, prediction="x0", end="lower_order_final"
                )
            },
            "plan.end is 'full' there and 'lower_order_final' now",
        ),
        (
            {
                "plan": SolverPlan.build(
                    PROCESS, [*PLAN.grid[:-1].tolist(), 2e-3], "tab3", prediction="x0"
                )
            },
            r"plan.grid\[8\] is 0.001 there and 0.002 now",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_other_settings_are_named(changed: dict[str, Any], text: str, whole: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*")}
    with pytest.raises(TrajectoryError, match=text):
        write(whole, **changed)
    assert before == {path: path.stat().st_mtime_ns for path in whole.rglob("*")}


def test_batch_and_version_may_change(tmp_path: Path) -> None:
    write(tmp_path)
    path = tmp_path / "manifest.json"
    path.write_text(path.read_text().replace('"version": "', '"version": "9'))
    write(tmp_path, lambda x, t: pytest.fail("there is nothing left to do"), batch=3)


# Damaged files


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "copy"))


@pytest.mark.parametrize("part", [0.01, 0.2, 0.5, 0.99], ids=str)
@pytest.mark.parametrize("finished", [True, False], ids=["finished", "unfinished"])
def test_a_cut_file(part: float, finished: bool, copy: Path) -> None:
    path = copy / "shard-00000-of-00001" / "data.mdb"
    os.truncate(path, int(part * path.stat().st_size))
    if not finished:
        (path.parent / "sha256.txt").unlink()
    for use in (TrajectoryDataset, write):
        with pytest.raises(TrajectoryError, match=r"data.mdb is damaged.*remove it and run"):
            use(copy)
    shutil.rmtree(path.parent)
    write(copy)
    assert len(TrajectoryDataset(copy, verify=True)) == COUNT


def test_garbage_is_no_lmdb(copy: Path) -> None:
    path = copy / "shard-00000-of-00001" / "data.mdb"
    path.write_bytes(b"x" * path.stat().st_size)
    with pytest.raises(TrajectoryError, match=r"data.mdb is damaged"):
        TrajectoryDataset(copy)


def test_a_changed_value_is_found_on_request(copy: Path) -> None:
    frames, _ = everything(copy)
    value = frames[3, 2, 1].numpy().tobytes()

    path = copy / "shard-00000-of-00001" / "data.mdb"
    other = bytes([value[0] ^ 1]) + value[1:]
    path.write_bytes(path.read_bytes().replace(value, other))  # pages out of use hold it, too
    data = TrajectoryDataset(copy)
    with pytest.raises(TrajectoryError, match="do not have the checksum"):
        data.verify()
    with pytest.raises(TrajectoryError, match="do not have the checksum"):
        TrajectoryDataset(copy, verify=True)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (None, "holds no trajectories: it has no manifest.json"),
        ("{", "manifest.json cannot be read"),
        ("[]", "no manifest that this version knows"),
        ('{"format": 2}', "no manifest that this version knows"),
        ('{"format": 1}', "damaged: count is missing"),
    ],
    ids=["none", "cut", "list", "format", "keys"],
)
def test_bad_manifests(content: str | None, text: str, copy: Path) -> None:
    path = copy / "manifest.json"
    path.unlink()
    if content is not None:
        path.write_text(content)
    with pytest.raises(TrajectoryError, match=text):
        TrajectoryDataset(copy)


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("shape", None, "shape must be [C, H, W], and is absent"),
        ("shape", [1, 8], "shape must be [C, H, W], and is [1, 8]"),
        ("count", "x", "count must be a number of at least 1, and is 'x'"),
        ("shards", 0, "shards must be a number of at least 1, and is 0"),
        ("positions", 3, "positions must be a list of places, and is 3"),
        ("times", [1.0], "times must be 5 numbers, and is [1.0]"),
        ("logsnr", [1.0], "logsnr must be 5 numbers, and is [1.0]"),
        ("logsnr", [0, 1, 2, 3, "4"], "logsnr must be a list of numbers"),
        ("logsnr", [0, 1, 2, 3, 10**400], "logsnr must be a list of numbers"),
        ("classes", "all", "classes must be null or a list, and is 'all'"),
        ("noise_scale", 0.0, "noise_scale must be a positive number, and is 0.0"),
    ],
    ids=lambda value: value if isinstance(value, str) and value.isidentifier() else "",
)
def test_bad_values_in_a_manifest(key: str, value: Any, text: str, copy: Path) -> None:
    path = copy / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    with pytest.raises(TrajectoryError, match=re.escape(f"manifest.json is damaged: {text}")):
        TrajectoryDataset(copy)


@pytest.mark.parametrize("wrong", [-5, 39_000_000_000])
def test_labels_that_are_no_classes(wrong: int, copy: Path) -> None:
    """In an LMDB of the official project."""
    shard = copy / "shard-00000-of-00001"
    np.save(shard / "labels.npy", np.full(COUNT, wrong))
    with pytest.raises(TrajectoryError, match=rf"classes in 0\.\.99999, got {wrong} to"):
        TrajectoryDataset(shard, shape=(SHAPE[0], FRAMES, *SHAPE[1:]))


def test_labels_of_another_length(copy: Path) -> None:
    manifest = json.loads((copy / "manifest.json").read_text())
    (copy / "manifest.json").write_text(json.dumps({**manifest, "classes": [0]}))
    path = copy / "shard-00000-of-00001" / "labels.npy"
    with pytest.raises(TrajectoryError, match=r"labels.npy cannot be read"):
        TrajectoryDataset(copy)
    np.save(path, np.zeros(3, np.int64))
    with pytest.raises(TrajectoryError, match="has 20 samples, but 3 labels"):
        TrajectoryDataset(copy)
