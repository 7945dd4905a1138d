r"""Adams-Bashforth solvers: the history is interpolated by a polynomial and integrated.

.. math:: c_j = s' \int_w^{w'} L_j(u)\, dw, \qquad
    L_j(u) = \prod_{k \ne j} \frac{u - u_k}{u_j - u_k}

u is the time (tab), rho (rhoab) or log-SNR (logrhoab); (s, w) as in :mod:`._problem`. The integral
is a Gauss-Legendre sum in log-SNR over panels of at most one unit: there the integrand is a
polynomial in u times :math:`e^{\pm\lambda}`, and :math:`t(\lambda)` of every process here has its
nearest singularity at a distance of :math:`\pi/2`, so 16 nodes leave less than 1e-20. Panels also
end where the process is not smooth.

Source: DEIS (arXiv 2204.13902), equations 14-15; iPNDM: section 3.4 and PNDM (arXiv 2202.09778).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dsno_kernels.diffusion.solvers._problem import Points, Problem, Rows, transfer

# The rest of an integral that ends at log_snr = inf, where w falls like exp(-log_snr): 1e-26.
_TAIL = 60.0
_LEGENDRE = np.polynomial.legendre.leggauss(16)

_ADAMS_BASHFORTH = (
    (1.0, 0.0, 0.0, 0.0),
    (3 / 2, -1 / 2, 0.0, 0.0),
    (23 / 12, -16 / 12, 5 / 12, 0.0),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)

# dw / dlog_snr
_DENSITY: dict[str, Callable[[Tensor], Tensor]] = {
    "eps": lambda log_snr: -torch.exp(-log_snr),
    "x0": lambda log_snr: torch.exp(log_snr),
    "flow": lambda log_snr: -torch.sigmoid(log_snr) * torch.sigmoid(-log_snr),
}

_AT_POINTS: dict[str, Callable[[Points], Tensor]] = {
    "t": lambda points: points.t,
    "rho": lambda points: points.sigma / points.alpha,
    "log_snr": lambda points: points.log_snr,
}


def adams(problem: Problem, degree: int, variable: str) -> Rows:
    """Interpolate up to degree + 1 entries in `variable`: "t", "rho" or "log_snr"."""
    orders = problem.orders(degree + 1, log_nodes=variable == "log_snr")
    begin, end = problem.points.part(slice(-1)), problem.points.part(slice(1, None))
    a, total = transfer(problem.history, begin, end)
    width = int(orders.max())
    scale = {"eps": end.alpha, "x0": end.sigma, "flow": torch.ones_like(a)}[problem.history]
    c = scale[:, None] * _integrals(problem, orders, width, variable)
    first = torch.nn.functional.pad(total[:, None], (0, width - 1))
    return Rows.multistep(problem.points, a, torch.where(orders[:, None] == 1, first, c))


def ipndm(problem: Problem, order: int) -> Rows:
    """Weights of equal steps whatever the grid: x' = a x + s'(w' - w) sum_j b_j h_j."""
    orders = problem.orders(order, log_nodes=False)
    begin, end = problem.points.part(slice(-1)), problem.points.part(slice(1, None))
    a, total = transfer(problem.history, begin, end)
    weights = total.new_tensor(_ADAMS_BASHFORTH)[orders - 1, : int(orders.max())]
    return Rows.multistep(problem.points, a, total[:, None] * weights)


def ddim(problem: Problem) -> Rows:
    r"""DDIM: :math:`x' = \alpha' x_0 + \sqrt{\sigma'^2 - s^2}\, \epsilon + s\, noise`,
    :math:`s = \eta \sigma' \sqrt{1 - e^{-2h}}` (arXiv 2010.02502, equations 12 and 16).
    """
    rows = adams(problem, 0, "t")
    eta = problem.eta or 0.0
    if eta == 0:
        return rows
    begin, end = problem.points.part(slice(-1)), problem.points.part(slice(1, None))
    h = problem.span()
    infinite = torch.isinf(h)
    lost = -torch.where(infinite, -1.0, torch.expm1(-2.0 * torch.where(infinite, 1.0, h)))
    s = eta * end.sigma * torch.sqrt(lost)
    rest = end.sigma * torch.sqrt(1.0 - eta**2 * lost)
    if problem.history == "eps":
        a = end.alpha / begin.alpha
        return Rows.multistep(problem.points, a, (rest - a * begin.sigma)[:, None], s)
    a = rest / begin.sigma
    return Rows.multistep(problem.points, a, (end.alpha - a * begin.alpha)[:, None], s)


def _integrals(problem: Problem, orders: Tensor, width: int, variable: str) -> Tensor:
    """The integrals of L_j dw over each step, ``(N, width)``; 0 from the step's order on."""
    log_snr = _finite(problem.points.log_snr)
    row, lower, upper = _panels(problem.process, log_snr[:-1], log_snr[1:])
    u = problem.nodes(_AT_POINTS[variable], width)[row]  # [P, width]
    used = torch.arange(width) < orders[row, None]
    x01, w01 = (torch.from_numpy(values) for values in _LEGENDRE)
    x = lower[:, None] + (upper - lower)[:, None] * (0.5 + 0.5 * x01)  # [P, G]
    weights = (0.5 * (upper - lower))[:, None] * w01 * _DENSITY[problem.history](x)
    at = {"t": problem.process.inverse, "rho": lambda x: torch.exp(-x), "log_snr": lambda x: x}
    v = at[variable](x)
    columns = []
    for j in range(width):
        cardinal = weights
        for k in range(width):
            if k != j:
                both = used[:, j] & used[:, k]
                gap = torch.where(both, u[:, j] - u[:, k], 1.0)
                factor = (v - u[:, k, None]) / gap[:, None]
                cardinal = torch.where(both[:, None], cardinal * factor, cardinal)
        columns.append(torch.where(used[:, j], cardinal.sum(1), 0.0))
    panels = torch.stack(columns, 1)
    return panels.new_zeros(problem.steps, width).index_add(0, row, panels)


def _finite(log_snr: Tensor) -> Tensor:
    """Infinite ends moved to where the tail of the integral is nothing."""
    inside = log_snr.detach()[torch.isfinite(log_snr)]
    low, high = (float(inside.min()), float(inside.max())) if len(inside) else (0.0, 0.0)
    ends = torch.where(log_snr < 0, low - _TAIL, high + _TAIL)
    return torch.where(torch.isfinite(log_snr), log_snr, ends)


def _panels(process: Any, begin: Tensor, end: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Each step cut at whole log-SNRs and at the kinks of the process: the step that a panel
    belongs to, and its two ends, in the direction of the step.
    """
    low, high = torch.minimum(begin, end), torch.maximum(begin, end)
    bottom, top = math.floor(float(low.detach().min())), math.ceil(float(high.detach().max()))
    cuts = torch.arange(bottom, top + 1, dtype=torch.float64)
    kinks = process.kinks() if hasattr(process, "kinks") else None
    if kinks is not None:
        cuts = torch.cat([cuts, kinks]).sort().values
    first = torch.searchsorted(cuts, low.detach(), right=True)
    count = (torch.searchsorted(cuts, high.detach()) - first).clamp(min=0) + 1
    row = torch.repeat_interleave(torch.arange(len(low)), count)
    panel = torch.arange(len(row)) - (count.cumsum(0) - count)[row]
    cut = first[row] + panel  # the cut that ends this panel
    lower = torch.where(panel == 0, low[row], cuts[(cut - 1).clamp(min=0)])
    upper = torch.where(panel == count[row] - 1, high[row], cuts[cut.clamp(max=len(cuts) - 1)])
    backwards = (end < begin)[row]
    return row, torch.where(backwards, upper, lower), torch.where(backwards, lower, upper)
