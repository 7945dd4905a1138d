"""What a run has measured so far, one JSON line an entry, and the results file made of it.

A line is on disk as soon as its entry is complete, so that a run that is killed loses nothing but
the entry it was at.
"""

from __future__ import annotations

import datetime
import json
import os
import subprocess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def append(path: Path, line: dict[str, Any]) -> None:
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a journal; a last line that was cut short is left out."""
    if not path.exists():
        return []
    lines = []
    for text in path.read_text().splitlines():
        try:
            lines.append(json.loads(text))
        except ValueError:
            continue
    return lines


def commit() -> dict[str, Any]:
    """The commit of the checkout and whether tracked files differ from it; empty without git.

    Results, and README with its tables of results, do not count: no measurement depends on them.
    `DSNO_KERNELS_COMMIT` names it where the source travels without its history.
    """
    if named := os.environ.get("DSNO_KERNELS_COMMIT"):
        return {"id": named, "dirty": None}
    sources = [".", ":!benchmarks/results", ":!README.md"]
    commands = (
        ["git", "rev-parse", "HEAD"],
        ["git", "status", "--porcelain", "-uno", "--", *sources],
    )
    try:
        head, changed = (
            subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
            for command in commands
        )
    except (OSError, subprocess.CalledProcessError):
        return {"id": None, "dirty": None}
    return {"id": head.strip(), "dirty": bool(changed.strip())}


def write_results(path: Path, folder: Path) -> Path | None:
    """Write `folder/<machine>.json` of a journal.

    Of two entries of one name the later one counts. Returns None while nothing is measured.
    """
    lines = read(path)
    machines = [line for line in lines if "machine_info" in line]
    entries = {line["name"]: line for line in lines if "extra_info" in line}
    if not machines or not entries:
        return None
    target = folder / f"{machines[-1]['slug']}.json"
    write(target, machines[-1]["machine_info"], list(entries.values()))
    return target


def write(target: Path, machine_info: dict[str, Any], entries: list[dict[str, Any]]) -> None:
    """Write a results file in the form of pytest-benchmark's; it appears complete or not at all."""
    content = {
        "machine_info": machine_info,
        "commit_info": commit(),
        "datetime": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "benchmarks": entries,
    }
    partial = target.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(partial, target)
