r"""Hand-made time grids of later work: DMN minimizes a bound of the error, which knows the process
and the solver but no denoiser; GITS takes a shortest path through a measured trajectory.

With :math:`\lambda = \log(\alpha / \sigma)` and :math:`\ell_{s,j}` the polynomials that interpolate
the x0 predictions of up to three entries of history, which DPM-Solver++ and UniPC integrate in
step s,

.. math::
    \frac{x_{s+1}}{\sigma_{s+1}} = \frac{x_s}{\sigma_s}
        + \sum_j w_{s,j}\, x_0(\lambda_j), \qquad
    w_{s,j} = \int_{\lambda_s}^{\lambda_{s+1}} e^\lambda\, \ell_{s,j}(\lambda)\, d\lambda

An error of :math:`e_j` in the prediction at :math:`\lambda_j` is worth at most
:math:`|\sum_s w_{s,j}|\, e_j` in the end; DMN minimizes the sum of that over j, with
:math:`e_j = \sigma_j^p / \alpha_j`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dsno_kernels.diffusion.grids import check_times, stacked, time_grid
from dsno_kernels.diffusion.plan import SolverPlan
from dsno_kernels.diffusion.process_files import check_process
from dsno_kernels.diffusion.processes import (
    Process,
    as_float64,
    integer,
    one_number,
    outside_inference_mode,
)
from dsno_kernels.diffusion.sample import sample
from dsno_kernels.functional import checks

METRICS = ("deviation", "l1", "l2")
_ORDER = 3  # of the solvers that DMN is for
_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(16)


def dmn_grid(
    process: Process,
    steps: int,
    power: float = 1.0,
    separate: int = 3,
    t_start: float | None = None,
    t_end: float | None = None,
) -> Tensor:
    r"""The grid with the least bound of the error of third-order solvers on x0 predictions.

    Args:
        process: gives log-SNRs and the range of times.
        steps: N.
        power: p of :math:`e = \sigma^p / \alpha`, of the variance-preserving process with that
            log-SNR; the authors take 1 for images and 2 for latents.
        separate: so many first steps are summed on their own, with no cancellation between them,
            as are those of order 1. The official code takes 3 for N <= 7 and 0 above; there the
            bound can be made small by terms that cancel, and the minimum is no good grid.
        t_start, t_end: the ends; `process.t_max` and `process.t_min` by default.

    Returns:
        float64, ``(N + 1,)``, strictly decreasing.

    Raises:
        ValueError, TypeError: as `time_grid` with kind "log_snr", from which the search starts; a
        power that is not finite, `separate` below 0.
        ImportError: scipy is missing.

    Source: "Accelerating diffusion sampling with optimized time steps" (arXiv 2402.17376).

    Example:
        >>> dk.diffusion.dmn_grid(dk.diffusion.EDM(), 4)
        tensor([8.0000e+01, 2.4605e+00, 6.8026e-01, 9.1662e-02, 2.0000e-03],
               dtype=torch.float64)
    """
    try:
        from scipy.optimize import minimize
        from scipy.special import softmax
    except ImportError:
        raise ImportError("dmn_grid needs scipy: pip install scipy") from None
    check_process(process)
    power, separate = one_number("power", power), integer("separate", separate)
    if not math.isfinite(power):
        raise ValueError(f"power must be finite, got {power}")
    if separate < 0:
        raise ValueError(f"separate must be at least 0, got {separate}")
    times = time_grid(process, steps, "log_snr", t_start=t_start, t_end=t_end)
    if len(times) == 2:
        return times
    first, last = process.log_snr(times[[0, -1]]).tolist()

    def grid(logits: np.ndarray) -> np.ndarray:
        gaps = softmax(np.append(logits, 0.0))
        return first + (last - first) * np.append(0.0, np.cumsum(gaps))

    found = minimize(
        lambda logits: np.log(dmn_bound(grid(logits), power, separate)),
        np.zeros(len(times) - 2),
        method="BFGS",
    )
    inner = process.inverse(torch.from_numpy(grid(found.x)[1:-1]))
    return check_times(process, torch.cat([times[:1], inner, times[-1:]]))


def dmn_bound(log_snrs: np.ndarray, power: float = 1.0, separate: int = 3) -> float:
    """The bound that `dmn_grid` minimizes, of increasing log-SNRs ``(N + 1,)``."""
    N = len(log_snrs) - 1
    steps, columns = np.arange(N), np.arange(_ORDER)
    orders = np.minimum(_ORDER, np.minimum(steps + 1, N - steps))
    index = np.maximum(steps[:, None] - columns, 0)  # [N, 3], newest first
    errors = np.exp(-log_snrs) * (1.0 + np.exp(2.0 * log_snrs)) ** ((1.0 - power) / 2.0)
    terms = _entry_weights(log_snrs, index, columns < orders[:, None]) * errors[index]
    alone = (orders == 1) | (steps < separate)
    together = np.bincount(index[~alone].ravel(), terms[~alone].ravel(), minlength=N)
    return float(np.linalg.norm(terms[alone], axis=1).sum() + np.abs(together).sum())


def _entry_weights(log_snrs: np.ndarray, index: np.ndarray, used: np.ndarray) -> np.ndarray:
    """w of the module's docstring, ``(N, 3)``, of the entries `index`; 0 where not `used`."""
    half = np.diff(log_snrs)[:, None] / 2.0
    at = log_snrs[:-1, None] + half * (1.0 + _NODES)  # [N, Q]
    nodes = log_snrs[index]
    others = used[:, :, None] & used[:, None, :] & ~np.eye(_ORDER, dtype=bool)
    gaps = np.where(others, nodes[:, :, None] - nodes[:, None, :], 1.0)
    distances = at[:, None, None] - nodes[:, None, :, None]
    factors = np.where(others[..., None], distances / gaps[..., None], 1.0)  # [N, 3, 3, Q]
    integrals = factors.prod(2) * (half * _WEIGHTS * np.exp(at))[:, None]
    return np.where(used, integrals.sum(-1), 0.0)


