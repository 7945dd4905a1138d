"""The command `evaluate`: samples against real images, over several seeds."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsno_kernels import __version__
from dsno_kernels._files import write_json
from dsno_kernels.diffusion import SolverPlan
from dsno_kernels.evaluation import features, report, sets
from dsno_kernels.sampling.command import positive
from dsno_kernels.sampling.generation import PRECISIONS
from dsno_kernels.time_grids.plans import PROCESS, PROCESSES, SOLVER, is_file, plan_of
from dsno_kernels.training.distributed import choose_device
from dsno_kernels.training.errors import CommandError, prepare_folder

STUDENT, ABLATION = "student", "student without temporal layers"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `evaluate`."""

    def add(flag: str, text: str, **options: Any) -> None:
        parser.add_argument(flag, help=f"{text}; default: %(default)s", **options)

    parser.add_argument(
        "sets",
        nargs="*",
        metavar="SET",
        help="images to judge: an .npz, a folder, a DSNO's file, or digits (the real ones)",
    )
    parser.add_argument("--student", metavar="FILE", help="a DSNO; digits is the packaged one")
    parser.add_argument(
        "--ablation", metavar="FILE", help="the same DSNO trained without temporal layers"
    )
    parser.add_argument(
        "--teacher", metavar="FILE", help="the denoiser, sampled with a solver for comparison"
    )
    whole: dict[str, Any] = {"type": positive, "metavar": "N"}
    add(
        "--evaluations",
        "steps of the teacher's solver, with each kind of --grid",
        nargs="+",
        default=[5, 10, 20],
        **whole,
    )
    usual = "default: that of a grid's file; otherwise"
    parser.add_argument(
        "--solver", help=f"of the teacher, a name of dk.diffusion.solvers(); {usual} {SOLVER}"
    )
    add(
        "--grid",
        "times of the solver: kinds of dk.diffusion.time_grid, or files (.json) of learned grids,"
        " with their own number of steps",
        nargs="+",
        default=["uniform"],
    )
    parser.add_argument(
        "--process",
        help=f"of the teacher's sampling; {usual} {PROCESS}",
        choices=tuple(PROCESSES),
    )
    add("--reference", "real images: digits, an .npz or a folder", metavar="SET", default="digits")
    add(
        "--features",
        "digits (a small classifier), pixels, or your network: a TorchScript file (.ts, .pt) such"
        " as Inception",
        default="digits",
    )
    add("--classifier-seed", "of the training of that classifier", type=int, default=0)
    parser.add_argument(
        "--count", help="images drawn of each model; default: as the reference has", **whole
    )
    add("--seeds", "draws of each model, for the spread", default=3, **whole)
    add("--seed", "the first of them", type=int, metavar="N", default=0)
    add("--batch", "images an evaluation", default=256, **whole)
    add("--device", "where", choices=("auto", "cpu", "cuda"), default="auto")
    add("--precision", "bf16 is autocast", choices=PRECISIONS, default="fp32")
    add(
        "--out",
        "folder that keeps the digit classifier",
        type=Path,
        metavar="FOLDER",
        default=Path("evaluation_output"),
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="all numbers, for programs")


def run(arguments: argparse.Namespace) -> None:
    """The command `evaluate`.

    Raises:
        CommandError: sets, features or models that cannot be compared. ModelFileError: a file that
        is no model of the kind wanted.
    """
    from tqdm import tqdm

    _check_seeds(arguments)
    if arguments.json is not None:
        prepare_folder(arguments.json.parent, "the folder of --json,")
    device = choose_device(arguments.device)
    real = sets.fixed(arguments.reference)
    if real is None:
        raise CommandError(f"--reference {arguments.reference} is a model; give real images")
    samples = _sample_sets(arguments, real, device)
    network = _features(arguments, device)
    reference = report.Reference(arguments.reference, real, network)
    seeds = range(arguments.seed, arguments.seed + arguments.seeds)
    draws = sum(len(seeds) if one.evaluations else 1 for one in samples)
    with tqdm(total=draws, unit="draw", dynamic_ncols=True) as bar:
        rows = [report.row_of(one, reference, seeds, bar.update) for one in samples]
    rows += reference.floors(arguments.count or len(real), seeds)
    print(f"Features: {network.name}; {len(real)} reference images; {len(seeds)} seeds\n")
    print(report.table(rows))
    found = {row.name: row for row in rows}
    differences = []
    if STUDENT in found and ABLATION in found:
        differences = report.paired(found[STUDENT], found[ABLATION])
        shown = ", ".join(f"{value:+.2f}" for value in differences)
        print(f"\nWith temporal layers minus without, seed by seed: {shown}")
    if arguments.json is not None:
        content = {
            "reference": arguments.reference,
            "reference_images": len(real),
            "features": network.name,
            "feature_size": reference.vectors.shape[1],
            "seeds": list(seeds),
            "device": str(device),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "version": __version__,
            "rows": [row.as_dict() for row in rows],
            "student_minus_ablation": differences,
        }
        write_json(arguments.json, content)


def _check_seeds(arguments: argparse.Namespace) -> None:
    """Whether random generators take all seeds."""
    wanted = {
        "--seed": (arguments.seed, arguments.seeds),
        "--classifier-seed": (arguments.classifier_seed, 1),
    }
    for flag, (first, count) in wanted.items():
        if not 0 <= first <= 2**64 - count:
            raise CommandError(f"{flag} must be in 0 .. 2**64 - {count}, got {first}")


def _sample_sets(
    arguments: argparse.Namespace, real: Tensor, device: torch.device
) -> list[sets.SampleSet]:
    """What is to be judged, in the order of the table."""
    drawing = sets.Drawing(
        arguments.count or len(real), arguments.batch, device, arguments.precision
    )
    found = []
    if arguments.teacher is not None:
        found += sets.teachers(arguments.teacher, _plans(arguments), drawing)
    if arguments.student is not None:
        found.append(sets.student(STUDENT, arguments.student, drawing))
    if arguments.ablation is not None:
        found.append(sets.student(ABLATION, arguments.ablation, drawing))
    found += [sets.of_text(text, drawing) for text in arguments.sets]
    if not found:
        raise CommandError("nothing to judge; give sets, --student, --ablation or --teacher")
    return found


def _plans(arguments: argparse.Namespace) -> dict[str, SolverPlan]:
    """The teacher's solvers, each with its name in the table."""
    process, solver, found = arguments.process, arguments.solver, {}
    for grid in arguments.grid:
        note = f", {grid} grid" if is_file(grid) or len(arguments.grid) > 1 else ""
        try:
            for steps in [None] if is_file(grid) else arguments.evaluations:
                plan = plan_of(grid, steps, process=process, solver=solver)
                name = f"teacher, {plan.solver}, {plan.evaluations} evaluations{note}"
                found[name] = plan
        except ValueError as error:
            options = f"--grid {grid}" if solver is None else f"--solver {solver}, --grid {grid}"
            raise CommandError(f"{options}: {error}") from None
    return found


def _features(arguments: argparse.Namespace, device: torch.device) -> features.Features:
    if arguments.features == "pixels":
        return features.pixels()
    if arguments.features == "digits":
        prepare_folder(arguments.out)
        return features.digits(arguments.out, arguments.classifier_seed)
    return features.torchscript(Path(arguments.features), device)
