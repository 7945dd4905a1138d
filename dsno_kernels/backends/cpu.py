"""CPU kernels: C++ with SIMD (AVX2, AVX-512, AMX, or portable vectors), in `dsno_kernels._C`.

They run on the OpenMP threads of PyTorch, `torch.get_num_threads()` of them. The truncated
transforms are dense products with cosine and sine tables, folded by symmetry; where so many modes
are kept that a fast Fourier transform does less work, `unsupported` leaves the call to `reference`,
whose transforms are those of `torch.fft`.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from dsno_kernels import _layout
from dsno_kernels.backends import Request
from dsno_kernels.backends.cpu_denoising import denoising_loss as denoising_loss
from dsno_kernels.backends.cpu_denoising import denoising_scale_ as denoising_scale_
from dsno_kernels.backends.cpu_denoising import noised as noised
from dsno_kernels.backends.cpu_steps import abs_rank as abs_rank
from dsno_kernels.backends.cpu_steps import exp_step as exp_step
from dsno_kernels.backends.cpu_steps import exp_step_backward as exp_step_backward
from dsno_kernels.backends.cpu_steps import solver_step as solver_step

try:
    from dsno_kernels import _C
except ImportError as error:  # a checkout that was never built
    _C = None  # type: ignore[assignment]
    _import_error = str(error)

_API = 4  # cpu_api of the extension that this file calls
_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_PRECISIONS = {"fp32": 0, "bf16x3": 1, "tf32": 2, "bf16": 3}
_NONE = (0, 0, 0, 0, 0, 0)

# A dense transform of T points costs about T K operations at the speed of matrix products, a fast
# one 2.5 T log2(T) at a tenth of it; the second bound keeps the tables (2 T K bytes) small.
_MAX_MODES = 256
_MAX_TABLE = 1 << 21


@functools.lru_cache(maxsize=1)
def _missing() -> str | None:
    """Why the extension cannot be called; None where it can."""
    how = "pip install -e . --no-build-isolation"
    if _C is None:
        return f"the extension dsno_kernels._C is missing ({_import_error}); build it: {how}"
    api = getattr(_C, "cpu_api", 0)
    if api != _API:
        age = "older" if api < _API else "newer"
        return f"the extension is {age} than this source; rebuild it: {how}"
    return None


def unsupported(request: Request) -> str | None:
    reason = _missing()
    if reason:
        return reason
    if request.device.type != "cpu":
        return "it serves tensors on the CPU"
    if request.dtype not in _DTYPES:
        return "it computes in float32 (accepted: float32, float16, bfloat16)"
    if _prefers_fft(request.length, request.modes):
        return (
            f"a fast Fourier transform does less work for {request.modes} modes of"
            f" {request.length} points; the reference runs that"
        )
    return None


def _prefers_fft(length: int, modes: int) -> bool:
    return modes > _MAX_MODES or length * modes > _MAX_TABLE


def _view(x: Tensor, axes: _layout.Axes) -> tuple[int, int, int, int, int, int]:
    return (
        x.data_ptr(),
        _DTYPES[x.dtype],
        axes.stride_b,
        axes.stride_t,
        axes.stride_c,
        axes.stride_p,
    )


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def spectral_conv(
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
    modes = weight.shape[2]
    dtype = out_dtype or torch.float32
    x, axes = _layout.canonical(x, time_dim, channel_dim)
    stride_i, stride_o, stride_k, stride_part = weight.stride()
    outputs = weight.shape[1]
    if adjoint:
        stride_i, stride_o, outputs = stride_o, stride_i, weight.shape[0]
    kernel_dtype = dtype if dtype in _DTYPES else torch.float32  # float64 is converted at the end
    y = _layout.empty(x, time_dim, channel_dim, n, outputs, kernel_dtype)
    _, y_axes = _layout.canonical(y, time_dim, channel_dim)
    residual_view = _NONE
    if residual is not None:
        residual = residual if residual.dtype in _DTYPES else residual.to(torch.float32)
        residual, residual_axes = _layout.canonical(residual, time_dim, channel_dim)
        residual_view = _view(residual, residual_axes)
    if bias is not None:
        bias = bias.to(torch.float32).contiguous()
    positive = None
    if save_positive:
        positive = torch.empty(
            _layout.positive_shape(axes.B, n, outputs, axes.P), dtype=torch.uint8
        )
    _C.cpu_spectral_conv(
        (axes.B, axes.P, axes.C, outputs, axes.T, n, modes),
        _view(x, axes),
        _view(y, y_axes),
        residual_view,
        (weight.data_ptr(), stride_i, stride_o, stride_k, stride_part),
        _address(bias),
        _address(x_positive),
        _address(positive),
        negative_slope if x_positive is not None and negative_slope is not None else 1.0,
        negative_slope if negative_slope is not None else 1.0,
        negative_slope is not None and x_positive is None,
        adjoint,
        _PRECISIONS[precision],
        torch.get_num_threads(),
    )
    return y.to(dtype), positive


def spectral_conv_weight_grad(
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
    x, axes = _layout.canonical(x, time_dim, channel_dim)
    grad_output, grad_axes = _layout.canonical(grad_output, time_dim, channel_dim)
    grad = torch.empty((axes.C, grad_axes.C, modes, 2), dtype=torch.float32)
    _C.cpu_spectral_conv_weight_grad(
        (axes.B, axes.P, axes.C, grad_axes.C, axes.T, grad_axes.T, modes),
        _view(x, axes),
        _view(grad_output, grad_axes),
        grad.data_ptr(),
        _address(grad_positive),
        1.0 if negative_slope is None else negative_slope,
        _PRECISIONS[precision],
        torch.get_num_threads(),
    )
    return grad


def spectral_conv_backward(
    x: Tensor,
    grad_output: Tensor,
    weight: Tensor,
    *,
    time_dim: int,
    channel_dim: int,
    grad_positive: Tensor | None = None,
    negative_slope: float | None = None,
    precision: str = "fp32",
) -> tuple[Tensor, Tensor]:
    """dx, in the dtype of x and the memory order of `grad_output`, and dW.

    In float32, and up to some 350 channels at K = 2, `grad_output` is transformed once for both;
    elsewhere two kernels run (csrc/cpu/isa/backward.cpp).
    """
    x, axes = _layout.canonical(x, time_dim, channel_dim)
    grad_output, grad_axes = _layout.canonical(grad_output, time_dim, channel_dim)
    grad_x = _layout.empty(grad_output, time_dim, channel_dim, axes.T, axes.C, x.dtype)
    _, grad_x_axes = _layout.canonical(grad_x, time_dim, channel_dim)
    grad_weight = torch.empty(weight.shape, dtype=torch.float32)
    _C.cpu_spectral_conv_backward(
        (axes.B, axes.P, axes.C, grad_axes.C, axes.T, grad_axes.T, weight.shape[2]),
        _view(x, axes),
        _view(grad_output, grad_axes),
        (weight.data_ptr(), *weight.stride()),
        _view(grad_x, grad_x_axes),
        grad_weight.data_ptr(),
        _address(grad_positive),
        1.0 if negative_slope is None else negative_slope,
        _PRECISIONS[precision],
        torch.get_num_threads(),
    )
    return grad_x, grad_weight


def _transform_sizes(x: Tensor, dim: int) -> tuple[Tensor, int, int]:
    """x with its axes before and behind `dim` contiguous, and the sizes of the two groups."""
    return x.contiguous(), math.prod(x.shape[:dim]), math.prod(x.shape[dim + 1 :])


def _transform_axes(
    outer: int, T: int, modes: int, inner: int
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Sizes B, P; strides b, t, c, p of the signal; strides b, k, p of the spectrum.

    Of a transform along the last axis, the rows are the pixels.
    """
    if inner == 1:
        return (1, outer), (0, 1, 0, T), (0, 2, 2 * modes)
    return (outer, inner), (T * inner, inner, 0, 1), (2 * modes * inner, 2 * inner, 2)


