"""The whole DSNO, forward and training step, against the network as the official project runs it.

Each entry is checked against the official form in float32 first, then timed in turns with it at the
same precision. On the CPU a small network stands for both.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks import events, measure
from benchmarks.host_cuda import dry_run, on_gpu
from benchmarks.shapes import PASSES
from dsno_kernels.models import DSNO, CapturedModel, DSNOConfig, logsnr_schedule
from dsno_kernels.models.eager import EagerTimeConv
from dsno_kernels.nn import TimeConv
from dsno_kernels.precision import BUDGETS as PRECISION_BUDGETS

T = 4
TEMPORAL_LAYERS_SECONDS = 1.2e-3  # aimed at for all 22 at B=32 on an H200; the bytes take 0.58e-3
BASELINE = "official"
VARIANTS = (BASELINE, "dsno_kernels", "dsno_kernels channels_last", "dsno_kernels CUDA graph")
PRECISIONS = ("fp32", "tf32", "bf16 autocast")
# Relative RMS of the output and of all gradients together against the official form in float32.
# Some 60 layers, each within its own budget (tests/test_models.py: 20 layers stay under 1e-5), and
# activations on the other side of LeakyReLU's zero; products of 10 or 7 bits of mantissa.
BUDGETS = {"fp32": (3e-5, 2e-2), "tf32": (2e-2, 1e-1), "bf16 autocast": (5e-2, 3e-1)}

SIDE, CHANNELS = (8, 32) if dry_run() else (16, 64)
SMALL = DSNOConfig(
    image_size=SIDE,
    channels=CHANNELS,
    channel_mult=(1, 1),
    num_res_blocks=1,
    attention_resolutions=(SIDE // 2,),
    embedding_dim=2 * CHANNELS,
)


@dataclasses.dataclass(frozen=True)
class Case:
    """A network and a batch of it."""

    config: DSNOConfig
    batch: int


CASES = {
    "cifar10": Case(DSNOConfig.cifar10(), 16),
    "imagenet64": Case(DSNOConfig.imagenet64(), 4),
}
SMALL_CASES = {
    "small": Case(SMALL, 2),
    "small_classes": Case(dataclasses.replace(SMALL, num_classes=10, head_dim=32), 2),
}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """The published networks on a GPU, small ones elsewhere."""
    if "network" in metafunc.fixturenames:
        whole = torch.cuda.is_available() and not dry_run()
        metafunc.parametrize("network", CASES if whole else SMALL_CASES)


@functools.lru_cache(maxsize=1)
def models(case: Case, device: torch.device) -> tuple[DSNO, DSNO]:
    """The official form and ours with the same parameters, none of them near zero."""
    torch.manual_seed(0)
    config = dataclasses.replace(case.config, dropout=0.0)  # random numbers cannot be compared
    with torch.device(device):
        official, ours = (DSNO(config, kernels=kernels).eval() for kernels in (False, True))
    with torch.no_grad():
        for parameter in official.parameters():
            fan = parameter[0].numel() if parameter.ndim > 1 else parameter.numel()
            parameter.add_(torch.randn_like(parameter), alpha=0.3 * fan**-0.5)
    ours.load_state_dict(official.state_dict())
    return official, ours


def inputs(case: Case, device: torch.device) -> tuple[Tensor, ...]:
    """Noise, log-SNR and, for a conditional network, classes."""
    generator = torch.Generator(device).manual_seed(1)
    config = case.config
    size = (case.batch, config.image_channels, config.image_size, config.image_size)
    x = torch.randn(size, device=device, generator=generator)
    logsnr = logsnr_schedule(torch.linspace(0.9, 0.0, T, device=device))
    if not config.num_classes:
        return x, logsnr
    return x, logsnr, torch.arange(case.batch, device=device) % config.num_classes


@contextlib.contextmanager
def arithmetic(precision: str, device: torch.device) -> Iterator[None]:
    """Products in float32, in TF32, or in bfloat16 by autocast."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = precision == "tf32"
    try:
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16 autocast"):
            yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def runner(
    model: Callable[..., Tensor], case: Case, direction: str, precision: str, device: torch.device
) -> Callable[[], tuple[Tensor, ...]]:
    """One forward, or one forward with the gradients of all parameters."""
    arguments = inputs(case, device)

    def run() -> tuple[Tensor, ...]:
        with arithmetic(precision, device), torch.set_grad_enabled(direction != "forward"):
            out = model(*arguments)
            if direction == "forward":
                return (out,)
        assert isinstance(model, nn.Module)
        loss = out.float().square().mean()
        return out.detach(), *torch.autograd.grad(loss, list(model.parameters()))

    return run


@functools.lru_cache(maxsize=2)
def expected(case: Case, direction: str, device: torch.device) -> tuple[Tensor, ...]:
    """The results of the official form in float32."""
    return runner(models(case, device)[0], case, direction, "fp32", device)()


