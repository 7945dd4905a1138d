"""Write README's tables and the plot from `benchmarks/results/*.json`.

    python benchmarks/report.py            # rewrite what lies between the markers of README.md
    python benchmarks/report.py --check    # exit 1 if README.md is not what the results say

A table stands between `<!-- benchmark:begin NAME -->` and `<!-- benchmark:end NAME -->`; README
chooses which of the tables below it shows. A device without results says that it was not measured.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the script runs from a checkout, installed or not

from benchmarks import shapes  # noqa: E402

BASELINE = "eager"
OURS = ("dsno_kernels[cpu]", "dsno_kernels[cuda]", "dsno_kernels[triton]")
PASS_TITLES = {"forward": "forward", "forward_backward": "forward + backward"}
NOT_MEASURED = "not measured yet"
_MARKED = re.compile(
    r"(<!-- benchmark:begin (\w+) -->\n)(.*?)(<!-- benchmark:end (\w+) -->)", re.DOTALL
)

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
    """Which machine, versions and commit, and how it was timed."""
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
    return f"{hardware}; {versions}; {result.date}; {source}."


def ours(peers: dict[str, Entry]) -> Entry | None:
    """The fastest of this library's backends in a case, the reference aside."""
    found = [peers[name] for name in OURS if name in peers]
    return min(found, key=lambda entry: entry["seconds"]) if found else None


def cases(result: Result) -> list[tuple[shapes.Shape, str, str]]:
    """(shape, precision, pass) of the file, in the order of `shapes`."""
    found = {
        (e["shape"], e["precision"], e["direction"]) for e in result.select(op="spectral_conv")
    }
    precisions = ("fp32", "bf16x3", "tf32", "bf16")
    return [
        (shape, precision, direction)
        for shape in shapes.shapes(result.machine["device"])
        for precision in precisions
        for direction in shapes.PASSES
        if (shape.name, precision, direction) in found
    ]


def spectral_conv(results: list[Result]) -> str:
    """Speed-up over the eager layer, with the aims, the share of this machine's limits, memory and
    error.
    """
    head = (
        "shape",
        "precision",
        "pass",
        "eager",
        "this library",
        "speed-up",
        "aim",
        "GFLOP/s (of GEMM)",
        "GB/s (of copy)",
        "kept for backward / x",
        "error",
    )
    parts = []
    for result in results:
        rows = []
        for shape, precision, direction in cases(result):
            entry = ours(result.conv(shape.name, precision, direction))
            base = result.conv(shape.name, "fp32", direction).get(BASELINE)
            if entry is None or base is None:
                continue
            aim = shape.targets.get((precision, direction))
            rows.append(
                (
                    shape.title,
                    precision,
                    PASS_TITLES[direction],
                    milliseconds(entry["baseline_seconds"]),
                    milliseconds(entry["seconds"]),
                    f"**{entry['ratio']:.2f}x**",
                    f"{aim:g}x" if aim else "",
                    f"{entry['gflops']:.0f} ({entry['share_of_gemm']:.0%})",
                    f"{entry['gbytes']:.0f} ({entry['share_of_copy']:.0%})",
                    f"{entry['saved_in_x']:.2f} (eager {base['saved_in_x']:.2f})",
                    f"{max(entry['errors'].values()):.1e}",
                )
            )
        parts.append(f"{caption(result)}\n\n{table(head, rows)}")
    parts.append(
        "Medians over rounds in which the eager layer and this library take turns, checked against"
        " float64 just before. `error` is the largest relative RMS error of y, dx and dW. GFLOP/s"
        " counts the real products that reach y, GB/s the bytes that must move; their shares are of"
        " this machine's own matrix product and copy in the same run. Aim for memory at shape"
        f" {shapes.SAVED_TARGET[0]}: at most {shapes.SAVED_TARGET[1]} tensors of x's size, weight"
        " included."
    )
    return "\n\n".join(parts)


def peers(results: list[Result]) -> str:
    """Every implementation in its own column."""
    parts = []
    for result in results:
        names = list(dict.fromkeys(entry["peer"] for entry in result.select(op="spectral_conv")))
        rows = []
        for shape, precision, direction in cases(result):
            found = result.conv(shape.name, precision, direction)
            cells = [
                ""
                if name not in found
                else milliseconds(found[name]["seconds"])
                + (f" ({found[name]['ratio']:.2f}x)" if name != BASELINE else "")
                for name in names
            ]
            rows.append((shape.title, precision, PASS_TITLES[direction], *cells))
        parts.append(f"{caption(result)}\n\n{table(('shape', 'precision', 'pass', *names), rows)}")
    parts.append("In brackets the speed-up over the eager float32 layer, timed in turns with it.")
    return "\n\n".join(parts)


