"""Samples as files: one PNG of all, a folder of PNGs, or an .npz.

Images are float ``(N, C, H, W)`` in [-1, 1] here and 8 bits a value in the files; an .npz holds
``images``, uint8 ``(N, H, W, C)``, and where there are classes ``labels``, int64 ``(N,)``, as
`dsno_kernels.training.images` reads them.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from dsno_kernels._files import replacing
from dsno_kernels.training.errors import CommandError, prepare_folder

SMALLEST = 32  # pixels: in a picture of many, smaller images are enlarged


def to_bytes(images: Tensor) -> np.ndarray:
    """uint8 ``(..., H, W, C)`` of images ``(..., C, H, W)`` in [-1, 1]."""
    pixels = images.detach().float().clamp(-1, 1).add(1).mul(127.5).round().byte()
    return pixels.movedim(-3, -1).cpu().numpy()


def tile(pixels: np.ndarray, columns: int) -> np.ndarray:
    """Images ``(N, H, W, C)`` as one picture ``(H', W', C)``, white between them; small ones are
    enlarged by a whole number.
    """
    factor = -(-SMALLEST // max(pixels.shape[1:3]))
    pixels = pixels.repeat(factor, axis=1).repeat(factor, axis=2)
    missing = -len(pixels) % columns
    pixels = np.pad(pixels, ((0, missing), (0, 1), (0, 1), (0, 0)), constant_values=255)
    _, H, W, C = pixels.shape
    rows = pixels.reshape(-1, columns, H, W, C).transpose(0, 2, 1, 3, 4)
    return rows.reshape(-1, columns * W, C)[:-1, :-1]


def check_target(path: Path, strips: bool) -> None:
    """Find out before the work whether its result can be written; folders are made.

    Raises:
        CommandError: a name of another kind, a folder that holds images already or cannot be
        written, strips in an .npz.
    """
    suffix = path.suffix.lower()
    folder = path.is_dir() or not suffix
    if not folder and suffix not in (".png", ".npz"):
        raise CommandError(f"--out {path} must end in .png or .npz, or be a folder")
    if suffix == ".npz" and strips and not folder:
        raise CommandError(f"--strip draws pictures; give --out a .png or a folder, not {path}")
    prepare_folder(path if folder else path.parent)
    if folder and next(path.rglob("*.png"), None) is not None:
        raise CommandError(
            f"--out {path} holds images already, of a run that ended or was stopped; remove them,"
            " or give a new folder"
        )


def check_channels(path: Path, channels: int) -> None:
    """Find out whether images of so many channels can be written there: pictures are gray or RGB.

    Raises:
        CommandError: they cannot.
    """
    if channels not in (1, 3) and (path.is_dir() or path.suffix.lower() != ".npz"):
        raise CommandError(
            f"--out {path}: a picture has 1 or 3 channels, these images have {channels}; give"
            " --out FILE.npz"
        )


class Target:
    """Where samples go: ``FILE.png`` (all in one picture), ``FILE.npz``, or a folder of PNGs.

    Files appear complete or not at all; the PNGs of a folder appear as they come, those of a
    class in a folder of their own.

    Args:
        path: of a file, or of a folder that exists.
        labels: int64 ``(N,)``, the classes of all samples; None without.
    """

    def __init__(self, path: Path, labels: Tensor | None) -> None:
        self.path = path
        self.labels = None if labels is None else labels.cpu().numpy()
        self.written = 0
        self._kept: list[np.ndarray] = []

    def add(self, pixels: np.ndarray) -> None:
        """The next samples, uint8 ``(B, n, H, W, C)``; n pictures of each, in a row where it is
        more than one.
        """
        if not self.path.is_dir():
            self._kept.append(pixels)
            return
        for pictures in pixels:
            folder = self.path
            if self.labels is not None:
                folder = folder / str(self.labels[self.written])
                folder.mkdir(exist_ok=True)
            picture = pictures[0] if len(pictures) == 1 else tile(pictures, len(pictures))
            _write_png(folder / f"{self.written:06d}.png", picture, many=True)
            self.written += 1

    def close(self) -> None:
        """After the last sample: write the file."""
        if not self._kept:
            return
        pixels = np.concatenate(self._kept)
        N, n = pixels.shape[:2]
        if self.path.suffix.lower() == ".png":
            columns = n if n > 1 else math.ceil(math.sqrt(N))
            _write_png(self.path, tile(pixels.reshape(N * n, *pixels.shape[2:]), columns))
            return
        arrays: dict[str, Any] = {"images": pixels[:, 0]}
        if self.labels is not None:
            arrays["labels"] = self.labels
        with replacing(self.path) as file:
            np.savez_compressed(file, **arrays)


def _write_png(path: Path, pixels: np.ndarray, many: bool = False) -> None:
    """A picture uint8 ``(H, W, C)``, C = 1 or 3."""
    from PIL import Image

    with replacing(path, many=many) as file:
        Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels).save(file, "PNG")
