"""The integrator steps on CUDA: parameters for the kernels of csrc/cuda/exp_step.cuh and its
neighbors.

Every tensor is brought into the memory order of the result (a copy only where it differs), so that
the kernels see `[samples][size]`. Coefficients that are numbers travel in the parameters; others
stay where they are, and the kernel looks up the row. The ops are shared by both launchers (the
compiled extension and CuPy) and the tests; signatures are those of `reference_steps`, where `out`
and `new_base` name memory to write into.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dsno_kernels import _dense

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

_EXP_STEP = struct.Struct(f"<{5 + 2 * (2 + _TERMS) + 8}q{_COLUMNS}d")


def source_of(kernel: str) -> str:
    """The file of a kernel in csrc/cuda."""
    return next(f"{op}.cuh" for op in ("exp_step",) if kernel.startswith(op))


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
