"""Dynamic thresholding against torch.quantile, in value and gradient, and its two definitions."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import dsno_kernels as dk
from dsno_kernels.backends import cpu, reference
from dsno_kernels.ops.dynamic_threshold import abs_quantile
from tests.helpers import FLOAT64, assert_close
from tests.test_exp_step import STEP, STEP_BACKENDS, isa  # noqa: F401

OPS = torch.ops.dsno_kernels


def published(x: Tensor, ratio: float, max_value: float, definition: str) -> Tensor:
    s = torch.quantile(x.abs().flatten(1), ratio, dim=1)
    if definition == "dpm_solver":
        s = torch.maximum(s, torch.full_like(s, max_value))
    else:
        s = torch.clamp(s, min=1, max=max_value)
    s = s.reshape(-1, *[1] * (x.ndim - 1))
    return torch.clamp(x, -s, s) / s


@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.5, 0.995, 1.0])
@pytest.mark.parametrize("shape", [(3, 1), (2, 2), (3, 7), (2, 3, 17, 31), (1, 5000)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_quantiles_are_those_of_torch(
    isa: str,  # noqa: F811
    dtype: torch.dtype,
    shape: tuple[int, ...],
    ratio: float,
) -> None:
    x = torch.randn(shape).to(dtype)
    exact = torch.quantile(x.double().abs().flatten(1), ratio, dim=1)
    for backend in STEP_BACKENDS:
        places = OPS.abs_rank(x, int(ratio * (x[0].numel() - 1)), backend)
        values = x.double().abs().flatten(1).sort(1).values
        found = x.double().abs().flatten(1).gather(1, places)
        rank = int(ratio * (x[0].numel() - 1))
        assert torch.equal(found[:, 0], values[:, rank])
        assert torch.equal(found[:, 1], values[:, min(rank + 1, values.shape[1] - 1)])
        assert_close(abs_quantile(x.float(), ratio, backend), exact, 1e-6)


@pytest.mark.parametrize("backend", STEP_BACKENDS)
def test_ties_zeros_and_infinities_have_places_of_their_own(backend: str) -> None:
    x = torch.tensor([[1.0, -1.0, 0.0, 1.0, -0.0, 2.0, float("inf"), -1.0]])
    order = [OPS.abs_rank(x, rank, backend)[0].tolist() for rank in range(8)]
    assert sorted(place for place, _ in order) == list(range(8))
    assert [place for _, place in order] == [*[place for place, _ in order][1:], order[-1][0]]


@pytest.mark.parametrize("backend", STEP_BACKENDS)
def test_a_sample_with_nan_is_nan_and_leaves_the_others(backend: str) -> None:
    x = torch.randn(3, 4, 5)
    x[1, 2, 3] = float("nan")
    y = dk.dynamic_threshold(x, backend=backend)
    assert y[1].isnan().all() and not y[[0, 2]].isnan().any()
    assert torch.equal(torch.quantile(x.abs().flatten(1), 0.995, dim=1).isnan(), y[:, 0, 0].isnan())


def test_samples_longer_than_the_limit_of_torch_quantile() -> None:
    n = (1 << 24) + 3
    x = torch.arange(n, dtype=torch.float32).flip(0)[None]  # exact below 2^24, even above
    with pytest.raises(RuntimeError, match="too large"):
        torch.quantile(x, 0.5)
    places = OPS.abs_rank(x, 1000, "cpu")
    assert x[0, places[0]].tolist() == [1000.0, 1001.0]


@pytest.mark.parametrize("backend", STEP_BACKENDS)
@pytest.mark.parametrize(
    ("max_value", "definition"),
    [(1.0, "dpm_solver"), (3.0, "dpm_solver"), (1.0, "diffusers"), (1.5, "diffusers")],
)
def test_both_published_definitions(max_value: float, definition: str, backend: str) -> None:
    x = torch.randn(4, 3, 9, 9) * torch.tensor([0.1, 1.0, 2.0, 5.0]).view(4, 1, 1, 1)
    y = dk.dynamic_threshold(x, 0.9, max_value, definition, backend=backend)
    assert_close(y, published(x.double(), 0.9, max_value, definition), STEP)
    low = dk.dynamic_threshold(x.bfloat16(), 0.9, max_value, definition, backend=backend)
    assert low.dtype == torch.bfloat16
    assert_close(low, published(x.double(), 0.9, max_value, definition), 1e-2)


@pytest.mark.parametrize("backend", STEP_BACKENDS)
def test_samples_of_one_element_need_no_axis(backend: str) -> None:
    """A tensor [B] raised an IndexError."""
    x = torch.tensor([0.25, -3.0, 1.5, -0.5], requires_grad=True)
    y = dk.dynamic_threshold(x, 0.9, 1.0, backend=backend)
    assert y.tolist() == [0.25, -1.0, 1.0, -0.5]
    (grad,) = torch.autograd.grad(y.sum(), x)
    (expected,) = torch.autograd.grad(published(x[:, None], 0.9, 1.0, "dpm_solver").sum(), x)
    assert torch.equal(grad, expected)
    row, threshold = [0.0, 1.0, 0.0, 1.0, 0.0, 1.0, 0.0, 1.0], (0.9, 1.0, "dpm_solver")
    step = dk.solver_step(x.detach(), x.detach(), row, threshold=threshold, backend=backend)
    assert torch.equal(step.base, y)
    assert dk.dynamic_threshold(x[:0], backend=backend).shape == (0,)


def test_gradients_are_those_of_torch_quantile() -> None:
    for scale in (0.2, 3.0):  # s is max_value; s is the quantile
        x = (scale * torch.randn(2, 3, 5, dtype=torch.float64)).requires_grad_()
        w = torch.randn_like(x)
        ours = torch.autograd.grad((w * dk.dynamic_threshold(x, 0.8)).sum(), x)[0]
        theirs = torch.autograd.grad((w * published(x, 0.8, 1.0, "dpm_solver")).sum(), x)[0]
        assert_close(ours, theirs, FLOAT64)
        assert torch.autograd.gradcheck(lambda x: dk.dynamic_threshold(x, 0.8), x)
        assert torch.autograd.gradgradcheck(lambda x: dk.dynamic_threshold(x, 0.8), x)
    x = 3 * torch.randn(2, 7)
    w = torch.randn_like(x)
    ours = torch.func.grad(lambda x: (w * dk.dynamic_threshold(x, 0.8)).sum())(x)
    theirs = torch.func.grad(lambda x: (w * published(x, 0.8, 1.0, "dpm_solver")).sum())(x)
    assert_close(ours, theirs.double(), 10 * STEP)


@pytest.mark.parametrize("backend", STEP_BACKENDS)
def test_opcheck_layouts_and_empty_batches(backend: str) -> None:
    x = torch.randn(3, 4, 5)
    for sample in (x, x.transpose(1, 2), x[:, ::2], x[:1].expand(3, 4, 5)):
        torch.library.opcheck(OPS.abs_rank.default, (sample, 2, backend))
        exact = published(sample.double(), 0.9, 1.0, "dpm_solver")
        assert_close(dk.dynamic_threshold(sample, 0.9, backend=backend), exact, STEP)
    assert dk.dynamic_threshold(x[:0], backend=backend).shape == (0, 4, 5)


def test_compiles_without_a_break() -> None:
    torch._dynamo.reset()
    x = 2 * torch.randn(3, 4, 5)
    compiled = torch.compile(dk.dynamic_threshold, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), dk.dynamic_threshold(x))
    torch._dynamo.reset()


def test_threads_do_not_change_places() -> None:
    x, before = torch.randn(5, 3000), torch.get_num_threads()
    try:
        results = []
        for threads in (1, 3):
            torch.set_num_threads(threads)
            results.append(cpu.abs_rank(x, 1234))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*results) and torch.equal(results[0], reference.abs_rank(x, 1234))


X = torch.zeros(2, 3)


@pytest.mark.parametrize(
    ("kind", "message", "call"),
    [
        (TypeError, "x0 must be real", lambda: dk.dynamic_threshold(X.long())),
        (TypeError, "ratio must be a number", lambda: dk.dynamic_threshold(X, "0.9")),
        (TypeError, "max_value must be a number", lambda: dk.dynamic_threshold(X, 0.9, None)),
        (ValueError, "ratio must be in 0..1", lambda: dk.dynamic_threshold(X, 1.5)),
        (ValueError, "max_value must be positive", lambda: dk.dynamic_threshold(X, 0.5, 0.0)),
        (ValueError, "at least 1", lambda: dk.dynamic_threshold(X, 0.5, 0.5, "diffusers")),
        (ValueError, "'dpm_solver', 'diffusers'", lambda: dk.dynamic_threshold(X, definition="x")),
        (ValueError, "batch axis", lambda: dk.dynamic_threshold(X[0, 0])),
        (ValueError, "elements in each sample", lambda: dk.dynamic_threshold(X[:, :0])),
    ],
)
def test_refusals_say_what_is_wrong(
    kind: type[Exception], message: str, call: Callable[[], object]
) -> None:
    with pytest.raises(kind, match=message):
        call()
