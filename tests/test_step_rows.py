"""Rows of a step: which are looked at before it runs, NumPy's integers as index and head, and the
gradient of a table whose index the host cannot read.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

import dsno_kernels as dk
from dsno_kernels.ops import exp_step as ops
from tests.helpers import assert_close

FLOAT64 = 1e-13
ADDS_NOISE = [0.0, 1.0, 1.0, 0.5, 0.7, 1.0, 0.0, 1.0]
READS_HISTORY = [0.0, 1.0, 1.0, 0.5, 0.3, 0.0, 1.0, 0.0, 0.0, 1.0]
X = torch.linspace(-1, 2, 6).reshape(2, 3)


def gradient(step: Callable[[Tensor], Tensor]) -> object:
    return torch.func.grad(lambda x: step(x).sum())(X)


def derivative(step: Callable[[Tensor], Tensor]) -> object:
    return torch.func.jvp(step, (X,), (X,))


def mapped(step: Callable[[Tensor], Tensor]) -> object:
    return torch.func.vmap(step)(X)


def recorded(step: Callable[[Tensor], Tensor]) -> object:
    return step(X.clone().requires_grad_())


@pytest.mark.parametrize("run", [gradient, derivative, mapped, recorded])
@pytest.mark.parametrize(
    ("row", "text"),
    [(ADDS_NOISE, "give noise or seed"), (READS_HISTORY, "reads 1 entries of history, but 0 are")],
    ids=["noise", "history"],
)
def test_numbers_that_ask_for_more_are_refused_everywhere(
    run: Callable[..., object], row: list[float], text: str
) -> None:
    with pytest.raises(ValueError, match=text):
        run(lambda x: dk.solver_step(x, torch.tanh(x), row).base)


def test_numbers_that_ask_for_more_are_refused_by_the_compiler() -> None:
    def step(x: Tensor) -> Tensor:
        return dk.solver_step(x, torch.tanh(x), ADDS_NOISE).base

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="eager")
    with pytest.raises(Exception, match=r"Observed exception|give noise or seed"):
        compiled(X.clone().requires_grad_())


def test_a_tensor_under_a_transform_is_not_looked_at() -> None:
    row = torch.tensor(ADDS_NOISE)
    found = gradient(lambda x: dk.solver_step(x, x, row).base)
    assert torch.equal(found, torch.full_like(X, 1.5))  # a_b + c_b, without the noise


def test_integers_of_numpy_choose_rows_and_slots() -> None:
    table, ring = torch.randn(4, 4), torch.randn(3, 2, 3)
    i, j = np.int64(2), np.int32(1)
    ours = dk.exp_step(X, ring, table, index=i, head=j)
    assert torch.equal(ours, dk.exp_step(X, ring, table, index=2, head=1))
    rings = ring.clone(), ring.clone()
    for target, head in zip(rings, (1, j), strict=True):
        dk.solver_step(X, -X, ADDS_NOISE, target, head=head, noise=X, store=True)
    assert torch.equal(*rings) and torch.equal(rings[0][2], -X)
    for wrong in (np.bool_(True), np.float64(1.0)):
        with pytest.raises(TypeError, match="index must be an integer"):
            dk.exp_step(X, ring, table, index=wrong)
        with pytest.raises(TypeError, match="head must be an integer"):
            dk.exp_step(X, ring, table[0], head=wrong)


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("given", [[7, -2], -2, 7], ids=str)
def test_the_gradient_goes_to_the_row_that_a_clamped_index_chose(
    monkeypatch: pytest.MonkeyPatch, backend: str | None, given: int | list[int]
) -> None:
    """As on a device, whose index nobody reads on the host."""
    monkeypatch.setattr(ops, "check_index", lambda index, rows: None)
    x, m = torch.randn(2, 2, 3, dtype=torch.float64).unbind(0)
    table = torch.randn(4, 2, dtype=torch.float64, requires_grad=True)
    index = torch.tensor(given)
    grads = []
    for chosen in (index, index.clamp(0, 3)):
        y = dk.exp_step(x, [m], table, index=chosen, backend=backend)
        grads += torch.autograd.grad(y.square().sum(), table)
    assert grads[1].any()
    assert_close(grads[0], grads[1], FLOAT64)
