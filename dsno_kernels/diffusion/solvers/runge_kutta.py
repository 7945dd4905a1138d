r"""Solvers with several evaluations a step: Runge-Kutta in rho, and singlestep DPM-Solver.

A stage k is the state :math:`x_k = a_k x + \sum_{m<k} W_{km} h_m`; the step ends with
:math:`x' = a x + \sum_m b_m h_m`. Where log-SNR is infinite at either end of a step (sigma = 0,
say) the step is Euler's, as in EDM.

Source: DEIS (arXiv 2204.13902), the official ``rk.py``; EDM (arXiv 2206.00364), algorithms 1 and 2;
DPM-Solver (arXiv 2206.00927), algorithms 1 and 2; DPM-Solver++ (arXiv 2211.01095).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from dsno_kernels.diffusion.solvers._phi import phi
from dsno_kernels.diffusion.solvers._problem import Points, Problem, Rows, exponential, transfer

# name -> (c, A, b): stage times, stage weights, step weights
TABLEAUS: dict[str, tuple[list[float], list[list[float]], list[float]]] = {
    "1euler": ([0], [], [1]),
    "2heun": ([0, 1], [[1]], [1 / 2, 1 / 2]),
    "3kutta": ([0, 1 / 2, 1], [[1 / 2], [-1, 2]], [1 / 6, 4 / 6, 1 / 6]),
    "3ral": ([0, 1 / 2, 3 / 4], [[1 / 2], [0, 3 / 4]], [2 / 9, 3 / 9, 4 / 9]),
    "3heun": ([0, 1 / 3, 2 / 3], [[1 / 3], [0, 2 / 3]], [1 / 4, 0, 3 / 4]),
    "3vdh": ([0, 8 / 15, 2 / 3], [[8 / 15], [1 / 4, 5 / 12]], [1 / 4, 0, 3 / 4]),
    "3ssprk": ([0, 1, 1 / 2], [[1], [1 / 4, 1 / 4]], [1 / 6, 1 / 6, 2 / 3]),
    "4rk": (
        [0, 1 / 2, 1 / 2, 1],
        [[1 / 2], [0, 1 / 2], [0, 0, 1]],
        [1 / 6, 2 / 6, 2 / 6, 1 / 6],
    ),
}


@dataclass(frozen=True)
class Stages:
    """n steps of the same number of stages.

    Args:
        times: of the stages, ``(n, stages)``.
        scales, weights: a_k ``(n, stages - 1)`` and W ``(n, stages - 1, stages)`` of stages 1..
        a, b: of the step, ``(n,)`` and ``(n, stages)``.
    """

    times: Tensor
    scales: Tensor
    weights: Tensor
    a: Tensor
    b: Tensor


MakeStages = Callable[[Problem, Points, Points], Stages]


def rho_rk(problem: Problem, tableau: str) -> Rows:
    """An explicit Runge-Kutta method for d(x/alpha)/drho = eps."""
    c, A, b = TABLEAUS[tableau]

    def stages(problem: Problem, begin: Points, end: Points) -> Stages:
        rho, rho_next = begin.sigma / begin.alpha, end.sigma / end.alpha
        a, total = transfer("eps", begin, end)
        middle = [
            _between(problem.process, begin, end, rho + ck * (rho_next - rho), ck) for ck in c
        ]
        step = rho_next - rho
        scales = [stage.alpha / begin.alpha for stage in middle[1:]]
        weights = [
            (stage.alpha * step)[:, None] * step.new_tensor(row + [0.0] * (len(c) - len(row)))
            for stage, row in zip(middle[1:], A, strict=True)
        ]
        return _stages(middle, scales, weights, a, total[:, None] * total.new_tensor(b))

    return _rows(problem, stages)


def dpm_singlestep(problem: Problem, order: int) -> Rows:
    """DPM-Solver-k (eps history) and DPM-Solver++(kS) (x0 history), k = 1, 2, 3, in every step."""

    def stages(problem: Problem, begin: Points, end: Points) -> Stages:
        h = end.log_snr - begin.log_snr
        a, p = transfer(problem.history, begin, end)
        ratios = [k / order for k in range(order)]
        middle = [
            _between(problem.process, begin, end, torch.exp(-(begin.log_snr + r * h)), r)
            for r in ratios
        ]
        scales, weights, zero = [], [], torch.zeros_like(h)
        for k, (stage, r) in enumerate(zip(middle[1:], ratios[1:], strict=True), start=1):
            scale, first = transfer(problem.history, begin, stage)
            S, z = exponential(problem.history, stage, r * h)
            # the derivative, from the stage at 1/order, comes in with the second stage
            slope = S * z * phi(2, z) * (r / ratios[1]) if k > 1 else zero
            scales.append(scale)
            weights.append(torch.stack([first - slope, slope, zero][:order], 1))
        S, z = exponential(problem.history, end, h)
        if order == 1:
            b = [p]
        elif order == 2:
            b = [p - 0.5 * p / ratios[1], 0.5 * p / ratios[1]]
        else:
            slope = S * z * phi(2, z) / ratios[2]
            b = [p - slope, zero, slope]
        return _stages(middle, scales, weights, a, torch.stack(b, 1))

    return _rows(problem, stages)


def _between(process: Any, begin: Points, end: Points, rho: Tensor, fraction: float) -> Points:
    """The points at rho, without a rounding at either end of the step."""
    if fraction in (0, 1):
        return end if fraction else begin
    return Points.at(process, process.inverse(-torch.log(rho)))


def _stages(
    middle: list[Points], scales: list[Tensor], weights: list[Tensor], a: Tensor, b: Tensor
) -> Stages:
    n, count = len(a), len(middle)
    return Stages(
        times=torch.stack([stage.t for stage in middle], 1),
        scales=torch.stack(scales, 1) if scales else a.new_zeros(n, 0),
        weights=torch.stack(weights, 1) if weights else a.new_zeros(n, 0, count),
        a=a,
        b=b,
    )


def _euler(problem: Problem, begin: Points, end: Points) -> Stages:
    a, total = transfer(problem.history, begin, end)
    return _stages([begin], [], [], a, total[:, None])


def _rows(problem: Problem, make: MakeStages) -> Rows:
    begin, s, scale = _churned(problem)
    end = problem.points.part(slice(1, None))
    simple = torch.isinf(problem.span().detach())
    if problem.end != "full":
        simple[-1] = True
    parts = []
    for euler, group in groupby(range(problem.steps), key=lambda i: bool(simple[i])):
        steps = list(group)
        rows = slice(steps[0], steps[-1] + 1)
        stages = (_euler if euler else make)(problem, begin.part(rows), end.part(rows))
        # noise for the next step is added as this one ends
        after = slice(steps[0] + 1, steps[-1] + 2)
        goal = torch.cat([begin.t, end.t[-1:]])[after]
        parts.append(_flat(stages, begin.t[rows], goal, scale[after], s[after]))
    width = max(part.c_b.shape[1] for part in parts)
    columns = {
        name: torch.cat([_padded(getattr(part, name), width) for part in parts])
        for name in ("model_times", "times", "a_b", "c_b", "s", "a_p", "c_p")
    }
    return Rows(**columns, initial=torch.stack([scale[0], s[0]]))


def _padded(column: Tensor, width: int) -> Tensor:
    return pad(column, (0, width - column.shape[1])) if column.ndim == 2 else column


def _flat(stages: Stages, begin: Tensor, goal: Tensor, scale: Tensor, s: Tensor) -> Rows:
    """Rows of n steps: the stages but the first are looked ahead to, the last row ends the step."""
    count = stages.times.shape[1]
    # entry j of the history is stage k - j
    looks = [
        pad(stages.weights[:, k, : k + 1].flip(1), (0, count - k - 1)) for k in range(count - 1)
    ]
    last = scale[:, None] * stages.b.flip(1)
    one, zero = torch.ones_like(stages.a), torch.zeros_like(stages.a)
    nothing = torch.zeros_like(last)

    def interleaved(inner: list[Tensor], final: Tensor) -> Tensor:
        return torch.stack([*inner, final], 1).flatten(0, 1)

    idle = count - 1
    return Rows(
        model_times=stages.times.flatten(),
        times=interleaved([begin] * idle, goal),
        a_b=interleaved([one] * idle, scale * stages.a),
        c_b=interleaved([nothing] * idle, last),
        s=interleaved([zero] * idle, s),
        a_p=interleaved(list(stages.scales.unbind(1)), one),
        c_p=interleaved(looks, nothing),
        initial=one[:0],
    )


def _churned(problem: Problem) -> tuple[Points, Tensor, Tensor]:
    """Where each step starts after its churn, the noise added before it and the scale applied to
    the sample, ``(N + 1,)``: the last entries, after the last step, are 0 and 1.
    """
    begin, churn, steps = problem.points.part(slice(-1)), problem.churn, problem.steps
    zero, one = begin.t.new_zeros(1), begin.t.new_ones(1)
    if churn.S_churn == 0:
        return begin, zero.expand(steps + 1), one.expand(steps + 1)
    rho = begin.sigma / begin.alpha
    within = (rho >= churn.S_min) & (rho <= churn.S_max)
    gamma = within.to(rho) * min(churn.S_churn / steps, math.sqrt(2) - 1)
    raised = rho * (1.0 + gamma)
    lifted = Points.at(problem.process, problem.process.inverse(-torch.log(raised)))
    start = Points(*(torch.where(within, *pair) for pair in zip(lifted, begin, strict=True)))
    s = start.alpha * rho * torch.sqrt(gamma * (2.0 + gamma)) * churn.S_noise
    return start, torch.cat([s, zero]), torch.cat([start.alpha / begin.alpha, one])
