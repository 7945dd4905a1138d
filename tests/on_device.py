"""Where the GPU tests run: on a GPU or, with `DSNO_KERNELS_DRY_RUN=1`, on the CPU in its place.

A dry run shows that the tests themselves are right before they meet a GPU.
"""

from __future__ import annotations

import importlib

import pytest
import torch

from benchmarks.host_cuda import cuda, dry_run
from dsno_kernels import backends
from dsno_kernels.backends import Request

__all__ = ["DEVICE", "DRY_RUN", "cuda", "marks", "needs_memory", "serving", "sized"]

DRY_RUN = dry_run()
DEVICE = torch.device("cpu" if DRY_RUN else "cuda")
NAMES = ("triton", "cuda", "cupy", "cpu", "reference")

marks = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not (DRY_RUN or torch.cuda.is_available()), reason="PyTorch sees no CUDA device here"
    ),
]


def serving(op: str) -> list[str]:
    """The backends that have an op and can run it on the device."""
    if not (DRY_RUN or torch.cuda.is_available()):
        return []
    request = Request(op, DEVICE, torch.float32)
    return [
        name
        for name in NAMES
        if backends.unsupported(name, request) is None
        and hasattr(importlib.import_module(f"dsno_kernels.backends.{name}"), op)
    ]


def needs_memory(gib: int) -> None:
    """Skip where the GPU has less free memory; a dry run takes small tensors (`sized`)."""
    if not DRY_RUN and cuda().mem_get_info()[0] < gib * 2**30:
        pytest.skip(f"needs {gib} GiB of free GPU memory")


def sized(*shape: int) -> tuple[int, ...]:
    """The shape; in a dry run a small one, for the interpreter's sake."""
    return tuple(min(length, 6) for length in shape) if DRY_RUN else shape
