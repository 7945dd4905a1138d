r"""What the student learns: all the teacher's states from its noise, in one evaluation.

With :math:`x_T` the noise, :math:`x_{t_1}..x_{t_T}` the teacher's states on the way to the image
and :math:`\lambda_i` their log-SNR, the loss of a network f is

.. math::
    \sum_i w_i\, d(f(x_T)_i, x_{t_i}), \qquad
    w_i \propto \mathrm{clamp}(e^{\lambda_i / 2}, 1, w_{max}), \quad \sum_i w_i = 1

with d the mean absolute (L1) or squared (L2) difference, or LPIPS. The weights of the official
project do not add up to 1; Adam's steps are the same, and here the loss is of the size of d.

Source: DSNO (arXiv 2211.13449), section 3.3.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from dsno_kernels.diffusion.learning import distances
from dsno_kernels.training.errors import CommandError
from dsno_kernels.training.trajectory_source import Source

LOSSES = ("l1", "l2", "lpips")
WEIGHT_LIMIT = 1e4
LPIPS_SMALLEST = 16  # pixels: VGG halves an image four times

# (made, wanted), both (B, T, C, H, W) in [-1, 1] and float32, to the mean of each time, (T,).
Distance = Callable[[Tensor, Tensor], Tensor]


def frame_weights(logsnr: Tensor, limit: float = WEIGHT_LIMIT) -> Tensor:
    """w_i of log-SNR ``(T,)``, adding up to 1."""
    weights = torch.exp(0.5 * logsnr.double()).clamp(1.0, limit)
    return (weights / weights.sum()).to(logsnr.dtype)


def l1(made: Tensor, wanted: Tensor) -> Tensor:
    return (made - wanted).abs().mean(dim=(0, 2, 3, 4))


def l2(made: Tensor, wanted: Tensor) -> Tensor:
    return (made - wanted).square().mean(dim=(0, 2, 3, 4))


def perceptual(image_size: int) -> Distance:
    """LPIPS in the features of VGG, by the package `lpips`.

    Raises:
        CommandError: the package is not installed, or the images are too small for VGG.
    """
    if image_size < LPIPS_SMALLEST:
        raise CommandError(
            f"--loss lpips needs images of at least {LPIPS_SMALLEST}x{LPIPS_SMALLEST} pixels,"
            f" these are {image_size}x{image_size}; take l1 or l2"
        )
    try:
        of_images = distances.lpips()
    except ImportError:
        raise CommandError(
            "--loss lpips needs the package lpips; run: pip install lpips, or take l1 or l2"
        ) from None

    def distance(made: Tensor, wanted: Tensor) -> Tensor:
        values = of_images(made.flatten(0, 1), wanted.flatten(0, 1))
        return values.view(made.shape[:2]).mean(dim=0)

    return distance


def distance(name: str, image_size: int) -> Distance:
    """The distance of a name of `LOSSES`."""
    return perceptual(image_size) if name == "lpips" else {"l1": l1, "l2": l2}[name]


class StudentTask:
    """Learning trajectories, as `training.loop.fit` wants it.

    Args:
        source: the data, on the device of the training.
        distance: d of one time.
        weight_limit: w_max.
    """

    def __init__(
        self,
        source: Source,
        distance: Distance = l1,
        weight_limit: float = WEIGHT_LIMIT,
    ) -> None:
        self.source = source
        self.distance = distance
        self.weights = frame_weights(source.logsnr, weight_limit)

    def draw(self, generator: torch.Generator, batch: int) -> dict[str, Tensor]:
        """Which samples make up a batch, with replacement."""
        return {"index": torch.randint(len(self.source), (batch,), generator=generator)}

    def loss(self, model: nn.Module, part: dict[str, Tensor]) -> Tensor:
        """The loss of a slice of the batch."""
        noise, states, labels = self.source.batch(part["index"])
        made = model(noise, self.source.logsnr, labels)
        return (self.distance(made.float(), states) * self.weights).sum()
