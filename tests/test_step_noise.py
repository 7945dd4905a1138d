"""The order of noise: by an element's place in the shape, on every backend and for all strides."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import dsno_kernels as dk
from dsno_kernels.backends import reference_steps
from tests.strategies import tensor
from tests.test_exp_step import STEP_BACKENDS
from tests.test_solver_step import NOISE_ROW

SHAPE = (3, 4, 5, 7)
ORDERS = {
    "contiguous": (0, 1, 2, 3),
    "channels_last": (0, 2, 3, 1),
    "batch_innermost": (1, 2, 3, 0),
    "batch_inside": (2, 0, 3, 1),
}
SEED = torch.tensor([2**62 + 11, 2**33 + 5])
# Of log, sqrt, cos and sin of float32 numbers, as in tests/test_solver_step.py.
FLOAT32 = 2e-6


def drawn(x: Tensor, rows: bool, backend: str) -> Tensor:
    table = torch.tensor([NOISE_ROW]).expand(len(x), 8) if rows else NOISE_ROW
    return dk.solver_step(x, x, table, seed=SEED, keep_entry=False, backend=backend).base


@pytest.mark.parametrize("backend", STEP_BACKENDS)
@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("order", ORDERS)
def test_noise_does_not_depend_on_strides(order: str, rows: bool, backend: str) -> None:
    x = tensor(SHAPE, torch.float32, "permuted", ORDERS[order])
    exact = reference_steps.normal_noise(SEED, x.numel()).reshape(SHAPE)
    for dtype, bound in [(torch.float32, FLOAT32), (torch.bfloat16, 1e-2)]:
        noise = drawn(x.to(dtype), rows, backend)
        assert noise.dtype == dtype
        assert (noise.double() - exact).abs().max() <= bound * exact.abs().max()
    with_graph = drawn(x.requires_grad_(), rows, backend)
    assert with_graph.requires_grad
    assert (with_graph.double() - exact).abs().max() <= FLOAT32


@pytest.mark.parametrize("backend", STEP_BACKENDS)
def test_a_sliced_state(backend: str) -> None:
    x = tensor(SHAPE, torch.float32, "sliced", ORDERS["contiguous"])
    assert torch.equal(drawn(x, True, backend), drawn(x.contiguous(), True, backend))
    assert torch.equal(drawn(x, False, backend), drawn(x.contiguous(), False, backend))
