"""What a call must move: the tensors it reads and writes, and how long a copy of as many takes; and
how long the call is in a kernel.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import measure
from benchmarks.events import Thunk
from benchmarks.host_cuda import on_gpu
from dsno_kernels.backends import cpu_steps

ROUNDS = 25


class Traffic(TorchDispatchMode):
    """Counts what the operators under it read and write, in tensors of `like`'s size.

    Views cost nothing, smaller tensors are left out, and an operator reads a tensor that it takes
    twice once. An operator of a library counts as one, whatever it does inside.
    """

    def __init__(self, like: Tensor) -> None:
        super().__init__()
        self.size = like.numel()
        self.read = self.written = 0.0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if not func.is_view:
            self.read += self._tensors([*args, *kwargs.values()])
            self.written += self._tensors([result])
        return result

    def _tensors(self, values: Sequence[Any]) -> float:
        found = {(x.data_ptr(), x.numel()) for x in _flat(values) if x.numel() >= self.size}
        return sum(numel for _, numel in found) / self.size


def _flat(values: Sequence[Any]) -> list[Tensor]:
    tensors: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            tensors.append(value)
        elif isinstance(value, (list, tuple)):
            tensors += _flat(value)
    return tensors


def of(call: Thunk, like: Tensor) -> dict[str, float]:
    """The traffic of a call, in tensors of `like`'s size."""
    with Traffic(like) as traffic:
        call()
    return {"read": traffic.read, "written": traffic.written}


def copy_seconds(moved: float, before: Thunk, device: torch.device) -> float:
    """The median time of a copy that reads and writes `moved` bytes in all, right after `before`,
    so that it finds the caches as a call that is timed in turns with `before`. On a GPU, where
    calls are timed with cold caches, by the rate of a large copy.
    """
    if on_gpu(device):
        return moved / measure.copy_rate(device)
    source, target = torch.rand(2, int(moved) // 8, device=device).unbind(0)
    run = measure.repeat(lambda: target.copy_(source), 1, device)
    times = []
    for _ in range(ROUNDS):
        before()
        times.append(measure.seconds(run))
    return statistics.median(times)


class Clocked:
    """A module whose functions are timed."""

    def __init__(self, module: Any) -> None:
        self.module, self.seconds = module, 0.0

    def __getattr__(self, name: str) -> Callable[..., Any]:
        function = getattr(self.module, name)

        def timed(*args: Any) -> Any:
            start = time.perf_counter()
            result = function(*args)
            self.seconds += time.perf_counter() - start
            return result

        return timed


def kernel_seconds(call: Thunk, before: Thunk) -> float:
    """The median time that a call, right after `before`, is in the CPU kernels of the steps."""
    times = []
    for _ in range(ROUNDS):
        before()
        clocked = Clocked(cpu_steps._C)
        with mock.patch.object(cpu_steps, "_C", clocked):
            call()
        times.append(clocked.seconds)
    return statistics.median(times)


def beside(
    call: Thunk,
    baseline: Thunk,
    like: Tensor,
    device: torch.device,
    peer_traffic: dict[str, float] | None = None,
) -> dict[str, Any]:
    """What a call and its baseline move, and how long a copy of the call's bytes takes.

    Args:
        peer_traffic: that of a baseline whose operators cannot be seen, as of compiled code.

    Returns:
        `traffic` and `peer_traffic` in tensors of `like`'s size, `bytes` of the call,
        `copy_seconds`; on the CPU `kernel_seconds` too, the call's time in the kernel.
    """
    own = of(call, like)
    moved = sum(own.values()) * like.numel() * like.element_size()
    in_kernel = {} if on_gpu(device) else {"kernel_seconds": kernel_seconds(call, baseline)}
    return {
        **in_kernel,
        "traffic": own,
        "peer_traffic": peer_traffic or of(baseline, like),
        "bytes": moved,
        "copy_seconds": copy_seconds(moved, baseline, device),
    }