def overhead(results: list[Result]) -> str:
    """Host time of a call without work, and the truncated transforms."""
    parts = []
    for result in results:
        calls = {
            (e["peer"], e["direction"]): milliseconds(e["seconds"])
            for e in result.select(op="overhead")
        }
        names = list(dict.fromkeys(peer for peer, _ in calls))
        rows = [
            [name, *(calls.get((name, direction), "") for direction in shapes.PASSES)]
            for name in names
        ]
        parts.append(
            f"{caption(result)}\n\n"
            + table(("one call at a tiny shape", *PASS_TITLES.values()), rows)
        )
        transforms = [
            e for kind in ("rfft", "irfft") for e in result.select(op=f"truncated_{kind}")
        ]
        rows = [
            [
                f"`{e['op']}`",
                " x ".join(map(str, e["size"])),
                str(e["dim"]),
                str(e["modes"]),
                milliseconds(e["baseline_seconds"]),
                milliseconds(e["seconds"]),
                f"**{e['ratio']:.2f}x**",
            ]
            for e in transforms
        ]
        parts.append(
            table(
                ("transform", "signal", "axis", "K", "torch.fft", "this library", "speed-up"), rows
            )
        )
    return "\n\n".join(parts)


def not_measured_gpu() -> str:
    rows = [(shape.title, NOT_MEASURED) for shape in shapes.GPU_SHAPES]
    return table(("shape", "speed-up"), rows)


def tables(results: list[Result]) -> dict[str, Callable[[], str]]:
    """Every table README can ask for."""
    made: dict[str, Callable[[], str]] = {}
    for device in ("cpu", "cuda"):
        some = [result for result in results if result.machine["device"] == device]
        suffix = "cpu" if device == "cpu" else "gpu"
        for name, make in (
            ("spectral_conv", spectral_conv),
            ("peers", peers),
            ("overhead", overhead),
        ):
            if some:
                made[f"{name}_{suffix}"] = lambda make=make, some=some: make(some)  # type: ignore[misc]
            elif (name, device) == ("spectral_conv", "cuda"):
                made[f"{name}_{suffix}"] = not_measured_gpu
            else:
                made[f"{name}_{suffix}"] = lambda: f"{NOT_MEASURED.capitalize()}."
    return made


def render(readme: str, results: list[Result]) -> str:
    """README with its tables replaced."""
    made = tables(results)

    def replace(match: re.Match[str]) -> str:
        begin, name, _, end, end_name = match.groups()
        if name != end_name or name not in made:
            raise ReportError(
                f"README's marker {name!r} (closed by {end_name!r}) is none of {', '.join(made)}"
            )
        return f"{begin}\n{made[name]()}\n\n{end}"

    text = _MARKED.sub(replace, readme)
    if readme.count("<!-- benchmark:begin") != len(_MARKED.findall(readme)):
        raise ReportError("README has a benchmark marker without its partner")
    return text


def plot(results: list[Result], path: Path) -> None:
    """Speed-up of every implementation over the eager layer, one panel a machine."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    results = [result for result in results if result.select(op="spectral_conv")]
    figure, axes = plt.subplots(len(results), 1, figsize=(11, 4.2 * len(results)), squeeze=False)
    for result, ax in zip(results, axes[:, 0], strict=True):
        labels = cases(result)
        names = [
            n
            for n in dict.fromkeys(e["peer"] for e in result.select(op="spectral_conv"))
            if n != BASELINE
        ]
        width = 0.85 / max(len(names), 1)
        for i, name in enumerate(names):
            bars = [(j, result.conv(s.name, p, d).get(name)) for j, (s, p, d) in enumerate(labels)]
            shown = [(j + (i - (len(names) - 1) / 2) * width, e) for j, e in bars if e]
            heights = [e["ratio"] for _, e in shown]
            drawn = ax.bar([x for x, _ in shown], heights, width, label=name)
            if len(labels) <= 12:
                ax.bar_label(drawn, [f"{h:.1f}" for h in heights], fontsize=7)
        for j, (shape, precision, direction) in enumerate(labels):
            if aim := shape.targets.get((precision, direction)):
                ax.hlines(aim, j - 0.45, j + 0.45, colors="black", linestyles="dotted", linewidth=1)
        ax.axhline(1, color="gray", linewidth=0.8)
        ax.set_xticks(
            range(len(labels)),
            [f"{s.name} {p}\n{PASS_TITLES[d]}" for s, p, d in labels],
            fontsize=7,
        )
        ax.set_ylabel("speed-up over the eager layer")
        ax.set_title(
            result.machine.get("gpu") or f"{result.machine['cpu']}, {result.machine['cores']} cores"
        )
        ax.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--check", action="store_true", help="change nothing; exit 1 if README is out of date"
    )
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    parser.add_argument(
        "--results", type=Path, default=ROOT / "benchmarks" / "results", help="folder of JSON files"
    )
    options = parser.parse_args(argv)
    try:
        results = load(options.results)
        before = options.readme.read_text()
        after = render(before, results)
    except (ReportError, OSError) as error:
        print(f"report: {error}", file=sys.stderr)
        return 2
    if options.check:
        if before != after:
            print(
                f"report: {options.readme.name} is out of date; run: python benchmarks/report.py",
                file=sys.stderr,
            )
        return int(before != after)
    if before != after:
        options.readme.write_text(after)
    if any(result.select(op="spectral_conv") for result in results):
        try:
            plot(results, options.results / "spectral_conv.png")
        except ImportError as error:
            print(f"report: no plot ({error}); pip install matplotlib", file=sys.stderr)
    state = "rewritten" if before != after else "up to date"
    print(f"report: {len(results)} results, {options.readme.name} {state}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
