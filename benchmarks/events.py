"""Timing on a GPU by device events, with cold caches.

A round times one call of the baseline, then one of the candidate. Before each, a buffer of three
times the L2 cache is read, so that no operand is found there; reading, unlike writing, leaves no
modified lines whose way to memory the call would pay for. The buffer is read as often as the host
needs to enqueue the call, for some 2 ms at most: inside the timed region of a shorter call the
device never waits for the host. What the host takes is a number of its own, and where it is more
than the device's, the entry says that it is host-bound.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks.host_cuda import cuda, dry_run

Thunk = Callable[[], object]

SECONDS_PER_ENTRY = 0.2  # rounds, without set-up
ROUNDS = (2, 2) if dry_run() else (7, 101)  # at least and at most
WARM_UP = 1 if dry_run() else 2
# In a row, without a synchronization; in all, but so many rounds at least.
HOST_CALLS, HOST_SECONDS, HOST_ROUNDS = (2, 0.0, 2) if dry_run() else (5, 0.05, 4)
MOST_READS = 40  # of the buffer before a call: some 2 ms, enough to enqueue a layer's training step


@functools.cache
def cold_buffer(device: torch.device) -> torch.Tensor:
    l2 = getattr(cuda().get_device_properties(device), "L2_cache_size", 0) or 64 << 20
    return torch.ones(3 * l2 // 4, device=device)


def chill(device: torch.device, reads: int = 1) -> None:
    """Fill the L2 cache with clean lines of a buffer that no call uses."""
    buffer = cold_buffer(device)
    for _ in range(reads):
        buffer.sum()


def device_seconds(calls: Sequence[tuple[Thunk, int]], device: torch.device) -> list[float]:
    """Device time of each call in turn, after as many reads of the buffer as stand beside it."""
    marks = []
    for call, reads in calls:
        chill(device, reads)
        begin, end = (cuda().Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        marks.append((begin, end))
    cuda().synchronize(device)
    return [begin.elapsed_time(end) * 1e-3 for begin, end in marks]


def host_seconds(call: Thunk, device: torch.device) -> float:
    """Time until a call returns while the device is still at work: a median.

    A few calls in a row count as one, unless they are so long that the device's queue would fill.
    """
    calls = 1
    times: list[float] = []
    begin = time.perf_counter()
    while len(times) < HOST_ROUNDS or (
        len(times) < 10 and time.perf_counter() - begin < HOST_SECONDS
    ):
        cuda().synchronize(device)
        start = time.perf_counter()
        for _ in range(calls):
            call()
        times.append((time.perf_counter() - start) / calls)
        calls = HOST_CALLS if times[-1] < 1e-3 else 1
    cuda().synchronize(device)
    return statistics.median(times[1:])


def reads_that_cover(host: float, device: torch.device) -> int:
    """Reads of the buffer that take the device longer than `host` seconds."""
    chill(device, 2)
    (one,) = device_seconds([(functools.partial(chill, device, 4), 4)], device)
    return 1 + min(MOST_READS, int(1.5 * host / max(one / 4, 1e-6)))


def time_beside(call: Thunk, baseline: Thunk, device: torch.device) -> dict[str, Any]:
    """Medians of a call and of a baseline, in seconds; see the module's text for how.

    Returns:
        `seconds` with its quartiles, `baseline_seconds`, `ratio` = baseline / call with its
        quartiles over the rounds, the host's time for each as `host_seconds` and
        `baseline_host_seconds`, and whether calls in a row wait for the host: `host_bound` and
        `baseline_host_bound`.
    """
    for _ in range(WARM_UP):
        baseline()
        call()
    hosts = [host_seconds(thunk, device) for thunk in (baseline, call)]
    pair = [
        (thunk, reads_that_cover(host, device))
        for thunk, host in zip((baseline, call), hosts, strict=True)
    ]
    start = time.perf_counter()
    device_seconds(pair, device)
    rounds = int(SECONDS_PER_ENTRY / max(time.perf_counter() - start, 1e-6))
    rounds = max(ROUNDS[0], min(ROUNDS[1], rounds))
    before, after = zip(*(device_seconds(pair, device) for _ in range(rounds)), strict=True)
    ratios = statistics.quantiles((b / a for b, a in zip(before, after, strict=True)), n=4)
    quartiles = statistics.quantiles(after, n=4)
    return {
        "timing": "device events, L2 cold",
        "seconds": statistics.median(after),
        "seconds_q1": quartiles[0],
        "seconds_q3": quartiles[2],
        "baseline_seconds": statistics.median(before),
        "ratio": statistics.median(before) / statistics.median(after),
        "ratio_q1": ratios[0],
        "ratio_q3": ratios[2],
        "host_seconds": hosts[1],
        "baseline_host_seconds": hosts[0],
        "host_bound": hosts[1] > statistics.median(after),
        "baseline_host_bound": hosts[0] > statistics.median(before),
        "rounds": rounds,
        "calls_per_round": 1,
    }


def capture(call: Thunk) -> Any:
    """A CUDA graph of one call, after a warm-up on a stream of its own as PyTorch asks for."""
    stream = cuda().Stream()
    stream.wait_stream(cuda().current_stream())
    with cuda().stream(stream):
        for _ in range(WARM_UP):
            call()
    cuda().current_stream().wait_stream(stream)
    graph = cuda().CUDAGraph()
    with cuda().graph(graph):
        call()
    return graph


def graph_seconds(call: Thunk, device: torch.device, rounds: int = 25) -> float:
    """Device time of replaying a CUDA graph of the call, with cold caches: the median."""
    graph = capture(call)
    replay = [(graph.replay, 2)]
    device_seconds(replay, device)
    return statistics.median(device_seconds(replay, device)[0] for _ in range(rounds))
