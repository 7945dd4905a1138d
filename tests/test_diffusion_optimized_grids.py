"""DMN against the official optimizer and quadrature, GITS against all paths."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from dsno_kernels.diffusion import EDM, FlowMatching, SolverPlan, VPCosine, VPLinear, time_grid
from dsno_kernels.diffusion.optimized_grids import (
    dmn_bound,
    dmn_grid,
    gits_grid,
    trajectory_costs,
)
from tests.diffusion_problems import Gaussian, golden

pytest.importorskip("scipy")
DOWN = torch.tensor([3.0, 2.0, 1.0, 0.0])


@pytest.mark.parametrize("steps", [4, 5, 6])
def test_dmn_is_the_minimum_that_the_official_code_finds(steps: int) -> None:
    """LD3's `dmn` of sigma from 80 to 0.002 (scipy's trust-constr), which is stored as float32."""
    expected = golden("ld3.npz")[f"grid_ve_dmn_{steps}"].double()
    torch.testing.assert_close(dmn_grid(EDM(), steps), expected, rtol=1e-3, atol=0)
    found, official = (dmn_bound(-np.log(g.numpy())) for g in (dmn_grid(EDM(), steps), expected))
    assert found < official * (1 + 1e-6)


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 12])
def test_dmn_bounds_less_than_the_grid_it_starts_from(steps: int) -> None:
    process = VPLinear()
    plain, grid = time_grid(process, steps, "log_snr"), dmn_grid(process, steps)
    assert torch.equal(grid[[0, -1]], plain[[0, -1]]) and bool((grid.diff() < 0).all())
    before, after = (dmn_bound(process.log_snr(g).numpy()) for g in (plain, grid))
    assert after < before if steps > 2 else after <= before


def test_the_bound_sums_the_weights_of_third_order_plans() -> None:
    """Without `separate` steps: |sum of c_j sigma_N / sigma_s| of each entry, and the first and the
    last step on their own; c_j as the coefficients of this library's multistep solver.
    """
    process = VPCosine()
    grid = time_grid(process, 7, "log_snr")
    plan = SolverPlan.build(
        process, grid, "logrhoab2", history="x0", end="lower_order_final", prediction="x0"
    )
    weights = plan.column("c_b") / process.sigma(grid[1:])[:, None]
    rho = process.rho(grid)
    error = rho * torch.sqrt(1 + 1 / rho**2) ** (1 - 2.0)
    expected, sums = 0.0, torch.zeros(7, dtype=torch.float64)
    for s in range(7):
        for j in range(min(s + 1, weights.shape[1])):
            term = float(weights[s, j] * error[s - j])
            if s in (0, 6):
                expected += abs(term)
            else:
                sums[s - j] += term
    expected += float(sums.abs().sum())
    bound = dmn_bound(process.log_snr(grid).numpy(), power=2.0, separate=0)
    assert bound == pytest.approx(expected, rel=1e-9)


def costs_of_gaussian(metric: str) -> tuple[Gaussian, Tensor, Tensor]:
    problem = Gaussian(EDM(), 80.0)
    times = time_grid(EDM(), 40, "karras")

    def denoiser(x: Tensor, t: Tensor) -> Tensor:
        return problem.prediction("x0", x, t)

    return problem, *trajectory_costs(
        denoiser, EDM(), problem.x_T, times=times, solver="rhoab3", metric=metric
    )


def test_costs_are_the_errors_of_one_ddim_step() -> None:
    """Of Gaussian data, whose trajectories are known; up to the error of the teacher's steps."""
    problem, times, costs = costs_of_gaussian("l2")
    for i, j in [(3, 10), (10, 25), (20, 40)]:
        t, u = times[i], times[j]
        y = problem.at(t)
        step = y + (u - t) * problem.eps(y, t)
        assert float(costs[i, j]) == pytest.approx(
            float((step - problem.at(u)).norm(dim=1).mean()), rel=0.02
        )
    assert bool(costs.tril().isinf().logical_or(costs.tril() == 0).all())
    assert bool(costs.diagonal().isinf().all())


def test_deviation_is_the_distance_from_the_chord() -> None:
    problem, times, costs = costs_of_gaussian("deviation")
    start, end = problem.at(times[0]), problem.at(times[-1])

    def away(x: Tensor) -> Tensor:
        chord = (end - start) / (end - start).norm(dim=1, keepdim=True)
        rest = x - start
        return torch.sqrt(rest.square().sum(1) - (rest * chord).sum(1).square())

    i, j = 12, 30
    y = problem.at(times[i])
    step = y + (times[j] - times[i]) * problem.eps(y, times[i])
    expected = float((away(step) - away(problem.at(times[j]))).mean())
    assert float(costs[i, j]) == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
