r"""Adams-Bashforth solvers: the history is interpolated by a polynomial and integrated.

.. math:: c_j = s' \int_w^{w'} L_j(u)\, dw, \qquad
    L_j(u) = \prod_{k \ne j} \frac{u - u_k}{u_j - u_k}

u is the time (tab), rho (rhoab) or log-SNR (logrhoab); (s, w) as in :mod:`._problem`. The integral
is a Gauss-Legendre sum of 16 nodes over panels of at most half a unit of log-SNR. There the
integrand is smooth: in log-SNR, singularities of the processes lie at a distance of
:math:`\pi/2`; in time, :math:`\rho \sim \sqrt t` at t = 0 is the nearest, and leaves 3e-20. Panels
also end where the process is not smooth.

Source: DEIS (arXiv 2204.13902), equations 14-15; iPNDM: section 3.4 and PNDM (arXiv 2202.09778).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from dsno_kernels.diffusion.solvers._problem import Points, Problem, Rows, transfer

# The rest of an integral that ends at log_snr = inf, where w falls like exp(-log_snr): 1e-26.
_TAIL = 60.0
_PANEL = 0.5
_NODES, _WEIGHTS = (torch.from_numpy(values) for values in np.polynomial.legendre.leggauss(16))
_NODES, _WEIGHTS = 0.5 + 0.5 * _NODES, 0.5 * _WEIGHTS  # on [0, 1]

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
    orders = problem.orders(degree + 1, variable)
    begin, end = problem.points.part(slice(-1)), problem.points.part(slice(1, None))
    a, total = transfer(problem.history, begin, end)
    width = int(orders.max())
    c = pad(total[:, None], (0, width - 1))
    rows = (orders > 1).nonzero()[:, 0]
    if len(rows):
        scale = {"eps": end.alpha, "x0": end.sigma, "flow": torch.ones_like(a)}[problem.history]
        integrals = _integrals(problem, rows, orders[rows], width, variable)
        c = c.index_put((rows,), scale[rows, None] * integrals)
    return Rows.multistep(problem.points, a, c)


def ipndm(problem: Problem, order: int) -> Rows:
    """Weights of equal steps whatever the grid: x' = a x + s'(w' - w) sum_j b_j h_j."""
    orders = problem.orders(order, "t")
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


def _integrals(
    problem: Problem, steps: Tensor, orders: Tensor, width: int, variable: str
) -> Tensor:
    """The integrals of L_j dw over these steps, ``(steps, width)``; 0 from a step's order on."""
    process, log_snr = problem.process, _finite(problem.points.log_snr)
    cuts = _cuts(process, log_snr)
    # in time where that is what L_j is made of: differences of times are then exact
    ends = problem.points.t if variable == "t" else log_snr
    if variable == "t":
        cuts = process.inverse(cuts).detach().sort().values
    row, lower, upper = _panels(ends[steps], ends[steps + 1], cuts)
    along = (upper - lower)[:, None] * _NODES  # [P, G]
    weights = (upper - lower)[:, None] * _WEIGHTS
    x = lower[:, None] + along
    if variable == "t":
        x, rate = _log_snr_and_rate(process, x)
        weights = torch.where(torch.isfinite(x), weights * rate, 0.0)
    weights = weights * _DENSITY[problem.history](x)
    u = problem.nodes(_AT_POINTS[variable], width)[steps][row]  # [P, width]
    used = torch.arange(width) < orders[row, None]
    columns = []
    for j in range(width):
        cardinal = weights
        for k in range(width):
            if k != j:
                both = used[:, j] & used[:, k]
                gap = torch.where(both, u[:, j] - u[:, k], 1.0)[:, None]
                if variable == "rho":
                    distance = torch.exp(-x) - u[:, k, None]
                else:
                    distance = (lower - u[:, k])[:, None] + along
                cardinal = torch.where(both[:, None], cardinal * distance / gap, cardinal)
        columns.append(torch.where(used[:, j], cardinal.sum(1), 0.0))
    panels = torch.stack(columns, 1)
    return panels.new_zeros(len(steps), width).index_add(0, row, panels)


def _finite(log_snr: Tensor) -> Tensor:
    """Infinite ends moved to where the tail of the integral is nothing."""
    inside = log_snr.detach()[torch.isfinite(log_snr)]
    low, high = (float(inside.min()), float(inside.max())) if len(inside) else (0.0, 0.0)
    return log_snr.clamp(low - _TAIL, high + _TAIL)


def _log_snr_and_rate(process: Any, t: Tensor) -> tuple[Tensor, Tensor]:
    """log_snr and its derivative in t, themselves differentiable where t or the process is."""
    with torch.enable_grad():
        inner = t if t.requires_grad else t.detach().requires_grad_()
        log_snr = process.log_snr(inner)
        graph = t.requires_grad or process.log_snr(t.detach()).requires_grad
        (rate,) = torch.autograd.grad(log_snr.sum(), inner, create_graph=graph)
    return (log_snr, rate) if graph else (log_snr.detach(), rate)


def _cuts(process: Any, log_snr: Tensor) -> Tensor:
    """The log-SNRs at which panels end, increasing."""
    low, high = (float(end(log_snr.detach()) / _PANEL) for end in (torch.min, torch.max))
    cuts = _PANEL * torch.arange(math.floor(low), math.ceil(high) + 1, dtype=torch.float64)
    kinks = process.kinks() if hasattr(process, "kinks") else None
    return cuts if kinks is None else torch.cat([cuts, kinks]).sort().values


def _panels(begin: Tensor, end: Tensor, cuts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Each step from begin to end in panels that end at the cuts: the step that a panel belongs to,
    and its two ends, in the direction of the step.
    """
    low, high = torch.minimum(begin, end), torch.maximum(begin, end)
    first = torch.searchsorted(cuts, low.detach(), right=True)
    count = (torch.searchsorted(cuts, high.detach()) - first).clamp(min=0) + 1
    row = torch.repeat_interleave(torch.arange(len(low)), count)
    panel = torch.arange(len(row)) - (count.cumsum(0) - count)[row]
    cut = first[row] + panel  # the cut that ends this panel
    lower = torch.where(panel == 0, low[row], cuts[(cut - 1).clamp(min=0)])
    upper = torch.where(panel == count[row] - 1, high[row], cuts[cut.clamp(max=len(cuts) - 1)])
    backwards = (end < begin)[row]
    return row, torch.where(backwards, upper, lower), torch.where(backwards, lower, upper)
