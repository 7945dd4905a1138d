"""Checks that the steps share: history, ring buffers, tables, memory to write into."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import numpy as np
import torch
from torch import Tensor

from dsno_kernels.functional import checks
from dsno_kernels.ops import under_transform
from dsno_kernels.ops.exp_step import records_graph

MAX_HISTORY = 8
ENTRIES = tuple(f"history[{i}]" for i in range(MAX_HISTORY))
_REAL = frozenset(checks.REAL_DTYPES)
_NUMBERS = (float, int, np.floating, np.integer)
_FLOAT = {float}


def history_entries(
    history: Sequence[Tensor] | Tensor, head: int | Tensor | None, x: Tensor
) -> tuple[list[Tensor], Tensor | None]:
    """The entries newest first; with a tensor for a head the slots, and that head."""
    if isinstance(history, Tensor):
        if history.ndim != x.ndim + 1:
            raise ValueError(
                f"a history in one tensor must have shape [k, {', '.join(map(str, x.shape))}],"
                f" got {tuple(history.shape)}"
            )
        entries = list(history.unbind(0))
    elif history is None or not hasattr(history, "__iter__"):
        raise TypeError(
            "history must be tensors, newest first, or one tensor [k, *x.shape]; got"
            f" {type(history).__name__}: give () where there is none"
        )
    else:
        entries = list(history)
        if head is not None:
            raise ValueError("head belongs to a ring buffer: history in one tensor [k, *x.shape]")
    if len(entries) > MAX_HISTORY:
        raise ValueError(f"history must hold at most {MAX_HISTORY} entries, got {len(entries)}")
    if head is None:
        return entries, None
    if not entries:
        raise ValueError("head belongs to a ring buffer with at least one slot, got none")
    if isinstance(head, Tensor):
        integer_tensor("head", head, x)
        if head.ndim:
            raise ValueError(f"head must be a tensor without axes, got shape {tuple(head.shape)}")
        return entries, head
    head = integer("head", head)
    k = len(entries)
    if torch.compiler.is_compiling():
        # A list is indexed by a constant: one graph for each head. A tensor is not.
        assert isinstance(history, Tensor)
        return [history.select(0, (head - j) % k) for j in range(k)], None
    return [entries[(head - j) % k] for j in range(k)], None


def rows(
    coefficients: Sequence[float] | Tensor, index: int | Tensor | None, columns: int, x: Tensor
) -> tuple[Tensor | None, list[float], Tensor | None]:
    """Coefficients as a tensor or as numbers, and the index where it is a tensor."""
    if isinstance(coefficients, Tensor):
        table, index = table_rows("coefficients", coefficients, index, x)
        found = table.shape[-1]
    else:
        if index is not None:
            raise ValueError("index chooses a row of a table: coefficients must be a tensor")
        table, index, values = None, None, numbers("coefficients", coefficients)
        found = len(values)
    if found != columns:
        raise ValueError(
            f"coefficients must have one column for x, each entry of history and noise:"
            f" {columns} columns, got {found}"
        )
    return table, values if table is None else [], index


def is_number(value: object) -> bool:
    return isinstance(value, _NUMBERS)


def numbers(name: str, coefficients: Sequence[float]) -> list[float]:
    if coefficients is None or not hasattr(coefficients, "__iter__"):
        raise TypeError(f"{name} must be numbers or one tensor, got {coefficients!r}: give a list")
    values, inf = list(coefficients), math.inf
    # Compared, as torch.compile cannot ask math.isfinite of numbers that change between calls.
    if set(map(type, values)) == _FLOAT and -inf < sum(values) < inf:
        return values  # the same as below, in half the time
    for i, c in enumerate(values):
        if not is_number(c):
            raise TypeError(f"{name} must be numbers or one tensor, got {c!r} among them")
        if not -inf < c < inf:
            raise ValueError(f"{name} must be finite, got {c!r}")
        values[i] = float(c)
    return values


def table_rows(
    name: str, table: Tensor, index: int | Tensor | None, x: Tensor
) -> tuple[Tensor, Tensor | None]:
    """A row `[cols]`, rows `[B, cols]`, or a table and its index; an int has chosen already."""
    checks.real(name, table)
    if table.device != x.device:
        raise ValueError(f"{name} must be on the device of x ({x.device}), got {table.device}")
    if index is None:
        if table.ndim == 1 or (table.ndim == 2 and x.ndim and table.shape[0] == x.shape[0]):
            return table, None
        raise ValueError(
            f"{name} must have shape [cols], or [B, cols] for the batch of x, {tuple(x.shape)}, or"
            f" come with an index; got {tuple(table.shape)}"
        )
    if table.ndim != 2 or table.shape[0] == 0:
        raise ValueError(
            f"with an index, {name} must be a table [N, cols], got {tuple(table.shape)}"
        )
    if not isinstance(index, Tensor):
        index = integer("index", index)
        if not 0 <= index < table.shape[0]:
            raise ValueError(f"index {index} is out of range for a table of {table.shape[0]} rows")
        return table.select(0, index), None
    integer_tensor("index", index, x)
    if index.ndim and (index.ndim > 1 or x.ndim == 0 or index.shape[0] != x.shape[0]):
        raise ValueError(
            f"index must have no axes, or shape [B] for the batch of x, {tuple(x.shape)};"
            f" got {tuple(index.shape)}"
        )
    return table, index


def all_like(
    names: Sequence[str],
    values: Sequence[Tensor | None],
    x: Tensor,
    optional: int = 0,
    of: str = "x",
) -> None:
    """Refuse what is no real tensor of the shape and on the device of x, which the caller knows as
    `of`; the first `optional` values may be None.
    """
    shape, device, strided = x.shape, x.device, torch.strided
    for i, value in enumerate(values):
        if (value is None and i < optional) or (
            isinstance(value, Tensor)
            and value.dtype in _REAL
            and value.layout is strided
            and value.shape == shape
            and value.device == device
        ):
            continue
        name = names[i]
        checks.tensor(name, value)
        assert value is not None
        checks.real(name, value)
        if value.shape != shape:
            raise ValueError(
                f"{name} must have the shape of {of}, {tuple(shape)}, got {tuple(value.shape)}"
            )
        checks.same_device({of: x, name: value})


def integer(name: str, value: object) -> int:
    """A Python or NumPy integer, no bool; one of `torch.compile` stays symbolic."""
    if isinstance(value, np.integer):
        return int(value)
    checks.integer(name, value)
    return cast(int, value)


def integer_tensor(name: str, value: Tensor, x: Tensor) -> None:
    if value.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{name} must be torch.int64 or torch.int32, got {value.dtype}")
    checks.same_device({"x": x, name: value})


def may_write() -> bool:
    """Whether results can go into given memory here, whatever the tensors are."""
    return not torch.is_grad_enabled() and not under_transform()


def target(name: str, x: Tensor, inputs: Sequence[Tensor | None]) -> Tensor:
    """x, unless writing into it would damage a graph or a shared element."""
    if records_graph([x, *inputs]):
        raise ValueError(
            f"writing into {name} records no graph, but a tensor of the call requires a gradient:"
            " detach it, call under torch.no_grad(), or ask for new tensors"
        )
    if under_transform():
        raise NotImplementedError(
            f"nothing writes into {name} under torch.func transforms or forward-mode AD: ask for"
            " new tensors"
        )
    if not x.is_contiguous() and _may_share_memory(x):
        raise ValueError(
            f"cannot write into {name}: its elements share memory, or are interleaved so that they"
            f" might (shape {tuple(x.shape)}, strides {x.stride()}); ask for new tensors, or give"
            " memory in which each stride exceeds the extent of the smaller ones"
        )
    return x


def _may_share_memory(x: Tensor) -> bool:
    """Whether an axis steps no further than the axes of smaller strides reach. Memory that is not
    shared may be laid out so too, as of shape (2, 3) and strides (3, 2), but no slice, transpose or
    new tensor is.
    """
    axes = [(stride, size) for stride, size in zip(x.stride(), x.shape, strict=True) if size > 1]
    for i, (stride, _) in enumerate(axes):
        reach = 0
        for j, (other, size) in enumerate(axes):
            if j != i and other <= stride:
                reach += other * (size - 1)
        if stride <= reach:
            return True
    return False


def out_target(
    out: Tensor,
    like: Tensor,
    dtype: torch.dtype | None,
    inplace: bool,
    inputs: Sequence[Tensor | None],
) -> Tensor:
    """`out`, checked: memory for a result in the shape of another tensor; None: of any dtype."""
    if inplace:
        raise ValueError("inplace=True and out exclude each other: give one")
    all_like(("out",), (out,), like)
    if dtype not in (None, out.dtype):
        raise TypeError(f"out must have the dtype of the result, {dtype}, got {out.dtype}")
    return target("out", out, inputs)
