"""`out=` of the steps: results written where the caller wants them, and what is refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import dsno_kernels as dk
from tests.helpers import assert_close
from tests.strategies import tensor
from tests.test_exp_step import STEP, STEP_BACKENDS

SHAPE, ORDER = (3, 5, 7), (2, 0, 1)
MEMORIES = ("contiguous", "permuted", "sliced", "offset")
ROW = [0.25, 1.0, 1.5, -0.25, 0.0, 0.5, 0.125, 2.0]  # A, B, a_b, c_b, s, a_p, c_p, c_in
X = torch.zeros(2, 3)


@pytest.mark.parametrize("backend", STEP_BACKENDS)
@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("memory", MEMORIES)
def test_exp_step_writes_into_out(memory: str, rows: bool, backend: str) -> None:
    x, h = torch.randn(2, *SHAPE).unbind(0)
    coefficients = torch.randn(3, 3) if rows else [0.5, 2.0, 0.25]
    expected = dk.exp_step(x, [h, x], coefficients, backend=backend)
    for dtype in (torch.float32, torch.bfloat16):
        out = tensor(SHAPE, dtype, memory, ORDER)
        version = out._version
        y = dk.exp_step(x, [h, x], coefficients, out=out, backend=backend)
        assert y is out and out._version > version
        assert torch.equal(out, expected.to(dtype))


@pytest.mark.parametrize("backend", STEP_BACKENDS)
@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("memory", MEMORIES)
def test_solver_step_writes_base_into_out(memory: str, rows: bool, backend: str) -> None:
    point, output, base = torch.randn(3, *SHAPE).unbind(0)
    table = torch.tensor([ROW]).expand(3, 8) if rows else ROW
    for options in ({}, {"base": base}, {"looks_ahead": True, "input_dtype": torch.bfloat16}):
        expected = dk.solver_step(point, output, table, backend=backend, **options)
        out = tensor(SHAPE, torch.float32, memory, ORDER)
        version = out._version
        found = dk.solver_step(point, output, table, out=out, backend=backend, **options)
        assert found.base is out and out._version > version
        for new, wanted in zip(found, expected, strict=True):
            assert (new is None and wanted is None) or torch.equal(new, wanted)
        if "looks_ahead" not in options:
            assert found.point is out


@pytest.mark.parametrize("backend", STEP_BACKENDS)
def test_out_may_overlap_the_inputs(backend: str) -> None:
    memory = torch.randn(20000)
    x, out = memory[:-3], memory[3:]
    expected = 0.5 * x + 2.0 * torch.ones_like(x)
    dk.exp_step(x, [torch.ones_like(x)], [0.5, 2.0], out=out, backend=backend)
    assert_close(out, expected.double(), STEP)
    expected = 1.5 * x - 0.25 * (0.25 * x + out)
    dk.solver_step(x, out, ROW, keep_entry=False, out=out, backend=backend)
    assert_close(out, expected.double(), 10 * STEP)


@pytest.mark.parametrize("shape", [(0, 3), ()], ids=str)
def test_empty_batches_and_tensors_without_axes(shape: tuple[int, ...]) -> None:
    x, h, out = torch.randn(3, *shape).unbind(0)
    assert dk.exp_step(x, [h], [2.0, 3.0], out=out) is out
    assert torch.allclose(out, 2 * x + 3 * h)
    assert dk.solver_step(x, h, ROW, out=out).base is out


def test_a_float64_result_of_float32_tensors() -> None:
    x, out = torch.randn(5), torch.empty(5, dtype=torch.float64)
    assert_close(dk.exp_step(x, [x], [1.0, 0.5], out=out), 1.5 * x.double(), STEP)


def test_compiled_steps_write_into_out() -> None:
    torch._dynamo.reset()

    def step(x: Tensor, h: Tensor, frames: Tensor) -> Tensor:
        dk.exp_step(x, [h], [0.5, 2.0], out=frames[:, 0])
        return dk.solver_step(frames[:, 0], h, ROW, keep_entry=False, out=frames[:, 1]).base + 1

    x, h = torch.randn(2, 3, 5).unbind(0)
    ours, theirs = torch.empty(2, 3, 2, 5).unbind(0)
    y = torch.compile(step, fullgraph=True, backend="aot_eager")(x, h, ours)
    assert torch.equal(y, step(x, h, theirs)) and torch.equal(ours, theirs)
    torch._dynamo.reset()


def in_exp_step(x: Tensor) -> Tensor:
    return dk.exp_step(x, [x], [1.0, 0.5], inplace=True)


def in_solver_step(x: Tensor) -> Tensor:
    return dk.solver_step(x, x, ROW, inplace=True, keep_entry=False).base


def out_of_solver_step(x: Tensor) -> Tensor:
    return dk.solver_step(x, x, ROW, out=torch.empty(3), keep_entry=False).base


@pytest.mark.parametrize("call", [in_exp_step, in_solver_step, out_of_solver_step])
def test_nothing_is_written_under_transforms(call: Callable[[Tensor], Tensor]) -> None:
    """Under vmap the state came back as it was."""
    with pytest.raises(NotImplementedError, match=r"under torch.func transforms"):
        torch.func.vmap(call)(torch.randn(4, 3))


@pytest.mark.parametrize(
    ("kind", "message", "out", "more"),
    [
        (TypeError, "out must be a torch.Tensor, got list", [0.0], {}),
        (TypeError, "out must be real floating point", X.long(), {}),
        (ValueError, "out must have the shape of x", X[:1], {}),
        (ValueError, "out.* on meta", X.to("meta"), {}),
        (ValueError, "out: its elements share memory", X[:, :1].expand(2, 3), {}),
        (ValueError, "exclude each other", X.clone(), {"inplace": True}),
        (ValueError, "into out records no graph", X.clone().requires_grad_(), {}),
    ],
    ids=["list", "dtype", "shape", "device", "expanded", "inplace", "graph"],
)
def test_refusals_say_what_is_wrong(
    kind: type[Exception], message: str, out: Tensor, more: dict[str, bool]
) -> None:
    with pytest.raises(kind, match=message):
        dk.exp_step(X, [X], [1.0, 2.0], out=out, **more)
    with pytest.raises(kind, match=message):
        dk.solver_step(X, X, ROW, out=out, **more)


def test_out_has_the_dtype_of_the_result() -> None:
    half = X.half()
    with pytest.raises(TypeError, match=r"dtype of the result, \S+, got torch.float16"):
        dk.exp_step(X, [X], [1.0, 2.0], out=half, out_dtype=torch.float32)
    with pytest.raises(TypeError, match=r"dtype of the result, \S+, got torch.float16"):
        dk.solver_step(X, X, ROW, out=half)
