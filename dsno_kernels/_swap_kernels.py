"""What a swapped layer computes: for each known layer, its call on this library's kernels.

Each function takes the module, a precision, a backend (None: the fastest) and the arguments of the
layer's forward, and returns what that forward would; None where it cannot promise that, and the
original forward runs. Of a layer in half precision it returns that dtype for input of that dtype.
Everything that a user may change after the swap (weights, modes, hooks, dtypes) is looked at in
each call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dsno_kernels._modes import max_modes
from dsno_kernels.functional.spectral_conv import spectral_conv

Kernel = Callable[..., "Tensor | None"]

_HALF = (torch.float16, torch.bfloat16)
_REAL = (*_HALF, torch.float32)
_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


def has_hooks(module: nn.Module) -> bool:
    return any(getattr(module, hooks) for hooks in _HOOKS)


def _plain(*tensors: Any) -> bool:
    """Whether these are dense tensors of no subclass, on one device."""
    if any(type(t) not in (Tensor, nn.Parameter) or t.layout is not torch.strided for t in tensors):
        return False
    return all(t.device == tensors[0].device for t in tensors)


def _result(x: Tensor, weight: Tensor, precision: str | None) -> dict[str, Any]:
    """Dtype and precision of a result: the original's, float32, unless x and weight are in half
    precision.
    """
    out_dtype = x.dtype if x.dtype == weight.dtype else torch.float32
    if precision is None and out_dtype == torch.float32:
        precision = "fp32"
    return {"out_dtype": out_dtype, "precision": precision}


def dsno_spectral_conv(
    module: Any, precision: str | None, backend: str | None, *args: Any, **kwargs: Any
) -> Tensor | None:
    """DSNO's `SpectralConv1d`: x ``(B, T, I, H, W)`` of any dtype -> float32."""
    if len(args) != 1 or kwargs or not _serves_dsno(module, args[0]):
        return None
    x = args[0].float() if args[0].dtype == torch.float64 else args[0]
    weight = module.weights1
    return spectral_conv(x, weight, backend=backend, **_result(x, weight, precision))


def dsno_time_conv(
    module: Any, precision: str | None, backend: str | None, *args: Any, **kwargs: Any
) -> Tensor | None:
    """DSNO's `TimeConv`, ``x + act(t_conv(x))`` in one call, while nothing listens in between."""
    if len(args) != 1 or kwargs or module.with_nin:
        return None
    x, act, conv = args[0], module.act, module.t_conv
    if type(act) is not nn.LeakyReLU or not is_swapped(conv, dsno_spectral_conv):
        return None
    if has_hooks(act) or has_hooks(conv):
        return None
    if not _serves_dsno(conv, x) or x.dtype not in _REAL or x.shape[2] != conv.weights1.shape[1]:
        return None
    return spectral_conv(
        x,
        conv.weights1,
        activation="leaky_relu",
        negative_slope=act.negative_slope,
        residual=x,
        backend=backend,
        **_result(x, conv.weights1, precision),
    )


def _serves_dsno(module: Any, x: Any) -> bool:
    weight = module.weights1
    if not _plain(x, weight) or x.ndim != 5 or weight.ndim != 4:
        return False
    if x.dtype not in (*_REAL, torch.float64):
        return False
    fits = weight.shape[0] == x.shape[2] and weight.shape[3] == 2 and weight.dtype in _REAL
    return fits and 1 <= module.modes1 == weight.shape[2] <= max_modes(x.shape[1])


def fno_spectral_conv(
    module: Any, precision: str | None, backend: str | None, *args: Any, **kwargs: Any
) -> Tensor | None:
    """FNO's `SpectralConv1d`: x ``(B, I, L)`` float32, weights complex or in real pairs."""
    if len(args) != 1 or kwargs:
        return None
    x, weight = args[0], module.weights1
    if not _serves_channels_first(x, weight):
        return None
    pairs = torch.view_as_real(weight) if weight.is_complex() else weight
    if pairs.ndim != 4 or pairs.shape[0] != x.shape[1] or not 1 <= module.modes1 == pairs.shape[2]:
        return None
    if pairs.shape[2] > max_modes(x.shape[2]):
        return None
    options = _result(x, pairs, precision)
    return spectral_conv(x, pairs, time_dim=2, channel_dim=1, backend=backend, **options)


