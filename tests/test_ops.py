"""What PyTorch asks of an operator: schema, fake, opcheck, torch.compile, autocast."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import dsno_kernels as dk
from tests.helpers import BUDGETS, assert_close
from tests.strategies import BACKENDS

OPS = torch.ops.dsno_kernels


def conv_samples() -> dict[str, tuple]:
    x, weight = torch.randn(2, 4, 3, 5, 7), torch.randn(3, 6, 3, 2)
    bias, residual = torch.randn(6), torch.randn(2, 4, 6, 5, 7)
    positive = torch.randint(0, 255, (2, 4, 6, 5), dtype=torch.uint8)
    plain = (1, 2, 4, False, None, None, None, torch.float32, False, None, "fp32", "")
    return {
        "contiguous": (x, weight, *plain),
        "transposed": (
            x.transpose(0, 3).contiguous().transpose(0, 3),
            weight.transpose(0, 1).contiguous().transpose(0, 1),
            *plain,
        ),
        "channels_last": (x.movedim(2, -1).contiguous().movedim(-1, 2), weight, *plain),
        "offset": (torch.randn(3, 4, 3, 5, 7)[1:], weight, *plain),
        "pixels_not_mergeable": (torch.randn(2, 4, 3, 5, 9)[..., 1:8], weight, *plain),
        "epilogue": (
            x,
            weight,
            1,
            2,
            4,
            False,
            bias,
            residual,
            0.01,
            torch.float32,
            True,
            None,
            "fp32",
            "",
        ),
        "longer_low_precision": (
            x.bfloat16(),
            weight,
            1,
            2,
            6,
            False,
            bias,
            None,
            None,
            torch.float16,
            False,
            None,
            "bf16",
            "",
        ),
        "adjoint_masked": (
            residual,
            weight,
            1,
            2,
            4,
            True,
            None,
            None,
            0.01,
            torch.float32,
            False,
            positive,
            "fp32",
            "",
        ),
        "time_last": (torch.randn(3, 5, 9), torch.randn(5, 2, 4, 2), 2, 1, 9, *plain[3:]),
        "empty_batch": (
            x[:0],
            weight,
            1,
            2,
            4,
            False,
            bias,
            residual[:0],
            0.01,
            torch.float32,
            True,
            None,
            "fp32",
            "",
        ),
        "no_pixels": (x[..., :0], weight, *plain),
    }


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", conv_samples())
def test_opcheck_spectral_conv(name: str, backend: str) -> None:
    torch.library.opcheck(OPS.spectral_conv.default, (*conv_samples()[name][:-1], backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck_the_other_ops(backend: str) -> None:
    x, g = torch.randn(2, 4, 3, 5, 7), torch.randn(2, 4, 6, 5, 7)
    positive = torch.randint(0, 255, (2, 4, 6, 5), dtype=torch.uint8)
    for args in [
        (x, g, 3, 1, 2, None, None),
        (x.mT, g.mT, 3, 1, 2, None, None),
        (x, g, 3, 1, 2, positive, 0.1),
        (x[:0], g[:0], 3, 1, 2, None, None),
    ]:
        torch.library.opcheck(OPS.spectral_conv_weight_grad.default, (*args, "fp32", backend))
    for args in [(x, 2, 1), (x.transpose(1, 3), 3, 3), (x[..., 1:], 3, 4), (x[:0], 2, 1)]:
        torch.library.opcheck(OPS.truncated_rfft.default, (*args, backend))
    for args in [(torch.randn(2, 3, 5, 2), 4, 1), (torch.randn(5, 3, 2, 2).transpose(0, 2), 7, 0)]:
        torch.library.opcheck(OPS.truncated_irfft.default, (*args, backend))


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_has_no_graph_break_and_the_same_numbers(fresh_dynamo: None, dynamic: bool) -> None:
    weight = torch.randn(6, 6, 2, 2, requires_grad=True)
    bias = torch.randn(6, requires_grad=True)

    def layer(x: torch.Tensor) -> torch.Tensor:
        h = dk.spectral_conv(x, weight, bias=bias, activation="leaky_relu", residual=x)
        X = dk.truncated_rfft(h, 2, 1)
        return dk.truncated_irfft(X, 4, 1) * 2

    compiled = torch.compile(layer, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for batch in (2, 3, 5):
        x = torch.randn(batch, 4, 6, 5, 3, requires_grad=True)
        leaves = (x, weight, bias)
        y, expected = compiled(x), layer(x)
        assert torch.equal(y, expected) and y.stride() == expected.stride()
        g = torch.randn_like(y)
        for grad, exact in zip(
            torch.autograd.grad(y, leaves, g), torch.autograd.grad(expected, leaves, g), strict=True
        ):
            assert_close(grad, exact, BUDGETS["fp32"])


def test_compile_takes_one_tensor_in_two_places(fresh_dynamo: None) -> None:
    x = torch.randn(2, 4, 3, 5, requires_grad=True)
    for run in (
        lambda x: dk.spectral_conv_weight_grad(x, x, 2),
        lambda x: dk.spectral_conv(x, torch.ones(3, 3, 2, 2), residual=x),
    ):
        compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
        assert_close(compiled(x), run(x), BUDGETS["fp32"])
        (grad,), (expected,) = (torch.autograd.grad(f(x).sum(), x) for f in (compiled, run))
        assert_close(grad, expected, BUDGETS["fp32"])


def test_compile_with_inductor(fresh_dynamo: None) -> None:
    weight = torch.randn(6, 6, 2, 2)
    compiled = torch.compile(lambda x: dk.spectral_conv(x.sin(), weight).cos(), fullgraph=True)
    x = torch.randn(2, 4, 6, 5, 3)
    assert_close(compiled(x), dk.spectral_conv(x.sin(), weight).cos(), BUDGETS["fp32"])


def test_a_new_batch_size_does_not_recompile_for_ever(fresh_dynamo: None) -> None:
    from torch._dynamo.testing import CompileCounter

    counter = CompileCounter()
    weight = torch.randn(6, 6, 2, 2)
    compiled = torch.compile(lambda x: dk.spectral_conv(x, weight), fullgraph=True, backend=counter)
    for batch in (2, 3, 4, 5, 6, 7):
        compiled(torch.randn(batch, 4, 6, 5, 3))
    assert counter.frame_count <= 2


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_changes_nothing(backend: str) -> None:
    """The op computes what its precision says; autocast must not reach the products inside the
    reference either.
    """
    x, weight = (
        torch.randn(2, 4, 6, 5, 3, requires_grad=True),
        torch.randn(6, 6, 2, 2, requires_grad=True),
    )
    y = dk.spectral_conv(x, weight, activation="leaky_relu", backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        under = dk.spectral_conv(x, weight, activation="leaky_relu", backend=backend)
        grads = torch.autograd.grad(under.sum(), (x, weight))
    assert under.dtype == torch.float32 and torch.equal(y, under)
    for grad, expected in zip(grads, torch.autograd.grad(y.sum(), (x, weight)), strict=True):
        assert torch.equal(grad, expected)


def test_precision_follows_pytorchs_setting() -> None:
    x, weight = torch.randn(2, 4, 6, 5), torch.randn(6, 6, 2, 2)
    lines = {}
    for setting in ("highest", "high", "medium"):
        torch.set_float32_matmul_precision(setting)
        lines[setting] = dk.explain("spectral_conv", x, weight).splitlines()[0]
    torch.set_float32_matmul_precision("highest")
    for setting, expected in (("highest", "fp32"), ("high", "tf32"), ("medium", "bf16")):
        assert f"precision {expected}:" in lines[setting]
    for dtype, expected in (
        (torch.float64, "fp32"),
        (torch.bfloat16, "bf16"),
        (torch.float16, "tf32"),
    ):
        assert f"precision {expected}:" in dk.explain("spectral_conv", x.to(dtype), weight)


def test_precision_can_be_read_after_pytorchs_newer_setting_was_written() -> None:
    """The legacy getter raises once backends.*.fp32_precision has been assigned."""
    code = (
        "import torch, dsno_kernels as dk\n"
        "torch.backends.mkldnn.matmul.fp32_precision = 'bf16'\n"
        "torch.backends.cuda.matmul.fp32_precision = 'tf32'\n"
        "print(dk.explain('spectral_conv', torch.randn(2, 4, 6), torch.randn(6, 6, 2, 2)))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "precision bf16:" in run.stdout


@pytest.mark.parametrize("backend", BACKENDS)
def test_ten_runs_give_the_same_bits(backend: str) -> None:
    x, weight = (
        torch.randn(3, 5, 17, 35, requires_grad=True),
        torch.randn(17, 19, 3, 2, requires_grad=True),
    )
    first = None
    for _ in range(10):
        y = dk.spectral_conv(x, weight, activation="leaky_relu", backend=backend)
        results = (y, *torch.autograd.grad(y.square().sum(), (x, weight)))
        first = first or results
        assert all(torch.equal(a, b) for a, b in zip(results, first, strict=True))
