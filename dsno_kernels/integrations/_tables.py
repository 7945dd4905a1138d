"""Coefficients of diffusers' schedulers: one row a step, in float64, from the sigmas.

A multistep step from the sample x and the model's output m is

    h_0   = A x + B m                           the newest entry of history
    x'    = a x + sum_j c_j h_j (+ s noise)

and a corrected one (UniPC) starts from the corrected sample of the step before instead of x. The
solvers are those of `dsno_kernels.diffusion.solvers`, given arrays of alpha and sigma.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from dsno_kernels.diffusion.solvers import adams, dpm, unipc
from dsno_kernels.diffusion.solvers._problem import Churn, Points, Problem, Rows

# alpha' / alpha beyond which the terms in x and in an eps entry of another prediction nearly cancel
# (the first steps of a flow from pure noise): float32 would lose what float64 adds up here.
_STEEP = 16.0


@dataclass(frozen=True)
class Solver:
    """What a table depends on besides the sigmas.

    Args:
        family: "deis", "dpm" or "unipc".
        history: what the solver combines, "eps" or "x0".
        prediction: `prediction_type` of the configuration.
        thresholded: what comes is x_0 after a threshold, whatever the prediction.
        flow: alpha = 1 - sigma; otherwise sigma is the ratio of noise to signal.
        order: 1 and more.
        end: an end policy of `SolverPlan.build`.
        second: "midpoint" or "heun" (dpm), "bh1" or "bh2" (unipc).
        third: weights of order 3 of dpm: "exact", "shipped" or "diffusers_sde".
        sde: noise in every step (dpm).
        uncorrected: steps, counted from the first of the schedule, that do not correct (unipc).
    """

    family: str
    history: str
    prediction: str
    thresholded: bool
    flow: bool
    order: int
    end: str
    second: str = "midpoint"
    third: str = "exact"
    sde: bool = False
    uncorrected: frozenset[int] = frozenset()


def name_of(solver: Solver) -> str | None:
    """Its name in `dk.diffusion.solvers()`; None where it has none."""
    if solver.sde or solver.uncorrected:
        return None
    if solver.family == "deis":
        return f"deis{solver.order}"
    if solver.family == "unipc":
        return f"unipc{solver.order}_{solver.second}"
    kinds = {
        (1, solver.second, solver.third): "1m",
        (2, "midpoint", solver.third): "2m",
        (2, "heun", solver.third): "2m_heun",
        (3, "midpoint", "shipped"): "3m",
        (3, "heun", "exact"): "3m_exact",
    }
    kind = kinds.get((solver.order, solver.second, solver.third))
    return None if kind is None else f"{'dpmpp' if solver.history == 'x0' else 'dpm'}_{kind}"


class Row(NamedTuple):
    """One step.

    Args:
        direct: coefficients of `exp_step` on (x, m, h_1, ..) where that is the whole step; empty
            where `fused` is taken.
        folded: `direct` has A and B multiplied in, and h_0 is another call.
        fused: a row of `solver_step`.
        entry: A and B, by which h_0 = A x + B m.
        to_x0: the same for x_0 itself.
        reads: entries of history that the row reads, without h_0.
        noisy: whether it adds noise.
        corrects: whether it starts from the corrected sample of the step before.
        looks_ahead: whether the next sample differs from the corrected one.
    """

    direct: tuple[float, ...]
    folded: bool
    fused: tuple[float, ...]
    entry: tuple[float, float]
    to_x0: tuple[float, float]
    reads: int
    noisy: bool
    corrects: bool
    looks_ahead: bool


@lru_cache(maxsize=64)
def rows(
    solver: Solver, sigmas: tuple[float, ...], first: int, calls: tuple[float, ...] = ()
) -> tuple[Row, ...]:
    """The steps of a schedule that begins, without history, at its step `first`; `calls` are the
    sigmas of the model's calls where those are not the sigmas of the steps.
    """
    if not 0 <= first < len(sigmas) - 1:
        return ()
    with torch.device("cpu"), torch.inference_mode(False), torch.no_grad():
        points = _points(torch.tensor(sigmas[first:], dtype=torch.float64), solver.flow)
        for i in range(first, len(sigmas) - 2):
            if sigmas[i] == sigmas[i + 1]:
                raise ValueError(
                    f"sigma {i} and sigma {i + 1} of the schedule are both {sigmas[i]:.6g}: take"
                    " fewer steps, or timesteps that differ"
                )
        problem = _problem(solver, points)
        made = _made(solver, problem)
        ratio = torch.tensor((calls or sigmas[:-1])[first:], dtype=torch.float64)
        begin = _points(ratio, solver.flow)
        given = "sample" if solver.thresholded else solver.prediction
        to_history = _conversion(solver.history, given, begin, ratio, solver.family)
        to_x0 = _conversion("x0", solver.prediction, begin, ratio, solver.family)
        plain = made
        if solver.family == "unipc":
            plain = unipc.unip(problem, solver.order, solver.second)
    corrected, simple, count = _listed(made), _listed(plain), len(ratio)
    uncorrected = {0} | {step - first for step in solver.uncorrected}
    corrects = [solver.family == "unipc" and i not in uncorrected for i in range(count)]
    return tuple(
        _row(*parts, corrects=corrects[i], last=i == count - 1)
        for i, parts in enumerate(
            zip(
                (corrected[i] if corrects[i] else simple[i] for i in range(count)),
                zip(*(x.tolist() for x in to_history), strict=True),
                zip(*(x.tolist() for x in to_x0), strict=True),
                strict=True,
            )
        )
    )


class _Numbers(NamedTuple):
    """One of `Rows`: base' = a_b base + c_b h + s noise, point' = a_p base' + c_p h."""

    a_b: float
    c_b: list[float]
    s: float
    a_p: float
    c_p: list[float]