def neuralop_spectral_conv(
    module: Any,
    precision: str | None,
    backend: str | None,
    x: Any,
    output_shape: Sequence[int] | None = None,
    *args: Any,
    **kwargs: Any,
) -> Tensor | None:
    """neuraloperator's 1-D `SpectralConv`: x ``(B, I, L)`` float32, a bias, any output length."""
    if args or kwargs or neuralop_unsupported(module):
        return None
    weight, bias = dense_weight(module), module.bias
    if weight is None or not _serves_channels_first(x, weight):
        return None
    if not weight.is_complex() or weight.ndim != 3:
        return None
    if weight.shape[0] != x.shape[1] or module.max_n_modes[0] != weight.shape[2]:
        return None
    if bias is not None:
        if not _plain(x, bias) or bias.dtype != torch.float32 or bias.shape[1:].numel() != 1:
            return None
        bias = bias.flatten()
    length = x.shape[2]
    modes, n = min(max_modes(length), module.n_modes[0]), length
    if output_shape is not None:
        n = output_shape[0]
    elif module.resolution_scaling_factor is not None:
        n = round(length * module.resolution_scaling_factor[0])
    if not 1 <= modes <= weight.shape[2]:
        return None
    # To another length, the original treats the input's last bin as Nyquist, whatever it is there.
    if n != length and (modes > length // 2 or 2 * (modes - 1) >= n):
        return None
    pairs = torch.view_as_real(weight)[:, :, :modes]
    if n != length and module.fft_norm != "backward":
        pairs = pairs * (n / length if module.fft_norm == "forward" else (n / length) ** 0.5)
    options = {"time_dim": 2, "channel_dim": 1, "backend": backend, **_result(x, pairs, precision)}
    return spectral_conv(x, pairs, n=n, bias=bias, **options)


def neuralop_unsupported(module: Any) -> str | None:
    """Why this configuration of neuraloperator's `SpectralConv` is not ours; None where it is."""
    flags = {"complex_data": False, "separable": False}
    expected = {"order": 1, **flags, "fno_block_precision": "full"}
    for name, value in expected.items():
        if getattr(module, name, None) != value:
            return f"{name} is {getattr(module, name, 'missing')!r}, not {value!r}"
    if getattr(module, "fft_norm", None) not in ("forward", "backward", "ortho"):
        return f"fft_norm is {getattr(module, 'fft_norm', 'missing')!r}"
    if dense_weight(module) is None:
        return "its weight is not one plain dense complex tensor"
    return None


def dense_weight(module: Any) -> Tensor | None:
    """The weight of neuraloperator's `SpectralConv`; None where it is factorized or hooked."""
    weight = module.weight
    if isinstance(weight, nn.Module):
        if type(weight).__name__ not in ("DenseTensor", "ComplexDenseTensor") or has_hooks(weight):
            return None
        weight = weight.tensor
    return weight if isinstance(weight, Tensor) else None


def _serves_channels_first(x: Any, weight: Any) -> bool:
    if not _plain(x, weight) or x.ndim != 3:
        return False
    if weight.dtype in _HALF:
        return x.dtype in (weight.dtype, torch.float32)
    return x.dtype == torch.float32 and weight.dtype in (torch.complex64, torch.float32)


def is_swapped(module: nn.Module, kernel: Kernel | None = None) -> bool:
    """Whether the module runs on a kernel of this file (on the one given)."""
    bound = getattr(module.__dict__.get("forward"), "kernel", None)
    return bound is not None and kernel in (None, bound)
