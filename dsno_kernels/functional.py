"""The public functions: what they accept, what they promise, and every check before a kernel.

Letters: B batch, T time points, K kept modes, I and O input and output channels, P pixels. Axes may
come in any order; `time_dim` and `channel_dim` name two of them, all others are batch or pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dsno_kernels import backends
from dsno_kernels import precision as precisions
from dsno_kernels._modes import max_modes
from dsno_kernels.backends import reference
from dsno_kernels.ops import spectral_conv as _conv
from dsno_kernels.ops import spectral_conv_weight_grad as _weight_grad
from dsno_kernels.ops import truncated_fft as _fft

_REAL_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


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
    time_dim, channel_dim = _check_input("x", x, time_dim, channel_dim)
    T = x.shape[time_dim]
    n = _check_length(T if n is None else n)
    _check_weight(weight, x.shape[channel_dim], T, n)
    if activation not in (None, "leaky_relu"):
        raise ValueError(f"unknown activation {activation!r}; accepted: None, 'leaky_relu'")
    if isinstance(negative_slope, bool) or not isinstance(negative_slope, (int, float)):
        raise TypeError(f"negative_slope must be a number, got {negative_slope!r}")
    tensors = {"x": x, "weight": weight}
    if bias is not None:
        _check_real("bias", bias)
        if bias.shape != weight.shape[1:2]:
            raise ValueError(f"bias must have shape ({weight.shape[1]},), got {tuple(bias.shape)}")
        tensors["bias"] = bias
    y_dtype = x.dtype
    if residual is not None:
        _check_real("residual", residual)
        y_shape = list(x.shape)
        y_shape[time_dim], y_shape[channel_dim] = n, weight.shape[1]
        if list(residual.shape) != y_shape:
            raise ValueError(
                f"residual must have the shape of the result, {tuple(y_shape)},"
                f" got {tuple(residual.shape)}"
            )
        tensors["residual"] = residual
        y_dtype = torch.promote_types(y_dtype, residual.dtype)
    if out_dtype is not None and out_dtype not in _REAL_DTYPES:
        raise TypeError(f"out_dtype must be one of {_names(_REAL_DTYPES)}, got {out_dtype}")
    _check_devices(tensors)
    compute = reference.compute_dtype(torch.promote_types(x.dtype, weight.dtype))
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
    name = _backend(backend)
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
    time_dim, channel_dim = _check_input("x", x, time_dim, channel_dim)
    _check_real("grad_output", grad_output)
    expected = list(x.shape)
    if grad_output.ndim == x.ndim:
        expected[time_dim] = grad_output.shape[time_dim]
        expected[channel_dim] = grad_output.shape[channel_dim]
    if list(grad_output.shape) != expected:
        raise ValueError(
            f"grad_output must have the shape of x, {tuple(x.shape)}, but for its time and channel"
            f" axes; got {tuple(grad_output.shape)}"
        )
    n = _check_length(grad_output.shape[time_dim])
    _check_modes(modes, x.shape[time_dim], n)
    if grad_output.shape[channel_dim] == 0:
        raise ValueError("grad_output must have at least one channel, got 0")
    _check_devices({"x": x, "grad_output": grad_output})
    dtype = torch.promote_types(x.dtype, grad_output.dtype)
    options: dict[str, Any] = {
        "time_dim": time_dim,
        "channel_dim": channel_dim,
        "precision": precisions.choose(precision, dtype),
    }
    name = _backend(backend)
    return _weight_grad.differentiable_weight_grad(x, grad_output, modes, backend=name, **options)


def truncated_rfft(x: Tensor, modes: int, dim: int = -1, *, backend: str | None = None) -> Tensor:
    r"""The first K bins of the real Fourier transform along one axis.

    Equivalent to ``torch.fft.rfft(x, dim=dim).narrow(dim, 0, K)``.

    Args:
        x: real, floating point, any shape and strides.
        modes: K, ``1 <= K <= T//2 + 1`` for an axis of length T.
        dim: the axis.
        backend: as in :func:`spectral_conv`.

    Returns:
        complex64 (complex128 of float64), the shape of x with T -> K, contiguous.

    Raises:
        TypeError: x is not floating point. ValueError: dim or modes out of range.
        NotImplementedError: a backend that was asked for and cannot run this.

    Example:
        >>> dk.truncated_rfft(torch.randn(3, 100), 5).shape
        torch.Size([3, 5])
    """
    _check_real("x", x)
    dim = _check_dim("dim", dim, x)
    _check_length(x.shape[dim], "the axis to transform")
    _check_modes(modes, x.shape[dim], x.shape[dim])
    name = _backend(backend)
    return torch.view_as_complex(_fft.differentiable_rfft(x, modes, dim, name))


def truncated_irfft(
    spectrum: Tensor, n: int, dim: int = -1, *, backend: str | None = None
) -> Tensor:
    r"""The inverse real Fourier transform along one axis of K bins, the other bins zero.

    Equivalent to ``torch.fft.irfft(spectrum, n, dim=dim)``. The imaginary parts of bin 0 and of bin
    n/2 are ignored, on every backend.

    Args:
        spectrum: complex64 or complex128, K bins along dim, ``1 <= K <= n//2 + 1``.
        n: the length of the result along dim.
        dim: the axis.
        backend: as in :func:`spectral_conv`.

    Returns:
        float32 (float64 of complex128), the shape of the spectrum with K -> n, contiguous.

    Raises:
        TypeError: the spectrum is not complex. ValueError: dim or n out of range.
        NotImplementedError: a backend that was asked for and cannot run this.

    Example:
        >>> x = torch.randn(3, 100)
        >>> dk.truncated_irfft(dk.truncated_rfft(x, 51), 100).allclose(x, atol=1e-5)
        True
    """
    _check_tensor("spectrum", spectrum)
    if spectrum.dtype not in (torch.complex64, torch.complex128):
        raise TypeError(
            f"spectrum must be torch.complex64 or torch.complex128, got {spectrum.dtype}"
        )
    dim = _check_dim("dim", dim, spectrum)
    n = _check_length(n, "n")
    _check_modes(spectrum.shape[dim], n, n)
    name = _backend(backend)
    pairs = torch.view_as_real(spectrum.resolve_conj())
    return _fft.differentiable_irfft(pairs, n, dim, name)


def explain(op_name: str, *args: Any, **kwargs: Any) -> str:
    """Which backend would run a call and why the others would not, one line each.

    Args:
        op_name: "spectral_conv", "spectral_conv_weight_grad", "truncated_rfft" or
            "truncated_irfft".
        args, kwargs: those of the call; without any, a float32 tensor on each device of this
            machine.

    Raises:
        ValueError: an unknown op. Whatever the call itself raises for its arguments.

    Example:
        >>> print(dk.explain("spectral_conv", x, weight))
    """
    if op_name not in OPS:
        raise ValueError(f"unknown op {op_name!r}; accepted: {', '.join(map(repr, OPS))}")
    if args or kwargs:
        return backends.explain_call(lambda: OPS[op_name](*args, **kwargs))
    kinds = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    requests = [
        backends.Request(op_name, torch.device(kind), torch.float32, precisions.resolve("", kind))
        for kind in kinds
    ]
    return "\n".join(backends.explain_request(r, backends.forced()) for r in requests)


OPS: dict[str, Callable[..., Tensor]] = {
    "spectral_conv": spectral_conv,
    "spectral_conv_weight_grad": spectral_conv_weight_grad,
    "truncated_rfft": truncated_rfft,
    "truncated_irfft": truncated_irfft,
}


def _backend(name: str | None) -> str:
    return backends.forced() if name is None else backends.check_name(name)


def _names(values: tuple[object, ...]) -> str:
    return ", ".join(map(str, values))


def _check_tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if value.layout != torch.strided or value.is_nested:
        kind = "a nested tensor" if value.is_nested else value.layout
        raise TypeError(f"{name} must be a dense (torch.strided) tensor, got {kind}")


def _check_real(name: str, x: Tensor) -> None:
    _check_tensor(name, x)
    if x.dtype not in _REAL_DTYPES:
        raise TypeError(
            f"{name} must be real floating point ({_names(_REAL_DTYPES)}), got {x.dtype}"
        )


def _check_int(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name} must be an integer, got {value!r}")


def _check_dim(name: str, dim: int, x: Tensor) -> int:
    _check_int(name, dim)
    if not -x.ndim <= dim < x.ndim:
        raise ValueError(f"{name}={dim} is out of range for shape {tuple(x.shape)}")
    return dim % x.ndim


def _check_input(name: str, x: Tensor, time_dim: int, channel_dim: int) -> tuple[int, int]:
    _check_real(name, x)
    time = _check_dim("time_dim", time_dim, x)
    channel = _check_dim("channel_dim", channel_dim, x)
    if time == channel:
        raise ValueError(
            f"time_dim and channel_dim must differ; both name axis {time} of shape {tuple(x.shape)}"
        )
    _check_length(x.shape[time], f"the time axis (time_dim={time_dim}) of {name}")
    return time, channel


def _check_length(n: int, name: str = "n") -> int:
    _check_int(name, n)
    if n < 1:
        raise ValueError(f"{name} must have a length of at least 1, got {n}")
    return n


def _check_modes(modes: int, T: int, n: int) -> None:
    _check_int("modes", modes)
    limit = max_modes(min(T, n))
    if not 1 <= modes <= limit:
        raise ValueError(
            f"modes (K, axis 2 of a weight) must be in 1..{limit} for {min(T, n)} time points"
            f" (at most T//2 + 1), got {modes}"
        )


def _check_weight(weight: Tensor, channels: int, T: int, n: int) -> None:
    _check_real("weight", weight)
    if weight.ndim != 4 or weight.shape[3] != 2:
        raise ValueError(
            "weight must have shape (I, O, K, 2), real and imaginary part last;"
            f" got {tuple(weight.shape)}"
        )
    if weight.shape[0] != channels:
        raise ValueError(
            f"x has {channels} channels (axis channel_dim) but weight {tuple(weight.shape)} expects"
            f" {weight.shape[0]}: the axis or the weight is the wrong one"
        )
    if weight.shape[0] == 0 or weight.shape[1] == 0:
        raise ValueError(
            f"weight must have at least one input and output channel, got {tuple(weight.shape)}"
        )
    _check_modes(weight.shape[2], T, n)


def _check_devices(tensors: dict[str, Tensor]) -> None:
    if len({tensor.device for tensor in tensors.values()}) > 1:
        places = ", ".join(f"{name} on {tensor.device}" for name, tensor in tensors.items())
        raise ValueError(f"all tensors must be on one device, got {places}")
