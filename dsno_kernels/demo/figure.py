"""The demo's picture: real images, teacher and student side by side, trajectories, and the table
of measurements.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

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
    left, right = figure.subfigures(1, 2, width_ratios=[1.0, 0.95])
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
    temporary = path.with_suffix(".part.png")
    try:
        figure.savefig(temporary, dpi=110, metadata={"Software": None})
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
        plt.close(figure)


def _show(ax, title: str, picture: np.ndarray) -> None:  # type: ignore[no-untyped-def]
    ax.imshow(picture, interpolation="nearest")
    ax.set_title(title, fontsize=10, loc="left")
    ax.axis("off")


def _write_tables(ax, sections: list[Section]) -> None:  # type: ignore[no-untyped-def]
    ax.axis("off")
    height = 1.0 / sum(len(section.rows) + 2.2 for section in sections)
    y = 1.0
    for section in sections:
        ax.text(0.0, y, section.title, fontsize=10.5, weight="bold", va="top")
        for x, text in zip((0.48, 0.68), section.columns, strict=True):
            ax.text(x, y, text, fontsize=9.5, color="0.35", va="top", ha="right")
        y -= 1.15 * height
        for row in section.rows:
            ax.text(0.0, y, row.name, fontsize=9, va="top")
            ax.text(0.48, y, row.first, fontsize=9, va="top", ha="right")
            ax.text(0.68, y, row.second, fontsize=9, va="top", ha="right")
            ax.text(0.71, y, row.note, fontsize=9, va="top", color="0.2")
            y -= height
        y -= 1.05 * height


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
