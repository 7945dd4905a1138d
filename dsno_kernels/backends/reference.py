"""What the ops mean: plain PyTorch, any float dtype and device, differentiable to any order.

Every other backend is tested against these functions in float64. They take and return tensors in
the caller's axes; `n` is the output length, K the number of kept modes, and `alpha_k` is 1 for bin
0 and the Nyquist bin, 2 elsewhere:

    spectral_conv    X = rfft(x)[:K];  Y_k = X_k W_k;  h = irfft(Y, n) + bias
                     y = leaky_relu(h) + residual
    its adjoint      X_k = sum over o of conj(W_k)[i, o] G_k[o], so that <g, S(x)> = <S^T(g), x>
    spectral_conv_weight_grad   dW_k = (alpha_k / n) sum over B, P of conj(X_k) (x) G_k
    truncated_rfft / truncated_irfft   the two transforms alone, spectra as real pairs `[..., 2]`
    group_norm_silu  in reference_norm.py;  noised, denoising_loss  in reference_denoising.py
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dsno_kernels import _layout
from dsno_kernels._modes import alpha
from dsno_kernels.backends import Request
from dsno_kernels.backends._matmul import out_of_reach
from dsno_kernels.backends.reference_denoising import denoising_loss as denoising_loss
from dsno_kernels.backends.reference_denoising import denoising_scale_ as denoising_scale_
from dsno_kernels.backends.reference_denoising import noised as noised
from dsno_kernels.backends.reference_norm import group_norm_silu as group_norm_silu
from dsno_kernels.backends.reference_norm import (
    group_norm_silu_backward as group_norm_silu_backward,
)
from dsno_kernels.backends.reference_steps import abs_rank as abs_rank
from dsno_kernels.backends.reference_steps import exp_step as exp_step
from dsno_kernels.backends.reference_steps import exp_step_backward as exp_step_backward
from dsno_kernels.backends.reference_steps import solver_step as solver_step
from dsno_kernels.precision import compute_dtype


def unsupported(request: Request) -> str | None:
    return None


def _rfft(x: Tensor, modes: int, dim: int) -> Tensor:
    return torch.fft.rfft(x.to(compute_dtype(x.dtype)), dim=dim).narrow(dim, 0, modes)


def _real_where_self_conjugate(spectrum: Tensor, n: int, dim: int) -> Tensor:
    """The spectrum without the imaginary parts that do not exist; some FFT libraries let them leak
    into the result.
    """
    keep = _alpha(spectrum.shape[dim], n, spectrum.real) - 1
    shape = [1] * spectrum.ndim
    shape[dim] = -1
    return torch.complex(spectrum.real, spectrum.imag * keep.view(shape))


def _irfft(spectrum: Tensor, n: int, dim: int) -> Tensor:
    return torch.fft.irfft(_real_where_self_conjugate(spectrum, n, dim), n=n, dim=dim)


def _einsum(equation: str, a: Tensor, b: Tensor, precision: str) -> Tensor:
    """`torch.einsum` whose products, and those of its gradients, TF32 does not lower."""
    product = torch.einsum(equation, out_of_reach(a, precision), out_of_reach(b, precision))
    return product.to(a.dtype)


def _alpha(modes: int, n: int, like: Tensor) -> Tensor:
    """alpha_k, [K], filled in on the device: a copy from the host breaks CUDA graph capture."""
    values = torch.full((modes,), 2.0, dtype=like.dtype, device=like.device)
    values[0] = alpha(0, n)
    values[modes - 1] = alpha(modes - 1, n)
    return values


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
    """`spectral_conv` or its adjoint; returns y and, with `save_positive`, the sign bits of h.

    Args:
        x: `[B, T, I, P]` in the caller's axes; of the adjoint `[B, T, O, P]`, T the output length
            of the forward op.
        weight: `(I, O, K, 2)`.
        n: output length; of the adjoint the input length of the forward op.
        bias: `(O,)`.  residual: the shape of y.  negative_slope: of LeakyReLU; None for the
            identity.
        x_positive: sign bits that belong to x: x is multiplied by 1 where they are set, else by
            `negative_slope` (the backward of LeakyReLU, before the transform).
        precision: this backend computes in float32 or float64; "bf16" lets PyTorch's TF32 switch
            lower the products.
    """
    dtype = torch.promote_types(compute_dtype(x.dtype), weight.dtype)
    with torch.autocast(x.device.type, enabled=False):
        if x_positive is not None:
            assert negative_slope is not None
            x, negative_slope = (
                apply_positive(x, x_positive, negative_slope, time_dim, channel_dim),
                None,
            )
        X = _rfft(x.to(dtype).movedim((time_dim, channel_dim), (-2, -1)), weight.shape[2], -2)
        W = torch.view_as_complex(weight.to(dtype).contiguous())
        if adjoint:
            T = x.shape[time_dim]
            Y = _einsum("...ko,iok->...ki", X, W.conj(), precision)
            modes = W.shape[2]
            scale = (_alpha(modes, T, Y.real) / T) / (_alpha(modes, n, Y.real) / n)
            Y = Y * scale.unsqueeze(-1)
        else:
            Y = _einsum("...ki,iok->...ko", X, W, precision)
        h = _irfft(Y, n, -2)
        if bias is not None:
            h = h + bias.to(dtype)
        h = h.movedim((-2, -1), (time_dim, channel_dim))
        positive = pack_positive(h, time_dim, channel_dim) if save_positive else None
        y = h if negative_slope is None else F.leaky_relu(h, negative_slope)
        if residual is not None:
            y = y + residual.to(dtype)
        return y.to(out_dtype or dtype), positive


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
    """Gradient of `spectral_conv` by its weight, `(I, O, K, 2)` in float32 or float64."""
    dtype = compute_dtype(torch.promote_types(x.dtype, grad_output.dtype))
    with torch.autocast(x.device.type, enabled=False):
        if grad_positive is not None:
            assert negative_slope is not None
            grad_output = apply_positive(
                grad_output, grad_positive, negative_slope, time_dim, channel_dim
            )
        X = _rfft(x.to(dtype).movedim((time_dim, channel_dim), (-2, -1)), modes, -2)
        G = _rfft(grad_output.to(dtype).movedim((time_dim, channel_dim), (-2, -1)), modes, -2)
        X, G = X[None].flatten(0, -3), G[None].flatten(0, -3)
        dW = _einsum("nki,nko->iok", X.conj(), G, precision)
        n = grad_output.shape[time_dim]
        return torch.view_as_real(dW * (_alpha(modes, n, dW.real) / n))


def truncated_rfft(x: Tensor, modes: int, *, dim: int) -> Tensor:
    """The first `modes` bins of `rfft` along `dim`, as real pairs `[..., K, ..., 2]`."""
    return torch.view_as_real(_rfft(x, modes, dim).resolve_conj())


def truncated_irfft(spectrum: Tensor, n: int, *, dim: int) -> Tensor:
    """`irfft` to length n of the first bins, given as real pairs `[..., K, ..., 2]`; the other bins
    are zero.
    """
    dtype = compute_dtype(spectrum.dtype)
    return _irfft(torch.view_as_complex(spectrum.to(dtype).contiguous()), n, dim)


def pack_positive(h: Tensor, time_dim: int, channel_dim: int) -> Tensor:
    """Bits `h > 0`, uint8 `[B, T, C, ceil(P/8)]`; bit j of byte q belongs to pixel 8q + j."""
    bits = F.pad(
        (_to_btcp(h, time_dim, channel_dim) > 0).to(torch.uint8),
        (0, -_layout.group_sizes(h.shape, time_dim, channel_dim)[1] % 8),
    )
    shifts = torch.arange(8, dtype=torch.uint8, device=h.device)
    return (bits.unflatten(-1, (-1, 8)) << shifts).sum(-1, dtype=torch.uint8)


def apply_positive(
    g: Tensor, positive: Tensor, negative_slope: float, time_dim: int, channel_dim: int
) -> Tensor:
    """The derivative of LeakyReLU: g where the bit is set, `negative_slope * g` elsewhere; linear
    in g.
    """
    shifts = torch.arange(8, dtype=torch.uint8, device=g.device)
    bits = (
        (positive.unsqueeze(-1) >> shifts & 1)
        .flatten(-2)
        .narrow(-1, 0, _layout.group_sizes(g.shape, time_dim, channel_dim)[1])
    )
    batch_group, pixel_group = _layout.axis_groups(g.ndim, time_dim, channel_dim)
    shape = [g.shape[axis] for axis in (*batch_group, time_dim, channel_dim, *pixel_group)]
    order = sorted(
        range(g.ndim), key=(*batch_group, time_dim, channel_dim, *pixel_group).__getitem__
    )
    return torch.where(bits.reshape(shape).permute(order).bool(), g, g * negative_slope)


def _to_btcp(x: Tensor, time_dim: int, channel_dim: int) -> Tensor:
    batch_group, pixel_group = _layout.axis_groups(x.ndim, time_dim, channel_dim)
    batch, pixels = _layout.group_sizes(x.shape, time_dim, channel_dim)
    order = (*batch_group, time_dim, channel_dim, *pixel_group)
    return x.permute(order).reshape(batch, x.shape[time_dim], x.shape[channel_dim], pixels)
