"""Real images to learn from: scikit-learn's handwritten digits, a folder, or an .npz file."""

from __future__ import annotations

import argparse
import hashlib
import logging
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dsno_kernels.training.errors import CommandError

logger = logging.getLogger(__name__)

SUFFIXES = (".png", ".jpg", ".jpeg")
ACCEPTED = "PNG or JPEG files (.png, .jpg, .jpeg)"
DIGITS = "digits"
# Each has a row of an embedding; more than four times as many as ImageNet-21k has.
MOST_CLASSES = 100_000


class Images(NamedTuple):
    """Images, float32 ``(N, C, H, W)`` in [-1, 1], and their classes, int64 ``(N,)`` or None."""

    images: Tensor
    labels: Tensor | None

    def fingerprint(self) -> str:
        """SHA-256 of all values: the name of this data in a checkpoint or a model file."""
        digest = hashlib.sha256()
        for tensor in (self.images, self.labels):
            if tensor is not None:
                digest.update(f"{tuple(tensor.shape)} {tensor.dtype}".encode())
                digest.update(tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of :func:`load`."""
    parser.add_argument(
        "--data",
        default=DIGITS,
        metavar="PATH",
        help="real images: a folder of PNG or JPEG files, an .npz with `images` (and `labels`), or"
        " %(default)s (1,797 real 8x8 digits, the default)",
    )
    parser.add_argument(
        "--size", type=int, metavar="N", help="crop and resize the images of a folder to NxN pixels"
    )
    parser.add_argument(
        "--classes", action="store_true", help="each subfolder of the folder is a class"
    )


def load(data: str | Path, size: int | None = None, classes: bool = False) -> Images:
    """The images that ``--data`` names.

    Args:
        data: "digits", a folder or an .npz file.
        size: pixels a side, to which the images of a folder are cropped and resized; None wants
            them square and all of one size.
        classes: whether each subfolder of a folder is a class.

    Raises:
        CommandError: nothing there, or nothing that can be used.
    """
    path = Path(data)
    if str(data) == DIGITS:
        found = digits()
    elif path.suffix.lower() == ".npz":
        found = archive(path)
    else:
        return folder(path, size, classes)
    if classes:
        raise CommandError(f"--classes is for a folder with a subfolder a class; {data} is none")
    if size is not None and size != found.images.shape[-1]:
        raise CommandError(
            f"--size {size} resizes a folder of images; those of {data} have"
            f" {found.images.shape[-1]} pixels a side"
        )
    return found


def digits() -> Images:
    """The 1,797 real 8x8 digits of ``sklearn.datasets.load_digits``, ``(N, 1, 8, 8)``."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.from_numpy(data.images).float()[:, None] / 8.0 - 1.0
    return Images(images, torch.from_numpy(data.target).long())


def archive(path: Path) -> Images:
    """The arrays ``images``, ``(N, H, W)`` or ``(N, H, W, C)``, uint8 or floats in [-1, 1], and
    ``labels`` (if it is there), ``(N,)`` integers from 0, of an .npz file.

    Raises:
        CommandError: no such file, a broken one, or arrays that are neither.
    """
    if not path.is_file():
        raise CommandError(f"--data {path} does not exist; give an .npz file, a folder or {DIGITS}")
    try:
        with np.load(path, allow_pickle=False) as file:
            images = file["images"]
            labels = file["labels"] if "labels" in file.files else None
    except Exception as error:  # zipfile, zlib and NumPy raise each their own
        raise CommandError(
            f"--data {path} cannot be read ({error}); give an .npz with an array `images`"
        ) from None
    if images.ndim == 3:
        images = images[..., None]
    if images.ndim != 4 or images.shape[1] != images.shape[2] or 0 in images.shape:
        raise CommandError(
            f"--data {path}: images must have shape (N, S, S) or (N, S, S, C), got {images.shape}"
        )
    values = torch.from_numpy(np.moveaxis(images, 3, 1).copy())
    if values.dtype == torch.uint8:
        values = values.float().div_(127.5).sub_(1.0)
    elif not values.is_floating_point() or not values.abs().max() <= 1.0:
        raise CommandError(
            f"--data {path}: images must be uint8, or floats in [-1, 1], got {images.dtype} from"
            f" {images.min()} to {images.max()}"
        )
    if labels is None:
        return Images(values.float(), None)
    if labels.shape != (len(images),) or labels.dtype.kind not in "iu" or labels.min() < 0:
        raise CommandError(
            f"--data {path}: labels must be integers from 0 of shape ({len(images)},), got"
            f" {labels.dtype} of shape {labels.shape}"
        )
    return Images(values.float(), torch.from_numpy(labels.astype(np.int64)))


def folder(
    path: Path, size: int | None = None, classes: bool = False, limit: int | None = None
) -> Images:
    """The PNG and JPEG images below a folder.

    Args:
        path: searched with its subfolders, in sorted order.
        size: they are cropped to their central square and resized to this; None wants squares, all
            of one size.
        classes: whether each subfolder of `path` is a class, in sorted order.
        limit: the most images to use, evenly spaced.

    Returns:
        C is 1 when every image is gray, else 3. An image that cannot be read is left out with a
        warning.

    Raises:
        CommandError: no such folder, not one readable image in it, images of several sizes, an
        image outside of the subfolders of classes.
    """
    if not path.is_dir():
        what = "is not a folder" if path.exists() else "does not exist"
        raise CommandError(f"--data {path} {what}; give a folder with {ACCEPTED}")
    files = sorted(
        file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file()
    )
    if not files:
        raise CommandError(f"--data {path} holds no images; give a folder with {ACCEPTED}")
    if limit is not None and len(files) > limit:
        logger.warning("%d images found; %d of them, evenly spaced, are used", len(files), limit)
        files = [files[i * len(files) // limit] for i in range(limit)]
    used, images = [], []
    for file in files:
        try:
            images.append(_read(file, size))
            used.append(file)
        except Exception as error:
            # Pillow raises whatever its decoders do: a bad file must not end the command.
            logger.warning("%s is left out: %s", file, error or type(error).__name__)
    if not images:
        unread = f"none of its {len(files)} images can be read"
        raise CommandError(f"--data {path}: {unread}; give a folder with {ACCEPTED}")
    _check_sizes(used, images)
    stack = torch.from_numpy(np.stack(images))  # [N, H, W, 3]
    if (stack == stack[..., :1]).all():
        stack = stack[..., :1]
    values = stack.permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0).contiguous()
    return Images(values, _labels(path, used) if classes else None)


def _check_sizes(files: list[Path], images: list[np.ndarray]) -> None:
    """Whether all images have the size of the first, and it is square."""
    first = images[0].shape
    for file, image in zip(files, images, strict=True):
        height, width = image.shape[:2]
        if image.shape != first or height != width:
            raise CommandError(
                f"{file} has {width}x{height} pixels, and the images must be squares of one size"
                f" ({files[0].name} has {first[1]}x{first[0]}); give --size to crop and resize them"
            )


def _labels(path: Path, files: list[Path]) -> Tensor:
    """The class of each file: the place of its subfolder among those that hold images."""
    places = [file.relative_to(path).parts for file in files]
    for file, parts in zip(files, places, strict=True):
        if len(parts) == 1:
            raise CommandError(
                f"{file} is in none of the subfolders, which are the classes with --classes"
            )
    names = sorted({parts[0] for parts in places})
    return torch.tensor([names.index(parts[0]) for parts in places])


def _read(file: Path, size: int | None) -> np.ndarray:
    """One image as uint8 RGB, ``(H, W, 3)``; transparent parts become white."""
    from PIL import Image, ImageOps

    with Image.open(file) as opened:
        image = ImageOps.exif_transpose(opened)
        if image.mode.startswith(("I", "F")):
            # 16 bits or more a pixel: Pillow would clip instead of scaling.
            values = np.asarray(image, dtype=np.float64)
            top = 65535.0 if values.max() > 255 else 255.0
            image = Image.fromarray((values * (255.0 / top)).clip(0, 255).astype(np.uint8))
        if image.has_transparency_data:
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image.convert("RGBA"))
        image = image.convert("RGB")
        if size is not None:
            image = ImageOps.fit(image, (size, size), Image.Resampling.BOX)
    return np.asarray(image)
