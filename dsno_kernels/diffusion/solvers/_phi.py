r"""The functions :math:`\varphi_k` of exponential integrators.

.. math:: \varphi_k(z) = \int_0^1 e^{(1-s) z} \frac{s^{k-1}}{(k-1)!}\, ds
    = \sum_{n \ge 0} \frac{z^n}{(n+k)!}, \qquad
    \varphi_{k+1}(z) = \frac{\varphi_k(z) - 1/k!}{z}
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# |z| < 1 takes the series: 18 terms leave 1/18!, 2e-16. Beyond, the recurrence loses at most the
# factor 1/phi_4(-1) = 29 of a rounding.
_TERMS = 18


def phi(k: int, z: Tensor) -> Tensor:
    """phi_k(z) for k >= 1, float64, to a few roundings, differentiable."""
    small = z.abs() < 1
    near = torch.where(small, z, 0.0)
    series = torch.full_like(near, 1.0 / math.factorial(_TERMS + k))
    for n in range(_TERMS - 1, -1, -1):
        series = series * near + 1.0 / math.factorial(n + k)
    far = torch.where(small, 1.0, z)
    value = torch.expm1(far) / far
    for j in range(1, k):
        value = (value - 1.0 / math.factorial(j)) / far
    return torch.where(small, series, value)
