"""Trajectories: what is written, and what is read."""

from __future__ import annotations

import json
import pickle
from collections.abc import Sequence
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
from dsno_kernels.training.trajectory_source import open_source  # noqa: E402
from tests.helpers import assert_close  # noqa: E402
from tests.trajectory_runs import (  # noqa: E402
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


def test_noise_stays_what_it_was(whole: Path) -> None:
    """A run of one version goes on with the next: this is version 0.1's."""
    frames, _ = everything(whole)
    assert frames[0, 0].flatten()[:3].tolist() == [
        -1.4844697713851929,
        0.17590153217315674,
        -0.6855161786079407,
    ]
    assert frames[19, 0].flatten()[-1].item() == -0.6955709457397461


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
    normal, scale = everything(whole)[0][:, 0], (1 + 80.0**2) ** 0.5
    assert_close(noise, normal * scale, FLOAT32)
    assert TrajectoryDataset(tmp_path).noise_scale == pytest.approx(scale)


def test_a_student_starts_from_standard_normal_noise(tmp_path: Path, whole: Path) -> None:
    """Of any process; what `sample` gives it."""
    cpu = torch.device("cpu")
    plan = SolverPlan.build(EDM(), time_grid(EDM(), 4, "karras"), "tab2", prediction="x0")
    write(tmp_path, model=lambda x, t: x / (1 + t * t), plan=plan)
    grown, states, _ = open_source(tmp_path, cpu).batch(torch.arange(COUNT))
    noise, *_ = open_source(whole, cpu).batch(torch.arange(COUNT))
    assert torch.equal(noise, everything(whole)[0][:, 0])
    assert_close(grown, noise, FLOAT32)
    assert torch.equal(states, everything(tmp_path)[0][:, 1:])


def test_a_manifest_of_the_first_version(tmp_path: Path) -> None:
    """Without the noise's scale, which was 1 then, and the solver's end, which was "full"."""
    write(tmp_path)
    path = tmp_path / "manifest.json"
    manifest = json.loads(path.read_text())
    assert manifest.pop("noise_scale") == 1.0 and manifest["plan"].pop("end") == "full"
    path.write_text(json.dumps(manifest))
    assert TrajectoryDataset(tmp_path).noise_scale == 1.0
    write(tmp_path, lambda x, t: pytest.fail("there is nothing left to do"))


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
    write(tmp_path / "guided", model, classes=[3, 0, 5], guidance=2.0, no_class=9)
    assert calls[0].tolist() == [3, 0, 5, 3, 0, 5] + [9] * 6
    guided, _ = everything(tmp_path / "guided")
    with torch.no_grad():
        wanted = diffusion.sample(
            *(denoiser, frames[:, 0], PLAN),
            kwargs={"y": labels},
            unconditional={"y": torch.full_like(labels, 9)},
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
        ({"classes": [3, -1]}, r"classes must be in 0\.\."),
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


def test_a_missing_sample(tmp_path: Path) -> None:
    official(tmp_path, np.zeros((4, *STORED), np.float32), length=5)
    data = TrajectoryDataset(tmp_path, shape=STORED)
    with pytest.raises(TrajectoryError, match="has no sample 4"):
        data[4]
    with pytest.raises(IndexError, match="index 5 is out of range for 5"):
        data[5]