@outside_inference_mode
@torch.no_grad()
def trajectory_costs(
    denoiser: Callable[..., Tensor],
    process: Process,
    x_T: Tensor,
    *,
    times: Tensor | None = None,
    solver: str = "ipndm4",
    prediction: str = "x0",
    kwargs: Mapping[str, Any] | None = None,
    unconditional: Mapping[str, Any] | None = None,
    guidance: float | Tensor | None = None,
    metric: str = "deviation",
) -> tuple[Tensor, Tensor]:
    r"""What one DDIM step costs between any two times of a teacher's trajectories.

    From the state :math:`y_i = x_i / \alpha_i` of a trajectory a step of DDIM arrives at
    :math:`y_i + (\rho_j - \rho_i)\, \epsilon_i`. Its cost is the distance ("l1", "l2") from
    :math:`y_j`; or, "deviation", how much farther it is than :math:`y_j` from the straight line
    between the ends of the trajectory. Means over the samples.

    Args:
        denoiser, kwargs, unconditional, guidance: as for `sample`.
        process: alpha must not vanish at ``times[0]``.
        x_T: states at ``times[0]``, ``(B, ...)``; the authors take 256.
        times: M + 1 decreasing times of the teacher; 60 steps of `time_grid` "karras" by default.
        solver: of the teacher, multistep.
        prediction: what the denoiser returns.
        metric: of the cost.

    Returns:
        ``times``, float64 ``(M + 1,)``, and costs, float64 ``(M + 1, M + 1)`` on the CPU, infinite
        where j <= i: for `gits_grid`.

    Raises:
        ValueError: an unknown metric, no sample, a solver with several calls a step; as `sample`.
        TypeError: `x_T` is no tensor of real numbers.

    Source: GITS, "On the trajectory regularity of ODE-based diffusion sampling" (arXiv 2405.11326).

    Example:
        >>> times, costs = dk.diffusion.trajectory_costs(model, process, torch.randn(256, 1, 8, 8))
        >>> grid = dk.diffusion.gits_grid(times, costs, 5)
    """
    if metric not in METRICS:
        raise ValueError(f"unknown metric {metric!r}; known are {', '.join(METRICS)}")
    check_process(process)
    checks.real("x_T", x_T)
    if x_T.ndim < 2 or len(x_T) == 0:
        raise ValueError(f"x_T must have shape (B, ...), B >= 1, got {tuple(x_T.shape)}")
    grid = time_grid(process, 60, "karras") if times is None else times
    plan = SolverPlan.build(process, grid, solver, history="eps", prediction=prediction)
    if not torch.equal(plan.model_times, plan.grid[:-1]):
        raise ValueError(f"solver {solver!r} has several calls a step; take a multistep solver")
    alpha, rho = process.alpha(plan.grid), process.rho(plan.grid)
    states, slopes = [x_T.flatten(1).double() / float(alpha[0])], []

    def keep(i: int, t: Tensor, x: Tensor, eps: Tensor) -> None:
        states.append(x.flatten(1).double() / float(alpha[i + 1]))
        slopes.append(eps.flatten(1).double())

    sample(
        denoiser,
        x_T,
        plan,
        kwargs=kwargs,
        unconditional=unconditional,
        guidance=guidance,
        callback=keep,
    )
    y = torch.stack(states)  # [M + 1, B, D]
    line = torch.nn.functional.normalize(y[-1] - y[0], dim=-1)

    def deviation(at: Tensor) -> Tensor:
        away = at - y[-1]
        return (away - (away * line).sum(-1, keepdim=True) * line).norm(dim=-1)

    costs = torch.full((len(y), len(y)), torch.inf, dtype=torch.float64)
    for i, slope in enumerate(slopes):
        for j in range(i + 1, len(y)):  # one by one: all of them at once take much memory
            reached = y[i] + float(rho[j] - rho[i]) * slope
            if metric == "deviation":
                cost = deviation(reached) - deviation(y[j])
            else:
                cost = (reached - y[j]).norm(p=int(metric[1]), dim=-1)
            costs[i, j] = cost.mean()
    return plan.grid, costs


