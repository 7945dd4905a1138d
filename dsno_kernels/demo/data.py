"""The demo's images: scikit-learn's handwritten digits, or a folder of the user's own."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dsno_kernels.training.errors import CommandError

logger = logging.getLogger(__name__)

SUFFIXES = (".png", ".jpg", ".jpeg")
# The teacher compares each noise with every image: more than this would take minutes and teach a
# small student no more.
MAX_IMAGES = 4096


def digits() -> Tensor:
    """The 1,797 real 8x8 digits of ``sklearn.datasets.load_digits``, in [-1, 1], ``(N, 1, 8,
    8)``.
    """
    from sklearn.datasets import load_digits

    return torch.from_numpy(load_digits().images).float()[:, None] / 8.0 - 1.0


def folder(path: Path, size: int) -> Tensor:
    """The PNG and JPEG images below a folder: cropped to their central square, resized, in [-1, 1].

    Args:
        path: searched with its subfolders, in sorted order.
        size: height and width of the result.

    Returns:
        ``(N, C, size, size)``; C is 1 when every image is gray, else 3. An image that cannot be
        read is left out with a warning.

    Raises:
        CommandError: no such folder, or not one readable image in it.
    """
    accepted = "PNG or JPEG files (.png, .jpg, .jpeg)"
    if not path.is_dir():
        what = "is not a folder" if path.exists() else "does not exist"
        raise CommandError(f"--data {path} {what}; give a folder with {accepted}")
    files = sorted(
        file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file()
    )
    if not files:
        raise CommandError(f"--data {path} holds no images; give a folder with {accepted}")
    if len(files) > MAX_IMAGES:
        logger.warning(
            "%d images found; %d of them, evenly spaced, are used", len(files), MAX_IMAGES
        )
        files = [files[i * len(files) // MAX_IMAGES] for i in range(MAX_IMAGES)]
    images = []
    for file in files:
        try:
            images.append(_read(file, size))
        except (
            Exception
        ) as error:  # Pillow raises whatever its decoders do: a bad file must not end the demo
            logger.warning("%s is left out: %s", file, error or type(error).__name__)
    if not images:
        unread = f"none of its {len(files)} images can be read"
        raise CommandError(f"--data {path}: {unread}; give a folder with {accepted}")
    stack = torch.from_numpy(np.stack(images))  # [N, H, W, 3]
    if (stack == stack[..., :1]).all():
        stack = stack[..., :1]
    return stack.permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0).contiguous()


def _read(file: Path, size: int) -> np.ndarray:
    """One image as uint8 RGB, ``(size, size, 3)``; transparent parts become white."""
    from PIL import Image, ImageOps

    with Image.open(file) as opened:
        image = ImageOps.exif_transpose(opened)
        if image.mode.startswith(
            ("I", "F")
        ):  # 16 bits or more a pixel: Pillow would clip instead of scaling
            values = np.asarray(image, dtype=np.float64)
            top = 65535.0 if values.max() > 255 else 255.0
            image = Image.fromarray((values * (255.0 / top)).clip(0, 255).astype(np.uint8))
        if image.has_transparency_data:
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image.convert("RGBA"))
        fitted = ImageOps.fit(image.convert("RGB"), (size, size), Image.Resampling.BOX)
    return np.asarray(fitted)
