"""Time grids: their defining property, ends, discrete spacings, and refusals."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from dsno_kernels.diffusion import (
    EDM,
    VE,
    DiscreteVP,
    FlowMatching,
    Process,
    SolverPlan,
    VPCosine,
    VPLinear,
    time_grid,
)
from dsno_kernels.diffusion.grids import KINDS
from tests.diffusion_problems import golden

CONTINUOUS = [VPLinear(), VPCosine(), VE(), EDM(), FlowMatching(t_min=1e-3, t_max=0.999)]
DDPM = DiscreteVP.linear()


def equal_steps(values: Tensor) -> bool:
    steps = values.diff()
    return bool(((steps / steps.mean() - 1).abs() < 1e-9).all())


@pytest.mark.parametrize("process", CONTINUOUS, ids=lambda p: type(p).__name__)
@pytest.mark.parametrize(
    ("kind", "order", "linear"),
    [
        ("uniform", None, lambda p, t: t),
        ("quadratic", None, lambda p, t: t.sqrt()),
        ("power", 3.0, lambda p, t: t ** (1 / 3)),
        ("log_snr", None, lambda p, t: p.log_snr(t)),
        ("exponential", None, lambda p, t: p.rho(t).log()),
        ("rho", None, lambda p, t: p.rho(t)),
        ("rho", 7.0, lambda p, t: p.rho(t) ** (1 / 7)),
        ("karras", None, lambda p, t: p.rho(t) ** (1 / 7)),
    ],
)
def test_kinds(
    process: Process, kind: str, order: float, linear: Callable[[Process, Tensor], Tensor]
) -> None:
    grid = time_grid(process, 9, kind, order)
    assert grid.shape == (10,) and grid.dtype == torch.float64
    assert (float(grid[0]), float(grid[-1])) == (process.t_max, process.t_min)
    assert bool((grid.diff() < 0).all())
    assert equal_steps(linear(process, grid))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("steps", [1, 2, 1000])
def test_any_number_of_steps(kind: str, steps: int) -> None:
    if kind in ("trailing", "leading", "linspace"):
        grid = time_grid(DDPM, min(steps, 500), kind)
        assert bool((grid == grid.round()).all())
    else:
        grid = time_grid(VPLinear(), steps, kind)
    assert bool((grid.diff() < 0).all())
    inside = time_grid(DDPM, 5, kind, append_zero=True)
    assert len(inside) == 6 and float(inside[-1]) == -1


def test_beta_quantiles() -> None:
    """Beta(1, 1) is uniform; Beta(o, o) is symmetric, and denser at both ends for o < 1."""
    flow = FlowMatching()
    torch.testing.assert_close(time_grid(flow, 8, "beta", order=1.0), time_grid(flow, 8))
    grid = time_grid(flow, 8, "beta")
    torch.testing.assert_close(grid, 1 - grid.flip(0))
    assert float(grid[1]) > 1 - 1 / 8


def test_official_grids() -> None:
    """LD3's and EDM's, for sigma from 80 to 0.002; DDPM's integers as diffusers has them."""
    values = golden("ld3.npz")
    for steps in (4, 5, 6, 8, 10):
        for kind, name in [("uniform", "time_uniform"), ("log_snr", "logSNR"), ("karras", "edm")]:
            expected = values[f"grid_ve_{name}_{steps}"].double()
            torch.testing.assert_close(time_grid(EDM(), steps, kind), expected, rtol=1e-5, atol=0)
    assert time_grid(DDPM, 4, "trailing").tolist() == [999, 749, 499, 249, 0]
    assert time_grid(DDPM, 4, "trailing", t_end=-1).tolist() == [999, 749, 499, 249, -1]
    assert time_grid(DDPM, 4, "leading").tolist() == [800, 600, 400, 200, 0]
    assert time_grid(DDPM, 4, "linspace").tolist() == [999, 749, 500, 250, 0]


