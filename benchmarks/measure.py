"""Timing two calls side by side; the error and the memory of a call; this machine's limits.

On the CPU the host's clock times; on a GPU `events` does.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks import events
from benchmarks.events import Thunk
from benchmarks.host_cuda import cuda, dry_run, on_gpu

# Time that one entry may take, and how many rounds make a median worth quoting.
SECONDS_PER_ENTRY = 3.0
ROUNDS = (9, 101)


def synchronize(device: torch.device) -> None:
    if on_gpu(device):
        cuda().synchronize(device)


def repeat(call: Thunk, calls: int, device: torch.device) -> Thunk:
    """`calls` calls in a row, then a wait for the device."""

    def run() -> None:
        for _ in range(calls):
            call()
        synchronize(device)

    return run


def seconds(run: Thunk) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def time_beside(
    benchmark: Any, call: Thunk, baseline: Thunk, device: torch.device
) -> dict[str, Any]:
    """Time `call` with pytest-benchmark, one call of `baseline` right before each round of it.

    Both see the same clock frequency, neighbors and cache pressure, so their ratio holds on a busy
    machine too. On a GPU device events time, with cold caches (`events.time_beside`).

    Returns:
        Medians in seconds a call, `ratio` = baseline / call, and its quartiles over the rounds.
    """
    if on_gpu(device):
        timing: dict[str, Any] = {}
        benchmark.pedantic(lambda: timing.update(events.time_beside(call, baseline, device)))
        return timing
    run, run_baseline = repeat(call, 1, device), repeat(baseline, 1, device)
    for _ in range(2):
        pair = seconds(run) + seconds(run_baseline)
    rounds = max(ROUNDS[0], min(ROUNDS[1], int(SECONDS_PER_ENTRY / max(pair, 1e-6))))
    before: list[float] = []
    after: list[float] = []

    def timed() -> None:
        after.append(seconds(run))

    benchmark.pedantic(
        timed, setup=lambda: before.append(seconds(run_baseline)), rounds=rounds, warmup_rounds=1
    )
    before, after = before[-rounds:], after[-rounds:]
    ratios = sorted(b / a for a, b in zip(after, before, strict=True))
    quartiles = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    return {
        "seconds": statistics.median(after),
        "baseline_seconds": statistics.median(before),
        "ratio": statistics.median(before) / statistics.median(after),
        "ratio_q1": quartiles[0],
        "ratio_q3": quartiles[2],
        "rounds": rounds,
        "calls_per_round": 1,
    }


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """||actual - expected|| / ||expected|| in the dtype of `expected`, on its device; NaN stays."""
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    difference = actual.detach().to(expected.dtype, copy=True).sub_(expected)
    return float(difference.norm() / expected.norm())


def saved_bytes(forward: Callable[[], Tensor]) -> int:
    """Bytes one forward keeps for backward: each storage once, parameters included."""
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = forward()
    # y keeps the graph, and with it every saved storage, alive up to here: no address is counted
    # for two tensors.
    assert y.requires_grad
    return sum(storages.values())


def peak_bytes(call: Thunk, device: torch.device) -> int | None:
    """Peak of device memory over what was allocated before, of one call; None on the CPU."""
    if not on_gpu(device):
        return None
    synchronize(device)
    cuda().reset_peak_memory_stats(device)
    before = cuda().memory_allocated(device)
    call()
    synchronize(device)
    return int(cuda().max_memory_allocated(device) - before)


def _best(call: Thunk, device: torch.device, rounds: int = 9, calls: int = 1) -> float:
    run = repeat(call, calls, device)
    run()
    return min(seconds(run) for _ in range(rounds)) / calls


@functools.cache
def _matmul_rate(dtype: torch.dtype, allow_tf32: bool, device: torch.device) -> float:
    """flop/s of this machine's own matrix product, best of nine; 1024^3, on a GPU 8192^3."""
    n, calls = (8192, 5) if device.type == "cuda" else (128 if dry_run() else 1024, 1)
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    setting = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = allow_tf32
    try:
        return 2.0 * n**3 / _best(lambda: a @ b, device, calls=calls)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = setting


def gemm_rate(precision: str, device: torch.device) -> float:
    """flop/s at a precision: where it takes three tensor-core products, a third of their rate.

    float32-accurate products have two ways on a GPU, FFMA and three tf32 products: the faster one.
    """
    if precision in ("bf16", "bf16_io"):
        return _matmul_rate(torch.bfloat16, False, device)
    if precision == "bf16x3":
        return _matmul_rate(torch.bfloat16, False, device) / 3
    if precision == "tf32":
        return _matmul_rate(torch.float32, True, device)
    plain = _matmul_rate(torch.float32, False, device)
    return max(plain, gemm_rate("tf32", device) / 3) if on_gpu(device) else plain


def copy_rate(device: torch.device) -> float:
    """bytes/s, read plus written, of copying 64 MiB (1 GiB on a GPU), the best of nine.

    On the CPU it is that of as many threads as PyTorch uses at the call.
    """
    return _copy_rate(device, torch.get_num_threads())


@functools.cache
def _copy_rate(device: torch.device, threads: int) -> float:
    n = (1 << 30 if device.type == "cuda" else 1 << (20 if dry_run() else 26)) // 4
    source, target = torch.rand(n, device=device), torch.empty(n, device=device)
    calls = 5 if device.type == "cuda" else 1
    return 8.0 * n / _best(lambda: target.copy_(source), device, calls=calls)


def rates(device: torch.device) -> dict[str, Any]:
    """The limits of this machine that the shares count against; measuring them warms the clocks."""
    names = ("fp32", "bf16x3", "tf32", "bf16") if on_gpu(device) else ("fp32", "bf16")
    return {
        "copy_gbytes": copy_rate(device) / 1e9,
        "gemm_gflops": {name: gemm_rate(name, device) / 1e9 for name in names},
    }
