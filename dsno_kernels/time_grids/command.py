"""The command `learn-grid`: the best times for a solver with few steps, learned from a teacher."""

from __future__ import annotations

import argparse
import dataclasses
import math
from pathlib import Path
from typing import Any

import torch

from dsno_kernels._files import write_json
from dsno_kernels.diffusion import (
    EDM,
    VE,
    FlowMatching,
    LearningOptions,
    SolverPlan,
    _grid_losses,
    for_process,
    learn_time_grid,
    time_grid,
)
from dsno_kernels.diffusion._teacher_pairs import Student
from dsno_kernels.diffusion.time_parameters import MODES
from dsno_kernels.sampling.command import positive
from dsno_kernels.time_grids import plots
from dsno_kernels.time_grids.plans import PROCESS, PROCESSES
from dsno_kernels.time_grids.plots import LEARNED
from dsno_kernels.time_grids.problem import (
    GITS_SAMPLES,
    HAND_MADE,
    HELD_OUT,
    LEARNING,
    Teacher,
    hand_made,
    loss_of,
)
from dsno_kernels.training import distributed, images, trajectories
from dsno_kernels.training.errors import CommandError, prepare_folder

ALL_PROCESSES = PROCESSES | {
    "edm": EDM(),
    "ve": VE(),
    # Ends at which both alpha and sigma are there, for grids that count in their ratio.
    "flow": FlowMatching(t_min=1e-3, t_max=1.0 - 1e-3),
}
# Of the solver that makes the targets.
TEACHER_SOLVER, TEACHER_GRID = "unipc3_bh2", "log_snr"
END = "lower_order_final"
# Noises to learn from, and to judge by. What an exact denoiser makes of a noise jumps from one
# image to another as the times change, which only many noises average out; it is cheap.
COUNTS = {True: (512, 512), False: (64, 128)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `learn-grid`."""

    def add(flag: str, text: str, **options: Any) -> None:
        parser.add_argument(flag, help=f"{text}; default: %(default)s", **options)

    whole: dict[str, Any] = {"type": positive, "metavar": "N"}
    add(
        "--teacher",
        "a model file of `train teacher`, or exact: the images' own denoiser",
        default=trajectories.EXACT,
        metavar="FILE",
    )
    images.add_arguments(parser)
    parser.add_argument("--conditional", action="store_true", help="classes, with --teacher exact")
    parser.add_argument("--labels", type=int, nargs="+", metavar="Y", help="only these classes")
    parser.add_argument(
        "--guidance", type=float, metavar="X", help="scale of classifier-free guidance"
    )
    add("--process", "noising process", choices=tuple(ALL_PROCESSES), default=PROCESS)
    add("--solver", "one of dk.diffusion.solvers()", default="dpmpp_3m", metavar="NAME")
    add("--steps", "of the solver, a grid for each number", nargs="+", default=[5], **whole)
    for flag, what, i in (
        ("--count", "noises to learn from", 0),
        ("--held-out", "other noises, by which all grids are judged", 1),
    ):
        usual = f"default: {COUNTS[True][i]} with an exact teacher, else {COUNTS[False][i]}"
        parser.add_argument(flag, help=f"{what}; {usual}", **whole)
    add("--teacher-steps", "of the solver that makes the targets", default=50, **whole)
    add("--loss", "distance from the target", choices=_grid_losses.LOSSES, default="l2")
    add("--mode", "in what the gaps are shares of", choices=MODES, default="auto")
    add("--iterations", "of the optimizer", default=LearningOptions.iterations, **whole)
    parser.add_argument(
        "--soft", action="store_true", help="let the noises move a little, too: LD3's soft loss"
    )
    parser.add_argument(
        "--batch", **whole, help="samples at a time, for less memory; default: all at once"
    )
    parser.add_argument(
        "--coefficients", action="store_true", help="learn the solver's coefficients, too"
    )
    add("--seed", "of the noises", type=int, metavar="N", default=0)
    add("--device", "where", choices=("auto", "cpu", "cuda"), default="auto")
    add("--out", "folder", type=Path, metavar="FOLDER", default=Path("learned_grids"))


def run(options: argparse.Namespace) -> None:
    """The command `learn-grid`.

    Raises:
        CommandError: options that do not fit together, or a folder that cannot be written.
        ModelFileError: a file that is no teacher.
    """
    prepare_folder(options.out)
    try:
        learning = LearningOptions(
            mode=options.mode,
            soft=options.soft,
            coefficients=options.coefficients,
            iterations=options.iterations,
            batch=options.batch,
            seed=options.seed,
        )
        with distributed.started(options.device) as device:
            _learn(options, learning, device)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"the best grids so far are in {options.out}") from None
    except (ValueError, ImportError) as error:
        raise CommandError(str(error)) from None


def _learn(options: argparse.Namespace, learning: LearningOptions, device: torch.device) -> None:
    teacher, name = _teacher(options, device)
    process = teacher.plan.process
    first = distributed.rank() == 0
    count, judging = COUNTS[options.teacher == trajectories.EXACT]
    pairs = teacher.pairs(options.count or count, options.seed, LEARNING, options.batch)
    held_out = teacher.pairs(options.held_out or judging, options.seed, HELD_OUT, options.batch)
    costs = teacher.costs(min(len(pairs), GITS_SAMPLES), options.seed)
    student = Student(teacher.model, False, None, _grid_losses.found(options.loss))
    losses: dict[str, dict[int, float]] = {key: {} for key in (*HAND_MADE, LEARNED)}
    for steps in sorted(set(options.steps)):
        others = hand_made(teacher.plan, costs, steps, options.solver, END)
        start = min(others, key=lambda key: loss_of(student, pairs, others[key], options.batch))
        path = options.out / f"{options.solver}-{steps}.json"
        grid = learn_time_grid(
            teacher.model,
            process,
            steps,
            pairs.x_T,
            pairs.targets,
            solver=options.solver,
            end=END,
            grid=others[start].grid,
            kwargs=pairs.kwargs,
            unconditional=pairs.unconditional,
            guidance=pairs.guidance,
            loss=options.loss,
            options=learning,
            out=path,
            progress=True,
        )
        plans = others | {LEARNED: grid.plan()}
        for key, plan in plans.items():
            losses[key][plan.evaluations] = loss_of(student, held_out, plan, options.batch)
        if first:
            origin = {"teacher": name, "seed": options.seed, "held_out": len(held_out)}
            dataclasses.replace(
                grid,
                loss=losses[LEARNED][grid.evaluations],
                baselines={key: losses[key][grid.evaluations] for key in others},
                provenance=grid.provenance | origin | {"start": start},
            ).save(path)
    if first:
        times = {key: plan.grid.tolist() for key, plan in plans.items()}
        title = f"{options.solver}, {options.process}, teacher {options.teacher}"
        picture = options.out / "grids.png"
        plots.draw(picture, process, times, grid.denoiser_times, losses, title)
        write_json(options.out / "losses.json", losses)
        print(f"Loss ({options.loss}) on {len(held_out)} held-out noises, {options.solver}:\n")
        print(table(losses))
        print(f"\nWrote {options.out}: a grid for each number of steps, losses.json, grids.png")


def _teacher(options: argparse.Namespace, device: torch.device) -> tuple[Teacher, str]:
    """The teacher and what tells it from another."""
    found = trajectories.teacher_of(options, device)
    if options.guidance is not None and not math.isfinite(options.guidance):
        raise CommandError(f"--guidance must be finite, got {options.guidance}")
    if options.guidance is not None and found.classes is None:
        raise CommandError("--guidance needs classes; give --conditional, or a teacher with them")
    process = ALL_PROCESSES[options.process]
    grid = time_grid(process, options.teacher_steps, TEACHER_GRID)
    plan = SolverPlan.build(process, grid, TEACHER_SOLVER, end=END, prediction="x0")
    model = for_process(found.denoiser, process)
    return Teacher(model, plan, found.shape, device, found.classes, options.guidance), found.name


def table(losses: plots.Losses) -> str:
    """Markdown: a row a grid, a column a number of evaluations, the least loss in bold."""
    columns = list(losses[LEARNED])
    least = {n: min(values[n] for values in losses.values()) for n in columns}
    lines = [
        "| grid | " + " | ".join(f"{n} evaluations" for n in columns) + " |",
        "| --- |" + " ---: |" * len(columns),
    ]
    for name, values in losses.items():
        cells = [
            f"**{values[n]:.3g}**" if values[n] == least[n] else f"{values[n]:.3g}" for n in columns
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
