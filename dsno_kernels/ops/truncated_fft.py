"""Ops `truncated_rfft` and `truncated_irfft`: the first K bins of a real transform, and back;
spectra as real pairs.

The two are each other's transpose up to a real factor a mode (alpha_k: 1 for bin 0 and Nyquist, 2
elsewhere):

    <truncated_rfft(x), g>  = <x, truncated_irfft((T / alpha_k) g, T)>
    <truncated_irfft(Y), g> = <Y, (alpha_k / n) truncated_rfft(g)>
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dsno_kernels._modes import alpha
from dsno_kernels.backends import Request, reference, select
from dsno_kernels.ops import define, on_reference, under_transform
from dsno_kernels.precision import compute_dtype


def _run_rfft(x: Tensor, modes: int, dim: int, backend: str) -> Tensor:
    if x.numel() == 0:
        return _fake_rfft(x, modes, dim, backend)
    request = Request("truncated_rfft", x.device, x.dtype, length=x.shape[dim], modes=modes)
    spectrum: Tensor = select(backend, request).truncated_rfft(x, modes, dim=dim)
    return spectrum.contiguous()


def _fake_rfft(x: Tensor, modes: int, dim: int, backend: str) -> Tensor:
    shape = [*x.shape, 2]
    shape[dim % x.ndim] = modes
    return x.new_empty(shape, dtype=compute_dtype(x.dtype))


def _run_irfft(spectrum: Tensor, n: int, dim: int, backend: str) -> Tensor:
    if spectrum.numel() == 0:
        return _fake_irfft(spectrum, n, dim, backend)
    modes = spectrum.shape[dim]
    request = Request("truncated_irfft", spectrum.device, spectrum.dtype, length=n, modes=modes)
    x: Tensor = select(backend, request).truncated_irfft(spectrum, n, dim=dim)
    return x.contiguous()


def _fake_irfft(spectrum: Tensor, n: int, dim: int, backend: str) -> Tensor:
    shape = list(spectrum.shape[:-1])
    shape[dim] = n
    return spectrum.new_empty(shape, dtype=compute_dtype(spectrum.dtype))


rfft_op = define(
    "truncated_rfft(Tensor x, SymInt modes, int dim, str backend) -> Tensor", _run_rfft, _fake_rfft
)
irfft_op = define(
    "truncated_irfft(Tensor spectrum, SymInt n, int dim, str backend) -> Tensor",
    _run_irfft,
    _fake_irfft,
)


def _scale_modes(spectrum: Tensor, n: int, dim: int, factor: float, inverse: bool) -> Tensor:
    """The spectrum times `factor * alpha_k`, or times `factor / alpha_k` with `inverse`."""
    weights = torch.full(
        (spectrum.shape[dim],),
        0.5 if inverse else 2.0,
        dtype=spectrum.dtype,
        device=spectrum.device,
    )
    weights[0] = alpha(0, n)
    weights[spectrum.shape[dim] - 1] = alpha(spectrum.shape[dim] - 1, n) ** (-1 if inverse else 1)
    shape = [1] * spectrum.ndim
    shape[dim] = -1
    return spectrum * (weights * factor).view(shape)


class TruncatedRfftFunction(torch.autograd.Function):
    """Autograd of `truncated_rfft`; saves nothing."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, modes: int, dim: int, backend: str) -> Tensor:
        ctx.n, ctx.dim, ctx.backend, ctx.dtype = x.shape[dim], dim, backend, x.dtype
        return rfft_op(x, modes, dim, backend)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        scaled = _scale_modes(grad, ctx.n, ctx.dim, ctx.n, inverse=True)
        return (
            differentiable_irfft(scaled, ctx.n, ctx.dim, ctx.backend).to(ctx.dtype),
            None,
            None,
            None,
        )


class TruncatedIrfftFunction(torch.autograd.Function):
    """Autograd of `truncated_irfft`; saves nothing."""

    @staticmethod
    def forward(ctx: Any, spectrum: Tensor, n: int, dim: int, backend: str) -> Tensor:
        ctx.modes, ctx.n, ctx.dim, ctx.backend = spectrum.shape[dim], n, dim, backend
        ctx.dtype = spectrum.dtype
        return irfft_op(spectrum, n, dim, backend)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        spectrum = differentiable_rfft(grad, ctx.modes, ctx.dim, ctx.backend)
        return (
            _scale_modes(spectrum, ctx.n, ctx.dim, 1 / ctx.n, inverse=False).to(ctx.dtype),
            None,
            None,
            None,
        )


def differentiable_rfft(x: Tensor, modes: int, dim: int, backend: str) -> Tensor:
    if under_transform():
        return on_reference(reference.truncated_rfft, backend, x, modes, dim=dim)
    return TruncatedRfftFunction.apply(x, modes, dim, backend)


def differentiable_irfft(spectrum: Tensor, n: int, dim: int, backend: str) -> Tensor:
    if under_transform():
        return on_reference(reference.truncated_irfft, backend, spectrum, n, dim=dim)
    return TruncatedIrfftFunction.apply(spectrum, n, dim, backend)
