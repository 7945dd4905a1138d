"""The CUDA C++ transforms: device code and plans of the GPU, run on the CPU under sanitizers."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dsno_kernels.backends import _transforms, reference
from dsno_kernels.backends._composed import Composed, Launch
from dsno_kernels.backends._transforms import Axis, Plan
from tests import shim
from tests.helpers import FLOAT64, IO_BUDGET, assert_close

SOURCE = (shim.ROOT / "csrc" / "cuda" / "truncated_fft.cuh").read_text()
# float32 sums of at most 512 folded terms: 0.4 * 2^-24 * sqrt(512) = 5.4e-7; the rounding of the
# table adds 3e-8 in quadrature.
FLOAT32 = 6e-7
BUDGETS = {
    torch.float64: FLOAT64,
    torch.float32: FLOAT32,
    torch.float16: FLOAT32,
    torch.bfloat16: FLOAT32,
}

Views = dict[str, Callable[[tuple[int, ...]], Tensor]]


def sliced(shape: tuple[int, ...]) -> Tensor:
    """A view with a storage offset and a gap behind each row: nothing is aligned to 16 bytes."""
    return torch.randn(*shape[:-1], shape[-1] + 3, dtype=torch.float64)[..., 1:-2]


def reversed_axes(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape[::-1], dtype=torch.float64).permute(*reversed(range(len(shape))))


def channels_last(shape: tuple[int, ...]) -> Tensor:
    """Memory order (B, H, W, T, C) for a (B, T, C, H, W) tensor."""
    b, t, c, h, w = shape
    return torch.randn(b, h, w, t, c, dtype=torch.float64).permute(0, 3, 4, 1, 2)


def expanded(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(1, *shape[1:], dtype=torch.float64).expand(shape)


VIEWS: Views = {
    "dense": lambda shape: torch.randn(shape, dtype=torch.float64),
    "sliced": sliced,
    "reversed": reversed_axes,
    "channels_last": channels_last,
    "expanded": expanded,
}

# shape of x, axis, modes, view
RFFT_CASES = [
    pytest.param((2, 5, 7, 5), 1, 3, "dense", id="T5-K3-pixels35"),
    pytest.param((2, 4, 3, 7, 5), 1, 3, "dense", id="T4-K3-nyquist"),
    pytest.param((2, 4, 8, 4, 4), 1, 2, "dense", id="T4-K2-vectors"),
    pytest.param((2, 4, 6, 2, 2), 1, 2, "dense", id="T4-K2-vectors-of-4"),
    pytest.param((3, 16, 4, 3, 3), 1, 9, "channels_last", id="T16-K9-channels_last"),
    pytest.param((3, 8, 6), 1, 5, "sliced", id="T8-K5-sliced"),
    pytest.param((4, 7, 6), 1, 4, "expanded", id="T7-K4-stride0"),
    pytest.param((6, 7, 5), 1, 4, "reversed", id="T7-K4-reversed"),
    pytest.param((1,), 0, 1, "dense", id="T1"),
    pytest.param((2, 3), 1, 2, "dense", id="T3-last"),
    pytest.param((4, 2), 1, 2, "dense", id="T2-K2"),
    pytest.param((300, 4), 1, 3, "dense", id="T4-last-300rows"),
    pytest.param((9, 65), 1, 33, "dense", id="T65-rows"),
    pytest.param((3, 5, 64), 2, 33, "sliced", id="T64-rows-sliced"),
    pytest.param((70, 8), 0, 12, "dense", id="T70-first"),
    pytest.param((70, 8), 0, 12, "reversed", id="T70-first-contiguous"),
    pytest.param((11, 600), 1, 130, "dense", id="T600-K130-rows"),
    pytest.param((1100, 4), 0, 8, "dense", id="T1100-segments"),
    pytest.param((2, 4096), 1, 16, "dense", id="T4096-rows"),
]

# shape of the spectrum without the pairs, axis, n, view
IRFFT_CASES = [
    pytest.param((2, 3, 7, 5), 1, 5, "dense", id="n5-K3-pixels35"),
    pytest.param((2, 3, 3, 7, 5), 1, 4, "dense", id="n4-K3-nyquist"),
    pytest.param((2, 2, 8, 4, 4), 1, 4, "dense", id="n4-K2-vectors"),
    pytest.param((2, 5, 8, 4), 1, 16, "dense", id="n16-K5-vectors"),
    pytest.param((3, 9, 4, 3, 3), 1, 16, "channels_last", id="n16-K9-channels_last"),
    pytest.param((4, 4, 6), 1, 7, "expanded", id="n7-K4-stride0"),
    pytest.param((6, 4, 5), 1, 7, "reversed", id="n7-K4-reversed"),
    pytest.param((1,), 0, 1, "dense", id="n1"),
    pytest.param((3, 1), 1, 2, "dense", id="n2-K1"),
    pytest.param((300, 3), 1, 4, "dense", id="n4-last-300rows"),
    pytest.param((9, 33), 1, 65, "dense", id="n65-rows"),
    pytest.param((3, 5, 33), 2, 64, "sliced", id="n64-rows-sliced"),
    pytest.param((12, 8), 0, 70, "dense", id="n70-first"),
    pytest.param((11, 300), 1, 600, "dense", id="n600-K300-rows"),
]


@pytest.fixture(scope="session")
def launch(tmp_path_factory: pytest.TempPathFactory) -> Launch:
    return shim.sanitized_launch(tmp_path_factory.mktemp("shim"))


@pytest.fixture(scope="session")
def ops(launch: Launch) -> Composed:
    """The ops of the CUDA backends on CPU tensors, under AddressSanitizer and UBSan."""
    return Composed(launch)


def spectrum_view(view: str, shape: tuple[int, ...]) -> Tensor:
    """A spectrum as real pairs: pairs adjacent, except where the view itself separates them."""
    return (
        torch.stack((VIEWS[view](shape), VIEWS[view](shape)), -1)
        if view == "dense"
        else planar(view, shape)
    )


def planar(view: str, shape: tuple[int, ...]) -> Tensor:
    """Real parts first, then imaginary parts, as a view with the pairs last."""
    part = VIEWS[view](shape)
    both = torch.randn(2, part.numel(), dtype=torch.float64)
    dense_strides = torch.empty_like(part).stride()
    strides = [
        0 if stride == 0 else dense
        for stride, dense in zip(part.stride(), dense_strides, strict=True)
    ]
    return both.as_strided((*shape, 2), (*strides, both.stride(0)))


def convert(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Another dtype with the same strides, gaps and offsets included."""
    if dtype == x.dtype:
        return x
    storage = torch.empty(x.untyped_storage().nbytes() // x.element_size(), dtype=dtype)
    result = storage.as_strided(x.shape, x.stride(), x.storage_offset())
    return result.copy_(x) if 0 not in x.stride() else x[:1].to(dtype).expand(x.shape)


DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "dim", "modes", "view"), RFFT_CASES)
def test_truncated_rfft(
    ops: Composed, shape: tuple[int, ...], dim: int, modes: int, view: str, dtype: torch.dtype
) -> None:
    x = convert(VIEWS[view](shape), dtype)
    expected = reference.truncated_rfft(x.double(), modes, dim=dim)
    assert_close(ops.truncated_rfft(x, modes, dim=dim), expected, BUDGETS[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("shape", "dim", "n", "view"), IRFFT_CASES)
def test_truncated_irfft(
    ops: Composed, shape: tuple[int, ...], dim: int, n: int, view: str, dtype: torch.dtype
) -> None:
    spectrum = convert(spectrum_view(view, shape), dtype)
    expected = reference.truncated_irfft(spectrum.double(), n, dim=dim)
    assert_close(ops.truncated_irfft(spectrum, n, dim=dim), expected, BUDGETS[dtype])


def test_a_spectrum_in_half_precision_is_widened(ops: Composed) -> None:
    spectrum = torch.randn(3, 4, 2, dtype=torch.bfloat16)
    found = ops.truncated_irfft(spectrum, 7, dim=1)
    assert_close(found, reference.truncated_irfft(spectrum.double(), 7, dim=1), FLOAT32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("columns", "n"), [(8, 16), (8, 4), (7, 16), (1, 70)], ids=["v4-c8", "v4-c4", "v1", "rows"]
)
def test_a_result_in_half_precision(
    launch: Launch, dtype: torch.dtype, columns: int, n: int
) -> None:
    """The inverse rounds as it writes: no second pass over the result of a convolution."""
    modes = 3
    spectrum = torch.randn(modes, columns, 2)
    y = torch.empty(n, columns, dtype=dtype)
    plan = half_plan(dtype, columns, n, modes)
    launch(plan, spectrum, y, _transforms.twiddles(n, modes, True, n).float())
    exact = reference.truncated_irfft(spectrum.double(), n, dim=0)
    assert_close(y, exact, IO_BUDGET)
    # To the nearest number: at most half a unit in the last place away, but for float32's error.
    ulp = torch.finfo(dtype).eps * exact.abs().log2().floor().exp2()
    assert ((y.double() - exact).abs() <= 0.5 * ulp + 1e-6).all()


def half_plan(dtype: torch.dtype, columns: int, n: int, modes: int) -> Plan:
    axes = (Axis(columns, 2, 1),)
    kind = _transforms.TYPES[dtype]
    return _transforms.plan(kind, True, n, modes, axes, 2 * columns, 1, columns, 0)


def test_the_cases_reach_every_kernel(ops: Composed) -> None:
    reached: set[str] = set()

    def record(plan: Plan, source: Tensor, target: Tensor, table: Tensor) -> None:
        reached.add(plan.kernel)

    recorder = Composed(record)
    for dtype in DTYPES:
        for shape, dim, modes, view in (case.values for case in RFFT_CASES):
            recorder.truncated_rfft(convert(VIEWS[view](shape), dtype), modes, dim=dim)
        for shape, dim, n, view in (case.values for case in IRFFT_CASES):
            recorder.truncated_irfft(convert(spectrum_view(view, shape), dtype), n, dim=dim)
    for dtype in (torch.float16, torch.bfloat16):
        for columns, n in ((8, 16), (8, 4), (7, 16), (1, 70)):
            reached.add(half_plan(dtype, columns, n, 3).kernel)
    assert reached == set(re.findall(r"^    X\((\w+),", SOURCE, re.MULTILINE))


def test_the_plans_and_the_device_code_name_the_same_kernels() -> None:
    defined = re.findall(r"X\((truncated_(i?)rfft_columns_(\w+)_v(\d)_c(\d)),", SOURCE)
    pairs = {(bool(inverse), kind, int(v), int(c)) for _, inverse, kind, v, c in defined}
    assert pairs == {
        (*key, *variant) for key, variants in _transforms.VARIANTS.items() for variant in variants
    }


@pytest.mark.parametrize("n", [1, 2, 7, 8, 4096])
def test_twiddles_are_exact_and_dead_parts_are_zero(n: int) -> None:
    table = _transforms.twiddles(n, n // 2 + 1, inverse=False)
    live = torch.polar(
        torch.ones(n, dtype=torch.float64),
        torch.arange(n, dtype=torch.float64) * (-2 * torch.pi / n),
    )
    phase = torch.arange(n // 2 + 1)[:, None] * torch.arange(n // 2 + 1) % n
    assert_close(torch.view_as_complex(table)[:, : n // 2 + 1], live[phase], FLOAT64)
    assert table[0, :, 1].abs().max() == 0
    assert table[:, 0, 1].abs().max() == 0


@pytest.mark.parametrize(
    ("n", "layout"), [(8, (8, 6)), (8, (8, 8)), (70, (2, 70))], ids=["scalar", "vector", "rows"]
)
def test_bins_without_an_imaginary_part(ops: Composed, n: int, layout: tuple[int, ...]) -> None:
    """They come out as exactly zero, and what stands in their place never reaches the result."""
    dim = layout.index(n)
    x = torch.randn(layout)
    spectrum = ops.truncated_rfft(x, n // 2 + 1, dim=dim)
    dead = spectrum.select(-1, 1).index_select(dim, torch.tensor([0, n // 2]))
    assert dead.abs().max() == 0
    dead_index = [slice(None)] * spectrum.ndim
    dead_index[dim], dead_index[-1] = torch.tensor([0, n // 2]), 1
    spectrum[tuple(dead_index)] = torch.nan
    back = ops.truncated_irfft(spectrum, n, dim=dim)
    assert_close(back, x.double(), FLOAT32)


@pytest.mark.parametrize("shape", [(4, 8), (4, 70)], ids=["columns", "rows"])
def test_nan_stays_in_its_transform(ops: Composed, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    x[1, 3] = torch.nan
    spectrum = ops.truncated_rfft(x, 3, dim=1)
    assert spectrum[1, :, 0].isnan().all()
    assert not spectrum[[0, 2, 3]].isnan().any()


def test_no_thread_reads_what_another_one_still_writes(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """The kernels that use shared memory, under ThreadSanitizer."""
    ops = Composed(shim.sanitized_launch(tmp_path_factory.mktemp("tsan"), "tsan"))
    x = torch.randn(11, 600)
    spectrum = ops.truncated_rfft(x, 301, dim=1)
    assert_close(ops.truncated_irfft(spectrum, 600, dim=1), x.double(), 2 * FLOAT32)


def test_many_rows_give_each_output_a_thread(ops: Composed) -> None:
    """Few rows spread the terms of an output over a block; many rows take the other path."""
    x = torch.randn(2051, 130)
    spectrum = ops.truncated_rfft(x, 66, dim=1)
    assert_close(spectrum, reference.truncated_rfft(x.double(), 66, dim=1), FLOAT32)
    back = ops.truncated_irfft(spectrum, 130, dim=1)
    assert_close(back, x.double(), FLOAT32)


@pytest.mark.parametrize("shape", [(5, 16, 9), (40, 130)], ids=["columns", "rows"])
def test_two_runs_are_bit_equal(ops: Composed, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    first = ops.truncated_rfft(x, 5, dim=1)
    second = ops.truncated_rfft(x, 5, dim=1)
    assert torch.equal(first, second)


def test_offsets_are_64_bit() -> None:
    """A plan for 2^33 elements keeps its numbers whole; the kernels hold them as `long long`."""
    axes = (Axis(2, 2**32, 2**31), Axis(2**30, 1, 1))
    plan = _transforms.plan("f32", False, 4, 2, axes, 2**30, 0, 2**30, 0)
    assert 2**32 in plan.numbers
    assert plan.grid < 2**31
    body = SOURCE[
        SOURCE.index("struct TruncatedFftParams") : SOURCE.index("constexpr i64 kSegment")
    ]
    types = set(re.findall(r"^    ([\w* ]+) \w+[,;]", body, re.MULTILINE))
    assert types == {"i64", "const void*", "void*"}
