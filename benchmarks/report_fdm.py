"""The tables and the picture of momentum diffusion against its base processes."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from benchmarks.report_data import Entry, Result, caption, table

TITLES = {"edm": "EDM", "vp": "VP", "ve": "VE"}
Distances = dict[int, float]  # by seed


def tables(results: list[Result]) -> str:
    """Distance by updates and by evaluations: base / with momentum, and who wins in every seed."""
    parts = []
    for result in results:
        entries = result.select(op="fdm")
        some = entries[0]
        parts += [
            caption(result, "fdm"),
            f"Fréchet distance, base / with momentum, {some['images']:,} images a measurement by"
            f" DPM-Solver++(2M), mean ± standard deviation over {seeds(entries)}. Bold: better in"
            f" every one of them. Features: {some['features']}.",
            _table("updates", by_updates(entries)),
            _table("evaluations", by_evaluations(entries)),
            verdict(entries),
        ]
    return "\n\n".join(parts)


def seeds(entries: list[Entry]) -> str:
    """How many there are of a measurement; a run that has not ended has more of some."""
    pairs = _cells(entries, "updates", "evaluations").values()
    counts = sorted(len(one) for pair in pairs for one in pair if one)
    some = "" if counts[0] == counts[-1] else f"{counts[0]} to "
    return f"{some}{counts[-1]} seed{'s' * (counts[-1] > 1)}"


def by_updates(entries: list[Entry]) -> list[Entry]:
    """Those with the same number of evaluations, at every number of updates."""
    first = min((entry["updates"], entry["evaluations"]) for entry in entries)[1]
    return [entry for entry in entries if entry["evaluations"] == first]


def by_evaluations(entries: list[Entry]) -> list[Entry]:
    """Those after the last update."""
    return [entry for entry in entries if entry["last"]]


def verdict(entries: list[Entry]) -> str:
    """In how many of the cases momentum wins and loses in every seed."""
    counts = {"better": 0, "worse": 0, "": 0}
    cells = _cells(entries, "updates", "evaluations")
    for base, momentum in cells.values():
        counts[winner(base, momentum)] += 1
    return (
        f"Momentum is better in every seed in {counts['better']} of {len(cells)} cases, worse in"
        f" every seed in {counts['worse']}; in the other {counts['']} no difference is shown."
    )


def winner(base: Distances, momentum: Distances) -> str:
    """ "better" or "worse": momentum against its base, if it is so in each seed both have."""
    differences = [momentum[seed] - base[seed] for seed in base.keys() & momentum.keys()]
    if differences and max(differences) < 0:
        return "better"
    return "worse" if differences and min(differences) > 0 else ""


def _cells(entries: list[Entry], *axes: str) -> dict[Any, tuple[Distances, Distances]]:
    """Base and momentum of each process and place on these axes."""
    cells: dict[Any, tuple[Distances, Distances]] = {}
    for entry in entries:
        key = (entry["process"], *(entry[axis] for axis in axes))
        cells.setdefault(key, ({}, {}))[entry["momentum"]][entry["seed"]] = entry["frechet"]
    return cells


def _table(axis: str, entries: list[Entry]) -> str:
    cells = _cells(entries, axis)
    numbers = sorted({entry[axis] for entry in entries})
    found = {entry["process"] for entry in entries}
    rows = []
    for process in [name for name in TITLES if name in found]:
        row = [TITLES[process]]
        for number in numbers:
            base, momentum = cells.get((process, number), ({}, {}))
            won = winner(base, momentum)
            first, second = _spread(base, won == "worse"), _spread(momentum, won == "better")
            row.append(f"{first} / {second}")
        rows.append(row)
    return table([f"process, by {axis}", *map(str, numbers)], rows)


def _spread(distances: Distances, bold: bool) -> str:
    if not distances:
        return "not measured"
    values = list(distances.values())
    deviation = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    text = f"{statistics.fmean(values):.2f}{deviation}"
    return f"**{text}**" if bold else text


def draw(results: list[Result], path: Path) -> None:
    """Distance by updates and by evaluations, a panel a process; every seed is a point."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    entries = results[-1].select(op="fdm")
    found = {entry["process"] for entry in entries}
    titles = {process: title for process, title in TITLES.items() if process in found}
    halves = {"updates": by_updates(entries), "evaluations": by_evaluations(entries)}
    figure = Figure(figsize=(4 * len(titles), 6), layout="constrained")
    axes = figure.subplots(2, len(titles), squeeze=False)
    for line, (axis, half) in zip(axes, halves.items(), strict=True):
        for ax, (process, title) in zip(line, titles.items(), strict=True):
            for momentum, label, color in ((False, "base", "C0"), (True, "with momentum", "C1")):
                found = [e for e in half if e["process"] == process and e["momentum"] == momentum]
                numbers = sorted({e[axis] for e in found})
                means = [
                    statistics.fmean(e["frechet"] for e in found if e[axis] == number)
                    for number in numbers
                ]
                ax.plot(numbers, means, color=color, label=label)
                ax.scatter(
                    [e[axis] for e in found], [e["frechet"] for e in found], s=9, color=color
                )
            ax.set_title(title)
            ax.set_xlabel(axis)
            ax.set_xscale("log")
            ax.set_xticks(numbers, [str(number) for number in numbers])
            ax.set_xticks([], minor=True)
            ax.set_yscale("log")
            ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            ax.yaxis.set_major_formatter("{x:.0f}")
            ax.yaxis.set_minor_formatter("")
    axes[0, 0].set_ylabel("Fréchet distance")
    axes[1, 0].set_ylabel("Fréchet distance")
    axes[0, 0].legend()
    figure.savefig(path, dpi=110, metadata={"Software": None})
