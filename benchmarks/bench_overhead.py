"""What a call costs before any work is done, and the two truncated transforms against torch.fft."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import dsno_kernels as dk
from benchmarks import measure
from benchmarks.host_cuda import dry_run
from benchmarks.peers import eager
from tests.helpers import BUDGETS, rel_rms

TINY = (1, 4, 4, 2, 2)  # so little work that the time of a call is that of its Python and dispatch
CALLS = 20 if dry_run() else 200  # in a round

TRANSFORMS = (
    ("rfft", (8, 64, 1024), 32, 2),
    ("irfft", (8, 64, 1024), 32, 2),
    ("rfft", (4, 4, 256, 1024), 2, 1),
    ("irfft", (4, 4, 256, 1024), 2, 1),
)


@pytest.mark.parametrize("direction", ["forward", "forward_backward"])
@pytest.mark.parametrize("op", ["aten::addmm", "eager", "dsno_kernels"])
def test_overhead(
    benchmark: Any, op: str, direction: str, device: torch.device, smoke: bool
) -> None:
    """Host time of one call at a tiny shape; `addmm` shows what PyTorch itself needs for one."""
    benchmark.group = f"overhead {direction}"
    x = torch.randn(TINY, device=device, requires_grad=True)
    weight = torch.randn(4, 4, 2, 2, device=device, requires_grad=True)
    matrix, bias = (
        torch.randn(4, 4, device=device, requires_grad=True),
        torch.zeros(4, device=device),
    )
    calls: dict[str, Callable[[], Tensor]] = {
        "aten::addmm": lambda: torch.addmm(bias, x.view(-1, 4), matrix),
        "eager": lambda: eager(x, weight, 2),
        "dsno_kernels": lambda: dk.spectral_conv(x, weight),
    }
    call = calls[op]
    leaves = (x, matrix if op == "aten::addmm" else weight)
    grad = torch.randn_like(call())

    def run() -> None:
        if direction == "forward":
            with torch.no_grad():
                call()
        else:
            torch.autograd.grad(call(), leaves, grad)

    if smoke:
        benchmark.pedantic(run)
        return
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # else the wake-up of idle threads is what a busy machine would show
    times: list[float] = []
    calls_in_a_row = measure.repeat(run, CALLS, device)
    try:
        benchmark.pedantic(
            lambda: times.append(measure.seconds(calls_in_a_row)), rounds=25, warmup_rounds=3
        )
    finally:
        torch.set_num_threads(threads)
    seconds = statistics.median(times[-25:]) / CALLS
    benchmark.extra_info.update(
        op="overhead", peer=op, direction=direction, seconds=seconds, calls_per_round=CALLS
    )


@pytest.mark.parametrize(
    ("kind", "size", "modes", "dim"),
    TRANSFORMS,
    ids=[f"{k}-{'x'.join(map(str, s))}" for k, s, _, _ in TRANSFORMS],
)
def test_transform(
    benchmark: Any,
    kind: str,
    size: tuple[int, ...],
    modes: int,
    dim: int,
    device: torch.device,
    smoke: bool,
) -> None:
    benchmark.group = f"{kind} {size}"
    size = tuple(min(length, 12) for length in size) if smoke or dry_run() else size
    n, modes = size[dim], min(modes, size[dim] // 2)
    x = torch.randn(size, device=device)
    pairs: dict[str, Callable[[Tensor], Tensor]]
    if kind == "rfft":
        pairs = {
            "ours": functools.partial(dk.truncated_rfft, modes=modes, dim=dim),
            "torch.fft": lambda x: torch.fft.rfft(x, dim=dim).narrow(dim, 0, modes).contiguous(),
        }
    else:
        x = torch.fft.rfft(x, dim=dim).narrow(dim, 0, modes).contiguous()
        pairs = {
            "ours": functools.partial(dk.truncated_irfft, n=n, dim=dim),
            "torch.fft": lambda x: torch.fft.irfft(x, n=n, dim=dim),
        }
    wide = x.to(torch.complex128 if x.is_complex() else torch.float64)
    error = rel_rms(pairs["ours"](x), pairs["torch.fft"](wide))
    assert error <= BUDGETS["fp32"], f"relative RMS error {error:.3g}"
    run, run_baseline = (functools.partial(pairs[name], x) for name in ("ours", "torch.fft"))
    if smoke:
        benchmark.pedantic(run)
        return
    timing = measure.time_beside(benchmark, run, run_baseline, device)
    benchmark.extra_info.update(
        op=f"truncated_{kind}", size=list(size), modes=modes, dim=dim, errors={"y": error}, **timing
    )
