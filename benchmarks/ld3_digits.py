"""Learned time grids (LD3) against hand-made ones on digits, by evaluations of the model.

    python benchmarks/ld3_digits.py            # about 25 minutes on two CPU cores
    python benchmarks/ld3_digits.py --smoke    # a few iterations of each, to see that it runs

Runs `learn-grid` for the digits' exact denoiser and for a trained teacher (`make digits` makes one,
named by --teacher; without it one is trained by `train teacher` first), each with three solvers.
The losses are on held-out noises. Every command that is done is on disk, so that a run that was
stopped continues when it is started again. Writes `ld3-<machine>.json` into the folder of results.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the script runs from a checkout, installed or not

from benchmarks import digits, journal, machine  # noqa: E402

SOLVERS = ("dpmpp_3m", "unipc3_bh2", "ipndm3")
TEACHERS = ("exact", "network")
# Not the default seed: the command's settings were chosen by looking at its held-out losses.
STEPS = "--seed 1 --steps 3 4 5 6 7 8 9 10"
# For a network the command takes fewer noises, so that it ends within a minute.
OPTIONS = {"exact": STEPS, "network": f"{STEPS} --count 512 --held-out 256 --iterations 60"}
SMOKE = "--steps 2 3 --count 8 --held-out 6 --teacher-steps 4 --iterations 3"


def train(folder: Path, smoke: bool) -> Path:
    """The teacher of `benchmarks/digits.py`, trained in the folder."""
    command = f"{digits.COMMANDS['teacher']} {digits.SMOKE['teacher'] if smoke else ''}"
    execute(shlex.split(command), folder)
    return folder / digits.TEACHER


def execute(words: list[str], folder: Path | None = None) -> None:
    """A command of `python -m dsno_kernels`; raises CalledProcessError where it fails."""
    print(f"\n$ python -m dsno_kernels {shlex.join(words)}", flush=True)
    subprocess.run([sys.executable, "-m", "dsno_kernels", *words], cwd=folder, check=True)


def learn(kind: str, teacher: Path | None, solver: str, folder: Path, smoke: bool) -> list[Any]:
    """Learn the grids of one teacher and solver: the entries of the results file."""
    out = folder / f"{kind}-{solver}"
    words = shlex.split(f"learn-grid --device cpu --solver {solver} {OPTIONS[kind]}")
    words += ["--teacher", str(teacher or "exact"), "--out", str(out)]
    words += shlex.split(SMOKE) if smoke else []
    started = time.perf_counter()
    execute(words)
    seconds = time.perf_counter() - started
    shared = {"op": "ld3", "teacher": kind, "solver": solver, "seconds": seconds}
    losses = json.loads((out / "losses.json").read_text())
    return [
        {
            "name": f"ld3[{kind},{solver},{evaluations}]",
            "group": "ld3",
            "extra_info": shared
            | {
                "evaluations": int(evaluations),
                "losses": {name: values[evaluations] for name, values in losses.items()},
            },
        }
        for evaluations in losses["learned"]
    ]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--folder", type=Path, default=Path("ld3"), help="of the grids; default: %(default)s"
    )
    parser.add_argument(
        "--teacher", type=Path, metavar="FILE", help="a trained one; default: train it"
    )
    parser.add_argument(
        "--teachers", nargs="+", choices=TEACHERS, default=TEACHERS, help="default: both"
    )
    parser.add_argument(
        "--results", type=Path, default=ROOT / "benchmarks" / "results", help="folder of JSON files"
    )
    parser.add_argument("--smoke", action="store_true", help="a few iterations of each")
    options = parser.parse_args(argv)
    for folder in (options.folder, options.results):
        folder.mkdir(parents=True, exist_ok=True)
    lines = options.folder / "journal.jsonl"
    try:
        for kind in options.teachers:
            done = {line["done"] for line in journal.read(lines) if "done" in line}
            left = [solver for solver in SOLVERS if f"{kind},{solver}" not in done]
            teacher = None
            if kind == "network" and left:
                teacher = (options.teacher or train(options.folder, options.smoke)).resolve()
            for solver in left:
                for entry in learn(kind, teacher, solver, options.folder, options.smoke):
                    journal.append(lines, entry)
                journal.append(lines, {"done": f"{kind},{solver}"})
    except subprocess.CalledProcessError as error:
        print(f"ld3: stopped; the command above ended with {error.returncode}", file=sys.stderr)
        return 2
    device = torch.device("cpu")
    entries = {line["name"]: line for line in journal.read(lines) if "extra_info" in line}
    path = options.results / f"ld3-{machine.slug(device)}.json"
    journal.write(path, machine.describe(device), list(entries.values()))
    print(f"\nld3: wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
