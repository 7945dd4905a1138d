"""Trajectories: what is written and read back, runs that end early, and damaged files."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

lmdb = pytest.importorskip("lmdb", reason="lmdb is not installed")
pytest.importorskip("tqdm", reason="tqdm is not installed")

from dsno_kernels import diffusion  # noqa: E402
from dsno_kernels.diffusion import EDM, SolverPlan, VPLinear, time_grid  # noqa: E402
from dsno_kernels.training.trajectories import (  # noqa: E402
    TrajectoryDataset,
    TrajectoryError,
)
from dsno_kernels.training.trajectory_files import ShardReader, ShardWriter  # noqa: E402
from tests.helpers import assert_close  # noqa: E402
from tests.trajectory_runs import (  # noqa: E402
    BATCH,
    COUNT,
    PLAN,
    PROCESS,
    SHAPE,
    denoiser,
    write,
)

ROOT = Path(__file__).parents[1]
FRAMES = 5  # the noise and 4 states
# The same sums in another order of a batch.
FLOAT32 = 1e-6


def everything(folder: Path) -> tuple[Tensor, Tensor | None]:
    data = TrajectoryDataset(folder, verify=True)
    return data.batch(range(len(data)))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole")
    write(folder)
    return folder


# What is written


def test_frames_are_the_states_of_the_sampler(whole: Path) -> None:
    frames, labels = everything(whole)
    assert frames.shape == (COUNT, FRAMES, *SHAPE) and labels is None
    noise = frames[:, 0]
    assert abs(float(noise.mean())) < 0.2 and abs(float(noise.std()) - 1) < 0.1
    assert len(noise.flatten(1).unique(dim=0)) == COUNT
    with torch.no_grad():
        wanted = diffusion.sample(denoiser, noise, PLAN, frames=[0, 2, 4, 6, 8])
    assert_close(frames, wanted, FLOAT32)


def test_the_official_project_reads_a_shard(whole: Path) -> None:
    """As its LMDBData does."""
    frames, _ = everything(whole)
    path = whole / "shard-00000-of-00001"
    environment = lmdb.open(str(path), readonly=True, readahead=False, lock=False, meminit=False)
    with environment.begin() as transaction:
        assert int(str(transaction.get(b"length"), "utf-8")) == COUNT
        for i in (0, 7, COUNT - 1):
            value = np.frombuffer(transaction.get(f"{i}".encode()), dtype=np.float32)
            stored = value.reshape(SHAPE[0], FRAMES, *SHAPE[1:]).transpose(1, 0, 2, 3)
            assert np.array_equal(stored, frames[i].numpy())
    environment.close()


def test_the_manifest_says_what_the_frames_are(whole: Path) -> None:
    manifest = TrajectoryDataset(whole).manifest
    assert manifest is not None
    assert manifest["positions"] == [0, 2, 4, 6, 8]
    assert manifest["times"] == PLAN.grid[::2].tolist()
    assert manifest["plan"]["solver"] == "tab3" and "VPCosine" in manifest["process"]
    logsnr = TrajectoryDataset(whole, t_idx=[1, 4]).logsnr
    alpha, sigma = (f(PLAN.grid[[2, 8]]) for f in (PROCESS.alpha, PROCESS.sigma))
    assert logsnr is not None
    assert_close(logsnr, torch.log(alpha**2 / sigma**2), 1e-9)


def test_noise_belongs_to_the_sample(whole: Path, tmp_path: Path) -> None:
    frames, _ = everything(whole)
    write(tmp_path / "three", shards=3, batch=4)
    other, _ = everything(tmp_path / "three")
    assert torch.equal(other[:, 0], frames[:, 0])
    assert_close(other, frames, FLOAT32)
    assert len(list((tmp_path / "three").glob("shard-*-of-00003"))) == 3
    write(tmp_path / "fewer", count=11)
    assert torch.equal(everything(tmp_path / "fewer")[0][:, 0], frames[:11, 0])
    write(tmp_path / "seed", seed=1)
    seeded, _ = everything(tmp_path / "seed")
    assert not bool((seeded[:, 0] == frames[:, 0]).any())
    checksums = {TrajectoryDataset(p).checksum for p in (whole, tmp_path / "seed")}
    assert len(checksums) == 2


def test_more_shards_than_samples(tmp_path: Path) -> None:
    write(tmp_path, count=2, shards=3)
    assert everything(tmp_path)[0].shape == (2, FRAMES, *SHAPE)


def test_the_last_state_may_have_no_noise(tmp_path: Path) -> None:
    process = VPLinear()
    grid = time_grid(process, 5, append_zero=True)
    plan = SolverPlan.build(process, grid, "tab2", prediction="x0")
    write(tmp_path, plan=plan, positions=[1, 5])
    data = TrajectoryDataset(tmp_path)
    assert data.logsnr is not None and data.logsnr[-1] == 40 and data.shape[0] == 3


def test_a_process_that_grows_starts_from_its_own_noise(tmp_path: Path, whole: Path) -> None:
    process = EDM()
    plan = SolverPlan.build(process, time_grid(process, 4, "karras"), "tab2", prediction="x0")
    write(tmp_path, model=lambda x, t: x / (1 + t * t), plan=plan)
    noise = everything(tmp_path)[0][:, 0]
    assert_close(noise, everything(whole)[0][:, 0] * (1 + 80.0**2) ** 0.5, FLOAT32)


def test_classes_and_guidance(tmp_path: Path) -> None:
    calls: list[Tensor] = []

    def model(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        calls.append(y)
        return denoiser(x, t, y)

    write(tmp_path / "plain", model, classes=[3, 0, 5], shards=2)
    frames, labels = everything(tmp_path / "plain")
    assert labels is not None and labels.tolist() == ([3, 0, 5] * 7)[:COUNT]
    with torch.no_grad():
        wanted = diffusion.sample(
            denoiser, frames[:, 0], PLAN, kwargs={"y": labels}, frames=[0, 2, 4, 6, 8]
        )
    assert_close(frames, wanted, FLOAT32)
    stored = np.load(tmp_path / "plain" / "shard-00001-of-00002" / "labels.npy")
    assert stored.dtype == np.int64 and stored.tolist() == labels[COUNT // 2 :].tolist()
    item, label = TrajectoryDataset(tmp_path / "plain")[COUNT - 1]
    assert label == labels[-1] and torch.equal(item, frames[-1])

    calls.clear()
    write(tmp_path / "guided", model, classes=[3, 0, 5], guidance=2.0)
    assert calls[0].tolist() == [3, 0, 5, 3, 0, 5] + [-1] * 6
    guided, _ = everything(tmp_path / "guided")
    with torch.no_grad():
        wanted = diffusion.sample(
            *(denoiser, frames[:, 0], PLAN),
            kwargs={"y": labels},
            unconditional={"y": torch.full_like(labels, -1)},
            guidance=2.0,
        )
    assert_close(guided[:, -1], wanted, FLOAT32)


def test_bfloat16_is_the_network_alone(tmp_path: Path, whole: Path) -> None:
    layer = torch.nn.Linear(4, 4, bias=False)
    seen = []

    def model(x: Tensor, t: Tensor) -> Tensor:
        seen.append((x.dtype, layer(x).dtype))
        return denoiser(x, t)

    write(tmp_path, model, precision="bf16")
    assert set(seen) == {(torch.float32, torch.bfloat16)}
    assert torch.equal(everything(tmp_path)[0], everything(whole)[0])


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"count": 0}, "count must be at least 1"),
        ({"batch": 0}, "batch must be at least 1"),
        ({"shards": 0}, "shards must be at least 1"),
        ({"shape": (8, 8)}, r"shape must be \(C, H, W\)"),
        ({"positions": [9]}, r"positions must be in 1..8"),
        ({"positions": [-1]}, r"positions must be in 1..8"),
        ({"positions": [0]}, r"positions must be in 1..8"),
        ({"guidance": 2.0}, "guidance needs classes"),
        ({"classes": []}, "at least one class"),
        ({"precision": "fp16"}, "fp32 or bf16"),
        ({"seed": -1}, "seed must be in 0"),
        ({"plan": SolverPlan.build(PROCESS, PLAN.grid, "ddim", eta=1.0)}, "adds noise"),
        ({"model": lambda x, t: x * torch.nan}, "NaN or infinity at row 0"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_bad_arguments(changed: dict[str, Any], text: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=text):
        write(tmp_path, **changed)


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


def test_two_processes_and_one_that_dies(tmp_path: Path, whole: Path) -> None:
    first = started(tmp_path, RANK="0", WORLD_SIZE="2")
    second = started(tmp_path, "kill", RANK="1", WORLD_SIZE="2")
    for process in (first, second):
        process.communicate()
    assert (first.returncode, second.returncode) == (0, -signal.SIGKILL)
    assert stored(tmp_path) == [10, 6]
    second = started(tmp_path, RANK="1", WORLD_SIZE="2")
    second.communicate()
    assert second.returncode == 0
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
    """A limit of the file's size stands for it: both are a write that fails."""
    write(tmp_path, count=COUNT)  # what it needs, to know how much is too little
    size = (tmp_path / "shard-00000-of-00001" / "data.mdb").stat().st_size
    full = tmp_path / "full"
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.trajectory_runs", str(full)],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size - 1, size - 1)),
    )
    _, error = process.communicate()
    last = error.strip().splitlines()[-1]
    assert "cannot be written" in last and "run the same command again" in last, error
    assert stored(full)[0] < COUNT
    with one_thread():
        write(full)
    assert torch.equal(everything(full)[0], everything(whole)[0])


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
    with pytest.raises(TrajectoryError, match="in use by this process"):
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
                    PROCESS, [*PLAN.grid[:-1].tolist(), 2e-3], "tab3", prediction="x0"
                )
            },
            r"times\[4\] is 0.001 there and 0.002 now",
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
    import shutil

    return Path(shutil.copytree(whole, tmp_path / "copy"))


