r"""The command `train teacher`: a denoiser of real images, trained as in EDM.

With :math:`x_0` an image, :math:`\epsilon` noise, :math:`\log \sigma \sim N(P_{mean}, P_{std}^2)`
and D the denoiser of :class:`dsno_kernels.models.EDMDenoiser`, the loss is the mean of

.. math::
    \frac{\sigma^2 + \sigma_d^2}{(\sigma \sigma_d)^2}\,
    |D(x_0 + \sigma \epsilon, \sigma) - x_0|^2

which is the squared error of the network's own output. The noise levels of a batch are evenly
spread over their distribution, with one random shift, as in "Variational diffusion models"
(arXiv 2107.00630, appendix I.1): the same mean, less noise in the gradient.

EDM's own -1.2 and 1.2 hardly ever show the noise with which a variance-preserving process starts,
:math:`\sigma = 118` for :class:`dsno_kernels.diffusion.VPCosine`; the defaults here, 0 and 1.6, are
the mean and deviation of its levels.

Source: EDM (arXiv 2206.00364), table 1.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn

from dsno_kernels.models import DSNO, DSNOConfig, EDMDenoiser
from dsno_kernels.training import distributed, images, network, options
from dsno_kernels.training.errors import CommandError
from dsno_kernels.training.images import Images
from dsno_kernels.training.loop import fit
from dsno_kernels.training.options import Options

NAME = "teacher.safetensors"
DEFAULTS = Options(
    steps=1500,
    batch=128,
    learning_rate=2e-3,
    warm_up=200,
    decay="cosine",
    betas=(0.9, 0.99),
    ema_decay=0.998,
    checkpoint_every=500,
)
P_MEAN, P_STD = 0.0, 1.6
# Each has a row of an embedding; more than four times as many as ImageNet-21k has.
MOST_CLASSES = 100_000


class TeacherTask:
    """Denoising of images: `dsno_kernels.training.loop.Task`.

    Args:
        data: on the device of the model.
        sigma_data: standard deviation of the data, that of the denoiser.
        conditional: whether the denoiser is told the class.
        mean, std: of log sigma.
        drop_classes: share of the samples whose class it is not told, for guidance.
    """

    def __init__(
        self,
        data: Images,
        sigma_data: float,
        conditional: bool = False,
        mean: float = P_MEAN,
        std: float = P_STD,
        drop_classes: float = 0.0,
    ) -> None:
        self.drop_classes = drop_classes
        self.images = data.images
        self.labels = data.labels if conditional else None
        self.sigma_data = sigma_data
        self.mean, self.std = mean, std

    def draw(self, generator: torch.Generator, batch: int) -> dict[str, Tensor]:
        """The images, noise levels and seeds of the noise of a batch."""
        shift = torch.rand((), generator=generator, dtype=torch.float64)
        quantile = (torch.arange(batch) + shift) / batch
        normal = torch.special.ndtri(quantile.clamp(1e-12, 1.0 - 1e-12))
        return {
            "index": torch.randint(len(self.images), (batch,), generator=generator),
            "sigma": (self.mean + self.std * normal).exp().float(),
            "noise_seed": torch.randint(2**62, (batch,), generator=generator),
            "told": torch.rand(batch, generator=generator) >= self.drop_classes,
        }

    def loss(self, model: nn.Module, part: dict[str, Tensor]) -> Tensor:
        """The weighted squared error."""
        device = self.images.device
        index, sigma = part["index"].to(device), part["sigma"].to(device)
        clean = self.images[index]
        y = None
        if self.labels is not None:
            y = torch.where(part["told"].to(device), self.labels[index], -1)
        level = sigma[:, None, None, None]
        denoised = model(clean + level * _noise(part["noise_seed"], clean), sigma, y)
        weight = (level.square() + self.sigma_data**2) / (level * self.sigma_data).square()
        return (weight * (denoised - clean).square()).mean()


def _noise(seeds: Tensor, like: Tensor) -> Tensor:
    """Standard normal noise, that of each sample from its own seed: a process draws only its
    share, on the device where it is used.
    """
    generator, noise = torch.Generator(like.device), torch.empty_like(like)
    for sample, seed in zip(noise, seeds.tolist(), strict=True):
        sample.normal_(generator=generator.manual_seed(seed))
    return noise


def train(
    data: Images,
    config: DSNOConfig,
    learning: Options,
    out: Path,
    *,
    sigma_data: float | None = None,
    mean: float = P_MEAN,
    std: float = P_STD,
    drop_classes: float = 0.0,
    device: torch.device | str = "cpu",
) -> EDMDenoiser:
    """Train a teacher; a run that was stopped goes on from its checkpoint in `out`.

    Args:
        data: images, and labels where the network has classes.
        config: of the network, ``time_conv=False``.
        learning: see :class:`Options`.
        out: folder of the checkpoint and the loss curve.
        sigma_data: standard deviation of the data; None measures it.
        mean, std: of log sigma.
        drop_classes: share of the samples whose class the denoiser is not told: it then knows
            ``y = -1``, no class, which guidance needs.
        device: where it is trained.

    Returns:
        The average of the weights over the updates, in evaluation mode, on `device`.

    Raises:
        CommandError: see `dsno_kernels.training.loop.fit`.

    Example:
        >>> teacher = train(images.digits(), config, DEFAULTS, Path("teacher"))
    """
    level = float(data.images.std()) if sigma_data is None else sigma_data
    if not level > 0.0:
        raise CommandError("the images are all the same, of one value; give --sigma-data")
    identity = {
        "config": asdict(config),
        "data": data.fingerprint(),
        "sigma_data": level,
        "p_mean": mean,
        "p_std": std,
        "drop_classes": drop_classes,
    }
    torch.manual_seed(learning.seed)
    model = EDMDenoiser(DSNO(config), level).to(device)
    labels = None if data.labels is None else data.labels.to(device)
    moved = Images(data.images.to(device), labels)
    task = TeacherTask(moved, level, config.num_classes > 0, mean, std, drop_classes)
    average = fit(model, task, learning, out, identity)
    assert isinstance(average, EDMDenoiser)
    return average


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `train teacher`."""
    images.add_arguments(parser)
    parser.add_argument(
        "--out", type=Path, default=Path("teacher"), metavar="FOLDER", help="default: %(default)s"
    )
    parser.add_argument(
        "--conditional", action="store_true", help="the denoiser is told the class of the image"
    )
    parser.add_argument(
        "--drop-classes",
        type=float,
        default=0.0,
        metavar="X",
        help="share of the images whose class it is not told, for guidance; default: %(default)s",
    )
    parser.add_argument(
        "--sigma-data",
        type=float,
        metavar="X",
        help="standard deviation of the data; default: measured",
    )
    parser.add_argument(
        "--p-mean", type=float, default=P_MEAN, metavar="X", help="of log sigma; default: 0"
    )
    parser.add_argument(
        "--p-std", type=float, default=P_STD, metavar="X", help="of log sigma; default: 1.6"
    )
    network.add_arguments(parser)
    options.add_arguments(parser, DEFAULTS)


