"""`noised` and `denoising_loss` against their formulas in float64: values, noise, layouts, dtypes,
memory, and every refusal. Derivatives are in test_denoising_autograd.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import dsno_kernels as dk
from dsno_kernels import backends
from dsno_kernels.backends import cpu, reference_steps
from tests.helpers import FLOAT64, IO_BUDGET, assert_close
from tests.strategies import tensor
from tests.test_exp_step import STEP, isa  # noqa: F401

BACKENDS = ("cpu", "reference")
F32, F16, BF16, F64 = torch.float32, torch.float16, torch.bfloat16, torch.float64
SHAPE = (3, 2, 5, 7)
SEEDS = [5, -(2**63), 2**62 + 11]
# Of log, sqrt, cos and sin of float32 numbers, as in tests/test_step_noise.py.
NOISE = 2e-6


def expanded(value: float | Tensor, like: Tensor) -> Tensor:
    """A number a sample, in float64, over the axes of a sample."""
    value = torch.as_tensor(value, dtype=F64)
    return value.reshape(-1, *[1] * (like.ndim - 1)) if value.ndim else value


def noised_formula(x: Tensor, level: Any, scale: Any, noise: Tensor) -> Tensor:
    return expanded(scale, x) * (x.double() + expanded(level, x) * noise.double())


def loss_formula(
    output: Tensor, x: Tensor, level: Any, c_skip: Any, c_out: Any, weight: Any, noise: Tensor
) -> Tensor:
    """Every step as EDM's code takes it, in float64."""
    noisy = x.double() + expanded(level, x) * noise.double()
    denoised = expanded(c_skip, x) * noisy + expanded(c_out, x) * output.double()
    squares = (denoised - x.double()).square().reshape(len(x), -1)
    return torch.as_tensor(weight, dtype=F64) * squares.mean(1)


def definition(seeds: list[int], shape: tuple[int, ...]) -> Tensor:
    """The noise of each sample, by itself, float64."""
    count = math.prod(shape[1:])
    drawn = [reference_steps.normal_noise(torch.tensor([seed, 0]), count) for seed in seeds]
    return torch.stack(drawn).reshape(shape)


def edm(sigma: Tensor, data: float = 0.5) -> dict[str, Tensor]:
    """EDM's preconditioner and weight, in the dtype of sigma."""
    total = sigma.square() + data**2
    return {
        "c_skip": data**2 / total,
        "c_out": sigma * data / total.sqrt(),
        "weight": total / (sigma * data).square(),
    }


def serving(backend: str, dtype: torch.dtype) -> str | None:
    """The backend or, where its arithmetic has no such dtype, the choice of the library."""
    return None if backend == "cpu" and dtype == F64 else backend


FORMS = ["number", "scalar", "samples", "float64", "negated"]


@st.composite
def calls(draw: st.DrawFn) -> dict[str, Any]:
    ndim = draw(st.integers(1, 4))
    shape = tuple(draw(st.sampled_from([1, 2, 3, 5, 17])) for _ in range(ndim))
    dtypes = st.sampled_from([F32, F32, BF16, F16, F64])
    memory = st.sampled_from(["contiguous", "permuted", "sliced", "offset", "expanded"])
    orders = st.permutations(range(ndim)).map(tuple)
    return {
        "shape": shape,
        "kinds": [(draw(dtypes), draw(memory), draw(orders)) for _ in range(3)],
        "forms": [draw(st.sampled_from(FORMS)) for _ in range(4)],
        "seeds": draw(st.booleans()),
        "out_dtype": draw(st.one_of(st.none(), dtypes)),
        "ceiling": draw(st.sampled_from([None, 0.5])),
        "backend": draw(st.sampled_from([None, "reference"])),
        "seed": draw(st.integers(0, 2**31)),
    }


def coefficient(form: str, B: int) -> float | Tensor:
    if form == "number":
        return float(torch.rand(()) + 0.1)
    if form == "negated":  # memory that holds the opposite
        return torch.complex(torch.zeros(B), -torch.rand(B) - 0.1).conj().imag
    shape = () if form == "scalar" else (B,)
    return torch.rand(shape, dtype=F64 if form == "float64" else F32) + 0.1


