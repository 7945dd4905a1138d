r"""What a solver is given, and what it returns.

With :math:`x = \alpha x_0 + \sigma\epsilon`, the probability-flow ODE is solved exactly up to one
integral over the history type h, whose scale s and clock w depend on that type only:

.. math:: \frac{x'}{s'} = \frac{x}{s} + \int_w^{w'} h\, dw, \qquad
    (s, w) = (\alpha, \rho) \text{ for } \epsilon,\; (\sigma, 1/\rho) \text{ for } x_0,\;
    (1, \sigma) \text{ for the flow velocity } \epsilon - x_0 \text{ where } \alpha + \sigma = 1

So :math:`x' = a x + \sum_j c_j h_j` with :math:`a = s'/s`, and a constant h is integrated exactly
by :math:`\sum_j c_j = s' (w' - w)`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

END_POLICIES = ("full", "lower_order_final", "euler_at_final")


class Points(NamedTuple):
    """Times with what the process says of them, each ``(n,)``."""

    t: Tensor
    alpha: Tensor
    sigma: Tensor
    log_snr: Tensor

    @classmethod
    def at(cls, process: Any, t: Tensor) -> Points:
        """Evaluate the process. Where sigma or alpha is 0, log_snr is +inf or -inf, and no gradient
        flows to t or to the process: the one of log_snr does not exist there.
        """
        with torch.no_grad():
            log_snr = process.log_snr(t)
        clean, pure_noise = log_snr == torch.inf, log_snr == -torch.inf
        ends = clean | pure_noise
        middle = t.detach().mean()
        t = torch.where(ends, t.detach(), t)
        return cls(
            t=t,
            alpha=torch.where(pure_noise, 0.0, process.alpha(t)),
            sigma=torch.where(clean, 0.0, process.sigma(torch.where(clean, middle, t))),
            log_snr=torch.where(ends, log_snr, process.log_snr(torch.where(ends, middle, t))),
        )

    def part(self, rows: slice | Tensor) -> Points:
        return Points(*(values[rows] for values in self))


@dataclass(frozen=True)
class Churn:
    """Noise added before each step (EDM, algorithm 2)."""

    S_churn: float = 0.0
    S_min: float = 0.0
    S_max: float = torch.inf
    S_noise: float = 1.0


@dataclass(frozen=True)
class Problem:
    """One plan to be made.

    Args:
        process: alpha, sigma, log_snr, inverse.
        points: the N + 1 times of the grid.
        seeds: the times of history entries that exist before the first evaluation, newest first.
        history: "eps", "x0" or "flow".
        end: one of `END_POLICIES`.
        eta: amount of noise of stochastic solvers, None for the solver's own.
        churn: noise before each step, for Runge-Kutta solvers in rho.
    """

    process: Any
    points: Points
    seeds: Points
    history: str
    end: str
    eta: float | None
    churn: Churn

    @property
    def steps(self) -> int:
        return len(self.points.t) - 1

    def span(self) -> Tensor:
        """h = log_snr' - log_snr of each step, ``(N,)``; infinite at sigma = 0 or alpha = 0."""
        return self.points.log_snr[1:] - self.points.log_snr[:-1]

    def orders(self, order: int, variable: str = "log_snr") -> Tensor:
        """The order of each step, ``(N,)``: as many history entries as there are, at most `order`,
        fewer at the end if the policy says so. An entry whose `variable` ("t", "rho" or "log_snr")
        is infinite does not count; steps to or from an infinite log_snr have order 1 if the solver
        interpolates in log_snr or has x0 history.
        """
        steps, i = self.steps, torch.arange(self.steps)
        available = i + 1 + len(self.seeds.t)
        first = (self.seeds.log_snr if len(self.seeds.t) else self.points.log_snr[:1])[-1]
        if (variable == "log_snr" and torch.isinf(first)) or (
            variable == "rho" and first == -torch.inf
        ):
            available = (available - 1).clamp(min=1)
        orders = available.clamp(max=order)
        if self.end == "lower_order_final":
            orders = torch.minimum(orders, steps - i)
        elif self.end == "euler_at_final":
            orders[-1] = 1
        if variable == "log_snr" or self.history == "x0":
            orders = torch.where(torch.isinf(self.span().detach()), 1, orders)
        return orders

    def nodes(self, of: Callable[[Points], Tensor], count: int) -> Tensor:
        """Values at the times of the history, newest first, ``(N, count)``. Those that `orders`
        does not count, because they do not exist or are infinite, are any finite number.
        """
        m = len(self.seeds.t)
        values = torch.cat([of(self.seeds).flip(0), of(self.points)[:-1]])
        values = torch.where(torch.isfinite(values), values, 0.0)
        index = m + torch.arange(self.steps)[:, None] - torch.arange(count)
        return values[index.clamp(min=0)]


def transfer(history: str, begin: Points, end: Points) -> tuple[Tensor, Tensor]:
    """a = s'/s and sum_j c_j = s' (w' - w) from one point to another."""
    if history == "eps":
        a = end.alpha / begin.alpha
        return a, end.sigma - a * begin.sigma
    if history == "x0":
        a = end.sigma / begin.sigma
        return a, end.alpha - a * begin.alpha
    return torch.ones_like(begin.sigma), end.sigma - begin.sigma


def exponential(history: str, end: Points, span: Tensor) -> tuple[Tensor, Tensor]:
    """S and z of x' = a x + S z (phi_1(z) h_0 + phi_2(z) dh/dtheta + ..), theta = 0..1 over a step
    of `span` in log_snr, which must be finite.
    """
    return (-end.sigma, span) if history == "eps" else (-end.alpha, -span)


@dataclass(frozen=True)
class Rows:
    """The table without its conversions, one row a model evaluation.

    Args:
        model_times: where the model is evaluated, ``(R,)``.
        times: the time of the base state after the row, ``(R,)``.
        a_b, c_b, s: base' = a_b base + sum_j c_b[j] h_j + s noise; ``(R,)``, ``(R, K)``, ``(R,)``.
        a_p, c_p: point' = a_p base' + sum_j c_p[j] h_j; ``(R,)``, ``(R, K)``.
        initial: scale of the sample and of the noise added to it before the first evaluation.
    """

    model_times: Tensor
    times: Tensor
    a_b: Tensor
    c_b: Tensor
    s: Tensor
    a_p: Tensor
    c_p: Tensor
    initial: Tensor

    @classmethod
    def multistep(cls, points: Points, a: Tensor, c: Tensor, s: Tensor | None = None) -> Rows:
        """One evaluation a step, at the state itself."""
        return cls(
            model_times=points.t[:-1],
            times=points.t[1:],
            a_b=a,
            c_b=c,
            s=torch.zeros_like(a) if s is None else s,
            a_p=torch.ones_like(a),
            c_p=torch.zeros_like(c),
            initial=a.new_tensor([1.0, 0.0]),
        )


def by_order(
    orders: Tensor, width: int, weights: Callable[[Tensor, int], Tensor], like: Tensor
) -> Tensor:
    """Coefficients ``(N, width)``, those of each order q from `weights(rows, q)`."""
    table = like.new_zeros(len(orders), width)
    for q in sorted(set(orders.tolist())):
        rows = (orders == q).nonzero()[:, 0]
        values = weights(rows, q)
        table = table.index_put((rows[:, None], torch.arange(values.shape[1])), values)
    return table
