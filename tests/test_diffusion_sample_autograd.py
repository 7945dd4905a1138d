"""Gradients through `sample`, with and without recomputation, and what is kept for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dsno_kernels import diffusion
from dsno_kernels.diffusion import EDM, SolverPlan, VPLinear
from tests.helpers import assert_close

VP = VPLinear()
# Float64; the sums of the gradients run in another order.
FLOAT64 = 1e-10


class Network(nn.Module):
    """A small denoiser whose insides are 40 times its input."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.up, self.down = (
            nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64) / 5)
            for shape in [(5, 200), (200, 5)]
        )

    def forward(self, x: Tensor, t: Tensor, shift: float | Tensor = 0.0) -> Tensor:
        return torch.tanh(x @ self.up + t + shift) @ self.down


def gradients(
    run: Callable[..., Tensor], name: str, end: float = 0.05, **build: Any
) -> tuple[Tensor, ...]:
    """Of a loss in x_T, the parameters, the grid and the guidance scale."""
    torch.manual_seed(1)
    network = Network()
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    grid = torch.linspace(0.95, end, 8, dtype=torch.float64).requires_grad_()
    scale = torch.tensor(1.7, dtype=torch.float64, requires_grad=True)
    plan = SolverPlan.build(build.pop("process", VP), grid, name, **build)
    samples = run(plan, network, x, scale)
    weights = torch.linspace(-1, 1, samples.numel(), dtype=torch.float64).reshape(samples.shape)
    leaves = (x, *network.parameters(), grid, scale)
    return samples, *torch.autograd.grad((samples.square() * weights).sum(), leaves)


def noise_of(row: int) -> Tensor:
    generator = torch.Generator().manual_seed(row + 7)
    return torch.randn(3, 5, generator=generator, dtype=torch.float64)


def replayed(plan: SolverPlan, network: Network, x: Tensor, scale: Tensor) -> Tensor:
    def guided(x: Tensor, t: Tensor) -> Tensor:
        u = network(x, t, -1.0)
        return u + scale * (network(x, t, 1.0) - u)

    return plan.replay(guided, x, noise=noise_of)


def sampled(plan: SolverPlan, network: Network, x: Tensor, scale: Tensor, **options: Any) -> Tensor:
    return diffusion.sample(
        *(network, x, plan),
        kwargs={"shift": 1.0},
        unconditional={"shift": -1.0},
        guidance=scale,
        split_guidance=True,
        noise=noise_of,
        **options,
    )


CASES = {
    "tab3": {},
    "unipc3": {},
    "heun": {"S_churn": 3.0},
    "rhork_4rk": {},
    "dpmpp_3m": {},
    "sde_dpmpp_2": {},
    "tab2": {"process": EDM(), "prediction": "edm"},
}


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_of_replay_also_recomputed(name: str) -> None:
    expected = gradients(replayed, name, **CASES[name])
    for recompute in (False, True):
        ours = gradients(
            lambda *args, r=recompute: sampled(*args, recompute=r), name, **CASES[name]
        )
        for grad, wanted in zip(ours, expected, strict=True):
            assert_close(grad, wanted, FLOAT64)