def truncated_rfft(x: Tensor, modes: int, *, dim: int) -> Tensor:
    T = x.shape[dim]
    x, outer, inner = _transform_sizes(x, dim)
    spectrum = torch.empty((*x.shape[:dim], modes, *x.shape[dim + 1 :], 2), dtype=torch.float32)
    sizes, strides, spectrum_strides = _transform_axes(outer, T, modes, inner)
    _C.cpu_truncated_rfft(
        (*sizes, T, modes),
        (x.data_ptr(), _DTYPES[x.dtype], *strides),
        spectrum.data_ptr(),
        spectrum_strides,
        torch.get_num_threads(),
    )
    return spectrum


def truncated_irfft(spectrum: Tensor, n: int, *, dim: int) -> Tensor:
    modes = spectrum.shape[dim]
    spectrum = spectrum.to(torch.float32).contiguous()
    outer, inner = math.prod(spectrum.shape[:dim]), math.prod(spectrum.shape[dim + 1 : -1])
    x = torch.empty((*spectrum.shape[:dim], n, *spectrum.shape[dim + 1 : -1]), dtype=torch.float32)
    sizes, strides, spectrum_strides = _transform_axes(outer, n, modes, inner)
    _C.cpu_truncated_irfft(
        (*sizes, n, modes),
        (x.data_ptr(), _DTYPES[torch.float32], *strides),
        spectrum.data_ptr(),
        spectrum_strides,
        torch.get_num_threads(),
    )
    return x
