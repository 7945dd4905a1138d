"""abs_rank on CUDA: device code and parameters of the GPU, run on the CPU plain and under
sanitizers.
"""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dsno_kernels.backends import cpu, cuda_steps, reference
from dsno_kernels.backends.cuda_steps import Steps
from tests import step_shim, test_threshold

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
parametrize_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Steps:
    return Steps(step_shim.plain_launch(tmp_path_factory.mktemp("plain")))


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> Steps:
    """Under AddressSanitizer and UBSan."""
    return Steps(step_shim.sanitized_launch(tmp_path_factory.mktemp("sanitized")))


@pytest.fixture(params=["one_block", "several_blocks"])
def shared(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether blocks share samples of more than 400 elements."""
    if request.param == "several_blocks":
        monkeypatch.setattr(cuda_steps, "_SHARE", 400)
    return bool(request.param == "several_blocks")


def check(steps: Steps, x: Tensor) -> None:
    """Equal values count in the order of their places, as a stable sort leaves them."""
    size = x[0].numel()
    for rank in sorted({0, size // 3, size - 1}):
        assert torch.equal(steps.abs_rank(x, rank), reference.abs_rank(x, rank)), rank


@parametrize_dtypes
@pytest.mark.parametrize("shape", [(3, 1), (3, 7), (2, 3, 11, 31)], ids=str)
def test_places_are_those_of_a_stable_sort(
    plain: Steps, shared: bool, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    """Samples that begin anywhere between vectors; halves have many equal values."""
    check(plain, torch.randn(shape).to(dtype))


def test_places_of_three_digits(plain: Steps) -> None:
    x = torch.randn(1, 70001)
    assert torch.equal(plain.abs_rank(x, 69000), reference.abs_rank(x, 69000))


def test_one_launch_or_one_for_each_digit(plain: Steps, monkeypatch: pytest.MonkeyPatch) -> None:
    names: list[tuple[str, int]] = []
    steps = Steps(lambda kernel, grid, *rest: names.append((kernel, grid)))
    steps.abs_rank(torch.zeros(8, 3, 64, 64), 5)
    assert names == [("abs_rank_w4", 8)]
    names.clear()
    steps.abs_rank(torch.zeros(2, 3, 256, 256), 5)  # 4 digits of a key and 3 of a place
    assert names == [*[("abs_rank_pass_w4", 24)] * 7, ("abs_rank_pass_w4", 2)]


@parametrize_dtypes
def test_equal_values_zeros_and_infinities(plain: Steps, shared: bool, dtype: torch.dtype) -> None:
    special = torch.tensor([0.0, -0.0, 1.0, -1.0, math.inf, -math.inf, 6e-8, 2.0])
    x = special[torch.randint(8, (3, 901))].to(dtype)
    check(plain, x)
    check(plain, torch.ones(2, 901, dtype=dtype))
    check(plain, torch.full((2, 901), -math.inf, dtype=dtype))


@parametrize_dtypes
def test_a_sample_with_nan(plain: Steps, shared: bool, dtype: torch.dtype) -> None:
    x = torch.randn(3, 901).to(dtype)
    x[1, 200], x[2, 7], x[2, 11] = math.nan, math.nan, -math.nan
    for rank in (0, 450, 900):
        places = plain.abs_rank(x, rank)
        assert torch.equal(places[0], reference.abs_rank(x, rank)[0])
        assert places[1].tolist() == [200, 200]
        assert places[2, 0] == places[2, 1] and bool(x[2, places[2]].isnan().all())


@pytest.mark.parametrize("shape", [(2, 901), (1, 1)], ids=str)
@parametrize_dtypes
def test_only_its_own_memory_is_touched(
    sanitized: Steps, shared: bool, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    for x in (torch.randn(shape).to(dtype), torch.randn(2, 901).to(dtype)[1:, 3:]):
        rank = x.shape[1] // 2
        assert torch.equal(sanitized.abs_rank(x, rank), reference.abs_rank(x, rank))


def test_few_blocks_do_the_work_of_many(tmp_path: Path, shared: bool) -> None:
    """A grid smaller than the work, under ThreadSanitizer."""
    inner = step_shim.sanitized_launch(tmp_path, "tsan")
    steps = Steps(lambda kernel, grid, *rest: inner(kernel, min(grid, 2), *rest))
    x = torch.randn(5, 901).bfloat16()
    assert torch.equal(steps.abs_rank(x, 450), reference.abs_rank(x, 450))


@pytest.fixture
def behind_the_op(plain: Steps, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "abs_rank", plain.abs_rank)


def test_the_cpu_kernel_s_tests(behind_the_op: None, shared: bool) -> None:
    test_threshold.test_ties_zeros_and_infinities_have_places_of_their_own("cpu")
    test_threshold.test_a_sample_with_nan_is_nan_and_leaves_the_others("cpu")
    test_threshold.test_both_published_definitions(1.5, "diffusers", "cpu")