def run(arguments: argparse.Namespace) -> None:
    """The command `train teacher`."""
    with distributed.started(arguments.device) as device:
        learning = options.from_arguments(arguments, device)
        data = images.load(arguments.data, arguments.size, arguments.classes)
        config = network.config(
            arguments,
            image_size=data.images.shape[-1],
            image_channels=data.images.shape[1],
            num_classes=_classes(arguments, data),
            time_conv=False,
        )
        if arguments.sigma_data is not None and not 0.0 < arguments.sigma_data < math.inf:
            raise CommandError(f"--sigma-data must be positive, got {arguments.sigma_data}")
        if not 0.0 <= arguments.drop_classes < 1.0:
            raise CommandError(f"--drop-classes must be in [0, 1), got {arguments.drop_classes}")
        if arguments.drop_classes > 0.0 and not arguments.conditional:
            raise CommandError("--drop-classes needs classes; give --conditional, too")
        if not math.isfinite(arguments.p_mean):
            raise CommandError(f"--p-mean must be finite, got {arguments.p_mean}")
        if not 0.0 < arguments.p_std < math.inf:
            raise CommandError(f"--p-std must be positive, got {arguments.p_std}")
        teacher = train(
            data,
            config,
            learning,
            arguments.out,
            sigma_data=arguments.sigma_data,
            mean=arguments.p_mean,
            std=arguments.p_std,
            drop_classes=arguments.drop_classes,
            device=device,
        )
        if distributed.rank() == 0:
            name = f"{arguments.data}, SHA-256 {data.fingerprint()}"
            path = arguments.out / NAME
            origin = network.provenance(learning, name)
            network.save(teacher, path, drop_classes=arguments.drop_classes, provenance=origin)


def _classes(arguments: argparse.Namespace, data: Images) -> int:
    """Of the network; 0 without --conditional."""
    if not arguments.conditional:
        return 0
    if data.labels is None:
        raise CommandError(
            f"--conditional needs classes, and --data {arguments.data} has none; give an .npz with"
            " `labels`, or a folder with --classes"
        )
    classes = int(data.labels.max()) + 1
    if classes > MOST_CLASSES:
        raise CommandError(
            f"--data {arguments.data} has a label {classes - 1}: that is {classes:,} classes;"
            f" number them from 0, {MOST_CLASSES:,} at most"
        )
    return classes
