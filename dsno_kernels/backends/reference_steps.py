"""What the integrator steps mean: plain PyTorch, any float dtype and device, differentiable.

    exp_step      y = sum over j of c_j v_j        v = x, h_0, h_1, .. (, noise)
    its gradients c_j g for each v_j, and the dot products <g, v_j> for the coefficients
    solver_step   a row of a solver's table, see its docstring
    abs_rank      where the |x| of two neighboring ranks stand

A coefficient that is 0 hides what it multiplies: NaN there does not reach the result. Coefficients
come as numbers (`values`), as one row `[cols]`, as a row for each sample `[B, cols]`, or as a table
`[N, cols]` with an `index`, 0-d or `[B]`. Noise is drawn as csrc/cpu/isa/noise.h defines.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from dsno_kernels.backends._solver_step import NEW, Memory, Step

_MASK = 0xFFFFFFFF


def compute_dtype(tensors: Sequence[Tensor | None]) -> torch.dtype:
    """The dtype of the arithmetic: float64 where a tensor is float64, else float32."""
    wide = torch.float64
    for x in tensors:
        if x is not None and x.dtype is wide:
            return wide
    return torch.float32


def select_rows(table: Tensor, index: Tensor | None) -> Tensor:
    """The rows that an index chooses, clamped into the table."""
    if index is None:
        return table
    index = index.clamp(0, table.shape[0] - 1)
    # Brackets would read a tensor without axes on the host.
    return table[index] if index.ndim else table.index_select(0, index.reshape(1))[0]


def select_columns(rows: Tensor, columns: Sequence[int]) -> Tensor:
    """These columns; brackets would copy their numbers to the device."""
    return torch.stack([rows[..., j] for j in columns], -1)


def newest_first(tensors: Sequence[Tensor], head: Tensor | None) -> list[Tensor]:
    """The slots of a ring buffer from slot `head` backwards."""
    if head is None:
        return list(tensors)
    k = len(tensors)
    slots = (head - torch.arange(k, device=head.device)) % k
    return list(torch.stack(list(tensors))[slots].unbind(0))


def _column(rows: Tensor, j: int, like: Tensor, dtype: torch.dtype) -> Tensor:
    column = rows[..., j].to(dtype)
    return column if rows.ndim == 1 else column.reshape(-1, *[1] * (like.ndim - 1))


def _weighted_sum(
    tensors: Sequence[Tensor], row: Sequence[float] | Tensor, dtype: torch.dtype
) -> Tensor:
    total = torch.zeros_like(tensors[0], dtype=dtype)
    for j, tensor in enumerate(tensors):
        if isinstance(row, Tensor):
            c = _column(row, j, tensor, dtype)
            hidden = (c == 0) & ~tensor.isfinite()
            total = total + c * torch.where(hidden, 0, tensor.to(dtype))
        elif row[j] != 0:
            total = total + tensor.to(dtype) * row[j]
    return total


def exp_step(
    tensors: Sequence[Tensor],
    *,
    coefficients: Tensor | None = None,
    values: Sequence[float] = (),
    index: Tensor | None = None,
    head: Tensor | None = None,
    ring: int = 0,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """`sum of c_j v_j`. With `head`, v_1 .. v_ring are the slots of a ring buffer, the newest being
    slot `head`.
    """
    dtype = compute_dtype(tensors)
    tensors = [tensors[0], *newest_first(tensors[1 : 1 + ring], head), *tensors[1 + ring :]]
    row = values if coefficients is None else select_rows(coefficients, index)
    return _weighted_sum(tensors, row, dtype).to(out_dtype or dtype)


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
    """`c_j g` for the j of `columns`, in `dtypes`; and `<g, v_j>` for all tensors, `[B or 1, n]` in
    float64.
    """
    dtype = compute_dtype([g, *tensors])
    row = values if coefficients is None else select_rows(coefficients, index)
    grads = [
        _weighted_sum([g], [row[j]] if not isinstance(row, Tensor) else row[..., j : j + 1], dtype)
        for j in columns
    ]
    samples = g.shape[0] if per_sample else 1
    flat = g.double().reshape(samples, -1)
    dots = [(flat * v.double().reshape(samples, -1)).sum(1) for v in tensors]
    stacked = torch.stack(dots, 1) if dots else flat.new_empty(samples, 0)
    return [grad.to(d) for grad, d in zip(grads, dtypes, strict=True)], stacked


def philox(seed: Tensor, blocks: int) -> Tensor:
    """Philox4x32-10 of counters 0 .. blocks-1, `[blocks, 4]` of 32-bit words in int64.

    Args:
        seed: int64 `[2]`, seed and offset.
    """
    counter = torch.arange(blocks, device=seed.device)
    words = [counter & _MASK, counter >> 32]
    words += [half.expand(blocks) for half in (seed[1] & _MASK, seed[1] >> 32 & _MASK)]
    key = [seed[0] & _MASK, seed[0] >> 32 & _MASK]
    for _ in range(10):
        # Signed 64-bit products wrap as unsigned ones do; the mask removes the copied sign.
        first, second = words[0] * 0xD2511F53, words[2] * 0xCD9E8D57
        words = [
            (second >> 32 & _MASK) ^ words[1] ^ key[0],
            second & _MASK,
            (first >> 32 & _MASK) ^ words[3] ^ key[1],
            first & _MASK,
        ]
        key = [(key[0] + 0x9E3779B9) & _MASK, (key[1] + 0xBB67AE85) & _MASK]
    return torch.stack(words, 1)


def normal_noise(seed: Tensor, count: int) -> Tensor:
    """The first `count` normal numbers of a seed, float64 with the bits of the kernels' uniform
    ones: elements 4q .. 4q+3 from the words of counter q.
    """
    words = philox(seed, -(-count // 4)).to(torch.float32)
    uniform = (words * 2.0**-32 + 2.0**-33).double()  # both steps as float32 rounds them
    radius = torch.sqrt(-2.0 * torch.log(uniform[:, ::2]))  # [blocks, 2]
    angle = 2.0 * math.pi * uniform[:, 1::2]
    return torch.stack([radius * angle.cos(), radius * angle.sin()], 2).reshape(-1)[:count]


def noise_like(x: Tensor, seed: Tensor) -> Tensor:
    """The noise of a seed in the shape of x. Elements count by their place in the shape, the last
    axis fastest, however x lies in memory.
    """
    return normal_noise(seed, x.numel()).reshape(x.shape)


def solver_step(
    step: Step, dtypes: Sequence[torch.dtype | None], memory: Memory = NEW
) -> list[Tensor | None]:
    """base', point', h_0 and the model's next input, each in its dtype; None where that is None.

        m      = u + guidance (output - u)
        h_0    = A point + B m, clamped to [low, high] or to [-scale, scale] and divided by scale
        base'  = a_b base + sum of c_b[j] h_j + s noise
        point' = a_p base' + sum of c_p[j] h_j        where the step looks ahead; else base'
        input' = c_in point'

    Columns of the table: A, B, a_b, c_b[0..K-1], s, a_p, c_p[0..K-1], c_in. `memory.base` receives
    base', and `memory.ring` h_0 in its slot after `head`, or in `memory.slot`.
    """
    dtype, K, ring = compute_dtype(step.tensors), step.order, memory.ring
    row = step.values if step.table is None else select_rows(step.table, step.index)
    entries = newest_first(step.history, step.head)[: K - 1]

    def weighted(tensors: Sequence[Tensor], columns: Sequence[int]) -> Tensor:
        if isinstance(row, Tensor):
            return _weighted_sum(tensors, select_columns(row, columns), dtype)
        return _weighted_sum(tensors, [row[j] for j in columns], dtype)

    m = step.output
    if step.unconditional is not None:
        weights: Sequence[float] | Tensor = [1 - step.guidance_value, step.guidance_value]
        if step.guidance is not None:
            weights = torch.stack([1 - step.guidance, step.guidance], -1)
        m = _weighted_sum([step.unconditional, m], weights, dtype)
    h = weighted([step.point, m], [0, 1])
    if step.scale is not None:
        limit = step.scale.to(dtype).reshape(-1, *[1] * (h.ndim - 1))
        h = torch.clamp(h, -limit, limit) / limit
    elif step.low is not None or step.high is not None:
        h = torch.clamp(h, step.low, step.high)
    noise = step.noise if step.seed is None else noise_like(step.point, step.seed)
    terms = [step.point if step.base is None else step.base, h, *entries]
    columns = [2, *range(3, 4 + len(entries))]
    if noise is not None:
        terms, columns = [*terms, noise.to(dtype)], [*columns, 3 + K]
    total = weighted(terms, columns)
    new_point = total.clone()  # an op must not return one tensor twice
    if step.looks_ahead:
        ahead = [4 + K, *range(5 + K, 6 + K + len(entries))]
        new_point = weighted([total, h, *entries], ahead)
    model_input = weighted([new_point], [5 + 2 * K])
    if memory.base is not None:
        memory.base.copy_(total)
    if ring is not None and step.head is None:
        ring[memory.slot].copy_(h)
    elif ring is not None and step.head is not None:
        after = ((step.head + 1) % ring.shape[0]).reshape(1)
        ring.index_copy_(0, after, h.to(ring.dtype).unsqueeze(0))
    results = (total, new_point, h, model_input)
    return [None if d is None else t.to(d) for t, d in zip(results, dtypes, strict=True)]


def abs_rank(x: Tensor, rank: int) -> Tensor:
    """Where in each sample the |x| of `rank` (from 0) and of the next rank stand, int64 `[B, 2]`;
    the place of a NaN, twice, where there is one.
    """
    values, order = x.detach().flatten(1).abs().sort(dim=1, stable=True)  # NaN last
    last = x[0].numel() - 1
    places = torch.stack([order[:, rank], order[:, min(rank + 1, last)]], 1)
    return torch.where(values[:, -1:].isnan(), order[:, -1:], places)
