"""Both gradients of the spectral convolution as one op: its numbers, its derivatives, and where a
backend runs two ops in its place.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import dsno_kernels as dk
from dsno_kernels import backends
from dsno_kernels.backends import cpu, reference
from tests.helpers import BUDGETS, FLOAT64, IO_BUDGET, assert_close
from tests.strategies import BACKENDS

_C = pytest.importorskip("dsno_kernels._C", reason="the extension is not built")
OP = torch.ops.dsno_kernels.spectral_conv_backward.default


@pytest.fixture(params=_C.cpu_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    _C.cpu_set_isa(request.param)
    yield request.param
    _C.cpu_set_isa(_C.cpu_isas()[-1])


@pytest.fixture(params=[1, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def gradient_like(x: Tensor, O: int, n: int | None, time_dim: int, channel_dim: int) -> Tensor:
    shape = list(x.shape)
    shape[time_dim], shape[channel_dim] = n or x.shape[time_dim], O
    return torch.randn(shape).to(x.dtype)


def check(
    x: Tensor,
    g: Tensor,
    K: int,
    *,
    time_dim: int = 1,
    channel_dim: int = 2,
    bits: bool = False,
    precision: str = "fp32",
) -> None:
    """The CPU kernel against the two ops of the reference in float64."""
    I, O = x.shape[channel_dim], g.shape[channel_dim]
    weight = torch.randn(I, O, K, 2) / O**0.5
    axes: dict[str, Any] = {"time_dim": time_dim, "channel_dim": channel_dim}
    of_g: dict[str, Any] = {}
    if bits:
        of_g["negative_slope"] = 0.1
        positive = reference.pack_positive(torch.randn(g.shape), time_dim, channel_dim)
        axes |= {"grad_positive": positive, **of_g}
    dx, dW = cpu.spectral_conv_backward(x, g, weight, precision=precision, **axes)
    expected_dW = reference.spectral_conv_weight_grad(x.double(), g.double(), K, **axes)
    if bits:
        of_g["x_positive"] = axes.pop("grad_positive")
        axes.pop("negative_slope")
    expected_dx, _ = reference.spectral_conv(
        g.double(), weight.double(), n=x.shape[time_dim], adjoint=True, **axes, **of_g
    )
    assert dx.dtype == x.dtype
    rounded = IO_BUDGET if x.dtype != torch.float32 else 0.0
    assert_close(dx, expected_dx, max(rounded, BUDGETS[precision]))
    assert_close(dW, expected_dW, BUDGETS[precision])
    dead = [0] + ([K - 1] if 2 * (K - 1) == x.shape[time_dim] == g.shape[time_dim] else [])
    assert not dW[:, :, dead, 1].view(torch.int32).any()  # zeros without a sign


@pytest.mark.parametrize(
    ("T", "n", "K"),
    [(1, 1, 1), (2, 2, 2), (3, 3, 2), (4, 4, 2), (4, 4, 3), (5, 8, 3), (8, 5, 3), (16, 16, 9)],
)
def test_lengths_and_modes(isa: str, T: int, n: int, K: int, threads: int) -> None:
    x = torch.randn(2, T, 6, 5, 7)
    for bits in (False, True):
        check(x, gradient_like(x, 5, n, 1, 2), K, bits=bits)


@pytest.mark.parametrize(
    ("I", "O", "pixels"),
    [(1, 1, (1, 1)), (48, 40, (7, 5)), (40, 111, (7, 5)), (33, 17, (40, 9)), (13, 65, (9, 9))],
    ids=str,
)
def test_channels_pixels_and_precisions(
    isa: str, I: int, O: int, pixels: tuple[int, int], threads: int
) -> None:
    x = torch.randn(2, 4, I, *pixels)
    for precision in BUDGETS:
        check(x, gradient_like(x, O, None, 1, 2), 2, bits=True, precision=precision)


def test_more_channels_than_the_cache_holds(isa: str) -> None:
    x = torch.randn(1, 4, 370, 3, 3)
    check(x, gradient_like(x, 370, None, 1, 2), 2, bits=True)


@pytest.mark.parametrize(
    ("shape", "time_dim", "channel_dim"),
    [
        ((2, 20, 5, 7, 5), 2, 1),
        ((37, 9, 20), 1, 2),
        ((2, 7, 5, 9, 20), 3, 4),
        ((9, 20), 0, 1),
        ((3, 20, 64), 2, 1),  # kernels for long signals in contiguous memory
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_layouts(
    isa: str, shape: tuple[int, ...], time_dim: int, channel_dim: int, dtype: torch.dtype
) -> None:
    axes = {"time_dim": time_dim, "channel_dim": channel_dim}
    x = torch.randn(shape).to(dtype)
    for n in (None, 7):
        check(x, gradient_like(x, 18, n, **axes), 3, **axes)


def test_strides_of_either_tensor(isa: str) -> None:
    x = torch.randn(3, 8, 20, 6, 9)[1:, :, 3:15, :, 1:8]
    g = torch.randn(9, 6, 7, 2, 8).permute(3, 4, 0, 1, 2)
    for gradient in (g, torch.ones(()).expand(g.shape)):
        before = x.clone(), gradient.clone()
        dx, _ = cpu.spectral_conv_backward(
            x, gradient, torch.randn(12, 9, 3, 2), time_dim=1, channel_dim=2
        )
        alone, _ = cpu.spectral_conv(
            gradient, torch.ones(12, 9, 3, 2), n=8, adjoint=True, time_dim=1, channel_dim=2
        )
        assert dx.stride() == alone.stride()
        assert torch.equal(x, before[0]) and torch.equal(gradient, before[1])
        check(x, gradient, 3)


def test_long_sums_are_sums_of_sums(isa: str) -> None:
    """More chunks of pixels than are added up in one go."""
    x = torch.randn(40, 2, 3, 70, 9)
    check(x, gradient_like(x, 4, None, 1, 2), 2)


def test_runs_are_bit_equal(isa: str, threads: int) -> None:
    x, g, weight = (
        torch.randn(2, 4, 20, 9, 33),
        torch.randn(2, 4, 24, 9, 33),
        torch.randn(20, 24, 2, 2),
    )
    run = functools.partial(cpu.spectral_conv_backward, x, g, weight, time_dim=1, channel_dim=2)
    first = run()
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(run(), first, strict=True))


def test_nan_reaches_what_it_is_part_of(isa: str) -> None:
    x, g, weight = (
        torch.randn(2, 4, 20, 9, 9),
        torch.randn(2, 4, 24, 9, 9),
        torch.randn(20, 24, 2, 2),
    )
    g[1, 2, 7, 3, 4] = torch.nan
    dx, dW = cpu.spectral_conv_backward(x, g, weight, time_dim=1, channel_dim=2)
    expected = torch.zeros_like(dx, dtype=torch.bool)
    expected[1, :, :, 3, 4] = True
    assert torch.equal(dx.isnan(), expected)
    assert dW[:, 7].isnan().any() and not dW[:, :7].isnan().any() and not dW[:, 8:].isnan().any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend: str) -> None:
    x, g, weight = torch.randn(2, 4, 3, 5, 7), torch.randn(2, 4, 6, 5, 7), torch.randn(3, 6, 3, 2)
    positive = torch.randint(0, 255, (2, 4, 6, 5), dtype=torch.uint8)
    for args in [
        (x, g, weight, 1, 2, None, None),
        (x.mT, g.mT, weight, 1, 2, None, None),
        (x, g, weight, 1, 2, positive, 0.1),
        (x.bfloat16(), g, weight, 1, 2, None, None),
        (x[:0], g[:0], weight, 1, 2, None, None),
    ]:
        torch.library.opcheck(OP, (*args, "fp32", backend))


def test_gradcheck_and_gradgradcheck() -> None:
    def double(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, requires_grad=True)

    for T, n, K in ((4, 4, 3), (5, 4, 2)):
        inputs = double(2, T, 2, 3), double(2, n, 3, 3), double(2, 3, K, 2)
        assert gradcheck(dk.spectral_conv_backward, inputs)
        assert gradgradcheck(dk.spectral_conv_backward, inputs)


def test_under_torch_func_and_forward_mode() -> None:
    x, g, weight = (
        torch.randn(*shape, dtype=torch.float64) for shape in ((2, 4, 3), (2, 4, 5), (3, 5, 2, 2))
    )

    def apart(x: Tensor, g: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        _, pull = torch.func.vjp(lambda x: dk.spectral_conv(x, weight), x)
        return pull(g)[0], dk.spectral_conv_weight_grad(x, g, 2)

    def transformed(f: Any) -> list[Tensor]:
        mapped = torch.func.vmap(f, (None, 0, None))(x, torch.stack([g, 2 * g]), weight)
        _, tangents = torch.func.jvp(f, (x, g, weight), (x, g, weight))
        _, pull = torch.func.vjp(f, x, g, weight)
        return [*mapped, *tangents, *pull((x, weight))]

    results = transformed(dk.spectral_conv_backward)
    for result, expected in zip(results, transformed(apart), strict=True):
        assert_close(result, expected, FLOAT64)
    with pytest.raises(NotImplementedError, match=r"does not run under torch\.func"):
        torch.func.vmap(functools.partial(dk.spectral_conv_backward, backend="cpu"), (0, 0, None))(
            x[None], g[None], weight
        )


@pytest.mark.parametrize("backend", BACKENDS)
def test_derivatives_of_one_of_the_two(backend: str) -> None:
    inputs = [torch.randn(2, 4, 5, 9), torch.randn(2, 4, 7, 9), torch.randn(5, 7, 2, 2)]
    leaves = [tensor.requires_grad_() for tensor in inputs]
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    for which in (0, 1):
        result, expected = (
            torch.autograd.grad(
                dk.spectral_conv_backward(*given, backend=name)[which].square().sum(),
                given,
                allow_unused=True,
            )
            for given, name in ((leaves, backend), (exact, "reference"))
        )
        for a, e in zip(result, expected, strict=True):
            assert (a is None) == (e is None)
            if a is not None and e is not None:
                assert_close(a, e, 2 * BUDGETS["fp32"])


class Calls:
    """Counts what a backend is asked for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, module: Any, *names: str) -> None:
        self.seen: list[str] = []
        for name in names:
            monkeypatch.setattr(module, name, self.counted(name, getattr(module, name)))

    def counted(self, name: str, run: Any) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            self.seen.append(name)
            return run(*args, **options)

        return call


