"""Learned grids as schedules of diffusers: the same samples as `sample` on the grid's own plan."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dsno_kernels.diffusion import (
    DiscreteVP,
    FlowMatching,
    LearnedGrid,
    SolverPlan,
    sample,
    time_grid,
)
from tests.helpers import assert_close
from tests.scheduler_runs import SCHEDULERS, denoise, ours, run, start

# Sigmas and timesteps of schedulers are float32.
FLOAT32 = 2e-6
EPSILON = {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"}
# Configurations of the three schedulers, and what the solver is called here.
SOLVERS = {
    "DEISMultistepScheduler": [({"solver_order": 3}, "deis3")],
    "DPMSolverMultistepScheduler": [
        ({"solver_order": 2}, "dpmpp_2m"),
        ({"solver_order": 3, "solver_type": "heun"}, "dpmpp_3m_exact"),
        ({"solver_order": 3, "match_diffusers": True}, "dpmpp_3m"),
        (EPSILON | {"solver_type": "heun"}, "dpm_2m_heun"),
    ],
    "UniPCMultistepScheduler": [
        ({"solver_order": 3}, "unipc3_bh2"),
        ({"solver_order": 2, "solver_type": "bh1"}, "unipc2_bh1"),
    ],
}
CASES = [
    pytest.param(name, config, solver, id=solver)
    for name, solvers in SOLVERS.items()
    for config, solver in solvers
]


def grid_of(process: Any, solver: str, prediction: str = "eps", **ends: float) -> LearnedGrid:
    """Six steps, with calls of the model away from them."""
    times = time_grid(process, 6, "log_snr", **ends)
    calls = times[:-1].clone()
    calls[1:] += 0.3 * times.diff()[1:]
    plan = SolverPlan.build(
        process,
        times,
        solver,
        end="lower_order_final",
        denoiser_times=calls,
        prediction=prediction,
    )
    return LearnedGrid.of_plan(plan)


def trained(scheduler: Any) -> DiscreteVP:
    return DiscreteVP(scheduler.alphas_cumprod.double())


@pytest.mark.parametrize("as_file", [False, True], ids=["object", "file"])
@pytest.mark.parametrize(("name", "config", "solver"), CASES)
def test_the_same_samples_as_the_plan(
    name: str, config: dict[str, Any], solver: str, as_file: bool, tmp_path: Path
) -> None:
    scheduler = ours(name, **config)
    grid = grid_of(trained(scheduler), solver)
    path = tmp_path / "grid.json"
    grid.save(path)
    scheduler.set_timesteps(grid=path if as_file else grid)
    assert_close(scheduler.sigmas.double(), torch.tensor(grid.rhos()).double(), FLOAT32)
    assert_close(scheduler.timesteps.double(), torch.tensor(grid.denoiser_times).double(), FLOAT32)
    expected = sample(denoise, start(), grid.plan())
    assert_close(run(scheduler, start()), expected, FLOAT32)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_grid_of_a_flow(name: str) -> None:
    solver = {"DEIS": "deis2", "DPMS": "dpmpp_2m", "UniP": "unipc2_bh2"}[name[:4]]
    scheduler = ours(
        name,
        use_flow_sigmas=True,
        prediction_type="flow_prediction",
        flow_shift=3.0,
        solver_order=2,
    )
    process = FlowMatching(shift=3.0)
    grid = grid_of(process, solver, "flow", t_start=0.99, t_end=0.01)
    scheduler.set_timesteps(grid=grid)

    def model(x: Tensor, t: Tensor) -> Tensor:
        return denoise(x, 1000 * process.sigma(t))

    assert_close(run(scheduler, start()), sample(model, start(), grid.plan()), FLOAT32)


def test_the_next_schedule_forgets_the_grid() -> None:
    plain, scheduler = (ours("UniPCMultistepScheduler") for _ in range(2))
    scheduler.set_timesteps(grid=grid_of(trained(scheduler), "unipc2_bh2"))
    for one in (plain, scheduler):
        one.set_timesteps(6)
    assert torch.equal(run(plain, start()), run(scheduler, start()))


def test_a_run_that_begins_in_the_middle() -> None:
    """Of grids too: the later steps have the calls that belong to them."""
    scheduler = ours("DEISMultistepScheduler", solver_order=1)
    grid = grid_of(trained(scheduler), "deis1")
    scheduler.set_timesteps(grid=grid)
    x = start()
    scheduler.set_begin_index(2)
    assert_close(
        run(scheduler, x, scheduler.timesteps[2:]),
        sample(
            denoise,
            x,
            dataclasses.replace(
                grid, times=grid.times[2:], denoiser_times=grid.denoiser_times[2:]
            ).plan(),
        ),
        FLOAT32,
    )


@pytest.mark.parametrize(
    ("change", "config", "message"),
    [
        ({"solver": "dpmpp_2m"}, {}, "learned for solver 'dpmpp_2m', not for 'unipc2_bh2'"),
        ({}, {"beta_schedule": "scaled_linear"}, "learned for the process"),
        ({}, {"use_karras_sigmas": True}, "excludes use_karras_sigmas=True"),
        ({}, {"lower_order_final": False}, "end 'lower_order_final', this scheduler"),
        ({}, {"disable_corrector": [0]}, r"is none of dk\.diffusion\.solvers\(\)"),
    ],
    ids=["solver", "process", "configured sigmas", "end", "no name"],
)
def test_grids_for_something_else(
    change: dict[str, Any], config: dict[str, Any], message: str
) -> None:
    grid = grid_of(trained(ours("UniPCMultistepScheduler")), **({"solver": "unipc2_bh2"} | change))
    scheduler = ours("UniPCMultistepScheduler", **config)
    with pytest.raises(ValueError, match=message):
        scheduler.set_timesteps(grid=grid)
    with pytest.raises(ValueError, match="call set_timesteps"):
        scheduler.step(start(), 999, start())


def test_what_schedulers_do_not_take() -> None:
    scheduler = ours("UniPCMultistepScheduler")
    grid = grid_of(trained(scheduler), "unipc2_bh2")
    with pytest.raises(ValueError, match="a grid: one of them"):
        scheduler.set_timesteps(4, grid=grid)
    with pytest.raises(TypeError, match="a LearnedGrid or a file of one, got list"):
        scheduler.set_timesteps(grid=[1.0])
    columns = grid.plan().table.shape[1]
    learned = dataclasses.replace(grid, corrections=((0.0,) * columns,) * 6)
    with pytest.raises(NotImplementedError, match="not the coefficients"):
        scheduler.set_timesteps(grid=learned)
