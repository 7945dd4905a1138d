"""Triton kernels: the fused spectral convolution and its weight gradient, on tensor cores.

Nothing here needs triton to be installed, and nothing is compiled, before the first call.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from typing import Any

import torch
from torch import Tensor

from dsno_kernels.backends import Request

_MIN_CAPABILITY = (8, 0)
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def unsupported(request: Request) -> str | None:
    """Why these kernels cannot serve a request, or None."""
    if request.dtype not in _DTYPES:
        return f"computes in float32; {request.dtype} is for the reference backend"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if request.device.type == "cpu":
        if os.environ.get("TRITON_INTERPRET") != "1":
            return (
                "Triton kernels need a CUDA device;"
                " TRITON_INTERPRET=1 runs them on the CPU for tests"
            )
    elif request.device.type != "cuda":
        return f"Triton kernels need a CUDA device, not {request.device.type}"
    elif torch.version.hip is not None:
        return "tuned and tested for NVIDIA GPUs only"
    elif torch.cuda.get_device_capability(request.device) < _MIN_CAPABILITY:
        return "needs compute capability 8.0 or newer"
    return None


def spectral_conv(x: Tensor, weight: Tensor, **options: Any) -> tuple[Tensor, Tensor | None]:
    """See `backends.reference.spectral_conv`."""
    return _launchers("conv").spectral_conv(x, weight, **options)


def spectral_conv_weight_grad(x: Tensor, grad_output: Tensor, modes: int, **options: Any) -> Tensor:
    """See `backends.reference.spectral_conv_weight_grad`."""
    return _launchers("weight_grad").spectral_conv_weight_grad(x, grad_output, modes, **options)


def truncated_rfft(x: Tensor, modes: int, *, dim: int) -> Tensor:
    """See `backends.reference.truncated_rfft`."""
    return _launchers("transforms").truncated_rfft(x, modes, dim=dim)


def truncated_irfft(spectrum: Tensor, n: int, *, dim: int) -> Tensor:
    """See `backends.reference.truncated_irfft`."""
    return _launchers("transforms").truncated_irfft(spectrum, n, dim=dim)


def group_norm_silu(
    x: Tensor, groups: int, weight: Tensor, bias: Tensor, **options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """See `backends.reference_norm.group_norm_silu`."""
    return _launchers("group_norm").group_norm_silu(x, groups, weight, bias, **options)


def group_norm_silu_backward(
    grad: Tensor, x: Tensor, *parameters: Tensor, **options: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """See `backends.reference_norm.group_norm_silu_backward`."""
    return _launchers("group_norm").group_norm_silu_backward(grad, x, *parameters, **options)


@functools.cache
def _launchers(module: str) -> Any:
    """The module that plans and launches an op, imported at its first call; it imports triton."""
    return importlib.import_module(f"{__name__}.{module}")
