"""Fused kernels for the Fourier temporal convolution of DSNO, behind ordinary PyTorch functions and modules."""

from dsno_kernels.backends import use_backend
from dsno_kernels.functional import (
    explain,
    spectral_conv,
    spectral_conv_weight_grad,
    truncated_irfft,
    truncated_rfft,
)

__version__ = "0.1.0.dev0"

__all__ = [
    "explain",
    "spectral_conv",
    "spectral_conv_weight_grad",
    "truncated_irfft",
    "truncated_rfft",
    "use_backend",
]
