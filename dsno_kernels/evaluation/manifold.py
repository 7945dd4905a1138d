r"""Precision and recall of samples, from the k-th nearest neighbors in a feature space.

A set of vectors :math:`\Phi` covers the union of the balls around its members, each with the radius
of the distance to the k-th nearest other member. Precision is the share of the samples that the
real set covers, recall the share of the real images that the samples cover.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from torch import Tensor


class PrecisionRecall(NamedTuple):
    precision: float
    recall: float


def precision_recall(real: Tensor, samples: Tensor, k: int = 3) -> PrecisionRecall:
    """Improved precision and recall.

    Args:
        real: features of real images, ``(N, D)``, N > k.
        samples: features of samples, ``(M, D)``, M > k.
        k: neighbors; the paper uses 3.

    Returns:
        Precision (fidelity) and recall (diversity), in [0, 1].

    Raises:
        ValueError: shapes that do not fit, or k or fewer vectors. ModuleNotFoundError: scikit-learn
            is missing.

    Source: Kynkäänniemi et al. 2019 (arXiv 1904.06991), equations 1 and 2.

    Example:
        >>> x = torch.randn(50, 2)
        >>> dk.evaluation.precision_recall(x, x + 100.0)
        PrecisionRecall(precision=0.0, recall=0.0)
    """
    if real.ndim != 2 or samples.ndim != 2 or real.shape[1] != samples.shape[1]:
        raise ValueError(
            "real and samples must have shapes (N, D) and (M, D), got"
            f" {tuple(real.shape)} and {tuple(samples.shape)}"
        )
    if k < 1 or min(len(real), len(samples)) <= k:
        raise ValueError(
            f"k = {k} neighbors need more than {max(k, 1)} vectors in each set and k >= 1, got"
            f" {len(real)} and {len(samples)}"
        )
    a, b = (x.detach().cpu().double().numpy() for x in (real, samples))
    return PrecisionRecall(_covered(b, a, k), _covered(a, b, k))


def _covered(points: np.ndarray, centers: np.ndarray, k: int) -> float:
    """Share of the points that lie in the ball of a center."""
    from sklearn.metrics import pairwise_distances_chunked
    from sklearn.neighbors import NearestNeighbors

    # Without an argument each center is no neighbor of itself.
    radii = NearestNeighbors(n_neighbors=k).fit(centers).kneighbors()[0][:, -1]
    inside = pairwise_distances_chunked(
        points, centers, reduce_func=lambda distances, _: (distances <= radii).any(axis=1)
    )
    return float(np.concatenate(list(inside)).mean())
