r"""The command `train teacher`: a denoiser of real images, trained as in EDM.

With :math:`x_0` an image, :math:`\epsilon` noise, :math:`\log \sigma \sim N(P_{mean}, P_{std}^2)`
and D the denoiser of :class:`dsno_kernels.models.EDMDenoiser`, the loss is the mean of

.. math::
    \frac{\sigma^2 + \sigma_d^2}{(\sigma \sigma_d)^2}\,
    |D(x_0 + \sigma \epsilon, \sigma) - x_0|^2

which is the squared error of the network's own output. The noise levels of a batch are evenly
spread over their distribution, with one random shift, as in "Variational diffusion models"
(arXiv 2107.00630, appendix I.1): the same mean, less noise in the gradient.

Source: EDM (arXiv 2206.00364), table 1.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn

from dsno_kernels.models import DSNO, DSNOConfig, EDMDenoiser, save
from dsno_kernels.training import distributed, images, network, options
from dsno_kernels.training.errors import CommandError
from dsno_kernels.training.images import Images
from dsno_kernels.training.loop import fit
from dsno_kernels.training.options import Options

NAME = "teacher.safetensors"
DEFAULTS = Options(
    steps=3000,
    batch=128,
    learning_rate=2e-3,
    warm_up=200,
    decay="cosine",
    betas=(0.9, 0.99),
    ema_decay=0.998,
)
P_MEAN, P_STD = -1.2, 1.2


class TeacherTask:
    """Denoising of images: `dsno_kernels.training.loop.Task`.

    Args:
        data: on the device of the model.
        sigma_data: standard deviation of the data, that of the denoiser.
        conditional: whether the denoiser is told the class.
        mean, std: of log sigma.
    """

    def __init__(
        self,
        data: Images,
        sigma_data: float,
        conditional: bool = False,
        mean: float = P_MEAN,
        std: float = P_STD,
    ) -> None:
        self.images = data.images
        self.labels = data.labels if conditional else None
        self.sigma_data = sigma_data
        self.mean, self.std = mean, std

    def draw(self, generator: torch.Generator, batch: int) -> dict[str, Tensor]:
        """The images, noise levels and noise of a batch."""
        shift = torch.rand((), generator=generator, dtype=torch.float64)
        quantile = (torch.arange(batch) + shift) / batch
        normal = torch.special.ndtri(quantile.clamp(1e-12, 1.0 - 1e-12))
        return {
            "index": torch.randint(len(self.images), (batch,), generator=generator),
            "sigma": (self.mean + self.std * normal).exp().float(),
            "noise": torch.randn(batch, *self.images.shape[1:], generator=generator),
        }

    def loss(self, model: nn.Module, part: dict[str, Tensor]) -> Tensor:
        """The weighted squared error."""
        device = self.images.device
        index, sigma = part["index"].to(device), part["sigma"].to(device)
        clean = self.images[index]
        y = None if self.labels is None else self.labels[index]
        level = sigma[:, None, None, None]
        denoised = model(clean + level * part["noise"].to(device), sigma, y)
        weight = (level.square() + self.sigma_data**2) / (level * self.sigma_data).square()
        return (weight * (denoised - clean).square()).mean()


def train(
    data: Images,
    config: DSNOConfig,
    learning: Options,
    out: Path,
    *,
    sigma_data: float | None = None,
    mean: float = P_MEAN,
    std: float = P_STD,
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
    }
    torch.manual_seed(learning.seed)
    model = EDMDenoiser(DSNO(config), level).to(device)
    labels = None if data.labels is None else data.labels.to(device)
    moved = Images(data.images.to(device), labels)
    task = TeacherTask(moved, level, config.num_classes > 0, mean, std)
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
        "--sigma-data",
        type=float,
        metavar="X",
        help="standard deviation of the data; default: measured",
    )
    parser.add_argument(
        "--p-mean", type=float, default=P_MEAN, metavar="X", help="of log sigma; default: -1.2"
    )
    parser.add_argument(
        "--p-std", type=float, default=P_STD, metavar="X", help="of log sigma; default: 1.2"
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
        if arguments.sigma_data is not None and not arguments.sigma_data > 0.0:
            raise CommandError(f"--sigma-data must be positive, got {arguments.sigma_data}")
        if not arguments.p_std > 0.0:
            raise CommandError(f"--p-std must be positive, got {arguments.p_std}")
        teacher = train(
            data,
            config,
            learning,
            arguments.out,
            sigma_data=arguments.sigma_data,
            mean=arguments.p_mean,
            std=arguments.p_std,
            device=device,
        )
        if distributed.rank() == 0:
            name = f"{arguments.data}, SHA-256 {data.fingerprint()}"
            path = arguments.out / NAME
            save(teacher, path, provenance=network.provenance(learning, name))
            print(f"Wrote {path}: {sum(p.numel() for p in teacher.parameters()):,} parameters")


def _classes(arguments: argparse.Namespace, data: Images) -> int:
    """Of the network; 0 without --conditional."""
    if not arguments.conditional:
        return 0
    if data.labels is None:
        raise CommandError(
            f"--conditional needs classes, and --data {arguments.data} has none; give an .npz with"
            " `labels`, or a folder with --classes"
        )
    return int(data.labels.max()) + 1