@pytest.mark.parametrize("weight", [1.0, 1.15])
def test_gits_is_the_best_of_all_paths(steps: int, weight: float) -> None:
    generator = torch.Generator().manual_seed(3)
    costs = torch.randn(9, 9, generator=generator, dtype=torch.float64)
    costs[torch.ones(9, 9).tril().bool()] = torch.inf
    times = torch.linspace(8, 0, 9, dtype=torch.float64)

    def total(path: tuple[int, ...]) -> float:
        stops = [0, *path, 8]
        pairs = itertools.pairwise(stops)
        return sum(weight**k * float(costs[i, j]) for k, (i, j) in enumerate(pairs))

    best = min(itertools.combinations(range(1, 8), steps - 1), key=total)
    assert gits_grid(times, costs, steps, weight).tolist() == [8.0, *(8.0 - i for i in best), 0.0]


def test_gits_goes_forward_whatever_lies_below_the_diagonal() -> None:
    assert gits_grid(DOWN, torch.eye(4).neg().tolist(), 3).tolist() == DOWN.tolist()


def test_gits_spends_its_steps_where_trajectories_bend() -> None:
    """On two points the bend is at sigma near their distance; a straight line is one step."""
    _, times, costs = costs_of_gaussian("l2")
    grid = gits_grid(times, costs, 6)
    assert len(grid) == 7 and bool((grid.diff() < 0).all())
    assert all(t in times.tolist() for t in grid.tolist())
    assert float(((grid > 0.1) & (grid < 10)).sum()) >= 4


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: dmn_grid(EDM(), 0), "at least 1"),
        (lambda: gits_grid(torch.ones(4), torch.ones(3, 3), 2), r"shape \(4, 4\), got \(3, 3\)"),
        (lambda: gits_grid(torch.ones(4), torch.ones(4, 4), 4), r"1\.\.3"),
        (lambda: dmn_grid(EDM(), 3, power=float("nan")), "power must be finite, got nan"),
        (lambda: dmn_grid(EDM(), 3, separate=-1), "separate must be at least 0, got -1"),
        (lambda: gits_grid(torch.arange(4.0), torch.ones(4, 4), 2), "times must decrease"),
        (lambda: gits_grid(DOWN, torch.ones(4, 4), 2, weight=0.0), "weight must be positive"),
        (lambda: gits_grid(DOWN, torch.ones(4, 4) * torch.nan, 2), "costs must be finite"),
        (lambda: trajectory_costs(lambda x, t: x, EDM(), torch.ones(0, 1)), r"B >= 1, got \(0, 1"),
        (lambda: trajectory_costs(lambda x, t: x, EDM(), torch.ones(1, 1), metric="l3"), "l3.*l2"),
        (
            lambda: trajectory_costs(lambda x, t: x, EDM(), torch.ones(1, 1), solver="heun"),
            "several calls",
        ),
        (
            lambda: trajectory_costs(
                lambda x, t: x, FlowMatching(), torch.ones(1, 1), times=time_grid(FlowMatching(), 9)
            ),
            "alpha = 0 and sigma = 1",
        ),
    ],
    ids=[
        *("no step", "shapes", "more steps than the teacher", "power", "separate", "times"),
        *("weight", "costs", "no sample", "metric", "stages", "alpha of 0"),
    ],
)
def test_refusals(call: object, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        call()  # type: ignore[operator]


def test_costs_of_guided_trajectories() -> None:
    """Guidance between two shifts of the data is the shift between them."""

    def denoiser(x: Tensor, t: Tensor, shift: Tensor) -> Tensor:
        return shift + x / (1 + t**2)

    def costs(shift: float, **options: object) -> Tensor:
        x_T = torch.linspace(-80, 80, 6, dtype=torch.float64).reshape(3, 2)
        kwargs = {"shift": torch.full((3, 1), shift)}
        times = time_grid(EDM(), 8, "karras")
        return trajectory_costs(denoiser, EDM(), x_T, times=times, kwargs=kwargs, **options)[1]  # type: ignore[arg-type]

    none = {"shift": torch.full((3, 1), 1.0)}
    guided = costs(2.0, unconditional=none, guidance=3.0)
    torch.testing.assert_close(guided, costs(4.0))
    assert not torch.allclose(guided, costs(2.0))