@pytest.mark.parametrize("part", [0.0, 0.01, 0.2, 0.5, 0.99], ids=str)
@pytest.mark.parametrize("finished", [True, False], ids=["finished", "unfinished"])
def test_a_cut_file(part: float, finished: bool, copy: Path) -> None:
    path = copy / "shard-00000-of-00001" / "data.mdb"
    os.truncate(path, int(part * path.stat().st_size))
    if not finished:
        (path.parent / "sha256.txt").unlink()
    for use in (lambda: TrajectoryDataset(copy), lambda: write(copy)):
        if part == 0.0 and not finished and use is not None and "write" in use.__code__.co_names:
            use()  # as after a kill at the very beginning
            assert len(TrajectoryDataset(copy, verify=True)) == COUNT
            return
        with pytest.raises(TrajectoryError, match=r"data.mdb is damaged.*remove it and run"):
            use()


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


def test_a_missing_sample(tmp_path: Path) -> None:
    official(tmp_path, np.zeros((4, *STORED), np.float32), length=5)
    data = TrajectoryDataset(tmp_path, shape=STORED)
    with pytest.raises(TrajectoryError, match="has no sample 4"):
        data[4]
    with pytest.raises(IndexError, match="index 5 is out of range for 5"):
        data[5]


# What is read


