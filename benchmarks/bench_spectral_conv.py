"""`spectral_conv` and its gradients against everything in `peers`.

Each entry is checked against float64 first, then timed in turns with the eager layer.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

import dsno_kernels as dk
from benchmarks import events, measure
from benchmarks.events import Thunk
from benchmarks.host_cuda import on_gpu
from benchmarks.peers import BASELINE, PEERS, Call, Peer, Unavailable, arithmetic
from benchmarks.shapes import PASSES, Shape
from dsno_kernels.backends import reference
from tests.helpers import BUDGETS, IO_BUDGET

# PyTorch rounds a bfloat16 product's result too, and the transforms to tf32, where the kernels keep
# float32: half as much, or as much, error again.
PEER_BUDGETS = {**BUDGETS, "bf16": 7.5e-3, "tf32": 1.2e-3}
OUR_BUDGETS = {**BUDGETS, "bf16_io": IO_BUDGET}
# Up to this size of x a call is so short that launches show: a CUDA graph is timed too.
GRAPH_BYTES = 40 << 20


@functools.lru_cache(maxsize=2)
def inputs(shape: Shape, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """x, weight and the gradient of y; N(0, 1) everywhere, the same for every peer."""
    generator = torch.Generator(device).manual_seed(0)
    C = shape.channels
    x, grad = (torch.randn(shape.size, device=device, generator=generator) for _ in range(2))
    weight = torch.randn(C, C, shape.modes, 2, device=device, generator=generator)
    return x.to(dtype), weight, grad.to(dtype)


@functools.lru_cache(maxsize=2)
def expected(
    shape: Shape, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """y, dx and dW in float64, of the inputs as they are rounded."""
    x, weight, grad = (tensor.double() for tensor in inputs(shape, dtype, device))
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


def thunk(
    call: Call, direction: str, tensors: tuple[Tensor, Tensor, Tensor], tf32: bool = False
) -> Thunk:
    """One pass, with PyTorch's own float32 products in TF32 or not."""
    x, weight, grad = tensors
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()

    def run() -> object:
        setting = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = tf32
        try:
            if direction == "forward":
                return forward(call, x, weight)
            return forward_backward(call, x, weight, grad)
        finally:
            torch.backends.cuda.matmul.allow_tf32 = setting

    return run


@pytest.mark.parametrize("direction", PASSES)
def test_spectral_conv(
    benchmark: Any, case: tuple[Shape, str, Peer], direction: str, device: torch.device, smoke: bool
) -> None:
    shape, precision, peer = case
    benchmark.group = f"{shape.name} {direction}"
    try:
        call = peer.make(shape, precision, device)
    except Unavailable as reason:
        pytest.skip(str(reason))
    baseline = PEERS[0].make(shape, "fp32", device)
    dtype = arithmetic(precision)[2]

    try:
        tensors = inputs(shape, dtype, device)
        run = thunk(call, direction, tensors, precision == "tf32")
        # The baseline is float32 throughout, also where the candidate reads bfloat16.
        run_baseline = thunk(baseline, direction, inputs(shape, torch.float32, device))
        check = thunk(call, "forward_backward", tensors, precision == "tf32")
        errors = _check(shape, peer, precision, check(), expected(shape, dtype, device))
        if smoke:
            benchmark.pedantic(run)
            return
        timing = measure.time_beside(benchmark, run, run_baseline, device)
        if on_gpu(device):
            timing |= _beside_eager(shape, run, run_baseline, errors, device)
    except torch.OutOfMemoryError:
        expected.cache_clear()
        pytest.skip("out of device memory")
    x, weight = (tensor.detach().requires_grad_() for tensor in tensors[:2])
    benchmark.extra_info.update(
        op="spectral_conv",
        shape=shape.name,
        precision=precision,
        direction=direction,
        peer=peer.name,
        chosen=peer.name == f"dsno_kernels[{_chosen(shape, precision, x, weight)}]",
        errors=errors,
        saved_in_x=measure.saved_bytes(lambda: call(x, weight)) / (x.numel() * x.element_size()),
        peak_bytes=measure.peak_bytes(run, device),
        **timing,
        **_rates(shape, precision, direction, timing["seconds"], device),
    )
    if shape.targets.get((precision, direction)) and peer.name != BASELINE:
        benchmark.extra_info["target"] = shape.targets[precision, direction]
    if (
        on_gpu(device)
        and shape.elements * 4 <= GRAPH_BYTES
        and peer.name.startswith("dsno_kernels")
        and peer.name != "dsno_kernels[reference]"
    ):
        # Last: a capture that fails costs nothing that has been measured.
        benchmark.extra_info["graph_seconds"] = events.graph_seconds(run, device)


def _chosen(shape: Shape, precision: str, x: Tensor, weight: Tensor) -> str:
    """The backend that runs when none is asked for."""
    text = dk.explain(
        "spectral_conv",
        x,
        weight,
        time_dim=shape.time_dim,
        channel_dim=shape.channel_dim,
        precision=arithmetic(precision)[0],
    )
    return text.splitlines()[0].rsplit(": ", 1)[1]


def _beside_eager(
    shape: Shape,
    run: Thunk,
    run_baseline: Thunk,
    errors: dict[str, float],
    device: torch.device,
) -> dict[str, Any]:
    """Peak memory and error beside the eager layer's."""
    baseline_peak = measure.peak_bytes(run_baseline, device) or 0
    peak = measure.peak_bytes(run, device) or 0
    found: dict[str, Any] = {"peak_ratio": peak / max(baseline_peak, 1)}
    eager = _eager_errors(shape, device)
    found["error_ratio"] = max(errors[name] / eager[name] for name in errors)
    return found


@functools.lru_cache(maxsize=1)
def _eager_errors(shape: Shape, device: torch.device) -> dict[str, float]:
    tensors = inputs(shape, torch.float32, device)
    results = thunk(PEERS[0].make(shape, "fp32", device), "forward_backward", tensors)()
    return _errors(results, expected(shape, torch.float32, device))


def _errors(results: Any, wanted: tuple[Tensor, Tensor, Tensor]) -> dict[str, float]:
    pairs = zip(("y", "dx", "dW"), results, wanted, strict=True)
    return {name: measure.relative_error(actual, exact) for name, actual, exact in pairs}


def _check(
    shape: Shape, peer: Peer, precision: str, results: Any, wanted: tuple[Tensor, Tensor, Tensor]
) -> dict[str, float]:
    """Relative RMS errors of y, dx and dW against float64, all within the budget."""
    errors = _errors(results, wanted)
    budget = (OUR_BUDGETS if peer.name.startswith("dsno_kernels") else PEER_BUDGETS)[precision]
    for name, error in errors.items():
        assert error <= budget, (
            f"{peer.name}: relative RMS error {error:.3g} of {name}, budget {budget:.3g}"
        )
    return errors


def _rates(
    shape: Shape, precision: str, direction: str, seconds: float, device: torch.device
) -> dict[str, float]:
    """Useful work and least traffic over time, and their shares of what this machine reaches."""
    flop = shape.flop(direction)
    least = shape.least_bytes(direction, arithmetic(precision)[2].itemsize)
    gemm, copy = measure.gemm_rate(precision, device), measure.copy_rate(device)
    limit = max(flop / gemm, least / copy)
    return {
        "flop": flop,
        "bytes": least,
        "gflops": flop / seconds / 1e9,
        "share_of_gemm": flop / seconds / gemm,
        "gbytes": least / seconds / 1e9,
        "share_of_copy": least / seconds / copy,
        "limit_seconds": limit,
        "share_of_limit": limit / seconds,
    }
