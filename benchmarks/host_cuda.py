"""The part of `torch.cuda` that the benchmarks and GPU tests use, played by the CPU for dry runs.

With `DSNO_KERNELS_DRY_RUN=1` the code that measures a GPU runs line by line on the CPU: `cuda()` is
then `HostCuda`, whose events read the host's clock. Its times mean nothing; what a dry run shows is
that no line of that code meets a GPU for the first time.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch


class Event:
    """A point in time, as `torch.cuda.Event(enable_timing=True)`."""

    def __init__(self, enable_timing: bool = False) -> None:
        self.enable_timing = enable_timing

    def record(self, stream: Stream | None = None) -> None:
        self.time = time.perf_counter()

    def elapsed_time(self, end_event: Event) -> float:
        if not (self.enable_timing and end_event.enable_timing):
            raise RuntimeError("both events must be made with enable_timing=True")
        return 1e3 * (end_event.time - self.time)


class Stream:
    """Everything has happened when a call returns: there is nothing to wait for."""

    def wait_stream(self, stream: Stream) -> None:
        pass

    def synchronize(self) -> None:
        pass


class CUDAGraph:
    """A graph without contents: what a capture calls runs once, and a replay does nothing."""

    def replay(self) -> None:
        pass


class HostCuda:
    """`torch.cuda`, as far as it is used here."""

    Event, Stream, CUDAGraph = Event, Stream, CUDAGraph

    @staticmethod
    def synchronize(device: Any = None) -> None:
        pass

    @staticmethod
    def current_stream(device: Any = None) -> Stream:
        return Stream()

    @staticmethod
    @contextlib.contextmanager
    def stream(stream: Stream | None) -> Iterator[None]:
        yield

    @staticmethod
    @contextlib.contextmanager
    def graph(
        cuda_graph: CUDAGraph, pool: Any = None, stream: Stream | None = None
    ) -> Iterator[None]:
        yield

    @staticmethod
    def _sleep(cycles: int) -> None:
        pass

    @staticmethod
    def set_sync_debug_mode(debug_mode: int | str) -> None:
        pass

    @staticmethod
    def device_count() -> int:
        return 1

    @staticmethod
    def mem_get_info(device: Any = None) -> tuple[int, int]:
        return 0, 0

    @staticmethod
    def memory_allocated(device: Any = None) -> int:
        return 1 << 20

    @staticmethod
    def max_memory_allocated(device: Any = None) -> int:
        return 2 << 20

    @staticmethod
    def reset_peak_memory_stats(device: Any = None) -> None:
        pass

    @staticmethod
    def get_device_properties(device: Any = None) -> SimpleNamespace:
        return SimpleNamespace(
            name="Dry Run",
            total_memory=1 << 30,
            major=0,
            minor=0,
            multi_processor_count=1,
            L2_cache_size=1 << 16,
        )


def dry_run() -> bool:
    return os.environ.get("DSNO_KERNELS_DRY_RUN") == "1"


def cuda() -> Any:
    """`torch.cuda`, or what plays it in a dry run."""
    return HostCuda if dry_run() else torch.cuda


def on_gpu(device: torch.device) -> bool:
    """Whether `device` is a GPU, or stands for one."""
    return device.type == "cuda" or dry_run()
