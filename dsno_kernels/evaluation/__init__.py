"""How close samples are to real images; the command `evaluate`."""

from dsno_kernels.evaluation.frechet import frechet_distance
from dsno_kernels.evaluation.manifold import PrecisionRecall, precision_recall

__all__ = ["PrecisionRecall", "frechet_distance", "precision_recall"]
