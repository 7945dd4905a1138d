"""The CUDA C++ backend: the truncated transforms along any axis (csrc/cuda/truncated_fft.cuh).

A transform is planned here, once for each shape: the axes before and after the transformed one
become a batch and a column axis, one of them side by side in memory where possible, and the plan
names a kernel, its grid and its numbers. The tests run the same plans on the CPU.
"""

from __future__ import annotations

import functools
import math
from types import ModuleType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dsno_kernels._layout import merged
from dsno_kernels._modes import alpha, max_modes
from dsno_kernels.backends import Request
from dsno_kernels.backends._launch import on_device, raw_stream, uncovered_capability

THREADS = 128  # kThreads of common.cuh
# Blocks that keep the largest GPU busy; below that, several blocks share a tile of columns.
BUSY = 1024
# Transforms of contiguous signals at least this long go through shared memory.
ROWS_FROM = 64
TYPES = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16", torch.float64: "f64"}


# The column kernels of truncated_fft.cuh, preferred first: (columns, outputs) of one thread.
VARIANTS = {
    (False, "f32"): ((4, 4), (4, 8), (1, 8)),
    (False, "f16"): ((8, 4), (4, 8), (1, 8)),
    (False, "bf16"): ((8, 4), (4, 8), (1, 8)),
    (False, "f64"): ((2, 8), (1, 8)),
    (True, "f32"): ((4, 4), (4, 8), (1, 8)),
    (True, "f16"): ((4, 8), (1, 8)),
    (True, "bf16"): ((4, 8), (1, 8)),
    (True, "f64"): ((2, 8), (1, 8)),
}


class Plan(NamedTuple):
    """A launch; `numbers` are the fields of TruncatedFftParams after its pointers, in order."""

    kernel: str
    grid: int
    numbers: tuple[int, ...]


@functools.lru_cache(maxsize=1)
def _extension() -> tuple[ModuleType | None, str | None]:
    """The compiled module and None, or None and why it is not there."""
    how = "build it with `pip install -e . --no-build-isolation` (nvcc on PATH or in CUDA_HOME)"
    try:
        from dsno_kernels import _C
    except ImportError as error:
        return None, f"the extension dsno_kernels._C is missing ({error}); {how}"
    if not _C.cuda_version:
        return None, f"the extension was built without CUDA; {how}"
    if not hasattr(_C, "cuda_truncated_fft"):
        return None, f"the extension is older than this source; {how}"
    return _C, None


def _driver_too_old(driver: int, built: str) -> str | None:
    """A driver serves device code of its own major CUDA version and of older ones."""
    if driver // 1000 >= int(built.split(".")[0]):
        return None
    version = f"CUDA {driver // 1000}.{driver % 1000 // 10}" if driver else "no CUDA version"
    return f"it was built with CUDA {built}, and the driver serves {version}; update the driver"


def unsupported(request: Request) -> str | None:
    if not request.op.startswith("truncated_"):
        return "the CUDA C++ backend holds the truncated transforms only"
    if request.device.type != "cuda":
        return "it needs CUDA tensors"
    if request.dtype not in TYPES:
        return f"{request.dtype} is not one of {', '.join(map(str, TYPES))}"
    module, reason = _extension()
    if module is None:
        return reason
    return _driver_too_old(
        module.cuda_driver_version(), module.cuda_version
    ) or uncovered_capability(torch.cuda.get_device_capability(request.device), module.cuda_archs)


