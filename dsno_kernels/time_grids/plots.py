"""The picture of learned time grids: where their times lie, and what they gain."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from dsno_kernels._files import replacing

LEARNED = "learned"
# Losses of one solver: name of a grid to loss by number of evaluations.
Losses = Mapping[str, Mapping[int, float]]
Times = Mapping[str, Sequence[float]]
_STYLES = ("o", "s", "^", "v", "D", "P", "X")


def draw(
    path: Path, process: Any, times: Times, calls: Sequence[float], losses: Losses, title: str
) -> None:
    """Write the picture of one solver.

    Args:
        path: of the PNG; one that exists is replaced once the new one is complete.
        process: of all grids.
        times: of one number of steps, by the name of the grid.
        calls: times of the model's calls on the learned grid.
        losses: on held-out noises.
        title: of the picture.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    where, gain = figure.subplots(1, 2, width_ratios=(1.2, 1))
    draw_times(where, process, times, calls)
    draw_losses(gain, losses)
    figure.suptitle(title, fontsize=10)
    with replacing(path) as file:
        figure.savefig(file, format="png", dpi=110, metadata={"Software": None})


def draw_times(ax: Any, process: Any, times: Times, calls: Sequence[float]) -> None:
    """A line a grid, noise on the left; triangles are calls of the model."""
    colors = _colors(times)
    for row, (name, values) in enumerate(times.items()):
        ax.plot(_log_snrs(process, values), [row] * len(values), "o-", color=colors[name], ms=4)
        if name == LEARNED:
            below = [row + 0.28] * len(calls)
            ax.plot(_log_snrs(process, calls), below, "^", color=colors[name], ms=4)
    ax.set_yticks(range(len(times)), list(times))
    ax.invert_yaxis()
    ax.set_xlabel("log(alpha / sigma): from noise to image")
    steps = len(next(iter(times.values()))) - 1
    ax.set_title(f"times of {steps} steps (triangles: calls of the model)", fontsize=9)
    ax.grid(axis="x", alpha=0.3)


def draw_losses(ax: Any, losses: Losses) -> None:
    """Loss against evaluations, the learned grids in black."""
    colors = _colors(losses)
    for style, (name, values) in zip(_STYLES, losses.items(), strict=False):
        width = 2.0 if name == LEARNED else 1.0
        ax.plot(
            list(values),
            list(values.values()),
            f"{style}-",
            color=colors[name],
            label=name,
            linewidth=width,
            ms=4,
        )
    ax.set_yscale("log")
    ax.set_xticks(sorted({n for values in losses.values() for n in values}))
    ax.set_xlabel("evaluations of the model")
    ax.set_ylabel("loss on held-out noises")
    ax.grid(alpha=0.3)
    ax.legend(fontsize=7)


def _colors(names: Mapping[str, Any]) -> dict[str, str]:
    others = [name for name in names if name != LEARNED]
    return {LEARNED: "black"} | {name: f"C{i}" for i, name in enumerate(others)}


def _log_snrs(process: Any, times: Sequence[float]) -> list[float]:
    values: list[float] = process.log_snr(torch.tensor(times, dtype=torch.float64)).tolist()
    return values
