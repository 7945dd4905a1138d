"""The fused schedulers next to those of diffusers: a step, the host's share of it, a whole loop.

Guidance is combined in PyTorch before a peer's step, as pipelines do; ours takes both outputs. A
peer's call comes right before each of ours, so that `ratio` is the speed-up over it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import measure, traffic
from benchmarks.bench_exp_step import GUIDANCE, SHAPES, SMOKE, skip_unless_wanted, threads_set
from tests.helpers import rel_rms

TINY = (1, 4, 8, 8)
CALLS = 200  # in a round, where the host time is measured
STEPS = 20
AT = 4  # the step that is timed: of full order, not near either end
# float32 steps; coefficients of diffusers' DEIS-3 are off by 5e-5 of their sum at 20 steps.
BUDGET = 1e-4
# peer -> (name of the scheduler, configuration); the originals' weights of order 3 on both sides
PEERS: dict[str, tuple[str, dict[str, Any]]] = {
    "diffusers DEIS-3": ("DEISMultistepScheduler", {"solver_order": 3}),
    "diffusers DPM++3M": ("DPMSolverMultistepScheduler", {"solver_order": 3}),
    "diffusers UniPC-3": ("UniPCMultistepScheduler", {"solver_order": 3}),
    "diffusers DDIM": ("DDIMScheduler", {"clip_sample": False}),
}


def schedulers(peer: str) -> tuple[Any, Any]:
    """The original and ours, ready to run."""
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
    from dsno_kernels.integrations import diffusers as fused

    name, config = PEERS[peer]
    pair = (
        getattr(diffusers, name)(**config),
        getattr(fused, f"Fused{name}")(**config, match_diffusers=True),
    )
    for scheduler in pair:
        scheduler.set_timesteps(STEPS)
    return pair


def step(scheduler: Any, m: Tensor, u: Tensor, t: Tensor, x: Tensor, guided: bool) -> Tensor:
    if not guided:
        return scheduler.step(m, t, x, return_dict=False)[0]
    if type(scheduler).__name__.startswith("Fused"):
        fused = {"unconditional": u, "guidance": GUIDANCE}
        return scheduler.step(m, t, x, return_dict=False, **fused)[0]
    return scheduler.step(u + GUIDANCE * (m - u), t, x, return_dict=False)[0]


def step_call(scheduler: Any, inputs: tuple[Tensor, ...], guided: bool) -> Callable[[], Tensor]:
    """A step in the middle of a trajectory, repeated from the same state of the scheduler."""
    x, u, *outputs = inputs
    timesteps = list(scheduler.timesteps)
    for i, t in enumerate(timesteps[:AT]):
        step(scheduler, outputs[i % 3], u, t, x, guided)
    state, t = copy.copy(scheduler.__dict__), timesteps[AT]
    lists = {key: list(value) for key, value in state.items() if isinstance(value, list)}

    def call() -> Tensor:
        scheduler.__dict__.update(state)
        for key, value in lists.items():
            scheduler.__dict__[key] = value.copy()
        return step(scheduler, outputs[AT % 3], u, t, x, guided)

    return call


def loop_call(scheduler: Any, inputs: tuple[Tensor, ...], guided: bool) -> Callable[[], Tensor]:
    """A whole run whose model costs nothing, with its set_timesteps (whose table ours keeps)."""
    start, u, *outputs = inputs

    def call() -> Tensor:
        scheduler.set_timesteps(STEPS)
        x = start
        for i, t in enumerate(scheduler.timesteps):
            x = step(scheduler, outputs[i % 3], u, t, x, guided)
        return x

    return call


def compared(
    make: Callable[..., Callable[[], Tensor]],
    peer: str,
    shape: tuple[int, ...],
    guided: bool,
    device: torch.device,
) -> tuple[Callable[[], Tensor], Callable[[], Tensor], float]:
    """Ours and the original's call, which agree."""
    inputs = torch.randn(5, *shape, device=device).unbind(0)
    baseline, call = (make(scheduler, inputs, guided) for scheduler in schedulers(peer))
    error = rel_rms(call(), baseline())
    assert error <= BUDGET, f"relative RMS difference {error:.3g}"
    return call, baseline, error


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("guided", [False, True], ids=["plain", "guided"])
@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
@pytest.mark.parametrize("kind", ["scheduler", "scheduler_loop"])
def test_scheduler(
    benchmark: Any,
    kind: str,
    shape: tuple[int, ...],
    peer: str,
    guided: bool,
    threads: int,
    device: torch.device,
    smoke: bool,
) -> None:
    skip_unless_wanted(shape, threads, device, smoke)
    if kind == "scheduler_loop" and (guided or shape == SHAPES[-1]):
        pytest.skip("the loop of latents says what a loop costs")
    benchmark.group = f"{kind} {shape}"
    make = step_call if kind == "scheduler" else loop_call
    with torch.no_grad(), threads_set(threads):
        shape = SMOKE if smoke else shape
        call, baseline, error = compared(make, peer, shape, guided, device)
        moves: dict[str, Any] = {}
        if kind == "scheduler":  # a loop's steps leave the caches otherwise than one long copy
            moves = traffic.beside(call, baseline, torch.empty(shape), device)
        if smoke:
            benchmark.pedantic(call)
            return
        timing = measure.time_beside(benchmark, call, baseline, device)
        benchmark.extra_info.update(
            op=kind,
            shape=list(shape),
            peer=peer,
            guided=guided,
            threads=threads,
            steps=1 if kind == "scheduler" else STEPS,
            errors={"x": error},
            **moves,
            **timing,
        )


@pytest.mark.parametrize("peer", PEERS)
def test_scheduler_overhead(benchmark: Any, peer: str, device: torch.device, smoke: bool) -> None:
    """Host time of one step on 256 elements."""
    benchmark.group = "scheduler overhead"
    with torch.no_grad(), threads_set(1):
        call, baseline, error = compared(step_call, peer, TINY, False, device)
        if smoke:
            benchmark.pedantic(call)
            return
        run, run_baseline = (measure.repeat(f, CALLS, device) for f in (call, baseline))
        timing = measure.time_beside(benchmark, run, run_baseline, device)
        for key in ("seconds", "baseline_seconds"):
            timing[key] /= CALLS
        timing["calls_per_round"] = CALLS
        benchmark.extra_info.update(
            op="scheduler_overhead", peer=peer, errors={"x": error}, **timing
        )
