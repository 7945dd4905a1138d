"""Compile every Triton kernel that the benchmarks launch, in several processes, into a cache.

    python benchmarks/compile_ahead.py [--jobs N] [--device cuda]

Compiling takes seconds a kernel and one core; a run of minutes on a lent GPU has no time to do it
one after the other. Each process runs forward and backward once at a part of the shapes.
"""

from __future__ import annotations

import argparse
import functools
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the script runs from a checkout, installed or not

import torch  # noqa: E402

from benchmarks import bench_model, bench_training  # noqa: E402
from benchmarks.bench_spectral_conv import inputs, thunk  # noqa: E402
from benchmarks.host_cuda import dry_run  # noqa: E402
from benchmarks.peers import PEERS, PRECISIONS, Unavailable, arithmetic  # noqa: E402
from benchmarks.shapes import GPU_SHAPES, PASSES, Shape  # noqa: E402

Step = tuple[str, Callable[[torch.device], object]]


def convolutions() -> list[tuple[Shape, str]]:
    """Every shape and precision, those that share kernels side by side."""
    shapes = [shape.small() for shape in GPU_SHAPES[:1]] if dry_run() else list(GPU_SHAPES)
    shapes.sort(key=lambda shape: shape.T > 8)
    return [(shape, precision) for precision in PRECISIONS["cuda"] for shape in shapes]


def run_convolution(shape: Shape, precision: str, device: torch.device) -> None:
    peer = next(peer for peer in PEERS if peer.name == "dsno_kernels[triton]")
    call = peer.make(shape, precision, device)
    tensors = inputs(shape, arithmetic(precision)[2], device)
    thunk(call, "forward_backward", tensors)()
    thunk(call, "forward", tensors)()


def run_model(network: str, precision: str, device: torch.device) -> None:
    case = (bench_model.CASES | bench_model.SMALL_CASES)[network]
    for name in ("dsno_kernels", "dsno_kernels channels_last"):
        for direction in PASSES:
            bench_model.variant(name, case, direction, precision, device)()


def run_student(network: str, precision: str, device: torch.device) -> None:
    for work in bench_training.BUDGETS:
        bench_training.runner(work, network, True, precision, device)()


def parts() -> list[list[Step]]:
    """The steps of each process: hardly a kernel is in two of them."""
    made: dict[tuple[str, bool], list[Step]] = {}
    for shape, precision in convolutions():
        step = f"{shape.name} {precision}", functools.partial(run_convolution, shape, precision)
        made.setdefault((precision, shape.T > 8), []).append(step)
    networks = list(bench_model.SMALL_CASES)[:1] if dry_run() else list(bench_model.CASES)
    models: list[list[Step]] = [
        [(f"{network} {precision}", functools.partial(run_model, network, precision))]
        for network in networks
        for precision in bench_model.PRECISIONS[: 1 if dry_run() else None]
    ]
    # The published network has the kernels of `models`.
    student: list[Step] = [
        (f"digits {precision}", functools.partial(run_student, "digits", precision))
        for precision in bench_training.PRECISIONS
    ]
    return [*made.values(), *models, student]


def compile_part(steps: list[Step], device: torch.device) -> int:
    """Run one part; the number of steps that failed."""
    failed = 0
    for name, run in steps:
        try:
            run(device)
        except Unavailable as reason:
            print(f"compile_ahead: {reason}")
            return 0
        except Exception as error:  # the benchmarks say more about it; the other steps go on
            print(f"compile_ahead: {name}: {error!r}", flush=True)
            failed += 1
    print(f"compile_ahead: {steps[0][0]} and {len(steps) - 1} more: {failed} failed", flush=True)
    return failed


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=max(1, (os.cpu_count() or 2) - 1))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--part", type=int, help="run this part only, in this process")
    options = parser.parse_args(argv)
    if options.part is not None:
        return min(1, compile_part(parts()[options.part], torch.device(options.device)))
    waiting = list(range(len(parts())))
    running: list[subprocess.Popen[bytes]] = []
    failed = 0
    while waiting or running:
        while waiting and len(running) < options.jobs:
            command = [sys.executable, __file__, "--device", options.device]
            running.append(subprocess.Popen([*command, "--part", str(waiting.pop(0))]))
        failed += running.pop(0).wait() != 0
    return min(1, failed)


if __name__ == "__main__":
    sys.exit(main())
