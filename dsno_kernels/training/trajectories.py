"""`train trajectories`: solve the teacher's ODE from many noises, and keep states on the way.

The output folder holds ``manifest.json`` and one LMDB a shard (see `trajectory_files`). Each
process of torchrun fills shards of its own and needs no other; a run that was stopped, however
hard, goes on where it stood when the same command is given again.
"""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dsno_kernels import diffusion, models
from dsno_kernels.time_grids.plans import PROCESS, PROCESSES, SOLVER, is_file, plan_of
from dsno_kernels.training import distributed, images
from dsno_kernels.training.errors import CommandError, prepare_folder
from dsno_kernels.training.manifest import TrajectoryError
from dsno_kernels.training.trajectory_data import TrajectoryDataset
from dsno_kernels.training.trajectory_writer import FRAMES, verify, write_trajectories

__all__ = ["PROCESSES", "TrajectoryDataset", "TrajectoryError", "write_trajectories"]

EXACT = "exact"
STEPS = 16


def add_arguments(parser: argparse.ArgumentParser) -> None:
    def add(flag: str, text: str, **options: Any) -> None:
        default = options.get("default")
        parser.add_argument(
            flag, help=text + ("; default: %(default)s" if default else ""), **options
        )

    add("--teacher", "a model file of `train teacher`, or exact: the images' own", required=True)
    images.add_arguments(parser)
    add("--out", "the folder", type=Path, default=Path("trajectories"), metavar="FOLDER")
    add("--count", "trajectories", type=int, default=20_000, metavar="N")
    usual = "that of a grid's file; otherwise"
    add("--process", f"noising process; default: {usual} {PROCESS}", choices=tuple(PROCESSES))
    add("--solver", f"one of dk.diffusion.solvers(); default: {usual} {SOLVER}", metavar="NAME")
    add("--steps", f"of the solver; default: {usual} {STEPS}", type=int, metavar="N")
    add(
        "--grid",
        "kind of time grid, as of dk.diffusion.time_grid, or the file (.json) of a learned one",
        default="uniform",
        metavar="GRID",
    )
    add("--grid-order", "order of the time grid", type=float, metavar="X")
    add("--t-start", "first time; the process's by default", type=float, metavar="T")
    add("--t-end", "last time; the process's by default", type=float, metavar="T")
    add(
        "--times",
        f"places in the grid (1..steps) to keep; {FRAMES} evenly spaced ones by default",
        type=int,
        nargs="+",
        metavar="I",
    )
    add("--conditional", "classes of the images, with --teacher exact", action="store_true")
    add("--labels", "only these classes", type=int, nargs="+", metavar="Y")
    add(
        "--guidance",
        "scale of classifier-free guidance; a trained teacher needs --drop-classes for it",
        type=float,
        metavar="X",
    )
    add("--batch", "trajectories at a time", type=int, default=512, metavar="N")
    add("--seed", "of the noise", type=int, default=0)
    add("--shards", "LMDB folders; one a process by default", type=int, metavar="N")
    add("--precision", "of the teacher's network", choices=("fp32", "bf16"), default="fp32")
    add("--device", "auto takes a GPU", choices=("auto", "cpu", "cuda"), default="auto")
    add("--verify", "read all again and compare with the checksums", action="store_true")


def run(arguments: argparse.Namespace) -> None:
    device = distributed.choose_device(arguments.device)
    prepare_folder(arguments.out)
    steps = arguments.steps
    try:
        plan = plan_of(
            arguments.grid,
            STEPS if steps is None and not is_file(arguments.grid) else steps,
            process=arguments.process,
            solver=arguments.solver,
            order=arguments.grid_order,
            t_start=arguments.t_start,
            t_end=arguments.t_end,
        )
        teacher = teacher_of(arguments, device)
        shards = write_trajectories(
            arguments.out,
            diffusion.for_process(teacher.denoiser, plan.process),
            plan,
            count=arguments.count,
            shape=teacher.shape,
            positions=arguments.times,
            classes=teacher.classes,
            guidance=arguments.guidance,
            seed=arguments.seed,
            batch=arguments.batch,
            shards=arguments.shards,
            teacher=teacher.name,
            device=device,
            precision=arguments.precision,
            progress=True,
        )
        if arguments.verify:
            verify(arguments.out)
    except ValueError as error:
        raise CommandError(str(error)) from None
    for path in shards:
        print(f"Wrote {path}{', and every value is as it was' if arguments.verify else ''}")


class Teacher(NamedTuple):
    """A denoiser, the shape of its images, its classes or None, and what tells it from another."""

    denoiser: Callable[..., Tensor]
    shape: tuple[int, ...]
    classes: list[int] | None
    name: str


def teacher_of(arguments: argparse.Namespace, device: torch.device) -> Teacher:
    """What --teacher names, with --conditional, --labels and --guidance.

    Raises:
        CommandError: options that do not fit the teacher, or images that cannot be used.
        ModelFileError: a file that is no teacher.
    """
    if arguments.teacher == EXACT:
        data = images.load(arguments.data, arguments.size, arguments.classes)
        conditional = arguments.conditional or arguments.labels is not None
        if conditional and data.labels is None:
            raise CommandError(f"--data {arguments.data} has no classes; leave out --conditional")
        labels = data.labels if conditional else None
        known = [] if labels is None else labels.unique().tolist()
        exact = diffusion.ExactDenoiser(data.images, labels).to(device)
        shape = tuple(data.images.shape[1:])
        return Teacher(exact, shape, _chosen(arguments, known), f"exact {data.fingerprint()}")
    path = Path(arguments.teacher)
    _check_unused(arguments)
    model = models.load(path, device, kind="edm_denoiser")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    config = model.network.config
    shape = (config.image_channels, config.image_size, config.image_size)
    if arguments.conditional and config.num_classes == 0:
        raise CommandError(f"--conditional: {path} knows no classes; leave it out")
    classes = _chosen(arguments, list(range(config.num_classes)))
    if arguments.guidance is not None and not _knows_no_class(path):
        raise CommandError(
            f"--guidance needs a teacher that also knows no class; train {path} with"
            " --conditional --drop-classes 0.1"
        )
    return Teacher(model, shape, classes, f"edm_denoiser {digest}")


def _check_unused(arguments: argparse.Namespace) -> None:
    """Whether options ask for images where a teacher needs none."""
    plain = argparse.ArgumentParser()
    images.add_arguments(plain)
    for name, default in vars(plain.parse_args([])).items():
        if getattr(arguments, name) != default:
            raise CommandError(
                f"--{name} goes with --teacher exact; the teacher {arguments.teacher} needs no"
                " images: leave it out"
            )


def _knows_no_class(path: Path) -> bool:
    """Whether a teacher was trained with a share of its images without their class."""
    text = models.read_metadata(path).get("drop_classes", "0")
    try:
        return float(text) > 0.0
    except ValueError:
        raise CommandError(f"{path}: its drop_classes must be a number, got {text}") from None


def _chosen(arguments: argparse.Namespace, known: list[int]) -> list[int] | None:
    """The classes of the trajectories."""
    if arguments.labels is None:
        return known or None
    for label in arguments.labels:
        if label not in known:
            raise CommandError(f"--labels {label}: the teacher knows {known or 'no classes'}")
    return list(arguments.labels)