@settings(max_examples=150, deadline=None)
@given(calls())
def test_drawn_calls_agree_with_float64(call: dict[str, Any]) -> None:
    torch.manual_seed(call["seed"])
    shape, backend = call["shape"], call["backend"]
    x, output, noise = (tensor(shape, *kind) for kind in call["kinds"])
    level, c_skip, c_out, weight = (coefficient(form, shape[0]) for form in call["forms"])
    given: dict[str, Any] = {"noise": noise}
    if call["seeds"]:
        seeds = torch.randint(-(2**63), 2**63 - 1, shape[:1])
        given, noise = {"seeds": seeds}, definition(seeds.tolist(), shape)
    y = dk.noised(x, level, c_skip, **given, out_dtype=call["out_dtype"], backend=backend)
    exact = noised_formula(x, level, c_skip, noise)
    dtype = call["out_dtype"] or x.dtype
    assert y.dtype == dtype and y.shape == shape
    low = torch.finfo(dtype).eps > 1e-6
    size = noised_formula(x, 0.0, c_skip, noise).norm() + (exact - x.double()).norm()
    assert (y.double() - exact).norm() <= (IO_BUDGET if low else NOISE) * size
    ceiling = call["ceiling"]
    loss = dk.denoising_loss(
        output, x, level, c_skip, c_out, weight, **given, ceiling=ceiling, backend=backend
    )
    wide = F64 in {x.dtype, output.dtype, *([] if call["seeds"] else [noise.dtype])}
    assert loss.dtype == (F64 if wide else F32) and loss.shape == shape[:1]
    bounded = torch.as_tensor(weight, dtype=F64).clamp(max=ceiling or math.inf)
    exact = loss_formula(output, x, level, c_skip, c_out, bounded, noise)
    # Terms cancel within an element; against the squares of their sizes.
    size = loss_formula(output, 0 * x, level, c_skip, c_out, bounded, noise) + exact + 1
    assert ((loss.double() - exact).abs() <= 10 * NOISE * size).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("given", ["noise", "seeds"])
@pytest.mark.parametrize("dtype", [F32, BF16, F16, F64], ids=str)
def test_edm(dtype: torch.dtype, given: str, backend: str) -> None:
    """The preconditioner of EDM over its range of noise levels."""
    shape, seeds = (6, 3, 32, 32), list(range(6))
    x, output = (torch.randn(shape).to(dtype) for _ in range(2))
    noise = torch.randn(shape).to(dtype) if given == "noise" else definition(seeds, shape)
    options: dict[str, Any] = {"noise": noise} if given == "noise" else {"seeds": seeds}
    options["backend"] = serving(backend, dtype)
    sigma = torch.tensor([0.002, 0.05, 0.5, 1.0, 10.0, 80.0], dtype=F64)
    scale = (sigma.square() + 0.25).rsqrt()
    y = dk.noised(x, sigma, scale, **options)
    assert_close(y, noised_formula(x, sigma, scale, noise), FLOAT64 if dtype == F64 else IO_BUDGET)
    c = edm(sigma)
    loss = dk.denoising_loss(output, x, sigma, **c, **options)
    exact = loss_formula(output, x, sigma, **c, noise=noise)
    assert ((loss.double() / exact - 1).abs() <= (FLOAT64 if dtype == F64 else STEP)).all()
    bounded = dk.denoising_loss(output, x, sigma, **c, ceiling=5.0, **options)
    assert_close(bounded, exact * c["weight"].clamp(max=5) / c["weight"], STEP)


@pytest.mark.parametrize("given", ["noise", "seeds"])
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_every_instruction_set(isa: str, dtype: torch.dtype, given: str) -> None:  # noqa: F811
    test_edm(dtype, given, "cpu")
    for size in (17, 1031, 8205):
        x, output, noise = (torch.randn(2, size).to(dtype) for _ in range(3))
        options: dict[str, Any] = {"noise": noise} if given == "noise" else {"seeds": [1, 2]}
        noise = noise if given == "noise" else definition([1, 2], (2, size))
        output.requires_grad_()
        loss = dk.denoising_loss(output, x, 0.3, 0.9, 0.8, 2.0, **options, backend="cpu")
        exact = output.detach().double().requires_grad_()
        right = loss_formula(exact, x, 0.3, 0.9, 0.8, 2.0, noise)
        assert_close(loss, right, STEP)
        (grad,) = torch.autograd.grad(loss.mean(), output)
        (expected,) = torch.autograd.grad(right.mean(), exact)
        assert_close(grad, expected, STEP if dtype == F32 else IO_BUDGET)


def test_large_results_are_streamed_right(isa: str) -> None:  # noqa: F811
    """Past the size from which they are written around the caches."""
    x, output, noise = torch.randn(3, 2, 3, 512, 512).unbind(0)
    assert 4 * x.numel() > 4 << 20
    output.requires_grad_()
    y = dk.noised(x, 1.5, 0.5, noise=noise, backend="cpu")
    assert_close(y, noised_formula(x, 1.5, 0.5, noise), STEP)
    loss = dk.denoising_loss(output, x, 1.5, 1.0, -1.5, 1.0, noise=noise, backend="cpu")
    (grad,) = torch.autograd.grad(loss.mean(), output)
    assert_close(grad, (-1.5 * 2 / x.numel()) * (1.5 * (noise - output)).double(), STEP)


