"""The table of a student's training and sampling, beside the same model without the kernels."""

from __future__ import annotations

from benchmarks.report_data import Result, caption, milliseconds, table

HEAD = ("student", "what", "precision", "kernels=False", "this library", "speed-up", "per second")


def student(results: list[Result]) -> str:
    """A row a network, precision and kind of work."""
    parts = []
    for result in results:
        rows = [
            (
                f"{entry['shape']}, B={entry['batch']}",
                "a training step" if entry["work"] == "training" else "sampling a batch",
                entry["precision"],
                milliseconds(entry["baseline_seconds"]),
                milliseconds(entry["seconds"]),
                f"**{entry['ratio']:.2f}x**",
                rate(entry["work"], entry["batch"], entry["seconds"]),
            )
            for entry in result.select(op="student")
        ]
        parts.append(f"{caption(result, 'student')}\n\n{table(HEAD, rows)}")
    parts.append(
        "Medians over rounds in which the two take turns. A training step is all of it: batch,"
        " forward and backward pass, clipping, Adam, the average of the weights; its losses were"
        " compared just before."
    )
    return "\n\n".join(parts)


def rate(work: str, batch: int, seconds: float) -> str:
    """Samples a second and, in training, steps a second."""
    samples = f"{batch / seconds:.3g} images" if work == "sampling" else f"{1 / seconds:.3g} steps"
    return samples + (f", {batch / seconds:.3g} samples" if work == "training" else "")
