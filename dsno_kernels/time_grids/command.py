"""The command `learn-grid`: the best times for a solver with few steps, learned from a teacher."""

from __future__ import annotations

import argparse
import dataclasses
import math
from pathlib import Path
from typing import Any

import torch

from dsno_kernels._files import write_json
from dsno_kernels._noise import standard_normal
from dsno_kernels.diffusion import (
    EDM,
    VE,
    FlowMatching,
    LearningOptions,
    SolverPlan,
    for_process,
    learn_time_grid,
    time_grid,
)
from dsno_kernels.diffusion.learning import distances
from dsno_kernels.diffusion.learning.options import OPTIMIZERS
from dsno_kernels.diffusion.learning.pairs import Student
from dsno_kernels.diffusion.learning.parameters import MODES
from dsno_kernels.sampling.command import positive
from dsno_kernels.time_grids import plots
from dsno_kernels.time_grids.plans import PROCESS, PROCESSES
from dsno_kernels.time_grids.plots import LEARNED
from dsno_kernels.time_grids.problem import (
    GITS_SAMPLES,
    GITS_STEPS,
    HAND_MADE,
    HELD_OUT,
    LEARNING,
    Teacher,
    bar,
    counted,
    hand_made,
    loss_of,
    moves,
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


@dataclasses.dataclass(frozen=True)
class Usual:
    """How a grid is learned where no option says otherwise, as `LearningOptions` has it.

    Args:
        count, held_out: noises to learn from, and others to judge all grids by.
    """

    count: int
    held_out: int
    validation: float
    optimizer: str
    iterations: int
    rounds: int
    batch: int | None


# What an exact denoiser makes of a noise jumps from one image to another as the times change, which
# only many noises average out; it is cheap. L-BFGS would learn the jumps of its noises by heart.
# Networks jump less, but they do: what 128 noises taught with 8 evaluations and more was worse, on
# others, than the best hand-made grid.
EXACT = Usual(8192, 2048, 0.5, "adam", 160, 8, 256)
NETWORK = Usual(320, 128, 0.5, "adam", 48, 4, 64)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `learn-grid`."""

    def add(flag: str, text: str, **options: Any) -> None:
        parser.add_argument(flag, help=f"{text}; default: %(default)s", **options)

    def add_usual(flag: str, text: str, name: str, **options: Any) -> None:
        exact, network = (getattr(usual, name) or "none" for usual in (EXACT, NETWORK))
        default = f"default: {exact} with an exact teacher, else {network}"
        parser.add_argument(flag, help=f"{text}; {default}", **options)

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
    for flag, what, name in (
        ("--count", "noises to learn from", "count"),
        ("--held-out", "other noises, by which all grids are judged", "held_out"),
        ("--iterations", "of the optimizer", "iterations"),
        ("--batch", "samples at a time, and those of a step of adam", "batch"),
    ):
        add_usual(flag, what, name, **whole)
    add_usual(
        "--optimizer", "lbfgs on all noises, or adam on batches", "optimizer", choices=OPTIMIZERS
    )
    parser.add_argument(
        "--learning-rate",
        type=float,
        metavar="X",
        help="of adam; default: 0.1 over the number of steps",
    )
    add("--teacher-steps", "of the solver that makes the targets", default=50, **whole)
    add("--loss", "distance from the target", choices=distances.LOSSES, default="l2")
    add("--mode", "in what the gaps are shares of", choices=MODES, default="auto")
    parser.add_argument(
        "--soft", action="store_true", help="let the noises move a little, too: LD3's soft loss"
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
        _fill(options)
        _check(options)
        learning = LearningOptions(
            mode=options.mode,
            soft=options.soft,
            coefficients=options.coefficients,
            optimizer=options.optimizer,
            iterations=options.iterations,
            rounds=options.rounds,
            learning_rate=options.learning_rate,
            batch=options.batch,
            validation=options.validation,
            seed=options.seed,
        )
        with distributed.started(options.device) as device:
            _learn(options, learning, device)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"the best grids so far are in {options.out}") from None
    except (ValueError, ImportError) as error:
        raise CommandError(str(error)) from None


def _fill(options: argparse.Namespace) -> None:
    """Put what is usual for the teacher where no option was given."""
    usual = EXACT if options.teacher == trajectories.EXACT else NETWORK
    for name, value in dataclasses.asdict(usual).items():
        if getattr(options, name, None) is None:
            setattr(options, name, value)


def _check(options: argparse.Namespace) -> None:
    """Raise, before anything takes time, for options that cannot work."""
    standard_normal((1,), range(1), options.seed, LEARNING)  # refuses a seed that is out of range
    fewest, most = min(options.steps), max(options.steps)
    if fewest < 2:
        raise CommandError(
            f"--steps must be at least 2, got {fewest}: the ends of a grid are fixed"
        )
    if most >= options.teacher_steps:
        raise CommandError(
            f"--steps {most} needs a teacher that takes more: --teacher-steps is"
            f" {options.teacher_steps}"
        )
    if options.count == 1:
        raise CommandError("--count must be at least 2, got 1: some teach, and some judge")
    process = ALL_PROCESSES[options.process]
    times = time_grid(process, fewest, TEACHER_GRID)
    plan = SolverPlan.build(process, times, options.solver, end=END, prediction="x0")
    if plan.stochastic():
        raise CommandError(f"--solver {options.solver} adds noise; take one without")


def _learn(options: argparse.Namespace, learning: LearningOptions, device: torch.device) -> None:
    teacher, name = _teacher(options, device)
    process = teacher.plan.process
    first = distributed.rank() == 0
    counts, batch = (options.count, options.held_out), options.batch
    fine = max(GITS_STEPS, *options.steps)
    with bar(teacher.calls(counts, batch) + fine, "teacher") as shown:
        watched = dataclasses.replace(teacher, model=counted(teacher.model, shown))
        pairs, held_out = (
            watched.pairs(number, options.seed, stream, batch)
            for number, stream in zip(counts, (LEARNING, HELD_OUT), strict=True)
        )
        costs = watched.costs(min(len(pairs), GITS_SAMPLES), options.seed, fine)
    student = Student(teacher.model, False, None, distances.found(options.loss))
    losses: dict[str, dict[int, float]] = {key: {} for key in (*HAND_MADE, LEARNED)}
    first_pairs = pairs.part(slice(len(held_out)))  # enough to choose where to begin
    for steps in sorted(set(options.steps)):
        others = hand_made(teacher.plan, costs, steps, options.solver, END)
        start = min(others, key=lambda key: loss_of(student, first_pairs, others[key], batch))
        path = options.out / f"{options.solver}-{steps}.json"
        with bar(options.iterations, f"{steps} steps", "iteration") as shown:
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
                callback=moves(shown),
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
