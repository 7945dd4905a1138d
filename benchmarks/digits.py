"""The digits result from nothing: teacher, trajectories, student, ablation, evaluation.

    python benchmarks/digits.py            # about 40 minutes on two CPU cores (`make digits`)
    python benchmarks/digits.py --smoke    # a few updates of each, to see that all of it runs

Runs the commands of README one after the other and writes `digits-<machine>.json` into the folder
of results: the numbers of `evaluate`, the seconds that each command took, and the errors of student
and ablation on trajectories that neither has seen. A run that was stopped continues when it is
started again, and the seconds of both are added.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the script runs from a checkout, installed or not

from benchmarks import digits_held_out, journal, machine  # noqa: E402

TEACHER = "digits/teacher/teacher.safetensors"
STUDENT = "digits/student/dsno.safetensors"
ABLATION = "digits/ablation/dsno.safetensors"
TABLE = "digits/table.json"
SECONDS = "digits/seconds.json"
STATES = "digits/states.json"
LEARN = (
    f"train dsno --trajectories digits/trajectories --teacher {TEACHER} --steps 2000 --batch 64"
    " --learning-rate 2e-3 --warm-up 100 --ema-decay 0.99 --weight-limit 10 --save-dtype float16"
)
# What README shows, from here.
COMMANDS = {
    "teacher": "train teacher --conditional --steps 1500 --out digits/teacher",
    "trajectories": (
        f"train trajectories --teacher {TEACHER} --count 12000 --steps 16 --out digits/trajectories"
    ),
    "student": f"{LEARN} --out digits/student",
    "ablation": f"{LEARN} --no-temporal --out digits/ablation",
    "evaluation": (
        f"evaluate --teacher {TEACHER} --student {STUDENT} --ablation {ABLATION} --count 6000"
        f" --out digits/evaluation --json {TABLE}"
    ),
}
# In a smoke run, last on the command line.
SMOKE = {
    "teacher": "--steps 4",
    "trajectories": "--count 64",
    "student": "--steps 4",
    "ablation": "--steps 4",
    "evaluation": "--count 128 --seeds 2 --evaluations 5",
}


def run(name: str, folder: Path, smoke: bool) -> None:
    """Run one command in a folder, and add its seconds to those of earlier runs there."""
    words = shlex.split(COMMANDS[name]) + (shlex.split(SMOKE[name]) if smoke else [])
    print(f"\n$ python -m dsno_kernels {shlex.join(words)}", flush=True)
    started = time.perf_counter()
    try:
        subprocess.run([sys.executable, "-m", "dsno_kernels", *words], cwd=folder, check=True)
    finally:
        path = folder / SECONDS
        seconds = json.loads(path.read_text()) if path.exists() else {}
        seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - started
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(seconds))


def write_result(folder: Path, results: Path) -> Path:
    """Write the results file, as `benchmarks/report.py` reads it, of what was run in `folder`."""
    measured = json.loads((folder / TABLE).read_text())
    seconds = json.loads((folder / SECONDS).read_text())
    device = torch.device("cuda" if measured["device"].startswith("cuda") else "cpu")
    shared = {"op": "digits", "seconds": seconds} | {
        key: measured[key] for key in ("features", "reference_images", "seeds")
    }
    entries = [
        {"name": f"digits[{row['name']}]", "group": "digits", "extra_info": shared | {"row": row}}
        for row in measured["rows"]
    ]
    paired = {"op": "digits_paired", "differences": measured["student_minus_ablation"]}
    entries.append({"name": "digits_paired", "group": "digits", "extra_info": paired})
    states = json.loads((folder / STATES).read_text())
    info = {"op": "digits_states"} | states
    entries.append({"name": "digits_states", "group": "digits", "extra_info": info})
    path = results / f"digits-{machine.slug(device)}.json"
    journal.write(path, machine.describe(device), entries)
    return path


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--folder", type=Path, default=Path(), help="where the folder digits/ goes; default: here"
    )
    parser.add_argument(
        "--results", type=Path, default=ROOT / "benchmarks" / "results", help="folder of JSON files"
    )
    parser.add_argument("--smoke", action="store_true", help="a few updates of each command")
    options = parser.parse_args(argv)
    options.folder.mkdir(parents=True, exist_ok=True)
    options.results.mkdir(parents=True, exist_ok=True)
    try:
        for name in COMMANDS:
            run(name, options.folder, options.smoke)
        states = digits_held_out.measure(
            options.folder,
            TEACHER,
            {"student": STUDENT, "ablation": ABLATION},
            64 if options.smoke else digits_held_out.COUNT,
        )
    except subprocess.CalledProcessError as error:
        print(f"digits: stopped; the command above ended with {error.returncode}", file=sys.stderr)
        return 2
    (options.folder / STATES).write_text(json.dumps(states))
    path = write_result(options.folder, options.results)
    print(f"\ndigits: wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