@pytest.mark.parametrize("backend", BACKENDS)
def test_small_noise_levels_lose_nothing(backend: str) -> None:
    """At sigma = 1e-4, c_skip is 1 - 4e-8: the difference is formed before it is rounded."""
    x, output = torch.randn(2, *SHAPE).unbind(0)
    sigma = torch.full((3,), 1e-4, dtype=F64)
    c, noise = edm(sigma), torch.zeros(SHAPE)
    c["c_out"] = torch.zeros(3)
    loss = dk.denoising_loss(output, x, sigma, **c, noise=noise, backend=backend)
    assert_close(loss, loss_formula(output, x, sigma, **c, noise=noise), STEP)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [1, 2, 3, 8, 35, 511, 513, 8193, 20001])
def test_noise_is_that_of_the_definition(size: int, backend: str) -> None:
    """At every place in a block of four, and over the seams of blocks and of tasks."""
    drawn = dk.noised(torch.zeros(3, size), 1.0, seeds=SEEDS, backend=backend)
    assert (drawn.double() - definition(SEEDS, (3, size))).abs().max() <= NOISE


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 3, 1), (1, 2, 3, 0), (2, 0, 3, 1)])
def test_noise_depends_on_the_seed_alone(order: tuple[int, ...], backend: str) -> None:
    """Not on strides, on the other samples, or on the function that makes it, to the bit."""
    x = tensor(SHAPE, F32, "permuted", order)
    seeds = torch.tensor(SEEDS)
    y = dk.noised(x, 1.5, 0.5, seeds=seeds, backend=backend)
    assert y.stride() == (x.stride() if order[0] == 0 else torch.empty(SHAPE).stride())
    alone = [dk.noised(x[b : b + 1], 1.5, 0.5, seeds=[SEEDS[b]], backend=backend) for b in range(3)]
    assert torch.equal(torch.cat(alone), y)
    swapped = dk.noised(x.flip(0), 1.5, 0.5, seeds=seeds.flip(0), backend=backend)
    assert torch.equal(swapped.flip(0), y)
    noise = dk.noised(torch.zeros(SHAPE), 1.0, seeds=seeds, backend=backend)
    output = tensor(SHAPE, F32, "permuted", order[::-1])
    coefficients = (torch.rand(3), 0.9, torch.rand(3), torch.rand(3))
    losses = [
        dk.denoising_loss(output, x.contiguous(), *coefficients, **given, backend=backend)
        for given in ({"noise": noise}, {"seeds": seeds})
    ]
    assert torch.equal(*losses)
    strided = torch.stack([seeds, seeds + 1], 1)[:, 0]
    assert torch.equal(dk.noised(x, 1.5, 0.5, seeds=strided, backend=backend), y)


@pytest.mark.parametrize("backend", BACKENDS)
def test_noise_of_a_kind(backend: str) -> None:
    """Mean, variance and the correlation of neighboring seeds of 3e5 numbers, within five standard
    errors.
    """
    n = 300_000
    first, second = dk.noised(torch.zeros(2, n), 1.0, seeds=[1, 2], backend=backend).double()
    error = 1 / math.sqrt(n)
    for values, expected, size in [
        (first, 0, 1),
        (first.square(), 1, math.sqrt(2)),
        (first * second, 0, 1),
        (first[1:] * first[:-1], 0, 1),
    ]:
        assert abs(values.mean() - expected) <= 5 * size * error


@pytest.mark.parametrize("backend", BACKENDS)
def test_threads_and_runs_do_not_change_bits(backend: str) -> None:
    x, output = torch.randn(2, 3, 5, 130, 131).unbind(0)
    output.requires_grad_()
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 1):
            torch.set_num_threads(threads)
            y = dk.noised(x, 2.0, seeds=SEEDS, backend=backend)
            loss = dk.denoising_loss(output, x, 2.0, 0.5, 0.8, 1.3, seeds=SEEDS, backend=backend)
            results.append((y, loss, *torch.autograd.grad(loss.mean(), output)))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        for found, first in zip(result, results[0], strict=True):
            assert torch.equal(found, first)


