"""Steps that pass by the dispatcher, and what must not: whatever has to see the op, or a tensor
whose memory is not its value.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

import dsno_kernels as dk

ROW = [0.0, 1.0, 1.5, -0.25, 0.0, 1.0, 0.0, 1.0]  # A, B, a_b, c_b, s, a_p, c_p, c_in


def bare(x: Tensor, h: Tensor) -> Tensor:
    return dk.exp_step(x, [h], ROW[2:4])


def in_place(x: Tensor, h: Tensor) -> Tensor:
    return dk.exp_step(x.clone(), [h], ROW[2:4], inplace=True)


def fused(x: Tensor, h: Tensor) -> Tensor:
    return dk.solver_step(x, h, ROW, keep_entry=False).base


CALLS = {"exp_step": bare, "exp_step_": in_place, "solver_step": fused}
parametrize_calls = pytest.mark.parametrize("name", CALLS)


def inputs() -> tuple[Tensor, Tensor]:
    x, h = torch.randn(2, 3, 5).unbind(0)
    return x, h


def expected(x: Tensor, h: Tensor) -> Tensor:
    return 1.5 * x - 0.25 * h


@parametrize_calls
def test_a_pending_negation_is_carried_out(name: str) -> None:
    x, h = inputs()
    h = torch._neg_view(h)  # as `.imag` of a conjugate, but dense
    torch.testing.assert_close(CALLS[name](x, h), expected(x, h.resolve_neg()))


@parametrize_calls
def test_a_symbolic_zero_is_zeros(name: str) -> None:
    x, _ = inputs()
    h = torch._efficientzerotensor((3, 5))
    torch.testing.assert_close(CALLS[name](x, h), 1.5 * x)


def traced_by_jit(call: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    traced: Callable[[Tensor, Tensor], Tensor] = torch.jit.trace(call, inputs(), check_trace=False)
    return traced


def traced_by_fx(call: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    traced: Callable[[Tensor, Tensor], Tensor] = make_fx(call)(*inputs())
    return traced


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("trace", [traced_by_jit, traced_by_fx])
@parametrize_calls
def test_a_tracer_sees_the_op(name: str, trace: Callable[..., Callable[..., Tensor]]) -> None:
    traced = trace(CALLS[name])
    x, h = inputs()  # other values than those of the trace
    torch.testing.assert_close(traced(x, h), expected(x, h))


@parametrize_calls
def test_a_profiler_sees_the_op(name: str) -> None:
    with torch.profiler.profile() as profile:
        CALLS[name](*inputs())
    assert f"dsno_kernels::{name}" in {event.key for event in profile.key_averages()}


@parametrize_calls
def test_fake_tensors_stay_fake(name: str) -> None:
    mode = torch._subclasses.FakeTensorMode()
    fakes = [mode.from_tensor(t) for t in inputs()]
    y = CALLS[name](*fakes)
    assert isinstance(y, torch._subclasses.FakeTensor) and y.shape == (3, 5)
