"""Graphs that `torch.compile` makes of 20 steps whose index and head are Python's integers: two, as
the first value is taken for a constant. (Tensors make one: tests/test_exp_step_autograd.py.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import dsno_kernels as dk
from tests.test_solver_step import row_of

TABLE = torch.randn(20, 4, generator=torch.Generator().manual_seed(0)) / 4


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    with torch.no_grad():
        yield
    torch._dynamo.reset()


def of_a_list(x: Tensor, ring: Tensor, i: int, rows: Tensor) -> Tensor:
    return dk.exp_step(x, list(ring.unbind(0)), TABLE, index=i)


def of_a_ring(x: Tensor, ring: Tensor, i: int, rows: Tensor) -> Tensor:
    return dk.exp_step(x, ring, TABLE, index=i, head=i)


def into_a_ring(x: Tensor, ring: Tensor, i: int, rows: Tensor) -> Tensor:
    output = torch.tanh(x)
    return dk.solver_step(x, output, rows, ring, index=i, head=i, store=True).base


def in_turn(x: Tensor, ring: Tensor, i: int, rows: Tensor) -> Tensor:
    output = torch.tanh(x)
    return dk.solver_step(x, output, rows, ring, index=i, head=i % 3, store=True).base


@pytest.mark.parametrize("step", [of_a_list, of_a_ring, into_a_ring, in_turn])
def test_integers_make_two_graphs(step: Callable[[Tensor, Tensor, int, Tensor], Tensor]) -> None:
    rows = row_of(3, 20) / 4
    rows[:, 6] = 0
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, fullgraph=True, backend=counter)
    rings = [torch.zeros(3, 2, 5) for _ in range(2)]
    x = torch.randn(2, 5)
    for i in range(20):
        y = compiled(x, rings[0], i, rows)
        assert torch.equal(y, step(x, rings[1], i, rows)) and torch.equal(*rings)
        x = y
    assert counter.frame_count == 2


def test_numbers_that_change() -> None:
    """The second row was no graph: dynamo makes symbols of numbers that change."""
    step = torch.compile(
        lambda x, h, a: dk.exp_step(x, [h], [a, 0.5]), fullgraph=True, backend="eager"
    )
    x, h = torch.randn(2, 2, 5)
    for a in (0.25, 1.5, -2.0):
        assert torch.equal(step(x, h, a), dk.exp_step(x, [h], [a, 0.5]))
    with pytest.raises(Exception, match="coefficients must be finite, got nan"):
        step(x, h, float("nan"))


def test_bounds_that_change() -> None:
    row = [1.0, -0.5, 0.5, 0.25, 0.0, 0.5, 0.25, 1.0]
    step = torch.compile(
        lambda x, F, high: dk.solver_step(x, F, row, clip=(-1.0, high)),
        fullgraph=True,
        backend="eager",
    )
    limit = torch.compile(
        lambda x, most: dk.dynamic_threshold(x, 0.9, most), fullgraph=True, backend="eager"
    )
    x, F = torch.randn(2, 2, 5)
    for bound in (1.5, 1.75, 2.5):
        compiled, direct = step(x, F, bound), dk.solver_step(x, F, row, clip=(-1.0, bound))
        for made, expected in zip(compiled, direct, strict=True):
            assert (made is None and expected is None) or torch.equal(made, expected)
        assert torch.equal(limit(x, bound), dk.dynamic_threshold(x, 0.9, bound))