@pytest.mark.parametrize("backend", BACKENDS)
def test_long_sums_lose_nothing(backend: str) -> None:
    """2^21 equal squares: a float32 sum in one chain would be off by far more."""
    output = torch.full((1, 1 << 21), 1.1)
    zeros = torch.zeros_like(output)
    loss = dk.denoising_loss(output, zeros, 0.0, 0.0, 1.0, 1.0, noise=zeros, backend=backend)
    assert_close(loss, output[:, 0].double().square(), 1e-7)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_zero_hides_what_it_multiplies(backend: str) -> None:
    x, noise = torch.randn(2, *SHAPE).unbind(0)
    bad = torch.full(SHAPE, math.nan)
    levels = torch.tensor([0.0, 1.0, 0.0])
    y = dk.noised(x, levels, noise=bad, backend=backend)
    assert torch.equal(y[::2], x[::2]) and y[1].isnan().all()
    given: dict[str, Any] = {"noise": noise, "backend": backend}
    assert dk.noised(bad, 1.0, 0.0, **given).eq(0).all()
    skips_all = dk.denoising_loss(bad, x, 1.0, 0.5, 0.0, 1.0, **given)
    assert skips_all.isfinite().all()
    assert dk.denoising_loss(x, bad, 1.0, 1.0, 1.0, 1.0, **given).isfinite().all()
    assert dk.denoising_loss(bad, x, 1.0, 1.0, 1.0, 1.0, **given).isnan().all()
    output = torch.cat([bad[:1], x[1:]]).requires_grad_()
    loss = dk.denoising_loss(output, x, 1.0, 0.5, 1.0, 1.0, **given)
    (grad,) = torch.autograd.grad(loss[1:].sum(), output)  # the upstream gradient of the first is 0
    assert grad[0].eq(0).all() and grad[1:].isfinite().all()
    nan = torch.tensor([1.0, math.nan, 1.0])  # a weight that is NaN stays NaN under a ceiling
    loss = dk.denoising_loss(x, x, 1.0, 1.0, 1.0, nan, ceiling=0.5, **given)
    assert loss.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("backend", BACKENDS)
def test_inputs_stay_as_they_are(backend: str) -> None:
    given = [torch.randn(SHAPE) for _ in range(3)] + [torch.rand(3) for _ in range(4)]
    given[0].requires_grad_()
    before = [t.detach().clone() for t in given]
    output, x, noise, *coefficients = given
    dk.noised(x, coefficients[0], noise=noise, backend=backend)
    loss = dk.denoising_loss(output, x, *coefficients, noise=noise, backend=backend)
    (loss * torch.tensor([1.0, 2.0, 3.0])).sum().backward()
    for t, value in zip(given, before, strict=True):
        assert torch.equal(t, value)


@pytest.mark.parametrize("given", ["noise", "seeds"])
@pytest.mark.parametrize("shape", [(0, 3, 5), (0,), (3, 0), (2, 0, 5)], ids=str)
def test_empty(shape: tuple[int, ...], given: str) -> None:
    x, output = torch.zeros(shape), torch.zeros(shape, requires_grad=True)
    options: dict[str, Any] = {"noise": x} if given == "noise" else {"seeds": [1] * shape[0]}
    assert dk.noised(x, torch.ones(shape[0]), **options).shape == shape
    loss = dk.denoising_loss(output, x, 1.0, 1.0, 1.0, torch.ones(shape[0]), **options)
    assert loss.shape == shape[:1] and loss.isnan().all()
    mean = dk.denoising_loss(output, x, 1.0, 1.0, 1.0, 1.0, **options, reduction="mean")
    assert mean.shape == () and mean.isnan()
    assert torch.autograd.grad(2 * mean, output)[0].shape == shape
    for weights in (torch.full(shape[:1], 1 / 3), torch.ones(shape[:1])):
        (grad,) = torch.autograd.grad((loss * weights).sum(), output, retain_graph=True)
        assert grad.shape == shape


def test_samples_of_one_number() -> None:
    x, output, noise = torch.randn(3, 5).unbind(0)
    sigma = torch.rand(5)
    loss = dk.denoising_loss(output, x, sigma, **edm(sigma), noise=noise)
    assert_close(loss, loss_formula(output, x, sigma, **edm(sigma), noise=noise), STEP)


X, N = torch.zeros(2, 3), torch.zeros(2, 3)


def loss(output: Any = X, images: Any = X, *rest: Any, **options: Any) -> Tensor:
    rest = (*rest, *(1.0, 1.0, 1.0, 1.0)[len(rest) :])
    return dk.denoising_loss(output, images, *rest, **({"noise": N} | options))


