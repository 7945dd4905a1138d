r"""The Fréchet distance between normal fits of two sets of vectors.

With means :math:`m`, covariances :math:`C = F^T F` and :math:`F = (x - m) / \sqrt{N - 1}`,

.. math::
    |m_1 - m_2|^2 + \mathrm{tr}\left(C_1 + C_2 - 2 (C_1^{1/2} C_2 C_1^{1/2})^{1/2}\right)
    = |m_1 - m_2|^2 + |F_1|^2 + |F_2|^2 - 2 \left|F_1 F_2^T\right|_*

where :math:`|\cdot|_*` is the sum of the singular values. F enters by its triangular factor
(F = Q R), so no product of covariances is formed and no root of rounding errors is taken: the
distance of a set from itself is 1e-14 of its variance, singular covariance or not, where the
eigenvalues of :math:`C_1 C_2` leave 1e-9.
"""

from __future__ import annotations

import torch
from torch import Tensor


def frechet_distance(first: Tensor, second: Tensor) -> float:
    """Fréchet distance between two sets of vectors, computed in float64.

    Args:
        first: ``(N, ...)``, one vector a row after flattening, any real dtype.
        second: ``(M, ...)``, vectors of the same length. On images this is the distance on pixels.

    Returns:
        The squared distance, in squared units of the vectors; 0 where means and covariances agree.

    Raises:
        ValueError: an empty set, vectors of two lengths, or a value that is not finite.

    Source: Dowson and Landau 1982; as a measure of image quality, arXiv 1706.08500.

    Example:
        >>> x = torch.randn(100, 4)
        >>> round(dk.evaluation.frechet_distance(x + 2.0, x), 4)
        16.0
    """
    (m1, R1), (m2, R2) = _fit("first", first), _fit("second", second)
    if len(m1) != len(m2):
        raise ValueError(f"vectors of {len(m1)} and of {len(m2)} numbers have no distance")
    scale = R1.square().sum() + R2.square().sum()
    overlap = torch.linalg.matrix_norm(R1 @ R2.T, "nuc")
    return ((m1 - m2).square().sum() + scale - 2 * overlap).item()


def _fit(name: str, x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean, and R with R^T R the covariance."""
    x = x.detach().flatten(1).double()
    if len(x) == 0:
        raise ValueError(f"the {name} set is empty: shape {tuple(x.shape)}")
    if not bool(x.isfinite().all()):
        raise ValueError(f"the {name} set holds values that are not finite")
    mean = x.mean(0)
    return mean, torch.linalg.qr((x - mean) / max(len(x) - 1, 1) ** 0.5, mode="r").R
