"""The CPU kernels against the reference in float64, on every instruction set of this machine."""

from __future__ import annotations

import types
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import dsno_kernels as dk
from dsno_kernels import _layout
from dsno_kernels.backends import Request, cpu, reference
from tests.helpers import BUDGETS, IO_BUDGET, assert_close

_C = pytest.importorskip("dsno_kernels._C", reason="the extension is not built")
if not hasattr(_C, "cpu_isas"):
    pytest.skip("the extension was built without CPU kernels", allow_module_level=True)

ISAS = _C.cpu_isas()
# Table entries are rounded to 6e-8; sums of N(0, 1) data times them add as much a few times over.
FFT_BUDGET = 5e-7


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    _C.cpu_set_isa(request.param)
    yield request.param
    _C.cpu_set_isa(ISAS[-1])


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def budget(dtype: torch.dtype, precision: str) -> float:
    return BUDGETS[precision] if dtype == torch.float32 else max(IO_BUDGET, BUDGETS[precision])


def check_conv(
    x: Tensor,
    O: int,
    K: int,
    *,
    time_dim: int = 1,
    channel_dim: int = 2,
    n: int | None = None,
    adjoint: bool = False,
    epilogue: bool = False,
    precision: str = "fp32",
) -> None:
    """`spectral_conv` with or without its epilogue, and with sign bits of x where there is none."""
    n = n or x.shape[time_dim]
    I = x.shape[channel_dim]
    weight = torch.randn((O, I, K, 2) if adjoint else (I, O, K, 2)) / I**0.5
    options = {"time_dim": time_dim, "channel_dim": channel_dim, "n": n, "adjoint": adjoint}
    shape = list(x.shape)
    shape[time_dim], shape[channel_dim] = n, O
    exact = {}
    if epilogue:
        residual = torch.randn(shape).to(x.dtype)
        options |= {"bias": torch.randn(O), "negative_slope": 0.1, "save_positive": True}
        exact["residual"] = residual.double()
        y, positive = cpu.spectral_conv(
            x, weight, residual=residual, out_dtype=x.dtype, precision=precision, **options
        )
    else:
        bits = reference.pack_positive(torch.randn(x.shape), time_dim, channel_dim)
        if n % 2:  # also without
            options |= {"x_positive": bits, "negative_slope": 0.1}
        y, positive = cpu.spectral_conv(
            x, weight, out_dtype=x.dtype, precision=precision, **options
        )
    expected, expected_bits = reference.spectral_conv(
        x.double(), weight.double(), **options, **exact
    )
    assert y.dtype == x.dtype
    assert_close(y, expected, budget(x.dtype, precision))
    if expected_bits is None:
        assert positive is None
    else:
        assert positive is not None and positive.shape == expected_bits.shape
        # h within rounding of 0 may take either sign.
        flipped = (positive ^ expected_bits).ne(0).double().mean().item()
        assert flipped <= (0.1 if budget(x.dtype, precision) > 1e-5 else 0.01)
        assert_close(*_padding_bits(positive, shape, time_dim, channel_dim), 0.0)


def _padding_bits(
    positive: Tensor, shape: list[int], time_dim: int, channel_dim: int
) -> tuple[Tensor, Tensor]:
    _, pixels = _layout.group_sizes(shape, time_dim, channel_dim)
    last = positive[..., -1] & (0xFF << pixels % 8 & 0xFF if pixels % 8 else 0)
    return last, torch.zeros_like(last)


def check_weight_grad(
    x: Tensor,
    O: int,
    K: int,
    *,
    time_dim: int = 1,
    channel_dim: int = 2,
    n: int | None = None,
    bits: bool = False,
    precision: str = "fp32",
) -> None:
    shape = list(x.shape)
    shape[time_dim], shape[channel_dim] = n or x.shape[time_dim], O
    g = torch.randn(shape).to(x.dtype)
    options: dict[str, object] = {"time_dim": time_dim, "channel_dim": channel_dim}
    if bits:
        positive = reference.pack_positive(torch.randn(shape), time_dim, channel_dim)
        options |= {"grad_positive": positive, "negative_slope": 0.1}
    grad = cpu.spectral_conv_weight_grad(x, g, K, precision=precision, **options)
    expected = reference.spectral_conv_weight_grad(x.double(), g.double(), K, **options)
    assert_close(grad, expected, BUDGETS[precision])
    dead = [0] + ([K - 1] if 2 * (K - 1) == x.shape[time_dim] == shape[time_dim] else [])
    assert grad[:, :, dead, 1].count_nonzero() == 0


