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
from benchmarks import measure, traffic
from benchmarks.host_cuda import dry_run, on_gpu
from dsno_kernels.diffusion import CapturedSampler, SolverPlan, VPLinear, time_grid
from tests.helpers import BUDGETS, rel_rms
from tests.test_capture import capture_on_the_host

SHAPES = ((64, 3, 32, 32), (16, 4, 64, 64), (8, 3, 256, 256))
TINY = (256,)
SMOKE = (2, 3, 4, 4)
MALLOC = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")  # of glibc, read when it starts
GIB = 1 << (12 if dry_run() else 28)  # float32 numbers of a tensor of 1 GiB
LATENT, STEPS = SHAPES[1], 20  # of a loop as pipelines run it
LOOP_PEER = "diffusers DEIS-3"
# Rounding of a step in 20 steps, which a trajectory grows by less than 100 (test_gpu_sample.py).
LOOP_BUDGET = 1e-4
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


def skip_unless_wanted(
    shape: tuple[int, ...], threads: int, device: torch.device, smoke: bool
) -> None:
    """Skip a case that says nothing here."""
    if smoke and (threads, shape) != (1, SHAPES[0]):
        pytest.skip("one small shape on one thread is enough to see that it runs")
    if threads > 1 and (device.type == "cuda" or threads > (os.cpu_count() or 1)):
        pytest.skip("threads of the host that are not there, or do not matter")


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
    skip_unless_wanted(shape, threads, device, smoke)
    benchmark.group = f"exp_step {shape}"
    inputs = torch.randn(5, *(SMOKE if smoke else shape), device=device).unbind(0)
    with torch.no_grad(), threads_set(threads):
        error = check(inputs, guided)
        call = functools.partial(ours, *inputs, guided)
        baseline = peer_call(peer, inputs, guided, smoke)
        # Of one kernel: x, m, two of history, with guidance u; x'.
        compiled = {"read": 4.0 + guided, "written": 1.0} if peer == "torch.compile" else None
        moves = traffic.beside(call, baseline, inputs[0], device, compiled)
        if smoke:
            benchmark.pedantic(call)
            return
        timing = measure.time_beside(benchmark, call, baseline, device)
        rate = moves["bytes"] / timing["seconds"]
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
            **moves,
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


def test_exp_step_of_one_gib(benchmark: Any, device: torch.device, smoke: bool) -> None:
    """Tensors of 1 GiB, in turns with a copy of one: the share of the rate of that copy."""
    if not on_gpu(device):
        pytest.skip("tensors of 1 GiB are for a GPU")
    benchmark.group = "exp_step of 1 GiB"
    x, *history = torch.randn(4, GIB, device=device).unbind(0)
    target = torch.empty_like(x)

    def call() -> Tensor:
        return dk.exp_step(x, history, ROW)

    y, error = call(), 0.0
    for part in (slice(1 << 20), slice(-(1 << 20), None)):  # float64 of all would not fit
        m, h1, h2 = (term[part].double() for term in history)
        exact = eager(x[part].double(), m, m, h1, h2, guided=False)
        error = max(error, measure.relative_error(y[part], exact))
    assert error <= BUDGETS["fp32"], f"relative RMS error {error:.3g}"
    del y
    if smoke:
        benchmark.pedantic(call)
        return
    timing = measure.time_beside(benchmark, call, lambda: target.copy_(x), device)
    moved, copied = (count * x.nbytes for count in (5, 2))  # x, three of history and x'; one copy
    benchmark.extra_info.update(
        op="exp_step_copy",
        shape=list(x.shape),
        peer="copy",
        errors={"y": error},
        gbytes=moved / timing["seconds"] / 1e9,
        share_of_copy=moved / copied * timing["ratio"],
        **timing,
    )


def test_captured_loop(
    benchmark: Any, device: torch.device, smoke: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run of 20 steps whose model costs nothing, host included: one CUDA graph, replayed for each
    step, in turns with diffusers' loop of the same order.
    """
    if not on_gpu(device):
        pytest.skip("a CUDA graph needs a GPU")
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
    benchmark.group = "exp_step loop"
    shape = SMOKE if dry_run() else LATENT
    x, output = torch.randn(2, *shape, device=device).unbind(0)
    process = VPLinear()
    plan = SolverPlan.build(process, time_grid(process, STEPS), "tab3")
    with monkeypatch.context() as patch:
        if dry_run():
            capture_on_the_host(patch)
        sampler = CapturedSampler(lambda x, t: output, x, plan)
        exact = plan.replay(lambda x, t: output.double(), x.double())
        error = rel_rms(sampler(x), exact)
        assert error <= LOOP_BUDGET, f"relative RMS error {error:.3g}"
    scheduler = getattr(diffusers, SCHEDULERS[LOOP_PEER])(solver_order=3)

    def baseline() -> None:
        scheduler.set_timesteps(STEPS)
        state = x
        for t in scheduler.timesteps:
            state = scheduler.step(output, t, state, return_dict=False)[0]

    def call() -> Tensor:
        return sampler(x)

    if smoke:
        benchmark.pedantic(call)
        return
    run, run_baseline = (measure.repeat(f, 1, device) for f in (call, baseline))
    timing = measure.time_beside(benchmark, run, run_baseline, device)
    benchmark.extra_info.update(
        op="exp_step_loop",
        shape=list(shape),
        peer=LOOP_PEER,
        steps=STEPS,
        errors={"x": error},
        diffusers_ratio=timing["ratio"],
        **timing,
    )
