"""The reference DSNO: the network of the paper on this library's temporal layer."""

from dsno_kernels.models.capture import CapturedModel
from dsno_kernels.models.config import DSNOConfig
from dsno_kernels.models.dsno import DSNO, logsnr_schedule

__all__ = ["DSNO", "CapturedModel", "DSNOConfig", "logsnr_schedule"]
