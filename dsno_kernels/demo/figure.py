"""The demo's picture: real images, teacher and student side by side, trajectories, and the table
of measurements.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dsno_kernels._files import replacing

COLUMNS, ROWS = 16, 3  # of each block of images


class Row(NamedTuple):
    """A line of the comparison: what was measured, original or teacher, ours or student, and what
    it means.
    """

    name: str
    first: str
    second: str
    note: str = ""


class Section(NamedTuple):
    title: str
    columns: tuple[str, str]
    rows: list[Row]


def tile(images: Tensor, columns: int) -> np.ndarray:
    """Images ``(N, C, H, W)`` in [-1, 1] as one picture, ``(H', W', 3)`` in [0, 1], with a line
    between neighbors.
    """
    images = images.detach().cpu().clamp(-1, 1).add(1).div(2).expand(-1, 3, -1, -1)
    images = torch.nn.functional.pad(images, (0, 1, 0, 1), value=1.0)
    images = torch.cat([images, images.new_ones(-len(images) % columns, *images.shape[1:])])
    rows = [torch.cat(list(row), dim=2) for row in images.split(columns)]
    picture = torch.cat(rows, dim=1)[:, :-1, :-1]
    return picture.permute(1, 2, 0).numpy()


def draw(
    path: Path,
    blocks: list[tuple[str, Tensor]],
    strips: list[tuple[str, Tensor]],
    sections: list[Section],
) -> None:
    """Write the picture; a file that exists is replaced only once the new one is complete.

    Args:
        path: of the PNG.
        blocks: titles and ``(N, C, H, W)`` images.
        strips: titles and trajectories, ``(N, frames, C, H, W)``; one row a trajectory.
        sections: the tables.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure = plt.figure(figsize=(17, 9.6), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=[1.0, 0.95], wspace=0.03)
    upper, lower = left.subfigures(2, 1, height_ratios=[3.0, 1.5])
    for ax, (title, images) in zip(
        upper.subplots(len(blocks), 1, squeeze=False)[:, 0], blocks, strict=True
    ):
        _show(ax, title, tile(images[: COLUMNS * ROWS], COLUMNS))
    for ax, (title, frames) in zip(
        lower.subplots(1, len(strips), squeeze=False)[0], strips, strict=True
    ):
        _show(ax, title, tile(frames.flatten(0, 1), frames.shape[1]))
    _write_tables(right.subplots(), sections)
    try:
        with replacing(path) as file:
            figure.savefig(file, format="png", dpi=110, metadata={"Software": None})
    finally:
        plt.close(figure)


def _show(ax, title: str, picture: np.ndarray) -> None:  # type: ignore[no-untyped-def]
    ax.imshow(picture, interpolation="nearest")
    ax.set_title(title, fontsize=10, loc="left")
    ax.axis("off")


def _write_tables(ax, sections: list[Section]) -> None:  # type: ignore[no-untyped-def]
    ax.axis("off")
    line = 1.0 / sum(len(section.rows) + 3.0 for section in sections)
    y = 1.0

    def write(x: float, text: str, align: str = "left", **style: object) -> None:
        ax.text(
            x, y, text, va="top", ha=align, transform=ax.transAxes, **{"fontsize": 9.5, **style}
        )

    for section in sections:
        write(0.0, section.title, fontsize=11, weight="bold")
        y -= line
        for x, text in zip((0.52, 0.68), section.columns, strict=True):
            write(x, text, "right", color="0.35")
        y -= line
        for row in section.rows:
            write(0.0, row.name)
            write(0.52, row.first, "right")
            write(0.68, row.second, "right")
            write(0.71, row.note, color="0.35", fontsize=8.5)
            y -= line
        y -= line


def table(section: Section) -> str:
    """A section as lines of text."""
    width = max(len(row.name) for row in section.rows)
    columns = [
        max(len(c), *(len(row[i + 1]) for row in section.rows))
        for i, c in enumerate(section.columns)
    ]
    lines = [
        f"{section.title:<{width}}  "
        + "  ".join(f"{c:>{w}}" for c, w in zip(section.columns, columns, strict=True))
    ]
    for row in section.rows:
        values = f"{row.first:>{columns[0]}}  {row.second:>{columns[1]}}"
        lines.append(f"{row.name:<{width}}  {values}  {row.note}".rstrip())
    return "\n".join(lines)
