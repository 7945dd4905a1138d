r"""Model outputs, and the affine maps between them.

With :math:`x = \alpha x_0 + \sigma \epsilon`:

=========  ========================================================================================
eps        the noise :math:`\epsilon`
x0         the data
v          :math:`\alpha \epsilon - \sigma x_0` (arXiv 2202.00512)
flow       the velocity :math:`\epsilon - x_0` of the straight path (arXiv 2209.03003)
score      :math:`\nabla \log p_t(x) = -\epsilon / \sigma`
edm        the raw network F of :math:`x_0 = c_{skip} x + c_{out} F(c_{in} x)` (arXiv 2206.00364)
=========  ========================================================================================
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

PREDICTIONS = ("eps", "x0", "v", "flow", "score", "edm")
HISTORIES = ("eps", "x0", "flow")

Affine = tuple[Tensor, Tensor]


def conversion(prediction: str, history: str, process: Any, t: Tensor) -> Affine:
    """A and B of h = A x + B m at times t: from the model's output m at x to the history type."""
    if prediction == history:
        return torch.zeros_like(t), torch.ones_like(t)
    alpha, sigma = process.alpha(t), process.sigma(t)
    if history == "eps":
        return _to_eps(prediction, alpha, sigma, process, t)
    if history == "x0":
        return _to_x0(prediction, alpha, sigma, process, t)
    (A_eps, B_eps), (A_x0, B_x0) = (
        to(prediction, alpha, sigma, process, t) for to in (_to_eps, _to_x0)
    )
    return A_eps - A_x0, B_eps - B_x0


def input_scale(prediction: str, process: Any, t: Tensor) -> Tensor:
    """The factor of the state in the model's input."""
    return process.preconditioning(t)[2] if prediction == "edm" else torch.ones_like(t)


def _to_eps(prediction: str, alpha: Tensor, sigma: Tensor, process: Any, t: Tensor) -> Affine:
    if prediction == "eps":
        return torch.zeros_like(t), torch.ones_like(t)
    if prediction == "v":
        power = alpha.square() + sigma.square()
        return sigma / power, alpha / power
    if prediction == "flow":
        return 1.0 / (alpha + sigma), alpha / (alpha + sigma)
    if prediction == "score":
        return torch.zeros_like(t), -sigma
    A, B = _to_x0(prediction, alpha, sigma, process, t)
    return (1.0 - alpha * A) / sigma, -alpha * B / sigma


def _to_x0(prediction: str, alpha: Tensor, sigma: Tensor, process: Any, t: Tensor) -> Affine:
    if prediction == "x0":
        return torch.zeros_like(t), torch.ones_like(t)
    if prediction == "v":
        power = alpha.square() + sigma.square()
        return alpha / power, -sigma / power
    if prediction == "flow":
        return 1.0 / (alpha + sigma), -sigma / (alpha + sigma)
    if prediction == "edm":
        c_skip, c_out, _ = process.preconditioning(t)
        return c_skip, c_out
    A, B = _to_eps(prediction, alpha, sigma, process, t)
    return (1.0 - sigma * A) / alpha, -sigma * B / alpha
