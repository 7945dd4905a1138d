"""`train dsno` from a folder of trajectories to a model file, alone and with two processes."""

from __future__ import annotations

import argparse
import csv
import json
import multiprocessing
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("lmdb")
pytest.importorskip("safetensors")
pytest.importorskip("tqdm")
pytest.importorskip("matplotlib")

import lmdb

import dsno_kernels as dk
from dsno_kernels import commands
from dsno_kernels.models import read_metadata
from dsno_kernels.training import student, trajectory_source
from dsno_kernels.training.trajectories import TrajectoryDataset, write_trajectories
from dsno_kernels.training.trajectory_loss import StudentTask
from dsno_kernels.training.trajectory_source import Source, open_source
from tests import ranks, small_models

# Two processes add the gradient of a batch in another order; a few updates of Adam amplify that.
ORDER = 1e-4
COUNT, STATES = 24, 4
CPU = torch.device("cpu")
NETWORK = ("--channel-mult", "1", "--embedding", "32")
SHORT = ("--steps", "4", "--batch", "8", "--warm-up", "2", "--checkpoint-every", "2")


def write(folder: Path, size: int = 8, classes: int = 0) -> Path:
    """Trajectories of the exact denoiser of a few random images."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(6, 1, size, size, generator=generator) * 2 - 1
    labels = torch.arange(6) % classes if classes else None
    process = dk.diffusion.VPCosine()
    grid = dk.diffusion.time_grid(process, 8)
    plan = dk.diffusion.SolverPlan.build(process, grid, "tab2", prediction="x0")
    model = dk.diffusion.for_process(dk.diffusion.ExactDenoiser(images, labels), process)
    options: dict[str, Any] = {"classes": range(classes)} if classes else {}
    folder.mkdir(parents=True, exist_ok=True)
    write_trajectories(folder, model, plan, count=COUNT, shape=(1, size, size), **options)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("data") / "plain")


@pytest.fixture(scope="module")
def labeled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("data") / "labeled", classes=3)


def words(data: Path, out: Path, *more: str) -> list[str]:
    """The command line of a run of a few steps on the CPU."""
    places = ["--trajectories", str(data), "--out", str(out)]
    return ["train", "dsno", *places, *SHORT, "--device", "cpu", *more]


def train(data: Path, out: Path, *more: str) -> list[float]:
    """Run the command; the losses."""
    assert commands.main(words(data, out, *more)) == 0
    return losses(out)


def losses(out: Path) -> list[float]:
    with open(out / "loss.csv", newline="") as file:
        return [float(row["loss"]) for row in csv.DictReader(file)]


def arguments(line: list[str]) -> argparse.Namespace:
    return commands.parser().parse_args(line)


def refused(capsys: pytest.CaptureFixture[str], line: list[str]) -> str:
    """The one line with which the command ends, after its progress bar."""
    capsys.readouterr()
    assert commands.main(line) == 2
    *before, error = capsys.readouterr().err.strip().splitlines()
    assert error.startswith("train dsno: ") and all(line.startswith("training:") for line in before)
    return error


def test_the_command_writes_a_model_that_says_what_it_is(data: Path, tmp_path: Path) -> None:
    found = train(data, tmp_path, *NETWORK, "--seed", "3")
    assert len(found) == 4 and np.isfinite(found).all()
    model = dk.models.load(tmp_path / student.NAME)
    metadata = read_metadata(tmp_path / student.NAME)
    source = open_source(data, CPU)
    assert json.loads(metadata["logsnr"]) == source.logsnr.tolist() and len(source.logsnr) == STATES
    provenance = json.loads(metadata["provenance"])
    assert provenance["seed"] == 3 and provenance["steps"] == 4
    assert source.checksum and source.checksum in provenance["data"]
    assert model.config.time_conv and model.config.image_size == 8
    noise, states, _ = source.batch(torch.arange(2))
    assert model(noise, source.logsnr).shape == states.shape
    assert (tmp_path / "loss.png").stat().st_size > 1000


def test_training_lowers_the_loss(data: Path, tmp_path: Path) -> None:
    more = ("--steps", "40", "--learning-rate", "3e-3", "--weight-limit", "2")
    found = train(data, tmp_path, *NETWORK, *more)
    assert np.mean(found[-8:]) < 0.7 * np.mean(found[:4])


def test_half_precision_halves_the_file_and_loads_as_float32(data: Path, tmp_path: Path) -> None:
    for dtype in ("float32", "float16"):
        train(data, tmp_path / dtype, *NETWORK, "--save-dtype", dtype)
    paths = [tmp_path / dtype / student.NAME for dtype in ("float32", "float16")]
    assert paths[1].stat().st_size < 0.55 * paths[0].stat().st_size
    whole, half = (dk.models.load(path).state_dict() for path in paths)
    assert all(torch.equal(half[k], v.half().float()) for k, v in whole.items())


def test_the_ablation_has_no_temporal_layers(data: Path, tmp_path: Path) -> None:
    train(data, tmp_path, *NETWORK, "--no-temporal")
    model = dk.models.load(tmp_path / student.NAME)
    assert not model.config.time_conv
    assert not any("t_conv" in name for name in model.state_dict())


def test_plain_pytorch_learns_the_same(data: Path, tmp_path: Path) -> None:
    ours = train(data, tmp_path / "a", *NETWORK)
    assert train(data, tmp_path / "b", *NETWORK, "--no-kernels") == pytest.approx(ours, rel=ORDER)


def test_a_teacher_brings_network_and_weights(
    labeled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher = small_models.write_teacher(tmp_path / "teacher.safetensors", classes=3)
    more = ("--teacher", str(teacher), "--learning-rate", "1e-9")
    train(labeled, tmp_path / "out", *more)
    weights = dk.models.load(teacher).network.state_dict()
    made = dk.models.load(tmp_path / "out" / student.NAME)
    assert made.config.num_classes == 3 and made.config.time_conv
    temporal = sum("t_conv" in name for name in made.state_dict())
    said = f"{len(weights)} weights are the teacher's, {temporal} start anew"
    assert temporal > 0 and said in capsys.readouterr().out
    assert torch.allclose(
        made.state_dict()["all_modules.3.weight"], weights["all_modules.3.weight"], atol=1e-6
    )
    line = words(labeled, tmp_path / "b", *more, "--channels", "64")
    assert "--channels does not go with --teacher" in refused(capsys, line)


def test_a_stopped_run_continues_to_the_bit(data: Path, tmp_path: Path) -> None:
    options = (*NETWORK, "--decay", "constant")
    whole = train(data, tmp_path / "whole", *options)
    train(data, tmp_path / "halves", *options, "--steps", "2")
    assert train(data, tmp_path / "halves", *options) == whole
    first, second = (
        dk.models.load(tmp_path / name / student.NAME).state_dict() for name in ("whole", "halves")
    )
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_checkpoint_of_other_trajectories_is_refused(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(data, tmp_path / "out", *NETWORK)
    other = write(tmp_path / "other", classes=3)
    error = refused(capsys, words(other, tmp_path / "out", *NETWORK))
    assert "checkpoint.safetensors is of another run: config" in error
    error = refused(capsys, words(data, tmp_path / "out", *NETWORK, "--loss", "l2"))
    assert "loss was 'l1', now it is 'l2'" in error


def in_group(lines: list[list[str]]) -> list[list[float]]:
    """What each of several processes runs."""
    found = []
    for line in lines:
        parsed = arguments(line)
        student.train(parsed, CPU)
        found.append(losses(parsed.out))
    return found


def test_two_processes_have_the_loss_of_one(labeled: Path, tmp_path: Path) -> None:
    """DDP and FSDP2, in parts and with recomputed activations; and the same weights come out."""
    kinds = ("ddp", "fsdp")
    more = ("--accumulate", "2", "--activation-checkpointing")
    lines = [words(labeled, tmp_path / k, *NETWORK, *more, "--parallel", k) for k in kinds]
    found = ranks.run(in_group, tmp_path, lines)
    alone = train(labeled, tmp_path / "one", *NETWORK)
    expected = dk.models.load(tmp_path / "one" / student.NAME).state_dict()
    for i, kind in enumerate(kinds):
        assert found[0][i] == found[1][i] == pytest.approx(alone, rel=ORDER)
        made = dk.models.load(tmp_path / kind / student.NAME).state_dict()
        difference = max(float((made[name] - expected[name]).abs().max()) for name in expected)
        assert difference < 1e-4  # a tenth of a step of the learning rate


def test_bfloat16_stays_close(data: Path, tmp_path: Path) -> None:
    exact = train(data, tmp_path / "a", *NETWORK)
    found = train(data, tmp_path / "b", *NETWORK, "--precision", "bf16")
    assert found != exact and found == pytest.approx(exact, rel=3e-2)


def official(folder: Path, data: Path) -> tuple[Path, tuple[str, ...]]:
    """The same trajectories as one LMDB of the official project, and the options it needs."""
    shard = data / "shard-00000-of-00001"
    folder.mkdir()
    shutil.copy(shard / "data.mdb", folder)
    if (shard / "labels.npy").exists():
        shutil.copy(shard / "labels.npy", folder)
    logsnr = [str(value) for value in open_source(data, CPU).logsnr.tolist()]
    return folder, ("--shape", "1", str(1 + STATES), "8", "8", "--logsnr", *logsnr)


def test_a_file_of_the_official_project_is_learned_from(labeled: Path, tmp_path: Path) -> None:
    path, options = official(tmp_path / "official", labeled)
    expected = train(labeled, tmp_path / "a", *NETWORK)
    assert train(path, tmp_path / "b", *NETWORK, *options) == expected


def test_a_disk_that_is_full_at_the_end_costs_nothing(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(student.files, "save", full)
        error = refused(capsys, words(data, tmp_path, *NETWORK))
    assert "dsno.safetensors cannot be written (No space left on device)" in error
    before = losses(tmp_path)
    assert train(data, tmp_path, *NETWORK) == before and (tmp_path / student.NAME).exists()


def test_states_are_chosen_by_their_place(data: Path, tmp_path: Path) -> None:
    """With or without the noise, which is always read."""
    index = torch.arange(5)
    noise, states, _ = open_source(data, CPU).batch(index)
    for t_idx in ([0, 2, 4], [2, 4]):
        source = open_source(data, CPU, t_idx=t_idx)
        few = source.batch(index)
        assert torch.equal(few[0], noise) and torch.equal(few[1], states[:, [1, 3]])
        assert torch.equal(source.logsnr, open_source(data, CPU).logsnr[[1, 3]])
    train(data, tmp_path, *NETWORK, "--t-idx", "2", "4")
    assert len(json.loads(read_metadata(tmp_path / student.NAME)["logsnr"])) == 2


def test_a_loss_that_is_not_finite_ends_with_the_last_good_checkpoint(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, options = official(tmp_path / "official", data)
    out, options = tmp_path / "out", (*NETWORK, *options, "--decay", "constant")
    train(path, out, *options, "--steps", "2")
    nan, _ = official(tmp_path / "nan", data)
    with lmdb.open(str(nan)) as environment, environment.begin(write=True) as transaction:
        for i in range(COUNT):
            transaction.put(b"%d" % i, np.full((1 + STATES) * 64, np.nan, np.float32).tobytes())
    error = refused(capsys, words(nan, out, *options))
    assert "the loss of update 3 is not finite; the checkpoint of step 2 is in" in error


def test_trajectories_that_do_not_fit_are_one_sentence(
    data: Path, labeled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = str(small_models.write_teacher(tmp_path / "plain.safetensors"))
    classes = str(small_models.write_teacher(tmp_path / "classes.safetensors", classes=2))
    small, (single, options) = write(tmp_path / "small", size=4), official(tmp_path / "lmdb", data)
    cut = shutil.copytree(data, tmp_path / "cut")
    mdb = cut / "shard-00000-of-00001" / "data.mdb"
    mdb.write_bytes(mdb.read_bytes()[:20_000])
    cases = [
        (small, ["--teacher", plain], r"images of shape (1, 4, 4)", "takes (1, 8, 8)"),
        (labeled, ["--teacher", plain], "holds labels up to 2", "has 0 classes"),
        (labeled, ["--teacher", classes], "holds labels up to 2", "has 2 classes"),
        (data, ["--teacher", classes], "holds no labels", "has 2 classes"),
        (data, ["--modes", "4"], "--modes 4 needs at least 6 states", "ask for at most 3"),
        (data, ["--t-idx", "3", "2"], "--t-idx must be increasing places", "[3, 2]"),
        (data, ["--t-idx", "9"], "t_idx must be places in 0..4", "9"),
        (data, ["--logsnr", "1", "2", "3", "4"], "--logsnr is for an LMDB without", "its own"),
        (data, ["--weight-limit", "0.5"], "--weight-limit must be at least 1", "0.5"),
        (data, ["--batch", "9", "--accumulate", "2"], "--batch 9 does not divide", "2"),
        (data, ["--teacher", "none.safetensors"], "none.safetensors does not exist", ""),
        (data, ["--channels", "40"], "make no network", "multiple of 32"),
        (single, [], "give the shape (C, F, H, W)", ""),
        (single, [*options[:5]], "--logsnr needs a number for each of the 4", "got none"),
        (single, [*options[:7]], "--logsnr needs a number for each of the 4", "got 1"),
        (single, [*options[:6], "1", "2", "nan", "4"], "--logsnr must be numbers that", "nan"),
        (single, [*options[:6], "1", "2", "4", "3"], "--logsnr must be numbers that", "[1.0, "),
        (tmp_path / "nothing", [], "holds no trajectories", "manifest.json"),
        (cut, [], "is damaged", "data.mdb"),
    ]
    for path, more, *parts in cases:
        error = refused(capsys, words(path, tmp_path / "out", *more))
        assert all(part in error for part in parts), error
    assert not (tmp_path / "out").exists()


def test_changed_values_are_not_learned(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are compared with their checksums where all are read, or when that is asked for."""
    copy = Path(shutil.copytree(data, tmp_path / "copy"))
    with (
        lmdb.open(str(copy / "shard-00000-of-00001")) as environment,
        environment.begin(write=True) as transaction,
    ):
        transaction.put(b"3", np.ones((1 + STATES) * 64, np.float32).tobytes())
    line = words(copy, tmp_path / "out", *NETWORK)
    assert "do not have the checksum" in refused(capsys, line)
    monkeypatch.setattr(trajectory_source, "HELD", 0)
    assert "do not have the checksum" in refused(capsys, [*line, "--verify"])
    assert not (tmp_path / "out").exists()
    single, options = official(tmp_path / "official", data)
    error = refused(capsys, words(single, tmp_path / "out", *NETWORK, *options, "--verify"))
    assert "has no sha256.txt to compare with" in error