def test_orders_and_steps_of_other_types() -> None:
    """A karras grid of order 5 is one of rho; NumPy's integers count as well as Python's."""
    expected = time_grid(EDM(), 6, "rho", order=5)
    assert torch.equal(time_grid(EDM(), np.int64(6), "karras", order=torch.tensor(5)), expected)
    assert torch.equal(time_grid(EDM(), 6, "quadratic", 3), time_grid(EDM(), 6, "power", 3))


def test_append_zero() -> None:
    grid = time_grid(EDM(), 5, "karras", append_zero=True)
    assert torch.equal(grid[:-1], time_grid(EDM(), 4, "karras"))
    assert float(grid[-1]) == 0
    assert time_grid(EDM(), 1, append_zero=True).tolist() == [80.0, 0.0]


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: time_grid(EDM(), 4, "cubic"), ValueError, "unknown kind.*uniform, quadratic"),
        (lambda: time_grid(EDM(), 0), ValueError, "at least 1"),
        (lambda: time_grid(EDM(), 2.5), TypeError, "steps must be an integer"),
        (lambda: time_grid(EDM(), True), TypeError, "steps must be an integer"),
        (lambda: time_grid(EDM(), 4, "power", 0.0), ValueError, "order must be positive"),
        (lambda: time_grid(EDM(), 4, "uniform", 3), ValueError, "'uniform' has no order.*power"),
        (lambda: time_grid(EDM(), 4, "exponential", 3), ValueError, "'exponential' has no order"),
        (lambda: time_grid(DDPM, 4, "leading", 3), ValueError, "'leading' has no order"),
        (lambda: time_grid(EDM(), 4, "rho", "7"), TypeError, "order must be a real number"),
        (lambda: time_grid(EDM(), 4, t_start="now"), TypeError, "t_start must be a real number"),
        (lambda: time_grid(EDM(), 4, t_end=[0.1]), ValueError, "t_end must be one number"),
        (lambda: time_grid(EDM(), 4, t_end=90.0), ValueError, "t_end < t_start"),
        (lambda: time_grid(VPLinear(), 4, t_start=2.0), ValueError, "t_start <= 1.0"),
        (lambda: time_grid(EDM(), 4, "trailing"), ValueError, "DiscreteVP"),
        (lambda: time_grid(DDPM, 4, "leading", t_start=5.0), ValueError, "leave t_start out"),
        (lambda: time_grid(DDPM, 1001, "linspace"), ValueError, "no 1001 steps between .* of 1000"),
        (lambda: time_grid(DDPM, 1000, "trailing"), ValueError, "take fewer, or .* 'uniform'"),
        (lambda: time_grid(EDM(), 4, "log_snr", t_end=0.0), ValueError, "append_zero"),
        (lambda: time_grid(VE(), 4, append_zero=True), ValueError, "sigma is 0"),
        (
            lambda: time_grid(FlowMatching(), 4, append_zero=True),
            ValueError,
            "leave append_zero out",
        ),
    ],
)
def test_refusals(make: Callable[[], Tensor], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        make()


@pytest.mark.parametrize(
    ("times", "match"),
    [
        ([1.0, 0.5, 0.5, 0.1], r"grid\[2\] = 0.5 equals grid\[1\]"),
        ([1.0, 0.5, 0.7, 0.1], r"grid\[2\] = 0.7 is larger than grid\[1\] = 0.5"),
        ([1.0, float("nan"), 0.1], r"finite: grid\[1\]"),
        ([1.0, -0.1], r"grid\[1\] = -0.1 lies outside"),
        ([1.5, 0.1], r"grid\[0\] = 1.5 lies outside"),
        ([1.0], "N >= 1"),
        ([[1.0, 0.5]], "shape"),
    ],
)
def test_own_lists_are_checked(times: list[float], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        SolverPlan.build(VPLinear(), times)


def test_own_lists_of_any_type() -> None:
    times = [1.0, 0.5, 0.25]
    plan = SolverPlan.build(VPLinear(), times)
    for own in (tuple(times), torch.tensor(times), [torch.tensor(t) for t in times]):
        assert SolverPlan.build(VPLinear(), own) is plan
    with pytest.raises(TypeError, match="grid"):
        SolverPlan.build(VPLinear(), ["late", "early"])