def twiddles(n: int, modes: int, inverse: bool) -> Tensor:
    """The table of (c, s) in float64: `[pairs, pitch, 2]`, or inverse `[modes, pitch, 2]`.

    c = a cos(2 pi k t / n) and s = -a sin(2 pi k t / n), with a = 1 forward and alpha_k / n
    inverse. A row holds all bins (inverse: all pairs of times) and ends in zeros up to a multiple
    of 8, the most outputs of one thread.
    """
    t, k = torch.arange(n // 2 + 1), torch.arange(modes)
    # Reduced to one turn in integers, so that long transforms stay exact.
    phase = (t[:, None] * k % n).to(torch.float64) * (2.0 * math.pi / n)  # [pairs, modes]
    sine = -torch.sin(phase)
    sine[(2 * t % n) == 0] = 0.0
    sine[:, (2 * k % n) == 0] = 0.0
    table = torch.stack((torch.cos(phase), sine), -1)
    if inverse:
        scale = torch.tensor([alpha(i, n) / n for i in range(modes)], dtype=torch.float64)
        table = (table * scale[:, None]).transpose(0, 1)
    return F.pad(table, (0, 0, 0, -table.shape[1] % 8)).contiguous()


@functools.lru_cache(maxsize=64)
def _table(n: int, modes: int, inverse: bool, dtype: torch.dtype, device: torch.device) -> Tensor:
    return twiddles(n, modes, inverse).to(device, dtype)


class _Axis(NamedTuple):
    """The axes on one side of the transformed one, merged."""

    size: int
    stride_in: int
    stride_out: int


def _variant(
    kind: str,
    inverse: bool,
    outputs: int,
    batch: _Axis,
    column: _Axis,
    step: int,
    part: int,
    offset: int,
) -> tuple[int, int]:
    """Columns and outputs of a thread: the first entry of VARIANTS that fits size and alignment."""
    item = {"f64": 8, "f32": 4}.get(kind, 2)
    lead = 2 if inverse else 1
    dense = column.stride_in == lead and column.stride_out == 1 and (part == 1 or not inverse)
    for v, c in VARIANTS[inverse, kind]:
        align = min(16, v * lead * item)
        strides = (offset, step * item, batch.stride_in * item if batch.size > 1 else 0)
        fits = v == 1 or (
            dense and column.size % v == 0 and all(stride % align == 0 for stride in strides)
        )
        if fits and (c == 8 or outputs <= c):
            return v, c
    raise AssertionError(kind)


@functools.lru_cache(maxsize=1024)
def plan(
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    kind: str,
    dim: int,
    count: int,
    inverse: bool,
    offset: int,
) -> Plan | None:
    """How to transform axis `dim`; None where the axes before or after it have no one stride.

    Args:
        shape, strides: of x or, inverse, of the spectrum with its last axis of pairs.
        count: modes to keep or, inverse, the output length n.
        offset: address of the first element modulo 16 bytes.
    """
    axes = len(shape) - inverse
    outer, inner = (
        merged(shape, strides, range(dim)),
        merged(shape, strides, range(dim + 1, axes)),
    )
    if outer is None or inner is None:
        return None
    n, modes = (count, shape[dim]) if inverse else (shape[dim], count)
    pairs = max_modes(n)
    terms_out = pairs if inverse else modes
    step, part = strides[dim], strides[-1] if inverse else 0
    batch = _Axis(outer[0], outer[1], count * inner[0])
    column = _Axis(inner[0], inner[1], 1)
    if column.size == 1 or (batch.size > 1 and 0 < batch.stride_in < column.stride_in):
        batch, column = column, batch
    numbers = (
        n, modes, -(-terms_out // 8) * 8, batch.size, column.size,
        batch.stride_in, column.stride_in, step, part,
        batch.stride_out, column.stride_out, inner[0],
    )  # fmt: skip
    name = f"truncated_{'irfft' if inverse else 'rfft'}"
    contiguous = (
        inner[0] == 1 if inverse else step == 1 and not (column.size > 1 and column.stride_in == 1)
    )
    if contiguous and n >= ROWS_FROM:
        tiles = -(-batch.size * column.size // (4 if kind == "f64" else 8))
        lanes = min(THREADS, 1 << (terms_out - 1).bit_length())
        while lanes > 8 and tiles * -(-terms_out // lanes) < BUSY // 4:  # blocks of few outputs
            lanes //= 2
        splits = -(-terms_out // lanes)
        return Plan(f"{name}_rows_{kind}", tiles * splits, (*numbers, splits, lanes))
    v, c = _variant(kind, inverse, terms_out, batch, column, step, part, offset)
    tiles = -(-batch.size * (column.size // v) // THREADS)
    splits = min(-(-terms_out // c), max(1, BUSY // tiles))
    return Plan(f"{name}_columns_{kind}_v{v}_c{c}", tiles * splits, (*numbers, splits, 0))


@functools.lru_cache(maxsize=1)
def _kernel_ids() -> dict[str, int]:
    module, reason = _extension()
    assert module is not None, reason
    return {name: place for place, name in enumerate(module.cuda_truncated_fft_kernels())}


def _transform(x: Tensor, dim: int, count: int, inverse: bool) -> Tensor:
    """Plan, allocate and launch; the output is contiguous."""
    dim %= x.ndim - inverse
    kind = TYPES[x.dtype]
    chosen = plan(x.shape, x.stride(), kind, dim, count, inverse, x.data_ptr() % 16)
    if chosen is None:
        x = x.contiguous()
        chosen = plan(x.shape, x.stride(), kind, dim, count, inverse, x.data_ptr() % 16)
        assert chosen is not None
    dtype = torch.float64 if kind == "f64" else torch.float32
    shape = [*x.shape[:dim], count, *x.shape[dim + 1 :]]
    output = x.new_empty(shape if inverse else [*shape, 2], dtype=dtype)
    table = _table(chosen.numbers[0], chosen.numbers[1], inverse, dtype, x.device)
    module, _ = _extension()
    assert module is not None
    with on_device(x.device):
        module.cuda_truncated_fft(
            _kernel_ids()[chosen.kernel], chosen.grid,
            x.data_ptr(), output.data_ptr(), table.data_ptr(), chosen.numbers, raw_stream(x.device),
        )  # fmt: skip
    return output


def truncated_rfft(x: Tensor, modes: int, *, dim: int) -> Tensor:
    """The first `modes` bins of `rfft` along `dim`, as real pairs `[..., K, ..., 2]`."""
    return _transform(x, dim, modes, inverse=False)


def truncated_irfft(spectrum: Tensor, n: int, *, dim: int) -> Tensor:
    """`irfft` to length n of the first bins, real pairs `[..., K, ..., 2]`; other bins are zero."""
    return _transform(spectrum, dim, n, inverse=True)
