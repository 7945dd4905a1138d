"""The public functions, one file an op: what they accept, and every check before a kernel.

Letters: B batch, T time points, K kept modes, I and O input and output channels, P pixels. Axes may
come in any order; `time_dim` and `channel_dim` name two of them, all others are batch or pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from dsno_kernels import backends
from dsno_kernels import precision as precisions
from dsno_kernels.functional.denoising import denoising_loss, noised
from dsno_kernels.functional.dynamic_threshold import dynamic_threshold
from dsno_kernels.functional.exp_step import exp_step
from dsno_kernels.functional.group_norm_silu import group_norm_silu
from dsno_kernels.functional.solver_step import SolverStep, solver_step
from dsno_kernels.functional.spectral_conv import (
    spectral_conv,
    spectral_conv_backward,
    spectral_conv_weight_grad,
)
from dsno_kernels.functional.truncated_fft import truncated_irfft, truncated_rfft

__all__ = [
    "OPS",
    "SolverStep",
    "denoising_loss",
    "dynamic_threshold",
    "exp_step",
    "explain",
    "group_norm_silu",
    "noised",
    "solver_step",
    "spectral_conv",
    "spectral_conv_backward",
    "spectral_conv_weight_grad",
    "truncated_irfft",
    "truncated_rfft",
]

# Every op with a choice of backends, by name.
OPS: dict[str, Callable[..., Any]] = {
    "spectral_conv": spectral_conv,
    "spectral_conv_backward": spectral_conv_backward,
    "spectral_conv_weight_grad": spectral_conv_weight_grad,
    "truncated_rfft": truncated_rfft,
    "truncated_irfft": truncated_irfft,
    "group_norm_silu": group_norm_silu,
    "exp_step": exp_step,
    "solver_step": solver_step,
    "noised": noised,
    "denoising_loss": denoising_loss,
}


def explain(op_name: str, *args: Any, **kwargs: Any) -> str:
    """Which backend would run a call and why the others would not, one line each.

    Args:
        op_name: one of ``OPS``, such as "spectral_conv".
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
