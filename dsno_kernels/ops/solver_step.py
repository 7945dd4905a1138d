"""Op `solver_step`: guidance, conversion, clamp and both sums of a solver's row in one pass.

Where a graph is recorded the same step is composed of differentiable `exp_step` calls, so that the
gradients of every input, the table included, are theirs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dsno_kernels import _dense
from dsno_kernels.backends import Request, reference, reference_steps, select
from dsno_kernels.ops import define, on_reference, under_transform
from dsno_kernels.ops._direct import runs_directly
from dsno_kernels.ops.dynamic_threshold import divide_by_scale, threshold_scale
from dsno_kernels.ops.exp_step import check_index, differentiable_exp_step, records_graph
from dsno_kernels.ops.exp_step import per_sample as rows_per_sample

Results = list[Tensor | None]  # base', point', h_0, the model's next input; None: not wanted


@dataclasses.dataclass
class Step:
    """The inputs of one step, as `reference_steps.solver_step` takes them."""

    point: Tensor
    output: Tensor
    unconditional: Tensor | None = None
    base: Tensor | None = None
    history: list[Tensor] = dataclasses.field(default_factory=list)  # with `head` slots of a ring
    head: Tensor | None = None
    noise: Tensor | None = None
    seed: Tensor | None = None  # int64 [2]
    table: Tensor | None = None
    values: list[float] = dataclasses.field(default_factory=list)
    index: Tensor | None = None
    guidance: Tensor | None = None
    guidance_value: float = 1.0
    scale: Tensor | None = None
    low: float | None = None
    high: float | None = None
    looks_ahead: bool = False

    @property
    def named(self) -> dict[str, Any]:
        """The fields in their order, which is that of the op's arguments."""
        return {name: getattr(self, name) for name in _FIELDS}

    @property
    def order(self) -> int:
        """K, the entries of history with the new one."""
        columns = len(self.values) if self.table is None else self.table.shape[-1]
        return columns // 2 - 3

    @property
    def per_sample(self) -> bool:
        guided = self.guidance is not None and self.guidance.ndim == 1
        return rows_per_sample(self.table, self.index) or guided or self.scale is not None

    @property
    def tensors(self) -> list[Tensor | None]:
        named = (self.point, self.output, self.unconditional, self.base, self.noise)
        return [*named, *self.history]


_FIELDS = tuple(field.name for field in dataclasses.fields(Step))  # once: it is slow


class Memory(NamedTuple):
    """Where results are written in place of new tensors: base', and h_0 as a slot of a ring."""

    base: Tensor | None = None
    ring: Tensor | None = None
    slot: int = 0  # where there is no head; else slot head + 1


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
        if any(row[4 + entries : 3 + K]) or any(row[6 + K + entries : 5 + 2 * K]):
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
        return list(_empty(step, dtypes))
    dtype = reference_steps.compute_dtype(step.tensors)
    module = select(backend, Request("solver_step", step.point.device, dtype))
    if step.seed is not None and module is not reference and not _in_order_of_shape(step):
        step = dataclasses.replace(step, noise=_noise(step, dtype, backend), seed=None)
    found: Results = module.solver_step(
        **vars(step),
        dtypes=dtypes,
        new_base=memory.base,
        ring=memory.ring,
        slot=memory.slot,
    )
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
    noise = _fused(alone, Memory(), [dtype, None, None, None], backend)[0]
    assert noise is not None
    return noise


def _empty(
    step: Step, dtypes: Sequence[torch.dtype | None]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Uninitialized results, of no elements where one is not wanted."""
    return tuple(
        step.point.new_empty(0)
        if dtype is None
        else _dense.output_like(step.point, dtype, step.per_sample)
        for dtype in dtypes
    )  # type: ignore[return-value]


def _fake(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtypes = [None if code < 0 else _dense.DTYPES[code] for code in args[20]]
    return _empty(Step(*args[:17]), dtypes)


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
        entry = _fused(step, Memory(), [None, None, compute, None], backend)[2]
        assert entry is not None
        step = dataclasses.replace(step, scale=threshold_scale(entry, *threshold, backend))
    return _fused(step, memory, dtypes, backend)


def _fused(
    step: Step, memory: Memory, dtypes: Sequence[torch.dtype | None], backend: str
) -> Results:
    """The op, directly where that is the same."""
    found: Sequence[Tensor | None]
    small = (step.table, step.index, step.guidance, step.head, step.scale, step.seed)
    if runs_directly([*step.tensors, *small, memory.base, memory.ring]):
        found = _run_step(step, memory, dtypes, backend)
    else:
        codes = [-1 if dtype is None else _dense.DTYPES.index(dtype) for dtype in dtypes]
        found = op(*step.named.values(), *memory, codes, backend)
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
