"""Real images to learn from: what is read from digits, folders and archives, and what is not."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn")
PIL_Image = pytest.importorskip("PIL.Image")

from dsno_kernels.training import images  # noqa: E402
from dsno_kernels.training.errors import CommandError  # noqa: E402
from tests.helpers import assert_close  # noqa: E402


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """One image of each kind that people have, and one file that is no image."""
    folder = tmp_path / "pictures"
    (folder / "deeper").mkdir(parents=True)
    gray = np.arange(30 * 20, dtype=np.uint8).reshape(30, 20)
    color = np.random.default_rng(0).integers(0, 256, (17, 23, 3), dtype=np.uint8)
    PIL_Image.fromarray(gray).save(folder / "gray.png")
    PIL_Image.fromarray(gray.astype(np.uint16) * 257).save(folder / "sixteen bits.PNG")
    PIL_Image.fromarray(color).save(folder / "color.jpg")
    PIL_Image.fromarray(color).convert("CMYK").save(folder / "print.jpeg")
    PIL_Image.fromarray(color).convert("P").save(folder / "palette.png")
    PIL_Image.new("RGBA", (40, 3), (255, 0, 0, 0)).save(folder / "deeper" / "clear.png")
    (folder / "broken.png").write_bytes(b"no image")
    (folder / "notes.txt").write_text("ignored")
    return folder


def test_folder_reads_every_kind_and_skips_the_broken(
    pictures: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        found, labels = images.folder(pictures, 8)
    assert found.shape == (6, 3, 8, 8)
    assert labels is None
    assert found.min() >= -1.0
    assert found.max() <= 1.0
    assert "broken.png" in caplog.text
    names = sorted(p for p in pictures.rglob("*") if p.suffix.lower() in images.SUFFIXES)
    names = [p.name for p in names if p.name != "broken.png"]
    assert found[names.index("clear.png")].eq(1.0).all()  # transparent is white
    assert_close(found[names.index("sixteen bits.PNG")], found[names.index("gray.png")], 0.01)


def test_classes_are_those_of_a_folder() -> None:
    with pytest.raises(CommandError, match=r"--classes is for a folder .* digits is none"):
        images.load("digits", classes=True)


def test_folder_of_gray_images_has_one_channel(tmp_path: Path) -> None:
    PIL_Image.new("L", (9, 9), 0).save(tmp_path / "a.png")
    PIL_Image.new("RGB", (5, 7), (255, 255, 255)).save(tmp_path / "b.png")
    found = images.folder(tmp_path, 16).images
    assert found.shape == (2, 1, 16, 16)
    assert found[0].eq(-1.0).all()
    assert found[1].eq(1.0).all()


def test_folder_of_one_size_needs_none(tmp_path: Path) -> None:
    pixels = np.arange(16, dtype=np.uint8).reshape(4, 4)
    PIL_Image.fromarray(pixels).save(tmp_path / "a.png")
    found = images.load(tmp_path).images
    assert torch.equal(found, torch.from_numpy(pixels)[None, None] / 127.5 - 1.0)
    PIL_Image.fromarray(pixels[:3, :3]).save(tmp_path / "b.png")
    with pytest.raises(CommandError, match=r"b\.png has 3x3 pixels.*a\.png has 4x4.*give --size"):
        images.load(tmp_path)
    assert images.load(tmp_path, size=2).images.shape == (2, 1, 2, 2)
    (tmp_path / "a.png").unlink()
    PIL_Image.fromarray(pixels[:3]).save(tmp_path / "b.png")
    with pytest.raises(CommandError, match=r"4x3 pixels.*must be squares"):
        images.load(tmp_path)


def test_folder_beyond_the_limit_is_thinned_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for i in range(6):
        PIL_Image.new("L", (2, 2), 40 * i).save(tmp_path / f"{i}.png")
    found = images.folder(tmp_path, limit=3).images
    assert torch.equal(found[:, 0, 0, 0], torch.tensor([0.0, 80.0, 160.0]) / 127.5 - 1.0)
    assert "6 images found; 3 of them" in caplog.text


def test_subfolders_are_classes(tmp_path: Path) -> None:
    for name, count in (("cat", 2), ("ant", 1), ("bee", 3)):
        (tmp_path / name / "deeper").mkdir(parents=True)
        for i in range(count):
            PIL_Image.new("L", (2, 2)).save(tmp_path / name / "deeper" / f"{i}.png")
    labels = images.load(tmp_path, classes=True).labels
    assert labels is not None and labels.tolist() == [0, 1, 1, 1, 2, 2]
    assert labels.dtype == torch.int64
    PIL_Image.new("L", (2, 2)).save(tmp_path / "stray.png")
    with pytest.raises(CommandError, match=r"stray\.png is in none of the subfolders"):
        images.load(tmp_path, classes=True)


def test_digits_fill_the_range() -> None:
    found, labels = images.load("digits")
    assert found.shape == (1797, 1, 8, 8)
    assert (found.min(), found.max()) == (-1.0, 1.0)
    assert labels is not None and labels.bincount().min() > 170
    with pytest.raises(CommandError, match=r"--size 16.*digits have 8 pixels"):
        images.load("digits", size=16)


def test_fingerprint_tells_data_apart() -> None:
    data = images.load("digits")
    assert data.labels is not None
    others = [
        images.Images(data.images, None),
        images.Images(data.images[:-1], data.labels[:-1]),
        images.Images(data.images, data.labels.flip(0)),
        images.Images(-data.images, data.labels),
    ]
    assert len({part.fingerprint() for part in (data, *others)}) == 5
    assert images.load("digits").fingerprint() == data.fingerprint()


@pytest.mark.parametrize("shape", [(5, 4, 4), (5, 4, 4, 1), (5, 4, 4, 3)], ids=str)
@pytest.mark.parametrize("kind", ["bytes", "floats"])
def test_archive(shape: tuple[int, ...], kind: str, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    expected = pixels.reshape(5, 4, 4, -1).transpose(0, 3, 1, 2) / 127.5 - 1.0
    stored = pixels if kind == "bytes" else (pixels / 127.5 - 1.0).astype(np.float16)
    np.savez(tmp_path / "a.npz", images=stored, labels=np.arange(5, dtype=np.int32))
    found, labels = images.load(tmp_path / "a.npz")
    assert_close(found, torch.from_numpy(expected).float(), 1e-6 if kind == "bytes" else 1e-3)
    assert labels is not None and labels.tolist() == [0, 1, 2, 3, 4]


GOOD = np.zeros((3, 4, 4), dtype=np.uint8)


@pytest.mark.parametrize(
    ("arrays", "match"),
    [
        ({"pictures": GOOD}, r"cannot be read.*images"),
        ({"images": GOOD[:, :3]}, r"must have shape \(N, S, S\) .*got \(3, 3, 4, 1\)"),
        ({"images": GOOD[:0]}, r"must have shape .*got \(0, 4, 4, 1\)"),
        ({"images": GOOD.astype(np.int64)}, r"must be uint8, or floats in \[-1, 1\], got int64"),
        ({"images": GOOD + 2.0}, r"got float64 from 2\.0 to 2\.0"),
        ({"images": GOOD + np.nan}, r"got float64 from nan to nan"),
        ({"images": GOOD, "labels": np.zeros(2, int)}, r"labels must be integers .*shape \(2,\)"),
        ({"images": GOOD, "labels": np.zeros(3)}, r"labels must be integers .*got float64"),
        ({"images": GOOD, "labels": np.full(3, -1)}, r"labels must be integers from 0"),
        ({"images": np.array([None])}, r"cannot be read"),
    ],
    ids=["name", "square", "empty", "int", "range", "nan", "count", "float", "negative", "pickle"],
)
def test_bad_archives_are_named(arrays: dict[str, np.ndarray], match: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(CommandError, match=match):
        images.load(tmp_path / "a.npz")


def test_broken_archives_are_named(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    with pytest.raises(CommandError, match=r"a\.npz does not exist"):
        images.load(path)
    np.savez_compressed(path, images=np.random.default_rng(0).random((9, 8, 8)))
    whole = path.read_bytes()
    for content in (b"", b"text", whole[:200], whole[:300] + b"\0" * 20 + whole[320:]):
        path.write_bytes(content)
        with pytest.raises(CommandError, match=r"a\.npz cannot be read"):
            images.load(path)
