"""Runs of diffusers' schedulers and of ours on one problem; the originals in float64 too."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")

from diffusers.schedulers import scheduling_dpmsolver_multistep  # noqa: E402

from dsno_kernels.integrations import diffusers as fused  # noqa: E402

diffusers.utils.logging.set_verbosity_error()

SHAPE = (2, 3, 4, 4)
SCHEDULERS = ("DEISMultistepScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler")


def original(name: str, **config: Any) -> Any:
    return getattr(diffusers, name)(**config)


def ours(name: str, **config: Any) -> Any:
    return getattr(fused, f"Fused{name}")(**config)


def scheduled(scheduler: Any, steps: int = 8, **options: Any) -> Any:
    scheduler.set_timesteps(steps, **options)
    return scheduler


def start(dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(SHAPE, generator=generator, dtype=torch.float64).to(dtype)


def denoise(x: Tensor, t: Any) -> Tensor:
    """A smooth model of the sample and the time."""
    return torch.tanh(0.7 * x) * (0.2 + float(t) / 1500) + 0.1 * torch.sin(3 * x)


class _Float64Module(ModuleType):
    """torch, whose float32 is float64: diffusers' DPM-Solver rounds its samples to float32."""

    float32 = torch.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


@contextlib.contextmanager
def wide(scheduler: Any) -> Iterator[None]:
    """The original's formulas in float64, sigmas and samples; after its set_timesteps."""
    scheduler.sigmas = scheduler.sigmas.double()
    module = scheduling_dpmsolver_multistep
    with mock.patch.object(module, "torch", _Float64Module("torch")):
        yield


def run(
    scheduler: Any, x: Tensor, timesteps: Sequence[Any] | None = None, **options: Any
) -> Tensor:
    """From x over the timesteps, all or some; the noise of DPM-Solver is drawn here."""
    generator = torch.Generator().manual_seed(5)
    noisy = "sde" in scheduler.config.get("algorithm_type", "")
    for t in scheduler.timesteps if timesteps is None else timesteps:
        if noisy:
            noise = torch.randn(x.shape, generator=generator).to(x.dtype)
            options["variance_noise"] = noise
        x = scheduler.step(denoise(x, t), t, x, **options).prev_sample
    return x


def run_wide(name: str, x: Tensor, steps: int, **config: Any) -> Tensor:
    """The original in float64."""
    scheduler = original(name, **config)
    scheduler.set_timesteps(steps)
    with wide(scheduler):
        return run(scheduler, x.double())
