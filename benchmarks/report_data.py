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


class Source(NamedTuple):
    """A results file that an entry is from."""

    name: str
    commit: str | None
    changed: bool  # whether the checkout had changes that are not in the commit
    time: str

    def __str__(self) -> str:
        commit = (self.commit or "unknown")[:10] + "`" + " with local changes" * self.changed
        return f"{self.time[:10]}; commit `{commit}; `benchmarks/results/{self.name}.json`"


class Result(NamedTuple):
    """What one machine has measured, in one results file or in several."""

    machine: dict[str, Any]
    entries: list[Entry]  # the `extra_info` of each benchmark, with its "source"

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


# What two files of one machine have in common. Other versions of PyTorch are another result.
MACHINE = ("device", "gpu", "cpu", "isa", "cores", "torch", "triton", "cuda")


def load(folder: Path) -> list[Result]:
    """One result a machine; of a benchmark that several of its files hold, the newest counts."""
    files: dict[str, list[tuple[Source, dict[str, Any], dict[str, Entry]]]] = {}
    for path in sorted(folder.glob("*.json")):
        if path.name.startswith("tune-"):  # what benchmarks/tune.py has tried
            continue
        try:
            data = json.loads(path.read_text())
            machine, commit = data["machine_info"], data["commit_info"]
            source = Source(path.stem, commit["id"], bool(commit["dirty"]), data["datetime"])
            entries = {
                benchmark["name"]: benchmark["extra_info"] | {"source": source}
                for benchmark in data["benchmarks"]
            }
            key = repr([machine.get(name) for name in MACHINE])
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ReportError(
                f"{path.name} is no results file of these benchmarks: {error!r}"
            ) from None
        files.setdefault(key, []).append((source, machine, entries))
    results = []
    for same in files.values():
        same.sort(key=lambda file: file[0].time)
        merged: dict[str, Entry] = {}
        for _, _, entries in same:
            merged |= entries
        results.append(Result(same[-1][1], list(merged.values())))
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


def caption(result: Result, *ops: str) -> str:
    """Which machine and versions, the files that hold `ops` with date and commit, and the rates of
    a GPU that shares count against.
    """
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
    sources = dict.fromkeys(
        str(entry["source"]) for entry in result.entries if entry.get("op") in ops
    )
    text = f"{hardware}; {versions}; {'; and '.join(sources)}."
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
