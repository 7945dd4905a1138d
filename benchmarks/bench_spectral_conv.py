"""`spectral_conv` and its gradients against everything in `peers`.

Each entry is checked against float64 first, then timed in turns with the eager layer.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import measure
from benchmarks.peers import BASELINE, PEERS, Call, Peer, Unavailable
from benchmarks.shapes import PASSES, Shape
from dsno_kernels.backends import reference
from tests.helpers import BUDGETS, rel_rms

# PyTorch rounds a bfloat16 product's result too, where the kernels keep float32: half as much
# error again.
PEER_BUDGETS = {**BUDGETS, "bf16": 7.5e-3}


@functools.lru_cache(maxsize=1)
def inputs(shape: Shape, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """x, weight and the gradient of y; N(0, 1) everywhere, the same for every peer."""
    generator = torch.Generator(device).manual_seed(0)
    C = shape.channels
    x, grad = (torch.randn(shape.size, device=device, generator=generator) for _ in range(2))
    weight = torch.randn(C, C, shape.modes, 2, device=device, generator=generator)
    return x, weight, grad


@functools.lru_cache(maxsize=1)
def expected(shape: Shape, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """y, dx and dW in float64."""
    x, weight, grad = (tensor.double() for tensor in inputs(shape, device))
    axes = {"time_dim": shape.time_dim, "channel_dim": shape.channel_dim}
    y, _ = reference.spectral_conv(x, weight, n=shape.T, **axes)
    dx, _ = reference.spectral_conv(grad, weight, n=shape.T, adjoint=True, **axes)
    dW = reference.spectral_conv_weight_grad(x, grad, shape.modes, **axes)
    return y, dx, dW


def forward(call: Call, x: Tensor, weight: Tensor) -> Tensor:
    with torch.no_grad():
        return call(x, weight)


def forward_backward(call: Call, x: Tensor, weight: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    y = call(x, weight)
    return (y, *torch.autograd.grad(y, (x, weight), grad))


@pytest.mark.parametrize("direction", PASSES)
def test_spectral_conv(
    benchmark: Any, case: tuple[Shape, str, Peer], direction: str, device: torch.device, smoke: bool
) -> None:
    shape, precision, peer = case
    shape = shape.small() if smoke else shape
    benchmark.group = f"{shape.name} {direction}"
    try:
        call = peer.make(shape, precision, device)
    except Unavailable as reason:
        pytest.skip(str(reason))
    baseline = PEERS[0].make(shape, "fp32", device)

    try:
        x, weight, grad = inputs(shape, device)
        x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
        errors = _check(shape, peer, precision, call, x, weight, grad)
        if direction == "forward":
            run, run_baseline = (functools.partial(forward, c, x, weight) for c in (call, baseline))
        else:
            run, run_baseline = (
                functools.partial(forward_backward, c, x, weight, grad) for c in (call, baseline)
            )
        if smoke:
            benchmark.pedantic(run)
            return
        timing = measure.time_beside(benchmark, run, run_baseline, device)
    except torch.OutOfMemoryError:
        expected.cache_clear()
        pytest.skip("out of device memory")
    benchmark.extra_info.update(
        op="spectral_conv",
        shape=shape.name,
        precision=precision,
        direction=direction,
        peer=peer.name,
        errors=errors,
        saved_in_x=measure.saved_bytes(lambda: call(x, weight)) / (x.numel() * x.element_size()),
        peak_bytes=measure.peak_bytes(run, device),
        **timing,
        **_rates(shape, precision, direction, timing["seconds"], device),
    )
    if shape.targets.get((precision, direction)) and peer.name != BASELINE:
        benchmark.extra_info["target"] = shape.targets[precision, direction]


def _check(
    shape: Shape, peer: Peer, precision: str, call: Call, x: Tensor, weight: Tensor, grad: Tensor
) -> dict[str, float]:
    """Relative RMS errors of y, dx and dW against float64, all within the budget."""
    results = forward_backward(call, x, weight, grad)
    pairs = zip(("y", "dx", "dW"), results, expected(shape, x.device), strict=True)
    errors = {name: rel_rms(actual, wanted) for name, actual, wanted in pairs}
    budget = (BUDGETS if peer.name.startswith("dsno_kernels") else PEER_BUDGETS)[precision]
    for name, error in errors.items():
        assert error <= budget, (
            f"{peer.name}: relative RMS error {error:.3g} of {name}, budget {budget:.3g}"
        )
    return errors


def _rates(
    shape: Shape, precision: str, direction: str, seconds: float, device: torch.device
) -> dict[str, float]:
    """Useful work and least traffic over time, and their shares of what this machine reaches."""
    flops, bandwidth = shape.flop(direction) / seconds, shape.least_bytes(direction) / seconds
    return {
        "gflops": flops / 1e9,
        "share_of_gemm": flops / measure.gemm_rate(precision, device),
        "gbytes": bandwidth / 1e9,
        "share_of_copy": bandwidth / measure.copy_rate(device),
        "limit_seconds": max(
            shape.flop(direction) / measure.gemm_rate(precision, device),
            shape.least_bytes(direction) / measure.copy_rate(device),
        ),
    }
