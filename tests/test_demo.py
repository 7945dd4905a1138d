"""The demo: its mathematics, what it accepts, and how it fails."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("tqdm")
pytest.importorskip("matplotlib")
PIL_Image = pytest.importorskip("PIL.Image")

from dsno_kernels import commands, demo  # noqa: E402
from dsno_kernels.demo import compare, figure, student, teacher  # noqa: E402
from dsno_kernels.demo import steps as demo_steps  # noqa: E402
from dsno_kernels.diffusion import (  # noqa: E402
    ExactDenoiser,
    SolverPlan,
    for_process,
    sample,
    time_grid,
)
from dsno_kernels.models import logsnr_schedule  # noqa: E402
from dsno_kernels.training import images as data  # noqa: E402
from tests.helpers import FLOAT64, assert_close  # noqa: E402


def test_the_schedule_is_that_of_dsno() -> None:
    assert_close(
        2 * teacher.PROCESS.log_snr(teacher.plan(10).grid),
        logsnr_schedule(torch.linspace(1, 0, 11, dtype=torch.float64)),
        1e-9,  # the tangent of an angle next to pi / 2
    )


def test_teacher_reaches_the_images_that_many_steps_reach() -> None:
    """The default number of steps, against 10 times as many of order 1."""
    images = data.digits().images[:200]
    noise = torch.randn(64, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    frames, _ = teacher.trajectories(noise, images, steps=demo_steps.TEACHER_STEPS, frames=4)
    model = for_process(ExactDenoiser(images), teacher.PROCESS)
    fine = SolverPlan.build(
        teacher.PROCESS, time_grid(teacher.PROCESS, 480), "tab1", prediction="x0"
    )
    assert_close(frames, sample(model, noise, fine, frames=[120, 240, 360, 480]), 0.01)


def test_trajectory_of_one_image_is_the_straight_mixture() -> None:
    """With one image D(x) is that image, and DEIS keeps x_t = alpha x_0 + sigma noise exactly."""
    generator = torch.Generator().manual_seed(2)
    image = torch.randn(1, 3, 2, 2, generator=generator).double()
    noise = torch.randn(5, 3, 2, 2, generator=generator).double()
    start = logsnr_schedule(torch.tensor(1.0).double())
    frames, logsnr = teacher.trajectories(noise, image, steps=8, frames=4, batch=2)
    assert frames.shape == (5, 4, 3, 2, 2)
    eps = (noise - torch.sigmoid(start).sqrt() * image) / torch.sigmoid(-start).sqrt()
    for i in range(4):
        expected = torch.sigmoid(logsnr[i]).sqrt() * image + torch.sigmoid(-logsnr[i]).sqrt() * eps
        assert_close(frames[:, i], expected, FLOAT64)


def test_frechet_distance_of_shifted_normals() -> None:
    x = torch.randn(500, 4, generator=torch.Generator().manual_seed(3))
    assert compare.frechet_distance(x, x) == pytest.approx(0.0, abs=1e-9)
    assert compare.frechet_distance(x + 2.0, x) == pytest.approx(16.0, rel=1e-6)
    assert compare.frechet_distance(3.0 * x, x) == pytest.approx(
        4.0 * x.var(0).sum().item() + (2.0 * x.mean(0)).square().sum().item(), rel=1e-5
    )


def test_saved_bytes_counts_a_storage_once() -> None:
    x = torch.randn(10, requires_grad=True)
    assert compare.saved_bytes(lambda: x * x) == 40
    assert compare.saved_bytes(lambda: x + 1) == 0


def test_peak_bytes_sees_a_temporary() -> None:
    x = torch.randn(1 << 16)
    peak = compare.peak_bytes(lambda: (x + 1).sum(), torch.device("cpu"))
    assert 4 << 16 <= peak < 6 << 16


@pytest.mark.parametrize("kind", ["missing", "empty", "file", "broken"])
def test_bad_data_is_one_line_and_exit_code_2(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "given"
    if kind == "file":
        path.write_text("x")
    elif kind != "missing":
        path.mkdir()
    if kind == "broken":
        (path / "a.png").write_bytes(b"x")
    assert commands.main(["demo", "--data", str(path), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert str(path) in error[-1]
    assert ".png" in error[-1]
    assert len([line for line in error if "warning" not in line]) == 1


def test_out_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("x")
    assert commands.main(["demo", "--out", str(tmp_path / "file")]) == 2
    assert "--out" in capsys.readouterr().err


def test_missing_extra_names_the_install_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(demo._EXTRAS, "no_such_module_here", "some-package")
    assert commands.main(["demo"]) == 2
    error = capsys.readouterr().err
    assert "some-package" in error
    assert "pip install dsno-kernels[demo]" in error


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here")
def test_cuda_where_there_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert commands.main(["demo", "--device", "cuda", "--out", str(tmp_path)]) == 2
    assert "--device cpu" in capsys.readouterr().err


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything small enough for a test."""
    monkeypatch.setattr(compare, "LAYER_SHAPE", (2, 4, 32, 4, 4))
    monkeypatch.setattr(compare, "ROUNDS", 1)
    monkeypatch.setattr(student, "BATCH", 4)
    monkeypatch.setattr(demo_steps, "HELD_OUT", 8)
    monkeypatch.setattr(demo_steps, "TEACHER_STEPS", 8)
    few = data.Images(data.digits().images[:50], None)
    monkeypatch.setattr(data, "digits", lambda: few)
    monkeypatch.setattr(figure, "COLUMNS", 4)


