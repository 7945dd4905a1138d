"""Sampling in one evaluation: what decides a sample, and the command `sample`."""

from __future__ import annotations

import errno
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("safetensors")
pytest.importorskip("tqdm")
PIL_Image = pytest.importorskip("PIL.Image")

import dsno_kernels as dk  # noqa: E402
from dsno_kernels import commands  # noqa: E402
from dsno_kernels.sampling import files, generation  # noqa: E402
from dsno_kernels.training import images  # noqa: E402
from tests.helpers import assert_close  # noqa: E402
from tests.small_models import LOGSNR, network, write_student, write_teacher  # noqa: E402
from tests.test_capture import capture_on_the_host  # noqa: E402

# Convolutions of other batch sizes add up in another order: float32 rounding.
BATCHES = 1e-5


def test_samples_depend_on_seed_and_index_alone() -> None:
    model = network()
    whole = dk.generate(model, 10, logsnr=LOGSNR, seed=3, frames=True)
    assert whole.shape == (10, 4, 1, 8, 8)
    assert_close(
        dk.generate(model, 10, logsnr=LOGSNR, seed=3, batch=3, frames=True), whole, BATCHES
    )
    assert_close(dk.generate(model, 4, logsnr=LOGSNR, seed=3, frames=True), whole[:4], BATCHES)
    other = dk.generate(model, 10, logsnr=LOGSNR, seed=4, frames=True)
    assert (other - whole).norm() > 0.1 * whole.norm()


def test_a_sample_is_the_last_state_of_the_model() -> None:
    model = network()
    noise = generation.noise_of(model, range(5), 7)
    with torch.no_grad():
        states = model(noise, LOGSNR)
    assert_close(dk.generate(model, 5, logsnr=LOGSNR, seed=7, frames=True), states, BATCHES)
    last = dk.generate(model, 5, logsnr=LOGSNR, seed=7)
    assert states[:, -1].abs().max() > 1.0
    assert_close(last, states[:, -1].clamp(-1, 1), BATCHES)


def test_each_sample_has_its_own_noise() -> None:
    model = network()
    noise = generation.noise_of(model, range(2000), 0)
    # 1.3e5 draws: standard errors are 2.8e-3 of the mean, 2e-3 of the deviation.
    assert abs(noise.mean()) < 0.015
    assert abs(noise.std() - 1.0) < 0.01
    assert len(noise.flatten(1).unique(dim=0)) == 2000
    assert torch.equal(generation.noise_of(model, range(7, 9), 0), noise[7:9])
    assert not torch.equal(generation.noise_of(model, range(2**40, 2**40 + 2), 0), noise[:2])


def test_labels_are_gone_through_in_turn() -> None:
    model = network(classes=3)
    turns = generation.class_labels(model, None, 7)
    assert turns is not None
    assert turns.tolist() == [0, 1, 2, 0, 1, 2, 0]
    one = dk.generate(model, 4, logsnr=LOGSNR, labels=1)
    assert_close(dk.generate(model, 4, logsnr=LOGSNR, labels=[0, 1])[1::2], one[1::2], BATCHES)
    with torch.no_grad():
        noise = generation.noise_of(model, range(4), 0)
        expected = model(noise, LOGSNR, torch.tensor([1, 1, 1, 1]))[:, -1].clamp(-1, 1)
    assert_close(one, expected, BATCHES)


def test_other_times_keep_the_way_and_its_end() -> None:
    model = network()
    assert_close(generation.resampled(LOGSNR, 4, model), LOGSNR, 1e-6)
    for times in (2, 3, 8):
        expected = dk.models.logsnr_schedule(torch.linspace(1, 0, times + 1).double()[1:])
        assert_close(generation.resampled(LOGSNR, times, model), expected, 1e-5)
    # Times that are not even, as those of CIFAR-10's configuration: the old ones stay.
    uneven = dk.models.logsnr_schedule(torch.tensor([0.8, 0.4, 0.1, 0.0]))
    assert_close(generation.resampled(uneven, 8, model)[1::2], uneven, 1e-5)
    assert dk.generate(model, 2, logsnr=LOGSNR, times=8, frames=True).shape == (2, 8, 1, 8, 8)


