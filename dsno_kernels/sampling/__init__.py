"""Images from noise with a DSNO, one evaluation each; the command `sample`."""

from dsno_kernels.sampling.generation import generate, resampled

__all__ = ["generate", "resampled"]
