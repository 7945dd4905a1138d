"""The student that comes with the package."""

from __future__ import annotations

import json

import torch

import dsno_kernels as dk
from benchmarks import digits
from dsno_kernels.models import files
from dsno_kernels.training.images import digits as real_digits


def test_its_file_says_how_it_was_made() -> None:
    """By the command of the recipe, so that anyone can make it again."""
    assert (files.PACKAGED / "digits.safetensors").stat().st_size <= 2_000_000
    provenance = json.loads(dk.models.read_metadata("digits")["provenance"])
    assert provenance["command"] == f"python -m dsno_kernels {digits.COMMANDS['student']}"
    assert provenance["seed"] == 0


def test_one_evaluation_makes_the_digit_asked_for() -> None:
    """The nearest of the real digits is of that class (leave-one-out, real ones reach 98.8 %)."""
    real = real_digits()
    assert real.labels is not None
    samples = dk.generate("digits", 500, seed=1)
    nearest = torch.cdist(samples.flatten(1), real.images.flatten(1)).argmin(dim=1)
    right = real.labels[nearest] == torch.arange(500) % 10
    assert right.double().mean() > 0.95


def test_samples_are_new() -> None:
    """None repeats a real digit: the nearest is about as far as real ones are from each other."""
    images = real_digits().images.flatten(1)
    samples = dk.generate("digits", 200, seed=2).flatten(1)
    between = torch.cdist(images, images).fill_diagonal_(torch.inf).amin(dim=1)
    nearest = torch.cdist(samples, images).amin(dim=1)
    assert 0.5 < float(nearest.mean() / between.mean()) < 1.5
    assert float(nearest.min()) > 0.1