def gits_grid(times: Tensor, costs: Tensor, steps: int, weight: float = 1.15) -> Tensor:
    r"""The path of N steps through a teacher's times with the least
    :math:`\sum_k g^k c_{i_k, i_{k+1}}`.

    Args:
        times: M + 1 decreasing times.
        costs: ``(M + 1, M + 1)``, of `trajectory_costs`; read above the diagonal only.
        steps: N, at most M.
        weight: g; above 1 late steps, with little noise, count more.

    Returns:
        float64, ``(N + 1,)``: a subset of the times with both ends.

    Raises:
        ValueError: shapes that do not fit, N outside 1..M, times that do not decrease, a weight
        that is not positive, a cost that is not finite.

    Source: GITS (arXiv 2405.11326), algorithm 1; g = 1.15 in the official code.
    """
    steps, weight = integer("steps", steps), one_number("weight", weight)
    given, costs = stacked("times", times), as_float64("costs", costs)
    M = len(given) - 1
    if costs.shape != (M + 1, M + 1):
        raise ValueError(f"costs must have shape {(M + 1, M + 1)}, got {tuple(costs.shape)}")
    if not 1 <= steps <= M:
        raise ValueError(f"steps must be in 1..{M}, the steps of the teacher, got {steps}")
    if not bool((given.diff() < 0).all()):
        raise ValueError("times must decrease strictly")
    if not 0.0 < weight < math.inf:
        raise ValueError(f"weight must be positive and finite, got {weight}")
    forward = torch.ones_like(costs, dtype=torch.bool).triu(1)
    if not bool(costs[forward].isfinite().all()):
        raise ValueError("costs must be finite above the diagonal; look at the teacher's samples")
    costs = costs.masked_fill(~forward, torch.inf)
    remaining, choices = costs[:, -1], []
    for _ in range(steps - 1):
        remaining, choice = (costs + weight * remaining).min(1)
        choices.append(choice)
    path = [0]
    for choice in reversed(choices):
        path.append(int(choice[path[-1]]))
    return given[[*path, M]]
