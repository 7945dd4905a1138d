"""Fused kernels for the Fourier temporal convolution of DSNO, as PyTorch functions and modules."""

from dsno_kernels import _starting  # noqa: F401, I001  # first of all
from dsno_kernels import diffusion, evaluation, integrations, models, nn
from dsno_kernels.backends import use_backend
from dsno_kernels.functional import (
    SolverStep,
    denoising_loss,
    dynamic_threshold,
    exp_step,
    explain,
    group_norm_silu,
    noised,
    solver_step,
    spectral_conv,
    spectral_conv_backward,
    spectral_conv_weight_grad,
    truncated_irfft,
    truncated_rfft,
)
from dsno_kernels.sampling import generate
from dsno_kernels.swap import restore_layers, swap_layers, swapped

__version__ = "0.1.0.dev0"

__all__ = [
    "SolverStep",
    "denoising_loss",
    "diffusion",
    "dynamic_threshold",
    "evaluation",
    "exp_step",
    "explain",
    "generate",
    "group_norm_silu",
    "integrations",
    "models",
    "nn",
    "noised",
    "restore_layers",
    "solver_step",
    "spectral_conv",
    "spectral_conv_backward",
    "spectral_conv_weight_grad",
    "swap_layers",
    "swapped",
    "truncated_irfft",
    "truncated_rfft",
    "use_backend",
]
