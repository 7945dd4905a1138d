"""The times that any numbers make."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dsno_kernels.diffusion import EDM, SolverPlan, time_grid
from dsno_kernels.diffusion.learning.parameters import TimeParameters


@pytest.mark.parametrize("solver", ["dpmpp_3m", "heun", "dpmpp_2s", "rhork_4rk"])
@pytest.mark.parametrize("offset", [-20.0, 20.0])
def test_calls_stay_nearest_to_their_own_times(solver: str, offset: float) -> None:
    """On gaps as different as 1 and 400, with stages of a step between the times of the grid."""
    process = EDM()

    def build(times: Tensor, calls: Tensor | None) -> SolverPlan:
        return SolverPlan.build(process, times, solver, denoiser_times=calls, prediction="x0")

    parameters = TimeParameters(process, time_grid(process, 4, "log_snr"), build)
    with torch.no_grad():
        parameters.numbers[0].copy_(torch.tensor([0.0, 3.0, 1.0, -3.0]))
        parameters.numbers[1].fill_(offset)
        plan = parameters.plan()
        own = process.log_snr(build(plan.grid, None).model_times)
        calls, times = process.log_snr(plan.model_times), process.log_snr(plan.grid)
    away = (times - own[:, None]).abs()
    room = away.masked_fill(away < 1e-9, torch.inf).amin(1)
    inside = ~torch.isin(own, times[[0, -1]])
    expected = torch.where(inside, offset / 40 * room, 0.0)
    torch.testing.assert_close(calls - own, expected, rtol=1e-9, atol=1e-9)
