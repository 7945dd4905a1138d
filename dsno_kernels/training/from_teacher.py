"""The student's start: a teacher's weights wherever the two networks have the same ones."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from dsno_kernels.models import DSNO, EDMDenoiser
from dsno_kernels.models.blocks import AttentionBlock, ResidualBlock

# What both networks are made of; temporal layers are the student's alone.
KINDS = (ResidualBlock, AttentionBlock, nn.Linear, nn.Conv2d, nn.GroupNorm)


@torch.no_grad()
def initialize_from_teacher(
    student: DSNO, teacher: DSNO | EDMDenoiser
) -> tuple[list[str], list[str]]:
    """Copy a teacher's weights into a student, module by module in the order of the network.

    The n-th residual block of one goes to the n-th of the other, likewise attention blocks, linear
    layers, convolutions and normalizations; of these, every weight whose shape is the same.

    Args:
        student: changed in place; its temporal layers stay as they are.
        teacher: a network without temporal layers, or with: those are passed over.

    Returns:
        The names of the student's weights that were copied, and of those that were left.

    Raises:
        TypeError: a student or teacher of another kind.

    Source: DSNO (arXiv 2211.13449), section 4: the student begins as the teacher.

    Example:
        >>> copied, left = initialize_from_teacher(student, dk.models.load("teacher.safetensors"))
    """
    network = teacher.network if isinstance(teacher, EDMDenoiser) else teacher
    for name, model in (("student", student), ("teacher", network)):
        if not isinstance(model, DSNO):
            raise TypeError(f"{name} must be a DSNO, or a denoiser on one; got {type(model)}")
    copied: set[str] = set()
    for kind in KINDS:
        theirs = (module for _, module in _modules(network, kind))
        for (prefix, module), other in zip(_modules(student, kind), theirs, strict=False):
            weights = dict(other.named_parameters())
            for name, weight in module.named_parameters():
                if name in weights and weights[name].shape == weight.shape:
                    weight.copy_(weights[name])
                    copied.add(f"{prefix}.{name}")
    names = [name for name, _ in student.named_parameters()]
    return [n for n in names if n in copied], [n for n in names if n not in copied]


def _modules(network: nn.Module, kind: type[nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    """Modules of one kind with their names, in order."""
    assert isinstance(network, DSNO)
    for index, module in enumerate(network.all_modules):
        if isinstance(module, kind):
            yield f"all_modules.{index}", module
