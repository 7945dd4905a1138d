"""`solver_step`: what it accepts, what it promises, and every check."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dsno_kernels.backends._solver_step import NEW, Memory, Step
from dsno_kernels.functional import checks, step_checks
from dsno_kernels.functional.dynamic_threshold import check_threshold
from dsno_kernels.ops import solver_step as _step

MAX_ORDER = 8
_NAMES = ("unconditional", "base", "noise", "output", *step_checks.ENTRIES)


class SolverStep(NamedTuple):
    """What one step of a solver gives."""

    base: Tensor  # the state at the next time
    point: (
        Tensor  # where the model is evaluated next; base itself where the step does not look ahead
    )
    entry: Tensor | None  # h_0, the newest entry of history
    model_input: Tensor | None  # c_in * point


def solver_step(
    point: Tensor,
    output: Tensor,
    table: Sequence[float] | Tensor,
    history: Sequence[Tensor] | Tensor = (),
    *,
    index: int | Tensor | None = None,
    base: Tensor | None = None,
    unconditional: Tensor | None = None,
    guidance: float | Tensor | None = None,
    head: int | Tensor | None = None,
    noise: Tensor | None = None,
    seed: torch.Generator | Tensor | tuple[int, int] | None = None,
    clip: tuple[float, float] | None = None,
    threshold: tuple[float, float, str] | None = None,
    looks_ahead: bool = False,
    keep_entry: bool = True,
    entry_dtype: torch.dtype | None = None,
    input_dtype: torch.dtype | None = None,
    store: bool = False,
    inplace: bool = False,
    out: Tensor | None = None,
    backend: str | None = None,
) -> SolverStep:
    r"""One row of a solver's table, from the model's output to its next input, in one pass.

    .. math::
        m &= u + g\,(c - u) \\
        h_0 &= A \cdot \mathrm{point} + B\,m \quad\text{(clipped or thresholded)} \\
        \mathrm{base}' &= a_b\,\mathrm{base} + \sum_j c_{b,j}\,h_j + s \cdot \mathrm{noise} \\
        \mathrm{point}' &= a_p\,\mathrm{base}' + \sum_j c_{p,j}\,h_j
            \quad\text{(where the step looks ahead; else base')} \\
        \mathrm{input}' &= c_{in}\,\mathrm{point}'

    Intermediate values are float32 (float64 where a tensor is float64), whatever the dtypes of the
    tensors: h_0 enters the sums before it is rounded to ``entry_dtype``.

    Args:
        point: where the model was evaluated; any shape and strides, real, floating point.
        output: the model's output there, c.
        table: columns ``A, B, a_b, c_b[0..K-1], s, a_p, c_p[0..K-1], c_in``, so 2K + 6 of them, K
            up to 8: numbers, ``[cols]``, ``[B, cols]``, or ``[N, cols]`` with ``index``, as the
            coefficients of :func:`exp_step`. Columns that are 0 are skipped.
        history: h_1, h_2, .. as in :func:`exp_step`, without h_0: K - 1 entries or more; fewer
            where the row stands on the host (numbers or a CPU table) and the columns of the others
            are 0.
        index, head: as in :func:`exp_step`; head is the slot of h_1.
        base: the state that the step starts from, such as a float32 master copy; default point.
        unconditional: the unconditional output u of classifier-free guidance; comes with guidance.
        guidance: the scale g, a number, a tensor without axes, or ``[B]``.
        noise: the shape of point. Or
        seed: draw the noise in the kernel. A ``torch.Generator`` (seed and offset are two numbers
            that it draws), an int64 tensor ``[2]`` or two ints: seed and offset. Element e, counted
            by its place in the shape (the last axis fastest), is number e of Philox4x32-10 and
            Box-Muller: the same up to rounding on every backend and for all strides
            (csrc/cpu/isa/noise.h). A point whose memory has another order costs one more pass.
        clip: (lowest, highest) of h_0.
        threshold: (ratio, max_value, definition) of :func:`dynamic_threshold`, for h_0; it is one
            more pass.
        looks_ahead: whether point' differs from base' (rows of predictor-corrector pairs).
        keep_entry: False where h_0 is not needed later, or is the model's output as it stands.
        entry_dtype: of h_0; default that of history, without one that of output and point promoted.
        input_dtype: asks for the model's next input, in this dtype.
        store: write h_0 into slot ``(head + 1) mod k`` of the ring buffer ``history``.
        inplace: write base' into base (point where there is none).
        out: write base' there instead, as in :func:`exp_step`: the shape, device and dtype of base.
            Frames of a trajectory are written so.
        backend: as in :func:`exp_step`.

    Returns:
        :class:`SolverStep`. base' has the dtype of base, and is `out` where that is given; point'
        has the dtype of point. ``entry`` is None with ``store`` or ``keep_entry=False``,
        ``model_input`` without an ``input_dtype``.

    Raises:
        TypeError, ValueError, NotImplementedError: as in :func:`exp_step`. A row on the host that
        needs more history, or noise, than is given raises. A tensor's row is not looked at on
        another device, under a ``torch.func`` transform, or where compiled code records a graph: a
        missing term counts as 0 there.

    Differentiable in all tensors, the table and a guidance tensor included, to any order; store,
    inplace and out record no graph.

    Example:
        >>> x, eps = torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8)
        >>> row = [0.0, 1.0, 1.02, -0.3, 0.0, 1.0, 0.0, 1.0]  # DDIM: K = 1
        >>> dk.solver_step(x, eps, row).base.equal(dk.exp_step(x, [eps], [1.02, -0.3]))
        True
    """
    checks.real("point", point)
    name = checks.backend(backend)
    entries, ring_head = step_checks.history_entries(history, head, point)
    given = (unconditional, base, noise, output, *entries)
    step_checks.all_like(_NAMES, given, point, optional=3, of="point")
    rows: Tensor | None = None
    values: list[float] = []
    if isinstance(table, Tensor):
        rows, index = step_checks.table_rows("table", table, index, point)
        columns = rows.shape[-1]
    elif index is not None:
        raise ValueError("index chooses a row of a table: table must be a tensor")
    else:
        values = step_checks.numbers("table", table)
        columns = len(values)
    order = columns // 2 - 3
    if columns % 2 or not 1 <= order <= MAX_ORDER:
        raise ValueError(
            f"table must have 2K + 6 columns (A, B, a_b, c_b[0..K-1], s, a_p, c_p[0..K-1], c_in),"
            f" K from 1 to {MAX_ORDER}; got {columns}"
        )
    if rows is not None and rows.device.type != "cpu" and len(entries) < order - 1:
        raise ValueError(
            f"a table on {rows.device} with {columns} columns needs {order - 1} entries of history,"
            f" got {len(entries)}: give a ring buffer, whose unused slots may hold anything"
        )
    guidance_tensor, guidance_value = None, 1.0
    if unconditional is not None or guidance is not None:
        guidance_tensor, guidance_value = _guidance(unconditional, guidance, point)
    if noise is not None and seed is not None:
        raise ValueError("noise and seed exclude each other: give one")
    low: float | None = None
    high: float | None = None
    if clip is not None:
        low, high = _clip(clip, threshold)
    if threshold is not None:
        if not isinstance(threshold, (tuple, list)) or len(threshold) != 3:
            raise TypeError(
                f"threshold must be (ratio, max_value, definition), got {threshold!r}: for example"
                " (0.995, 1.0, 'dpm_solver')"
            )
        ratio, max_value, definition = threshold
        check_threshold("threshold ", ratio, max_value, definition, point)
    step = Step(
        point,
        output,
        unconditional,
        base,
        entries,
        ring_head,
        noise,
        None if seed is None else _seed(seed, point),
        rows,
        values,
        index if isinstance(index, Tensor) else None,
        guidance_tensor,
        guidance_value,
        None,  # the scale of a threshold
        low,
        high,
        bool(looks_ahead),
    )
    state = point if base is None else base
    memory = NEW
    if store or inplace or out is not None:
        memory = _memory(step, history, head, state, store, inplace, out)
    if entry_dtype is None:
        entry_dtype = (
            entries[0].dtype if entries else torch.promote_types(output.dtype, point.dtype)
        )
    elif entry_dtype not in checks.REAL_DTYPES:
        raise _no_result_dtype(entry_dtype)
    if input_dtype is not None and input_dtype not in checks.REAL_DTYPES:
        raise _no_result_dtype(input_dtype)
    separate = looks_ahead or point.dtype != state.dtype
    dtypes = [
        state.dtype if memory.base is None else None,
        point.dtype if separate else None,
        entry_dtype if keep_entry and not store else None,
        input_dtype,
    ]
    results = _step.solver_step(step, threshold, memory, dtypes, name)
    new_base = memory.base if memory.base is not None else results[0]
    assert new_base is not None
    new_point = new_base if results[1] is None else results[1]
    return SolverStep(new_base, new_point, results[2], results[3])


def _guidance(
    unconditional: Tensor | None, guidance: float | Tensor | None, point: Tensor
) -> tuple[Tensor | None, float]:
    if (unconditional is None) != (guidance is None):
        raise ValueError("unconditional and guidance come together: give both or neither")
    if not isinstance(guidance, Tensor):
        value = 1.0 if guidance is None else guidance
        return None, step_checks.numbers("guidance", [value])[0]
    checks.real("guidance", guidance)
    checks.same_device({"point": point, "guidance": guidance})
    if guidance.ndim and (point.ndim == 0 or guidance.shape != point.shape[:1]):
        raise ValueError(
            f"guidance must be a number, have no axes, or shape [B] for the batch of point,"
            f" {tuple(point.shape)}; got {tuple(guidance.shape)}"
        )
    return guidance, 1.0


def _no_result_dtype(dtype: object) -> TypeError:
    return TypeError(
        f"dtypes of results must be of {checks.names(checks.REAL_DTYPES)}, got {dtype}"
    )


def _clip(
    clip: tuple[float, float], threshold: tuple[float, float, str] | None
) -> tuple[float | None, float | None]:
    if threshold is not None:
        raise ValueError("clip and threshold exclude each other: give one")
    pair = isinstance(clip, (tuple, list)) and len(clip) == 2
    if not pair or not all(step_checks.is_number(bound) for bound in clip):
        raise TypeError(
            f"clip must be two numbers (lowest, highest), got {clip!r}: for example (-1, 1)"
        )
    low, high = clip
    if not low <= high:
        raise ValueError(f"clip must be (lowest, highest), got {clip!r}")
    # Compared, as torch.compile cannot ask math.isfinite of numbers that change between calls.
    finite = [float(bound) if -math.inf < bound < math.inf else None for bound in (low, high)]
    return finite[0], finite[1]


def _seed(seed: torch.Generator | Tensor | tuple[int, int], point: Tensor) -> Tensor:
    """int64 `[2]` on the device of point: seed and offset."""
    if isinstance(seed, torch.Generator):
        drawn = torch.randint(2**63 - 1, (2,), generator=seed, device=seed.device)
        return drawn.to(point.device)
    if not isinstance(seed, Tensor):
        _check_numbers_of_seed(seed)
        return torch.tensor(seed, dtype=torch.int64, device=point.device)
    if seed.dtype != torch.int64 or seed.shape != (2,):
        raise ValueError(
            f"seed must be torch.int64 of shape [2] (seed, offset), got {seed.dtype} of shape"
            f" {tuple(seed.shape)}"
        )
    checks.same_device({"point": point, "seed": seed})
    return seed


def _check_numbers_of_seed(seed: object) -> None:
    error: type[Exception] | None = None
    if not isinstance(seed, (tuple, list)) or not all(map(_is_integer, seed)):
        error = TypeError
    elif len(seed) != 2 or not all(-(2**63) <= value < 2**63 for value in seed):
        error = ValueError
    if error is not None:
        raise error(
            "seed must be a torch.Generator, a torch.int64 tensor of shape [2], or two integers"
            f" (seed, offset) from -2^63 to 2^63 - 1; got {seed!r}"
        )


def _is_integer(value: object) -> bool:
    return isinstance(value, (int, np.integer, torch.SymInt)) and not isinstance(value, bool)


def _memory(
    step: Step,
    history: Sequence[Tensor] | Tensor,
    head: int | Tensor | None,
    state: Tensor,
    store: bool,
    inplace: bool,
    out: Tensor | None,
) -> Memory:
    inputs = [*step.tensors, step.table, step.guidance]
    if out is not None:
        out = step_checks.out_target(out, state, state.dtype, inplace, inputs)
    elif inplace:
        out = step_checks.target("base", state, inputs)
    if not store:
        return Memory(out)
    if head is None or not isinstance(history, Tensor):
        raise ValueError("store=True writes into a ring buffer: history in one tensor, with head")
    step_checks.target("history", history, inputs)
    if isinstance(head, Tensor):
        return Memory(out, history)
    slot = (step_checks.integer("head", head) + 1) % history.shape[0]
    return Memory(out, history, slot)
