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
    "exp_step": exp_step,
    "solver_step": solver_step,
