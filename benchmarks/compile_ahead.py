"""Compile every Triton kernel that the benchmarks launch, in several processes, into a cache.

    python benchmarks/compile_ahead.py [--jobs N] [--device cuda]

Compiling takes seconds a kernel and one core; a run of minutes on a lent GPU has no time to do it
one after the other. Each process runs forward and backward once at a part of the shapes.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the script runs from a checkout, installed or not

import torch  # noqa: E402

from benchmarks.bench_spectral_conv import inputs, thunk  # noqa: E402
from benchmarks.host_cuda import dry_run  # noqa: E402
from benchmarks.peers import PEERS, PRECISIONS, Unavailable, arithmetic  # noqa: E402
from benchmarks.shapes import GPU_SHAPES, Shape  # noqa: E402


def parts() -> list[tuple[str, list[Shape]]]:
    """Precision and shapes of each process: hardly a kernel is in two of them."""
    shapes = [shape.small() for shape in GPU_SHAPES[:1]] if dry_run() else list(GPU_SHAPES)
    short = [shape for shape in shapes if shape.T <= 8]
    long = [shape for shape in shapes if shape.T > 8]
    return [(precision, some) for some in (short, long) for precision in PRECISIONS["cuda"] if some]


def compile_part(index: int, device: torch.device) -> int:
    """Run one part; the number of shapes that failed."""
    precision, shapes = parts()[index]
    peer = next(peer for peer in PEERS if peer.name == "dsno_kernels[triton]")
    failed = 0
    for shape in shapes:
        try:
            call = peer.make(shape, precision, device)
            tensors = inputs(shape, arithmetic(precision)[2], device)
            thunk(call, "forward_backward", tensors)()
            thunk(call, "forward", tensors)()
        except Unavailable as reason:
            print(f"compile_ahead: {reason}")
            return 0
        except Exception as error:  # the benchmarks say more about it; the other shapes go on
            print(f"compile_ahead: {shape.name} {precision}: {error!r}", flush=True)
            failed += 1
    print(f"compile_ahead: {precision}: {len(shapes) - failed} shapes", flush=True)
    return failed


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=max(1, (os.cpu_count() or 2) - 1))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--part", type=int, help="run this part only, in this process")
    options = parser.parse_args(argv)
    if options.part is not None:
        return min(1, compile_part(options.part, torch.device(options.device)))
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
