"""Momentum diffusion (FDM) against its base processes on digits: distance by updates and by NFE.

    python benchmarks/fdm_digits.py            # an hour or more on two CPU cores
    python benchmarks/fdm_digits.py --smoke    # a few updates of each, to see that all of it runs

Trains a teacher for each process (edm, vp, ve), without and with momentum, and each seed, by
`train teacher` with the same network, batches and noise; stops at some numbers of updates, draws
images there with DPM-Solver++(2M) on EDM's grid, and measures their Fréchet distance as `evaluate`
does. Every measurement is on disk at once, so that a run that was stopped continues when it is
started again. Writes `fdm-<machine>.json` into the folder of results, anew after every training.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the script runs from a checkout, installed or not

from benchmarks import journal, machine  # noqa: E402
from dsno_kernels import models  # noqa: E402
from dsno_kernels.diffusion import EDM, SolverPlan, time_grid  # noqa: E402
from dsno_kernels.diffusion.preconditioning import Preconditioner  # noqa: E402
from dsno_kernels.evaluation import features, report, sets  # noqa: E402
from dsno_kernels.evaluation.report import Reference  # noqa: E402
from dsno_kernels.training.images import digits  # noqa: E402

PROCESSES = ("edm", "vp", "ve")
SOLVER = "dpmpp_2m"
# What all runs share; the noise levels of EDM are the paper's, and no rate decays, so that a run of
# few updates is the beginning of a longer one.
COMMAND = (
    "train teacher --batch 128 --learning-rate 2e-3 --warm-up 50 --decay constant --ema-decay 0.99"
    " --device cpu"
)
EDM_LEVELS = "--p-mean -1.2 --p-std 1.2"
MOMENTUM = "--momentum --multiplier 2 --warm-up-loss 20"


@dataclass(frozen=True)
class Size:
    """How much is trained and measured.

    Args:
        updates: at which a run is measured, increasing.
        evaluations: of the network, with which images are drawn after the last update; the first of
            them serves at every number of updates.
        images: of each measurement.
        seeds: of a run: of its weights, batches, and the noise that images are drawn from.
    """

    updates: tuple[int, ...] = (50, 100, 200, 400)
    evaluations: tuple[int, ...] = (12, 5, 8, 20)
    images: int = 1500
    seeds: tuple[int, ...] = (0, 1, 2)
    more: str = ""  # options of the command


SMOKE = Size((1, 2), (3, 2), 100, (0,), "--batch 8 --channel-mult 1 --embedding 32")


@dataclass(frozen=True)
class Run:
    """One training."""

    process: str
    momentum: bool
    seed: int

    @property
    def name(self) -> str:
        return f"{self.process}-{'fdm' if self.momentum else 'base'}-{self.seed}"

    def command(self, updates: int, out: Path, size: Size) -> str:
        parts = [COMMAND, f"--process {self.process} --seed {self.seed} --steps {updates}"]
        parts += [EDM_LEVELS] if self.process == "edm" else []
        parts += [MOMENTUM] if self.momentum else []
        return " ".join([*parts, f"--out {shlex.quote(str(out))}", size.more]).strip()


def runs(size: Size) -> Iterator[Run]:
    for seed in size.seeds:
        for process in PROCESSES:
            for momentum in (False, True):
                yield Run(process, momentum, seed)


def plan(model: models.EDMDenoiser, evaluations: int) -> SolverPlan:
    """The sampler of all: EDM's grid from 80 to 0.002, less where the network was not trained."""
    base = Preconditioner(model.process).base
    lowest = max(0.002, float(base.rho(base.t_min)))
    process = EDM(sigma_min=lowest)
    grid = time_grid(process, evaluations, "karras", append_zero=True)
    return SolverPlan.build(process, grid, SOLVER, prediction="x0")


def execute(words: list[str]) -> None:
    """A command of `python -m dsno_kernels`; raises CalledProcessError where it fails."""
    subprocess.run([sys.executable, "-m", "dsno_kernels", *words], check=True)


def measure(run: Run, size: Size, folder: Path, reference: Reference, lines: Path) -> None:
    """Train and measure what the journal does not hold yet."""
    done = {line["name"] for line in journal.read(lines) if "extra_info" in line}
    out = folder / run.name
    for updates in size.updates:
        last = updates == size.updates[-1]
        wanted = {
            evaluations: f"fdm[{run.name},{updates},{evaluations}]"
            for evaluations in (size.evaluations if last else size.evaluations[:1])
        }
        if done.issuperset(wanted.values()):
            continue
        words = shlex.split(run.command(updates, out, size))
        print(f"\n$ python -m dsno_kernels {shlex.join(words)}", flush=True)
        execute(words)
        path = out / "teacher.safetensors"
        drawing = sets.Drawing(size.images, 512, torch.device("cpu"), "fp32")
        for evaluations, name in wanted.items():
            if name in done:
                continue
            solver = plan(models.load(path, kind="edm_denoiser"), evaluations)
            (samples,) = sets.teachers(str(path), {name: solver}, drawing)
            row = report.row_of(samples, reference, [run.seed], lambda: None)
            entry = {
                "op": "fdm",
                "process": run.process,
                "momentum": run.momentum,
                "seed": run.seed,
                "updates": updates,
                "evaluations": evaluations,
                "last": last,
                "frechet": row.measures[0]["frechet"],
                "images": row.images,
                "features": reference.features.name,
            }
            print(f"{name}: Fréchet distance {entry['frechet']:.2f}", flush=True)
            journal.append(lines, {"name": name, "group": "fdm", "extra_info": entry})


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--folder", type=Path, default=Path("fdm"), help="of checkpoints; default: %(default)s"
    )
    parser.add_argument(
        "--results", type=Path, default=ROOT / "benchmarks" / "results", help="folder of JSON files"
    )
    parser.add_argument("--smoke", action="store_true", help="a few updates of each command")
    parser.add_argument(
        "--updates",
        type=int,
        nargs="+",
        metavar="N",
        help=f"at which a training is measured; default: {' '.join(map(str, Size().updates))}",
    )
    options = parser.parse_args(argv)
    options.folder.mkdir(parents=True, exist_ok=True)
    options.results.mkdir(parents=True, exist_ok=True)
    size = SMOKE if options.smoke else Size()
    if options.updates:
        size = replace(size, updates=tuple(sorted(set(options.updates))))
    lines = options.folder / "journal.jsonl"
    device = torch.device("cpu")
    about = {
        "machine_info": machine.describe(device),
        "slug": f"fdm-{machine.slug(device)}",
    }
    journal.append(lines, about)
    network = features.pixels() if options.smoke else features.digits(options.folder)
    reference = Reference("digits", digits().images, network)
    try:
        for run in runs(size):
            measure(run, size, options.folder, reference, lines)
            path = journal.write_results(lines, options.results)
    except subprocess.CalledProcessError as error:
        print(f"fdm: stopped; the command above ended with {error.returncode}", file=sys.stderr)
        return 2
    print(f"\nfdm: wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
