"""Gradients through `sample`, with and without recomputation, and what is kept for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dsno_kernels import diffusion
from dsno_kernels.diffusion import EDM, SolverPlan, VPLinear
from dsno_kernels.diffusion._rows import SEGMENTS
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


@pytest.mark.parametrize("recompute", [False, True])
def test_frames_have_gradients(recompute: bool) -> None:
    plan = SolverPlan.build(VP, torch.linspace(0.9, 0.1, 21, dtype=torch.float64), "dpmpp_2m")
    network, x = Network(), torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(3, 5, dtype=torch.float64)

    def gradient(frames: Tensor) -> Tensor:
        return torch.autograd.grad((frames * weights).sum(), x)[0]

    frames = diffusion.sample(network, x, plan, frames=[20, 0, 7, 7], recompute=recompute)
    assert frames.shape == (3, 4, 5)
    assert_close(gradient(frames[:, 1]), weights, 0.0)
    frames = diffusion.sample(network, x, plan, frames=[20, 0, 7, 7], recompute=recompute)
    part = SolverPlan.build(VP, plan.grid[:8], "dpmpp_2m")
    at_7, at_20 = part.replay(network, x), plan.replay(network, x)
    expected = torch.stack([at_20, x, at_7, at_7], 1)
    assert_close(frames, expected, 1e-13)
    weights = torch.randn(3, 4, 5, dtype=torch.float64)
    assert_close(gradient(frames), gradient(expected), FLOAT64)


def test_dropout_is_the_same_when_recomputed() -> None:
    plan = SolverPlan.build(VP, torch.linspace(0.9, 0.1, 12, dtype=torch.float64), "tab1")
    network = Network()
    results = []
    for recompute in (False, True):
        torch.manual_seed(5)
        x = torch.ones(3, 5, dtype=torch.float64, requires_grad=True)

        def model(x: Tensor, t: Tensor) -> Tensor:
            return nn.functional.dropout(network(x, t), 0.3)

        y = diffusion.sample(model, x, plan, recompute=recompute)
        results.append((y, *torch.autograd.grad(y.square().sum(), [x, *network.parameters()])))
    for plain, recomputed in zip(*results, strict=True):
        assert_close(recomputed, plain, FLOAT64)


def kept_bytes(steps: int, recompute: bool) -> tuple[int, int]:
    """For the backward pass of a sample, but for the parameters; and the calls of the model."""
    plan = SolverPlan.build(VP, torch.linspace(0.9, 0.1, steps + 1, dtype=torch.float64), "tab2")
    network, calls = Network(), 0
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    parameters = {p.untyped_storage().data_ptr() for p in network.parameters()}
    sizes: dict[int, int] = {}

    def count(kept: Tensor) -> Tensor:
        storage = kept.untyped_storage()
        if storage.data_ptr() not in parameters:
            sizes[storage.data_ptr()] = storage.nbytes()
        return kept

    def model(x: Tensor, t: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return network(x, t)

    with torch.autograd.graph.saved_tensors_hooks(count, lambda kept: kept):
        y = diffusion.sample(model, x, plan, recompute=recompute, check_finite=False)
    y.square().sum().backward()
    return sum(sizes.values()), calls


def test_recomputation_keeps_as_much_for_any_number_of_steps() -> None:
    one_state = 3 * 5 * 8
    for steps, rounds in [(4, 2), (8, 2), (10, 3), (24, 3), (64, 3), (120, 4)]:
        kept, calls = kept_bytes(steps, recompute=True)
        # x_T, and at each later checkpoint the state and two entries, of which the first has one.
        assert 0 < kept <= (3 * SEGMENTS - 2) * one_state + 64, (steps, kept)
        assert calls <= rounds * steps
    plain = [kept_bytes(steps, recompute=False)[0] for steps in (4, 20)]
    assert plain[1] > 4 * plain[0] > 4 * 3 * 200 * 8  # all insides of the network
    assert kept_bytes(64, recompute=True)[0] == kept_bytes(24, recompute=True)[0]


def test_no_graph_where_none_is_wanted() -> None:
    plan = SolverPlan.build(VP, [0.9, 0.5, 0.1], "tab1")
    x = torch.randn(3, 5, dtype=torch.float64)
    network = Network()
    assert diffusion.sample(network, x, plan).requires_grad
    with torch.no_grad():
        assert not diffusion.sample(network, x, plan).requires_grad
    with torch.inference_mode():
        inside = diffusion.sample(network, x, plan)
    assert_close(inside, diffusion.sample(network, x, plan), 1e-13)


@pytest.mark.parametrize("name", ["tab2", "unipc2"])
def test_transforms_of_torch_func(name: str) -> None:
    plan = SolverPlan.build(VP, torch.linspace(0.9, 0.1, 6, dtype=torch.float64), name)
    network = Network()
    x, v = torch.randn(2, 3, 5, dtype=torch.float64)

    def run(x: Tensor) -> Tensor:
        return diffusion.sample(network, x, plan)

    def replayed(x: Tensor) -> Tensor:
        return plan.replay(network, x)

    def loss(x: Tensor, of: Callable[[Tensor], Tensor]) -> Tensor:
        return of(x).square().sum()

    _, ours = torch.func.jvp(run, (x,), (v,))
    _, expected = torch.func.jvp(replayed, (x,), (v,))
    assert_close(ours, expected, FLOAT64)
    assert_close(torch.func.vmap(run)(x), replayed(x), FLOAT64)
    each = torch.func.vmap(lambda row: torch.func.grad(loss)(row, run))(x)
    assert_close(each, torch.func.grad(loss)(x, replayed), FLOAT64)


@pytest.mark.parametrize("name", ["tab2", "unipc2", "heun"])
def test_meta_tensors(name: str) -> None:
    plan = SolverPlan.build(VP, torch.linspace(0.9, 0.1, 6, dtype=torch.float64), name)
    x = torch.empty(3, 5, device="meta", dtype=torch.bfloat16)
    y = diffusion.sample(lambda x, t: torch.tanh(x), x, plan, frames=[0, 5])
    assert y.shape == (3, 2, 5) and y.is_meta and y.dtype == torch.bfloat16


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", CASES)
def test_numbers_of_a_learned_grid_are_read_without_a_warning(name: str) -> None:
    """PyTorch warns where a tensor that requires a gradient becomes a number."""
    x, grid = torch.randn(3, 5, dtype=torch.float64), torch.linspace(0.95, 0.05, 8)
    options = dict(CASES[name])
    process = options.pop("process", VP)
    always = torch.is_warn_always_enabled()
    torch.set_warn_always(True)
    try:
        plan = SolverPlan.build(process, grid.double().requires_grad_(), name, **options)
        assert plan.table.requires_grad and name in f"{plan!r}{plan}"
        if not plan.stochastic():
            plan.reversed()
        network = Network()
        plan.replay(network, x, noise=noise_of)
        diffusion.sample(network, x, plan, frames=[0, 7], noise=noise_of)
    finally:
        torch.set_warn_always(always)