def _listed(made: Rows) -> list[_Numbers]:
    columns = (made.a_b, made.c_b, made.s, made.a_p, made.c_p)
    return [_Numbers(*row) for row in zip(*(x.tolist() for x in columns), strict=True)]


def _points(sigmas: Tensor, flow: bool) -> Points:
    if flow:
        alpha, sigma = 1.0 - sigmas, sigmas
        log_snr = torch.log(alpha) - torch.log(sigma)
    else:
        alpha = 1.0 / torch.sqrt(1.0 + sigmas.square())
        sigma, log_snr = sigmas * alpha, -torch.log(sigmas)
    return Points(torch.arange(len(sigmas), dtype=torch.float64).neg(), alpha, sigma, log_snr)


def _problem(solver: Solver, points: Points) -> Problem:
    end = solver.end
    if end == "full" and len(points.t) > 1 and bool(points.log_snr[-1] == points.log_snr[-2]):
        end = "euler_at_final"  # a last step that goes nowhere, as some of diffusers' schedules do
    return Problem(
        process=None,
        points=points,
        seeds=points.part(slice(0)),
        history=solver.history,
        end=end,
        eta=None,
        churn=Churn(),
    )


def _made(solver: Solver, problem: Problem) -> Rows:
    if solver.family == "deis":
        return adams.adams(problem, solver.order - 1, "log_snr")
    if solver.family == "unipc":
        return unipc.unipc(problem, solver.order, solver.second)
    if not solver.sde or solver.history == "x0":
        eta = 1.0 if solver.sde else 0.0
        return dpm.multistep(problem, solver.order, solver.second, solver.third, eta)
    # SDE-DPM-Solver (arXiv 2211.01095, appendix): the drift of the noise counts twice
    made = dpm.multistep(problem, solver.order, solver.second, solver.third)
    noise = problem.points.sigma[1:] * torch.sqrt(torch.expm1(2.0 * problem.span()))
    return Rows.multistep(problem.points, made.a_b, 2.0 * made.c_b, noise)


def _conversion(
    history: str, prediction: str, at: Points, ratio: Tensor, family: str
) -> tuple[Tensor, Tensor]:
    """A and B as diffusers defines its predictions; `ratio` is the sigma of its schedule. DEIS
    derives epsilon from x_0, which where alpha^2 + sigma^2 is not 1 makes another one of v.
    """
    zero, one = torch.zeros_like(ratio), torch.ones_like(ratio)
    alpha, sigma = at.alpha, at.sigma
    if history == "x0":
        return {
            "epsilon": (1.0 / alpha, -sigma / alpha),
            "sample": (zero, one),
            "v_prediction": (alpha, -sigma),
            "flow_prediction": (one, -ratio),
        }[prediction]
    return {
        "epsilon": (zero, one),
        "sample": (1.0 / sigma, -alpha / sigma),
        "v_prediction": ((1.0 - alpha.square()) / sigma if family == "deis" else sigma, alpha),
        "flow_prediction": ((1.0 - alpha) / sigma, alpha * ratio / sigma),
    }[prediction]


def _row(
    numbers: _Numbers,
    entry: tuple[float, float],
    to_x0: tuple[float, float],
    corrects: bool,
    last: bool,
) -> Row:
    a, c, s, a_p, c_p = numbers
    K = 1 + max((j for j in range(len(c)) if c[j] != 0 or c_p[j] != 0), default=0)
    c, c_p = c[:K], c_p[:K]
    plain = entry == (0.0, 1.0)
    direct: tuple[float, ...] = ()
    if not corrects and (plain or abs(a) > _STEEP):
        noise = (s,) if s else ()
        direct = (a + c[0] * entry[0], c[0] * entry[1], *c[1:], *noise)
    return Row(
        direct=direct,
        folded=bool(direct) and not plain,
        fused=(*entry, a, *c, s, a_p, *c_p, 1.0),
        entry=entry,
        to_x0=to_x0,
        reads=K - 1,
        noisy=bool(s),
        corrects=corrects,
        looks_ahead=corrects and not last,
    )
