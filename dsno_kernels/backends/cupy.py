"""The CuPy backend: the kernels of backend `cuda` compiled at run time, where there was no nvcc.

NVRTC compiles the same `.cuh` in a few seconds at the first call of a process; the plans and ops
are those of `cuda`, the launches go through CuPy on PyTorch's current device and stream.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dsno_kernels.backends import Request, _nvrtc
from dsno_kernels.backends._composed import Composed, unsupported_call
from dsno_kernels.backends._launch import (
    driver_too_old,
    not_while_capturing,
    on_device,
    raw_stream,
)
from dsno_kernels.backends._transforms import THREADS, Plan
from dsno_kernels.backends.cuda_denoising import Denoising
from dsno_kernels.backends.cuda_steps import Steps, source_of

_MIN_CAPABILITY = (8, 0)
_SOURCE = "truncated_fft.cuh"


def unsupported(request: Request) -> str | None:
    reason = unsupported_call(request)
    if reason:
        return reason
    nvrtc, reason = _nvrtc.nvrtc()
    if nvrtc is None:
        return reason
    capability = torch.cuda.get_device_capability(request.device)
    if capability < _MIN_CAPABILITY:
        return (
            "it needs compute capability 8.0 or newer, and this GPU has"
            f" {capability[0]}.{capability[1]}"
        )
    import cupy

    major, minor = nvrtc.getVersion()
    return driver_too_old(cupy.cuda.runtime.driverGetVersion(), f"{major}.{minor}")


class _Stream(NamedTuple):
    """What CuPy takes for a stream."""

    ptr: int


@functools.cache
def _module(device_index: int, source: str = _SOURCE) -> Any:
    """The compiled kernels of one file, loaded on one device."""
    import cupy

    not_while_capturing(torch.device("cuda", device_index), "call of backend 'cupy' compiles")
    capability = torch.cuda.get_device_capability(device_index)
    nvrtc, reason = _nvrtc.nvrtc()
    assert nvrtc is not None, reason
    architecture = _nvrtc.target(capability, nvrtc.getSupportedArchs())
    _warn_once(architecture)
    module = cupy.cuda.function.Module()
    module.load(_nvrtc.compiled(source, architecture))
    return module


@functools.cache
def _warn_once(architecture: str) -> None:
    warnings.warn(
        f"dsno_kernels compiles its CUDA kernels for {architecture} with NVRTC, which takes some"
        " seconds once in each process; an extension built with nvcc saves them",
        stacklevel=2,
    )


@functools.cache
def _function(kernel: str, device_index: int, source: str = _SOURCE) -> Any:
    return _module(device_index, source).get_function(kernel)


def _launch(plan: Plan, source: Tensor, target: Tensor, table: Tensor) -> None:
    import cupy

    device = source.device
    index = torch.cuda.current_device() if device.index is None else device.index
    # The struct of the kernel, TruncatedFftParams, by value: three pointers and the numbers.
    pointers = (source.data_ptr(), target.data_ptr(), table.data_ptr())
    numbers = np.array((*pointers, *plan.numbers), np.int64)
    params = numbers.view(f"V{numbers.nbytes}")
    with on_device(device), cupy.cuda.Device(index):
        function = _function(plan.kernel, index)
        function((plan.grid,), (THREADS,), (params,), 0, _Stream(raw_stream(device)))


_ops = Composed(_launch)
spectral_conv = _ops.spectral_conv
spectral_conv_weight_grad = _ops.spectral_conv_weight_grad
truncated_rfft = _ops.truncated_rfft
truncated_irfft = _ops.truncated_irfft


def _launch_step(kernel: str, grid: int, params: bytes, tensors: Sequence[Tensor]) -> None:
    import cupy

    device = tensors[0].device
    index = torch.cuda.current_device() if device.index is None else device.index
    struct = np.frombuffer(params, f"V{len(params)}")
    with on_device(device), cupy.cuda.Device(index):
        function = _function(kernel, index, source_of(kernel))
        function((grid,), (THREADS,), (struct,), 0, _Stream(raw_stream(device)))


_steps = Steps(_launch_step)
exp_step = _steps.exp_step
exp_step_backward = _steps.exp_step_backward
solver_step = _steps.solver_step
abs_rank = _steps.abs_rank

_denoising = Denoising(_launch_step)
noised = _denoising.noised
denoising_loss = _denoising.denoising_loss
denoising_scale_ = _denoising.denoising_scale_
