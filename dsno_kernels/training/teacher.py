r"""The command `train teacher`: a denoiser of real images, trained as in EDM or FDM.

With :math:`x_0` an image, :math:`\epsilon` noise, :math:`\sigma` a level of the distribution and w
the weight that `dsno_kernels.diffusion.Preconditioner` has for the process, and D the denoiser of
:class:`dsno_kernels.models.EDMDenoiser`, the loss is the mean of

.. math:: \min(w(\sigma), ceiling)\, |D(x_0 + \sigma \epsilon, \sigma) - x_0|^2

where only a warm-up of the loss has a ceiling. For EDM that is the squared error of the network's
own output. The noise levels of a batch are evenly spread over their distribution, with one random
shift, as in "Variational diffusion models" (arXiv 2107.00630, appendix I.1): the same mean, less
noise in the gradient. What is random in a batch does not depend on the process.

EDM's own -1.2 and 1.2 hardly ever show the noise with which a variance-preserving process starts,
:math:`\sigma = 118` for :class:`dsno_kernels.diffusion.VPCosine`; the defaults here, 0 and 1.6, are
the mean and deviation of its levels.

Source: EDM (arXiv 2206.00364), table 1; FDM (arXiv 2306.06991) and its official code.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn

from dsno_kernels.diffusion import EDM, FDM, VE, Preconditioner, VPLinear
from dsno_kernels.functional import denoising_loss, noised
from dsno_kernels.models import DSNO, DSNOConfig, EDMDenoiser
from dsno_kernels.training import distributed, images, network, options
from dsno_kernels.training.errors import CommandError
from dsno_kernels.training.images import MOST_CLASSES, Images
from dsno_kernels.training.loop import fit
from dsno_kernels.training.options import Options
from dsno_kernels.training.weight_warm_up import NO_WARM_UP, WeightWarmUp

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
# What --process names; EDM gets the standard deviation of the data. VP's first time is EDM's.
BASES = {"edm": EDM(), "vp": VPLinear(t_min=1e-5), "ve": VE()}
MULTIPLIER = 2.0  # that of the official command


class TeacherTask:
    """Denoising of images: `dsno_kernels.training.loop.Task`.

    Args:
        data: on the device of the model.
        preconditioner: that of the denoiser; says the noise levels and weights.
        conditional: whether the denoiser is told the class.
        drop_classes: share of the samples whose class it is not told, for guidance.
        warm_up: of the weights.
    """

    def __init__(
        self,
        data: Images,
        preconditioner: Preconditioner,
        conditional: bool = False,
        drop_classes: float = 0.0,
        warm_up: WeightWarmUp = NO_WARM_UP,
    ) -> None:
        self.images = data.images
        self.preconditioner = preconditioner
        self.labels = data.labels if conditional else None
        self.drop_classes = drop_classes
        self.warm_up = warm_up

    def draw(self, generator: torch.Generator, batch: int) -> dict[str, Tensor]:
        """The images, noise levels and seeds of the noise of a batch."""
        shift = torch.rand((), generator=generator, dtype=torch.float64)
        quantile = ((torch.arange(batch) + shift) / batch).clamp(1e-12, 1.0 - 1e-12)
        return {
            "index": torch.randint(len(self.images), (batch,), generator=generator),
            "sigma": self.preconditioner.levels(quantile).float(),
            "noise_seed": torch.randint(2**62, (batch,), generator=generator),
            "told": torch.rand(batch, generator=generator) >= self.drop_classes,
        }

    def loss(self, model: nn.Module, part: dict[str, Tensor]) -> Tensor:
        """The weighted squared error; the model is an `EDMDenoiser`."""
        device = self.images.device
        index, sigma = part["index"].to(device), part["sigma"].to(device)
        clean = self.images[index]
        y = None
        if self.labels is not None:
            y = torch.where(part["told"].to(device), self.labels[index], -1)
        seeds = part["noise_seed"].to(device)
        c_skip, c_out, c_in, _ = self.preconditioner.coefficients(sigma)
        output = model(noised(clean, sigma, c_in, seeds=seeds), sigma, y, raw=True)
        return denoising_loss(
            output,
            clean,
            sigma,
            c_skip,
            c_out,
            self.preconditioner.weight(sigma),
            seeds=seeds,
            ceiling=self.warm_up.ceiling(int(part["update"][0])),
            reduction="mean",
        )


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
    process: str = "edm",
    momentum: float | None = None,
    warm_up_loss: int = 0,
    device: torch.device | str = "cpu",
) -> EDMDenoiser:
    """Train a teacher; a run that was stopped goes on from its checkpoint in `out`.

    Args:
        data: images, and labels where the network has classes.
        config: of the network, ``time_conv=False``.
        learning: see :class:`Options`.
        out: folder of the checkpoint and the loss curve.
        sigma_data: standard deviation of the data; None measures it.
        mean, std: of log sigma, for "edm".
        drop_classes: share of the samples whose class the denoiser is not told: it then knows
            ``y = -1``, no class, which guidance needs.
        process: "edm", "vp" or "ve", whose preconditioner, noise levels and weights are used.
        momentum: the multiplier of `FDM`; None is the process itself.
        warm_up_loss: updates in which the weights of the loss have a ceiling that grows.
        device: where it is trained.

    Returns:
        The average of the weights over the updates, in evaluation mode, on `device`.

    Raises:
        CommandError: another process; images of one value, for "edm" without `sigma_data`; see
            `dsno_kernels.training.loop.fit`.

    Example:
        >>> teacher = train(images.digits(), config, DEFAULTS, Path("teacher"))
    """
    if process not in BASES:
        raise CommandError(f"process must be one of {', '.join(BASES)}, got {process!r}")
    level = float(data.images.std()) if sigma_data is None else sigma_data
    # Not by their deviation, which rounding keeps from 0.
    measured = process == "edm" and sigma_data is None
    if measured and not data.images.max() > data.images.min():
        raise CommandError("the images are all the same, of one value; give --sigma-data")
    # Nothing of the last three where they have their defaults: as in checkpoints of before them.
    identity = {
        "config": asdict(config),
        "data": data.fingerprint(),
        "sigma_data": level,
        "p_mean": mean,
        "p_std": std,
        "drop_classes": drop_classes,
        "process": None if process == "edm" else process,
        "momentum": momentum,
        "warm_up_loss": warm_up_loss or None,
    }
    base = EDM(sigma_data=level) if process == "edm" else BASES[process]
    preconditioner = Preconditioner(base if momentum is None else FDM(base, momentum), mean, std)
    torch.manual_seed(learning.seed)
    model = EDMDenoiser(DSNO(config), process=preconditioner.process).to(device)
    labels = None if data.labels is None else data.labels.to(device)
    task = TeacherTask(
        Images(data.images.to(device), labels),
        preconditioner,
        config.num_classes > 0,
        drop_classes,
        WeightWarmUp(warm_up_loss),
    )
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
    _add_process(parser.add_argument_group("process"))
    network.add_arguments(parser)
    options.add_arguments(parser, DEFAULTS)


def _add_process(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--process",
        choices=tuple(BASES),
        default="edm",
        help="whose preconditioner, noise levels and weights of the loss; default: %(default)s",
    )
    group.add_argument(
        "--momentum",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="the momentum diffusion (FDM) of that process; batches stay the same",
    )
    group.add_argument(
        "--multiplier",
        type=float,
        metavar="X",
        help=f"of --momentum, how fast the data decay; default: {MULTIPLIER:g}",
    )
    group.add_argument(
        "--warm-up-loss",
        type=int,
        default=0,
        metavar="N",
        help="updates in which the weights of the loss have a ceiling, from 5 to 500; FDM takes 200"
        " to 800; default: %(default)s",
    )


def _check_process(arguments: argparse.Namespace) -> None:
    """Whether the options of the process fit each other."""
    if arguments.multiplier is not None and not arguments.momentum:
        raise CommandError("--multiplier needs --momentum; give it, too")
    if arguments.multiplier is not None and not 0.0 < arguments.multiplier < math.inf:
        raise CommandError(f"--multiplier must be positive, got {arguments.multiplier}")
    try:
        FDM(BASES[arguments.process], arguments.multiplier or MULTIPLIER)
    except ValueError:
        raise CommandError(
            f"--multiplier {arguments.multiplier:g} is too large: nothing of the data would be left"
            " at the last noise level, not even in float64; the paper's are 1 and 2"
        ) from None
    if arguments.warm_up_loss < 0:
        raise CommandError(f"--warm-up-loss must be at least 0, got {arguments.warm_up_loss}")
    given = (arguments.p_mean, arguments.p_std, arguments.sigma_data)
    if given != (P_MEAN, P_STD, None) and arguments.process != "edm":
        raise CommandError(
            "--p-mean, --p-std and --sigma-data are of --process edm;"
            f" {arguments.process} has no use for them: leave them out"
        )


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
        _check_process(arguments)
        multiplier = MULTIPLIER if arguments.multiplier is None else arguments.multiplier
        teacher = train(
            data,
            config,
            learning,
            arguments.out,
            sigma_data=arguments.sigma_data,
            mean=arguments.p_mean,
            std=arguments.p_std,
            drop_classes=arguments.drop_classes,
            process=arguments.process,
            momentum=multiplier if arguments.momentum else None,
            warm_up_loss=arguments.warm_up_loss,
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
