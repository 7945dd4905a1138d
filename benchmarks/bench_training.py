"""The student's training and sampling, against the same model with `kernels=False` in the same run.

A training step is all of `training.loop.update`: the batch, the loss, the backward pass, clipping,
Adam and the average of the weights. Sampling is one forward pass. Before anything is timed, the
losses of a few steps, or the samples, are compared with those of `kernels=False` in float32.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

from benchmarks import measure
from benchmarks.bench_model import arithmetic
from benchmarks.host_cuda import dry_run
from dsno_kernels.models import DSNO, DSNOConfig, logsnr_schedule
from dsno_kernels.training import loop
from dsno_kernels.training.checkpoint import State
from dsno_kernels.training.options import Options
from dsno_kernels.training.trajectory_loss import StudentTask
from dsno_kernels.training.trajectory_source import Source

T = 4
STEPS = 3  # that are compared
SAMPLES = 1024  # of the made-up data set
# Relative difference of the losses, and relative RMS of the samples (there as in bench_model). A
# gradient near zero may change its sign by rounding, and Adam makes a whole step of it.
BUDGETS = {
    "training": {"fp32": 1e-4, "bf16": 2e-2},
    "sampling": {"fp32": 3e-5, "bf16": 5e-2},
}
PRECISIONS = ("fp32", "bf16")


class Case(NamedTuple):
    config: DSNOConfig
    batch: int


DIGITS = DSNOConfig(
    image_size=8,
    image_channels=1,
    channels=32,
    channel_mult=(1, 2),
    num_res_blocks=1,
    attention_resolutions=(4,),
    embedding_dim=128,
)
# Without dropout: the random numbers of two forms of a network cannot be compared.
CIFAR10 = dataclasses.replace(DSNOConfig.cifar10(), dropout=0.0)
CASES = {"digits": Case(DIGITS, 64), "cifar10": Case(CIFAR10, 32)}


class Random:
    """Random trajectories: their values do not change the time of a step."""

    labels, checksum = None, None

    def __init__(self, config: DSNOConfig) -> None:
        self.shape = (1 + T, config.image_channels, config.image_size, config.image_size)
        generator = torch.Generator().manual_seed(0)
        self.frames = torch.randn(SAMPLES, *self.shape, generator=generator)

    def __len__(self) -> int:
        return SAMPLES

    def batch(self, index: Tensor) -> tuple[Tensor, None]:
        return self.frames[index], None


@functools.lru_cache(maxsize=1)
def source(name: str, device: torch.device) -> Source:
    logsnr = logsnr_schedule(torch.linspace(0.9, 0.0, T))
    return Source(Random(CASES[name].config), logsnr, device)


@functools.lru_cache(maxsize=1)
def network(name: str) -> DSNO:
    """Weights none of which is near zero: every layer counts in the loss."""
    torch.manual_seed(0)
    made = DSNO(CASES[name].config, kernels=False)
    with torch.no_grad():
        for parameter in made.parameters():
            fan = parameter[0].numel() if parameter.ndim > 1 else parameter.numel()
            parameter.add_(torch.randn_like(parameter), alpha=0.3 * fan**-0.5)
    return made


def model(name: str, kernels: bool, device: torch.device) -> DSNO:
    ours = DSNO(CASES[name].config, kernels=kernels)
    ours.load_state_dict(network(name).state_dict())
    return ours.to(device)


def trainer(name: str, kernels: bool, precision: str, device: torch.device) -> Callable[[], Tensor]:
    """Each call is one training step; it returns the loss."""
    student = model(name, kernels, device).train()
    options = Options(
        steps=1 << 30, batch=CASES[name].batch, learning_rate=1e-4, precision=precision
    )
    optimizer = torch.optim.Adam(student.parameters(), lr=options.learning_rate, fused=True)
    state = State(student, AveragedModel(student), optimizer)
    task = StudentTask(source(name, device))
    numbers = itertools.count()

    def step() -> Tensor:
        with arithmetic("fp32", device):  # `update` itself turns on autocast
            return loop.update(student, state, task, options, next(numbers))[0]

    return step


def sampler(name: str, kernels: bool, precision: str, device: torch.device) -> Callable[[], Tensor]:
    """Each call turns a batch of noises into images."""
    student = model(name, kernels, device).eval()
    data, kind = source(name, device), "bf16 autocast" if precision == "bf16" else precision
    noise, _, _ = data.batch(torch.arange(CASES[name].batch))

    def sample() -> Tensor:
        with torch.no_grad(), arithmetic(kind, device):
            return student(noise, data.logsnr)[:, -1]

    return sample


def runner(
    work: str, name: str, kernels: bool, precision: str, device: torch.device
) -> Callable[[], Tensor]:
    return (trainer if work == "training" else sampler)(name, kernels, precision, device)


def results(work: str, run: Callable[[], Tensor]) -> Tensor:
    """The losses of the first steps, or a batch of samples."""
    return torch.stack([run() for _ in range(STEPS)]) if work == "training" else run()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """The published network on a GPU too, and there in bfloat16 too."""
    if "network_name" in metafunc.fixturenames:
        whole = torch.cuda.is_available() and not dry_run()
        metafunc.parametrize("network_name", CASES if whole else ["digits"])
        metafunc.parametrize("precision", PRECISIONS if whole or dry_run() else PRECISIONS[:1])


@pytest.mark.parametrize("work", BUDGETS)
def test_student(
    benchmark: Any,
    network_name: str,
    work: str,
    precision: str,
    device: torch.device,
    smoke: bool,
) -> None:
    name = network_name
    benchmark.group = f"{name} {work} {precision}"
    run = runner(work, name, True, precision, device)
    exact = results(work, runner(work, name, False, "fp32", device))
    error = measure.relative_error(results(work, run).float(), exact)
    budget = BUDGETS[work][precision]
    assert error <= budget, f"relative error {error:.3g} over the budget of {budget:.3g}"
    if smoke:
        benchmark.pedantic(run)
        return
    timing = measure.time_beside(
        benchmark, run, runner(work, name, False, precision, device), device
    )
    benchmark.extra_info.update(
        op="student",
        shape=name,
        work=work,
        batch=CASES[name].batch,
        precision=precision,
        peer="dsno_kernels",
        errors={"loss" if work == "training" else "samples": error},
        peak_bytes=measure.peak_bytes(run, device),
        **timing,
    )
