"""Plans of the CUDA C++ transforms (csrc/cuda/truncated_fft.cuh), and their tables.

A transform is planned here, once for each shape: the axes beside the transformed one become at most
three, the last of them side by side in memory where possible, and the plan names a kernel, its grid
and its numbers. Both launchers (the compiled extension and CuPy) and the tests, on the CPU, run the
same plans.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dsno_kernels._modes import alpha, max_modes
from dsno_kernels.backends._launch import not_while_capturing

THREADS = 128  # kThreads of common.cuh
# Blocks that keep the largest GPU busy; below that, several blocks share a tile of columns.
BUSY = 1024
# Transforms of contiguous signals at least this long go through shared memory.
ROWS_FROM = 64
# The types of a signal; its spectrum is float32, or float64 of float64.
TYPES = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16", torch.float64: "f64"}
_SIZES = {"f32": 4, "f16": 2, "bf16": 2, "f64": 8}

# The column kernels of truncated_fft.cuh, preferred first: (columns, outputs) of one thread.
VARIANTS = {
    (False, "f32"): ((4, 4), (4, 8), (1, 8)),
    (False, "f16"): ((8, 4), (4, 8), (1, 8)),
    (False, "bf16"): ((8, 4), (4, 8), (1, 8)),
    (False, "f64"): ((2, 8), (1, 8)),
    (True, "f32"): ((4, 4), (4, 8), (1, 8)),
    (True, "f16"): ((4, 4), (4, 8), (1, 8)),
    (True, "bf16"): ((4, 4), (4, 8), (1, 8)),
    (True, "f64"): ((2, 8), (1, 8)),
}


class Plan(NamedTuple):
    """A launch; `numbers` are the fields of TruncatedFftParams after its pointers, in order."""

    kernel: str
    grid: int
    numbers: tuple[int, ...]


class Axis(NamedTuple):
    """An axis beside the transformed one; strides of spectra count pairs on the way out of a
    forward transform, else elements.
    """

    size: int
    stride_in: int
    stride_out: int


_NONE = Axis(1, 0, 0)


def arranged(axes: Sequence[Axis], inverse: bool) -> tuple[Axis, Axis, Axis]:
    """The axes longer than 1, those that continue each other joined, closest in memory last.

    Memory is that of the signal, which is larger than the spectrum.
    """

    def distance(axis: Axis) -> float:
        return (axis.stride_out if inverse else axis.stride_in) or math.inf

    joined: list[Axis] = []
    for axis in sorted((a for a in axes if a.size > 1), key=distance, reverse=True):
        last = joined[-1] if joined else _NONE
        if last[1:] == (axis.size * axis.stride_in, axis.size * axis.stride_out):
            joined[-1] = Axis(last.size * axis.size, *axis[1:])
        else:
            joined.append(axis)
    outer, middle, column = [_NONE] * (3 - len(joined)) + joined
    return outer, middle, column


@functools.lru_cache(maxsize=4096)
def plan(
    kind: str,
    inverse: bool,
    n: int,
    modes: int,
    axes: tuple[Axis, ...],
    step_in: int,
    part: int,
    step_out: int,
    offset: int,
) -> Plan:
    """How to transform a signal of type `kind` and length n to its first bins, or back.

    Args:
        axes: the (at most three) axes beside the transformed one.
        step_in, step_out: strides of the transformed axis, as in `Axis`.
        part: inverse, the stride from real to imaginary parts.
        offset: address of the first element of the input modulo 16 bytes.
    """
    outputs = max_modes(n) if inverse else modes
    outer, middle, column = beside = arranged(axes, inverse)
    name = f"truncated_{'irfft' if inverse else 'rfft'}"
    pitch = -(-outputs // 8) * 8
    numbers = (
        n, modes, pitch, *(axis.size for axis in beside),
        *(axis.stride_in for axis in beside), step_in, part,
        *(axis.stride_out for axis in beside), step_out,
    )  # fmt: skip
    step, stride = (step_out, column.stride_out) if inverse else (step_in, column.stride_in)
    if step == 1 and n >= ROWS_FROM and not (column.size > 1 and stride == 1):
        tiles = -(-outer.size * middle.size * column.size // (4 if kind == "f64" else 8))
        lanes = min(THREADS, 1 << (outputs - 1).bit_length())
        while lanes > 8 and tiles * -(-outputs // lanes) < BUSY // 4:  # blocks of few outputs
            lanes //= 2
        splits = -(-outputs // lanes)
        return Plan(f"{name}_rows_{kind}", tiles * splits, (*numbers, splits, lanes))
    v, c = _variant(kind, inverse, outputs, beside, step_in, part, step_out, offset)
    tiles = -(-outer.size * middle.size * (column.size // v) // THREADS)
    splits = min(-(-outputs // c), max(1, BUSY // tiles))
    return Plan(f"{name}_columns_{kind}_v{v}_c{c}", tiles * splits, (*numbers, splits, 0))


def _variant(
    kind: str,
    inverse: bool,
    outputs: int,
    beside: tuple[Axis, Axis, Axis],
    step_in: int,
    part: int,
    step_out: int,
    offset: int,
) -> tuple[int, int]:
    """Columns and outputs of a thread: the first entry of VARIANTS that fits size and alignment."""
    outer, middle, column = beside
    signal, pair = _SIZES[kind], 16 if kind == "f64" else 8
    lead = 2 if inverse else 1
    dense = column.stride_in == lead and column.stride_out == 1 and (part == 1 or not inverse)
    strides_in = [step_in, outer.stride_in, middle.stride_in]
    strides_out = [step_out, outer.stride_out, middle.stride_out]
    bytes_in = [offset, *(stride * (pair // 2 if inverse else signal) for stride in strides_in)]
    bytes_out = [stride * (signal if inverse else pair) for stride in strides_out]
    for v, c in VARIANTS[inverse, kind]:
        align_signal, align_pair = min(16, v * signal), min(16, v * pair)
        align_in, align_out = (align_pair, align_signal) if inverse else (align_signal, align_pair)
        fits = v == 1 or (
            dense
            and column.size % v == 0
            and all(stride % align_in == 0 for stride in bytes_in)
            and all(stride % align_out == 0 for stride in bytes_out)
        )
        if fits and (c == 8 or outputs <= c):
            return v, c
    raise AssertionError(kind)


def twiddles(n: int, modes: int, inverse: bool, scale_length: int = 0) -> Tensor:
    """The table of (c, s) in float64: `[pairs, pitch, 2]`, or inverse `[modes, pitch, 2]`.

    c = a cos(2 pi k t / n) and s = -a sin(2 pi k t / n), with a = alpha_k / scale_length (alpha of
    that length), or 1 where it is 0. A row holds all bins (inverse: all pairs of times) and ends in
    zeros up to a multiple of 8, the most outputs of one thread.
    """
    t, k = torch.arange(n // 2 + 1), torch.arange(modes)
    # Reduced to one turn in integers, so that long transforms stay exact.
    phase = (t[:, None] * k % n).to(torch.float64) * (2.0 * math.pi / n)  # [pairs, modes]
    sine = -torch.sin(phase)
    sine[(2 * t % n) == 0] = 0.0
    sine[:, (2 * k % n) == 0] = 0.0
    table = torch.stack((torch.cos(phase), sine), -1)
    if scale_length:
        factors = [alpha(i, scale_length) / scale_length for i in range(modes)]
        table = table * torch.tensor(factors, dtype=torch.float64)[:, None]
    if inverse:
        table = table.transpose(0, 1)
    return F.pad(table, (0, 0, 0, -table.shape[1] % 8)).contiguous()


# Tables are never freed: a captured CUDA graph or another stream may still read one.
@functools.cache
def twiddles_on(
    n: int, modes: int, inverse: bool, scale_length: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """`twiddles` on a device."""
    not_while_capturing(device, f"transform of length {n} with {modes} modes uploads its table")
    return twiddles(n, modes, inverse, scale_length).to(device, dtype)


@functools.cache
def weight_factors_on(T: int, n: int, modes: int, conjugate: bool, device: torch.device) -> Tensor:
    """Factors of the weight gradient, float32 `[K, 2]`: alpha_k / n, negative for imaginary parts
    of conjugates, 0 for dead ones (of bins that are real in both x and its output).
    """
    not_while_capturing(device, f"weight gradient with {modes} modes uploads its factors")
    factors = torch.tensor([[alpha(k, n) / n] * 2 for k in range(modes)], dtype=torch.float64)
    k = torch.arange(modes)
    if conjugate:
        factors[:, 1] *= -1
    factors[(2 * k % T == 0) & (2 * k % n == 0), 1] = 0.0
    return factors.to(device, torch.float32)
