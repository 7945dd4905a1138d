"""The loss curve of a run: a CSV file with a row for each update, and its picture."""

from __future__ import annotations

import csv
import io
from pathlib import Path

from dsno_kernels._files import replacing

FIELDS = ("update", "loss", "gradient_norm", "learning_rate")
Row = tuple[int, float, float, float]


class History:
    """Appends to ``loss.csv`` of a folder, after dropping what follows the update it starts from.

    Numbers are written so that reading them gives the same bits.
    """

    def __init__(self, folder: Path, step: int) -> None:
        import matplotlib.figure  # noqa: F401  # a missing package is told before the training

        self.path = folder / "loss.csv"
        kept = [row for row in _rows(self.path) if row[0] <= step]
        text = io.StringIO()
        csv.writer(text).writerows([FIELDS, *kept])
        with replacing(self.path) as file:
            file.write(text.getvalue().encode())

    def add(self, rows: list[Row]) -> None:
        with open(self.path, "a", newline="") as file:
            csv.writer(file).writerows([[repr(value) for value in row] for row in rows])

    def draw(self) -> None:
        """``loss.png`` next to it: each update, and their running mean."""
        import numpy as np
        from matplotlib.figure import Figure

        rows = _rows(self.path)
        if not rows:  # of a finished run, someone has removed them
            return
        steps, losses = np.array([row[:2] for row in rows]).T
        window = max(1, len(losses) // 50)
        smooth = np.convolve(losses, np.full(window, 1.0 / window), mode="valid")
        figure = Figure(figsize=(7, 4), layout="constrained")
        axes = figure.subplots()
        axes.plot(steps, losses, color="tab:blue", alpha=0.25, linewidth=0.5)
        axes.plot(steps[window - 1 :], smooth, color="tab:blue", label=f"mean of {window} updates")
        if losses.min() > 0:
            axes.set_yscale("log")
        axes.set(xlabel="update", ylabel="loss")
        axes.legend()
        with replacing(self.path.with_suffix(".png")) as file:
            figure.savefig(file, format="png", dpi=150)


def _rows(path: Path) -> list[Row]:
    """The rows of a file that are complete; none where there is no file."""
    if not path.exists():
        return []
    text = path.read_text(errors="replace")
    rows = []
    for line in text[: text.rfind("\n") + 1].splitlines():  # a killed process may leave half a row
        try:
            update, loss, norm, rate = line.split(",")
            rows.append((int(update), float(loss), float(norm), float(rate)))
        except ValueError:  # the names of the columns, or damage
            continue
    return rows
