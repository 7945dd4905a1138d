"""Several gloo processes on this machine, each running one function of a test module."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def processes() -> Any:
    """What starts processes for tests: forks of a server that has imported what takes seconds and
    has computed nothing.
    """
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(
        ["dsno_kernels.training.loop", "torch._dynamo", "matplotlib.figure", "safetensors.torch"]
    )
    return context


def run(worker: Callable[..., Any], folder: Path, *args: Any, world: int = 2) -> list[Any]:
    """`worker(*args)` in `world` processes of one group; what each returned, in order of rank."""
    meeting = folder / "meeting"
    meeting.unlink(missing_ok=True)
    processes()
    mp.start_processes(  # type: ignore[no-untyped-call]
        _one, (worker, folder, world, args), nprocs=world, start_method="forkserver"
    )
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(world)]


def _one(
    rank: int, worker: Callable[..., Any], folder: Path, world: int, args: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    dist.init_process_group(
        "gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=world
    )
    try:
        torch.save(worker(*args), folder / f"rank{rank}.pt")
        dist.barrier()
    finally:
        dist.destroy_process_group()
