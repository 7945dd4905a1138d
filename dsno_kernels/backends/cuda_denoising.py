"""`noised` and `denoising_loss` on CUDA: parameters for the kernels of csrc/cuda/denoising.cuh.

Every tensor is brought into the memory order of images, with the batch outermost (a copy only where
it differs), so that the kernels see `[samples][size]`. The ops are shared by both launchers, as
those of `cuda_steps`; signatures are those of `reference_denoising`.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

import torch
from torch import Tensor

from dsno_kernels import _dense
from dsno_kernels.backends.cuda_steps import (
    _MAX_GRID,
    _THREADS,
    Launch,
    _data,
    _kind,
    _parts,
    _present,
)
from dsno_kernels.backends.reference_steps import compute_dtype

_NOISED = struct.Struct("<10q" + "3qd" * 2)
_LOSS = struct.Struct("<15q" + "3qd" * 4 + "d")
_SCALE = struct.Struct("<5q3q2d")


def _kind_of(tensors: Sequence[Tensor | None], seeds: Tensor | None, size: int) -> tuple[str, int]:
    """The kernel, and how many elements move together: one where the blocks of four in which noise
    is drawn do not begin with vectors.
    """
    kind, width = _kind(tensors)
    if seeds is None or size % 4 == 0 or width == 1:
        return kind, width
    return f"{'f64' if kind.startswith('f64') else 'any'}_v1", 1


def _numbers(coefficients: Sequence[Tensor | None], values: Sequence[float]) -> list[int | float]:
    """The words of a struct PerSample each."""
    words: list[int | float] = []
    for x, value in zip(coefficients, values, strict=True):
        words += [*_data(x), x.stride(0) if x is not None and x.ndim else 0, value]
    return words


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


class Denoising:
    """The ops, of one launcher."""

    def __init__(self, launch: Launch) -> None:
        self.launch = launch

    @torch.no_grad()
    def noised(
        self,
        images: Tensor,
        *,
        noise: Tensor | None,
        seeds: Tensor | None,
        coefficients: Sequence[Tensor | None],
        values: Sequence[float],
        out_dtype: torch.dtype,
    ) -> Tensor:
        y = _dense.output_like(images, out_dtype, per_sample=True)
        images = _dense.laid_out_like(images, y)
        noise = None if noise is None else _dense.laid_out_like(noise, y)
        seeds = None if seeds is None else seeds.contiguous()
        samples, size = len(y), y[0].numel()
        kind, width = _kind_of([images, noise, y], seeds, size)
        parts = _parts(samples, size, _THREADS * width)
        params = _NOISED.pack(
            samples, size, parts, *_data(images), *_data(noise), *_data(y), _address(seeds),
            *_numbers(coefficients, values),
        )  # fmt: skip
        touched = _present(y, images, noise, seeds, *coefficients)
        self.launch(f"denoising_noised_{kind}", min(samples * parts, _MAX_GRID), params, touched)
        return y

    @torch.no_grad()
    def denoising_loss(
        self,
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
        dtype = compute_dtype([output, images, noise])
        layout = _dense.output_like(images, grad_dtype or images.dtype, per_sample=True)
        grad = None if grad_dtype is None else layout
        output, images = (_dense.laid_out_like(x, layout) for x in (output, images))
        noise = None if noise is None else _dense.laid_out_like(noise, layout)
        seeds = None if seeds is None else seeds.contiguous()
        samples, size = len(images), images[0].numel()
        kind, width = _kind_of([output, images, noise, grad], seeds, size)
        parts = _parts(samples, size, _THREADS * width)
        loss = images.new_empty(() if mean else samples, dtype=dtype)
        shares = images.new_empty(samples * parts, dtype=torch.float64)
        tensors = output, images, noise, grad, loss
        params = _LOSS.pack(
            samples, size, parts, *(word for x in tensors for word in _data(x)),
            _address(seeds), shares.data_ptr(), *_numbers(coefficients, values), ceiling,
        )  # fmt: skip
        touched = _present(*tensors, seeds, shares, *coefficients)
        self.launch(f"denoising_loss_{kind}", min(samples * parts, _MAX_GRID), params, touched)
        if mean:
            self.launch("denoising_loss_mean", 1, params, touched)
        else:
            self.launch("denoising_loss_sum", min(samples, _MAX_GRID), params, touched)
        return loss, grad

    @torch.no_grad()
    def denoising_scale_(self, grad: Tensor, g: Tensor) -> None:
        samples, size = len(grad), grad[0].numel()
        kind, width = _kind([grad])
        parts = _parts(samples, size, _THREADS * width)
        count = len(g) if g.ndim else 1
        params = _SCALE.pack(samples, size, parts, *_data(grad), *_numbers([g], [0.0]), count)
        self.launch(f"denoising_scale_{kind}", min(samples * parts, _MAX_GRID), params, [grad, g])
