"""Distances of sets of images from a reference, over several seeds, as a table and as JSON."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dsno_kernels.evaluation.features import Features
from dsno_kernels.evaluation.frechet import frechet_distance
from dsno_kernels.evaluation.manifold import precision_recall
from dsno_kernels.evaluation.sets import SampleSet
from dsno_kernels.training.errors import CommandError

Measures = dict[str, float]
NEIGHBORS = 3  # of precision and recall


@dataclass(frozen=True)
class Row:
    """What was measured of one set.

    Args:
        name: of the set.
        evaluations: of the network, an image; 0 for images that no network makes here.
        images: in the set.
        measures: of each seed: "frechet", "precision", "recall".
        images_per_second: median over the seeds; None for fixed images.
    """

    name: str
    evaluations: int
    images: int
    measures: list[Measures]
    images_per_second: float | None = None

    def mean(self, measure: str) -> float:
        return statistics.fmean(values[measure] for values in self.measures)

    def deviation(self, measure: str) -> float | None:
        """Standard deviation over the seeds; None for one."""
        values = [values[measure] for values in self.measures]
        return statistics.stdev(values) if len(values) > 1 else None

    def as_dict(self) -> dict[str, Any]:
        measured = {
            measure: {
                "mean": self.mean(measure),
                "deviation": self.deviation(measure),
                "values": [values[measure] for values in self.measures],
            }
            for measure in self.measures[0]
        }
        return {
            "name": self.name,
            "evaluations": self.evaluations,
            "images": self.images,
            **measured,
            "images_per_second": self.images_per_second,
        }


class Reference:
    """Real images and their features.

    Args:
        name: for messages.
        images: ``(N, C, H, W)`` in [-1, 1].
        features: the network.

    Raises:
        CommandError: images that cannot be compared, see :meth:`compare`.
    """

    def __init__(self, name: str, images: Tensor, features: Features) -> None:
        self.name, self.features, self.shape = name, features, tuple(images.shape[1:])
        self.vectors = self._vectors(name, images)

    def compare(self, name: str, images: Tensor) -> Measures:
        """Distance, precision and recall of a set.

        Raises:
            CommandError: images of another shape, none, values that are not finite, or too few for
            a covariance of the features.
        """
        if tuple(images.shape[1:]) != self.shape:
            raise CommandError(
                f"{name} has images of shape {tuple(images.shape[1:])}, {self.name} of"
                f" {self.shape} (channels, height, width); compare images of one shape"
            )
        return measures(self.vectors, self._vectors(name, images))

    def floors(self, count: int, seeds: Sequence[int]) -> list[Row]:
        """Real images against real images, of which the sizes alone decide the distance: `count`
        drawn with replacement against all, which is what a model that makes nothing but the
        reference would reach, and one random half against the other. Sets too small are left out.
        """
        N, D = self.vectors.shape
        drawn, halves = [], []
        for seed in seeds:
            generator = torch.Generator().manual_seed(seed)
            again = self.vectors[torch.randint(N, (count,), generator=generator)]
            first, second = self.vectors[torch.randperm(N, generator=generator)].tensor_split(2)
            if count > max(D, NEIGHBORS):
                drawn.append(measures(self.vectors, again))
            if len(second) > max(D, NEIGHBORS):
                halves.append(measures(first, second))
        found = []
        if drawn:
            found.append(Row(f"{self.name}, drawn with replacement", 0, count, drawn))
        if halves:
            found.append(Row(f"{self.name}, half against half", 0, N // 2, halves))
        return found

    def _vectors(self, name: str, images: Tensor) -> Tensor:
        if len(images) == 0:
            raise CommandError(f"{name} holds no images")
        finite = images.flatten(1).isfinite().all(1)
        if not bool(finite.all()):
            raise CommandError(f"{name}: image {int(finite.int().argmin())} holds NaN or infinity")
        try:
            vectors = self.features(images)
        except (RuntimeError, ValueError) as error:
            reason = str(error).strip().splitlines()[-1]
            raise CommandError(
                f"the features ({self.features.name}) cannot be computed on images of shape"
                f" {tuple(images.shape[1:])}: {reason}"
            ) from None
        if not bool(vectors.isfinite().all()):
            raise CommandError(f"{name}: the features ({self.features.name}) are not finite")
        N, D = vectors.shape
        if max(D, NEIGHBORS) >= N:
            raise CommandError(
                f"{name} has {N} images, too few for a covariance of {D} features: its rank would"
                f" be {min(N - 1, D)}; give more than {max(D, NEIGHBORS)}"
            )
        return vectors


def measures(real: Tensor, samples: Tensor) -> Measures:
    """Of features ``(N, D)`` and ``(M, D)``."""
    covered = precision_recall(real, samples, NEIGHBORS)
    return {"frechet": frechet_distance(samples, real), **covered._asdict()}


def row_of(
    samples: SampleSet, reference: Reference, seeds: Sequence[int], done: Callable[[], object]
) -> Row:
    """Draw a set for each seed, and measure it; fixed images are measured once.

    Args:
        done: called after each seed.
    """
    rows, seconds, count = [], [], 0
    for seed in seeds if samples.evaluations else seeds[:1]:
        started = time.perf_counter()
        try:
            images = samples.draw(seed)
        except ValueError as error:
            raise CommandError(f"{samples.name}: {error}") from None
        seconds.append(time.perf_counter() - started)
        rows.append(reference.compare(samples.name, images))
        count = len(images)
        done()
    rate = count / statistics.median(seconds) if samples.evaluations else None
    return Row(samples.name, samples.evaluations, count, rows, rate)


def paired(first: Row, second: Row) -> list[float]:
    """Differences of the distances of two models, seed by seed: both began with the same noise, so
    that what the noise does to both drops out.
    """
    pairs = zip(first.measures, second.measures, strict=True)
    return [a["frechet"] - b["frechet"] for a, b in pairs]


def table(rows: Sequence[Row]) -> str:
    """Markdown; with the standard deviation over the seeds where there is one."""

    def cell(row: Row, measure: str, digits: int) -> str:
        deviation = row.deviation(measure)
        spread = "" if deviation is None else f" ± {deviation:.{digits}f}"
        return f"{row.mean(measure):.{digits}f}{spread}"

    lines = [
        ["images", "evaluations", "count", "Fréchet distance", "precision", "recall", "images/s"]
    ]
    lines.append(["---"] * len(lines[0]))
    for row in rows:
        rate = "" if row.images_per_second is None else f"{row.images_per_second:.0f}"
        measured = [cell(row, "frechet", 2), cell(row, "precision", 3), cell(row, "recall", 3)]
        lines.append([row.name, str(row.evaluations or ""), str(row.images), *measured, rate])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
