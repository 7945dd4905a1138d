"""The reference DSNO, the network of the paper on this library's temporal layer; model files."""

from dsno_kernels.models.capture import CapturedModel
from dsno_kernels.models.config import DSNOConfig
from dsno_kernels.models.denoiser import EDMDenoiser
from dsno_kernels.models.dsno import DSNO, logsnr_schedule
from dsno_kernels.models.files import ModelFileError, load, read_metadata, save

__all__ = [
    "DSNO",
    "CapturedModel",
    "DSNOConfig",
    "EDMDenoiser",
    "ModelFileError",
    "load",
    "logsnr_schedule",
    "read_metadata",
    "save",
]
