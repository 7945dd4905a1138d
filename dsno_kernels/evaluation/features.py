"""Networks in whose features sets of images are compared."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dsno_kernels import __version__
from dsno_kernels.evaluation import classifier
from dsno_kernels.models import ModelFileError
from dsno_kernels.models.files import assign, read_tensors, write_tensors
from dsno_kernels.training import images
from dsno_kernels.training.errors import CommandError

logger = logging.getLogger(__name__)

ACCURACY = 0.97  # of the digit classifier on digits it did not see, at least


@dataclass(frozen=True)
class Features:
    """A map from images to vectors.

    Args:
        name: what it is, for reports.
        function: images float32 ``(B, C, H, W)`` in [-1, 1] to vectors ``(B, D)``.
        batch: images at a time.
    """

    name: str
    function: Callable[[Tensor], Tensor]
    batch: int = 256

    @torch.no_grad()
    def __call__(self, pictures: Tensor) -> Tensor:
        """Vectors float64 ``(N, D)`` on the CPU."""
        batches = pictures.split(self.batch)
        parts = [self.function(batch).flatten(1).double().cpu() for batch in batches]
        return torch.cat(parts)


def pixels() -> Features:
    """The values of the pixels themselves."""
    return Features("pixels", lambda batch: batch)


def digits(folder: Path, seed: int = 0) -> Features:
    """The penultimate layer of the digit classifier in a folder; it is trained where there is none.

    Args:
        folder: holds, then or already, ``digit_classifier.safetensors``.
        seed: of the training.

    Raises:
        CommandError: the accuracy on held-out digits is less than 97 %.
    """
    path = folder / "digit_classifier.safetensors"
    recipe = {"kind": "classifier", "recipe": classifier.RECIPE, "seed": str(seed)}
    stored = _stored_classifier(path, recipe) if path.exists() else None
    if stored is None:
        data = images.digits()
        assert data.labels is not None
        model, accuracy = classifier.train(data.images, data.labels, seed)
        metadata = {**recipe, "accuracy": accuracy, "version": __version__}
        write_tensors(path, model.state_dict(), metadata)
    else:
        model, accuracy = stored
    if accuracy < ACCURACY:
        raise CommandError(
            f"the digit classifier is right on only {accuracy:.1%} of the held-out digits, and"
            f" {ACCURACY:.0%} are wanted; give another --classifier-seed"
        )
    name = f"penultimate layer of a digit classifier, {accuracy:.1%} right on held-out digits"

    def function(batch: Tensor) -> Tensor:
        if batch.shape[1:] != (1, 8, 8):
            raise ValueError("it takes (1, 8, 8); give --features pixels, or a TorchScript file")
        return model.features(batch)

    return Features(name, function)


def _stored_classifier(
    path: Path, recipe: dict[str, str]
) -> tuple[classifier.DigitClassifier, float] | None:
    """The classifier of a file, and its accuracy; None for one of another recipe, and with a
    warning for a file that cannot be used.
    """
    model = classifier.DigitClassifier()
    try:
        tensors, metadata = read_tensors(path)
        if {name: metadata.get(name) for name in recipe} != recipe:
            return None
        assign(model, tensors, path)
        return model.eval(), float(metadata["accuracy"])
    except (ModelFileError, KeyError, ValueError) as error:
        logger.warning("%s; the digit classifier is trained again", error)
        return None


def torchscript(path: Path, device: torch.device) -> Features:
    """A network of the user: TorchScript that takes uint8 images ``(B, 3, H, W)``.

    ``return_features=True`` is passed where its ``forward`` has that argument, as in the usual
    Inception file; gray images are given to it three times.

    Raises:
        CommandError: a file that is no TorchScript.
    """
    try:
        network = torch.jit.load(str(path), map_location=device).eval()
        arguments = {argument.name for argument in network.forward.schema.arguments}
    except (RuntimeError, ValueError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CommandError(f"--features {path} is no TorchScript file ({reason})") from None
    options = {"return_features": True} if "return_features" in arguments else {}

    def function(batch: Tensor) -> Tensor:
        pixels = batch.clamp(-1, 1).add(1).mul(127.5).round().byte()
        out = network(pixels.expand(-1, 3, -1, -1).to(device), **options)
        if not isinstance(out, Tensor) or len(out) != len(batch):
            raise CommandError(f"--features {path} must return one vector an image, a tensor")
        return out

    return Features(f"TorchScript {path.name}", function, batch=64)
