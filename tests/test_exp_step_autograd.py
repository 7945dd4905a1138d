"""Derivatives of `exp_step` to any order, what is kept for them, torch.func, and what PyTorch asks
of an op: opcheck, torch.compile, meta tensors, autocast.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import dsno_kernels as dk
from tests.helpers import FLOAT64, assert_close
from tests.test_exp_step import STEP, STEP_BACKENDS, formula, isa  # noqa: F401

OPS = torch.ops.dsno_kernels
B = 3


def inputs(dtype: torch.dtype, shape: tuple[int, ...] = (B, 2, 5)) -> list[Tensor]:
    return [torch.randn(shape, dtype=dtype).requires_grad_() for _ in range(4)]


def coefficient_forms(dtype: torch.dtype) -> dict[str, tuple[Tensor, Any]]:
    return {
        "row": (torch.randn(4, dtype=dtype), None),
        "rows": (torch.randn(B, 4, dtype=dtype), None),
        "int": (torch.randn(5, 4, dtype=dtype), 3),
        "index": (torch.randn(5, 4, dtype=dtype), torch.tensor(3)),
        "indices": (torch.randn(5, 4, dtype=dtype), torch.tensor([4, 1, 4])),
    }


@pytest.mark.parametrize("name", coefficient_forms(torch.float64))
def test_gradcheck_and_gradgradcheck(name: str) -> None:
    coefficients, index = coefficient_forms(torch.float64)[name]
    coefficients[..., 2] = 0  # a coefficient that is 0 has a gradient too
    leaves = (coefficients.requires_grad_(), *inputs(torch.float64, (B, 2)))

    def step(c: Tensor, x: Tensor, a: Tensor, b: Tensor, noise: Tensor) -> Tensor:
        return dk.exp_step(x, [a, b], c, index=index, noise=noise)

    assert torch.autograd.gradcheck(step, leaves)
    assert torch.autograd.gradgradcheck(step, leaves)


@pytest.mark.parametrize("tensor_head", [False, True])
def test_gradcheck_of_a_ring_buffer(tensor_head: bool) -> None:
    head = torch.tensor(1) if tensor_head else 1
    leaves = [torch.randn(s, dtype=torch.float64) for s in [(2, 3), (3, 2, 3), (4,)]]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    assert torch.autograd.gradcheck(lambda x, h, c: dk.exp_step(x, h, c, head=head), leaves)
    x, ring, _ = leaves
    row = [1.0, 2.0, 3.0, 4.0]
    y = dk.exp_step(x, ring, row, head=head)
    assert_close(y, dk.exp_step(x, [ring[1], ring[0], ring[2]], row), FLOAT64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", coefficient_forms(torch.float32))
def test_gradients_of_the_kernels(isa: str, name: str, dtype: torch.dtype) -> None:  # noqa: F811
    coefficients, index = coefficient_forms(torch.float32)[name]
    coefficients.requires_grad_()
    tensors = [t.detach().to(dtype).requires_grad_() for t in inputs(torch.float32, (B, 3, 171))]
    g = torch.randn(B, 3, 171)
    y = dk.exp_step(
        tensors[0], tensors[1:], coefficients, index=index, out_dtype=torch.float32, backend="cpu"
    )
    grads = torch.autograd.grad(y, (coefficients, *tensors), g)
    exact_c = coefficients.detach().double().requires_grad_()
    exact_t = [t.detach().double().requires_grad_() for t in tensors]
    exact = formula(exact_t, exact_c if index is None else exact_c[index])
    wanted = torch.autograd.grad(exact, (exact_c, *exact_t), g.double())
    for grad, leaf, expected in zip(grads, (coefficients, *tensors), wanted, strict=True):
        assert grad.dtype == leaf.dtype
        assert_close(grad, expected, STEP if grad.dtype == torch.float32 else 5e-3)


@pytest.mark.parametrize("name", ["row", "rows"])
def test_large_gradients_are_streamed_right(isa: str, name: str) -> None:  # noqa: F811
    coefficients = coefficient_forms(torch.float32)[name][0].requires_grad_()
    tensors = inputs(torch.float32, (B, 2, 400, 450))
    g = torch.randn(B, 2, 400, 450)
    assert g.numel() * 4 > 4 << 20  # past the size of streamed outputs
    y = dk.exp_step(tensors[0], tensors[1:], coefficients, backend="cpu")
    leaves = (coefficients, *tensors)
    wide = [t.detach().double().requires_grad_() for t in leaves]
    wanted = torch.autograd.grad(formula(wide[1:], wide[0]), wide, g.double())
    for grad, expected in zip(torch.autograd.grad(y, leaves, g), wanted, strict=True):
        assert_close(grad, expected, STEP)


@pytest.mark.parametrize("backend", STEP_BACKENDS)
def test_dot_products_over_long_samples_lose_nothing(backend: str) -> None:
    """2^20 products of ones: a float32 sum in one chain would stall at 2^24 times an ulp."""
    x = torch.ones(1, 1 << 20) * 1.1
    c = torch.tensor([1.0], requires_grad=True)
    (grad,) = torch.autograd.grad(dk.exp_step(x, [], c, backend=backend).sum(), c)
    assert_close(grad, x.double().sum().reshape(1), 1e-7)


@pytest.mark.parametrize("backend", STEP_BACKENDS)
def test_gradients_of_gradients_on_the_kernels(backend: str) -> None:
    c, *tensors = torch.randn(4), *inputs(torch.float32)
    leaves = (c.requires_grad_(), *tensors)

    def second(dtype: torch.dtype) -> tuple[Tensor, ...]:
        torch.manual_seed(7)
        copies = [leaf.detach().to(dtype).requires_grad_() for leaf in leaves]
        y = dk.exp_step(
            copies[1], copies[2:], copies[0], backend=backend if dtype == torch.float32 else None
        )
        first = torch.autograd.grad(y.square().sum(), copies, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), copies)

    for grad, expected in zip(second(torch.float32), second(torch.float64), strict=True):
        assert_close(grad, expected, 5 * STEP)


def saved_tensors(y: Tensor) -> list[Tensor]:
    names = [name for name in dir(y.grad_fn) if name.startswith("_saved")]
    kept = [getattr(y.grad_fn, name) for name in names]
    return [t for t in [*kept, *y.grad_fn.saved_tensors] if isinstance(t, Tensor)]


def test_nothing_of_the_size_of_x_is_kept_without_gradients_of_coefficients() -> None:
    x, *history = inputs(torch.float32)
    table = torch.randn(4, 4)
    for coefficients, index in [
        ([1.0, 2.0, 3.0, 4.0], None),
        (table[0], None),
        (table, torch.tensor(2)),
    ]:
        y = dk.exp_step(x, history, coefficients, index=index)
        assert all(t.numel() < x.numel() for t in saved_tensors(y))
    y = dk.exp_step(x, history, table.requires_grad_(), index=torch.tensor(2))
    assert sum(t.numel() == x.numel() for t in saved_tensors(y)) == 4


def test_only_what_needs_a_gradient_gets_one() -> None:
    x, a, b = (torch.randn(2, 3) for _ in range(3))
    b.requires_grad_()
    dk.exp_step(x, [a, b], [1.0, 2.0, 3.0]).sum().backward()
    assert x.grad is None and a.grad is None
    assert torch.equal(b.grad, torch.full_like(b, 3.0))
    with torch.no_grad():
        assert not dk.exp_step(x, [a, b], [1.0, 2.0, 3.0]).requires_grad


def test_an_expanded_gradient_and_a_zero_coefficient() -> None:
    x, h = (torch.randn(2, 3, requires_grad=True) for _ in range(2))
    grads = torch.autograd.grad(dk.exp_step(x, [h], [2.0, 0.0]).sum(), (x, h))
    assert torch.equal(grads[0], torch.full_like(x, 2.0))
    assert torch.equal(grads[1], torch.zeros_like(x))


def test_the_history_may_hold_x_itself() -> None:
    x = torch.randn(2, 3, requires_grad=True)
    y = dk.exp_step(x, [x, x], [1.0, 2.0, 4.0])
    assert_close(y, 7 * x.double(), STEP)
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(grad, torch.full_like(x, 7.0))


def test_coefficient_gradients_are_deterministic_and_sum_over_repeated_rows() -> None:
    x, h = torch.randn(2, 64, 3, 40, 41).unbind(0)
    table = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    index = torch.randint(3, (64,))
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 2, 3):
            torch.set_num_threads(threads)
            y = dk.exp_step(x, [h], table, index=index)
            results.append(torch.autograd.grad(y.square().sum(), table)[0])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(r, results[0]) for r in results)


def ddim_row(times: Tensor) -> Tensor:
    """DDIM between two times of the VP process with beta from 0.1 to 20: (a, c_0)."""
    log_alpha = -0.25 * times**2 * 19.9 - 0.05 * times
    alpha, sigma = log_alpha.exp(), (-torch.expm1(2 * log_alpha)).sqrt()
    a = alpha[1:] / alpha[:-1]
    return torch.stack([a, sigma[1:] - a * sigma[:-1]], 1)  # [N, 2]


def test_gradients_by_the_times_of_a_grid() -> None:
    """What learning a time grid needs: through the table and all steps, against differences."""
    x_T = torch.randn(2, 3, dtype=torch.float64)
    mean = torch.randn(3, dtype=torch.float64)

    def sample(times: Tensor) -> Tensor:
        table, x = ddim_row(times), x_T
        for i in range(len(times) - 1):
            x = dk.exp_step(x, [torch.tanh(x - mean) * (1 + times[i])], table, index=i)
        return x.square().sum()

    times = torch.linspace(1.0, 0.05, 6, dtype=torch.float64).requires_grad_()
    (grad,) = torch.autograd.grad(sample(times), times)
    step = 1e-6
    for i in range(6):
        shift = torch.zeros(6, dtype=torch.float64)
        shift[i] = step
        with torch.no_grad():
            slope = (sample(times + shift) - sample(times - shift)) / (2 * step)
        assert abs(grad[i] - slope) <= 1e-8 * max(1.0, abs(slope))


@pytest.mark.parametrize("kind", ["row", "rows", "indices"])
def test_torch_func_and_forward_mode(kind: str) -> None:
    c, index = coefficient_forms(torch.float64)[kind]
    x, a, b, noise = (t.detach() for t in inputs(torch.float64))

    def step(x: Tensor, c: Tensor) -> Tensor:
        return dk.exp_step(x, [a, b], c, noise=noise, index=index)

    rows = c if index is None else c[index]
    assert_close(
        torch.func.grad(lambda x: step(x, c).sum())(x),
        torch.autograd.functional.jacobian(lambda x: formula([x, a, b, noise], rows).sum(), x),
        FLOAT64,
    )
    tangents = (torch.randn_like(x), torch.randn_like(c))
    _, jvp = torch.func.jvp(step, (x, c), tangents)
    dc = tangents[1] if index is None else tangents[1][index]
    expected = formula([tangents[0]], rows[..., :1]) + formula([x, a, b, noise], dc)
    assert_close(jvp, expected, FLOAT64)
    batched = torch.func.vmap(step, in_dims=(0, None))(torch.stack([x, 2 * x]), c)
    assert_close(batched[1], step(2 * x, c), FLOAT64)
    with pytest.raises(NotImplementedError, match="reference"):
        torch.func.grad(lambda x: dk.exp_step(x, [a], [1.0, 2.0], backend="cpu").sum())(x)


def op_samples() -> dict[str, tuple]:
    x, a, b = torch.randn(3, B, 4, 5).unbind(0)
    row, table = [1.0, 0.5, -2.0], torch.randn(6, 3)
    f32 = torch.float32
    plain = (None, 0)
    return {
        "numbers": ([x, a, b], None, row, None, *plain, f32),
        "row": ([x, a, b], table[0], [], None, *plain, torch.bfloat16),
        "rows": ([x, a, b], table[:B], [], None, *plain, f32),
        "index": ([x, a, b], table, [], torch.tensor(4), *plain, f32),
        "indices": ([x, a, b], table.double(), [], torch.tensor([4, 0, 0]), *plain, f32),
        "ring": ([x, a, b], table[0], [], None, torch.tensor(1), 2, f32),
        "layouts": ([x.mT, a.mT.clone(), b[..., :1].expand_as(x).mT], None, row, None, *plain, f32),
        "mixed": ([x, a.bfloat16(), b.half()], table[:B], [], None, *plain, torch.float64),
        "empty": ([x[:0], a[:0]], table[:0, :2], [], None, *plain, f32),
        "batch_inside": ([x.permute(1, 2, 0)] * 2, torch.randn(4, 2), [], None, *plain, f32),
    }  # fmt: skip


@pytest.mark.parametrize("backend", STEP_BACKENDS)
@pytest.mark.parametrize("name", op_samples())
def test_opcheck(name: str, backend: str) -> None:
    tensors, *rest, out_dtype = op_samples()[name]
    torch.library.opcheck(OPS.exp_step.default, (tensors, *rest, out_dtype, backend))
    out = torch.empty_like(tensors[0])
    torch.library.opcheck(OPS.exp_step_.default, (out, tensors, *rest, backend))
    coefficients, values, index = rest[:3]
    split = index.ndim == 1 if index is not None else coefficients is not None
    split = split and coefficients.ndim == 2
    dtypes = [2, 1]  # places in _dense.DTYPES
    for kept, per_sample in ((tensors, split), ([], False)):
        args = (tensors[0], kept, coefficients, values, index, [0, 1], dtypes, per_sample, backend)
        torch.library.opcheck(OPS.exp_step_backward.default, args)


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("ring", [False, True])
def test_twenty_steps_are_one_graph(fresh_dynamo: None, ring: bool) -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend("aot_eager")
    table = torch.randn(20, 4, dtype=torch.float64) / 4

    def step(x: Tensor, history: Tensor, i: Tensor, head: Tensor | None) -> Tensor:
        entries = history if ring else list(history.unbind(0))
        return dk.exp_step(x, entries, table, index=i, head=head) * 0.5

    compiled = torch.compile(step, fullgraph=True, backend=counter)
    x, history = torch.randn(2, 3, 5), torch.randn(3, 2, 3, 5)
    for i in range(20):
        head = torch.tensor(i) if ring else None
        y = compiled(x, history, torch.tensor(i), head)
        assert torch.equal(y, step(x, history, torch.tensor(i), head))
        x = y
    assert counter.frame_count == 1 and counter.op_count > 0


def test_compile_with_gradients_and_in_place(fresh_dynamo: None) -> None:
    table = torch.randn(5, 3, requires_grad=True)

    def loss(x: Tensor, h: Tensor, i: Tensor) -> Tensor:
        return dk.exp_step(x, [h, x], table, index=i).square().sum()

    x, h, i = torch.randn(2, 3, requires_grad=True), torch.randn(2, 3), torch.tensor([1, 4])
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    grads = torch.autograd.grad(compiled(x, h, i), (x, table))
    for grad, expected in zip(grads, torch.autograd.grad(loss(x, h, i), (x, table)), strict=True):
        assert_close(grad, expected, STEP)

    def overwrite(x: Tensor, h: Tensor) -> Tensor:
        dk.exp_step(x, [h], [2.0, 1.0], inplace=True)
        return x + 1

    x = torch.randn(2, 3)
    expected = 2 * x + h
    y = torch.compile(overwrite, fullgraph=True)(x, h)
    assert_close(x, expected.double(), STEP)
    assert_close(y, expected.double() + 1, STEP)


def test_meta_tensors() -> None:
    x = torch.empty(3, 4, 5, device="meta")
    index = torch.empty(3, dtype=torch.int64, device="meta")
    table = torch.empty(10, 3, device="meta", dtype=torch.float64, requires_grad=True)
    y = dk.exp_step(x, [x, x.bfloat16()], table, index=index, out_dtype=torch.float16)
    assert y.device.type == "meta" and y.dtype == torch.float16 and y.shape == x.shape
    (grad,) = torch.autograd.grad(y.sum(), table)
    assert grad.shape == table.shape and grad.dtype == torch.float64


@pytest.mark.parametrize("backend", STEP_BACKENDS)
def test_autocast_changes_nothing(backend: str) -> None:
    x, h = torch.randn(2, 3, 5).unbind(0)
    y = dk.exp_step(x, [h], [0.3, 0.7], backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(dk.exp_step(x, [h], [0.3, 0.7], backend=backend), y)
