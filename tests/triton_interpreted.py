"""Every Triton kernel in the interpreter. Run by test_triton_interpret.py with TRITON_INTERPRET=1;
not collected alone.

Shapes are tiny but odd: an interpreted program costs milliseconds. Rounding is done with integers
(arithmetic.py), so each precision shows its true error here; what the interpreter cannot show is
the compiler (test_triton_aot.py).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

import dsno_kernels as dk
from dsno_kernels.backends import reference
from dsno_kernels.backends import triton as backend
from dsno_kernels.backends.triton import (
    configs,
    kernels_general,
    kernels_weight_grad,
    launch,
    weight_grad,
)
from dsno_kernels.backends.triton.arithmetic import multiply_add
from tests.helpers import BUDGETS, IO_BUDGET, assert_close

SLOPE = 0.1
# Half a unit in the last of float16's 11 bits of mantissa is 4.9e-4, about 2e-4 as relative RMS.
FLOAT16_BUDGET = BUDGETS["tf32"]

# T, n, K, I, O, batch, pixels
SHAPES = {
    "one_time": (1, 1, 1, 3, 5, (2,), (7, 5)),
    "two_times_nyquist": (2, 2, 2, 7, 3, (2,), (7, 5)),
    "odd_three": (3, 3, 2, 5, 7, (1,), (7, 5)),
    "dsno": (4, 4, 2, 7, 7, (2,), (7, 5)),
    "dsno_nyquist": (4, 4, 3, 7, 9, (2,), (7, 5)),
    "dsno_channel_blocks": (4, 4, 2, 48, 17, (1,), (5, 3)),
    "odd_five": (5, 5, 3, 7, 7, (1,), (7, 5)),
    "seven_one_mode": (7, 7, 1, 3, 4, (2, 2), (3,)),
    "eight_all_modes": (8, 8, 5, 7, 3, (1,), (7, 5)),
    "nine": (9, 9, 5, 7, 5, (2,), (3, 3)),
    "sixteen_nyquist": (16, 16, 9, 3, 5, (1,), (7,)),
    "seventeen_few_modes": (17, 17, 2, 18, 3, (1,), (7, 5)),
    "one_pixel": (9, 9, 2, 3, 2, (2,), (1,)),
    "no_pixels": (4, 4, 2, 7, 5, (11,), ()),
    "longer": (4, 6, 3, 5, 7, (1,), (7, 5)),
    "shorter": (7, 4, 3, 5, 7, (1,), (7, 5)),
    "shorter_from_general": (18, 4, 3, 5, 7, (1,), (9,)),
    "longer_to_general": (8, 18, 5, 3, 4, (1,), (9,)),
}
SOME = ("dsno", "eight_all_modes", "nine")


def problem(name: str, adjoint: bool = False) -> tuple[Tensor, Tensor, Tensor, dict[str, int]]:
    """x, the weight, a tensor of y's shape, and the axes and modes."""
    T, n, K, I, O, batch, pixels = SHAPES[name]
    weight = torch.randn(I, O, K, 2)
    if adjoint:
        I, O = O, I
    x = torch.randn(*batch, T, I, *pixels)
    y = torch.randn(*batch, n, O, *pixels)
    return x, weight, y, {"time_dim": len(batch), "channel_dim": len(batch) + 1}


