"""`noised` and `denoising_loss` on a CUDA device: parity with the formulas, gradients, a captured
training step, streams, tensors beyond 2^31 elements.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import dsno_kernels as dk
from tests import test_denoising as on_the_cpu
from tests.helpers import FLOAT64, IO_BUDGET, assert_close
from tests.on_device import DEVICE, DRY_RUN, cuda, marks, needs_memory, serving
from tests.test_denoising import SEEDS, definition, edm, loss_formula, noised_formula
from tests.test_exp_step import STEP

pytestmark = marks

BACKENDS = serving("denoising_loss")
KERNELS = [name for name in BACKENDS if name != "reference"]
F32, F16, BF16, F64 = torch.float32, torch.float16, torch.bfloat16, torch.float64
BUDGETS = {F32: STEP, F64: FLOAT64, BF16: IO_BUDGET, F16: IO_BUDGET}
SIGMA = torch.tensor([0.05, 1.0, 10.0], dtype=F64)


def randn(*shape: int, dtype: torch.dtype = F32) -> Tensor:
    return torch.randn(shape, device=DEVICE).to(dtype)


def on_device(values: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.to(DEVICE) for name, value in values.items()}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("given", ["noise", "seeds"])
@pytest.mark.parametrize("dtype", BUDGETS, ids=str)
@pytest.mark.parametrize("shape", [(3, 3, 32, 32), (3, 5, 7, 11), (3, 1)], ids=str)
def test_values_and_gradient(
    backend: str, given: str, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    if backend == "cpu" and dtype == F64:
        pytest.skip("its arithmetic is float32")
    x, output, noise = (randn(*shape, dtype=dtype) for _ in range(3))
    output.requires_grad_()
    options: dict[str, Any] = {"noise": noise, "backend": backend}
    if given == "seeds":
        options = {"seeds": torch.tensor(SEEDS, device=DEVICE), "backend": backend}
        noise = definition(SEEDS, shape)
    sigma, c = SIGMA.to(DEVICE), on_device(edm(SIGMA))
    y = dk.noised(x, sigma, c["c_out"], **options)
    exact = noised_formula(x.cpu(), SIGMA, edm(SIGMA)["c_out"], noise.cpu())
    drawn = on_the_cpu.NOISE if given == "seeds" and dtype != F64 else 0.0
    assert_close(y, exact, max(2 * BUDGETS[dtype], drawn))
    loss = dk.denoising_loss(output, x, sigma, **c, **options, ceiling=9.0)
    wide = output.detach().cpu().double().requires_grad_()
    bounded = edm(SIGMA) | {"weight": edm(SIGMA)["weight"].clamp(max=9.0)}
    right = loss_formula(wide, x.cpu(), SIGMA, **bounded, noise=noise.cpu())
    assert_close(loss, right, FLOAT64 if dtype == F64 else 4 * STEP)
    for reduce in (torch.mean, torch.sum):
        (expected,) = torch.autograd.grad(reduce(right), wide, retain_graph=True)
        for _ in range(2):  # the stored gradient, then it anew
            (grad,) = torch.autograd.grad(reduce(loss), output, retain_graph=True)
            assert_close(
                grad, expected, max(2 * BUDGETS[dtype], FLOAT64 if dtype == F64 else drawn)
            )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", BUDGETS, ids=str)
@pytest.mark.parametrize("shape", [(3, 3, 32, 32), (3, 5, 7, 11)], ids=str)
def test_the_mean_and_what_scales_its_gradient(
    backend: str, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    """By the op and by PyTorch; an upstream gradient of 1, which touches no memory, and another."""
    if backend == "cpu" and dtype == F64:
        pytest.skip("its arithmetic is float32")
    x, output, noise = (randn(*shape, dtype=dtype) for _ in range(3))
    output.requires_grad_()
    sigma, c = SIGMA.to(DEVICE), on_device(edm(SIGMA))
    wide = output.detach().cpu().double().requires_grad_()
    right = loss_formula(wide, x.cpu(), SIGMA, **edm(SIGMA), noise=noise.cpu()).mean()
    stored = None
    for factor in (1.0, -2.5):
        (expected,) = torch.autograd.grad(factor * right, wide, retain_graph=True)
        for reduction in ("mean", "none"):
            loss = dk.denoising_loss(
                output, x, sigma, **c, noise=noise, reduction=reduction, backend=backend
            ).mean()
            assert loss.shape == ()
            assert_close(loss, right, FLOAT64 if dtype == F64 else 4 * STEP)
            (grad,) = torch.autograd.grad(loss if factor == 1 else factor * loss, output)
            assert_close(grad, expected, 2 * BUDGETS[dtype])
            if factor == 1:
                assert stored is None or torch.equal(grad, stored)
                stored = grad


@pytest.mark.parametrize("backend", KERNELS)
def test_runs_do_not_change_bits(backend: str) -> None:
    x, output = randn(2, 3, 5, 130, 131).unbind(0)
    seeds = torch.tensor(SEEDS, device=DEVICE)
    losses = [
        dk.denoising_loss(output, x, 2.0, 0.5, 0.8, 1.3, seeds=seeds, backend=backend)
        for _ in range(10)
    ]
    assert all(torch.equal(loss, losses[0]) for loss in losses)
    alone = dk.noised(x[1:2], 2.0, seeds=seeds[1:2], backend=backend)
    assert torch.equal(alone, dk.noised(x, 2.0, seeds=seeds, backend=backend)[1:2])


@pytest.mark.parametrize("backend", KERNELS)
def test_a_cuda_graph_holds_a_training_step(backend: str) -> None:
    """Input, loss and gradient, replayed with other images, levels and seeds."""
    x, weight = randn(4, 3, 16, 16), randn(3, 3)
    sigma, seeds = torch.rand(4, device=DEVICE) + 0.1, torch.arange(4, device=DEVICE)
    weight.requires_grad_()

    def step() -> tuple[Tensor, Tensor]:
        y = dk.noised(x, sigma, 0.5, seeds=seeds, backend=backend)
        output = torch.einsum("oi,bihw->bohw", weight, y)
        loss = dk.denoising_loss(output, x, sigma, 0.7, sigma, 1.2, seeds=seeds, backend=backend)
        return loss.detach(), *torch.autograd.grad(loss.sum(), weight)

    side = cuda().Stream()
    side.wait_stream(cuda().current_stream())
    with cuda().stream(side):
        step()
    cuda().current_stream().wait_stream(side)
    graph = cuda().CUDAGraph()
    with cuda().graph(graph):
        found = step()
    if DRY_RUN:
        pytest.skip("the stand-in's graph replays nothing")
    for _ in range(2):
        x.normal_()
        sigma.uniform_(0.1, 2.0)
        seeds.add_(4)
        graph.replay()
        for actual, expected in zip(found, step(), strict=True):
            assert torch.equal(actual, expected)


@pytest.mark.parametrize("backend", KERNELS)
def test_work_runs_on_the_current_stream(backend: str) -> None:
    x, noise = randn(2, 4, 1 << 18).unbind(0)
    dk.noised(x, 1.0, noise=noise, backend=backend)
    cuda().synchronize()
    stream = cuda().Stream()
    with cuda().stream(stream):
        for _ in range(50):
            x.mul_(1.01).mul_(1 / 1.01)
        x.fill_(2.0)
        y = dk.noised(x, 3.0, noise=noise, backend=backend)
        loss = dk.denoising_loss(y, x, 3.0, 1.0, -1.0, 1.0, noise=noise, backend=backend)
    stream.synchronize()
    assert_close(y, 2 + 3 * noise.double().cpu(), STEP)
    assert_close(loss, torch.full((4,), 4.0, dtype=F64), 4 * STEP)  # of -x


@pytest.mark.parametrize("backend", [n for n in KERNELS if DRY_RUN or n in ("cuda", "cupy")])
def test_more_than_two_to_the_31_elements(backend: str) -> None:
    """bfloat16, so that images, output, noise and gradient take 17 GB."""
    needs_memory(20)
    n = 2 ** (11 if DRY_RUN else 31) + 1031
    x = torch.ones(1, n, dtype=BF16, device=DEVICE)
    noise, output = torch.zeros_like(x), torch.zeros_like(x)
    noise[0, -2], output[0, -1] = 4.0, 3.0
    y = dk.noised(x, 0.5, 2.0, noise=noise, backend=backend)
    assert y[0, -3:].tolist() == [2.0, 6.0, 2.0] and y[0, :: 2**20].eq(2.0).all()
    del y
    output.requires_grad_()
    # r = F + n / 2 is 0 but at the last two places.
    loss = dk.denoising_loss(output, x, 0.5, 1.0, 1.0, float(n), noise=noise, backend=backend)
    assert_close(loss, torch.tensor([13.0]), STEP)
    (grad,) = torch.autograd.grad(loss.mean(), output)
    assert grad[0, -3:].tolist() == [0.0, 4.0, 6.0] and grad[0, :: 2**20].eq(0.0).all()


@pytest.mark.parametrize("backend", KERNELS)
def test_half_precision_training_with_a_loss_scale(backend: str) -> None:
    x, output = randn(3, 3, 32, 32, dtype=F16), randn(3, 3, 32, 32, dtype=F16).requires_grad_()
    seeds, scale = torch.tensor(SEEDS, device=DEVICE), 2.0**16
    loss = dk.denoising_loss(output, x, 1.0, 0.5, 0.5, 1e-3, seeds=seeds, backend=backend)
    (grad,) = torch.autograd.grad(loss.mean() * scale, output)
    wide = output.detach().cpu().double().requires_grad_()
    right = loss_formula(wide, x.cpu(), 1.0, 0.5, 0.5, 1e-3, definition(SEEDS, x.shape))
    (expected,) = torch.autograd.grad(right.mean() * scale, wide)
    assert_close(grad, expected, 1e-3)
