"""Distances between samples and their targets, one for each sample."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

LOSSES = ("l2", "l1", "lpips")

# (made, wanted) to one number a sample, (B,).
Loss = Callable[[Tensor, Tensor], Tensor]


def l2(made: Tensor, wanted: Tensor) -> Tensor:
    return (made - wanted).flatten(1).square().mean(1)


def l1(made: Tensor, wanted: Tensor) -> Tensor:
    return (made - wanted).flatten(1).abs().mean(1)


def lpips() -> Loss:
    """LPIPS in the features of VGG, of images in [-1, 1], by the package `lpips`.

    Source: Zhang et al., "The unreasonable effectiveness of deep features" (arXiv 1801.03924).
    """
    try:
        import lpips as package
    except ModuleNotFoundError:
        raise ImportError("loss 'lpips' needs the package lpips: pip install lpips") from None
    network = package.LPIPS(net="vgg", verbose=False).eval().requires_grad_(False)

    def distance(made: Tensor, wanted: Tensor) -> Tensor:
        network.to(made.device)
        channels = 3 if made.shape[1] == 1 else made.shape[1]
        pair = [images.float().expand(-1, channels, -1, -1) for images in (made, wanted)]
        # The difference of two nearby images is less than what bfloat16 resolves.
        with torch.autocast(made.device.type, enabled=False):
            values: Tensor = network(*pair)
        return values.flatten()

    return distance


def found(loss: str | Loss) -> Loss:
    """The distance of this name, or the function itself.

    Raises:
        ValueError: an unknown name. TypeError: neither. ImportError: `lpips` is missing.
    """
    if callable(loss):
        return loss
    if not isinstance(loss, str):
        raise TypeError(f"loss must be a name or a function, got {loss!r}")
    if loss not in LOSSES:
        raise ValueError(f"unknown loss {loss!r}; known are {', '.join(LOSSES)}, or a function")
    return {"l2": l2, "l1": l1}[loss] if loss != "lpips" else lpips()


def each(distance: Loss, made: Tensor, wanted: Tensor) -> Tensor:
    """The distances in float64, checked: ``(B,)``."""
    if made.shape != wanted.shape:
        raise ValueError(
            f"samples (after `decode`, where there is one) have shape {tuple(made.shape)}, their"
            f" targets {tuple(wanted.shape)}"
        )
    values = distance(made, wanted)
    if not isinstance(values, Tensor) or values.shape != made.shape[:1]:
        what = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise ValueError(
            f"the loss must give one number a sample, shape ({len(made)},), got {what}"
        )
    return values.double()
