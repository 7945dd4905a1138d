"""`exp_step`: what it accepts, what it promises, and every check."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dsno_kernels.functional import checks, step_checks
from dsno_kernels.ops import exp_step as _step


def exp_step(
    x: Tensor,
    history: Sequence[Tensor] | Tensor,
    coefficients: Sequence[float] | Tensor,
    *,
    noise: Tensor | None = None,
    index: int | Tensor | None = None,
    head: int | Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    inplace: bool = False,
    out: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    r"""One exponential-integrator step, in one pass over memory.

    .. math:: x' = a\,x + \sum_j c_j\,h_j\ (+\ s \cdot \mathrm{noise})

    DDIM, DEIS, DPM-Solver(++), UniPC, Heun and Runge-Kutta stages, EDM and flow-matching Euler are
    this line with different coefficients. Sums are float32 (float64 where a tensor is float64). A
    term whose coefficient is 0 is skipped: its tensor may hold anything, NaN included.

    Args:
        x: real, floating point, any shape and strides. Tensors that lie in memory as x does go
            straight through; others are copied once.
        history: up to 8 tensors of the shape of x, newest first, of any float dtypes; or one tensor
            ``[k, *x.shape]``, newest first, or, with ``head``, a ring buffer.
        coefficients: ``(a, c_0, c_1, ..)``, then s with noise: numbers; or a tensor ``[cols]``, or
            ``[B, cols]`` with a row for each sample (axis 0 of x); or, with ``index``, a table
            ``[N, cols]``. Numbers must be finite (`torch.compile` compiles again where
            they change); tensors are not looked at (that would wait for the device).
        noise: the shape of x.
        index: the row of the table: an int, an integer tensor without axes (one compiled graph and
            no host sync serves all steps; of ints `torch.compile` makes two, for the first value
            and for all others), or ``[B]``, a row for each sample. Samples of different orders
            share a call, as unused columns are 0. Out of range raises on the CPU and is clamped on
            other devices.
        head: the newest slot of the ring buffer, an int or an integer tensor (compiled as `index`
            is): entry j is slot ``(head - j) mod k``.
        out_dtype: dtype of the result; default that of x.
        inplace: write the result into x and return x; records no graph.
        out: likewise a tensor of your own, such as a slot of a larger one: the shape and device of
            x, the dtype of the result. Written straight where it is dense (with a row for each
            sample, the batch axis outermost), else through a copy. Memory whose elements overlap
            is refused, here and in place.
        backend: the name of one; None takes the fastest that can run here.

    Returns:
        x', the shape of x, dense in the memory order of x; or `out`.

    Raises:
        TypeError: dtypes. ValueError: shapes, devices, counts, coefficients or an index that do not
            fit. NotImplementedError: a backend that was asked for and cannot run this.

    Differentiable in x, history, noise and coefficient tensors, to any order; without a gradient
    for coefficients nothing of the size of x is kept. The gradient of a coefficient is <g, h_j>,
    also where it is 0.

    Equivalent to::

        a * x + sum(c * h for c, h in zip(cs, history)) + s * noise

    Source: DEIS (arXiv 2204.13902), eq. 14; DPM-Solver (arXiv 2206.00927); UniPC (arXiv
    2302.04867).

    Example:
        >>> x, eps, before = torch.randn(3, 2, 3, 8, 8).unbind(0)
        >>> dk.exp_step(x, [eps, before], [1.02, -0.3, 0.1]).shape
        torch.Size([2, 3, 8, 8])
    """
    tensors, head, ring = _tensors(x, history, noise, head)
    table, values, index = step_checks.rows(coefficients, index, len(tensors), x)
    name = checks.backend(backend)
    if out_dtype is not None and out_dtype not in checks.REAL_DTYPES:
        raise TypeError(
            f"out_dtype must be one of {checks.names(checks.REAL_DTYPES)}, got {out_dtype}"
        )
    if out is not None:
        out = step_checks.out_target(out, x, out_dtype, inplace, [*tensors, table])
    elif inplace:
        if out_dtype not in (None, x.dtype):
            raise ValueError(f"inplace=True writes into x ({x.dtype}); out_dtype is {out_dtype}")
        out = step_checks.target("x", x, [*tensors, table])
    if out is None:
        return _step.differentiable_exp_step(
            tensors, table, values, index, out_dtype or x.dtype, name, head, ring
        )
    _step.exp_step_(out, tensors, table, values, index, head, ring, name)
    return out


def _tensors(
    x: Tensor,
    history: Sequence[Tensor] | Tensor,
    noise: Tensor | None,
    head: int | Tensor | None,
) -> tuple[list[Tensor], Tensor | None, int]:
    """x, the history and the noise, checked; the head where it is a tensor, and the ring's size."""
    checks.real("x", x)
    entries, head = step_checks.history_entries(history, head, x)
    tensors = [x, *entries]
    if noise is not None:
        tensors.append(noise)
    step_checks.all_like((*step_checks.ENTRIES[: len(entries)], "noise"), tensors[1:], x)
    return tensors, head, len(entries) if head is not None else 0
