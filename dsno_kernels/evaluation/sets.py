"""Sets of images to compare: real ones, files, and samples of models."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dsno_kernels import diffusion
from dsno_kernels.models import DSNO, EDMDenoiser, load
from dsno_kernels.sampling.generation import batches, class_labels, noise_of, read_logsnr
from dsno_kernels.training import images
from dsno_kernels.training.errors import CommandError
from dsno_kernels.training.manifest import noise_scale


@dataclass(frozen=True)
class Drawing:
    """How models are sampled.

    Args:
        count: images a seed.
        batch: images at a time.
        device: of the models.
        precision: "fp32" or "bf16" (autocast).
    """

    count: int
    batch: int
    device: torch.device
    precision: str


@dataclass(frozen=True)
class SampleSet:
    """Images, fixed or drawn.

    Args:
        name: for reports.
        draw: images ``(N, C, H, W)`` in [-1, 1] of a seed, on the CPU.
        evaluations: of the network, an image; 0 for images that no network makes here.
    """

    name: str
    draw: Callable[[int], Tensor]
    evaluations: int = 0


def fixed(text: str) -> Tensor | None:
    """The images of "digits", an .npz or a folder; None for another file, which may be a model."""
    if Path(text).suffix == ".safetensors":
        return None
    try:
        return images.load(text).images
    except CommandError as error:  # there the options are --data and --size
        reason = str(error).removeprefix("--data ").partition("; give --size")[0]
        raise CommandError(reason) from None


def of_text(text: str, drawing: Drawing) -> SampleSet:
    """The set that an argument of the command names."""
    found = fixed(text)
    if found is None:
        return student(text, text, drawing)
    return SampleSet(text, lambda seed: found)


def student(name: str, path: str, drawing: Drawing) -> SampleSet:
    """Samples of a DSNO, one evaluation each."""
    model: DSNO = load(path, drawing.device, kind="dsno")
    logsnr = read_logsnr(path)

    def draw(seed: int) -> Tensor:
        labels = class_labels(model, None, drawing.count)
        parts = batches(
            model, logsnr, labels, drawing.count, seed, drawing.batch, drawing.precision
        )
        return torch.cat([states[:, -1] for _, states in parts]).clamp_(-1, 1).cpu()

    return SampleSet(name, draw, 1)


def teachers(
    path: str, plans: Mapping[str, diffusion.SolverPlan], drawing: Drawing
) -> list[SampleSet]:
    """Samples of a denoiser, a set for each plan (of x0 prediction) under its name."""
    model: EDMDenoiser = load(path, drawing.device, kind="edm_denoiser")

    def set_of(name: str, plan: diffusion.SolverPlan) -> SampleSet:
        return SampleSet(name, lambda seed: _solve(model, plan, seed, drawing), plan.evaluations)

    return [set_of(name, plan) for name, plan in plans.items()]


@torch.no_grad()
def _solve(model: EDMDenoiser, plan: diffusion.SolverPlan, seed: int, drawing: Drawing) -> Tensor:
    """Images ``(count, C, H, W)``: from the noise of a student with that seed, as large as the
    plan's process has it.
    """
    network, device = model.network, drawing.device
    assert isinstance(network, DSNO)
    denoiser = diffusion.for_process(model, plan.process)
    labels = class_labels(network, None, drawing.count)
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for start in range(0, drawing.count, drawing.batch):
        rows = range(start, min(start + drawing.batch, drawing.count))
        noise = noise_of(network, rows, seed).to(device).mul_(noise_scale(plan))
        kwargs = {} if labels is None else {"y": labels[rows.start : rows.stop].to(device)}
        with torch.autocast(device.type, torch.bfloat16, drawing.precision == "bf16"):
            x = diffusion.sample(denoiser, noise, plan, kwargs=kwargs, generator=generator)
        parts.append(x.clamp(-1, 1).cpu())
    return torch.cat(parts)