PARTS = ("spectral_conv", "spectral_conv_weight_grad")


@pytest.mark.parametrize("needed", [(0,), (1,), (0, 1)], ids=str)
def test_the_backward_runs_it_where_both_gradients_are_wanted(
    needed: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    leaves = [torch.randn(2, 4, 5, 9), torch.randn(5, 5, 2, 2)]
    for place in needed:
        leaves[place].requires_grad_()
    wanted = [leaves[place] for place in needed]
    one = [(*PARTS, "spectral_conv_backward")[sum(needed) + len(needed) - 1]]
    for module, name, expected in (
        (cpu, "cpu", one),
        (reference, "reference", list(PARTS) if len(needed) == 2 else one),
    ):
        y = dk.spectral_conv(*leaves, activation="leaky_relu", backend=name)
        with monkeypatch.context() as patch:
            names = [op for op in (*PARTS, "spectral_conv_backward") if hasattr(module, op)]
            calls = Calls(patch, module, *names)
            torch.autograd.grad(y.sum(), wanted)
        assert calls.seen == expected


def test_explain_says_what_runs_in_parts() -> None:
    x, weight = torch.randn(2, 4, 5, 9), torch.randn(5, 5, 2, 2)
    lines = dk.explain("spectral_conv_backward", x, x, weight).splitlines()
    assert lines[0].endswith("precision fp32: cpu") and lines[1].split() == ["->", "cpu", "runs"]
    told = dk.explain("spectral_conv_backward", x.double(), x.double(), weight)
    assert (
        "-> reference runs, as spectral_conv and spectral_conv_weight_grad: it does not have"
        " spectral_conv_backward" in told
    )
    with dk.use_backend("cuda"):
        assert "cuda is asked for and cannot" in dk.explain("spectral_conv_backward", x, x, weight)
        with pytest.raises(NotImplementedError, match="spectral_conv_backward on cpu"):
            dk.spectral_conv_backward(x, x, weight)


def test_a_backend_without_it_serves_where_it_has_both_parts() -> None:
    device = torch.device("cpu")
    for dtype, served in ((torch.float32, True), (torch.float64, False)):
        request = backends.Request("spectral_conv_backward", device, dtype, modes=2)
        assert (backends.unsupported("cpu", request) is None) is served
        assert backends.unsupported("reference", request) is None
    many = backends.Request("spectral_conv_backward", device, torch.float32, "fp32", 1024, 300)
    assert "300 modes of 1024" in str(backends.unsupported("cpu", many))
    assert backends.select_whole("", many) is None


def test_bad_input_gets_one_clear_sentence() -> None:
    x, weight = torch.randn(2, 4, 5, 9), torch.randn(5, 7, 2, 2)
    with pytest.raises(ValueError, match="grad_output must have the shape of x"):
        dk.spectral_conv_backward(x, x[:1], weight)
    with pytest.raises(ValueError, match=r"grad_output has 5 channels .* 7 output channels"):
        dk.spectral_conv_backward(x, x, weight)
    with pytest.raises(TypeError, match="grad_output must be real"):
        dk.spectral_conv_backward(x, x.long(), weight)