def wide(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def check_conv(budget: float, x: Tensor, weight: Tensor, **options: Any) -> None:
    """The backend against the reference in float64; the sign bits against those of the backend's
    own y.
    """
    y, positive = backend.spectral_conv(x, weight, **options)
    exact = {
        key: wide(value) for key, value in options.items() if key not in ("out_dtype", "precision")
    }
    expected, expected_positive = reference.spectral_conv(x.double(), weight.double(), **exact)
    assert y.dtype == options.get("out_dtype", torch.float32)
    assert_close(y, expected, budget)
    if options.get("save_positive"):
        assert positive is not None and expected_positive is not None
        h = exact | {"negative_slope": None, "residual": None, "save_positive": False}
        sure = reference.spectral_conv(x.double(), weight.double(), **h)[0].abs() > 4 * budget
        axes = options["time_dim"], options["channel_dim"]
        mask = reference.pack_positive(sure.float(), *axes)
        assert torch.equal(positive & mask, expected_positive & mask)
        assert torch.equal(
            positive & ~reference.pack_positive(torch.ones_like(y), *axes),
            torch.zeros_like(positive),
        )


def table_with(fp32: str) -> configs.Architecture:
    """The newest table whose fp32 products and transforms use the given method."""
    return [t for t in configs.ARCHITECTURES.values() if t.fp32_method == fp32][-1]


@pytest.mark.parametrize("method", ["ieee", "tf32x3"])
@pytest.mark.parametrize("name", SHAPES)
def test_spectral_conv_with_epilogue(
    name: str, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "architecture", lambda device: table_with(method))
    x, weight, residual, axes = problem(name)
    check_conv(
        BUDGETS["fp32"], x, weight, n=residual.shape[axes["time_dim"]],
        bias=torch.randn(weight.shape[1]),
        residual=residual, negative_slope=SLOPE, save_positive=True, **axes,
    )  # fmt: skip


@pytest.mark.parametrize("name", SHAPES)
def test_adjoint(name: str) -> None:
    x, weight, y, axes = problem(name, adjoint=True)
    check_conv(BUDGETS["fp32"], x, weight, n=y.shape[axes["time_dim"]], adjoint=True, **axes)


@pytest.mark.parametrize("precision", BUDGETS)
@pytest.mark.parametrize("adjoint", [False, True])
@pytest.mark.parametrize("name", ["dsno_channel_blocks", "eight_all_modes", "nine", "longer"])
def test_packed_weights(
    name: str, adjoint: bool, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU without multiprocessors any problem takes more than one wave, and so the wide rows,
    which pack.
    """
    wide_rows = dataclasses.replace(table_with("tf32x3"), multiprocessors=0)
    monkeypatch.setattr(launch, "architecture", lambda device: wide_rows)
    x, weight, y, axes = problem(name, adjoint)
    n = y.shape[axes["time_dim"]]
    check_conv(BUDGETS[precision], x, weight, n=n, adjoint=adjoint, precision=precision, **axes)


@pytest.mark.parametrize("name", ["dsno_nyquist", "nine", "longer", "no_pixels"])
def test_adjoint_after_leaky_relu(name: str) -> None:
    x, weight, y, axes = problem(name, adjoint=True)
    positive = reference.pack_positive(torch.randn_like(x), **axes)
    check_conv(
        BUDGETS["fp32"], x, weight, n=y.shape[axes["time_dim"]], adjoint=True, x_positive=positive,
        negative_slope=SLOPE, **axes,
    )  # fmt: skip


@pytest.mark.parametrize("precision", ["bf16x3", "tf32", "bf16"])
@pytest.mark.parametrize("name", ["dsno_channel_blocks", "eight_all_modes", "seventeen_few_modes"])
def test_precisions(name: str, precision: str) -> None:
    x, weight, y, axes = problem(name)
    n = y.shape[axes["time_dim"]]
    check_conv(BUDGETS[precision], x, weight, n=n, precision=precision, **axes)
    check_conv(
        BUDGETS[precision],
        y,
        weight,
        n=x.shape[axes["time_dim"]],
        precision=precision,
        adjoint=True,
        **axes,
    )
    check_weight_grad(BUDGETS[precision], x, y, weight.shape[2], precision=precision, **axes)


@pytest.mark.parametrize(
    ("dtype", "budget"), [(torch.float16, FLOAT16_BUDGET), (torch.bfloat16, IO_BUDGET)]
)
@pytest.mark.parametrize("name", SOME)
def test_half_precision_tensors(name: str, dtype: torch.dtype, budget: float) -> None:
    x, weight, y, axes = problem(name)
    x, y = x.to(dtype), y.to(dtype)
    check_conv(budget, x, weight, n=y.shape[axes["time_dim"]], residual=y, out_dtype=dtype, **axes)
    check_weight_grad(BUDGETS["fp32"], x, y, weight.shape[2], **axes)


def check_weight_grad(budget: float, x: Tensor, grad: Tensor, modes: int, **options: Any) -> None:
    actual = backend.spectral_conv_weight_grad(x, grad, modes, **options)
    options.pop("precision", None)
    expected = reference.spectral_conv_weight_grad(x.double(), grad.double(), modes, **options)
    assert_close(actual, expected, budget)
    if x.shape[options["time_dim"]] == grad.shape[options["time_dim"]]:
        assert (actual[:, :, 0, 1] == 0).all(), "the imaginary part of bin 0 reaches nothing"


@pytest.mark.parametrize("method", ["ieee", "tf32x3"])
@pytest.mark.parametrize("name", SHAPES)
def test_weight_grad(name: str, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "architecture", lambda device: table_with(method))
    x, weight, y, axes = problem(name)
    check_weight_grad(BUDGETS["fp32"], x, y, weight.shape[2], **axes)


@pytest.mark.parametrize("name", ["dsno", "nine"])
def test_weight_grad_after_leaky_relu(name: str) -> None:
    x, weight, y, axes = problem(name)
    positive = reference.pack_positive(torch.randn_like(y), **axes)
    check_weight_grad(
        BUDGETS["fp32"], x, y, weight.shape[2], grad_positive=positive, negative_slope=SLOPE, **axes
    )


@pytest.mark.parametrize(("T", "modes"), [(4, 2), (9, 2)])
def test_weight_grad_split_over_pixels(T: int, modes: int) -> None:
    x, y = torch.randn(5, T, 3, 7, 13), torch.randn(5, T, 5, 7, 13)
    table = launch.architecture(torch.device("cpu"))
    assert weight_grad.split_rows(5 * 96, 32, 1, table.multiprocessors)[1] > 1
    check_weight_grad(BUDGETS["fp32"], x, y, modes, time_dim=1, channel_dim=2)


def layouts() -> dict[str, tuple[Tensor, int, int]]:
    """x of 4 times and 6 channels in many memory orders, with its time and channel axes."""
    return {
        "time_before_channels": (torch.randn(2, 4, 6, 3, 5), 1, 2),
        "time_after_channels": (torch.randn(2, 6, 4, 3, 5), 2, 1),
        "time_last": (torch.randn(5, 6, 4), 2, 1),
        "channels_last_axis": (torch.randn(5, 4, 6), 1, 2),
        "channels_first": (torch.randn(6, 4, 5), 1, 0),
        "channels_last_memory": (torch.randn(2, 4, 3, 5, 6).movedim(-1, 2), 1, 2),
        "time_last_memory": (torch.randn(2, 6, 3, 5, 4).movedim(-1, 1), 1, 2),
        "sliced": (torch.randn(3, 8, 6, 3, 12)[1:, ::2, :, :, 3:8], 1, 2),
        "stride_zero": (torch.randn(1, 1, 1, 1, 1).expand(2, 4, 6, 3, 5), 1, 2),
        "stride_zero_time": (torch.randn(2, 1, 6, 3, 5).expand(2, 4, 6, 3, 5), 1, 2),
        "half_of_a_row": (torch.randn(2, 4, 6, 3, 10)[..., ::2], 1, 2),
    }


@pytest.mark.parametrize("name", layouts())
def test_layouts(name: str) -> None:
    x, time_dim, channel_dim = layouts()[name]
    axes = {"time_dim": time_dim, "channel_dim": channel_dim}
    weight = torch.randn(6, 6, 2, 2).transpose(0, 1)
    before = x.clone()
    check_conv(
        BUDGETS["fp32"], x, weight, n=4, residual=x, negative_slope=SLOPE,
        bias=torch.randn(12)[::2],
        save_positive=True, **axes,
    )  # fmt: skip
    positive = reference.pack_positive(torch.randn_like(x), **axes)
    check_conv(
        BUDGETS["fp32"],
        x,
        weight,
        n=4,
        adjoint=True,
        x_positive=positive,
        negative_slope=SLOPE,
        **axes,
    )
    check_weight_grad(BUDGETS["fp32"], torch.randn(x.shape), x, 2, **axes)
    assert torch.equal(x, before)


@pytest.mark.parametrize("name", ["time_last", "channels_last_memory", "sliced", "stride_zero"])
def test_layouts_of_the_general_kernels(name: str) -> None:
    x, time_dim, channel_dim = layouts()[name]
    axes = {"time_dim": time_dim, "channel_dim": channel_dim}
    repeats = [1] * x.ndim
    weight = torch.randn(6, 5, 2, 2)
    check_conv(BUDGETS["fp32"], x, weight, n=9, save_positive=True, bias=torch.randn(5), **axes)
    repeats[time_dim] = 3
    long = x.repeat(repeats)
    check_conv(BUDGETS["fp32"], long, weight.transpose(0, 1), n=4, adjoint=True, **axes)
    check_weight_grad(BUDGETS["fp32"], long, x, 2, **axes)


@pytest.mark.parametrize("dim", [0, 1, 2])
@pytest.mark.parametrize("shape", [(3, 7, 5), (16, 2, 9), (1, 4, 18)], ids=str)
def test_truncated_transforms(shape: tuple[int, ...], dim: int) -> None:
    x = torch.randn(shape)
    for modes in {1, shape[dim] // 2 + 1}:
        spectrum = backend.truncated_rfft(x, modes, dim=dim)
        assert_close(
            spectrum, reference.truncated_rfft(x.double(), modes, dim=dim), BUDGETS["fp32"]
        )
        pairs = torch.randn_like(spectrum)
        back = backend.truncated_irfft(pairs, shape[dim], dim=dim)
        assert_close(
            back, reference.truncated_irfft(pairs.double(), shape[dim], dim=dim), BUDGETS["fp32"]
        )


def test_truncated_transforms_of_views() -> None:
    x = torch.randn(3, 10, 6, 4)[:, ::2, 1:].transpose(0, 2)
    assert_close(
        backend.truncated_rfft(x, 3, dim=1),
        reference.truncated_rfft(x.double(), 3, dim=1),
        BUDGETS["fp32"],
    )
    pairs = torch.randn(2, 3, 5, 4, 2).transpose(1, 3)[:, ::2]
    assert_close(
        backend.truncated_irfft(pairs, 9, dim=2),
        reference.truncated_irfft(pairs.double(), 9, dim=2),
        BUDGETS["fp32"],
    )


def test_imaginary_parts_that_do_not_exist_are_not_read() -> None:
    pairs = torch.randn(3, 4, 2)
    pairs[:, 0, 1] = pairs[:, 3, 1] = float("nan")
    assert torch.isfinite(backend.truncated_irfft(pairs, 6, dim=1)).all()


@pytest.mark.parametrize("precision", ["fp32", "bf16x3", "tf32", "bf16"])
@pytest.mark.parametrize("T", [4, 9])
def test_nan_stays_where_it_is(T: int, precision: str) -> None:
    x, weight = torch.randn(1, T, 5, 3, 3), torch.randn(5, 5, 2, 2)
    # All bits set, as GPUs write it: integer rounding would turn it into a zero.
    nan = torch.tensor([0x7FFFFFFF], dtype=torch.int32).view(torch.float32)
    x[0, 1, 2, 1, 1] = nan[0]
    y = backend.spectral_conv(x, weight, time_dim=1, channel_dim=2, n=T, precision=precision)[0]
    hit = torch.isnan(y)
    assert hit[..., 1, 1].all() and hit.sum() == T * 5
    grad = backend.spectral_conv_weight_grad(
        x, y.nan_to_num(), 2, time_dim=1, channel_dim=2, precision=precision
    )
    assert torch.isnan(grad[2, :, :, 0]).all() and torch.isfinite(grad[[0, 1, 3, 4]]).all()


def test_spectra_between_kernels_keep_the_range_of_float32() -> None:
    """tf32 stores a bin in 32 bits: neighbors of any size keep their own relative precision."""
    x, weight = torch.randn(1, 16, 5, 9), torch.randn(5, 5, 8, 2)
    x *= torch.logspace(-32, 32, 9)
    y = backend.spectral_conv(x, weight, time_dim=1, channel_dim=2, n=16, precision="tf32")[0]
    expected = reference.spectral_conv(x.double(), weight.double(), time_dim=1, channel_dim=2, n=16)
    for pixel in range(9):
        assert_close(y[..., pixel], expected[0][..., pixel], BUDGETS["tf32"])


@pytest.mark.parametrize("precision", BUDGETS)
@pytest.mark.parametrize("n", [4, 9, 16])
def test_weights_that_reach_nothing_are_not_read(
    n: int, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The imaginary parts of bin 0 and of the Nyquist bin, whatever they hold."""
    monkeypatch.setattr(launch, "architecture", lambda device: configs.ARCHITECTURES[9, 0])
    x, weight = torch.randn(1, n, 5, 3), torch.randn(5, 5, n // 2 + 1, 2)
    options = {"time_dim": 1, "channel_dim": 2, "n": n}
    expected = reference.spectral_conv(x.double(), weight.double(), **options)[0]
    weight[:, :, [0] if n % 2 else [0, -1], 1] = float("nan")
    y = backend.spectral_conv(x, weight, precision=precision, **options)[0]
    assert_close(y, expected, BUDGETS[precision])


@pytest.mark.parametrize(
    ("T", "n", "modes", "real"),
    [(16, 16, 9, 2), (16, 16, 8, 1), (9, 9, 5, 1), (16, 18, 9, 1), (18, 16, 9, 1)],
)
@pytest.mark.parametrize("capability", [(8, 6), (9, 0)], ids="sm_{0[0]}{0[1]}".format)
def test_a_real_bin_is_one_product_where_registers_allow(
    T: int,
    n: int,
    modes: int,
    real: int,
    capability: tuple[int, int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen = []

    def counted(a: Any, b: Any, acc: Any, METHOD: Any) -> Any:
        seen.append(METHOD)
        return multiply_add(a, b, acc, METHOD)

    for module in (kernels_general, kernels_weight_grad):
        monkeypatch.setattr(module, "multiply_add", counted)
    table = configs.ARCHITECTURES[capability]
    assert table.real_bins is (capability == (9, 0))
    monkeypatch.setattr(launch, "architecture", lambda device: table)
    expected = 4 * modes - 3 * real * table.real_bins
    x, y, weight = torch.randn(1, T, 5, 3), torch.randn(1, n, 5, 3), torch.randn(5, 5, modes, 2)
    axes = {"time_dim": 1, "channel_dim": 2, "precision": "bf16x3"}  # not that of the transforms
    backend.spectral_conv(x, weight, n=n, **axes)
    assert seen.count("bf16x3") == expected
    seen.clear()
    backend.spectral_conv_weight_grad(x, y, modes, **axes)
    assert seen.count("bf16x3") == expected


@pytest.mark.parametrize("value", [float("inf"), -float("inf"), 3e38])
def test_what_overflows_stays_where_it_is(value: float) -> None:
    x, weight = torch.randn(1, 9, 5, 3, 3), torch.randn(5, 5, 2, 2)
    x[0, :, 2, 1, 1] = value  # its first bin is beyond float32
    y = backend.spectral_conv(x, weight, time_dim=1, channel_dim=2, n=9, precision="tf32")[0]
    lost = ~torch.isfinite(y)
    assert lost[..., 1, 1].all() and lost.sum() == 9 * 5


@pytest.mark.parametrize("name", ["dsno", "nine"])
def test_runs_are_bit_equal(name: str) -> None:
    x, weight, y, axes = problem(name)
    n = y.shape[axes["time_dim"]]
    first = (
        backend.spectral_conv(x, weight, n=n, **axes)[0],
        backend.spectral_conv_weight_grad(x, y, 2, **axes),
    )
    again = (
        backend.spectral_conv(x, weight, n=n, **axes)[0],
        backend.spectral_conv_weight_grad(x, y, 2, **axes),
    )
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])


@pytest.mark.parametrize(("T", "modes"), [(4, 2), (9, 3)])
def test_public_function_and_gradients(T: int, modes: int) -> None:
    x = torch.randn(2, T, 5, 3, 3, requires_grad=True)
    weight = torch.randn(5, 5, modes, 2, requires_grad=True)
    bias = torch.randn(5, requires_grad=True)
    inputs = x, weight, bias
    exact = [leaf.detach().double().requires_grad_() for leaf in inputs]

    def layer(name: str, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return dk.spectral_conv(
            x, weight, bias=bias, activation="leaky_relu", residual=x, backend=name
        )

    y, expected = layer("triton", *inputs), layer("reference", *exact)
    assert_close(y, expected, BUDGETS["fp32"])
    cotangent = torch.randn_like(y)
    for needed in ([0, 1, 2], [0, 1]):  # without the gradient of the bias, LeakyReLU's is fused
        actual = torch.autograd.grad(y, [inputs[j] for j in needed], cotangent, retain_graph=True)
        wanted = torch.autograd.grad(
            expected, [exact[j] for j in needed], cotangent.double(), retain_graph=True
        )
        for a, e in zip(actual, wanted, strict=True):
            assert_close(a, e, BUDGETS["fp32"])
