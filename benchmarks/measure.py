"""Timing two calls side by side; the memory of a call; this machine's limits."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Thunk = Callable[[], object]

# Time that one entry may take, and how many rounds make a median worth quoting.
SECONDS_PER_ENTRY = {"cpu": 3.0, "cuda": 0.5}
ROUNDS = (9, 101)
GPU_CALLS = 20  # launches in a round on a GPU, between two synchronizations


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


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
    benchmark: Any, call: Thunk, baseline: Thunk, device: torch.device, calls: int = 0
) -> dict[str, float]:
    """Time `call` with pytest-benchmark, one call of `baseline` right before each round of it.

    Both see the same clock frequency, neighbors and cache pressure, so their ratio holds on a busy
    machine too.

    Returns:
        Medians in seconds a call, `ratio` = baseline / call, and its quartiles over the rounds.
    """
    calls = calls or (GPU_CALLS if device.type == "cuda" else 1)
    run, run_baseline = repeat(call, calls, device), repeat(baseline, calls, device)
    for _ in range(2):
        pair = seconds(run) + seconds(run_baseline)
    rounds = max(ROUNDS[0], min(ROUNDS[1], int(SECONDS_PER_ENTRY[device.type] / max(pair, 1e-6))))
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
        "seconds": statistics.median(after) / calls,
        "baseline_seconds": statistics.median(before) / calls,
        "ratio": statistics.median(before) / statistics.median(after),
        "ratio_q1": quartiles[0],
        "ratio_q3": quartiles[2],
        "rounds": rounds,
        "calls_per_round": calls,
    }


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
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _best(call: Thunk, device: torch.device, rounds: int = 9, calls: int = 1) -> float:
    run = repeat(call, calls, device)
    run()
    return min(seconds(run) for _ in range(rounds)) / calls


@functools.cache
def gemm_rate(precision: str, device: torch.device) -> float:
    """flop/s of this machine's own matrix product, best of nine; 1024^3, on a GPU 8192^3."""
    n, calls = (8192, 5) if device.type == "cuda" else (1024, 1)
    dtype = torch.bfloat16 if precision in ("bf16", "bf16x3") else torch.float32
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    setting = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    try:
        rate = 2.0 * n**3 / _best(lambda: a @ b, device, calls=calls)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = setting
    return rate / 3 if precision == "bf16x3" else rate


@functools.cache
def copy_rate(device: torch.device) -> float:
    """bytes/s, read plus written, of copying 64 MiB (1 GiB on a GPU), the best of nine."""
    n = (1 << 30 if device.type == "cuda" else 1 << 26) // 4
    source, target = torch.ones(n, device=device), torch.empty(n, device=device)
    calls = 5 if device.type == "cuda" else 1
    return 8.0 * n / _best(lambda: target.copy_(source), device, calls=calls)
