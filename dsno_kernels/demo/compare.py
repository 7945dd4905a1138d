"""The demo's measurements: the swapped layer against the original, and the student's images
against the teacher's.
"""

from __future__ import annotations

import contextlib
import copy
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

import dsno_kernels as dk
from dsno_kernels.evaluation import frechet_distance as frechet_distance  # on pixels
from dsno_kernels.models.eager import EagerTimeConv

# The largest temporal layer of the CIFAR-10 network at batch 4: (B, T, C, H, W), K.
LAYER_SHAPE, LAYER_MODES = (4, 4, 256, 32, 32), 2
ROUNDS = 9

Step = Callable[[], object]


class Pair(NamedTuple):
    """One quantity of the original layer and of ours."""

    original: float
    ours: float


class Parity(NamedTuple):
    """Difference between ours and the original: relative RMS, and the largest over the original's
    largest.
    """

    relative_rms: float
    largest: float


def parity(ours: Tensor, original: Tensor) -> Parity:
    a, b = ours.detach().double(), original.detach().double()
    return Parity(((a - b).norm() / b.norm()).item(), ((a - b).abs().max() / b.abs().max()).item())


def layer_case(device: torch.device) -> tuple[nn.Module, Tensor, Tensor]:
    """The original temporal layer, an x that wants a gradient, and the gradient of its output."""
    layer = EagerTimeConv(LAYER_SHAPE[2], LAYER_SHAPE[2], LAYER_MODES).to(device)
    # The official start is tiny; weights of the size that training leaves make the comparison mean
    # something.
    nn.init.normal_(layer.t_conv.weights1, std=LAYER_SHAPE[2] ** -0.5)
    x, grad = (torch.randn(LAYER_SHAPE, device=device) for _ in range(2))
    with torch.no_grad():
        activation = layer(x) - x
    # Where rounding decides the sign of h, LeakyReLU's slope is a coin toss in any implementation:
    # no gradient enters there.
    grad = grad * (activation.abs() > 1e-5)
    return layer, x.requires_grad_(), grad


def layer_results(layer: nn.Module, x: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    """y and the gradients of x and of the parameters."""
    y = layer(x)
    return (y, *torch.autograd.grad(y, (x, *layer.parameters()), grad))


def swapped_copy(module: nn.Module) -> nn.Module:
    """A copy of the module on our kernels.

    Raises:
        RuntimeError: it has no layer that can be swapped.
    """
    ours = copy.deepcopy(module)
    if dk.swap_layers(ours) == 0:
        raise RuntimeError("swap_layers recognized no layer")
    return ours


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def medians(original: Step, ours: Step, device: torch.device, rounds: int | None = None) -> Pair:
    """Median seconds of two steps that take turns, so that what else runs on the machine slows
    both alike.
    """
    times: tuple[list[float], list[float]] = ([], [])
    for round_ in range((rounds or ROUNDS) + 2):
        for step, taken in zip((original, ours), times, strict=True):
            synchronize(device)
            start = time.perf_counter()
            step()
            synchronize(device)
            if round_ >= 2:  # the first two warm up
                taken.append(time.perf_counter() - start)
    return Pair(*(statistics.median(taken) for taken in times))


def saved_bytes(forward: Callable[[], Tensor]) -> int:
    """Bytes a forward pass keeps for its backward: each storage once, parameters included."""
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = forward()
    del y  # up to here it kept every saved tensor alive, so no address was counted for two of them
    return sum(storages.values())


def peak_bytes(step: Step, device: torch.device) -> int:
    """The most tensor memory that one step holds beyond what was there before.

    On CUDA the allocator's own maximum; on the CPU the running sum of the allocator's events,
    which PyTorch's profiler records (scratch memory inside a C++ kernel, a few hundred KB, is not
    among them).
    """
    step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with (
        _quiet_stderr(),
        torch.profiler.profile(activities=activities, profile_memory=True) as profiler,
    ):
        step()
    results = profiler.profiler.kineto_results
    events = sorted((e.start_ns(), e.nbytes()) for e in results.events() if e.name() == "[memory]")
    held = peak = 0
    for _, nbytes in events:
        held += nbytes
        peak = max(peak, held)
    return peak


@contextlib.contextmanager
def _quiet_stderr() -> Iterator[None]:
    """Drop what the profiler's C++ writes about itself, which no Python setting turns off."""
    sys.stderr.flush()
    kept = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def nearest_distance(samples: Tensor, images: Tensor) -> float:
    """Mean over the samples of the Euclidean distance to the nearest image."""
    return torch.cdist(samples.flatten(1), images.flatten(1)).amin(dim=1).mean().item()


def normal_samples(images: Tensor, count: int) -> Tensor:
    """Draws from the normal distribution with the mean and covariance of the images: what quality
    without a model is.
    """
    flat = images.flatten(1).double()
    mean = flat.mean(0)
    values, vectors = torch.linalg.eigh((flat - mean).T @ (flat - mean) / max(len(flat) - 1, 1))
    draws = (
        torch.randn(count, flat.shape[1], device=images.device, dtype=torch.float64)
        * values.clamp_min(0).sqrt()
    )
    return (draws @ vectors.T + mean).to(images.dtype).view(count, *images.shape[1:])
