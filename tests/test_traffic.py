"""What the benchmarks count as moved by a call."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

import dsno_kernels as dk
from benchmarks import traffic
from dsno_kernels.backends import cpu_steps

CPU = torch.device("cpu")


def test_each_operator_counts_its_operands_once() -> None:
    x, y = torch.randn(2, 3, 4).unbind(0)
    # 2 y: y, one result. x x: x once, one result. Their sum: two, one. The view: nothing.
    found = traffic.of(lambda: (x * x + 2 * y).view(-1), x)
    assert found == {"read": 4.0, "written": 3.0}


def test_smaller_tensors_are_left_out_and_larger_ones_count_by_their_size() -> None:
    x = torch.randn(3, 4)
    found = traffic.of(lambda: torch.stack([x, x + 1]) * torch.ones(4), x)
    assert found == {"read": 1.0 + 2.0 + 2.0, "written": 1.0 + 2.0 + 2.0}


@pytest.mark.parametrize("guided", [False, True], ids=["plain", "guided"])
def test_a_fused_step_moves_each_tensor_once(guided: bool) -> None:
    x, m, u, h1, h2 = torch.randn(5, 2, 3).unbind(0)
    row = [0.5, 0.5, 1.0, 0.1, 0.2, 0.3, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0]
    guidance = {"unconditional": u, "guidance": 2.0} if guided else {}
    found = traffic.of(lambda: dk.solver_step(x, m, row, (h1, h2), **guidance), x)
    assert found == {"read": 4.0 + guided, "written": 2.0}


def test_a_copy_of_as_many_bytes_is_timed_after_the_peer() -> None:
    x, calls = torch.randn(2, 3), []
    found = traffic.beside(lambda: x + x, lambda: calls.append(x * x * x), x, CPU)
    assert found["bytes"] == 2 * 24 and found["copy_seconds"] > 0
    assert found["kernel_seconds"] == 0.0  # x + x is none of ours
    assert found["peer_traffic"] == {"read": 3.0, "written": 2.0}
    assert len(calls) == 1 + 2 * traffic.ROUNDS


def test_the_time_in_the_kernel_is_a_part_of_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that the kernel moves by 2 and the rest of the call by 5."""
    x, m = torch.randn(2, 2, 3).unbind(0)
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(traffic.time, "perf_counter", lambda: clock.now)
    before: list[int] = []

    def passes(seconds: float) -> None:
        clock.now += seconds

    kernels = SimpleNamespace(cpu_exp_step=lambda *_: passes(2.0))
    monkeypatch.setattr(cpu_steps, "_C", kernels)

    def call() -> None:
        passes(5.0)
        dk.exp_step(x, [m], [1.0, 0.5], backend="cpu")

    assert traffic.kernel_seconds(call, lambda: before.append(1)) == 2.0
    assert len(before) == traffic.ROUNDS and cpu_steps._C is kernels
