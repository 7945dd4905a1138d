"""The time of a candidate on the GPU that is here, after its result was compared with float64."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from benchmarks import events, measure
from benchmarks.host_cuda import cuda
from benchmarks.shapes import Shape
from benchmarks.tuning import Rejected, with_row
from benchmarks.tuning_model import GPUS, Gpu, Usage, geometric_mean, itemsize, shapes_of
from dsno_kernels.backends import reference
from dsno_kernels.backends.triton import launch
from dsno_kernels.backends.triton.configs import Architecture, Config, RowKey

# Relative RMS errors that each precision may have, of N(0, 1) data.
ERRORS = {"fp32": 1e-6, "bf16x3": 1e-5, "tf32": 6e-4, "bf16": 5e-3}

Case = tuple[Callable[[], Tensor], Tensor]  # the call, and what it should return in float64


class Stopwatch:
    """Scores a candidate by the geometric mean of its device times at the row's shapes.

    The whole op is timed, in a CUDA graph and with cold caches: so neither the host nor what an
    earlier call left in L2 counts, and what the tile costs the other kernels of the op does.
    `backend` computes; tests put another one in the place of the Triton kernels.
    """

    def __init__(
        self, table: Architecture, device: torch.device, backend: Any, small: bool = False
    ) -> None:
        self.table, self.device, self.backend, self.small = table, device, backend, small
        self.cases: tuple[RowKey | None, list[Case]] = None, []

    def __call__(self, key: RowKey, config: Config, usage: Usage) -> float:
        with table_in_use(with_row(self.table, key, config)):
            return geometric_mean([self._seconds(key, *case) for case in self._cases(key)])

    def _cases(self, key: RowKey) -> list[Case]:
        """The calls of a row; those of the row before are freed."""
        if self.cases[0] != key:
            self.cases = None, []
            shapes = [_small(shape) if self.small else shape for shape in shapes_of(key)]
            self.cases = key, [self._case(key, shape) for shape in shapes]
        return self.cases[1]

    def _case(self, key: RowKey, shape: Shape) -> Case:
        x, other = operands(key, shape, self.device)
        precision = precision_of(key, self.table)
        call = functools.partial(compute, self.backend, key[0], shape, x, other, precision)
        return call, compute(reference, key[0], shape, x.double(), other.double(), "fp32")

    def _seconds(self, key: RowKey, call: Callable[[], Tensor], expected: Tensor) -> float:
        try:
            error = measure.relative_error(call(), expected)
            limit = ERRORS[precision_of(key, self.table)]
            if not error <= limit:
                raise Rejected(f"error {error:.1e}, {limit:.0e} is allowed")
            return events.graph_seconds(call, self.device)
        except Rejected:
            raise
        except Exception as problem:  # PyTorch and Triton raise errors of many kinds
            lines = str(problem).strip().splitlines() or [""]
            raise Rejected(f"{type(problem).__name__}: {lines[0]}") from None


def _small(shape: Shape) -> Shape:
    shape = shape.small()
    return replace(shape, modes=min(shape.modes, shape.T // 2 + 1))


@contextlib.contextmanager
def table_in_use(table: Architecture) -> Iterator[None]:
    """Launchers take their configurations from this table."""
    saved = launch.architecture
    launch.architecture = lambda device: table  # type: ignore[assignment]
    try:
        yield
    finally:
        launch.architecture = saved


def precision_of(key: RowKey, table: Architecture) -> str:
    """The precision that a row serves; the thin transforms are float32-accurate."""
    exact = key[0].startswith("truncated") or key[1] == table.fp32_method
    return "fp32" if exact else key[1]


def operands(key: RowKey, shape: Shape, device: torch.device) -> tuple[Tensor, Tensor]:
    """x, and beside it what the row's op takes: the weight, the gradient or the spectrum."""
    dtype = torch.bfloat16 if itemsize(key[1]) == 2 else torch.float32
    x = torch.randn(shape.size, device=device).to(dtype)
    if key[0].startswith("spectral_conv_weight_grad"):
        return x, torch.randn_like(x)
    if key[0] == "truncated_irfft":
        size = [*shape.size, 2]
        size[shape.time_dim] = shape.modes
        return x, torch.randn(size, device=device)
    C = shape.channels
    return x, torch.randn(C, C, shape.modes, 2, device=device) / C


def compute(
    backend: Any, kernel: str, shape: Shape, x: Tensor, other: Tensor, precision: str
) -> Tensor:
    """The op that runs a row's kernel."""
    T, K, dim = shape.T, shape.modes, shape.time_dim
    axes = {"time_dim": dim, "channel_dim": shape.channel_dim}
    if kernel == "truncated_rfft":
        return backend.truncated_rfft(x, K, dim=dim)
    if kernel == "truncated_irfft":
        return backend.truncated_irfft(other, T, dim=dim)
    if kernel.startswith("spectral_conv_weight_grad"):
        return backend.spectral_conv_weight_grad(x, other, K, precision=precision, **axes)
    y, _ = backend.spectral_conv(x, other, n=T, out_dtype=x.dtype, precision=precision, **axes)
    return y


def gpu_of(device: torch.device, capability: tuple[int, int]) -> Gpu:
    """The model's constants of a device; of an architecture it does not know, measured rates."""
    properties = cuda().get_device_properties(device)
    if capability in GPUS:
        return GPUS[capability]._replace(multiprocessors=properties.multi_processor_count)
    dram = measure.copy_rate(device)
    return Gpu(
        properties.multi_processor_count,
        getattr(properties, "shared_memory_per_block_optin", properties.shared_memory_per_block),
        properties.shared_memory_per_multiprocessor,
        properties.max_threads_per_multi_processor,
        dram,
        1.3 * dram,  # of L2: the ratio that an H200 is assumed to have
        {
            "bf16": measure.gemm_rate("bf16", device),
            "tf32": measure.gemm_rate("tf32", device),
            "ieee": measure.gemm_rate("tf32", device) / 4,  # assumed: no call runs on FFMA for sure
        },
    )
