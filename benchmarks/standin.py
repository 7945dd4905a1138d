"""The part of pytest-benchmark that these benchmarks use, for machines that do not have it.

`conftest.py` registers it where the plugin is missing. It runs what it is given and counts rounds;
the numbers of an entry are in its `extra_info`, as they are with pytest-benchmark.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("benchmark", "stand-in for pytest-benchmark")
    group.addoption("--benchmark-disable", action="store_true", help="run every case once")
    group.addoption("--benchmark-only", action="store_true", help="accepted; all are benchmarks")
    group.addoption("--benchmark-json", help="not written: use --journal")


class Benchmark:
    def __init__(self, name: str, disabled: bool) -> None:
        self.name, self.group, self.disabled = name, "", disabled
        self.extra_info: dict[str, Any] = {}
        self.stats: SimpleNamespace | None = None

    def pedantic(
        self,
        target: Callable[..., Any],
        setup: Callable[[], Any] | None = None,
        rounds: int = 1,
        warmup_rounds: int = 0,
    ) -> Any:
        if self.disabled:
            rounds, warmup_rounds = 1, 0
        result, times = None, []
        for _ in range(warmup_rounds + rounds):
            if setup:
                setup()
            start = time.perf_counter()
            result = target()
            times.append(time.perf_counter() - start)
        times = times[warmup_rounds:]
        found = {"min": min(times), "median": statistics.median(times), "rounds": rounds}
        self.stats = SimpleNamespace(stats=SimpleNamespace(**found))
        return result


@pytest.fixture
def benchmark(request: pytest.FixtureRequest) -> Benchmark:
    return Benchmark(request.node.name, request.config.option.benchmark_disable)
