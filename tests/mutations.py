"""Defects that a suite worth its name must notice, planted into one backend: `pytest --mutation
cpu:zero_output`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dsno_kernels import backends


def _scaled(result: Any, factor: float) -> Any:
    return (result[0] * factor, *result[1:]) if isinstance(result, tuple) else result * factor


def _zero_output(run: Callable[..., Any], x: Tensor, other: Any, *args: Any, **options: Any) -> Any:
    return _scaled(run(x, other, *args, **options), 0.0)


def _mode_dropped(run: Callable[..., Any], x: Tensor, weight: Tensor, **options: Any) -> Any:
    weight = weight.clone()
    weight[:, :, -1] = 0
    return run(x, weight, **options)


def _imaginary_sign_flipped(
    run: Callable[..., Any], x: Tensor, weight: Tensor, **options: Any
) -> Any:
    return run(x, weight * weight.new_tensor([1.0, -1.0]), **options)


def _weight_transposed(run: Callable[..., Any], x: Tensor, weight: Tensor, **options: Any) -> Any:
    return run(
        x, weight.transpose(0, 1) if weight.shape[0] == weight.shape[1] else weight, **options
    )


def _length_factor_missing(
    run: Callable[..., Any], x: Tensor, other: Any, *args: Any, **options: Any
) -> Any:
    n = options["n"] if "n" in options else other.shape[options["time_dim"]]
    return _scaled(run(x, other, *args, **options), float(n))


def _nyquist_as_complex(run: Callable[..., Any], x: Tensor, weight: Tensor, **options: Any) -> Any:
    if 2 * (weight.shape[2] - 1) == options["n"]:
        weight = weight.clone()
        weight[:, :, -1] *= 2
    return run(x, weight, **options)


def _gradient_conjugated(
    run: Callable[..., Any], x: Tensor, g: Tensor, modes: int, **options: Any
) -> Any:
    return run(x, g, modes, **options) * torch.tensor([1.0, -1.0])


def _gradient_mode_dropped(
    run: Callable[..., Any], x: Tensor, g: Tensor, modes: int, **options: Any
) -> Any:
    grad = run(x, g, modes, **options)
    grad[:, :, -1] = 0
    return grad


def _one_zero(place: int) -> Callable[..., Any]:
    """Both gradients at once, one of them zero."""

    def defect(run: Callable[..., Any], *args: Any, **options: Any) -> Any:
        grads = list(run(*args, **options))
        grads[place] = grads[place] * 0.0
        return tuple(grads)

    return defect


def _spectrum_conjugated(run: Callable[..., Any], x: Tensor, modes: int, **options: Any) -> Any:
    return run(x, modes, **options) * torch.tensor([1.0, -1.0])


def _inverse_unscaled(run: Callable[..., Any], spectrum: Tensor, n: int, **options: Any) -> Any:
    return run(spectrum, n, **options) * n


MUTATIONS: dict[str, tuple[str, Callable[..., Any]]] = {
    "zero_output": ("spectral_conv", _zero_output),
    "mode_dropped": ("spectral_conv", _mode_dropped),
    "imaginary_sign_flipped": ("spectral_conv", _imaginary_sign_flipped),
    "weight_transposed": ("spectral_conv", _weight_transposed),
    "length_factor_missing": ("spectral_conv", _length_factor_missing),
    "nyquist_as_complex": ("spectral_conv", _nyquist_as_complex),
    "zero_gradient": ("spectral_conv_weight_grad", _zero_output),
    "gradient_conjugated": ("spectral_conv_weight_grad", _gradient_conjugated),
    "gradient_mode_dropped": ("spectral_conv_weight_grad", _gradient_mode_dropped),
    "gradient_length_factor_missing": ("spectral_conv_weight_grad", _length_factor_missing),
    "zero_dx_of_both": ("spectral_conv_backward", _one_zero(0)),
    "zero_dW_of_both": ("spectral_conv_backward", _one_zero(1)),
    "zero_spectrum": ("truncated_rfft", _zero_output),
    "spectrum_conjugated": ("truncated_rfft", _spectrum_conjugated),
    "zero_inverse": ("truncated_irfft", _zero_output),
    "inverse_unscaled": ("truncated_irfft", _inverse_unscaled),
}


def can_plant(backend: str, name: str) -> bool:
    """Whether the backend has the op itself."""
    return hasattr(backends._module(backend), MUTATIONS[name][0])


def plant(backend: str, name: str) -> None:
    """Replace one op of a backend, for the rest of the process, by one with the named defect."""
    op, defect = MUTATIONS[name]
    module = backends._module(backend)
    setattr(module, op, functools.partial(defect, getattr(module, op)))