def variant(
    name: str, case: Case, direction: str, precision: str, device: torch.device
) -> Callable[[], tuple[Tensor, ...]]:
    official, ours = models(case, device)
    if name == BASELINE:
        return runner(official, case, direction, precision, device)
    ours.to(
        memory_format=torch.channels_last if "channels_last" in name else torch.contiguous_format
    )
    if "CUDA graph" not in name:
        return runner(ours, case, direction, precision, device)
    if not on_gpu(device) or direction != "forward":
        pytest.skip("a CUDA graph is captured of a forward on a GPU")
    if dry_run():  # nothing to capture
        return runner(ours, case, direction, precision, device)
    with arithmetic(precision, device):
        captured = CapturedModel(ours, *inputs(case, device))
    return runner(captured, case, direction, precision, device)


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("direction", PASSES)
def test_model(
    benchmark: Any,
    network: str,
    direction: str,
    precision: str,
    name: str,
    device: torch.device,
    smoke: bool,
) -> None:
    if precision == "tf32" and not on_gpu(device):
        pytest.skip("TF32 is of GPUs")
    case = (CASES | SMALL_CASES)[network]
    benchmark.group = f"{network} {direction} {precision}"
    run = variant(name, case, direction, precision, device)
    errors = check(run(), expected(case, direction, device), precision)
    if smoke:
        benchmark.pedantic(run)
        return
    baseline = variant(BASELINE, case, direction, precision, device)
    timing = measure.time_beside(benchmark, run, baseline, device)
    benchmark.extra_info.update(
        op="model",
        shape=network,
        batch=case.batch,
        precision=precision,
        direction=direction,
        peer=name,
        errors=errors,
        peak_bytes=measure.peak_bytes(run, device),
        **timing,
    )


def check(
    results: tuple[Tensor, ...], exact: tuple[Tensor, ...], precision: str
) -> dict[str, float]:
    """Relative RMS errors of the output and of all gradients as one vector, within the budget."""
    errors = {"out": measure.relative_error(results[0].float(), exact[0])}
    if len(results) > 1:
        pairs = list(zip(results[1:], exact[1:], strict=True))
        wrong = sum(float((a.float() - e).square().sum()) for a, e in pairs)
        errors["gradients"] = (wrong / sum(float(e.square().sum()) for _, e in pairs)) ** 0.5
    for (name, error), budget in zip(errors.items(), BUDGETS[precision], strict=False):
        assert error <= budget, f"relative RMS error {error:.3g} of {name}, budget {budget:.3g}"
    return errors


def temporal_layers(config: DSNOConfig) -> dict[int, int]:
    """How many temporal layers a network of one width has at each resolution."""
    each = 2 * config.num_res_blocks + 1  # one more on the way up
    counts = dict.fromkeys(config.resolutions, each)
    counts[config.resolutions[-1]] += 1  # the middle
    return counts


def test_all_temporal_layers_in_one_graph(
    benchmark: Any, device: torch.device, smoke: bool
) -> None:
    """The 22 temporal layers of DSNO-CIFAR, those of a level one after the other, forward, TF32."""
    if not on_gpu(device):
        pytest.skip("a CUDA graph needs a GPU")
    benchmark.group = "temporal layers forward tf32"
    config, batch = (SMALL, 2) if dry_run() else (DSNOConfig.cifar10(), 32)
    C = config.channels
    torch.manual_seed(0)
    stacks: list[tuple[nn.Sequential, nn.Sequential, Tensor]] = []
    for side, count in temporal_layers(config).items():
        ours = nn.Sequential(
            *(TimeConv(C, C, config.modes, precision="tf32") for _ in range(count))
        )
        for parameter in ours.parameters():
            nn.init.normal_(parameter, std=0.3 * C**-0.5)
        official = nn.Sequential(*(EagerTimeConv(C, C, config.modes) for _ in range(count)))
        official.load_state_dict(ours.state_dict())
        x = torch.randn(batch, T, C, side, side, device=device)
        stacks.append((ours.to(device), official.to(device), x))
    layers = sum(len(ours) for ours, _, _ in stacks)
    ys: list[Tensor] = []

    def run() -> None:
        with torch.no_grad():
            ys[:] = [ours(x) for ours, _, x in stacks]

    def baseline() -> None:
        with torch.no_grad(), arithmetic("tf32", device):
            for _, official, x in stacks:
                official(x)

    graph = events.capture(run)
    graph.replay()
    errors = {}
    for y, (_, official, x) in zip(ys, stacks, strict=True):
        with torch.no_grad():
            errors[f"{x.shape[-1]}"] = measure.relative_error(y, official(x))
    # Each of up to 8 layers in a row adds its own error to x + LeakyReLU(h).
    assert max(errors.values()) <= 3 * PRECISION_BUDGETS["tf32"], errors
    if smoke:
        benchmark.pedantic(graph.replay)
        return
    timing = measure.time_beside(benchmark, graph.replay, baseline, device)
    benchmark.extra_info.update(
        op="temporal_layers",
        shape=f"{layers} layers",
        batch=batch,
        precision="tf32",
        direction="forward",
        peer="dsno_kernels CUDA graph",
        errors=errors,
        target_seconds=TEMPORAL_LAYERS_SECONDS,
        **timing,
    )
