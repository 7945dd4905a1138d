"""Fused kernels for the Fourier temporal convolution of DSNO, as PyTorch functions and modules."""

from dsno_kernels import diffusion, models, nn
from dsno_kernels.backends import use_backend
from dsno_kernels.functional import (
    SolverStep,
    dynamic_threshold,
    exp_step,
    explain,
    "SolverStep",
    "dynamic_threshold",
    "exp_step",
