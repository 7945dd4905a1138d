"""The four ops from two launched transforms: what the backends `cuda` and `cupy` share.

A spectral convolution is four launches: the first K bins of x, one layout copy of W, the complex
products of all bins by cuBLAS (`torch.bmm`), and the inverse transform. The transforms write and
read with free strides, so the spectra already have the layout that cuBLAS takes, and alpha_k / n is
in the tables. bias, LeakyReLU, residual and sign bits are PyTorch operations behind it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dsno_kernels import _layout
from dsno_kernels._layout import Axes
from dsno_kernels.backends import Request, reference
from dsno_kernels.backends._matmul import products
from dsno_kernels.backends._transforms import (
    TYPES,
    Axis,
    Plan,
    plan,
    twiddles_on,
    weight_factors_on,
)
from dsno_kernels.precision import compute_dtype

# Launches a plan: input, output, table.
Launch = Callable[[Plan, Tensor, Tensor, Tensor], None]


class Spectra(NamedTuple):
    """Complex spectra of `[B, T, C, P]`, rows = B * P: `[K, rows, C]` or, planar, `[K, C, rows]`.

    Planar where pixels are closer in memory than channels, so that the transforms read and write
    neighbors.
    """

    data: Tensor
    planar: bool

    def rows(self) -> Tensor:
        """`[K, rows, C]`, as a view."""
        return self.data.mT if self.planar else self.data


class _Route(NamedTuple):
    """From a signal to its spectra: the plan, and the shape and layout of the spectra."""

    plan: Plan
    shape: tuple[int, int, int]
    planar: bool


def _strides(B: int, C: int, P: int, planar: bool) -> tuple[int, int, int]:
    """Strides of B, C and P in spectra."""
    return (P, B * P, 1) if planar else (P * C, 1, C)


@functools.lru_cache(maxsize=4096)
def _analysis(axes: Axes, modes: int, kind: str, offset: int) -> _Route:
    """How to transform a signal with these canonical axes."""
    planar = axes.P > 1 and axes.stride_p < axes.stride_c
    B, T, C, P = axes[:4]
    shape = (modes, C, B * P) if planar else (modes, B * P, C)
    ins, outs = (axes.stride_b, axes.stride_c, axes.stride_p), _strides(B, C, P, planar)
    beside = tuple(map(Axis, (B, C, P), ins, outs))
    chosen = plan(kind, False, T, modes, beside, axes.stride_t, 0, B * C * P, offset)
    return _Route(chosen, shape, planar)


@functools.lru_cache(maxsize=4096)
def _synthesis(axes: Axes, modes: int, kind: str, planar: bool) -> Plan:
    """How to transform spectra to a signal with these canonical axes."""
    B, n, C, P = axes[:4]
    ins = (2 * stride for stride in _strides(B, C, P, planar))
    outs = (axes.stride_b, axes.stride_c, axes.stride_p)
    beside = tuple(map(Axis, (B, C, P), ins, outs))
    return plan(kind, True, n, modes, beside, 2 * B * C * P, 1, axes.stride_t, 0)


def unsupported_call(request: Request) -> str | None:
    """What no launcher of these transforms serves."""
    if request.device.type != "cuda":
        return "it needs CUDA tensors"
    if request.dtype not in TYPES:
        return f"{request.dtype} is not one of {', '.join(map(str, TYPES))}"
    if request.dtype == torch.float64 and request.op.startswith("spectral_conv"):
        return "it computes products in float32; torch.float64 is for the reference backend"
    if torch.version.hip is not None:
        return "it is for NVIDIA GPUs only"
    return None


class Composed:
    """The ops, of one launcher. See `backends.reference` for what they compute."""

    def __init__(self, launch: Launch) -> None:
        self.launch = launch

    @torch.no_grad()
    def truncated_rfft(self, x: Tensor, modes: int, *, dim: int) -> Tensor:
        """The first `modes` bins of `rfft` along `dim`, as real pairs `[..., K, ..., 2]`."""
        return self._truncated(x, dim % x.ndim, modes, inverse=False)

    @torch.no_grad()
    def truncated_irfft(self, spectrum: Tensor, n: int, *, dim: int) -> Tensor:
        """`irfft` to length n of the first bins, real pairs `[..., K, ..., 2]`; other bins are
        zero.
        """
        spectrum = spectrum.to(compute_dtype(spectrum.dtype))
        return self._truncated(spectrum, dim % (spectrum.ndim - 1), n, inverse=True)

    def _truncated(self, x: Tensor, dim: int, count: int, inverse: bool) -> Tensor:
        axes = _beside(x, dim, count, inverse)
        if axes is None:
            x = x.contiguous()
            axes = _beside(x, dim, count, inverse)
            assert axes is not None
        shape = [*x.shape[:-1]] if inverse else [*x.shape, 2]
        shape[dim] = count
        output = x.new_empty(shape, dtype=compute_dtype(x.dtype))
        n, modes = (count, x.shape[dim]) if inverse else (x.shape[dim], count)
        part = x.stride(-1) if inverse else 0
        chosen = plan(
            TYPES[output.dtype if inverse else x.dtype], inverse, n, modes, axes,
            x.stride(dim), part, axes[1].size, x.data_ptr() % 16,
        )  # fmt: skip
        scale_length = n if inverse else 0
        table = twiddles_on(n, modes, inverse, scale_length, compute_dtype(x.dtype), x.device)
        self.launch(chosen, x, output, table)
        return output

    def _spectra(self, x: Tensor, axes: Axes, modes: int) -> Spectra:
        """The first bins of x, which has the canonical axes `axes`."""
        route = _analysis(axes, modes, TYPES[x.dtype], x.data_ptr() % 16)
        data = torch.empty(route.shape, dtype=torch.complex64, device=x.device)
        table = twiddles_on(axes.T, modes, False, 0, torch.float32, x.device)
        self.launch(route.plan, x, data, table)
        return Spectra(data, route.planar)

    @torch.no_grad()
    def spectral_conv(
        self,
        x: Tensor,
        weight: Tensor,
        *,
        time_dim: int,
        channel_dim: int,
        n: int,
        adjoint: bool = False,
        bias: Tensor | None = None,
        residual: Tensor | None = None,
        negative_slope: float | None = None,
        out_dtype: torch.dtype | None = None,
        save_positive: bool = False,
        x_positive: Tensor | None = None,
        precision: str = "fp32",
    ) -> tuple[Tensor, Tensor | None]:
        """See `backends.reference.spectral_conv`."""
        if x_positive is not None:
            assert negative_slope is not None
            x = reference.apply_positive(x, x_positive, negative_slope, time_dim, channel_dim)
            negative_slope = None
        out_dtype = out_dtype or torch.float32
        epilogue = bias is not None or residual is not None or negative_slope is not None
        in_float32 = epilogue or save_positive or out_dtype == torch.float64
        channels, modes = weight.shape[0 if adjoint else 1], weight.shape[2]
        h = _layout.empty(
            x, time_dim, channel_dim, n, channels, torch.float32 if in_float32 else out_dtype
        )
        x, axes = _layout.canonical(x, time_dim, channel_dim)
        spectra = self._spectra(x, axes, modes)
        mixed = _mixed(spectra, weight, adjoint, precision)
        out = _layout.canonical(h, time_dim, channel_dim)[1]
        scale_length = axes.T if adjoint else n
        table = twiddles_on(n, modes, True, scale_length, torch.float32, x.device)
        self.launch(_synthesis(out, modes, TYPES[h.dtype], mixed.planar), mixed.data, h, table)
        if not in_float32:
            return h, None
        if bias is not None:
            shape = [1] * h.ndim
            shape[channel_dim] = -1
            h += bias.to(torch.float32).view(shape)
        positive = reference.pack_positive(h, time_dim, channel_dim) if save_positive else None
        y = h if negative_slope is None else F.leaky_relu_(h, negative_slope)
        if residual is not None:
            y += residual.to(torch.float32)
        return y.to(out_dtype), positive

    @torch.no_grad()
    def spectral_conv_weight_grad(
        self,
        x: Tensor,
        grad_output: Tensor,
        modes: int,
        *,
        time_dim: int,
        channel_dim: int,
        grad_positive: Tensor | None = None,
        negative_slope: float | None = None,
        precision: str = "fp32",
    ) -> Tensor:
        """See `backends.reference.spectral_conv_weight_grad`."""
        if grad_positive is not None:
            assert negative_slope is not None
            grad_output = reference.apply_positive(
                grad_output, grad_positive, negative_slope, time_dim, channel_dim
            )
        x, axes = _layout.canonical(x, time_dim, channel_dim)
        grad_output, grad_axes = _layout.canonical(grad_output, time_dim, channel_dim)
        first = self._spectra(x, axes, modes).rows()
        spectra = self._spectra(grad_output, grad_axes, modes)
        # cuBLAS conjugates what it transposes: of a planar gradient, conj(dW) costs no copy.
        left, right = (
            (first.mT, spectra.rows().conj()) if spectra.planar else (first.mH, spectra.rows())
        )
        product = torch.view_as_real(products(left, right, precision))  # [K, I, O, 2]
        factors = weight_factors_on(axes.T, grad_axes.T, modes, spectra.planar, x.device)
        grad = torch.empty((axes.C, grad_axes.C, modes, 2), dtype=torch.float32, device=x.device)
        return torch.mul(product.permute(1, 2, 0, 3), factors, out=grad)


def _beside(x: Tensor, dim: int, count: int, inverse: bool) -> tuple[Axis, Axis] | None:
    """The axes before and after the transformed one, merged; None where one stride does not do."""
    shape, strides = x.shape, x.stride()
    outer = _layout.merged(shape, strides, range(dim))
    inner = _layout.merged(shape, strides, range(dim + 1, x.ndim - inverse))
    if outer is None or inner is None:
        return None
    return Axis(*outer, count * inner[0]), Axis(*inner, 1)


def _mixed(spectra: Spectra, weight: Tensor, adjoint: bool, precision: str) -> Spectra:
    """The products of every bin with W or, adjoint, with its conjugate transpose, in the layout of
    `spectra`. W is copied once; cuBLAS conjugates what it transposes.
    """
    order = (2, 1, 0, 3) if spectra.planar else (2, 0, 1, 3)
    W = torch.view_as_complex(weight.permute(order).contiguous())  # [K, O, I] or [K, I, O]
    if adjoint:
        W = W.mH
    factors = (W, spectra.data) if spectra.planar else (spectra.data, W)
    return Spectra(products(*factors, precision), spectra.planar)
