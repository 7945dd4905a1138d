"""The command `train teacher`: its loss, what it writes, and what it says to bad input."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("safetensors")
pytest.importorskip("tqdm")
pytest.importorskip("matplotlib")

import dsno_kernels as dk
from dsno_kernels import commands
from dsno_kernels.models import EDMDenoiser
from dsno_kernels.training.images import Images
from dsno_kernels.training.teacher import P_MEAN, P_STD, TeacherTask
from tests.helpers import assert_close

# Sums of float32.
LOSS = 1e-5
# Much noise, where only the class tells the images apart.
LEARNING = "--steps 80 --warm-up 5 --learning-rate 5e-3"
QUICK = "--device cpu --batch 8 --channel-mult 1 --embedding 32 --learning-rate 1e-3"


class Wrong(nn.Module):
    """A denoiser that is off by its argument everywhere."""

    def __init__(self, off: float) -> None:
        super().__init__()
        self.off = off

    def forward(self, x: Tensor, sigma: Tensor, y: Tensor | None) -> Tensor:
        self.seen = x, sigma, y
        return x * 0.0 + self.off


def two_images() -> Images:
    images = torch.stack([torch.zeros(1, 2, 2), torch.ones(1, 2, 2)])
    return Images(images, torch.tensor([3, 5]))


def test_the_loss_is_that_of_edm() -> None:
    task = TeacherTask(two_images(), sigma_data=0.5)
    part = {
        "index": torch.tensor([0, 1, 1]),
        "sigma": torch.tensor([0.1, 1.0, 7.0]),
        "noise_seed": torch.tensor([5, 6, 5]),
        "told": torch.tensor([True, True, True]),
    }
    model = Wrong(0.25)
    expected = 0.0
    for error, sigma in zip((0.25, 0.75, 0.75), (0.1, 1.0, 7.0), strict=True):
        expected += (sigma**2 + 0.25) / (sigma * 0.5) ** 2 * error**2 / 3
    assert_close(task.loss(model, part), torch.tensor(expected), LOSS)
    x, sigma, y = model.seen
    clean = torch.tensor([0.0, 1.0, 1.0])[:, None, None, None]
    noise = [torch.randn(1, 2, 2, generator=torch.Generator().manual_seed(i)) for i in (5, 6, 5)]
    assert_close(x, clean + sigma[:, None, None, None] * torch.stack(noise), LOSS)
    assert y is None


def test_a_conditional_task_tells_the_class_of_the_image() -> None:
    task, model = TeacherTask(two_images(), 0.5, conditional=True), Wrong(0.0)
    part = task.draw(torch.Generator().manual_seed(0), 16)
    task.loss(model, part)
    assert model.seen[2].tolist() == [[3, 5][i] for i in part["index"].tolist()]
    assert set(part["index"].tolist()) == {0, 1}
    task = TeacherTask(two_images(), 0.5, conditional=True, drop_classes=0.25)
    task.loss(model, task.draw(torch.Generator().manual_seed(0), 400))
    assert 70 <= model.seen[2].eq(-1).sum() <= 130


def test_noise_levels_are_log_normal() -> None:
    task = TeacherTask(two_images(), 0.5)
    drawn = [task.draw(torch.Generator().manual_seed(i), 512) for i in range(4)]
    level = torch.cat([part["sigma"] for part in drawn]).log().double()
    # Evenly spread quantiles: their mean and deviation are those of the distribution to 1 / 512.
    assert level.mean().item() == pytest.approx(P_MEAN, abs=0.02)
    assert level.std().item() == pytest.approx(P_STD, abs=0.02)
    within = (level.sub(P_MEAN).abs() < P_STD).double().mean().item()
    assert within == pytest.approx(math.erf(math.sqrt(0.5)), abs=0.01)
    assert not torch.equal(drawn[0]["sigma"], drawn[1]["sigma"])
    assert len(set(drawn[0]["noise_seed"].tolist())) == 512


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Images of two colors, each with its class."""
    labels = np.arange(12) % 2
    noise = np.random.default_rng(0).integers(0, 40, (12, 4, 4), dtype=np.uint8)
    pixels = noise + 200 * labels[:, None, None].astype(np.uint8)
    np.savez(tmp_path / "images.npz", images=pixels, labels=labels)
    return tmp_path / "images.npz"


