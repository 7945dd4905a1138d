"""Dense layouts of elementwise ops: all tensors of a call in the memory order of the result.

The result lies in memory as x does where x is dense, else densely in the order of x's axes. A row
of coefficients for each sample asks for more: the batch axis outermost, so that a sample is one
stretch of memory.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# Dtypes of results as the ops take several: PyTorch cannot check a schema with a list of dtypes.
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def output_like(x: Tensor, dtype: torch.dtype, per_sample: bool = False) -> Tensor:
    """An uninitialized result for the input x; also for fake tensors."""
    y = torch.empty_like(x, dtype=dtype)
    return y if not per_sample or batch_outermost(y) else x.new_empty(x.shape, dtype=dtype)


def dense_strides(x: Tensor, per_sample: bool = False) -> tuple[int, ...]:
    """The strides of `output_like(x)`."""
    if x.is_contiguous():
        return x.stride()
    return output_like(torch.empty_like(x, device="meta"), x.dtype, per_sample).stride()


def batch_outermost(y: Tensor) -> bool:
    """Whether each sample of a dense tensor is one stretch of memory."""
    return y.shape[0] == 1 or y.stride(0) * y.shape[0] == y.numel()


def is_dense(x: Tensor, per_sample: bool = False) -> bool:
    """Whether x lies in memory as `output_like(x)` would."""
    layout = torch.empty_like(x, device="meta")
    return same_layout(x, layout) and (not per_sample or batch_outermost(x))


def has_strides(x: Tensor, strides: tuple[int, ...]) -> bool:
    """Whether x has these strides, but for those of axes of size 1."""
    own = x.stride()
    return own == strides or all(
        size == 1 or s == t for size, s, t in zip(x.shape, own, strides, strict=True)
    )


def same_layout(x: Tensor, y: Tensor) -> bool:
    """Whether tensors of one shape lie in memory alike."""
    return has_strides(x, y.stride())


def in_order(x: Tensor, strides: tuple[int, ...]) -> Tensor:
    """x itself where it lies in memory with these strides, else a copy that does."""
    if has_strides(x, strides):
        return x
    return torch.empty_strided(x.shape, strides, dtype=x.dtype, device=x.device).copy_(x)


def laid_out_like(x: Tensor, y: Tensor) -> Tensor:
    """x itself where it lies in memory as y does, else a copy that does."""
    return in_order(x, y.stride())


def untangled(tensors: Sequence[Tensor | None], out: Tensor) -> list[Tensor | None]:
    """The tensors, copied where they overlap `out` otherwise than element on element."""
    return [
        x.clone() if x is not None and _overlaps(x, out) and not _coincides(x, out) else x
        for x in tensors
    ]


def _coincides(x: Tensor, out: Tensor) -> bool:
    return x.data_ptr() == out.data_ptr() and x.dtype == out.dtype and same_layout(x, out)


def _overlaps(x: Tensor, out: Tensor) -> bool:
    (x_begin, x_end), (begin, end) = _extent(x), _extent(out)
    return x_begin < end and begin < x_end


def _extent(x: Tensor) -> tuple[int, int]:
    """The addresses between which x lies."""
    last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return x.data_ptr(), x.data_ptr() + (last + 1) * x.element_size()
