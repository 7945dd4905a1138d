r"""UniP and UniPC: the predictor of order k, and the corrector that uses one entry more.

With :math:`r_k = (\lambda_k - \lambda_0)/h` of the entries k, S and z of
:func:`._problem.exponential`, B = z ("bh1") or expm1(z) ("bh2"),

.. math:: x' = a x + S \operatorname{expm1}(z)\, m_0 + S B \sum_k \frac{\varrho_k}{r_k} (m_k - m_0),
    \qquad \sum_k r_k^{q-1} \varrho_k = \frac{z}{B}\, q!\, \varphi_{q+1}(z)

The corrector has the new entry among the k, at r = 1. One unknown alone is 1/2, as published.

A row of UniPC corrects the base from the previous time to its own with the new entry and looks
ahead to the next time with the predictor, so the base lags one step; the last row does both at
once.

Source: UniPC (arXiv 2302.04867), algorithms 1-4 and appendix E.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from dsno_kernels.diffusion.solvers._phi import phi
from dsno_kernels.diffusion.solvers._problem import Problem, Rows, by_order, exponential, transfer


def unip(problem: Problem, order: int, variant: str) -> Rows:
    """The predictor alone. `variant`: "bh1" or "bh2"."""
    orders = problem.orders(order)
    a, c = _predictor(problem, orders, variant)
    return Rows.multistep(problem.points, a, c)


def unipc(problem: Problem, order: int, variant: str) -> Rows:
    """Predictor and corrector in one row."""
    orders = problem.orders(order)
    a, predict = _predictor(problem, orders, variant)
    rows = Rows.multistep(problem.points, a, predict)
    if problem.steps == 1:
        return rows
    correct = _corrector(problem, orders, variant)
    width = max(predict.shape[1], correct.shape[1])
    c_p = pad(predict, (0, width - predict.shape[1]))
    c_b = pad(pad(correct, (0, width - correct.shape[1])), (0, 0, 1, 0))  # nothing to correct first
    a_b, a_p = torch.cat([a.new_ones(1), a[:-1]]), a
    last = torch.arange(problem.steps) == problem.steps - 1
    t = problem.points.t
    return replace(
        rows,
        times=torch.cat([t[:-2], t[-1:]]),
        a_b=torch.where(last, a_p * a_b, a_b),
        c_b=torch.where(last[:, None], a_p[:, None] * c_b + c_p, c_b),
        a_p=torch.where(last, 1.0, a_p),
        c_p=torch.where(last[:, None], 0.0, c_p),
    )


def _predictor(problem: Problem, orders: Tensor, variant: str) -> tuple[Tensor, Tensor]:
    begin, end = problem.points.part(slice(-1)), problem.points.part(slice(1, None))
    a, total = transfer(problem.history, begin, end)
    width = int(orders.max())
    r, S, z = _scaled(problem, width)

    def weights(rows: Tensor, q: int) -> Tensor:
        differences = _differences(r[rows, 1:q], S[rows], z[rows], variant)
        return torch.cat([total[rows, None] - differences.sum(1, keepdim=True), differences], 1)

    return a, by_order(orders, width, weights, like=a)


def _corrector(problem: Problem, orders: Tensor, variant: str) -> Tensor:
    """Coefficients of the steps but the last on (new, m_0, m_1, ..), ``(N - 1, width + 1)``."""
    begin, end = problem.points.part(slice(-1)), problem.points.part(slice(1, None))
    _, total = transfer(problem.history, begin, end)
    orders = orders[:-1]
    width = int(orders.max())
    r, S, z = _scaled(problem, width)
    infinite = torch.isinf(problem.span())

    def weights(rows: Tensor, q: int) -> Tensor:
        nodes = torch.cat([torch.ones_like(r[rows, :1]), r[rows, 1:q]], 1)
        differences = _differences(nodes, S[rows], z[rows], variant)
        # a step from alpha = 0 has no finite h to correct with
        differences = torch.where(infinite[rows, None], 0.0, differences)
        m0 = total[rows, None] - differences.sum(1, keepdim=True)
        return torch.cat([differences[:, :1], m0, differences[:, 1:]], 1)

    return by_order(orders, width + 1, weights, like=total)


def _scaled(problem: Problem, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """r of the history entries ``(N, width)``, S and z ``(N,)``; stand-ins where h is infinite."""
    h = problem.span()
    h = torch.where(torch.isinf(h), 1.0, h)
    log_snr = problem.nodes(lambda points: points.log_snr, width)
    S, z = exponential(problem.history, problem.points.part(slice(1, None)), h)
    return (log_snr - log_snr[:, :1]) / h[:, None], S, z


def _differences(r: Tensor, S: Tensor, z: Tensor, variant: str) -> Tensor:
    """The coefficients of (m_k - m_0), ``(rows, k)``."""
    count = r.shape[1]
    if count == 0:
        return r
    B = z if variant == "bh1" else torch.expm1(z)
    if count == 1:
        weights = torch.full_like(r, 0.5)
    else:
        powers = torch.stack([r**q for q in range(count)], 1)
        moments = [math.factorial(q) * phi(q + 1, z) for q in range(1, count + 1)]
        right = torch.stack(moments, 1) * (z / B)[:, None]
        weights = torch.linalg.solve(powers, right)
    return (S * B)[:, None] * weights / r
