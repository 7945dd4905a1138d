"""The integrator steps on CUDA: parameters for the kernels of csrc/cuda/exp_step.cuh and its
neighbors.

Every tensor is brought into the memory order of the result (a copy only where it differs), so that
the kernels see `[samples][size]`. Coefficients that are numbers travel in the parameters; others
stay where they are, and the kernel looks up the row. The ops are shared by both launchers (the
compiled extension and CuPy) and the tests; signatures are those of `reference_steps`, and `out` is
memory to write into.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dsno_kernels import _dense
from dsno_kernels.backends._solver_step import NEW, Memory, Step

# Launches a kernel: its name, the grid, the bytes of its parameters, and the tensors that they
# point to.
Launch = Callable[[str, int, bytes, Sequence[Tensor]], None]

# enum DType of steps.cuh.
_CODES = {
    torch.float32: 0,
    torch.float16: 1,
    torch.bfloat16: 2,
    torch.float64: 3,
    torch.int32: 4,
    torch.int64: 5,
}
_THREADS, _TERMS, _ORDER, _COLUMNS = 128, 10, 8, 22  # kThreads, kMaxTerms, kMaxOrder, kMaxColumns
# Enough to fill every GPU several times over; each block then walks over its part of a sample.
_BLOCKS = 16384
_MAX_GRID = 2**31 - 1

# Of abs_rank: the bits of infinity; elements that are worth a block, and blocks that fill a GPU (to
# be measured); kCounts.
_INFINITY = {
    torch.float16: 0x7C00,
    torch.bfloat16: 0x7F80,
    torch.float32: 0x7F800000,
    torch.float64: 0x7FF0 << 48,
}
_SHARE, _FILL, _COUNTS = 16384, 512, 257

# Vectors of a thread in a round of exp_step_backward.
_ROUNDS = {"f32_v4": 4, "any_v8": 2, "any_v1": 8, "f64_v2": 2, "f64_v1": 4}

_DOTS = struct.Struct("<5q")
_BACKWARD = struct.Struct(f"<{5 + 2 * (1 + 2 * _TERMS) + 8}q{_COLUMNS}d")
_SOLVER_STEP = struct.Struct(f"<{8 + 2 * (13 + _ORDER) + 8}q{_COLUMNS + 3}d")
_ABS_RANK = struct.Struct("<6qQ4q")
_EXP_STEP = struct.Struct(f"<{5 + 2 * (2 + _TERMS) + 8}q{_COLUMNS}d")


def source_of(kernel: str) -> str:
    """The file of a kernel in csrc/cuda."""
    return next(
        f"{op}.cuh"
        for op in ("exp_step", "solver_step", "abs_rank", "denoising")
        if kernel.startswith(op)
    )


def _data(x: Tensor | None) -> tuple[int, int]:
    """The words of a struct Data."""
    return (0, 0) if x is None else (x.data_ptr(), _CODES[x.dtype])


def _datas(tensors: Sequence[Tensor | None], count: int) -> list[int]:
    words: list[int] = []
    for x in tensors:
        words += _data(x)
    return words + [0] * (2 * (count - len(tensors)))


def _rows(
    table: Tensor | None, index: Tensor | None, values: Sequence[float]
) -> tuple[int | float, ...]:
    """The words of a struct Rows."""
    numbers = (*values, *[0.0] * (_COLUMNS - len(values)))
    if table is None:
        return (0,) * 8 + numbers
    stride_row, stride_column = table.stride() if table.ndim == 2 else (0, table.stride(0))
    stride_index = index.stride(0) if index is not None and index.ndim else 0
    strides = (table.shape[0], stride_row, stride_column)
    return (*_data(table), *strides, *_data(index), stride_index, *numbers)


def _per_sample(coefficients: Tensor | None, index: Tensor | None) -> bool:
    if index is not None:
        return index.ndim == 1
    return coefficients is not None and coefficients.ndim == 2


def _kind(tensors: Sequence[Tensor | None]) -> tuple[str, int]:
    """The kernel for these tensors, and how many elements of theirs move together."""
    given = [x for x in tensors if x is not None]
    aligned = all(x.data_ptr() % 16 == 0 for x in given)
    dtypes = {x.dtype for x in given}
    if torch.float64 in dtypes:
        return ("f64_v2", 2) if aligned else ("f64_v1", 1)
    if not aligned:
        return "any_v1", 1
    return ("f32_v4", 4) if dtypes == {torch.float32} else ("any_v8", 8)


def _parts(samples: int, size: int, span: int) -> int:
    """Blocks that share a sample, of which each has at least one span of elements to do."""
    return max(1, min(-(-size // span), _BLOCKS // samples))


def _present(*tensors: Tensor | None) -> list[Tensor]:
    return [x for x in tensors if x is not None]


class Steps:
    """The ops, of one launcher."""

    def __init__(self, launch: Launch) -> None:
        self.launch = launch

    @torch.no_grad()
    def exp_step(
        self,
        tensors: Sequence[Tensor],
        *,
        coefficients: Tensor | None,
        values: Sequence[float],
        index: Tensor | None,
        head: Tensor | None,
        ring: int,
        out_dtype: torch.dtype,
        out: Tensor | None = None,
    ) -> Tensor:
        per_sample = _per_sample(coefficients, index)
        y = _dense.output_like(tensors[0], out_dtype, per_sample) if out is None else out
        terms = [_dense.laid_out_like(x, y) for x in tensors]
        samples, elements = y.shape[0] if per_sample else 1, y.numel()
        size = elements // samples
        kind, width = _kind([y, *terms])
        parts = _parts(samples, size, _THREADS * width)
        params = _EXP_STEP.pack(
            samples, size, parts, len(terms), ring, *_data(head), *_data(y),
            *_datas(terms, _TERMS), *_rows(coefficients, index, values),
        )  # fmt: skip
        touched = _present(y, *terms, coefficients, index, head)
        self.launch(f"exp_step_{kind}", min(samples * parts, _MAX_GRID), params, touched)
        return y

    @torch.no_grad()
    def exp_step_backward(
        self,
        g: Tensor,
        tensors: Sequence[Tensor],
        *,
        coefficients: Tensor | None,
        values: Sequence[float],
        index: Tensor | None,
        columns: Sequence[int],
        dtypes: Sequence[torch.dtype],
        per_sample: bool,
    ) -> tuple[list[Tensor], Tensor]:
        split = per_sample or _per_sample(coefficients, index)
        layout = _dense.output_like(g, g.dtype, split)
        g = _dense.laid_out_like(g, layout)
        vs = [_dense.laid_out_like(v, layout) for v in tensors]
        grads = [
            torch.empty_strided(layout.shape, layout.stride(), dtype=dtype, device=g.device)
            for dtype in dtypes
        ]
        samples, elements = g.shape[0] if split else 1, g.numel()
        size, terms = elements // samples, max(len(vs), max(columns, default=-1) + 1)
        kind, width = _kind([g, *vs, *grads])
        parts = _parts(samples, size, _THREADS * width * _ROUNDS[kind])
        shares = g.new_empty((samples * parts, terms) if vs else (0,), dtype=torch.float64)
        by_column = dict(zip(columns, grads, strict=True))
        params = _BACKWARD.pack(
            samples, size, parts, terms, shares.data_ptr(), *_data(g), *_datas(vs, _TERMS),
            *_datas([by_column.get(j) for j in range(terms)], _TERMS),
            *_rows(coefficients, index, values),
        )  # fmt: skip
        touched = _present(g, *vs, *grads, shares, coefficients, index)
        self.launch(f"exp_step_backward_{kind}", min(samples * parts, _MAX_GRID), params, touched)
        outputs = samples if per_sample else 1
        dots = g.new_empty((outputs, terms if vs else 0), dtype=torch.float64)
        if vs:
            blocks = samples * parts // outputs
            params = _DOTS.pack(shares.data_ptr(), dots.data_ptr(), outputs, blocks, terms)
            self.launch("exp_step_dots", min(dots.numel(), _MAX_GRID), params, [dots, shares])
        return grads, dots[:, : len(vs)].contiguous()

    @torch.no_grad()
    def solver_step(
        self, step: Step, dtypes: Sequence[torch.dtype | None], memory: Memory = NEW
    ) -> list[Tensor | None]:
        point, head, guidance, K = step.point, step.head, step.guidance, step.order
        new_base, ring, slot = memory
        layout = _dense.output_like(point, point.dtype, step.per_sample)
        entries = list(step.history if head is not None else step.history[: K - 1])
        inputs = [point, step.output, step.unconditional, step.base, step.noise, *entries]

        # h_0 goes into one slot of the ring, which the head chooses on the device.
        entry, entry_slots = None, 0
        if ring is not None and _dense.same_layout(ring[0], layout):
            if head is None:
                entry = ring[slot]
                inputs = _dense.untangled(inputs, entry)
            else:
                entry, entry_slots = ring[0], ring.stride(0) * ring.element_size()
                inputs[:5] = _dense.untangled(inputs[:5], ring)
        in_place = None
        if new_base is not None and _dense.same_layout(new_base, layout):
            in_place = new_base
            inputs = _dense.untangled(inputs, in_place)
        inputs = [None if x is None else _dense.laid_out_like(x, layout) for x in inputs]

        wanted = list(dtypes)
        wanted[0] = new_base.dtype if new_base is not None else dtypes[0]
        wanted[2] = ring.dtype if ring is not None else dtypes[2]
        given = [in_place, None, entry, None]
        outputs = [
            x
            if x is not None or dtype is None
            else torch.empty_strided(
                layout.shape, layout.stride(), dtype=dtype, device=point.device
            )
            for x, dtype in zip(given, wanted, strict=True)
        ]
        scale = None if step.scale is None else step.scale.contiguous()
        seed = None if step.seed is None else step.seed.contiguous()
        samples, elements = point.shape[0] if step.per_sample else 1, point.numel()
        size = elements // samples
        kind, width = _kind([*inputs, *outputs])
        parts = _parts(samples, size, _THREADS * width)
        params = _SOLVER_STEP.pack(
            samples, size, parts, K, step.looks_ahead, len(entries), entry_slots,
            guidance.stride(0) if guidance is not None and guidance.ndim else 0,
            *_data(head), *_datas(inputs[:5], 5), *_datas(inputs[5:], _ORDER),
            *_datas(outputs, 4), *_datas([seed, guidance, scale], 3),
            *_rows(step.table, step.index, step.values), step.guidance_value,
            -math.inf if step.low is None else step.low,
            math.inf if step.high is None else step.high,
        )  # fmt: skip
        small = (head, seed, guidance, scale, step.table, step.index)
        touched = _present(*inputs, *outputs, *small)
        self.launch(f"solver_step_{kind}", min(samples * parts, _MAX_GRID), params, touched)

        if new_base is not None and in_place is None and outputs[0] is not None:
            new_base.copy_(outputs[0])
        if ring is not None and entry is None and outputs[2] is not None:
            if head is None:
                ring[slot].copy_(outputs[2])
            else:
                after = (head + 1) % ring.shape[0]
                ring.index_copy_(0, after.reshape(1), outputs[2].unsqueeze(0))
        return [
            None if dtype is None or x is None else x.to(dtype)
            for x, dtype in zip(outputs, dtypes, strict=True)
        ]

    @torch.no_grad()
    def abs_rank(self, x: Tensor, rank: int) -> Tensor:
        x = x.contiguous()
        if x.data_ptr() % 16:  # vectors count from the start of the tensor
            x = x.clone()
        samples, size, width = x.shape[0], x[0].numel(), x.element_size()
        passes = width + ((size - 1).bit_length() + 7) // 8
        parts = max(1, min(-(-size // _SHARE), _FILL // samples))
        # One launch; or one for each digit, between which the blocks of a sample meet.
        blocks = [1] if parts == 1 else [*[parts] * passes, 1]
        kernel = f"abs_rank_w{width}" if parts == 1 else f"abs_rank_pass_w{width}"
        places = x.new_empty((samples, 2), dtype=torch.int64)
        shape = (0 if parts == 1 else passes, samples, 2)
        counts = x.new_zeros((*shape, _COUNTS), dtype=torch.int64)
        targets = x.new_empty((*shape, 3), dtype=torch.int64)
        for digit, share in enumerate(blocks):
            params = _ABS_RANK.pack(
                samples, size, share, rank, passes, digit, 2 * _INFINITY[x.dtype],
                *(t.data_ptr() for t in (x, counts, targets, places)),
            )  # fmt: skip
            grid = min(samples * share, _MAX_GRID)
            self.launch(kernel, grid, params, [x, counts, targets, places])
        return places
