"""The table of the digits result, and the commands that made it."""

from __future__ import annotations

import statistics
from typing import Any

from benchmarks import digits
from benchmarks.report_data import Result, caption, table

HEAD = ("images", "evaluations", "Fréchet distance", "precision", "recall", "images/s")
MINUTES = ("teacher", "trajectories", "student", "ablation", "evaluation")


def commands() -> str:
    """The commands of `benchmarks/digits.py`, for a shell."""
    lines = "\n".join(f"python -m dsno_kernels {command}" for command in digits.COMMANDS.values())
    return f"```bash\n{lines}\n```"


def distances(results: list[Result]) -> str:
    """A row a set of images: mean and standard deviation over the seeds, the time of the commands,
    and the student against its ablation from the same noise.
    """
    parts = []
    for result in results:
        entries = result.select(op="digits")
        rows = [cells(entry["row"]) for entry in entries]
        some = entries[0]
        took = ", ".join(f"{name} {some['seconds'][name] / 60:.1f}" for name in MINUTES)
        parts += [
            caption(result, "digits"),
            table(HEAD, rows),
            f"Features: {some['features']}; {some['reference_images']:,} real images,"
            f" {some['row']['images']:,} of each model, {len(some['seeds'])} draws."
            f" Minutes: {took}; in all {sum(some['seconds'].values()) / 60:.0f}.",
        ]
        for paired in result.select(op="digits_paired"):
            parts.append(against(paired["differences"]))
        parts += [by_state(measured) for measured in result.select(op="digits_states")]
    return "\n\n".join(parts)


def cells(row: dict[str, object]) -> tuple[str, ...]:
    rate = row["images_per_second"]
    return (
        str(row["name"]),
        str(row["evaluations"] or ""),
        spread(row["frechet"], 2),
        spread(row["precision"], 3),
        spread(row["recall"], 3),
        f"{rate:,.0f}" if isinstance(rate, float) else "",
    )


def spread(measured: object, places: int) -> str:
    assert isinstance(measured, dict)
    deviation = measured["deviation"]
    return f"{measured['mean']:.{places}f}" + (
        "" if deviation is None else f" ± {deviation:.{places}f}"
    )


def against(differences: list[float]) -> str:
    """With temporal layers minus without, draw by draw."""
    shown = ", ".join(f"{value:+.3f}" for value in differences)
    mean = statistics.fmean(differences)
    verdict = (
        "the temporal layers win every draw"
        if max(differences) < 0
        else "they win no draw"
        if min(differences) > 0
        else "they win some draws and lose others: no difference is shown"
    )
    return (
        "Distance with temporal layers minus without, from the same noise, draw by draw:"
        f" {shown}; mean {mean:+.3f}: {verdict}."
    )


def by_state(measured: dict[str, Any]) -> str:
    """Student and ablation on unseen trajectories, a row a state."""
    first, second = measured["errors"]
    rows = [
        (f"{logsnr:.1f}", f"{a:.4f}", f"{b:.4f}", f"{d:+.4f} ± {e:.4f}", f"{d / b:+.1%}")
        for logsnr, a, b, d, e in zip(
            measured["logsnr"],
            measured["errors"][first],
            measured["errors"][second],
            measured["difference"],
            measured["standard_error"],
            strict=True,
        )
    ]
    head = ("log-SNR of the state", first, second, "difference, standard error", "relative")
    return (
        f"Mean absolute error on {measured['count']:,} trajectories of the teacher that neither has"
        f" seen; the last state is the image:\n\n{table(head, rows)}"
    )
