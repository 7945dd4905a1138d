"""Derivatives of `noised` and `denoising_loss` to any order, how many passes they take, and what
PyTorch asks of an op: opcheck, torch.compile, torch.func, autocast, meta tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import dsno_kernels as dk
from dsno_kernels.backends import cpu, reference
from dsno_kernels.ops import denoising as ops
from tests.helpers import FLOAT64, assert_close
from tests.test_denoising import (
    BACKENDS,
    SEEDS,
    SHAPE,
    edm,
    expanded,
    loss_formula,
    noised_formula,
)
from tests.test_exp_step import STEP

OPS = torch.ops.dsno_kernels
F32, F16, BF16, F64 = torch.float32, torch.float16, torch.bfloat16, torch.float64
# Upstream gradients: that of the mean, which is stored, and others, which scale it.
REDUCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda loss: loss.mean(),
    "sum": lambda loss: loss.sum(),
    "weighted": lambda loss: (loss * torch.arange(len(loss), device=loss.device)).sum(),
}
BUDGETS = {F32: STEP, F64: FLOAT64, BF16: 5e-3, F16: 1e-3}  # bfloat16 is rounded twice


def inputs(dtype: torch.dtype, shape: tuple[int, ...] = SHAPE) -> list[Tensor]:
    """output, images, noise."""
    return [torch.randn(shape).to(dtype) for _ in range(3)]


def coefficients() -> tuple[Tensor, ...]:
    sigma = torch.tensor([0.1, 1.0, 7.0], dtype=F64)
    return sigma, *edm(sigma).values()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("given", ["noise", "seeds"])
@pytest.mark.parametrize("dtype", BUDGETS, ids=str)
def test_gradient_by_the_output(
    dtype: torch.dtype, given: str, reduction: str, backend: str
) -> None:
    name = None if backend == "cpu" and dtype == F64 else backend
    output, x, noise = inputs(dtype)
    output.requires_grad_()
    options: dict[str, Any] = {"noise": noise}
    if given == "seeds":
        noise = dk.noised(torch.zeros_like(x, dtype=F64 if dtype == F64 else F32), 1.0, seeds=SEEDS)
        options = {"seeds": SEEDS}
    loss = dk.denoising_loss(output, x, *coefficients(), **options, ceiling=4.0, backend=name)
    exact = output.detach().double().requires_grad_()
    *rest, weight = coefficients()
    right = loss_formula(exact, x, *rest, weight.clamp(max=4.0), noise)
    (expected,) = torch.autograd.grad(REDUCTIONS[reduction](right), exact)
    for again in (True, True, False):  # the stored gradient is used up by the first
        (grad,) = torch.autograd.grad(REDUCTIONS[reduction](loss), output, retain_graph=again)
        assert grad.dtype == dtype
        assert_close(grad, expected, BUDGETS[dtype])


@pytest.mark.parametrize("backend", BACKENDS)
def test_float16_keeps_a_gradient_that_a_loss_scale_rescues(backend: str) -> None:
    """Each number of it is below 6e-8, float16's smallest, until the scale of 2^24 comes in."""
    output, x, noise = inputs(F16, (3, 3, 32, 32))
    output.requires_grad_()
    weight = torch.full((3,), 1e-4)
    loss = dk.denoising_loss(output, x, 1.0, 0.5, 0.5, weight, noise=noise, backend=backend)
    (grad,) = torch.autograd.grad(loss.mean() * 2.0**24, output)
    exact = output.detach().double().requires_grad_()
    right = loss_formula(exact, x, 1.0, 0.5, 0.5, weight, noise).mean() * 2.0**24
    (expected,) = torch.autograd.grad(right, exact)
    assert expected.abs().max() * 2.0**-24 < 2.0**-24
    assert_close(grad, expected, BUDGETS[F16])


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_backward_of_a_mean_has_nothing_left_to_do(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forward and backward are one pass; any other upstream gradient scales its result in place."""
    passes: list[str] = []
    module = {"cpu": cpu, "reference": reference}[backend]
    for place, name in (
        (module, "denoising_loss"),
        (module, "denoising_scale_"),
        (ops, "differentiable_exp_step"),
    ):
        original = getattr(place, name)

        def counted(*args: Any, name: str = name, original: Any = original, **kwargs: Any) -> Any:
            passes.append(name)
            return original(*args, **kwargs)

        monkeypatch.setattr(place, name, counted)
    output, x, _ = inputs(F32)
    output.requires_grad_()

    def run(reduction: str, upstream: Callable[[Tensor], Tensor]) -> list[str]:
        passes.clear()
        loss = dk.denoising_loss(
            output, x, *coefficients(), seeds=SEEDS, reduction=reduction, backend=backend
        )
        upstream(loss).backward()
        return list(passes)

    assert run("none", REDUCTIONS["mean"]) == ["denoising_loss"]
    assert run("none", REDUCTIONS["sum"]) == ["denoising_loss", "denoising_scale_"]
    assert run("mean", lambda loss: loss) == ["denoising_loss"]
    assert run("mean", lambda loss: 3 * loss) == ["denoising_loss", "denoising_scale_"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("factor", [1.0, -2.5])
@pytest.mark.parametrize("dtype", BUDGETS, ids=str)
def test_the_reduction_to_the_mean(dtype: torch.dtype, factor: float, backend: str) -> None:
    """The mean of the losses, and its gradient, asked for twice."""
    name = None if backend == "cpu" and dtype == F64 else backend
    output, x, noise = inputs(dtype)
    output.requires_grad_()
    exact = output.detach().double().requires_grad_()
    right = loss_formula(exact, x, *coefficients(), noise).mean()
    (expected,) = torch.autograd.grad(factor * right, exact)
    loss = dk.denoising_loss(
        output, x, *coefficients(), noise=noise, reduction="mean", backend=name
    )
    assert loss.shape == () and loss.dtype == (F64 if dtype == F64 else F32)
    assert_close(loss, right, FLOAT64 if dtype == F64 else STEP)
    for again in (True, False):
        (grad,) = torch.autograd.grad(factor * loss, output, retain_graph=again)
        assert grad.dtype == dtype
        assert_close(grad, expected, BUDGETS[dtype])
    with torch.no_grad():
        again = dk.denoising_loss(
            output, x, *coefficients(), noise=noise, reduction="mean", backend=name
        )
    assert torch.equal(again, loss)


def test_without_a_gradient_none_is_written() -> None:
    output, x, noise = inputs(F32)
    args = (output, x, noise, None, list(coefficients()), [0.0] * 4, 5.0)
    assert OPS.denoising_loss(*args, False, False, "")[1].numel() == 0
    assert OPS.denoising_loss(*args, True, False, "")[1].shape == SHAPE
    assert not dk.denoising_loss(output, x, *coefficients(), noise=noise).requires_grad


@pytest.mark.parametrize("given", ["noise", "seeds"])
def test_gradcheck_and_gradgradcheck(given: str) -> None:
    output, x, noise = (t.requires_grad_() for t in inputs(F64, (3, 2)))
    four = [torch.rand(3, dtype=F64).requires_grad_() for _ in range(4)]
    options: dict[str, Any] = {"seeds": SEEDS} if given == "seeds" else {}

    def input_of(x: Tensor, level: Tensor, scale: Tensor, noise: Tensor) -> Tensor:
        return dk.noised(x, level, scale, **(options or {"noise": noise}))

    def loss_of(output: Tensor, x: Tensor, noise: Tensor, *four: Tensor) -> Tensor:
        given = options or {"noise": noise}
        return dk.denoising_loss(output, x, *four, **given, ceiling=0.7)

    def mean_of(*args: Tensor) -> Tensor:
        output, x, noise, *four = args
        given = options or {"noise": noise}
        return dk.denoising_loss(output, x, *four, **given, ceiling=0.7, reduction="mean")

    rest = [t.detach() for t in (x, noise, *four)]
    for function, leaves in (
        (input_of, (x, *four[:2], noise)),
        (loss_of, (output, x, noise, *four)),
        (mean_of, (output, x, noise, *four)),
        # By the output alone: the pass that writes its own gradient.
        (lambda output: loss_of(output, *rest), (output,)),
        (lambda output: mean_of(output, *rest), (output,)),
    ):
        leaves = tuple(leaf for leaf in leaves if leaf is not noise or given == "noise")
        called = function if given == "noise" else _without_noise(function, noise, leaves)
        assert torch.autograd.gradcheck(called, leaves)
        assert torch.autograd.gradgradcheck(called, leaves)


def _without_noise(
    function: Callable[..., Tensor], noise: Tensor, leaves: tuple[Tensor, ...]
) -> Callable[..., Tensor]:
    """The function of its leaves but the noise, which is drawn."""
    place = {4: None, 3: 3, 6: 2, 1: None}[len(leaves)]
    if place is None:
        return function

    def called(*given: Tensor) -> Tensor:
        return function(*given[:place], noise, *given[place:])

    return called


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_gradient_on_the_kernels(backend: str) -> None:
    """In float32, of first and second order, against float64."""
    leaves = [*inputs(F32), *(torch.rand(3) + 0.5 for _ in range(4))]

    def second(dtype: torch.dtype) -> tuple[Tensor, ...]:
        copies = [leaf.to(dtype).requires_grad_() for leaf in leaves]
        output, x, noise, *four = copies
        name = backend if dtype == F32 else None
        y = dk.noised(x, *four[:2], noise=noise, backend=name)
        loss = dk.denoising_loss(output, x, *four, noise=noise, backend=name)
        total = loss.square().sum() + y.square().mean()
        first = torch.autograd.grad(total, copies, create_graph=True)
        return *first, *torch.autograd.grad(sum(g.square().sum() for g in first), copies)

    for grad, expected in zip(second(F32), second(F64), strict=True):
        assert_close(grad, expected, 20 * STEP)


@pytest.mark.parametrize("given", ["noise", "seeds"])
def test_torch_func_and_forward_mode(given: str) -> None:
    output, x, noise = inputs(F64)
    four = coefficients()
    seeds = torch.tensor(SEEDS)
    if given == "seeds":
        noise = dk.noised(torch.zeros_like(x), 1.0, seeds=seeds)
    options: dict[str, Any] = {"noise": noise} if given == "noise" else {"seeds": seeds}

    def total(output: Tensor) -> Tensor:
        return dk.denoising_loss(output, x, *four, **options).sum()

    def exact(output: Tensor) -> Tensor:
        return loss_formula(output, x, *four, noise=noise).sum()

    gradient = torch.func.grad(exact)(output)
    assert_close(torch.func.grad(total)(output), gradient, FLOAT64)
    tangent = torch.randn_like(output)
    _, slope = torch.func.jvp(total, (output,), (tangent,))
    assert_close(slope, (gradient * tangent).sum(), FLOAT64)
    batched = torch.func.vmap(total)(torch.stack([output, 2 * output]))
    assert_close(batched[1], exact(2 * output), FLOAT64)
    mean = torch.func.grad(lambda o: dk.denoising_loss(o, x, *four, **options, reduction="mean"))
    assert_close(mean(output), gradient / 3, FLOAT64)
    rows = torch.func.jacrev(lambda o: dk.denoising_loss(o, x, *four, **options))(output)
    assert_close(rows.sum(0), gradient, FLOAT64)
    y = torch.func.vmap(lambda x: dk.noised(x, four[0], **options))(x[None])[0]
    assert_close(y, noised_formula(x, four[0], 1.0, noise), FLOAT64)
    with pytest.raises(NotImplementedError, match="reference"):
        torch.func.grad(lambda o: dk.denoising_loss(o, x, *four, **options, backend="cpu").sum())(x)


def op_samples() -> dict[str, tuple[Any, ...]]:
    x, noise = torch.randn(2, *SHAPE).unbind(0)
    seeds, sigma = torch.tensor(SEEDS), torch.rand(3)
    last, inside = x.contiguous(memory_format=torch.channels_last), x.permute(1, 0, 2, 3)
    return {
        "noise": (x, noise, None, [sigma, None], [0.0, 2.0]),
        "seeds": (x, None, seeds, [sigma.double(), sigma[0]], [0.0, 0.0]),
        "layouts": (last, x, None, [None, None], [1.0, 2.0]),
        "layouts_seeds": (last, None, seeds, [None, sigma], [1.0, 0.0]),
        "batch_inside": (inside, inside.flip(0), None, [None] * 2, [1.0] * 2),
        "mixed": (x.half(), noise.bfloat16(), None, [None, None], [1.0, 2.0]),
        "empty": (x[:0], noise[:0], None, [sigma[:0], None], [0.0, 2.0]),
    }  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", op_samples())
def test_opcheck(name: str, backend: str) -> None:
    x, noise, seeds, tensors, values = op_samples()[name]
    for dtype in (F32, BF16):
        args = (x, noise, seeds, tensors, values, dtype, backend)
        torch.library.opcheck(OPS.noised.default, args)
    output = torch.randn(x.shape).to(x.dtype)
    for wanted in (False, True):
        mean = not wanted and x.numel() > 0  # a NaN is not equal to itself
        args = (output, x, noise, seeds, tensors * 2, values * 2, 5.0, wanted, mean, backend)
        torch.library.opcheck(OPS.denoising_loss.default, args)
    for g in (torch.rand(len(x)), torch.tensor(2.0), torch.tensor(1.0)):
        torch.library.opcheck(OPS.denoising_scale_.default, (torch.randn(x.shape), g, backend))


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("reduction", ["mean", "weighted", "in the op"])
@pytest.mark.parametrize("dtype", [F32, F16], ids=str)
def test_compile_is_one_graph(fresh_dynamo: None, dtype: torch.dtype, reduction: str) -> None:
    """A whole training step; the level stands in three places."""
    weight = torch.randn(2, 2)
    x, seeds, sigma = torch.randn(SHAPE), torch.tensor(SEEDS), torch.rand(3)

    def step(w: Tensor, x: Tensor, seeds: Tensor, sigma: Tensor) -> Tensor:
        y = dk.noised(x, sigma, sigma, seeds=seeds)
        output = torch.einsum("oi,bihw->bohw", w, y).to(dtype)
        options: dict[str, Any] = {"seeds": seeds, "ceiling": 1.5}
        if reduction == "in the op":
            return dk.denoising_loss(output, x, sigma, 1.0, sigma, 2.0, **options, reduction="mean")
        return REDUCTIONS[reduction](
            dk.denoising_loss(output, x, sigma, 1.0, sigma, 2.0, **options)
        )

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    found = []
    for function in (step, compiled):
        leaf = weight.clone().requires_grad_()
        value = function(leaf, x, seeds, sigma)
        found.append((value, *torch.autograd.grad(value, leaf)))
    for actual, expected in zip(found[1], found[0], strict=True):
        assert_close(actual, expected.double(), STEP if dtype == F32 else BUDGETS[F16])


@pytest.mark.parametrize("reentrant", [False, True])
def test_under_a_checkpoint(reentrant: bool) -> None:
    output, x, _ = inputs(F32)
    output.requires_grad_()

    def loss(output: Tensor) -> Tensor:
        return dk.denoising_loss(output.tanh(), x, *coefficients(), seeds=SEEDS).sum()

    (expected,) = torch.autograd.grad(loss(output), output)
    checkpoint(loss, output, use_reentrant=reentrant).backward()
    assert torch.equal(output.grad, expected)


def test_an_output_that_serves_twice() -> None:
    """Gradients add up: the stored one is not what autograd adds to."""
    output, x, noise = inputs(F32)
    output.requires_grad_()

    def total(output: Tensor) -> Tensor:
        losses = [dk.denoising_loss(output, x, *coefficients(), noise=n) for n in (noise, -noise)]
        return losses[0].mean() + 3 * losses[1].mean() + output.square().mean()

    exact = output.detach().double().requires_grad_()
    right = [loss_formula(exact, x, *coefficients(), noise=n).mean() for n in (noise, -noise)]
    (expected,) = torch.autograd.grad(right[0] + 3 * right[1] + exact.square().mean(), exact)
    value = total(output)
    for _ in range(2):
        (grad,) = torch.autograd.grad(value, output, retain_graph=True)
        assert_close(grad, expected, STEP)


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_changes_nothing(backend: str) -> None:
    output, x, noise = inputs(F32)
    output.requires_grad_()

    def run() -> list[Tensor]:
        y = dk.noised(x, *coefficients()[:2], noise=noise, backend=backend)
        loss = dk.denoising_loss(output, x, *coefficients(), noise=noise, backend=backend)
        return [y, loss, *torch.autograd.grad(loss.mean(), output)]

    expected = run()
    with torch.autocast("cpu", BF16):
        found = run()
    for actual, right in zip(found, expected, strict=True):
        assert actual.dtype == right.dtype and torch.equal(actual, right)


def test_meta_tensors() -> None:
    x = torch.empty(SHAPE, device="meta")
    output = torch.empty(SHAPE, device="meta", dtype=BF16, requires_grad=True)
    seeds = torch.empty(3, dtype=torch.int64, device="meta")
    y = dk.noised(x, 1.0, torch.ones(3, device="meta"), seeds=seeds, out_dtype=F16)
    assert y.device.type == "meta" and y.dtype == F16 and y.shape == SHAPE
    loss = dk.denoising_loss(output, x, 1.0, 1.0, 1.0, 1.0, seeds=seeds)
    assert loss.dtype == F32 and loss.shape == SHAPE[:1]
    (grad,) = torch.autograd.grad(loss.sum(), output)
    assert grad.shape == SHAPE and grad.dtype == BF16


def test_level_gradients_are_those_of_the_formula() -> None:
    """What a learned noise distribution needs: through both functions with drawn noise."""
    x = torch.randn(SHAPE, dtype=F64)
    noise = dk.noised(torch.zeros_like(x), 1.0, seeds=SEEDS)
    sigma = torch.tensor([0.2, 1.0, 3.0], dtype=F64, requires_grad=True)
    c = edm(sigma)
    y = dk.noised(x, sigma, seeds=SEEDS)
    loss = dk.denoising_loss(y.tanh(), x, sigma, **c, seeds=SEEDS).sum()
    noisy = x + expanded(sigma, x) * noise
    denoised = expanded(c["c_skip"], x) * noisy
    denoised = denoised + expanded(c["c_out"], x) * noisy.tanh()
    exact = (c["weight"] * (denoised - x).square().flatten(1).mean(1)).sum()
    assert_close(loss, exact, FLOAT64)
    pair = [torch.autograd.grad(value, sigma, retain_graph=True)[0] for value in (loss, exact)]
    assert_close(pair[0], pair[1], FLOAT64)
