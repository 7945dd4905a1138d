"""The digits result from nothing: teacher, trajectories, student, ablation, evaluation.

    python benchmarks/digits.py            # about half an hour on two CPU cores (`make digits`)
    python benchmarks/digits.py --smoke    # a few updates of each, to see that all of it runs

Runs the commands of README one after the other and writes `digits-<machine>.json` into the folder
of results: the numbers of `evaluate`, and the seconds that each command took. A run that was
stopped continues when it is started again, and the seconds of both are added.
"""

from __future__ import annotations

import argparse
import datetime
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

from benchmarks import machine  # noqa: E402

TEACHER = "digits/teacher/teacher.safetensors"
STUDENT = "digits/student/dsno.safetensors"
ABLATION = "digits/ablation/dsno.safetensors"
TABLE = "digits/table.json"
SECONDS = "digits/seconds.json"
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


def result(folder: Path) -> dict[str, Any]:
    """The results file, as `benchmarks/report.py` reads it."""
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
    return {
        "machine_info": machine.describe(device),
        "commit_info": commit(),
        "datetime": datetime.datetime.now(datetime.timezone.utc).isoformat(),
        "benchmarks": entries,
    }


def commit() -> dict[str, Any]:
    """The commit that the checkout stands at, if git knows."""

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", *words], cwd=ROOT, capture_output=True, text=True, check=True
            )
        except (OSError, subprocess.CalledProcessError):
            return None
        return done.stdout.strip()

    return {"id": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}


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
    except subprocess.CalledProcessError as error:
        print(f"digits: stopped; the command above ended with {error.returncode}", file=sys.stderr)
        return 2
    content = result(options.folder)
    device = torch.device("cuda" if content["machine_info"]["device"] == "cuda" else "cpu")
    path = options.results / f"digits-{machine.slug(device)}.json"
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    print(f"\ndigits: wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