STORED = (2, 4, 3, 3)


def official(path: Path, values: np.ndarray, length: int | None = None) -> None:
    """An LMDB as the official project writes it."""
    path.mkdir(exist_ok=True)
    environment = lmdb.open(str(path), map_size=1 << 24)
    with environment.begin(write=True) as transaction:
        for i, value in enumerate(values):
            transaction.put(str(i).encode(), value.tobytes())
        if length is not None:
            transaction.put(b"length", str(length).encode())
    environment.close()


@pytest.mark.parametrize("t_idx", [None, [0, 3], [2]], ids=str)
def test_data_of_the_official_project(t_idx: Sequence[int] | None, tmp_path: Path) -> None:
    values = np.random.default_rng(0).random((13, *STORED)).astype(np.float32)
    official(tmp_path, values, length=13)
    data = TrajectoryDataset(tmp_path, t_idx, shape=STORED)
    frames, labels = data.batch([12, 3])
    expected = values[[12, 3]].transpose(0, 2, 1, 3, 4)[:, t_idx or range(4)]
    assert len(data) == 13 and labels is None and np.array_equal(frames.numpy(), expected)
    assert data.logsnr is None and data.checksum is None
    with pytest.raises(TrajectoryError, match="no sha256"):
        data.verify()


@pytest.mark.parametrize("nested", [False, True], ids=["beside", "folder"])
def test_official_data_with_labels(nested: bool, tmp_path: Path) -> None:
    """ImageNet's: labels.npy beside the folder lmdb, and no length."""
    values = np.random.default_rng(0).random((5, *STORED)).astype(np.float32)
    official(tmp_path / "lmdb", values)
    np.save(tmp_path / "labels.npy", np.array([4, 2, 7, 1, 1], np.int32))
    data = TrajectoryDataset(tmp_path if nested else tmp_path / "lmdb", shape=STORED)
    frames, labels = data.batch(torch.tensor([2, 0]))
    assert labels is not None and labels.tolist() == [7, 4] and labels.dtype == torch.int64
    assert np.array_equal(frames.numpy(), values[[2, 0]].transpose(0, 2, 1, 3, 4))


