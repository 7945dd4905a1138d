"""`noised` and `denoising_loss` on the CPU: layouts and addresses for `dsno_kernels._C`.

Every tensor is brought into the memory order of images, with the batch outermost (a copy only where
it differs), so that the kernels see `[samples][size]`. Signatures are those of
`reference_denoising`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dsno_kernels import _dense
from dsno_kernels.backends.cpu_steps import _DTYPES, _pairs, _threads, exp_step
from dsno_kernels.backends.reference_denoising import scale_rows

try:
    from dsno_kernels import _C
except ImportError:  # `cpu.unsupported` says so
    _C = None  # type: ignore[assignment]

_NUMBERS = {torch.float32: 0, torch.float64: 3}  # of coefficients

Coefficient = float | tuple[int, int, int]


def _coefficients(
    given: Sequence[Tensor | None], values: Sequence[float]
) -> tuple[tuple[Coefficient, ...], list[Tensor]]:
    """What the kernels take, and what must stay alive for them."""
    made: list[Coefficient] = []
    alive: list[Tensor] = []
    for x, value in zip(given, values, strict=True):
        if x is None:
            made.append(value)
            continue
        if x.dtype not in _NUMBERS:
            x = x.to(torch.float32)
        alive.append(x)
        made.append((x.data_ptr(), _NUMBERS[x.dtype], x.stride(0) if x.ndim else 0))
    return tuple(made), alive


def noised(
    images: Tensor,
    *,
    noise: Tensor | None,
    seeds: Tensor | None,
    coefficients: Sequence[Tensor | None],
    values: Sequence[float],
    out_dtype: torch.dtype,
) -> Tensor:
    # A result in float64 of inputs that are not is converted at the end.
    dtype = out_dtype if out_dtype in _DTYPES else torch.float32
    y = _dense.output_like(images, dtype, per_sample=True)
    images = _dense.laid_out_like(images, y)
    noise = None if noise is None else _dense.laid_out_like(noise, y)
    seeds = None if seeds is None else seeds.contiguous()
    numbers, _alive = _coefficients(coefficients, values)
    samples, elements = len(y), y.numel()
    _C.cpu_noised(
        samples,
        elements // samples,
        _pairs((images, noise, y)),
        0 if seeds is None else seeds.data_ptr(),
        numbers,
        _threads(elements),
    )
    return y if dtype == out_dtype else y.to(out_dtype)


def denoising_loss(
    output: Tensor,
    images: Tensor,
    *,
    noise: Tensor | None,
    seeds: Tensor | None,
    coefficients: Sequence[Tensor | None],
    values: Sequence[float],
    ceiling: float,
    grad_dtype: torch.dtype | None,
    mean: bool,
) -> tuple[Tensor, Tensor | None]:
    layout = _dense.output_like(images, grad_dtype or images.dtype, per_sample=True)
    grad = None if grad_dtype is None else layout
    output, images = (_dense.laid_out_like(x, layout) for x in (output, images))
    noise = None if noise is None else _dense.laid_out_like(noise, layout)
    seeds = None if seeds is None else seeds.contiguous()
    numbers, _alive = _coefficients(coefficients, values)
    samples, elements = len(images), images.numel()
    loss = torch.empty(() if mean else samples, dtype=torch.float32)
    _C.cpu_denoising_loss(
        samples,
        elements // samples,
        _pairs((output, images, noise, grad)),
        0 if seeds is None else seeds.data_ptr(),
        numbers,
        ceiling,
        mean,
        loss.data_ptr(),
        _threads(elements),
    )
    return loss, grad


def denoising_scale_(grad: Tensor, g: Tensor) -> None:
    rows = scale_rows(g)
    exp_step(
        [grad],
        coefficients=rows,
        values=[],
        index=None,
        head=None,
        ring=0,
        out_dtype=grad.dtype,
        out=grad,
    )
