"""T1: coefficients and trajectories of the official DEIS code, and of exact integrals.

Those of the official code are of VPLinear; golden/make_deis_processes.py made those of the others.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from dsno_kernels import diffusion
from dsno_kernels.diffusion.solvers.runge_kutta import TABLEAUS

GOLDEN = Path(__file__).parent / "golden"
PROCESS = diffusion.VPLinear()
# Both sides are float64; the golden integrals have 64 Gauss-Legendre nodes a step.
EXACT = 1e-10
# Against 40 digits: what is promised for any number of steps; 4e-15 is reached here.
MPMATH = 1e-12
# The official coefficients are left Riemann sums of 10,000 points: off by up to 9e-4 of a row.
RIEMANN = 1e-3
# 10 steps of float64 that grow by a factor of 150.
TRAJECTORY = 1e-12


def values_of(name: str) -> dict[str, Tensor]:
    with np.load(GOLDEN / name) as file:
        return {key: torch.from_numpy(file[key]) for key in file.files}


VALUES = values_of("deis_vp_linear.npz")
GRIDS = sorted({key.rsplit("/", 1)[0].split("/", 1)[1] for key in VALUES if "rev_ts" in key})


def eps(x: Tensor, t: Tensor, process: diffusion.Process = PROCESS) -> Tensor:
    """The exact noise prediction of Gaussian data N(mu, diag(s^2))."""
    alpha, sigma, mu, s = process.alpha(t), process.sigma(t), VALUES["mu"], VALUES["s"]
    return sigma * (x - alpha * mu) / ((alpha * s) ** 2 + sigma**2)


def coefficients(plan: diffusion.SolverPlan, of_v: bool) -> Tensor:
    """a, c_0, c_1, ..; those of v = x / alpha for rho_ab, whose golden values are of v."""
    a, c = plan.column("a_b"), plan.column("c_b")
    if of_v:
        alpha = plan.process.alpha(plan.grid)
        a, c = a * alpha[:-1] / alpha[1:], c / alpha[1:, None]
    return torch.cat([a[:, None], c], 1)


def case(
    key: str, values: dict[str, Tensor] = VALUES, process: diffusion.Process = PROCESS
) -> tuple[str, diffusion.SolverPlan]:
    """The golden name of a method and our plan for it."""
    grid, method = key.rsplit("/", 2)[0], key.rsplit("/", 2)[1]
    name = {"ipndm": "ipndm4"}.get(method, method.replace("_ab", "ab").replace("_rk", "rk"))
    return method, diffusion.SolverPlan.build(process, values[f"{grid}/rev_ts"], name)


def row_errors(actual: Tensor, expected: Tensor) -> Tensor:
    """Of coefficients, relative to the largest of their row; columns that are missing are 0."""
    assert actual.shape[1] <= expected.shape[1]  # padding by less than 0 would cut columns off
    actual = torch.nn.functional.pad(actual, (0, expected.shape[1] - actual.shape[1]))
    return (actual - expected).abs() / expected.abs().amax(1, keepdim=True)


def calls_and_result(plan: diffusion.SolverPlan, x_T: Tensor = VALUES["x_T"]) -> Tensor:
    """The state at each model call, then the sample."""
    states: list[Tensor] = []

    def record(x: Tensor, t: Tensor) -> Tensor:
        states.append(x)
        return eps(x, t, plan.process)

    states.append(plan.replay(record, x_T))
    return torch.stack(states)


@pytest.mark.parametrize("source", ["exact", "f64"])
def test_coefficients(source: str) -> None:
    keys = [k for k in VALUES if k.startswith(source) and k.endswith("coef")]
    assert len(keys) == {"exact": 64, "f64": 66}[source]
    for key in keys:
        method, plan = case(key)
        expected = VALUES[key]
        error = row_errors(coefficients(plan, of_v=method.startswith("rho")), expected).max()
        closed = method in ("ipndm", "rho_ab0")
        assert float(error) <= (EXACT if source == "exact" or closed else RIEMANN), (key, error)


@pytest.mark.parametrize("grid", GRIDS)
def test_coefficients_replayed_give_the_official_trajectory(grid: str) -> None:
    """With the official coefficients in its table, a plan gives the official states."""
    for key in [k for k in VALUES if k.startswith(f"f64/{grid}/") and k.endswith("/coef")]:
        method, plan = case(key)
        official = VALUES[key]
        if method.startswith("rho"):
            alpha = PROCESS.alpha(plan.grid)
            official = official * alpha[1:, None]
            official[:, 0] /= alpha[:-1]
        width = plan.history_length
        table = plan.table.clone()  # plans are shared
        table[:, plan.columns["a_b"]] = official[:, :1]
        table[:, plan.columns["c_b"]] = official[:, 1 : 1 + width]
        states = calls_and_result(dataclasses.replace(plan, table=table))
        expected = VALUES[key.replace("coef", "traj")]
        error = (states - expected).abs().max() / expected.abs().max()
        assert float(error) <= TRAJECTORY, (key, error)


@pytest.mark.parametrize("tableau", TABLEAUS)
def test_runge_kutta_trajectories(tableau: str) -> None:
    for grid in GRIDS:
        key = f"f64/{grid}/rho_rk_{tableau}/traj"
        times = VALUES[f"f64/{grid}/rev_ts"]
        plan = diffusion.SolverPlan.build(PROCESS, times, f"rhork_{tableau}")
        expected = VALUES[key]
        error = (calls_and_result(plan) - expected).abs().max() / expected.abs().max()
        assert float(error) <= TRAJECTORY, (key, error)


OTHERS = values_of("deis_processes.npz")
OTHER_PROCESSES = {
    "vp_cos": diffusion.VPCosine(normalized=False),
    "vp_cos_normalized": diffusion.VPCosine(),
    "vp_discrete": diffusion.DiscreteVP(OTHERS["alphas_cumprod"]),
}


@pytest.mark.parametrize("name", OTHER_PROCESSES)
def test_coefficients_and_trajectories_of_other_processes(name: str) -> None:
    """Of N = 5, 10, 20 on each grid: t, rho and log rho AB of degrees 0 to 3, iPNDM."""
    keys = [k for k in OTHERS if k.startswith(f"{name}/") and k.endswith("coef")]
    assert len(keys) == (9 if name == "vp_discrete" else 12) * 13
    for key in keys:
        method, plan = case(key, OTHERS, OTHER_PROCESSES[name])
        actual = coefficients(plan, of_v=method.startswith("rho"))
        error = row_errors(actual, OTHERS[key]).max()
        assert float(error) <= MPMATH, (key, error)
        states = calls_and_result(plan, VALUES["x_T"][0])
        expected = OTHERS[key.replace("coef", "traj")]
        error = (states - expected).abs().max() / expected.abs().max()
        assert float(error) <= TRAJECTORY, (key, error)
