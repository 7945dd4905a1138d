"""LD3: forward and backward of one step of DPM-Solver++(3M) whose coefficients are learned, and the
time to learn the grid of the toy of `tests/golden/ld3.npz`.

The peers are the lines of LD3's official code, with the same numbers as leaves, in eager and in
compiled PyTorch: what its autograd runs for x, three entries of history and the coefficients. Ours
is one `exp_step` with its row of coefficients, made once from the grid for all steps, and one pass
for all gradients. A peer's call comes right before each of ours, so that `ratio` is the speed-up.
The five results of a step are fresh memory: `bench_exp_step` says what glibc makes of that, and how
to keep it from giving freed memory back.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import dsno_kernels as dk
from benchmarks import measure
from benchmarks.bench_exp_step import MALLOC, SHAPES, SMOKE, skip_unless_wanted, threads_set
from benchmarks.host_cuda import on_gpu
from dsno_kernels.diffusion import EDM, learn_time_grid
from tests import test_ld3_golden as toy
from tests.helpers import rel_rms

# Gradients of the coefficients are sums of 200,000 products in float32, in another order.
BUDGET = 1e-5
PEERS = ("official LD3", "torch.compile of official LD3")
# Ratios of steps in log-SNR, and sigma'/sigma, alpha' phi_1, phi_2, phi_3 of a step in the middle.
NUMBERS = {"r0": 0.9, "r1": 1.1, "a": 0.42, "p1": -0.58, "p2": 0.31, "p3": -0.12}


def official(x: Tensor, history: tuple[Tensor, ...], numbers: tuple[Tensor, ...]) -> Tensor:
    """`multistep_dpm_solver_third_update` of LD3's code, data prediction."""
    m0, m1, m2 = history
    r0, r1, a, p1, p2, p3 = numbers
    D1_0 = (1.0 / r0) * (m0 - m1)
    D1_1 = (1.0 / r1) * (m1 - m2)
    D1 = D1_0 + (r0 / (r0 + r1)) * (D1_0 - D1_1)
    D2 = (1.0 / (r0 + r1)) * (D1_0 - D1_1)
    return a * x - p1 * m0 + p2 * D1 - p3 * D2


def row_of(numbers: tuple[Tensor, ...]) -> Tensor:
    """The same step as coefficients a, c_0, c_1, c_2."""
    r0, r1, a, p1, p2, p3 = numbers
    mixed = (p2 * r0 - p3) / (r0 + r1)
    d0, d1 = (p2 + mixed) / r0, -mixed / r1
    return torch.stack([a, d0 - p1, d1 - d0, -d1])


Step = Callable[[], list[Tensor]]


def peer_step(
    function: Callable[..., Tensor], inputs: tuple[Tensor, ...], cotangent: Tensor
) -> Step:
    """x' and the gradients of x, the history and the numbers."""
    numbers = tuple(torch.tensor(v, device=cotangent.device) for v in NUMBERS.values())
    leaves = [t.detach().requires_grad_() for t in (*inputs, *numbers)]

    def call() -> list[Tensor]:
        y = function(leaves[0], tuple(leaves[1:4]), tuple(leaves[4:]))
        return [y.detach(), *torch.autograd.grad(y, leaves, cotangent)]

    return call


def our_step(inputs: tuple[Tensor, ...], cotangent: Tensor) -> Step:
    """x' and the gradients of x, the history and the row."""
    numbers = tuple(torch.tensor(v, device=cotangent.device) for v in NUMBERS.values())
    leaves = [t.detach().requires_grad_() for t in (*inputs, row_of(numbers))]

    def call() -> list[Tensor]:
        y = dk.exp_step(leaves[0], leaves[1:4], leaves[4])
        return [y.detach(), *torch.autograd.grad(y, leaves, cotangent)]

    return call


def check(inputs: tuple[Tensor, ...], cotangent: Tensor) -> float:
    """The largest relative RMS error of x' and of all gradients against float64, those of the
    numbers by the chain rule through the row.
    """
    y, *grads, of_row = our_step(inputs, cotangent)()
    wide = peer_step(official, tuple(t.double() for t in inputs), cotangent.double())()
    numbers = tuple(torch.tensor(v).double().requires_grad_() for v in NUMBERS.values())
    of_numbers = torch.autograd.grad(row_of(numbers), numbers, of_row.double().cpu())
    found = [y, *grads, torch.stack(of_numbers)]
    exact = [*wide[:5], torch.stack(wide[5:])]
    error = max(rel_rms(one, other) for one, other in zip(found, exact, strict=True))
    assert error <= BUDGET, f"relative RMS error {error:.3g}"
    return error


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_learned_step(
    benchmark: Any,
    shape: tuple[int, ...],
    peer: str,
    threads: int,
    device: torch.device,
    smoke: bool,
) -> None:
    skip_unless_wanted(shape, threads, device, smoke)
    benchmark.group = f"learned step {shape}"
    tensors = torch.randn(5, *(SMOKE if smoke else shape), device=device).unbind(0)
    inputs, cotangent = tensors[:4], tensors[4]
    with threads_set(threads):
        error = check(inputs, cotangent)
        function = official
        if peer.startswith("torch.compile") and not smoke:
            torch._dynamo.reset()
            function = torch.compile(official, dynamic=False)
        call = our_step(inputs, cotangent)
        baseline = peer_step(function, inputs, cotangent)
        if smoke:
            baseline()
            benchmark.pedantic(call)
            return
        timing = measure.time_beside(benchmark, call, baseline, device)
        # x, three of history and x'; then g, those four and their four gradients.
        rate = (5 + 9) * cotangent.numel() * 4 / timing["seconds"]
        benchmark.extra_info.update(
            op="ld3_step",
            shape=list(shape),
            peer=peer,
            threads=threads,
            errors={"y, gradients": error},
            malloc={name: os.environ.get(name, "default") for name in MALLOC},
            gbytes=rate / 1e9,
            share_of_copy=rate / measure.copy_rate(device),
            **timing,
        )


def test_toy(benchmark: Any, device: torch.device, smoke: bool) -> None:
    """The whole of `learn_time_grid`, from 50 pairs to the best grid."""
    if on_gpu(device):
        pytest.skip("its times are those of the CPU")
    benchmark.group = "learned toy"
    errors: list[float] = []
    times: list[float] = []

    def timed() -> None:
        pairs = toy.pairs()
        start = time.perf_counter()
        grid = learn_time_grid(toy.TOY.denoise, EDM(), 5, *pairs)
        times.append(time.perf_counter() - start)
        errors.append(toy.held_out_error(grid.plan()))

    benchmark.pedantic(timed, rounds=1 if smoke else 5)
    assert max(errors) <= toy.TOY_AIM
    benchmark.extra_info.update(
        op="ld3_toy",
        seconds=statistics.median(times),
        threads=torch.get_num_threads(),
        held_out=max(errors),
    )