@pytest.mark.usefixtures("quick")
def test_demo_writes_its_picture_and_its_numbers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = []
    for name in ("one", "two"):
        arguments = [
            "--steps",
            "2",
            "--seed",
            "5",
            "--out",
            str(tmp_path / name),
            "--device",
            "cpu",
        ]
        assert commands.main(["demo", *arguments]) == 0
        assert sorted(p.name for p in (tmp_path / name).iterdir()) == ["demo.json", "demo.png"]
        results.append(json.loads((tmp_path / name / "demo.json").read_text()))
    with PIL_Image.open(tmp_path / "one" / "demo.png") as picture:
        assert picture.size[0] > 1000
    samples, same, layer, training = results[0].values()
    assert results[1]["Samples (8 new noises)"] == samples  # a seed gives the same samples
    assert all(float(row["first"]) < 1e-6 for row in same)
    assert [row["name"] for row in layer][:2] == ["forward", "forward + backward"]
    assert [row["name"] for row in training] == ["time", "kept for backward", "peak"]
    assert "Temporal layer" in capsys.readouterr().out


@pytest.mark.usefixtures("quick")
def test_demo_on_own_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "pictures").mkdir()
    for i in range(6):
        pixels = np.random.default_rng(i).integers(0, 256, (17 + i, 23, 3), dtype=np.uint8)
        PIL_Image.fromarray(pixels).save(tmp_path / "pictures" / f"{i}.png")
    arguments = ["--data", str(tmp_path / "pictures"), "--steps", "1", "--size", "16"]
    arguments += ["--out", str(tmp_path)]
    assert commands.main(["demo", *arguments, "--device", "cpu"]) == 0
    assert "6 images" in capsys.readouterr().out


@pytest.mark.usefixtures("quick")
def test_interrupt_leaves_an_earlier_result_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    (tmp_path / "demo.png").write_bytes(b"earlier")
    monkeypatch.setattr(student, "train", interrupt)
    assert commands.main(["demo", "--steps", "1", "--out", str(tmp_path), "--device", "cpu"]) == 130
    assert (tmp_path / "demo.png").read_bytes() == b"earlier"
    assert [p.name for p in tmp_path.iterdir()] == ["demo.png"]
    error = capsys.readouterr().err
    assert error.splitlines()[-1] == "demo: interrupted"
    assert "Traceback" not in error
