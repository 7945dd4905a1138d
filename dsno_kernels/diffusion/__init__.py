"""Diffusion samplers: noising processes, time grids, solver plans (tables of coefficients), and
denoisers.
"""

from dsno_kernels.diffusion.captured import CapturedSampler
from dsno_kernels.diffusion.denoisers import (
    ExactDenoiser,
    for_process,
    from_diffusers,
    from_edm,
)
from dsno_kernels.diffusion.discrete import DiscreteVP
from dsno_kernels.diffusion.grids import time_grid
from dsno_kernels.diffusion.learned_grid import GridFileError, LearnedGrid
from dsno_kernels.diffusion.learning.learn import learn_time_grid
from dsno_kernels.diffusion.learning.options import LearningOptions
from dsno_kernels.diffusion.momentum import FDM
from dsno_kernels.diffusion.optimized_grids import dmn_grid, gits_grid, trajectory_costs
from dsno_kernels.diffusion.plan import SolverPlan
from dsno_kernels.diffusion.preconditioning import Preconditioner
from dsno_kernels.diffusion.processes import (
    EDM,
    VE,
    FlowMatching,
    Process,
    VPCosine,
    VPLinear,
)
from dsno_kernels.diffusion.sample import sample
from dsno_kernels.diffusion.solvers import solvers

__all__ = [
    "EDM",
    "FDM",
    "VE",
    "CapturedSampler",
    "DiscreteVP",
    "ExactDenoiser",
    "FlowMatching",
    "GridFileError",
    "LearnedGrid",
    "LearningOptions",
    "Preconditioner",
    "Process",
    "SolverPlan",
    "VPCosine",
    "VPLinear",
    "dmn_grid",
    "for_process",
    "from_diffusers",
    "from_edm",
    "gits_grid",
    "learn_time_grid",
    "sample",
    "solvers",
    "time_grid",
    "trajectory_costs",
]
