"""The pictures beside the results files."""

from __future__ import annotations

from pathlib import Path

from benchmarks import report_fdm, report_ld3
from benchmarks.report_data import BASELINE, PASS_TITLES, PRECISIONS, Result, cases, ours


def draw(results: list[Result], folder: Path) -> list[Path]:
    """Draw what there are results for; the files written."""
    measured = [result for result in results if result.select(op="spectral_conv")]
    drawn = []
    for device, name, plot in (
        ("cpu", "spectral_conv.png", speedups),
        ("cuda", "share_of_limit.png", shares),
    ):
        some = [result for result in measured if result.machine["device"] == device]
        if some:
            plot(some, folder / name)
            drawn.append(folder / name)
    for module, name in ((report_fdm, "fdm"), (report_ld3, "ld3")):
        if some := [result for result in results if result.select(op=name)]:
            module.draw(some, folder / f"{name}.png")
            drawn.append(folder / f"{name}.png")
    return drawn


def speedups(results: list[Result], path: Path) -> None:
    """Speed-up of every implementation over the eager layer, one panel a machine."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

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
        ax.set_title(f"{result.machine['cpu']}, {result.machine['cores']} cores")
        ax.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)


def shares(results: list[Result], path: Path) -> None:
    """Share of the limit by shape and precision, one panel a GPU and pass."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = [(result, direction) for result in results for direction in PASS_TITLES]
    figure, axes = plt.subplots(len(panels), 1, figsize=(12, 3.6 * len(panels)), squeeze=False)
    for (result, direction), ax in zip(panels, axes[:, 0], strict=True):
        names = list(dict.fromkeys(shape for shape, _, d in cases(result) if d == direction))
        width = 0.85 / len(PRECISIONS)
        for i, (precision, title) in enumerate(PRECISIONS.items()):
            found = [ours(result.conv(shape.name, precision, direction)) for shape in names]
            bars = [
                (j + (i - (len(PRECISIONS) - 1) / 2) * width, entry["share_of_limit"])
                for j, entry in enumerate(found)
                if entry
            ]
            ax.bar([x for x, _ in bars], [share for _, share in bars], width, label=title)
        ax.axhline(1, color="gray", linewidth=0.8)
        ax.set_xticks(
            range(len(names)), [shape.title.replace(", ", "\n") for shape in names], fontsize=5
        )
        ax.set_ylabel("limit / time")
        ax.set_title(f"{result.machine['gpu']}, {PASS_TITLES[direction]}")
        ax.legend(fontsize=7, ncols=len(PRECISIONS))
    figure.tight_layout()
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)
