"""The integrator steps on a CUDA device: parity with the formulas, one CUDA graph for 20 steps,
noise, streams, tensors beyond 2^31 elements. CuPy arrays are in test_gpu_cupy.py.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import dsno_kernels as dk
from dsno_kernels.backends import reference_steps
from tests.helpers import FLOAT64, IO_BUDGET, assert_close
from tests.on_device import DEVICE, DRY_RUN, cuda, marks, needs_memory, serving
from tests.test_exp_step import STEP, formula
from tests.test_solver_step import NOISE_ROW, row_of
from tests.test_solver_step import formula as solver_formula

pytestmark = marks

BACKENDS = serving("exp_step")
KERNELS = [name for name in BACKENDS if name != "reference"]
BUDGETS = {
    torch.float32: STEP,
    torch.float64: FLOAT64,
    torch.bfloat16: IO_BUDGET,
    torch.float16: IO_BUDGET,
}


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, device=DEVICE).to(dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", BUDGETS, ids=str)
@pytest.mark.parametrize("shape", [(2, 3, 64, 64), (3, 5, 7, 11), (5, 1)], ids=str)
@pytest.mark.parametrize("form", ["numbers", "row", "rows", "index", "indices"])
def test_exp_step(backend: str, form: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if backend == "cpu" and dtype == torch.float64:
        pytest.skip("its arithmetic is float32")
    for terms in (1, 4, 9):
        x, *history = (randn(*shape, dtype=dtype) for _ in range(terms))
        table, index = torch.randn(4, terms), torch.randint(4, shape[:1])
        coefficients, chosen, rows = {
            "numbers": (table[1].tolist(), None, table[1]),
            "row": (table[1].to(DEVICE), None, table[1]),
            "rows": (table[index].to(DEVICE), None, table[index]),
            "index": (table.to(DEVICE), torch.tensor(2, device=DEVICE), table[2]),
            "indices": (table.to(DEVICE), index.to(DEVICE), table[index]),
        }[form]
        y = dk.exp_step(x, history, coefficients, index=chosen, backend=backend)
        assert y.dtype == dtype and y.device.type == DEVICE.type
        assert_close(y, formula([t.cpu() for t in (x, *history)], rows), 2 * BUDGETS[dtype])


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("form", ["row", "rows", "index", "indices"])
def test_gradients(backend: str, form: str) -> None:
    x, a, b = (randn(3, 5, 301).requires_grad_() for _ in range(3))
    table = torch.randn(4, 3, device=DEVICE)
    if form in ("row", "rows"):
        table = table[0] if form == "row" else table[:3]
    table.requires_grad_()
    index = {"index": torch.tensor(2), "indices": torch.tensor([3, 0, 3])}.get(form)
    index = None if index is None else index.to(DEVICE)
    y = dk.exp_step(x, [a, b], table, index=index, backend=backend)
    g = torch.randn_like(y)
    leaves = (x, a, b, table)
    found = torch.autograd.grad(y, leaves, g)
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    exact = reference_steps.exp_step(wide[:3], coefficients=wide[3], index=index)
    expected = torch.autograd.grad(exact, wide, g.double())
    for actual, right in zip(found, expected, strict=True):
        assert_close(actual, right, 4 * STEP)
    again = dk.exp_step(x, [a, b], table, index=index, backend=backend)
    for first, second in zip(found, torch.autograd.grad(again, leaves, g), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("low", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("K", [1, 3, 8])
def test_solver_step(backend: str, K: int, low: torch.dtype) -> None:
    shape = (3, 2, 5, 67)
    point, output, u, *history = (randn(*shape, dtype=low) for _ in range(K + 2))
    base, row = randn(*shape), row_of(K)
    row[3 + K] = 0
    options: dict[str, Any] = {"guidance": 7.5, "clip": (-3.0, 2.5), "looks_ahead": True}
    step = dk.solver_step(
        point, output, row.to(DEVICE), history, base=base, unconditional=u,
        input_dtype=low, backend=backend, **options,
    )  # fmt: skip
    exact = solver_formula(
        point.cpu(), output.cpu(), row, [h.cpu() for h in history], base=base.cpu(),
        unconditional=u.cpu(), **options,
    )  # fmt: skip
    assert_close(step.base, exact[0], 4 * STEP)
    for actual, expected in zip(step[1:], exact[1:], strict=True):
        assert actual is not None
        assert_close(actual, expected, max(4 * STEP, BUDGETS[low]))


@pytest.mark.parametrize("backend", KERNELS)
def test_a_cuda_graph_holds_twenty_steps(backend: str) -> None:
    """One captured step with its index and head on the device, replayed 20 times."""
    N, K, shape = 20, 3, (4, 4, 64, 64)
    table = row_of(K, N) / 4
    table[:, 3 + K] = 0
    table = table.to(DEVICE)
    start, index = randn(*shape), torch.zeros((), dtype=torch.int64, device=DEVICE)
    state, ring = start.clone(), torch.zeros(K, *shape, device=DEVICE)

    def step() -> None:
        dk.solver_step(
            state, torch.tanh(state), table, ring, index=index, head=index, store=True,
            inplace=True, backend=backend,
        )  # fmt: skip
        index.add_(1)

    def reset() -> None:
        state.copy_(start)
        ring.zero_()
        index.zero_()

    side = cuda().Stream()
    side.wait_stream(cuda().current_stream())
    with cuda().stream(side):
        for _ in range(N):
            step()
    cuda().current_stream().wait_stream(side)
    expected = state.clone(), ring.clone()
    reset()
    graph = cuda().CUDAGraph()
    with cuda().graph(graph):
        step()
    if DRY_RUN:
        pytest.skip("the stand-in's graph replays nothing")
    reset()
    for _ in range(N):
        graph.replay()
    assert torch.equal(state, expected[0]) and torch.equal(ring, expected[1])


@pytest.mark.parametrize("backend", KERNELS)
def test_noise_is_reproducible_and_that_of_the_definition(backend: str) -> None:
    x = torch.zeros(3, 1031, device=DEVICE)

    def draw(seed: Any) -> Tensor:
        return dk.solver_step(x, x, NOISE_ROW, seed=seed, backend=backend).base

    generator = torch.Generator(DEVICE)
    first, second = draw(generator.manual_seed(3)), draw(generator)
    assert torch.equal(first, draw(generator.manual_seed(3)))
    assert not torch.equal(first, second)
    exact = reference_steps.normal_noise(torch.tensor([2**62 + 11, 2**33 + 5]), x.numel())
    drawn = draw((2**62 + 11, 2**33 + 5)).cpu().double()
    # log, sqrt, cos and sin of float32 numbers up to 6.7, rounded to 6e-8 each.
    assert (drawn.reshape(-1) - exact).abs().max() <= 2e-6


@pytest.mark.parametrize("backend", KERNELS)
def test_work_runs_on_the_current_stream(backend: str) -> None:
    x, h = randn(2, 1 << 20).unbind(0)
    dk.exp_step(x, [h], [1.0, 1.0], backend=backend)
    cuda().synchronize()
    stream = cuda().Stream()
    with cuda().stream(stream):
        for _ in range(50):
            x.mul_(1.01).mul_(1 / 1.01)
        x.fill_(2.0)
        y = dk.exp_step(x, [h], [2.0, 3.0], backend=backend)
    stream.synchronize()
    assert_close(y, 4 + 3 * h.double().cpu(), STEP)


@pytest.mark.parametrize("backend", [n for n in KERNELS if DRY_RUN or n in ("cuda", "cupy")])
def test_more_than_two_to_the_31_elements(backend: str) -> None:
    """bfloat16, so that x, history and result take 13 GB."""
    needs_memory(16)
    n = 2 ** (11 if DRY_RUN else 31) + 1031
    x = torch.ones(1, n, dtype=torch.bfloat16, device=DEVICE)
    h = torch.ones_like(x)
    x[0, -1], h[0, -2] = 3.0, 5.0
    for coefficients in ([0.5, 0.25], torch.tensor([[0.5, 0.25]], device=DEVICE)):
        y = dk.exp_step(x, [h], coefficients, backend=backend)
        assert y[0, -3:].tolist() == [0.75, 1.75, 1.75]
        assert y[0, :: 2**20].eq(0.75).all()
        del y
