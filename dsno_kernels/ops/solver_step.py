"""Op `solver_step`: guidance, conversion, clamp and both sums of a solver's row in one pass.

Where a graph is recorded the same step is composed of differentiable `exp_step` calls, so that the
gradients of every input, the table included, are theirs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dsno_kernels import _dense
from dsno_kernels.backends import Request, reference, reference_steps, select
from dsno_kernels.backends._solver_step import NEW, Memory, Step
from dsno_kernels.ops import define, on_reference, under_transform
from dsno_kernels.ops._direct import runs_directly
from dsno_kernels.ops.dynamic_threshold import divide_by_scale, threshold_scale
from dsno_kernels.ops.exp_step import check_index, differentiable_exp_step, records_graph

Results = list[Tensor | None]  # base', point', h_0, the model's next input; None: not wanted


def _check_rows(step: Step) -> None:
    """What rows on the host ask for must be there. Rows on a device are not looked at, nor are
    those of a tensor under a compiler or a transform, which may hide its numbers.
    """
    if step.table is None:
        found = [step.values]
    elif torch.compiler.is_compiling() or under_transform():
        return
    elif step.table.device.type == "cpu":
        check_index(step.index, step.table.shape[0])
        rows = reference_steps.select_rows(step.table, step.index)
        found = [rows.tolist()] if rows.ndim == 1 else rows.tolist()
    else:
        return
    K, entries = step.order, len(step.history)
    for row in found:
        if entries < K - 1 and (
            any(row[4 + entries : 3 + K]) or any(row[6 + K + entries : 5 + 2 * K])
        ):
            raise ValueError(
                f"the row reads {K - 1} entries of history, but {entries} are given, and its other"
                " columns are not 0"
            )
        if row[3 + K] != 0 and step.noise is None and step.seed is None:
            raise ValueError("the row adds noise (its column s is not 0): give noise or seed")


def _run(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    step, memory, (codes, backend) = Step(*args[:17]), Memory(*args[17:20]), args[20:]
    dtypes = [None if code < 0 else _dense.DTYPES[code] for code in codes]
    found = _run_step(step, memory, dtypes, backend)
    return tuple(step.point.new_empty(0) if new is None else new for new in found)  # type: ignore[return-value]


def _run_step(
    step: Step, memory: Memory, dtypes: Sequence[torch.dtype | None], backend: str
) -> Results:
    _check_rows(step)
    if step.point.numel() == 0:
        return [None if dtype is None else _empty(step, dtype) for dtype in dtypes]
    dtype = reference_steps.compute_dtype(step.tensors)
    module = select(backend, Request("solver_step", step.point.device, dtype))
    if step.seed is not None and module is not reference and not _in_order_of_shape(step):
        step = step._replace(noise=_noise(step, dtype, backend), seed=None)
    found: Results = module.solver_step(step, dtypes, memory)
    if memory is not NEW:
        for tensor in (memory.base, memory.ring):
            if tensor is not None:
                torch.autograd.graph.increment_version(tensor)
    if module is reference:
        layout = _dense.output_like(step.point, step.point.dtype, step.per_sample)
        found = [new if new is None else _dense.laid_out_like(new, layout) for new in found]
    return found


def _in_order_of_shape(step: Step) -> bool:
    """Whether the kernels, which count elements in memory, count them as their noise is defined."""
    if step.point.is_contiguous():
        return True
    strides = _dense.dense_strides(step.point, step.per_sample)
    return torch.empty_strided(step.point.shape, strides, device="meta").is_contiguous()


def _noise(step: Step, dtype: torch.dtype, backend: str) -> Tensor:
    """The noise of a step: a row that is noise alone, on a state that lies in memory by its shape,
    of which nothing is read.
    """
    state = step.point.new_empty(step.point.shape, dtype=dtype)
    row = [0.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0]
    alone = Step(point=state, output=state, seed=step.seed, values=row)
    noise = _fused(alone, NEW, [dtype, None, None, None], backend)[0]
    assert noise is not None
    return noise


def _empty(step: Step, dtype: torch.dtype) -> Tensor:
    """An uninitialized result."""
    return _dense.output_like(step.point, dtype, step.per_sample)


def _fake(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    step, codes = Step(*args[:17]), args[20]
    return tuple(  # type: ignore[return-value]
        step.point.new_empty(0) if code < 0 else _empty(step, _dense.DTYPES[code]) for code in codes
    )


op = define(
    "solver_step(Tensor point, Tensor output, Tensor? unconditional, Tensor? base,"
    " Tensor[] history, Tensor? head, Tensor? noise, Tensor? seed, Tensor? table, float[] values,"
    " Tensor? index, Tensor? guidance, float guidance_value, Tensor? scale, float? low,"
    " float? high, bool looks_ahead, Tensor(a!)? new_base, Tensor(b!)? ring, SymInt slot,"
    " int[] dtypes, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    _run,
    _fake,
)


def solver_step(
    step: Step,
    threshold: tuple[float, float, str] | None,
    memory: Memory,
    dtypes: Sequence[torch.dtype | None],
    backend: str,
) -> Results:
    """One step. `threshold`: (ratio, max_value, definition). `dtypes`: None where no result is
    wanted.
    """
    graph = torch.is_grad_enabled() and records_graph([*step.tensors, step.table, step.guidance])
    if graph or under_transform():
        return _composed(step, threshold, dtypes, backend)
    if threshold is not None:
        compute = reference_steps.compute_dtype(step.tensors)
        entry = _fused(step, NEW, [None, None, compute, None], backend)[2]
        assert entry is not None
        step = step._replace(scale=threshold_scale(entry, *threshold, backend))
    return _fused(step, memory, dtypes, backend)


def _fused(
    step: Step, memory: Memory, dtypes: Sequence[torch.dtype | None], backend: str
) -> Results:
    """The op, directly where that is the same."""
    small = (step.table, step.index, step.guidance, step.head, step.scale, step.seed)
    if runs_directly([*step.tensors, *small, memory.base, memory.ring]):
        return _run_step(step, memory, dtypes, backend)
    codes = [-1 if dtype is None else _dense.DTYPES.index(dtype) for dtype in dtypes]
    found = op(*step, *memory, codes, backend)
    return [new if kept else None for new, kept in zip(found, dtypes, strict=True)]


def _composed(
    step: Step,
    threshold: tuple[float, float, str] | None,
    dtypes: Sequence[torch.dtype | None],
    backend: str,
) -> Results:
    """The step as differentiable calls; `reference_steps.solver_step` says what they compute."""
    dtype = reference_steps.compute_dtype(step.tensors)
    table, values, K = step.table, step.values, step.order
    _check_rows(step)
    if table is not None:
        table = reference_steps.select_rows(table, step.index)

    def weighted(tensors: list[Tensor], columns: list[int]) -> Tensor:
        rows = None if table is None else reference_steps.select_columns(table, columns)
        numbers = [values[j] for j in columns] if table is None else []
        return differentiable_exp_step(tensors, rows, numbers, None, dtype, backend)

    m = step.output
    if step.unconditional is not None:
        if step.guidance is None:
            rows, numbers = None, [1 - step.guidance_value, step.guidance_value]
        else:
            rows, numbers = torch.stack([1 - step.guidance, step.guidance], -1), []
        m = differentiable_exp_step([step.unconditional, m], rows, numbers, None, dtype, backend)
    h = weighted([step.point, m], [0, 1])
    if threshold is not None:
        h = divide_by_scale(h, threshold_scale(h, *threshold, backend))
    elif step.low is not None or step.high is not None:
        h = torch.clamp(h, step.low, step.high)
    noise = step.noise
    if step.seed is not None:
        if under_transform():
            drawn = on_reference(reference_steps.noise_like, backend, step.point, step.seed)
            noise = drawn.to(dtype)
        else:
            noise = _noise(step, dtype, backend)
    entries = reference_steps.newest_first(step.history, step.head)[: K - 1]
    terms, columns = [step.point if step.base is None else step.base, h, *entries], [2]
    columns += range(3, 4 + len(entries))
    if noise is not None:
        terms, columns = [*terms, noise], [*columns, 3 + K]
    base = point = weighted(terms, columns)
    if step.looks_ahead:
        point = weighted([base, h, *entries], [4 + K, *range(5 + K, 6 + K + len(entries))])
    model_input = weighted([point], [5 + 2 * K]) if dtypes[3] is not None else None
    results = (base, point, h, model_input)
    return [
        None if new is None or kept is None else new.to(kept)
        for new, kept in zip(results, dtypes, strict=True)
    ]
