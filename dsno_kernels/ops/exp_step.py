"""Op `exp_step`, the exponential-integrator step, and its derivatives.

All come from one trilinear form, tau(C, v, g) = sum over j of C_j <v_j, g>, with v = x, the history
and the noise:

    d tau / d g    sum of C_j v_j     exp_step
    d tau / d v_j  C_j g              exp_step of one term, or exp_step_backward for all j at once
    d tau / d C_j  <v_j, g>           exp_step_backward

so gradients of every order run on the two ops.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dsno_kernels import _dense
from dsno_kernels.backends import Request, reference, reference_steps, select
from dsno_kernels.ops import define, on_reference, under_transform
from dsno_kernels.ops._direct import runs_directly


def per_sample(coefficients: Tensor | None, index: Tensor | None) -> bool:
    """Whether each sample (axis 0) has a row of its own."""
    if index is not None:
        return index.ndim == 1
    return coefficients is not None and coefficients.ndim == 2


def check_index(index: Tensor | None, rows: int) -> None:
    """Refuse an index outside its table where the host can read it; elsewhere it is clamped."""
    if index is None or index.device.type != "cpu":
        return
    chosen = index.tolist()
    for row in chosen if isinstance(chosen, list) else [chosen]:
        if not 0 <= row < rows:
            raise ValueError(f"index {row} is out of range for a table of {rows} rows")


def _request(op: str, tensors: Sequence[Tensor | None], x: Tensor) -> Request:
    return Request(op, x.device, reference_steps.compute_dtype(tensors))


def _run(
    tensors: list[Tensor],
    coefficients: Tensor | None,
    values: list[float],
    index: Tensor | None,
    head: Tensor | None,
    ring: int,
    out_dtype: torch.dtype,
    backend: str,
) -> Tensor:
    if coefficients is not None:
        check_index(index, coefficients.shape[0])
    x = tensors[0]
    if x.numel() == 0:
        return _fake(tensors, coefficients, values, index, head, ring, out_dtype, backend)
    module = select(backend, _request("exp_step", tensors, x))
    y: Tensor = module.exp_step(
        tensors,
        coefficients=coefficients,
        values=values,
        index=index,
        head=head,
        ring=ring,
        out_dtype=out_dtype,
    )
    if module is reference:
        layout = _dense.output_like(x, out_dtype, per_sample(coefficients, index))
        y = _dense.laid_out_like(y, layout)
    return y


def _fake(
    tensors: list[Tensor],
    coefficients: Tensor | None,
    values: list[float],
    index: Tensor | None,
    head: Tensor | None,
    ring: int,
    out_dtype: torch.dtype,
    backend: str,
) -> Tensor:
    return _dense.output_like(tensors[0], out_dtype, per_sample(coefficients, index))


def _run_in_place(
    out: Tensor,
    tensors: list[Tensor],
    coefficients: Tensor | None,
    values: list[float],
    index: Tensor | None,
    head: Tensor | None,
    ring: int,
    backend: str,
) -> None:
    options: dict[str, Any] = {
        "coefficients": coefficients,
        "values": values,
        "index": index,
        "head": head,
        "ring": ring,
        "out_dtype": out.dtype,
    }
    if coefficients is not None:
        check_index(index, coefficients.shape[0])
    if out.numel() == 0:
        return
    module = select(backend, _request("exp_step", [out, *tensors], out))
    if module is reference or not _dense.is_dense(out, per_sample(coefficients, index)):
        out.copy_(module.exp_step(tensors, **options))
    else:
        module.exp_step(_dense.untangled(tensors, out), out=out, **options)
        torch.autograd.graph.increment_version(out)


def _fake_in_place(out: Tensor, *args: Any) -> None:
    return None


_ROWS = "Tensor? coefficients, float[] values, Tensor? index"

op = define(
    f"exp_step(Tensor[] tensors, {_ROWS}, Tensor? head, int ring, ScalarType out_dtype,"
    " str backend) -> Tensor",
    _run,
    _fake,
)
in_place_op = define(
    f"exp_step_(Tensor(a!) out, Tensor[] tensors, {_ROWS}, Tensor? head, int ring, str backend)"
    " -> ()",
    _run_in_place,
    _fake_in_place,
)


def _call(
    tensors: list[Tensor],
    coefficients: Tensor | None,
    values: list[float],
    index: Tensor | None,
    head: Tensor | None,
    ring: int,
    out_dtype: torch.dtype,
    backend: str,
) -> Tensor:
    """The op, directly where that is the same."""
    call = _run if runs_directly([*tensors, coefficients, index, head]) else op
    return call(tensors, coefficients, values, index, head, ring, out_dtype, backend)


def exp_step_(
    out: Tensor,
    tensors: list[Tensor],
    coefficients: Tensor | None,
    values: list[float],
    index: Tensor | None,
    head: Tensor | None,
    ring: int,
    backend: str,
) -> None:
    """The op that writes into `out`, directly where that is the same."""
    direct = runs_directly([out, *tensors, coefficients, index, head])
    call = _run_in_place if direct else in_place_op
    call(out, tensors, coefficients, values, index, head, ring, backend)


def _run_backward(
    g: Tensor,
    tensors: list[Tensor],
    coefficients: Tensor | None,
    values: list[float],
    index: Tensor | None,
    columns: list[int],
    dtypes: list[int],
    per_sample: bool,
    backend: str,
) -> tuple[list[Tensor], Tensor]:
    if coefficients is not None:
        check_index(index, coefficients.shape[0])
    if g.numel() == 0:
        grads, dots = _fake_backward(
            g, tensors, coefficients, values, index, columns, dtypes, per_sample, backend
        )
        return grads, dots.zero_()
    module = select(backend, _request("exp_step_backward", [g, *tensors], g))
    grads, dots = module.exp_step_backward(
        g,
        tensors,
        coefficients=coefficients,
        values=values,
        index=index,
        columns=columns,
        dtypes=[_dense.DTYPES[code] for code in dtypes],
        per_sample=per_sample,
    )
    if module is reference:
        likes, _ = _fake_backward(
            g, tensors, coefficients, values, index, columns, dtypes, per_sample, backend
        )
        grads = [_dense.laid_out_like(a, b) for a, b in zip(grads, likes, strict=True)]
    return grads, dots


def _fake_backward(
    g: Tensor,
    tensors: list[Tensor],
    coefficients: Tensor | None,
    values: list[float],
    index: Tensor | None,
    columns: list[int],
    dtypes: list[int],
    per_sample: bool,
    backend: str,
) -> tuple[list[Tensor], Tensor]:
    split = per_sample or _is_per_sample(coefficients, index)
    samples = g.shape[0] if per_sample else 1
    dots = g.new_empty((samples, len(tensors)), dtype=torch.float64)
    return [_dense.output_like(g, _dense.DTYPES[code], split) for code in dtypes], dots


_is_per_sample = per_sample

backward_op = define(
    f"exp_step_backward(Tensor g, Tensor[] tensors, {_ROWS}, int[] columns, int[] dtypes,"
    " bool per_sample, str backend) -> (Tensor[], Tensor)",
    _run_backward,
    _fake_backward,
)


class ExpStepFunction(torch.autograd.Function):
    """Autograd of `exp_step`. Saves the tensors only where the coefficients need a gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        coefficients: Tensor | None,
        values: list[float],
        index: Tensor | None,
        out_dtype: torch.dtype,
        backend: str,
        *tensors: Tensor,
    ) -> Tensor:
        kept = tensors if ctx.needs_input_grad[0] else ()
        ctx.save_for_backward(coefficients, index, *kept)
        ctx.values, ctx.backend = values, backend
        ctx.dtypes = [t.dtype for t in tensors]
        return _call(list(tensors), coefficients, values, index, None, 0, out_dtype, backend)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        coefficients, index, *tensors = ctx.saved_tensors
        columns = [j for j, needed in enumerate(ctx.needs_input_grad[5:]) if needed]
        split = per_sample(coefficients, index)
        if torch.is_grad_enabled():
            rows = None
            if coefficients is not None:
                rows = reference_steps.select_rows(coefficients, index)
            scaled = [
                differentiable_exp_step(
                    [g],
                    None if rows is None else rows[..., j : j + 1],
                    ctx.values[j : j + 1],
                    None,
                    ctx.dtypes[j],
                    ctx.backend,
                )
                for j in columns
            ]
            dots = ExpStepDotsFunction.apply(split, ctx.backend, g, *tensors) if tensors else None
        else:
            dtypes = [_dense.DTYPES.index(ctx.dtypes[j]) for j in columns]
            scaled, dots = backward_op(
                g, tensors, coefficients, ctx.values, index, columns, dtypes, split, ctx.backend
            )
        grads: list[Tensor | None] = [None] * len(ctx.dtypes)
        for j, grad in zip(columns, scaled, strict=True):
            grads[j] = grad
        return _grad_of_rows(dots, coefficients, index, tensors), None, None, None, None, *grads