def hold_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """All trajectories are too large to be held."""
    monkeypatch.setattr(Source.__init__, "__defaults__", (0,))


@pytest.mark.parametrize("more", [[], ["--accumulate", "2"]], ids=["whole", "accumulate"])
def test_a_large_set_is_read_ahead_by_another_process(
    more: list[str], labeled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also after an interruption; signals do not end that process before its time."""
    expected = train(labeled, tmp_path / "held", *NETWORK, *more, "--decay", "constant")
    hold_nothing(monkeypatch)
    batch, loss, read, asked = TrajectoryDataset.batch, StudentTask.loss, [], []
    ranks.processes()  # imports what the other process needs

    def noted_batch(dataset: TrajectoryDataset, index: Any) -> Any:
        read.append(index)
        return batch(dataset, index)

    def noted_loss(*words: Any) -> torch.Tensor:
        value = loss(*words)
        asked.append(value)
        (reader,) = multiprocessing.active_children()
        for number in (signal.SIGINT, signal.SIGTERM):
            os.kill(reader.pid or 0, number)
        return value

    monkeypatch.setattr(TrajectoryDataset, "batch", noted_batch)
    monkeypatch.setattr(StudentTask, "loss", noted_loss)
    options = (*NETWORK, *more, "--decay", "constant")
    train(labeled, tmp_path / "read", *options, "--steps", "2")
    assert train(labeled, tmp_path / "read", *options) == expected
    assert len(asked) == 4 * (1 + len(more) // 2) and not read
    assert not multiprocessing.active_children()


def test_damage_that_shows_during_the_training_is_one_sentence(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A value that is gone from a data set too large to be held."""
    path, options = official(tmp_path / "official", data)
    with lmdb.open(str(path)) as environment, environment.begin(write=True) as transaction:
        for i in range(0, COUNT, 2):
            transaction.delete(b"%d" % i)
    hold_nothing(monkeypatch)
    assert "it has no sample" in refused(capsys, words(path, tmp_path / "out", *NETWORK, *options))