@pytest.mark.parametrize(
    ("kind", "message", "call"),
    [
        (TypeError, "images must be a torch.Tensor", lambda: dk.noised([1.0], 1, noise=N)),
        (TypeError, "images must be real", lambda: dk.noised(X.long(), 1, noise=N)),
        (ValueError, "batch axis", lambda: dk.noised(X.sum(), 1, noise=N)),
        (ValueError, "exactly one of noise and seeds, got neither", lambda: dk.noised(X, 1)),
        (ValueError, "got both", lambda: dk.noised(X, 1, noise=N, seeds=[1, 2])),
        (ValueError, r"noise must have the shape of images, \(2, 3\)", lambda: loss(noise=N.mT)),
        (ValueError, "noise must have the shape", lambda: dk.noised(X, 1, noise=N[0])),
        (TypeError, "noise must be real", lambda: dk.noised(X, 1, noise=N.int())),
        (ValueError, "output must have the shape", lambda: loss(X[:, :2])),
        (TypeError, "output must be a torch.Tensor", lambda: loss(1.0)),
        (TypeError, "seeds must be a torch.int64 tensor", lambda: dk.noised(X, 1, seeds=3)),
        (TypeError, "seeds must be torch.int64", lambda: dk.noised(X, 1, seeds=torch.ones(2))),
        (TypeError, "each of seeds must be an integer", lambda: dk.noised(X, 1, seeds=[1, 0.5])),
        (ValueError, r"between -2\^63 and", lambda: dk.noised(X, 1, seeds=[1, 2**63])),
        (ValueError, r"shape \(2,\), one for each sample", lambda: dk.noised(X, 1, seeds=[1])),
        (TypeError, "level must be numbers or one tensor", lambda: dk.noised(X, "1", noise=N)),
        (ValueError, "scale must be finite", lambda: dk.noised(X, 1, math.nan, noise=N)),
        (ValueError, r"level must be a number.*\(2,\)", lambda: dk.noised(X, X, noise=N)),
        (ValueError, "c_skip must be a number", lambda: loss(X, X, 1, torch.ones(3))),
        (TypeError, "weight must be real", lambda: loss(X, X, 1, 1, 1, torch.ones(2).int())),
        (ValueError, "one device", lambda: loss(X, X, torch.ones(2, device="meta"))),
        (ValueError, "one device", lambda: loss(X.to("meta"))),
        (ValueError, "ceiling must be greater than 0", lambda: loss(ceiling=0)),
        (ValueError, "ceiling must be greater than 0", lambda: loss(ceiling=math.nan)),
        (TypeError, "ceiling must be a number or None", lambda: loss(ceiling=X)),
        (ValueError, "reduction must be 'none' or 'mean', got", lambda: loss(reduction="sum")),
        (TypeError, "out_dtype must be one of", lambda: dk.noised(X, 1, noise=N, out_dtype=int)),
        (ValueError, "unknown backend", lambda: loss(backend="fortran")),
        (NotImplementedError, "not have denoising_loss", lambda: loss(backend="triton")),
    ],
)  # fmt: skip
def test_refusals(kind: type[Exception], message: str, call: Callable[[], Any]) -> None:
    with pytest.raises(kind, match=message):
        call()


def plant(monkeypatch: pytest.MonkeyPatch, **change: Callable[[Any], Any]) -> None:
    """A defect: an argument of the backend's function changed on the way."""
    run = cpu.denoising_loss

    def defect(output: Tensor, images: Tensor, **options: Any) -> Any:
        for name, function in change.items():
            options[name] = function(options[name])
        return run(output, images, **options)

    monkeypatch.setattr(cpu, "denoising_loss", defect)


@pytest.mark.parametrize(
    "change",
    [
        {"ceiling": lambda ceiling: math.inf},
        {"coefficients": lambda c: [c[0], c[2], c[1], c[3]]},
        {"coefficients": lambda c: [-c[0], *c[1:]]},
    ],
    ids=["no_ceiling", "columns_swapped", "sign_of_the_noise"],
)
def test_a_planted_defect_is_noticed(
    monkeypatch: pytest.MonkeyPatch, change: dict[str, Callable[[Any], Any]]
) -> None:
    test_edm(F32, "noise", "cpu")
    plant(monkeypatch, **change)
    with pytest.raises(AssertionError):
        test_edm(F32, "noise", "cpu")


def test_explain_says_which_backend_runs() -> None:
    assert "float32" in dk.explain("denoising_loss", X, X, 1, 1, 1, 1, noise=N)
    assert backends.unsupported("cpu", backends.Request("noised", X.device, F32)) is None
    assert backends.unsupported("triton", backends.Request("noised", X.device, F32)) is not None