@pytest.mark.parametrize("T", [1, 2, 3, 4, 5, 7, 8, 16, 17, 33, 64])
def test_lengths_and_modes(isa: str, T: int) -> None:
    x = torch.randn(2, T, 6, 5, 7)
    for n in (T, T + 3):
        for K in {1, min(2, T // 2 + 1), T // 2 + 1}:
            for adjoint in (False, True):
                check_conv(x, 5, K, n=n, adjoint=adjoint, epilogue=K == 1)
            check_weight_grad(x, 5, K, n=n, bits=K == 1)


@pytest.mark.parametrize(
    ("T", "n", "K"), [(8, 5, 3), (5, 8, 3), (4, 8, 3), (8, 4, 3), (7, 6, 4), (64, 32, 17)]
)
def test_input_and_output_lengths_differ(isa: str, T: int, n: int, K: int) -> None:
    for layout in ((3, T, 4, 9), (3, 4, T)):
        time_dim, channel_dim = (1, 2) if len(layout) == 4 else (2, 1)
        axes = {"time_dim": time_dim, "channel_dim": channel_dim}
        for adjoint in (False, True):
            check_conv(torch.randn(layout), 3, K, n=n, adjoint=adjoint, **axes)
        check_weight_grad(torch.randn(layout), 3, K, n=n, **axes)


@pytest.mark.parametrize(
    ("I", "O", "pixels"),
    [(1, 1, (1, 1)), (48, 40, (7, 5)), (40, 111, (7, 5)), (33, 17, (4, 8)), (13, 65, (9, 9))],
    ids=str,
)
def test_channels_and_pixels(isa: str, I: int, O: int, pixels: tuple[int, int]) -> None:
    x = torch.randn(2, 4, I, *pixels)
    for precision in BUDGETS:
        check_conv(x, O, 2, epilogue=True, precision=precision)
        check_conv(x, O, 2, adjoint=True, precision=precision)
        check_weight_grad(x, O, 2, bits=True, precision=precision)
        check_weight_grad(x, O, 3, precision=precision)


@pytest.mark.parametrize(
    ("shape", "time_dim", "channel_dim"),
    [
        ((2, 5, 20, 7, 5), 1, 2),
        ((2, 20, 5, 7, 5), 2, 1),
        ((3, 20, 40), 2, 1),
        ((37, 20, 9), 2, 1),
        ((37, 9, 20), 1, 2),
        ((2, 9, 7, 5, 20), 1, 4),
        ((2, 7, 5, 9, 20), 3, 4),
        ((9, 2, 20, 7), 0, 2),
        ((9, 20), 0, 1),
    ],
    ids=str,
)
def test_layouts(isa: str, shape: tuple[int, ...], time_dim: int, channel_dim: int) -> None:
    axes = {"time_dim": time_dim, "channel_dim": channel_dim}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x = torch.randn(shape).to(dtype)
        check_conv(x, 18, 2, epilogue=True, **axes)
        check_conv(x, 18, 2, n=7, **axes)
        check_weight_grad(x, 18, 2, bits=True, **axes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("L", "K"), [(32, 17), (64, 1), (100, 20), (101, 20), (256, 33), (1024, 32), (2048, 129)]
)
def test_long_contiguous_time(isa: str, L: int, K: int, dtype: torch.dtype) -> None:
    x = torch.randn(3, 5, L).to(dtype)
    axes = {"time_dim": 2, "channel_dim": 1}
    for adjoint in (False, True):
        check_conv(x, 7, K, adjoint=adjoint, **axes)
        check_conv(x, 7, K, adjoint=adjoint, n=L + 4, **axes)
    check_conv(x, 7, K, epilogue=True, **axes)
    check_weight_grad(x, 7, K, **axes)


def test_epilogue_of_long_contiguous_time(isa: str) -> None:
    x, weight = torch.randn(3, 5, 64), torch.randn(5, 7, 9, 2)
    options = {
        "time_dim": 2,
        "channel_dim": 1,
        "n": 64,
        "bias": torch.randn(7),
        "negative_slope": 0.1,
    }
    for residual in (torch.randn(3, 7, 64), torch.randn(3, 64, 7).transpose(1, 2)):
        y, _ = cpu.spectral_conv(x, weight, residual=residual, **options)
        expected, _ = reference.spectral_conv(
            x.double(), weight.double(), residual=residual.double(), **options
        )
        assert_close(y, expected, BUDGETS["fp32"])


def strided_inputs() -> dict[str, Tensor]:
    channels_last = torch.randn(2 * 8, 12, 6, 7).to(memory_format=torch.channels_last)
    return {
        "sliced": torch.randn(3, 8, 20, 6, 9)[1:, :, 3:15, :, 1:8],
        "offset": torch.randn(2 * 8 * 12 * 42 + 3)[3:].view(2, 8, 12, 6, 7),
        "stride 0": torch.randn(2, 1, 12, 1, 1).expand(2, 8, 12, 6, 7),
        "stride 0 pixels": torch.randn(2, 8, 12, 1, 1).expand(2, 8, 12, 6, 7),
        "channels-last": channels_last.unflatten(0, (2, 8)),
        "every other": torch.randn(2, 16, 24, 6, 7)[:, ::2, ::2],
        "reordered": torch.randn(12, 6, 7, 2, 8).permute(3, 4, 0, 1, 2),
    }


@pytest.mark.parametrize("name", strided_inputs())
def test_strides(isa: str, name: str) -> None:
    x = strided_inputs()[name]
    before = x.clone()
    check_conv(x, 9, 3, epilogue=True)
    check_conv(x, 9, 3, n=7)
    check_weight_grad(x, 9, 3)
    assert torch.equal(x, before)


def test_strided_weight_gradient_and_residual(isa: str) -> None:
    x = torch.randn(2, 8, 12, 6, 7)
    weight = torch.randn(2, 4, 9, 12).permute(3, 2, 1, 0)
    residual = torch.randn(2, 8, 6, 7, 9).movedim(-1, 2)
    options = {"time_dim": 1, "channel_dim": 2, "n": 8}
    y, _ = cpu.spectral_conv(x, weight, residual=residual, **options)
    expected, _ = reference.spectral_conv(
        x.double(), weight.double(), residual=residual.double(), **options
    )
    assert_close(y, expected, BUDGETS["fp32"])
    row = torch.randn(3, 12, 64)
    y, _ = cpu.spectral_conv(row, weight, time_dim=2, channel_dim=1, n=64)
    expected, _ = reference.spectral_conv(
        row.double(), weight.double(), time_dim=2, channel_dim=1, n=64
    )
    assert_close(y, expected, BUDGETS["fp32"])
    g = torch.ones(()).expand(2, 8, 9, 6, 7)
    grad = cpu.spectral_conv_weight_grad(x, g, 4, time_dim=1, channel_dim=2)
    expected = reference.spectral_conv_weight_grad(
        x.double(), g.double(), 4, time_dim=1, channel_dim=2
    )
    # All modes of a constant but the first vanish: what remains of them is rounding.
    assert_close(grad, expected, BUDGETS["fp32"])


@pytest.mark.parametrize(
    ("shape", "dim"),
    [((5,), 0), ((3, 17), 1), ((4, 5, 3, 7), 1), ((64, 9), 0), ((7, 100), 1), ((50, 96), 1)],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_transforms(isa: str, shape: tuple[int, ...], dim: int, dtype: torch.dtype) -> None:
    T = shape[dim]
    for x in (
        torch.randn(shape).to(dtype),
        torch.randn(shape[::-1]).to(dtype).permute(*range(len(shape))[::-1]),
    ):
        for K in {1, 2, T // 2 + 1}:
            spectrum = cpu.truncated_rfft(x, K, dim=dim)
            assert_close(spectrum, reference.truncated_rfft(x.double(), K, dim=dim), FFT_BUDGET)
            # Imaginary parts that do not exist are given, and ignored.
            pairs = torch.randn_like(spectrum)
            back = cpu.truncated_irfft(pairs, T, dim=dim)
            assert_close(back, reference.truncated_irfft(pairs.double(), T, dim=dim), FFT_BUDGET)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("precision", BUDGETS)
def test_results_are_equal_over_runs(isa: str, precision: str, threads: int) -> None:
    torch.set_num_threads(threads)
    x, g, weight = (
        torch.randn(2, 4, 20, 9, 33),
        torch.randn(2, 4, 24, 9, 33),
        torch.randn(20, 24, 2, 2),
    )
    rows, row_weight = torch.randn(5, 20, 128), torch.randn(20, 24, 16, 2)
    axes = {"time_dim": 1, "channel_dim": 2, "precision": precision}
    row_axes = {"time_dim": 2, "channel_dim": 1, "precision": precision}

    def run() -> list[Tensor]:
        return [
            cpu.spectral_conv(x, weight, n=4, **axes)[0],
            cpu.spectral_conv_weight_grad(x, g, 2, **axes),
            cpu.spectral_conv(rows, row_weight, n=128, **row_axes)[0],
            cpu.spectral_conv_weight_grad(rows, rows, 16, **row_axes),
        ]

    first = run()
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))
    expected = reference.spectral_conv(x.double(), weight.double(), n=4, time_dim=1, channel_dim=2)
    assert_close(first[0], expected[0], BUDGETS[precision])


def test_nan_reaches_its_pixel_and_no_other(isa: str) -> None:
    x, weight = torch.randn(2, 4, 20, 9, 9), torch.randn(20, 24, 2, 2)
    x[1, 2, 7, 3, 4] = torch.nan
    for precision in BUDGETS:
        y, _ = cpu.spectral_conv(
            x, weight, time_dim=1, channel_dim=2, n=4, negative_slope=0.1, precision=precision
        )
        expected = torch.zeros(2, 9, 9, dtype=torch.bool)
        expected[1, 3, 4] = True
        assert torch.equal(y.isnan().all(1).all(1), expected)
        assert torch.equal(y.isnan().any(1).any(1), expected)
        grad = cpu.spectral_conv_weight_grad(
            x, y.nan_to_num(), 2, time_dim=1, channel_dim=2, precision=precision
        )
        assert grad[7].isnan().any() and not grad[:7].isnan().any() and not grad[8:].isnan().any()


def test_unknown_instruction_set_is_refused() -> None:
    with pytest.raises(ValueError, match=r"accepted: .*portable"):
        _C.cpu_set_isa("mmx")


def test_many_modes_are_left_to_the_fast_fourier_transform() -> None:
    x, weight = torch.randn(1, 2, 1024), torch.randn(2, 3, 300, 2)
    options = {"time_dim": 2, "channel_dim": 1}
    expected, _ = reference.spectral_conv(x.double(), weight.double(), n=1024, **options)
    assert_close(dk.spectral_conv(x, weight, **options), expected, BUDGETS["fp32"])
    for call in (
        lambda: dk.spectral_conv(x, weight, **options),
        lambda: dk.spectral_conv_weight_grad(x, x, 300, **options),
        lambda: dk.truncated_rfft(x, 300),
        lambda: dk.truncated_irfft(torch.randn(2, 300, dtype=torch.complex64), 1024, dim=1),
    ):
        with dk.use_backend("cpu"), pytest.raises(NotImplementedError, match="300 modes of 1024"):
            call()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_float64_outputs_and_residuals(dtype: torch.dtype) -> None:
    x, weight = torch.randn(2, 4, 6, 5).to(dtype), torch.randn(6, 7, 2, 2)
    options = {"time_dim": 1, "channel_dim": 2, "n": 4}
    residual = torch.randn(2, 4, 7, 5, dtype=torch.float64)
    for out_dtype in (torch.float64, torch.float32):
        y, _ = cpu.spectral_conv(x, weight, residual=residual, out_dtype=out_dtype, **options)
        expected, _ = reference.spectral_conv(
            x.double(), weight.double(), residual=residual, **options
        )
        assert y.dtype == out_dtype
        assert_close(y, expected, BUDGETS["fp32"])


@pytest.mark.parametrize("api", [None, 0, cpu._API + 1], ids=str)
def test_an_extension_of_another_source_is_refused(
    api: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = types.SimpleNamespace() if api is None else types.SimpleNamespace(cpu_api=api)
    monkeypatch.setattr(cpu, "_C", other)
    cpu._missing.cache_clear()
    reason = cpu.unsupported(Request("spectral_conv", torch.device("cpu"), torch.float32))
    monkeypatch.undo()
    cpu._missing.cache_clear()
    assert reason is not None and reason.endswith(
        "rebuild it: pip install -e . --no-build-isolation"
    )


def relative_error(result: Tensor, exact: Tensor) -> float:
    return ((result.double() - exact).norm() / exact.norm()).item()


def eager_layer(x: Tensor, weight: Tensor, time_dim: int, channel_dim: int) -> Tensor:
    """The layer that the kernels replace: a full transform, einsum, and a full transform back."""
    X = torch.fft.rfft(x, dim=time_dim).narrow(time_dim, 0, weight.shape[2])
    Y = torch.einsum(
        "...ki,iok->...ko",
        X.movedim((time_dim, channel_dim), (-2, -1)),
        torch.view_as_complex(weight),
    )
    Y = Y.movedim((-2, -1), (time_dim, channel_dim))
    return torch.fft.irfft(Y, n=x.shape[time_dim], dim=time_dim)


# Relative root mean square error of values that are rounded to float32 once, eps / sqrt(12) times
# the mean of ulp(x) / (eps x), 0.7: what an error of twice that of eager is allowed on top.
ONE_ROUNDING = 2.4e-8


@pytest.mark.parametrize(
    ("shape", "O", "K", "time_dim", "channel_dim"),
    [
        ((1, 4, 256, 32, 32), 256, 2, 1, 2),
        ((1, 16, 64, 16, 16), 64, 8, 1, 2),
        ((4, 64, 1024), 64, 32, 2, 1),
        ((2, 4096, 8, 8), 8, 64, 1, 2),
        ((2, 8, 4096), 8, 64, 2, 1),
        ((1, 4, 2048, 8), 6, 3, 1, 2),
        ((1, 4, 8192, 8), 64, 2, 1, 2),
        ((2, 2048, 64), 8, 8, 2, 1),
        ((128, 4, 8, 32, 32), 8, 2, 1, 2),
    ],
    ids=str,
)
def test_error_is_that_of_the_eager_layer(
    shape: tuple[int, ...], O: int, K: int, time_dim: int, channel_dim: int
) -> None:
    torch.manual_seed(0)
    axes = {"time_dim": time_dim, "channel_dim": channel_dim}
    x, weight = torch.randn(shape), torch.randn(shape[channel_dim], O, K, 2)
    n = shape[time_dim]

    def eager(dtype: torch.dtype) -> tuple[Tensor, ...]:
        inputs = (x.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_())
        y = eager_layer(*inputs, time_dim, channel_dim)
        return (y.detach(), *torch.autograd.grad(y, inputs, g.to(dtype)))

    g = torch.randn(eager_layer(x, weight, time_dim, channel_dim).shape)
    ours = (
        cpu.spectral_conv(x, weight, n=n, **axes)[0],
        cpu.spectral_conv(g, weight, n=n, adjoint=True, **axes)[0],
        cpu.spectral_conv_weight_grad(x, g, K, **axes),
    )
    for result, of_eager, exact in zip(
        ours, eager(torch.float32), eager(torch.float64), strict=True
    ):
        error = relative_error(result, exact)
        assert error <= 1e-6
        assert error <= 2 * relative_error(of_eager, exact) + ONE_ROUNDING


@pytest.mark.parametrize(("shape", "dim"), [((8, 4096), 1), ((4096, 8), 0)], ids=str)
@pytest.mark.parametrize("K", [32, 200])
def test_error_of_long_transforms_is_that_of_fft(shape: tuple[int, int], dim: int, K: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(shape)
    pairs = torch.randn((*shape[:dim], K, *shape[dim + 1 :], 2))
    pairs.select(dim, 0)[..., 1] = 0.0
    forward, back = cpu.truncated_rfft(x, K, dim=dim), cpu.truncated_irfft(pairs, 4096, dim=dim)
    for ours, function in (
        (forward, lambda dtype: reference.truncated_rfft(x.to(dtype), K, dim=dim)),
        (back, lambda dtype: reference.truncated_irfft(pairs.to(dtype), 4096, dim=dim)),
    ):
        exact = function(torch.float64)
        limit = 2 * relative_error(function(torch.float32), exact) + ONE_ROUNDING
        assert relative_error(ours, exact) <= limit
