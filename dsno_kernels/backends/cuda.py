"""The CUDA C++ backend: kernels compiled ahead of time (csrc/cuda/*.cu).

The transforms run along any axis; long spectral convolutions are composed of them and of cuBLAS
products (`backends._composed`). The integrator steps are one launch (`backends.cuda_steps`).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from dsno_kernels.backends import Request
from dsno_kernels.backends._composed import Composed, unsupported_call
from dsno_kernels.backends._launch import (
    driver_too_old,
    on_device,
    raw_stream,
    uncovered_capability,
)
from dsno_kernels.backends._transforms import Plan
from dsno_kernels.backends.cuda_denoising import Denoising
from dsno_kernels.backends.cuda_steps import Steps

# kApi of bind_cuda.cpp.
_API = 4


@functools.lru_cache(maxsize=1)
def _extension() -> tuple[ModuleType | None, str | None]:
    """The compiled module and None, or None and why it is not there."""
    how = "build it with `pip install -e . --no-build-isolation` (nvcc on PATH or in CUDA_HOME)"
    try:
        from dsno_kernels import _C
    except ImportError as error:
        return None, f"the extension dsno_kernels._C is missing ({error}); {how}"
    if not _C.cuda_version:
        return None, f"the extension was built without CUDA; {how}"
    if getattr(_C, "cuda_api", 0) != _API:
        return None, f"the extension is older than this source; {how}"
    return _C, None


def unsupported(request: Request) -> str | None:
    reason = unsupported_call(request)
    if reason:
        return reason
    module, reason = _extension()
    if module is None:
        return reason
    return driver_too_old(
        module.cuda_driver_version(), module.cuda_version
    ) or uncovered_capability(torch.cuda.get_device_capability(request.device), module.cuda_archs)


@functools.lru_cache(maxsize=1)
def _kernel_ids() -> dict[str, int]:
    module, reason = _extension()
    assert module is not None, reason
    return {name: place for place, name in enumerate(module.cuda_truncated_fft_kernels())}


def _launch(plan: Plan, source: Tensor, target: Tensor, table: Tensor) -> None:
    module, reason = _extension()
    assert module is not None, reason
    with on_device(source.device):
        module.cuda_truncated_fft(
            _kernel_ids()[plan.kernel],
            plan.grid,
            source.data_ptr(),
            target.data_ptr(),
            table.data_ptr(),
            plan.numbers,
            raw_stream(source.device),
        )


_ops = Composed(_launch)
spectral_conv = _ops.spectral_conv
spectral_conv_weight_grad = _ops.spectral_conv_weight_grad
truncated_rfft = _ops.truncated_rfft
truncated_irfft = _ops.truncated_irfft


@functools.lru_cache(maxsize=1)
def _step_ids() -> dict[str, int]:
    module, reason = _extension()
    assert module is not None, reason
    return {name: place for place, name in enumerate(module.cuda_step_kernels())}


def _launch_step(kernel: str, grid: int, params: bytes, tensors: Sequence[Tensor]) -> None:
    module, reason = _extension()
    assert module is not None, reason
    device = tensors[0].device
    with on_device(device):
        module.cuda_step(_step_ids()[kernel], grid, params, raw_stream(device))


_steps = Steps(_launch_step)
exp_step = _steps.exp_step
exp_step_backward = _steps.exp_step_backward
solver_step = _steps.solver_step
abs_rank = _steps.abs_rank

_denoising = Denoising(_launch_step)
noised = _denoising.noised
denoising_loss = _denoising.denoising_loss
denoising_scale_ = _denoising.denoising_scale_
