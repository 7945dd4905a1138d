"""One sampler step of order 3: `exp_step` (with guidance `solver_step`) next to what people run.

Peers are the same arithmetic in eager and compiled PyTorch, and whole steps of diffusers' multistep
schedulers of order 3, where it is installed. A peer's call comes right before each of ours, so that
`ratio` is the speed-up over it.

With glibc's defaults, results of several MB may come from fresh pages, whose faults cost time.
`MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=4294967296` before the command keeps freed
memory, for all peers alike; each entry records them.
"""

from __future__ import annotations

import copy
import functools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

import dsno_kernels as dk
from benchmarks import measure
from tests.helpers import BUDGETS, rel_rms

SHAPES = ((64, 3, 32, 32), (16, 4, 64, 64), (8, 3, 256, 256))
TINY = (256,)
SMOKE = (2, 3, 4, 4)
MALLOC = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")  # of glibc, read when it starts
CALLS = 200  # in a round, where the host time is measured
ROW = (1.02, -0.9, 0.6, -0.2)  # a, c_0, c_1, c_2
GUIDANCE = 7.5
# A, B, a_b, c_b, s, a_p, c_p, c_in: the same step from guided outputs, with a new entry of history.
GUIDED_ROW = (0.0, 1.0, *ROW, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0)
SCHEDULERS = {
    "diffusers DEIS-3": "DEISMultistepScheduler",
    "diffusers DPM++3M": "DPMSolverMultistepScheduler",
    "diffusers UniPC-3": "UniPCMultistepScheduler",
}
PEERS = ("eager", "torch.compile", *SCHEDULERS)

Call = Callable[[], object]


def eager(x: Tensor, m: Tensor, u: Tensor, h1: Tensor, h2: Tensor, guided: bool) -> Tensor:
    """The bare combination, as a careful user writes it."""
    if guided:
        m = u + GUIDANCE * (m - u)
    return ROW[0] * x + ROW[1] * m + ROW[2] * h1 + ROW[3] * h2


def ours(x: Tensor, m: Tensor, u: Tensor, h1: Tensor, h2: Tensor, guided: bool) -> Tensor:
    if not guided:
        return dk.exp_step(x, (m, h1, h2), ROW)
    return dk.solver_step(x, m, GUIDED_ROW, (h1, h2), unconditional=u, guidance=GUIDANCE).base


def scheduler_step(name: str, inputs: tuple[Tensor, ...], guided: bool) -> Call:
    """A step in the middle of a trajectory, repeated from the same state of the scheduler."""
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
    scheduler = getattr(diffusers, SCHEDULERS[name])(solver_order=3)
    scheduler.set_timesteps(20)
    x, m, u, *_ = inputs
    for t in scheduler.timesteps[:4]:
        scheduler.step(m, t, x)
    state, t = copy.copy(scheduler.__dict__), scheduler.timesteps[4]
    lists = {key: list(value) for key, value in state.items() if isinstance(value, list)}

    def call() -> object:
        scheduler.__dict__.update(state)
        scheduler.__dict__.update({key: list(value) for key, value in lists.items()})
        output = u + GUIDANCE * (m - u) if guided else m
        return scheduler.step(output, t, x, return_dict=False)

    return call


def peer_call(name: str, inputs: tuple[Tensor, ...], guided: bool, smoke: bool) -> Call:
    if name in SCHEDULERS:
        return scheduler_step(name, inputs, guided)
    function = eager
    if name == "torch.compile" and not smoke:
        torch._dynamo.reset()
        function = torch.compile(eager, dynamic=False)
    return functools.partial(function, *inputs, guided)


@contextmanager
def threads_set(threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def check(inputs: tuple[Tensor, ...], guided: bool) -> float:
    """Relative RMS error of our step against float64."""
    wide = tuple(t.double() for t in inputs)
    error = rel_rms(ours(*inputs, guided), eager(*wide, guided))
    assert error <= BUDGETS["fp32"], f"relative RMS error {error:.3g}"
    return error


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("guided", [False, True], ids=["plain", "guided"])
@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_exp_step(
    benchmark: Any,
    shape: tuple[int, ...],
    peer: str,
    guided: bool,
    threads: int,
    device: torch.device,
    smoke: bool,
) -> None:
    if smoke and (threads, shape) != (1, SHAPES[0]):
        pytest.skip("one small shape on one thread is enough to see that it runs")
    if threads > 1 and (device.type == "cuda" or threads > (os.cpu_count() or 1)):
        pytest.skip("threads of the host that are not there, or do not matter")
    benchmark.group = f"exp_step {shape}"
    inputs = torch.randn(5, *(SMOKE if smoke else shape), device=device).unbind(0)
    with torch.no_grad(), threads_set(threads):
        error = check(inputs, guided)
        call = functools.partial(ours, *inputs, guided)
        baseline = peer_call(peer, inputs, guided, smoke)
        if smoke:
            baseline()
            benchmark.pedantic(call)
            return
        timing = measure.time_beside(benchmark, call, baseline, device)
        tensors = 7 if guided else 5  # x, m, two of history, x'; guided also u and h_0
        rate = tensors * inputs[0].numel() * 4 / timing["seconds"]
        benchmark.extra_info.update(
            op="exp_step",
            shape=list(shape),
            peer=peer,
            guided=guided,
            threads=threads,
            errors={"y": error},
            gbytes=rate / 1e9,
            share_of_copy=rate / measure.copy_rate(device),
            malloc={name: os.environ.get(name, "default") for name in MALLOC},
            **timing,
        )


@pytest.mark.parametrize("guided", [False, True], ids=["plain", "guided"])
@pytest.mark.parametrize("peer", PEERS)
def test_exp_step_overhead(
    benchmark: Any, peer: str, guided: bool, device: torch.device, smoke: bool
) -> None:
    """Host time of one call on 256 elements."""
    benchmark.group = "exp_step overhead"
    inputs = torch.randn(5, *TINY, device=device).unbind(0)
    with torch.no_grad(), threads_set(1):
        check(inputs, guided)
        call = functools.partial(ours, *inputs, guided)
        if peer == "diffusers UniPC-3":
            inputs = tuple(t.reshape(1, -1) for t in inputs)  # it does not take one axis
        baseline = peer_call(peer, inputs, guided, smoke)
        if smoke:
            baseline()
            benchmark.pedantic(call)
            return
        run, run_baseline = (measure.repeat(f, CALLS, device) for f in (call, baseline))
        timing = measure.time_beside(benchmark, run, run_baseline, device)
        for key in ("seconds", "baseline_seconds"):
            timing[key] /= CALLS
        timing["calls_per_round"] = CALLS
        benchmark.extra_info.update(op="exp_step_overhead", peer=peer, guided=guided, **timing)
