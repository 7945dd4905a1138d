"""`train dsno`: a one-forward sampler that learns a teacher's trajectories.

Writes into the output folder ``dsno.safetensors`` (the averaged weights; see `models.files`), and
what `training.loop.fit` writes: the checkpoint that a stopped run continues from, the loss curve.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
from pathlib import Path

import torch
from torch import nn

from dsno_kernels.models import DSNO, DSNOConfig, EDMDenoiser, files
from dsno_kernels.training import distributed, loop, network, options
from dsno_kernels.training.errors import CommandError
from dsno_kernels.training.from_teacher import initialize_from_teacher
from dsno_kernels.training.manifest import TrajectoryError
from dsno_kernels.training.options import Options
from dsno_kernels.training.trajectory_loss import LOSSES, WEIGHT_LIMIT, StudentTask, distance
from dsno_kernels.training.trajectory_source import Source, open_source

NAME = "dsno.safetensors"
DEFAULTS = Options(
    steps=2000,
    batch=64,
    learning_rate=2e-3,
    warm_up=100,
    decay="cosine",
    betas=(0.9, 0.99),
    ema_decay=0.995,
)
SAVE_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--trajectories",
        type=Path,
        default=Path("trajectories"),
        metavar="FOLDER",
        help="what `train trajectories` made; default: %(default)s",
    )
    parser.add_argument(
        "--teacher",
        type=Path,
        metavar="FILE",
        help="a model file; its network and its weights are what the student begins with",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("student"),
        metavar="FOLDER",
        help=f"where {NAME}, the checkpoint and the loss curve go; default: %(default)s",
    )
    parser.add_argument(
        "--save-dtype",
        choices=SAVE_DTYPES,
        default="float32",
        help=f"of the weights in {NAME}; default: %(default)s",
    )
    _add_student(parser.add_argument_group("student"))
    network.add_arguments(parser)
    _add_data(parser.add_argument_group("trajectories"))
    group = parser.add_argument_group("loss")
    group.add_argument("--loss", choices=LOSSES, default="l1", help="default: %(default)s")
    group.add_argument(
        "--weight-limit",
        type=float,
        default=WEIGHT_LIMIT,
        metavar="X",
        help="largest weight of a time, where the smallest is 1; default: %(default)g, with"
        " which a short training teaches little but the image: 10 is better there",
    )
    options.add_arguments(parser, DEFAULTS)


def _add_student(group: argparse._ArgumentGroup) -> None:
    flag = argparse.BooleanOptionalAction
    group.add_argument(
        "--temporal",
        action=flag,
        default=True,
        help="a temporal layer after each block; without them each time is learned alone",
    )
    group.add_argument(
        "--modes", type=int, default=2, metavar="K", help="Fourier modes; default: %(default)s"
    )
    group.add_argument(
        "--kernels",
        action=flag,
        default=True,
        help="this library's kernels, or the same network in plain PyTorch",
    )


def _add_data(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--t-idx",
        type=int,
        nargs="+",
        metavar="I",
        help="which states to learn, by place among the frames stored; default: all",
    )
    group.add_argument(
        "--shape",
        type=int,
        nargs=4,
        metavar=("C", "F", "H", "W"),
        help="of the values in an LMDB of the official project, which does not say",
    )
    group.add_argument(
        "--logsnr",
        type=float,
        nargs="+",
        metavar="X",
        help="of the states to learn, for such an LMDB",
    )
    group.add_argument(
        "--verify",
        action="store_true",
        help="compare all values with their checksums first, as is always done with trajectories"
        " that the device can hold",
    )


def run(arguments: argparse.Namespace) -> None:
    with distributed.started(arguments.device) as device:
        try:
            train(arguments, device)
        except TrajectoryError as error:
            raise CommandError(str(error)) from None


def train(arguments: argparse.Namespace, device: torch.device) -> None:
    """The command, in the group of processes that there is."""
    learning = options.from_arguments(arguments, device)
    if not 1.0 <= arguments.weight_limit < float("inf"):
        raise CommandError(f"--weight-limit must be at least 1, got {arguments.weight_limit}")
    source = open_source(
        arguments.trajectories,
        device,
        t_idx=arguments.t_idx,
        shape=arguments.shape,
        logsnr=arguments.logsnr,
        verify=arguments.verify,
    )
    teacher = None if arguments.teacher is None else files.load(arguments.teacher)
    config = configuration(arguments, source, teacher)
    torch.manual_seed(learning.seed)
    student = DSNO(config, kernels=arguments.kernels)
    if teacher is not None:
        copied, left = initialize_from_teacher(student, teacher)
        _say(f"{len(copied)} weights are the teacher's, {len(left)} start anew")
    task = StudentTask(source, distance(arguments.loss, config.image_size), arguments.weight_limit)
    identity = {
        "config": dataclasses.asdict(config),
        "loss": arguments.loss,
        "weight_limit": arguments.weight_limit,
        "teacher": teacher and _digest(teacher),
        "trajectories": source.checksum,
        "logsnr": source.logsnr.tolist(),
    }
    student.to(device)
    average = loop.fit(student, task, learning, arguments.out, identity, source.reading_ahead)
    if distributed.rank() > 0:
        return
    path = arguments.out / NAME
    name = f"{arguments.trajectories}, SHA-256 {source.checksum or 'unknown'}"
    network.save(
        average,
        path,
        dtype=SAVE_DTYPES[arguments.save_dtype],
        logsnr=source.logsnr.tolist(),
        provenance=network.provenance(learning, name),
    )


def configuration(
    arguments: argparse.Namespace, source: Source, teacher: DSNO | EDMDenoiser | None
) -> DSNOConfig:
    """The student's network: the teacher's, or that of the options, with its temporal layers.

    Raises:
        CommandError: options that make no network, or trajectories that do not fit it.
    """
    own = {"time_conv": arguments.temporal, "modes": arguments.modes}
    if teacher is None:
        C, size, _ = source.image_shape
        data = {"image_channels": C, "image_size": size, "num_classes": source.classes}
        config = network.config(arguments, **data, **own)
    else:
        _check_unused(arguments)
        inner = teacher.network if isinstance(teacher, EDMDenoiser) else teacher
        assert isinstance(inner, DSNO)
        try:
            config = dataclasses.replace(inner.config, **own)
        except ValueError as error:
            raise CommandError(f"these options make no network: {error}") from None
    _check_fit(arguments, config, source)
    return config


def _check_unused(arguments: argparse.Namespace) -> None:
    """Whether options ask for a network where a teacher brings one."""
    plain = argparse.ArgumentParser()
    network.add_arguments(plain)
    for name, default in vars(plain.parse_args([])).items():
        if getattr(arguments, name) != default:
            raise CommandError(
                f"--{name.replace('_', '-')} does not go with --teacher {arguments.teacher}, whose"
                " network the student's is; leave one of them out"
            )


def _check_fit(arguments: argparse.Namespace, config: DSNOConfig, source: Source) -> None:
    """Whether the network can learn these trajectories."""
    path, T = arguments.trajectories, len(source.logsnr)
    student = arguments.teacher or "this network"
    image = (config.image_channels, config.image_size, config.image_size)
    if source.image_shape != image:
        raise CommandError(
            f"{path} holds images of shape {source.image_shape}, {student} takes {image}; give"
            " trajectories and a teacher of the same images"
        )
    if bool(config.num_classes) != bool(source.classes) or source.classes > config.num_classes:
        held = f"labels up to {source.classes - 1}" if source.classes else "no labels"
        raise CommandError(
            f"{path} holds {held}, {student} has {config.num_classes} classes; give trajectories"
            " and a teacher of the same classes"
        )
    if config.time_conv and config.modes > T // 2 + 1:
        raise CommandError(
            f"--modes {config.modes} needs at least {2 * config.modes - 2} states, {path} gives"
            f" {T}; ask for at most {T // 2 + 1}"
        )


def _digest(model: nn.Module) -> str:
    """SHA-256 of the weights."""
    digest = hashlib.sha256()
    for tensor in model.state_dict().values():
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


def _say(line: str) -> None:
    if distributed.rank() == 0:
        print(line, flush=True)