@pytest.mark.parametrize("classes", [0, 3], ids=["unconditional", "conditional"])
def test_one_graph_serves_all_batches(classes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = network(classes)
    expected = dk.generate(model, 7, logsnr=LOGSNR)
    capture_on_the_host(monkeypatch)
    captured = dk.generate(model, 7, logsnr=LOGSNR, batch=3, cuda_graph=True)
    assert_close(captured, expected, BATCHES)


def test_autocast_is_close_and_float32() -> None:
    model = network()
    exact = dk.generate(model, 3, logsnr=LOGSNR)
    rounded = dk.generate(model, 3, logsnr=LOGSNR, precision="bf16")
    assert rounded.dtype == torch.float32
    assert not torch.equal(exact, rounded)
    assert_close(rounded, exact, 0.1)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"count": 0}, "count and batch must be at least 1, got 0"),
        ({"batch": 0}, "at least 1, got 2 and 0"),
        ({"labels": 1}, "the model has no classes"),
        ({"logsnr": None}, "pass logsnr"),
        ({"logsnr": [1.0, -1.0], "times": 3}, "must increase"),
        ({"times": 0}, "times must be at least 1"),
        ({"precision": "fp8"}, "fp32, bf16"),
        ({"seed": -1}, "seed must be in"),
        ({"device": "cpu"}, "model.to"),
        ({"cuda_graph": True}, "CUDA device"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_arguments_that_do_not_fit(options: dict[str, object], words: str) -> None:
    given = {"count": 2, "logsnr": LOGSNR, **options}
    with pytest.raises(ValueError, match=words):
        dk.generate(network(), **given)


def test_a_model_in_training_mode_is_refused() -> None:
    with pytest.raises(ValueError, match=r"model\.eval"):
        dk.generate(network().train(), 1, logsnr=LOGSNR)


@pytest.mark.parametrize("labels", [3, -1, [0, 5], [], [[0]], [0.5]], ids=str)
def test_labels_that_are_no_classes(labels: object) -> None:
    with pytest.raises(ValueError, match="labels must be"):
        generation.class_labels(network(classes=3), labels, 4)


def sample(*words: object) -> int:
    return commands.main(["sample", "--device", "cpu", *map(str, words)])


def test_a_file_knows_its_times(tmp_path: Path) -> None:
    path = write_student(tmp_path / "s.safetensors")
    assert_close(dk.generate(path, 3), dk.generate(network(), 3, logsnr=LOGSNR), BATCHES)
    dk.models.save(network(), path)
    with pytest.raises(dk.models.ModelFileError, match="pass logsnr"):
        dk.generate(path, 3)
    assert dk.generate(str(path), 3, logsnr=LOGSNR).shape == (3, 1, 8, 8)
    dk.models.save(network(), path, logsnr="[1, none]")
    with pytest.raises(dk.models.ModelFileError, match=r"list of numbers, got \[1, none\]"):
        dk.generate(path, 3)


def test_times_up_to_clean_data() -> None:
    """Log-SNR may be infinite: the network clamps it."""
    clean = torch.cat([LOGSNR[:-1], torch.tensor([torch.inf])])
    expected = dk.generate(network(), 3, logsnr=LOGSNR)
    assert_close(dk.generate(network(), 3, logsnr=clean), expected, BATCHES)
    assert_close(dk.generate(network(), 3, logsnr=clean, times=4), expected, BATCHES)


def test_npz_and_folder_come_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = write_student(tmp_path / "s.safetensors", classes=10)
    expected = dk.generate(model, 12, seed=5, labels=[3, 4])
    half_a_level = 0.5 / 127.5 + 1e-4
    for out in (tmp_path / "new" / "s.npz", tmp_path / "pictures"):
        given = ("--model", model, "--count", 12, "--batch", 5, "--seed", 5)
        assert sample(*given, "--labels", 3, 4, "--out", out) == 0
        found = images.load(out).images
        if out.is_dir():  # class by class
            expected = torch.cat([expected[::2], expected[1::2]])
            names = sorted(str(p.relative_to(out)) for p in out.rglob("*.png"))
            assert names[:2] == ["3/000000.png", "3/000002.png"]
        assert found.shape == expected.shape
        assert (found - expected).abs().max() <= half_a_level
    with np.load(tmp_path / "new" / "s.npz") as arrays:
        assert arrays["images"].dtype == np.uint8
        assert arrays["labels"].tolist() == [3, 4] * 6
    assert "12 images, one evaluation each" in capsys.readouterr().out


def test_one_picture_of_all(tmp_path: Path) -> None:
    model = write_student(tmp_path / "s.safetensors")
    assert sample("--model", model, "--count", 5, "--out", tmp_path / "g.png") == 0
    with PIL_Image.open(tmp_path / "g.png") as picture:
        assert picture.size == (3 * 33 - 1, 2 * 33 - 1)  # 8 pixels enlarged to 32, and lines
        pixels = np.asarray(picture)
    expected = files.to_bytes(dk.generate(model, 5))
    assert np.array_equal(pixels[33:65:4, 33:65:4], expected[4, ..., 0])
    assert (pixels[33:, 66:] == 255).all()  # the sixth place is empty


@pytest.mark.parametrize("where", ["strip.png", "strips"])
def test_strips_go_from_noise_to_image(where: str, tmp_path: Path) -> None:
    model = write_student(tmp_path / "s.safetensors")
    words = ("--model", model, "--count", 3, "--strip", "--times", 6)
    assert sample(*words, "--out", tmp_path / where) == 0
    file, rows = (where, 3) if where.endswith("png") else ("strips/000002.png", 1)
    with PIL_Image.open(tmp_path / file) as picture:
        assert picture.size == (7 * 33 - 1, rows * 33 - 1)
        pixels = np.asarray(picture)[-32::4]
    noise = files.to_bytes(generation.noise_of(network(), range(3), 0))
    assert np.array_equal(pixels[:, :32:4], noise[2, ..., 0])
    last = files.to_bytes(dk.generate(model, 3, times=6))
    assert np.array_equal(pixels[:, -32::4], last[2, ..., 0])


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (("--model", "none.safetensors"), "does not exist"),
        (("--model", "broken.safetensors"), "no safetensors file, or a broken one"),
        (("--model", "teacher.safetensors"), "kind 'edm_denoiser', wanted 'dsno'"),
        (("--labels", "3"), "the model has no classes"),
        (("--times", "1"), "2 modes need at least 2 times"),
        (("--out", "file/folder"), "cannot be written"),
        (("--out", "picture.jpg"), "must end in .png or .npz"),
        (("--out", "full"), "holds images already, of a run that ended or was stopped"),
        (("--model", "two.safetensors"), "a picture has 1 or 3 channels, these images have 2"),
        (("--model", "two.safetensors", "--out", "file.PNG"), "give --out FILE.npz"),
        (("--strip", "--out", "a.npz"), "--strip draws pictures"),
        (("--cuda-graph",), "CUDA device"),
        (("--seed", "-1"), "seed must be in"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_what_cannot_be_used_is_one_line(
    words: tuple[str, ...],
    error: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    write_student(Path("s.safetensors"))
    write_teacher(Path("teacher.safetensors"))
    dk.models.save(network(channels=2), "two.safetensors", logsnr=LOGSNR.tolist())
    Path("broken.safetensors").write_bytes(b"\xff" * 100)
    Path("file").write_text("x")
    Path("full").mkdir()
    PIL_Image.new("L", (8, 8)).save("full/000000.png")
    before = sorted(tmp_path.rglob("*"))
    assert sample("--model", "s.safetensors", "--count", 2, *words) == 2
    written = capsys.readouterr().err.strip().splitlines()[-1]
    assert written.startswith("sample: ")
    assert error in written
    assert sorted(tmp_path.rglob("*")) == before


def test_an_npz_holds_images_of_any_channels(tmp_path: Path) -> None:
    dk.models.save(network(channels=2), tmp_path / "two.safetensors", logsnr=LOGSNR.tolist())
    words = ("--model", tmp_path / "two.safetensors", "--count", 3)
    assert sample(*words, "--out", tmp_path / "s.npz") == 0
    with np.load(tmp_path / "s.npz") as archive:
        assert archive["images"].shape == (3, 8, 8, 2)


def test_a_full_disk_leaves_an_earlier_file_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model, out = write_student(tmp_path / "s.safetensors"), tmp_path / "s.npz"
    out.write_bytes(b"earlier")

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(np, "savez_compressed", full)
    assert sample("--model", model, "--out", out) == 2
    assert "cannot be written (No space left on device)" in capsys.readouterr().err
    assert out.read_bytes() == b"earlier"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["s.npz", "s.safetensors"]


def test_a_model_that_makes_nan_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = network()
    with torch.no_grad():
        next(model.parameters()).fill_(torch.nan)
    dk.models.save(model, tmp_path / "s.safetensors", logsnr=LOGSNR.tolist())
    assert sample("--model", tmp_path / "s.safetensors", "--out", tmp_path / "s.png") == 2
    assert "not finite" in capsys.readouterr().err
    assert not (tmp_path / "s.png").exists()
