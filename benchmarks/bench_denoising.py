"""Training by denoising around the network, forward and backward, and a step of EDM's sampler.

The peer is EDM's own code without the network (arXiv 2206.00364; `EDMLoss` and `edm_sampler` of its
repository), eager and, of the loss, compiled. Both sides get the same coefficients, which cost
nothing here; the network's output is a leaf. A peer's call comes right before each of ours, so that
`ratio` is the speed-up over it. See bench_exp_step.py on memory from fresh pages.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import dsno_kernels as dk
from benchmarks import measure
from benchmarks.bench_exp_step import GIB, MALLOC, SMOKE, skip_unless_wanted, threads_set
from benchmarks.host_cuda import on_gpu
from dsno_kernels.diffusion import EDM, SolverPlan, sample, time_grid
from tests.helpers import BUDGETS, rel_rms

SHAPES = ((64, 3, 32, 32), (16, 3, 64, 64), (8, 3, 256, 256))
# Tensors of the size of images that a training step reads and writes (forward and backward of the
# mean): input n or none, x -> y; n or none, x, F -> the gradient.
READS = {True: 3, False: 5}  # with the noise drawn in the kernels, or given
WRITES = 2
PEERS = ("eager", "torch.compile")
DATA = 0.5  # standard deviation of the data
HEUN_STEPS = 13
# Rounding of states and of the network's input in float32, which a run of 25 calls lets grow.
HEUN_BUDGET = 1e-5

Call = Callable[[], Any]


class Batch(NamedTuple):
    """Images, the network's output, given noise, and what EDM's preconditioner says of sigma."""

    images: Tensor
    output: Tensor
    noise: Tensor
    seeds: Tensor
    sigma: Tensor
    c_in: Tensor
    c_skip: Tensor
    c_out: Tensor
    weight: Tensor

    @staticmethod
    def of(shape: tuple[int, ...], device: torch.device) -> Batch:
        images, output, noise = torch.randn(3, *shape, device=device).unbind(0)
        sigma = torch.exp(1.2 * torch.randn(shape[0], device=device) - 1.2)
        total = sigma.square() + DATA**2
        return Batch(
            images,
            output.requires_grad_(),
            noise,
            torch.randint(2**62, (shape[0],), device=device),
            sigma,
            total.rsqrt(),
            DATA**2 / total,
            sigma * DATA / total.sqrt(),
            total / (sigma * DATA).square(),
        )

    def widened(self) -> Batch:
        wide = [t.detach().double() if t.is_floating_point() else t for t in self]
        wide[1].requires_grad_()
        return Batch(*wide)

    def over_images(self) -> Batch:
        """The coefficients as `(B, 1, 1, 1)`, which is how EDM's code has them."""
        return Batch(*self[:4], *(t.reshape(-1, 1, 1, 1) for t in self[4:]))


def eager(b: Batch, drawn: bool) -> tuple[Tensor, Tensor]:
    """The network's input and the mean loss; coefficients `(B, 1, 1, 1)`."""
    noise = torch.randn_like(b.images) if drawn else b.noise
    noisy = b.images + noise * b.sigma
    denoised = b.c_skip * noisy + b.c_out * b.output
    loss = b.weight * (denoised - b.images) ** 2
    return b.c_in * noisy, loss.sum() / loss.numel()


def ours(b: Batch, drawn: bool) -> tuple[Tensor, Tensor]:
    given: dict[str, Any] = {"seeds": b.seeds} if drawn else {"noise": b.noise}
    x = dk.noised(b.images, b.sigma, b.c_in, **given)
    return x, dk.denoising_loss(b.output, b.images, b.sigma, *b[6:], **given, reduction="mean")


def trained(forward: Callable[..., tuple[Tensor, Tensor]], b: Batch, drawn: bool) -> list[Tensor]:
    x, loss = forward(b, drawn)
    return [x, loss.detach(), *torch.autograd.grad(loss, b.output)]


def check(b: Batch, drawn: bool) -> dict[str, float]:
    """Relative RMS errors against float64 with the same noise."""
    wide = b.widened()
    if drawn:
        zeros = torch.zeros_like(b.images)
        wide = wide._replace(noise=dk.noised(zeros, 1.0, seeds=b.seeds).double())
    exact = trained(eager, wide.over_images(), False)
    errors = {
        name: rel_rms(actual, right)
        for name, actual, right in zip(
            ("x", "loss", "grad"), trained(ours, b, drawn), exact, strict=True
        )
    }
    assert max(errors.values()) <= BUDGETS["fp32"], errors
    return errors


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("drawn", [True, False], ids=["drawn", "given"])
@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_denoising(
    benchmark: Any,
    shape: tuple[int, ...],
    peer: str,
    drawn: bool,
    threads: int,
    device: torch.device,
    smoke: bool,
) -> None:
    skip_unless_wanted(shape, threads, device, smoke)
    benchmark.group = f"denoising {shape}"
    b = Batch.of(SMOKE if smoke else shape, device)
    with threads_set(threads):
        errors = check(b, drawn)
        forward = eager
        if peer == "torch.compile" and not smoke:
            torch._dynamo.reset()
            forward = torch.compile(eager, dynamic=False)
        call = functools.partial(trained, ours, b, drawn)
        baseline = functools.partial(trained, forward, b.over_images(), drawn)
        if smoke:
            baseline()
            benchmark.pedantic(call)
            return
        timing = measure.time_beside(benchmark, call, baseline, device)
        rate = (READS[drawn] + WRITES) * b.images.nbytes / timing["seconds"]
        benchmark.extra_info.update(
            op="denoising",
            shape=list(shape),
            peer=peer,
            drawn=drawn,
            threads=threads,
            errors=errors,
            gbytes=rate / 1e9,
            share_of_copy=rate / measure.copy_rate(device),
            malloc={name: os.environ.get(name, "default") for name in MALLOC},
            **timing,
        )