def _grad_of_rows(
    dots: Tensor | None, coefficients: Tensor | None, index: Tensor | None, tensors: list[Tensor]
) -> Tensor | None:
    """The dot products `[B or 1, cols]` in the shape of the coefficients."""
    if dots is None or coefficients is None or not tensors:
        return None
    if index is not None:
        # Repeated rows add up in the order of the samples. The step has clamped the index.
        table = dots.new_zeros(coefficients.shape)
        rows = index.reshape(-1).clamp(0, len(table) - 1)
        dots = table.index_put((rows,), dots, accumulate=True)
    elif coefficients.ndim == 1:
        dots = dots[0]
    return dots.to(coefficients.dtype)


class ExpStepDotsFunction(torch.autograd.Function):
    """Autograd of the dot products `<g, v_j>`, `[B or 1, n]` in float64."""

    @staticmethod
    def forward(ctx: Any, split: bool, backend: str, g: Tensor, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(g, *tensors)
        ctx.split, ctx.backend = split, backend
        return backward_op(g, list(tensors), None, [], None, [], [], split, backend)[1]

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        g, *tensors = ctx.saved_tensors
        rows = cotangent if ctx.split else cotangent[0]
        grad_g = None
        if ctx.needs_input_grad[2]:
            grad_g = differentiable_exp_step(tensors, rows, [], None, g.dtype, ctx.backend)
        grads = [
            differentiable_exp_step([g], rows[..., j : j + 1], [], None, v.dtype, ctx.backend)
            if needed
            else None
            for j, (v, needed) in enumerate(zip(tensors, ctx.needs_input_grad[3:], strict=True))
        ]
        return None, None, grad_g, *grads


def in_slot_order(rows: Tensor, head: Tensor, ring: int) -> Tensor:
    """Columns of history, newest first, rearranged to the slots of a ring buffer."""
    slots = torch.arange(ring, device=head.device)
    history = rows[..., 1 + (head - slots) % ring]
    return torch.cat([rows[..., :1], history, rows[..., 1 + ring :]], -1)


def records_graph(tensors: Sequence[Tensor | None]) -> bool:
    """Whether autograd must see this call."""
    if torch.is_grad_enabled():
        for x in tensors:
            if x is not None and x.requires_grad:
                return True
    return False


def _distinct(tensors: list[Tensor]) -> list[Tensor]:
    """Views of what comes twice: Dynamo refuses a Function that gets one tensor twice."""
    if not torch.compiler.is_compiling():
        return tensors
    return [
        t.view_as(t) if any(t is other for other in tensors[:i]) else t
        for i, t in enumerate(tensors)
    ]


def differentiable_exp_step(
    tensors: list[Tensor],
    coefficients: Tensor | None,
    values: list[float],
    index: Tensor | None,
    out_dtype: torch.dtype,
    backend: str,
    head: Tensor | None = None,
    ring: int = 0,
) -> Tensor:
    """The op with autograd; `index` and `head` as in the op."""
    if under_transform():
        return on_reference(
            reference.exp_step,
            backend,
            tensors,
            coefficients=coefficients,
            values=values,
            index=index,
            head=head,
            ring=ring,
            out_dtype=out_dtype,
        )
    if not records_graph([coefficients, *tensors]):
        return _call(tensors, coefficients, values, index, head, ring, out_dtype, backend)
    if head is not None:
        if coefficients is None:
            dtype = reference_steps.compute_dtype(tensors)
            numbers = [torch.full((), c, dtype=dtype, device=head.device) for c in values]
            coefficients = torch.stack(numbers)
        rows = reference_steps.select_rows(coefficients, index)
        coefficients, index, values = in_slot_order(rows, head, ring), None, []
    return ExpStepFunction.apply(
        coefficients, values, index, out_dtype, backend, *_distinct(tensors)
    )
