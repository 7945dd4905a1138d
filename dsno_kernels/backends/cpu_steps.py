"""The integrator steps on the CPU: layouts and addresses for `dsno_kernels._C`.

Every tensor is brought into the memory order of the result (a copy only where it differs), so that
the kernels see `[samples][size]`. Signatures are those of `reference_steps`; `out` and `new_base`
name memory to write into.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from dsno_kernels import _dense

try:
    from dsno_kernels import _C
except ImportError:  # `cpu.unsupported` says so
    _C = None  # type: ignore[assignment]

_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_GRAIN = 32768  # elements that are worth a thread


def _threads(elements: int) -> int:
    return min(torch.get_num_threads(), 1 + elements // _GRAIN)


def _pairs(tensors: Sequence[Tensor | None]) -> tuple[int, ...]:
    flat: list[int] = []
    for x in tensors:
        flat += (0, 0) if x is None else (x.data_ptr(), _DTYPES[x.dtype])
    return tuple(flat)


def _pairs_in_order(
    tensors: Sequence[Tensor | None], strides: tuple[int, ...]
) -> tuple[tuple[int, ...], list[Tensor]]:
    """The pairs of tensors with these strides, and the copies that must stay alive."""
    flat: list[int] = []
    copies: list[Tensor] = []
    for x in tensors:
        if x is None:
            flat += (0, 0)
            continue
        if x.stride() != strides:
            x = _dense.in_order(x, strides)
            copies.append(x)
        flat += (x.data_ptr(), _DTYPES[x.dtype])
    return tuple(flat), copies


def _rows(
    coefficients: Tensor | None, index: Tensor | None, values: Sequence[float]
) -> tuple[tuple[int, ...], tuple[float, ...], object]:
    """Where the kernels find the rows, or the one row as numbers; and what must stay alive."""
    if coefficients is None:
        return (), tuple(values), None
    if coefficients.ndim == 1:
        return (), tuple(coefficients.tolist()), None
    if coefficients.dtype not in (torch.float32, torch.float64):
        coefficients = coefficients.to(torch.float32)
    address = stride_index = 0
    if index is not None:
        index = index.to(torch.int64)
        address, stride_index = index.data_ptr(), index.stride(0) if index.ndim else 0
    dtype = 0 if coefficients.dtype == torch.float32 else 3
    where = (coefficients.data_ptr(), dtype, *coefficients.stride(), address, stride_index)
    return where, (), (coefficients, index)


def _per_sample(coefficients: Tensor | None, index: Tensor | None) -> bool:
    if index is not None:
        return index.ndim == 1
    return coefficients is not None and coefficients.ndim == 2


def _kernel_dtype(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype in _DTYPES else torch.float32  # float64 is converted at the end


def _newest_first(slots: Sequence[Tensor], head: Tensor | None) -> list[Tensor]:
    if head is None:
        return list(slots)
    newest = int(head)
    return [slots[(newest - j) % len(slots)] for j in range(len(slots))]


def exp_step(
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
    if head is not None:
        slots = _newest_first(tensors[1 : 1 + ring], head)
        tensors = [tensors[0], *slots, *tensors[1 + ring :]]
    per_sample = _per_sample(coefficients, index)
    y = out
    if y is None:
        y = _dense.output_like(tensors[0], _kernel_dtype(out_dtype), per_sample)
    terms, _copies = _pairs_in_order(tensors, y.stride())
    where, row, _alive = _rows(coefficients, index, values)
    samples, elements = y.shape[0] if per_sample else 1, y.numel()
    _C.cpu_exp_step(
        samples,
        elements // samples,
        terms,
        (y.data_ptr(), _DTYPES[y.dtype]),
        where,
        row,
        _threads(elements),
    )
    return y if y.dtype == out_dtype else y.to(out_dtype)


def exp_step_backward(
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
    rows_per_sample = _per_sample(coefficients, index)
    split = per_sample or rows_per_sample
    layout = _dense.output_like(g, _kernel_dtype(g.dtype), split)
    g = _dense.laid_out_like(g, layout)
    tensors = [_dense.laid_out_like(v, layout) for v in tensors]
    grads: list[Tensor] = []
    for dtype in dtypes:
        kernel_dtype = _kernel_dtype(dtype)
        grads.append(torch.empty_strided(layout.shape, layout.stride(), dtype=kernel_dtype))
    terms = max(len(tensors), max(columns, default=-1) + 1)
    by_column = dict(zip(columns, grads, strict=True))
    samples, elements = g.shape[0] if split else 1, g.numel()
    dots = torch.empty((samples, terms), dtype=torch.float64)
    where, row, _alive = _rows(coefficients, index, values)
    _C.cpu_exp_step_backward(
        samples,
        elements // samples,
        _pairs([g]),
        _pairs(tensors),
        _pairs([by_column.get(j) for j in range(terms)]),
        where,
        row,
        dots.data_ptr() if tensors else 0,
        _threads(elements),
    )
    dots = dots[:, : len(tensors)]
    if split and not per_sample:
        dots = dots.sum(0, keepdim=True)
    return [grad.to(dtype) for grad, dtype in zip(grads, dtypes, strict=True)], dots.contiguous()


def solver_step(
    point: Tensor,
    output: Tensor,
    *,
    unconditional: Tensor | None,
    base: Tensor | None,
    history: Sequence[Tensor],
    head: Tensor | None,
    noise: Tensor | None,
    seed: Tensor | None,
    table: Tensor | None,
    values: Sequence[float],
    index: Tensor | None,
    guidance: Tensor | None,
    guidance_value: float,
    scale: Tensor | None,
    low: float | None,
    high: float | None,
    looks_ahead: bool,
    dtypes: Sequence[torch.dtype | None],
    new_base: Tensor | None = None,
    ring: Tensor | None = None,
    slot: int = 0,
) -> list[Tensor | None]:
    per_sample = (
        _per_sample(table, index)
        or scale is not None
        or (guidance is not None and guidance.ndim == 1)
    )
    strides = _dense.dense_strides(point, per_sample)
    K = (len(values) if table is None else table.shape[-1]) // 2 - 3
    entries = history if head is None else _newest_first(history, head)
    inputs = [point, output, unconditional, base, noise, *entries[: K - 1]]
    entry = None
    if ring is not None:
        entry = ring[slot if head is None else (int(head) + 1) % ring.shape[0]]
    for target in (new_base, entry):
        if target is not None:
            inputs = _dense.untangled(inputs, target)
    pairs, _copies = _pairs_in_order(inputs, strides)
    targets = (new_base, None, entry, None)
    outputs = [
        None if target is None and dtype is None else _result(point, strides, target, dtype)
        for target, dtype in zip(targets, dtypes, strict=True)
    ]
    where, row, _alive = _rows(table, index, values)
    if guidance is None:
        guidance_where: tuple[int, ...] = ()
    else:
        guidance = guidance.to(torch.float64)
        stride = guidance.stride(0) if guidance.ndim else 0
        guidance_where = (guidance.data_ptr(), 3, stride, 0, 0, 0)
    if scale is not None:
        scale = scale.to(torch.float32).contiguous()
    if seed is not None:
        seed = seed.contiguous()
    samples, elements = point.shape[0] if per_sample else 1, point.numel()
    _C.cpu_solver_step(
        samples,
        elements // samples,
        K,
        pairs[:10],
        pairs[10:],
        _pairs(outputs),
        where,
        row,
        guidance_where,
        guidance_value,
        0 if scale is None else scale.data_ptr(),
        -math.inf if low is None else low,
        math.inf if high is None else high,
        0 if seed is None else seed.data_ptr(),
        looks_ahead,
        _threads(elements),
    )
    for target, x in ((new_base, outputs[0]), (entry, outputs[2])):
        if target is not None and x is not None and x is not target:
            target.copy_(x)
    return [
        None if x is None or dtype is None else x if x.dtype is dtype else x.to(dtype)
        for x, dtype in zip(outputs, dtypes, strict=True)
    ]


def _result(
    point: Tensor, strides: tuple[int, ...], target: Tensor | None, dtype: torch.dtype | None
) -> Tensor | None:
    """Where the kernel writes one result: the target itself where it can."""
    if target is not None:
        dtype = target.dtype
        if dtype in _DTYPES and _dense.has_strides(target, strides):
            return target
    if dtype is None:
        return None
    if dtype is point.dtype and dtype in _DTYPES and point.stride() == strides:
        return torch.empty_like(point)  # in less time than the next line takes
    return torch.empty_strided(point.shape, strides, dtype=_kernel_dtype(dtype))


def abs_rank(x: Tensor, rank: int) -> Tensor:
    x = x.contiguous()
    places = torch.empty((x.shape[0], 2), dtype=torch.int64)
    _C.cpu_abs_rank(
        x.shape[0],
        x[0].numel(),
        rank,
        (x.data_ptr(), _DTYPES[x.dtype]),
        places.data_ptr(),
        torch.get_num_threads(),
    )
    return places
