"""The integrator steps on the CPU: layouts and addresses for `dsno_kernels._C`.

Every tensor is brought into the memory order of the result (a copy only where it differs), so that
the kernels see `[samples][size]`. Signatures are those of `reference_steps`; `out` is memory to
write into.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from dsno_kernels import _dense
from dsno_kernels.backends._solver_step import NEW, Memory, Step

try:
    from dsno_kernels import _C
except ImportError:  # `cpu.unsupported` says so
    _C = None  # type: ignore[assignment]

_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_GRAIN = 32768  # elements that are worth a thread


def _threads(elements: int) -> int:
    return 1 if elements < _GRAIN else min(torch.get_num_threads(), 1 + elements // _GRAIN)


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
    step: Step, dtypes: Sequence[torch.dtype | None], memory: Memory = NEW
) -> list[Tensor | None]:
    point, output, unconditional, base, history, head, noise, seed, table, values, index = step[:11]
    guidance, guidance_value, scale, low, high, looks_ahead = step[11:]
    per_sample, K = step.per_sample, step.order
    entries = history if head is None else _newest_first(history, head)
    inputs = [point, output, unconditional, base, noise, *entries[: K - 1]]
    targets = _NO_TARGETS
    if memory is not NEW:
        new_base, ring, slot = memory
        entry = None
        if ring is not None:
            entry = ring[slot if head is None else (int(head) + 1) % ring.shape[0]]
        targets = (new_base, None, entry, None)
        for target in (new_base, entry):
            if target is not None:
                inputs = _dense.untangled(inputs, target)
    strides = _dense.dense_strides(point, per_sample)
    pairs, _copies = _pairs_in_order(inputs, strides)
    outputs = _results(point, strides, targets, dtypes)
    where, row, _alive = _rows(table, index, values)
    guidance_where: tuple[int, ...] = ()
    if guidance is not None:
        guidance = guidance.to(torch.float64)
        stride = guidance.stride(0) if guidance.ndim else 0
        guidance_where = (guidance.data_ptr(), 3, stride, 0, 0, 0)
    if scale is not None:
        scale = scale.to(torch.float32).contiguous()
    if seed is not None:
        seed = seed.contiguous()
    elements = point.numel()
    samples = point.shape[0] if per_sample else 1
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
    if memory is not NEW:
        for target, x in zip(targets, outputs, strict=True):
            if target is not None and x is not None and x is not target:
                target.copy_(x)
    return [
        None if x is None or dtype is None else x if x.dtype is dtype else x.to(dtype)
        for x, dtype in zip(outputs, dtypes, strict=True)
    ]


_NO_TARGETS: tuple[Tensor | None, ...] = (None, None, None, None)


def _results(
    point: Tensor,
    strides: tuple[int, ...],
    targets: Sequence[Tensor | None],
    dtypes: Sequence[torch.dtype | None],
) -> list[Tensor | None]:
    """Where the kernel writes the results: the targets themselves where it can."""
    alike = point.dtype if point.dtype in _DTYPES and point.stride() == strides else None
    found: list[Tensor | None] = []
    for target, dtype in zip(targets, dtypes, strict=True):
        if target is not None:
            if target.dtype in _DTYPES and _dense.has_strides(target, strides):
                found.append(target)
                continue
            dtype = target.dtype
        if dtype is None:
            found.append(None)
        elif dtype is alike:
            found.append(torch.empty_like(point))  # in less time than the next line takes
        else:
            found.append(torch.empty_strided(point.shape, strides, dtype=_kernel_dtype(dtype)))
    return found


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