def train(data: Path, out: Path, more: str = "") -> int:
    command = f"train teacher --data {data} --out {out} {QUICK} {more}"
    return commands.main(command.split())


def test_the_command_writes_a_denoiser(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert train(data, out, f"--conditional {LEARNING} --seed 4") == 0
    assert sorted(path.name for path in out.iterdir()) == [
        "checkpoint.safetensors",
        "loss.csv",
        "loss.png",
        "teacher.safetensors",
    ]
    assert f"Wrote {out / 'teacher.safetensors'}" in capsys.readouterr().out
    teacher = dk.models.load(out / "teacher.safetensors", kind="edm_denoiser")
    assert isinstance(teacher, EDMDenoiser)
    with np.load(data) as file:
        images = torch.from_numpy(file["images"]).float() / 127.5 - 1.0
    assert teacher.sigma_data == pytest.approx(images.std().item(), rel=1e-5)
    provenance = json.loads(dk.models.read_metadata(out / "teacher.safetensors")["provenance"])
    assert (provenance["seed"], provenance["steps"]) == (4, 80)
    assert str(data) in provenance["data"]
    # It has learned what the class says: at much noise, the mean of the class.
    noise = 3.0 * torch.randn(64, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    means = [teacher(noise, 3.0, torch.full((64,), y)).mean().item() for y in (0, 1)]
    expected = [images[y::2].mean().item() for y in (0, 1)]
    assert means[1] - means[0] == pytest.approx(expected[1] - expected[0], rel=0.4)


def test_the_command_continues_and_refuses_other_data(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert train(data, out, "--decay constant --steps 2") == 0
    assert train(data, out, "--decay constant --steps 3") == 0
    whole = tmp_path / "whole"
    assert train(data, whole, "--decay constant --steps 3") == 0
    assert (out / "loss.csv").read_text() == (whole / "loss.csv").read_text()
    capsys.readouterr()
    assert train(data, out, "--decay constant --steps 3 --sigma-data 0.4") == 2
    assert "sigma_data was" in capsys.readouterr().err
    np.savez(data, images=np.zeros((3, 4, 4), np.uint8))
    assert train(data, out, "--decay constant --steps 3 --sigma-data 0.5") == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("train teacher: ") and "is of another run: data was" in error
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ("--steps 0", "--steps must be at least 1, got 0"),
        ("--channels 33", "these options make no network: channels must be a multiple of 32"),
        ("--sigma-data 0", "--sigma-data must be positive, got 0.0"),
        ("--drop-classes 1", "--drop-classes must be in [0, 1), got 1.0"),
        ("--drop-classes 0.5", "--drop-classes needs classes; give --conditional"),
        ("--p-std 0", "--p-std must be positive, got 0.0"),
        ("--size 8", "--size 8 resizes a folder of images"),
        ("--warm-up -1", "--warm-up must be at least 0, got -1"),
    ],
    ids=lambda value: value.split()[0],
)
def test_bad_options_are_one_line(
    options: str, match: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(data, tmp_path / "out", options) == 2
    error = capsys.readouterr().err.strip()
    assert match in error and len(error.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_the_file_says_whether_classes_were_dropped(data: Path, tmp_path: Path) -> None:
    """Which guidance needs."""
    assert train(data, tmp_path, "--conditional --drop-classes 0.25 --steps 1") == 0
    metadata = dk.models.read_metadata(tmp_path / "teacher.safetensors")
    assert float(metadata["drop_classes"]) == 0.25


def test_classes_that_the_data_do_not_have(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.savez(data, images=np.zeros((3, 4, 4), np.uint8))
    assert train(data, tmp_path / "out", "--conditional --sigma-data 0.5") == 2
    assert "--conditional needs classes" in capsys.readouterr().err


def test_labels_that_are_no_numbers_of_classes(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = np.random.default_rng(0).integers(0, 256, (3, 4, 4), dtype=np.uint8)
    np.savez(data, images=images, labels=np.array([0, 1, 39 * 10**9]))
    assert train(data, tmp_path / "out", "--conditional") == 2
    error = capsys.readouterr().err
    assert "has a label 39000000000: that" in error and "number them from 0" in error


def test_images_that_are_all_the_same(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.savez(data, images=np.zeros((3, 4, 4), np.uint8))
    assert train(data, tmp_path / "out") == 2
    assert "give --sigma-data" in capsys.readouterr().err
