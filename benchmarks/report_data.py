"""The results files as the report reads them, and how it writes a number, a table, a caption."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import shapes

BASELINE = "eager"
PASS_TITLES = {"forward": "forward", "forward_backward": "forward + backward"}
# Of all machines, in the order of the tables.
PRECISIONS = {
    "fp32": "fp32",
    "bf16x3": "bf16x3",
    "tf32": "tf32",
    "bf16": "bf16",
    "bf16_io": "bf16, x and y too",
}
NOT_MEASURED = "not measured yet"

Entry = dict[str, Any]


class Result(NamedTuple):
    """One results file."""

    name: str
    machine: dict[str, Any]
    commit: dict[str, Any]
    date: str
    entries: list[Entry]  # the `extra_info` of each benchmark

    def select(self, **wanted: Any) -> list[Entry]:
        return [
            entry
            for entry in self.entries
            if all(entry.get(key) == value for key, value in wanted.items())
        ]

    def conv(self, shape: str, precision: str, direction: str) -> dict[str, Entry]:
        """The entries of one case by the name of the peer."""
        found = self.select(
            op="spectral_conv", shape=shape, precision=precision, direction=direction
        )
        return {entry["peer"]: entry for entry in found}


class ReportError(Exception):
    """Why there is no report, in one line."""


def load(folder: Path) -> list[Result]:
    results = []
    for path in sorted(folder.glob("*.json")):
        if path.name.startswith("tune-"):  # what benchmarks/tune.py has tried
            continue
        try:
            data = json.loads(path.read_text())
            entries = [benchmark["extra_info"] for benchmark in data["benchmarks"]]
            results.append(
                Result(
                    path.stem,
                    data["machine_info"],
                    data["commit_info"],
                    data["datetime"][:10],
                    entries,
                )
            )
        except (ValueError, KeyError, TypeError) as error:
            raise ReportError(
                f"{path.name} is no results file of these benchmarks: {error!r}"
            ) from None
    return results


def milliseconds(seconds: float) -> str:
    """Three digits, in ms or µs."""
    value, unit = (seconds * 1e3, "ms") if seconds >= 1e-3 else (seconds * 1e6, "µs")
    return f"{value:.{max(0, 3 - len(str(int(value))))}f} {unit}"


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head, rows = list(head), list(rows)
    if not rows:
        return f"{NOT_MEASURED.capitalize()}."
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def caption(result: Result) -> str:
    """Which machine, versions and commit, and the rates of a GPU that shares count against."""
    m = result.machine
    cores = f"{m['cores']} core" + "s" * (m["cores"] != 1)
    hardware = (
        f"{m['gpu']}, CUDA {m['cuda']}"
        if "gpu" in m
        else f"{m['cpu']}, {', '.join(m['isa'])}, {cores}"
    )
    versions = f"PyTorch {m['torch']}" + (
        f", Triton {m['triton']}" if m.get("triton") and "gpu" in m else ""
    )
    commit = (result.commit.get("id") or "unknown")[:10]
    changed = " with local changes" if result.commit.get("dirty") else ""
    source = f"commit `{commit}`{changed}; `benchmarks/results/{result.name}.json`"
    text = f"{hardware}; {versions}; {result.date}; {source}."
    if "gpu" in m and "gemm_gflops" in m:
        gemm = ", ".join(f"{name} {rate / 1e3:.0f}" for name, rate in m["gemm_gflops"].items())
        text += (
            f" Its limits in this run: copy {m['copy_gbytes'] / 1e3:.2f} TB/s;"
            f" matrix product {gemm} TFLOP/s."
        )
    return text


def ours(peers: dict[str, Entry]) -> Entry | None:
    """The entry of the backend that a call takes by itself in a case; else of the fastest."""
    found = [
        entry
        for name, entry in peers.items()
        if name.startswith("dsno_kernels") and name != "dsno_kernels[reference]"
    ]
    found = [entry for entry in found if entry.get("chosen")] or found
    return min(found, key=lambda entry: entry["seconds"]) if found else None


def cases(result: Result) -> list[tuple[shapes.Shape, str, str]]:
    """(shape, precision, pass) of the file, in the order of `shapes`."""
    found = {
        (e["shape"], e["precision"], e["direction"]) for e in result.select(op="spectral_conv")
    }
    return [
        (shape, precision, direction)
        for shape in shapes.shapes(result.machine["device"])
        for precision in PRECISIONS
        for direction in shapes.PASSES
        if (shape.name, precision, direction) in found
    ]
