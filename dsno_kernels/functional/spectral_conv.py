"""`spectral_conv` and its gradients: what they accept, what they promise, and every check."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dsno_kernels import precision as precisions
from dsno_kernels.functional import checks
from dsno_kernels.ops import spectral_conv as _conv
from dsno_kernels.ops import spectral_conv_backward as _backward
from dsno_kernels.ops import spectral_conv_weight_grad as _weight_grad


def spectral_conv(
    x: Tensor,
    weight: Tensor,
    *,
    time_dim: int = 1,
    channel_dim: int = 2,
    n: int | None = None,
    bias: Tensor | None = None,
    activation: str | None = None,
    negative_slope: float = 0.01,
    residual: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    precision: str | None = None,
    backend: str | None = None,
) -> Tensor:
    r"""Spectral convolution along one axis: K Fourier modes, channels mixed in each, and back.

    .. math:: y = \mathrm{act}(\mathrm{irfft}(\mathrm{rfft}(x)_{k<K} \cdot W_k,\ n) + b) + r

    As in ``torch.fft.irfft``, the imaginary part of bin 0 (and of bin n/2) of the product never
    reaches y.

    Args:
        x: real, floating point, any strides; e.g. ``(B, T, I, H, W)``, ``(B, I, T, H, W)``,
            ``(B, I, L)``, ``(B, T, I)``.
        weight: ``(I, O, K, 2)``, real and imaginary part last, ``1 <= K <= min(T, n)//2 + 1``.
        time_dim, channel_dim: the axes of x that hold time and channels.
        n: length of y along time; default T.
        bias: ``(O,)``, added before the activation.
        activation: None or "leaky_relu".
        negative_slope: of the LeakyReLU.
        residual: added after the activation; the shape of y.
        out_dtype: dtype of y; default that of x (promoted with the residual's).
        precision: "fp32", "bf16x3", "tf32", "bf16"; None follows the dtype of y and, for float32,
            PyTorch's float32 matmul setting.
        backend: the name of one; None takes the fastest that can run here (``dk.explain`` tells
            which).

    Returns:
        y: the shape of x with T -> n and I -> O, in the memory order of x.

    Raises:
        TypeError: a dtype that is not floating point. ValueError: shapes, devices or names that do
            not fit.
        NotImplementedError: a backend that was asked for and cannot run this.

    Equivalent to::

        X = torch.fft.rfft(x, dim=1)[:, :K]  # x (B, T, I, H, W)
        Y = torch.einsum("bkihw,iok->bkohw", X, torch.view_as_complex(weight))
        y = torch.fft.irfft(Y, n=n, dim=1)

    Source: DSNO (arXiv 2211.13449), temporal convolution layer; FNO (arXiv 2010.08895), eq. 4.

    Example:
        >>> x, weight = torch.randn(2, 4, 8, 16, 16), torch.randn(8, 8, 2, 2)
        >>> dk.spectral_conv(x, weight, activation="leaky_relu", residual=x).shape
        torch.Size([2, 4, 8, 16, 16])
    """
    time_dim, channel_dim = checks.axes("x", x, time_dim, channel_dim)
    T = x.shape[time_dim]
    n = checks.length(T if n is None else n)
    checks.weight(weight, x.shape[channel_dim], T, n)
    if activation not in (None, "leaky_relu"):
        raise ValueError(f"unknown activation {activation!r}; accepted: None, 'leaky_relu'")
    if isinstance(negative_slope, bool) or not isinstance(negative_slope, (int, float)):
        raise TypeError(f"negative_slope must be a number, got {negative_slope!r}")
    tensors = {"x": x, "weight": weight}
    if bias is not None:
        checks.real("bias", bias)
        if bias.shape != weight.shape[1:2]:
            raise ValueError(f"bias must have shape ({weight.shape[1]},), got {tuple(bias.shape)}")
        tensors["bias"] = bias
    y_dtype = x.dtype
    if residual is not None:
        checks.real("residual", residual)
        y_shape = list(x.shape)
        y_shape[time_dim], y_shape[channel_dim] = n, weight.shape[1]
        if list(residual.shape) != y_shape:
            raise ValueError(
                f"residual must have the shape of the result, {tuple(y_shape)},"
                f" got {tuple(residual.shape)}"
            )
        tensors["residual"] = residual
        y_dtype = torch.promote_types(y_dtype, residual.dtype)
    if out_dtype is not None and out_dtype not in checks.REAL_DTYPES:
        raise TypeError(
            f"out_dtype must be one of {checks.names(checks.REAL_DTYPES)}, got {out_dtype}"
        )
    checks.same_device(tensors)
    compute = precisions.compute_dtype(torch.promote_types(x.dtype, weight.dtype))
    options: dict[str, Any] = {
        "time_dim": time_dim,
        "channel_dim": channel_dim,
        "n": n,
        "bias": bias,
        "residual": residual,
        "negative_slope": float(negative_slope) if activation else None,
        "out_dtype": out_dtype or y_dtype,
        "precision": precisions.choose(precision, out_dtype or y_dtype),
    }
    name = checks.backend(backend)
    if weight.dtype != compute:
        weight = weight.to(compute)
    return _conv.differentiable_spectral_conv(x, weight, backend=name, **options)


def spectral_conv_weight_grad(
    x: Tensor,
    grad_output: Tensor,
    modes: int,
    *,
    time_dim: int = 1,
    channel_dim: int = 2,
    precision: str | None = None,
    backend: str | None = None,
) -> Tensor:
    r"""Gradient of :func:`spectral_conv` with respect to its weight.

    .. math::
        dW_k = \frac{\alpha_k}{n} \sum_{B,P}
            \overline{\mathrm{rfft}(x)_k} \otimes \mathrm{rfft}(g)_k

    with alpha_k = 1 at bin 0 and bin n/2, 2 elsewhere. Differentiable in x and g, to any order.

    Args:
        x: the input of the convolution, ``(.., T, .., I, ..)``.
        grad_output: the gradient g of its output, the shape of x with T -> n and I -> O.
        modes: K.
        time_dim, channel_dim, precision, backend: as in :func:`spectral_conv`.

    Returns:
        ``(I, O, K, 2)`` in float32 (float64 where an input is float64).

    Raises:
        TypeError, ValueError, NotImplementedError: as in :func:`spectral_conv`.

    Example:
        >>> x, g = torch.randn(2, 4, 8, 5, 7), torch.randn(2, 4, 3, 5, 7)
        >>> dk.spectral_conv_weight_grad(x, g, 2).shape
        torch.Size([8, 3, 2, 2])
    """
    time_dim, channel_dim = checks.axes("x", x, time_dim, channel_dim)
    n = _check_gradient(x, grad_output, time_dim, channel_dim)
    checks.modes(modes, x.shape[time_dim], n)
    if grad_output.shape[channel_dim] == 0:
        raise ValueError("grad_output must have at least one channel, got 0")
    checks.same_device({"x": x, "grad_output": grad_output})
    dtype = torch.promote_types(x.dtype, grad_output.dtype)
    options: dict[str, Any] = {
        "time_dim": time_dim,
        "channel_dim": channel_dim,
        "precision": precisions.choose(precision, dtype),
    }
    name = checks.backend(backend)
    return _weight_grad.differentiable_weight_grad(x, grad_output, modes, backend=name, **options)


def spectral_conv_backward(
    x: Tensor,
    grad_output: Tensor,
    weight: Tensor,
    *,
    time_dim: int = 1,
    channel_dim: int = 2,
    precision: str | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Gradients of :func:`spectral_conv` with respect to x and to its weight, in one pass.

    What its backward runs. Differentiable in all three, to any order; a backend that has no kernel
    for both runs one for each (``dk.explain`` tells).

    Args:
        x: the input of the convolution, ``(.., T, .., I, ..)``.
        grad_output: the gradient g of its output, the shape of x with T -> n and I -> O.
        weight: ``(I, O, K, 2)``.
        time_dim, channel_dim, precision, backend: as in :func:`spectral_conv`.

    Returns:
        dx, of the shape and dtype of x, and dW, as :func:`spectral_conv_weight_grad` returns it.

    Raises:
        TypeError, ValueError, NotImplementedError: as in :func:`spectral_conv`.

    Example:
        >>> x, g, weight = torch.randn(2, 4, 8, 5), torch.randn(2, 4, 3, 5), torch.randn(8, 3, 2, 2)
        >>> dx, dW = dk.spectral_conv_backward(x, g, weight)
    """
    time_dim, channel_dim = checks.axes("x", x, time_dim, channel_dim)
    n = _check_gradient(x, grad_output, time_dim, channel_dim)
    checks.weight(weight, x.shape[channel_dim], x.shape[time_dim], n)
    if grad_output.shape[channel_dim] != weight.shape[1]:
        raise ValueError(
            f"grad_output has {grad_output.shape[channel_dim]} channels (axis channel_dim) but"
            f" weight {tuple(weight.shape)} has {weight.shape[1]} output channels"
        )
    checks.same_device({"x": x, "grad_output": grad_output, "weight": weight})
    dtype = torch.promote_types(x.dtype, grad_output.dtype)
    precision = precisions.choose(precision, dtype)
    name = checks.backend(backend)
    compute = precisions.compute_dtype(torch.promote_types(dtype, weight.dtype))
    if weight.dtype != compute:
        weight = weight.to(compute)
    return _backward.differentiable_backward(
        x,
        grad_output,
        weight,
        time_dim=time_dim,
        channel_dim=channel_dim,
        precision=precision,
        backend=name,
    )


def _check_gradient(x: Tensor, grad_output: Tensor, time_dim: int, channel_dim: int) -> int:
    """Checks a gradient of y against x; returns n."""
    checks.real("grad_output", grad_output)
    expected = list(x.shape)
    if grad_output.ndim == x.ndim:
        expected[time_dim] = grad_output.shape[time_dim]
        expected[channel_dim] = grad_output.shape[channel_dim]
    if list(grad_output.shape) != expected:
        raise ValueError(
            f"grad_output must have the shape of x, {tuple(x.shape)}, but for its time and channel"
            f" axes; got {tuple(grad_output.shape)}"
        )
    return checks.length(grad_output.shape[time_dim])
