"""`noised` and `denoising_loss` on CUDA: device code and parameters of the GPU, run on the CPU."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

import dsno_kernels as dk
from dsno_kernels.backends import cpu, reference_denoising
from dsno_kernels.backends.cuda_denoising import Denoising
from tests import shim, step_shim
from tests import test_denoising as on_the_cpu
from tests.cupy_double import Array
from tests.helpers import FLOAT64, IO_BUDGET, assert_close
from tests.strategies import tensor
from tests.test_cuda_compile import cuobjdump
from tests.test_cupy import cupy, dkc  # noqa: F401
from tests.test_exp_step import STEP

F32, F16, BF16, F64 = torch.float32, torch.float16, torch.bfloat16, torch.float64
BUDGETS = {F64: FLOAT64, F32: STEP, F16: IO_BUDGET, BF16: IO_BUDGET}
MIXED = (F32, BF16, F16)
# With a form of the coefficients each.
SIZES = [(3, "numbers"), (4, "shared"), (35, "bfloat16"), (520, "strided"), (1031, "samples")]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Denoising:
    return Denoising(step_shim.plain_launch(tmp_path_factory.mktemp("plain")))


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> Denoising:
    """Under AddressSanitizer and UBSan."""
    return Denoising(step_shim.sanitized_launch(tmp_path_factory.mktemp("sanitized")))


def coefficients(form: str, count: int, B: int) -> dict[str, Any]:
    """Coefficients of every form that the ops take."""
    table = torch.rand(B, count, dtype=F64) + 0.25
    if form == "numbers":
        return {"coefficients": [None] * count, "values": table[0].tolist()}
    columns = {
        "samples": table.T.contiguous(),
        "shared": table[0],
        "bfloat16": table.T.bfloat16(),
        "strided": table.float().T,
    }[form]
    return {"coefficients": list(columns.unbind()), "values": [0.0] * count}


def check(
    denoising: Denoising,
    images: Tensor,
    output: Tensor,
    noise: Tensor,
    form: str,
    drawn: bool,
    out_dtype: torch.dtype,
) -> None:
    """Both ops against their formulas in float64, the loss twice to the same bits."""
    B, wide = len(images), F64 in (images.dtype, output.dtype, noise.dtype)
    seeds = torch.randint(-(2**63), 2**63 - 1, (B,)) if drawn else None
    given = {"noise": None if drawn else noise, "seeds": seeds}
    exact_given = given | {"noise": None if drawn else noise.double()}
    options = coefficients(form, 2, B)
    y = denoising.noised(images, **given, **options, out_dtype=out_dtype)
    exact = reference_denoising.noised(images.double(), **exact_given, **options, out_dtype=F64)
    assert y.dtype == out_dtype
    rounding = max(BUDGETS[out_dtype], 0.0 if F64 in (images.dtype, out_dtype) else STEP)
    if drawn and images.dtype != F64:  # the noise of narrower images is drawn in float32
        rounding = max(rounding, on_the_cpu.NOISE)
    assert_close(y, exact, rounding)
    options = coefficients(form, 4, B) | {"ceiling": 0.8}
    options["mean"] = False
    loss, grad = denoising.denoising_loss(output, images, **given, **options, grad_dtype=out_dtype)
    right, slope = reference_denoising.denoising_loss(
        output.double(), images.double(), **exact_given, **options, grad_dtype=F64
    )
    assert loss.dtype == (F64 if wide else F32)
    assert_close(loss, right, FLOAT64 if wide else 4 * STEP)
    assert grad.dtype == out_dtype
    assert_close(grad, slope, max(BUDGETS[out_dtype], FLOAT64 if wide else 4 * STEP))
    again, none = denoising.denoising_loss(output, images, **given, **options, grad_dtype=None)
    assert torch.equal(again, loss) and none is None
    options["mean"] = True
    mean, same = denoising.denoising_loss(output, images, **given, **options, grad_dtype=out_dtype)
    assert mean.shape == () and mean.dtype == loss.dtype and torch.equal(same, grad)
    assert_close(mean, right.mean(), FLOAT64 if wide else 4 * STEP)
    for count in (1, B):  # of what an upstream gradient may be: of the mean, or of each loss
        upstream = torch.rand((B,) if count == B else (), dtype=loss.dtype)
        unit = torch.full((), 1 / count, dtype=loss.dtype)
        scaled = grad.clone()
        denoising.denoising_scale_(scaled, upstream)
        rows = upstream.double().expand(B)[:, None] * count
        assert_close(scaled, rows * grad.double(), BUDGETS[out_dtype])
        denoising.denoising_scale_(scaled.copy_(grad), unit.expand(upstream.shape))
        assert torch.equal(scaled, grad)


@pytest.mark.parametrize("drawn", [False, True])
@pytest.mark.parametrize(("size", "form"), SIZES)
@pytest.mark.parametrize("dtypes", [(F32,), (BF16,), (F64,), MIXED, (F16, F64)], ids=str)
def test_values(
    plain: Denoising, dtypes: tuple[torch.dtype, ...], size: int, form: str, drawn: bool
) -> None:
    """Samples that begin and end anywhere between vectors."""
    tensors = [torch.randn(3, size).to(dtypes[j % len(dtypes)]) for j in range(3)]
    check(plain, *tensors, form, drawn, dtypes[-1])


@pytest.mark.parametrize("drawn", [False, True])
@pytest.mark.parametrize("dtypes", [(F32,), MIXED, (F64, F32)], ids=str)
@pytest.mark.parametrize("memory", ["contiguous", "offset"])
def test_only_their_memory_is_touched(
    sanitized: Denoising, memory: str, dtypes: tuple[torch.dtype, ...], drawn: bool
) -> None:
    for size, form in ((1, "samples"), (36, "shared"), (1031, "strided")):
        tensors = [tensor((3, size), dtypes[j % len(dtypes)], memory, (0, 1)) for j in range(3)]
        check(sanitized, *tensors, form, drawn, dtypes[0])


@pytest.fixture
def behind_the_ops(plain: Denoising, monkeypatch: pytest.MonkeyPatch) -> None:
    """The device code in place of the CPU kernels, so that their tests are its tests."""
    for name in ("noised", "denoising_loss", "denoising_scale_"):
        monkeypatch.setattr(cpu, name, getattr(plain, name))


@pytest.mark.parametrize("given", ["noise", "seeds"])
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_edm(behind_the_ops: None, dtype: torch.dtype, given: str) -> None:
    on_the_cpu.test_edm(dtype, given, "cpu")


def test_small_noise_levels(behind_the_ops: None) -> None:
    on_the_cpu.test_small_noise_levels_lose_nothing("cpu")


@pytest.mark.parametrize("size", [1, 2, 3, 8, 35, 513])
def test_noise_is_that_of_the_definition(behind_the_ops: None, size: int) -> None:
    on_the_cpu.test_noise_is_that_of_the_definition(size, "cpu")


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 3, 1), (2, 0, 3, 1)])
def test_noise_depends_on_the_seed_alone(behind_the_ops: None, order: tuple[int, ...]) -> None:
    on_the_cpu.test_noise_depends_on_the_seed_alone(order, "cpu")


def test_zeros_hide(behind_the_ops: None) -> None:
    on_the_cpu.test_a_zero_hides_what_it_multiplies("cpu")


def test_long_sums(behind_the_ops: None) -> None:
    on_the_cpu.test_long_sums_lose_nothing("cpu")


def test_noise_of_the_cpu_kernels(plain: Denoising) -> None:
    zeros, seeds = torch.zeros(3, 1031), torch.tensor(on_the_cpu.SEEDS)
    options = {"coefficients": [None, None], "values": [1.0, 1.0], "out_dtype": F32}
    drawn = plain.noised(zeros, noise=None, seeds=seeds, **options)
    same = dk.noised(zeros, 1.0, seeds=seeds, backend="cpu")
    assert (drawn - same).abs().max() <= 2 * on_the_cpu.NOISE


def test_few_blocks_do_the_work_of_many(tmp_path: Path) -> None:
    """A grid smaller than the work, under ThreadSanitizer: shared memory passes from one sample to
    the next within a block.
    """
    inner = step_shim.sanitized_launch(tmp_path, "tsan")
    denoising = Denoising(lambda kernel, grid, *rest: inner(kernel, min(grid, 2), *rest))
    tensors = [torch.randn(5, 1032) for _ in range(3)]
    for drawn in (False, True):
        check(denoising, *tensors, "samples", drawn, F32)


@pytest.mark.parametrize("arch", ["80", "86", "90"])
def test_memory_moves_by_sixteen_bytes(arch: str, tmp_path: Path) -> None:
    """Of float32: two tensors in and one out of `noised`; three in and one out of the loss; one
    in and out where an upstream gradient scales.
    """
    tool, nvcc = cuobjdump(), shutil.which("nvcc", path="/usr/local/cuda/bin:" + os.environ["PATH"])
    if tool is None or nvcc is None:
        pytest.skip("nvcc or cuobjdump is not installed (the latter comes with triton)")
    kernels, cubin = tmp_path / "kernels.cu", tmp_path / "kernels.cubin"
    kernels.write_text('#include "denoising.cuh"\n')
    flags = ["-O3", "-std=c++17", f"-arch=sm_{arch}", f"-I{shim.ROOT / 'csrc' / 'cuda'}", "-cubin"]
    subprocess.run([nvcc, *flags, str(kernels), "-o", str(cubin)], check=True)
    report = subprocess.run([tool, "-sass", str(cubin)], capture_output=True, text=True, check=True)
    accesses: dict[str, Counter[str]] = {}
    for function in re.split(r"\n\s*Function : ", report.stdout)[1:]:
        found = re.findall(r"\b((?:LD|ST)[GL]?(?:\.\w+)+) ", function)
        accesses[function.split()[0]] = Counter(found)
    for name, found in accesses.items():
        assert not any(kind.startswith(("LDL", "STL", "LD.", "ST.")) for kind in found), name
        wide = [kind for kind in found if kind.endswith(".128")]
        assert bool(wide) == name.endswith(("v2", "v4", "v8")), name
    for op, reads in (("noised", 2), ("loss", 3), ("scale", 1)):
        found = accesses[f"denoising_{op}_f32_v4"]
        assert (found["LDG.E.128"], found["STG.E.128"]) == (reads, 1)


def test_cupy_arrays(dkc: ModuleType) -> None:  # noqa: F811
    x, output, sigma = torch.randn(3, 2, 5), torch.randn(3, 2, 5), torch.rand(3)
    seeds = torch.tensor(on_the_cpu.SEEDS)
    found = dkc.noised(Array(x), Array(sigma), 0.5, seeds=Array(seeds), out_dtype="float16")
    assert torch.equal(found.tensor, dk.noised(x, sigma, 0.5, seeds=seeds, out_dtype=F16))
    loss = dkc.denoising_loss(
        Array(output), Array(x), Array(sigma), 1.0, 0.5, 2.0, seeds=Array(seeds)
    )
    expected = dk.denoising_loss(output, x, sigma, 1.0, 0.5, 2.0, seeds=seeds)
    assert torch.equal(loss.tensor, expected)