@pytest.mark.parametrize("drawn", [True, False], ids=["drawn", "given"])
def test_denoising_of_one_gib(
    benchmark: Any, drawn: bool, device: torch.device, smoke: bool
) -> None:
    """The forward passes on images of 1 GiB, the gradient being written too, in turns with a copy
    of them: the share of the rate of that copy.
    """
    if not on_gpu(device):
        pytest.skip("tensors of 1 GiB are for a GPU")
    benchmark.group = "denoising of 1 GiB"
    b = Batch.of((64, GIB // 64), device)
    target = torch.empty_like(b.images)

    def call() -> tuple[Tensor, Tensor]:
        return ours(b, drawn)

    few = Batch(*(t[:2, : 1 << 20].detach() if t.ndim > 1 else t[:2] for t in b))
    few = few._replace(output=few.output.contiguous().requires_grad_())
    errors = check_rows(few, drawn)
    if smoke:
        benchmark.pedantic(call)
        return
    timing = measure.time_beside(benchmark, call, lambda: target.copy_(b.images), device)
    moved, copied = READS[drawn] + WRITES, 2
    benchmark.extra_info.update(
        op="denoising_copy",
        shape=list(b.images.shape),
        peer="copy",
        drawn=drawn,
        errors=errors,
        gbytes=moved * b.images.nbytes / timing["seconds"] / 1e9,
        share_of_copy=moved / copied * timing["ratio"],
        **timing,
    )


def check_rows(b: Batch, drawn: bool) -> dict[str, float]:
    """`check` of images without axes of their own."""
    return check(Batch(*(t[:, None, None] if t.ndim > 1 else t for t in b)), drawn)


def network(x: Tensor, c_noise: Tensor) -> Tensor:
    """Stands for F of an EDM model: smooth, and as large as its output."""
    return torch.tanh(1.5 * x + 0.1 * c_noise) - 0.3 * x


def preconditioned(x: Tensor, sigma: Tensor, output: Tensor | None = None) -> Tensor:
    """EDMPrecond.forward; an output that is given costs nothing."""
    sigma = sigma.to(x.dtype)
    total = sigma.square() + DATA**2
    c_skip, c_out, c_in = DATA**2 / total, sigma * DATA / total.sqrt(), total.rsqrt()
    x_in = c_in * x
    F = network(x_in, sigma.log() / 4) if output is None else output
    return c_skip * x + c_out * F


def edm_sampler(x: Tensor, grid: Tensor, dtype: torch.dtype, *output: Tensor) -> Tensor:
    """EDM's sampler without churn: a state in float64 around a network in `dtype`."""
    state = x.to(torch.float64)
    for i, (t_cur, t_next) in enumerate(pairwise(grid)):
        denoised = preconditioned(state.to(dtype), t_cur, *output).to(torch.float64)
        d_cur = (state - denoised) / t_cur
        euler = state + (t_next - t_cur) * d_cur
        if i == len(grid) - 2:
            return euler
        denoised = preconditioned(euler.to(dtype), t_next, *output).to(torch.float64)
        d_prime = (euler - denoised) / t_next
        state = state + (t_next - t_cur) * (0.5 * d_cur + 0.5 * d_prime)
    return state


def heun_plan() -> SolverPlan:
    """EDM's times: those of Karras, then 0."""
    process = EDM(sigma_data=DATA)
    grid = torch.cat([time_grid(process, HEUN_STEPS - 1, "karras"), torch.zeros(1)])
    return SolverPlan.build(process, grid, "heun", prediction="edm")


def heun_errors(x: Tensor, plan: SolverPlan) -> dict[str, float]:
    """Relative RMS errors of whole runs against float64: ours, and those of EDM's sampler."""
    grid = plan.grid.to(x.device)
    exact = edm_sampler(x, grid, torch.float64)
    peer = edm_sampler(x, grid, torch.float32)
    found = sample(lambda x, t: network(x, t.log() / 4), x, plan)
    errors = {"x": rel_rms(found, exact), "peer": rel_rms(peer, exact)}
    assert errors["x"] <= HEUN_BUDGET, errors
    return errors


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("shape", SHAPES[::2], ids=lambda shape: "x".join(map(str, shape)))
def test_heun(
    benchmark: Any, shape: tuple[int, ...], threads: int, device: torch.device, smoke: bool
) -> None:
    """A run of EDM's 13 steps whose network costs nothing."""
    skip_unless_wanted(shape, threads, device, smoke)
    benchmark.group = "heun"
    plan = heun_plan()
    x, output = torch.randn(2, *(SMOKE if smoke else shape), device=device).unbind(0)
    x = x * plan.grid[0].item()
    grid = plan.grid.to(device)
    with torch.no_grad(), threads_set(threads):
        errors = heun_errors(x, plan)

        def call() -> Tensor:
            return sample(lambda x, t: output, x, plan, check_finite=False)

        def baseline() -> Tensor:
            return edm_sampler(x, grid, torch.float32, output)

        if smoke:
            baseline()
            benchmark.pedantic(call)
            return
        timing = measure.time_beside(benchmark, call, baseline, device)
        benchmark.extra_info.update(
            op="heun",
            shape=list(shape),
            peer="EDM's sampler",
            steps=HEUN_STEPS,
            threads=threads,
            errors=errors,
            malloc={name: os.environ.get(name, "default") for name in MALLOC},
            **timing,
        )