def test_official_data_that_does_not_fit(tmp_path: Path) -> None:
    official(tmp_path, np.zeros((3, *STORED), np.float32))
    with pytest.raises(TrajectoryError, match="how many samples"):
        TrajectoryDataset(tmp_path, shape=STORED)
    np.save(tmp_path / "labels.npy", np.zeros(3))
    with pytest.raises(TrajectoryError, match="must hold integers"):
        TrajectoryDataset(tmp_path, shape=STORED)
    np.save(tmp_path / "labels.npy", np.zeros(3, np.int64))
    with pytest.raises(ValueError, match=r"give the shape \(C, F, H, W\)"):
        TrajectoryDataset(tmp_path)
    data = TrajectoryDataset(tmp_path, shape=(2, 5, 3, 3))
    with pytest.raises(TrajectoryError, match="has 72 numbers in sample 1, not 90"):
        data[1]
    with pytest.raises(ValueError, match=r"t_idx must be places in 0..3"):
        TrajectoryDataset(tmp_path, [4], STORED)
    with pytest.raises(TrajectoryError, match="holds no trajectories"):
        TrajectoryDataset(tmp_path / "nowhere", shape=STORED)


def test_labels_of_another_length(copy: Path) -> None:
    manifest = json.loads((copy / "manifest.json").read_text())
    (copy / "manifest.json").write_text(json.dumps({**manifest, "classes": [0]}))
    path = copy / "shard-00000-of-00001" / "labels.npy"
    with pytest.raises(TrajectoryError, match=r"labels.npy cannot be read"):
        TrajectoryDataset(copy)
    np.save(path, np.zeros(3, np.int64))
    with pytest.raises(TrajectoryError, match="has 20 samples, but 3 labels"):
        TrajectoryDataset(copy)


@pytest.mark.parametrize("workers", [0, 2])
def test_in_a_data_loader(workers: int, whole: Path) -> None:
    """Forked workers go on with what this process has open."""
    data = TrajectoryDataset(whole, t_idx=[0, 4])
    expected, _ = data.batch(range(COUNT))
    loader = DataLoader(data, batch_size=8, num_workers=workers, multiprocessing_context=None)
    for _ in range(2):
        assert torch.equal(torch.cat(list(loader)), expected)


def test_it_is_opened_anew_in_another_process(whole: Path) -> None:
    data = TrajectoryDataset(whole)
    expected, _ = data.batch([1, 2])
    again = pickle.loads(pickle.dumps(data))
    assert "_readers" not in vars(again)
    assert torch.equal(again.batch([1, 2])[0], expected)


def test_several_views_of_one_folder(whole: Path) -> None:
    """LMDB opens a file once in a process."""
    first, second = TrajectoryDataset(whole), TrajectoryDataset(whole, t_idx=[4])
    assert torch.equal(first[5][4:], second[5])
    del first
    assert second[6].shape == (1, *SHAPE)
