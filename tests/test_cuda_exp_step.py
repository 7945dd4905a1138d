"""The integrator steps on CUDA: device code and parameters of the GPU, run on the CPU plain and
under sanitizers.
"""

from __future__ import annotations

import math
import os
import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import dsno_kernels as dk
from dsno_kernels.backends import cpu, reference_steps
from dsno_kernels.backends._solver_step import Memory, Step
from dsno_kernels.backends.cuda_steps import Steps
from tests import shim, step_shim, test_step_noise
from tests import test_solver_step as on_the_cpu
from tests.helpers import FLOAT64, IO_BUDGET, assert_close
from tests.strategies import tensor
from tests.test_cuda_compile import cuobjdump
from tests.test_exp_step import STEP

BUDGETS = {
    torch.float64: FLOAT64,
    torch.float32: STEP,
    torch.float16: IO_BUDGET,
    torch.bfloat16: IO_BUDGET,
}
DTYPES = list(BUDGETS)
F32, F16, BF16, F64 = torch.float32, torch.float16, torch.bfloat16, torch.float64


@pytest.fixture(scope="module")
def steps(tmp_path_factory: pytest.TempPathFactory) -> Steps:
    return Steps(step_shim.plain_launch(tmp_path_factory.mktemp("plain")))


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> Steps:
    """Under AddressSanitizer and UBSan."""
    return Steps(step_shim.sanitized_launch(tmp_path_factory.mktemp("sanitized")))


def rows_of(form: str, columns: int, batch: int) -> dict[str, Any]:
    """Coefficients of every form that the op takes."""
    table = torch.randn(5, columns, dtype=torch.float64)
    none = {"coefficients": None, "values": [], "index": None}
    return (
        none
        | {
            "numbers": {"values": table[0].tolist()},
            "row": {"coefficients": table[1]},
            "rows": {"coefficients": torch.randn(columns, batch).mT},
            "bfloat16": {"coefficients": table[1].bfloat16()},
            "index": {"coefficients": table.float(), "index": torch.tensor(3)},
            "indices": {
                "coefficients": table,
                "index": torch.randint(5, (batch,), dtype=torch.int32),
            },
        }[form]
    )


FORMS = ("numbers", "row", "rows", "bfloat16", "index", "indices")


def check_exp_step(steps: Steps, tensors: list[Tensor], **options: Any) -> Tensor:
    options = {"head": None, "ring": 0, "out_dtype": tensors[0].dtype} | options
    y = steps.exp_step(tensors, **options)
    options["out_dtype"] = F64
    exact = reference_steps.exp_step([t.double() for t in tensors], **options)
    assert_close(
        y,
        exact,
        BUDGETS[y.dtype] if F64 in {t.dtype for t in tensors} else max(STEP, BUDGETS[y.dtype]),
    )
    return y


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("size", [1, 3, 8, 35, 1031])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_exp_step(steps: Steps, dtype: torch.dtype, size: int, form: str) -> None:
    """Samples that begin and end anywhere between vectors."""
    for terms in (1, 4, 5, 10):
        tensors = [torch.randn(3, size).to(dtype) for _ in range(terms)]
        check_exp_step(steps, tensors, **rows_of(form, terms, 3))


def check_backward(
    steps: Steps, g: Tensor, tensors: list[Tensor], per_sample: bool, **options: Any
) -> None:
    columns, dtypes = [0, 2, 3], [F32, tensors[2].dtype, tensors[3].dtype]
    options |= {"columns": columns, "per_sample": per_sample}
    grads, dots = steps.exp_step_backward(g, tensors, dtypes=dtypes, **options)
    exact, exact_dots = reference_steps.exp_step_backward(
        g.double(), [t.double() for t in tensors], dtypes=[F64] * 3, **options
    )
    for grad, expected, dtype in zip(grads, exact, dtypes, strict=True):
        assert grad.dtype == dtype
        assert_close(grad, expected, max(STEP, BUDGETS[dtype]))
    assert dots.dtype == F64 and dots.shape == exact_dots.shape
    # Against the size of the terms: a dot product may cancel.
    size = g.double().norm() * max(t.double().norm() for t in tensors)
    assert (dots - exact_dots).abs().max() <= STEP * size
    again = steps.exp_step_backward(g, tensors, dtypes=dtypes, **options)
    assert torch.equal(again[1], dots)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("size", [1, 35, 9001])
@pytest.mark.parametrize("dtypes", [(F32,), (BF16,), (F64,), (F32, BF16, F16)])
def test_exp_step_backward(
    steps: Steps, dtypes: tuple[torch.dtype, ...], size: int, form: str
) -> None:
    g, *tensors = (torch.randn(3, size).to(dtypes[j % len(dtypes)]) for j in range(6))
    rows = rows_of(form, 5, 3)
    for per_sample in (False, True):
        check_backward(steps, g, tensors, per_sample, **rows)
    only = {"columns": [4], "dtypes": [F32], "per_sample": False}
    (grad,), dots = steps.exp_step_backward(g, [], **rows, **only)
    (exact,), _ = reference_steps.exp_step_backward(g.double(), [], **rows, **only)
    assert_close(grad, exact, STEP)
    assert dots.shape == (1, 0)


def test_gradients_are_hidden_by_zeros(steps: Steps) -> None:
    g = torch.full((3, 35), math.nan)
    options = {"coefficients": None, "index": None, "columns": [0, 1], "dtypes": [F32] * 2}
    grads, _ = steps.exp_step_backward(g, [], values=[0.0, 1.0], per_sample=False, **options)
    assert grads[0].eq(0).all() and grads[1].isnan().all()


@pytest.mark.parametrize("form", FORMS)
def test_a_zero_hides_what_it_multiplies(steps: Steps, form: str) -> None:
    x, bad = torch.randn(3, 35), torch.full((3, 35), math.nan)
    rows = rows_of(form, 3, 3)
    if rows["coefficients"] is None:
        rows["values"][1] = 0.0
    else:
        rows["coefficients"][..., 1] = 0
    options = {"head": None, "ring": 0, "out_dtype": F32}
    y = steps.exp_step([x, bad, x], **rows, **options)
    assert_close(y, reference_steps.exp_step([x.double(), bad, x.double()], **rows).double(), STEP)


def test_an_index_outside_of_its_table_is_clamped(steps: Steps) -> None:
    x, table = torch.randn(2, 7), torch.randn(4, 1)
    options = {"values": [], "head": None, "ring": 0, "out_dtype": F32}
    index = torch.tensor([-3, 2**40])
    y = steps.exp_step([x], coefficients=table, index=index, **options)
    assert torch.equal(y, x * table[[0, 3]])


@pytest.mark.parametrize("head", [0, 2, 7, -1])
def test_a_ring_is_read_from_its_head_backwards_bitwise(sanitized: Steps, head: int) -> None:
    x, ring, noise = torch.randn(2, 35), torch.randn(3, 2, 35), torch.randn(2, 35)
    options = {"coefficients": torch.randn(5), "values": [], "index": None, "out_dtype": F32}
    slots = torch.tensor(head, dtype=torch.int32)
    y = sanitized.exp_step([x, *ring, noise], head=slots, ring=3, **options)
    entries = [ring[(head - j) % 3] for j in range(3)]
    assert torch.equal(y, sanitized.exp_step([x, *entries, noise], head=None, ring=0, **options))


def test_in_place(sanitized: Steps) -> None:
    x, h = torch.randn(2, 3, 35).unbind(0)
    expected = 0.5 * x + 2 * h
    options = {"coefficients": None, "index": None, "head": None, "ring": 0, "out_dtype": F32}
    y = sanitized.exp_step([x, h], values=[0.5, 2.0], out=x, **options)
    assert y is x
    assert_close(x, expected.double(), STEP)


@pytest.mark.parametrize("form", ["numbers", "indices"])
@pytest.mark.parametrize("dtypes", [(F32,), (BF16,), (F64,), (F32, BF16, F16), (F16, F64, F32)])
@pytest.mark.parametrize("memory", ["contiguous", "offset"])
def test_exp_step_touches_only_its_memory(
    sanitized: Steps, memory: str, dtypes: tuple[torch.dtype, ...], form: str
) -> None:
    for size in (1, 35, 1031):
        tensors = [tensor((3, size), dtypes[j % len(dtypes)], memory, (0, 1)) for j in range(4)]
        for out_dtype in dtypes:
            check_exp_step(sanitized, tensors, out_dtype=out_dtype, **rows_of(form, 4, 3))
    check_backward(sanitized, tensors[0], tensors, False, **rows_of(form, 4, 3))


@pytest.fixture
def behind_the_ops(steps: Steps, monkeypatch: pytest.MonkeyPatch) -> None:
    """The device code in place of the CPU kernels, so that their tests are its tests."""
    for name in ("exp_step", "exp_step_backward", "solver_step"):
        monkeypatch.setattr(cpu, name, getattr(steps, name))


@pytest.mark.parametrize("K", [1, 3, 8])
@pytest.mark.parametrize("case", sorted(on_the_cpu.CASES))
def test_solver_step(behind_the_ops: None, case: str, K: int) -> None:
    on_the_cpu.test_values("", case, K)


def test_solver_step_in_other_dtypes(behind_the_ops: None) -> None:
    on_the_cpu.test_dtypes_of_results("cpu")


@pytest.mark.parametrize("tensor_head", [False, True])
@pytest.mark.parametrize("k", [2, 3])
def test_solver_step_writes_into_the_ring(behind_the_ops: None, k: int, tensor_head: bool) -> None:
    on_the_cpu.test_a_ring_buffer_holds_the_history(k, tensor_head, "cpu")


@pytest.mark.parametrize("K", [1, 3])
def test_solver_step_in_place(behind_the_ops: None, K: int) -> None:
    on_the_cpu.test_in_place_with_inputs_that_are_the_state("cpu", K)


@pytest.mark.parametrize("memory", ["contiguous", "offset"])
@pytest.mark.parametrize("dtypes", [(F32,), (F32, BF16, F16), (F64, F32), (BF16,)])
def test_solver_step_touches_only_its_memory(
    sanitized: Steps, dtypes: tuple[torch.dtype, ...], memory: str
) -> None:
    """Everything at once: guidance, base, a ring with its head on the device, noise, clamp."""
    table = on_the_cpu.row_of(4, 5).float()
    for size in (1, 35, 1031):
        point, output, u, base, noise, *slots = (
            tensor((2, size), dtypes[j % len(dtypes)], memory, (0, 1)) for j in range(8)
        )
        ring = torch.stack([slot.to(dtypes[0]) for slot in slots])
        step = Step(
            point, output, unconditional=u, base=base, history=list(ring), noise=noise, table=table,
            index=torch.tensor([3, 1]), head=torch.tensor(1), guidance=torch.tensor([2.5, 0.5]),
            low=-2.0, high=1.5, looks_ahead=True,
        )  # fmt: skip
        wanted = [base.dtype, point.dtype, None, F32]
        exact_ring = ring.double().clone()
        wide = step._replace(
            point=point.double(), output=output.double(), unconditional=u.double(),
            base=base.double(), noise=noise.double(), history=list(ring.double().clone()),
        )  # fmt: skip
        exact = reference_steps.solver_step(wide, [F64, F64, None, F64], Memory(ring=exact_ring))
        found = sanitized.solver_step(step, wanted, Memory(ring=ring))
        assert found[2] is None
        for actual, expected, dtype in zip(found, exact, wanted, strict=True):
            if dtype is not None:
                assert actual.dtype == dtype
                assert_close(actual, expected, max(4 * STEP, BUDGETS[dtype]))
        assert_close(ring, exact_ring, max(4 * STEP, BUDGETS[ring.dtype]))


@pytest.mark.parametrize("memory", ["contiguous", "offset"])
@pytest.mark.parametrize("size", [1, 35, 1031])
@pytest.mark.parametrize("dtype", [F32, BF16, F64])
def test_noise_is_that_of_the_definition(
    steps: Steps, dtype: torch.dtype, size: int, memory: str
) -> None:
    """In every kernel and for every place in a block of four; log, sqrt, cos and sin of float32
    numbers up to 6.7 are rounded to 6e-8 each.
    """
    x, seed = tensor((3, size), dtype, memory, (0, 1)), torch.tensor([2**62 + 11, 2**33 + 5])
    rows = torch.tensor([on_the_cpu.NOISE_ROW]).expand(3, 8)
    step, wanted = Step(x, x, seed=seed), [F64 if dtype == F64 else F32, None, None, None]
    exact = reference_steps.normal_noise(seed, 3 * size).reshape(3, size)
    for row in ({"table": rows}, {"values": on_the_cpu.NOISE_ROW}):
        drawn = steps.solver_step(step._replace(**row), wanted)[0]
        bound = 1e-14 if dtype == F64 else 2e-6
        assert (drawn.double() - exact).abs().max() <= bound
    other = steps.solver_step(step._replace(seed=seed + 1, **row), wanted)[0]
    assert (other - drawn).abs().max() > 1e-3


@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("order", test_step_noise.ORDERS)
def test_noise_does_not_depend_on_strides(behind_the_ops: None, order: str, rows: bool) -> None:
    test_step_noise.test_noise_does_not_depend_on_strides(order, rows, "cpu")


def test_noise_of_the_cpu_kernels(steps: Steps) -> None:
    x, seed = torch.zeros(1031), torch.tensor([5, 7])
    step = Step(x, x, values=on_the_cpu.NOISE_ROW, seed=seed)
    drawn = steps.solver_step(step, [F32, None, None, None])[0]
    same = dk.solver_step(x, x, on_the_cpu.NOISE_ROW, seed=seed, backend="cpu").base
    assert (drawn - same).abs().max() <= 4e-6


@pytest.mark.parametrize("arch", ["80", "86", "90"])
def test_memory_moves_by_sixteen_bytes(arch: str, tmp_path: Path) -> None:
    """Float32 of order 3 is one group of loads: four reads and one write of 16 bytes for four
    elements, and the same of single elements at the ends of a sample.
    """
    tool, nvcc = cuobjdump(), shutil.which("nvcc", path="/usr/local/cuda/bin:" + os.environ["PATH"])
    if tool is None or nvcc is None:
        pytest.skip("nvcc or cuobjdump is not installed (the latter comes with triton)")
    kernels, cubin = tmp_path / "kernels.cu", tmp_path / "kernels.cubin"
    kernels.write_text('#include "exp_step.cuh"\n#include "solver_step.cuh"\n')
    flags = ["-O3", "-std=c++17", f"-arch=sm_{arch}", f"-I{shim.ROOT / 'csrc' / 'cuda'}", "-cubin"]
    subprocess.run([nvcc, *flags, str(kernels), "-o", str(cubin)], check=True)
    report = subprocess.run([tool, "-sass", str(cubin)], capture_output=True, text=True, check=True)
    accesses: dict[str, Counter[str]] = {}
    for function in re.split(r"\n\s*Function : ", report.stdout)[1:]:
        found = re.findall(r"\b((?:LD|ST)[GL]?(?:\.\w+)+) ", function)
        accesses[function.split()[0]] = Counter(found)
    assert set(accesses) == {
        f"{op}_{kind}"
        for op in ("exp_step", "exp_step_backward", "solver_step")
        for kind in ("f32_v4", "any_v8", "any_v1", "f64_v2", "f64_v1")
    } | {"exp_step_dots"}
    for name, found in accesses.items():
        assert not any(kind.startswith(("LDL", "STL", "LD.", "ST.")) for kind in found), name
        wide = [kind for kind in found if kind.endswith(".128")]
        assert bool(wide) == name.endswith(("v2", "v4", "v8")), name
    step = accesses["exp_step_f32_v4"]
    assert (step["LDG.E.128"], step["STG.E.128"], step["STG.E"]) == (4, 1, 1)
    assert accesses["solver_step_f32_v4"]["STG.E.128"] == 4  # base', point', h_0, input'


def test_few_blocks_do_the_work_of_many(tmp_path: Path) -> None:
    """A grid smaller than the work, under ThreadSanitizer: shared memory passes from one sample to
    the next within a block.
    """
    inner = step_shim.sanitized_launch(tmp_path, "tsan")
    steps = Steps(lambda kernel, grid, *rest: inner(kernel, min(grid, 2), *rest))
    tensors = [torch.randn(5, 1031) for _ in range(4)]
    rows = rows_of("indices", 4, 5)
    check_exp_step(steps, tensors, **rows)
    check_backward(steps, tensors[0], tensors, True, **rows)
    table, seed = on_the_cpu.row_of(2, 5).float(), torch.tensor([1, 2])
    step, wanted = Step(*tensors[:2], table=table, history=tensors[2:3], seed=seed), [F32]
    wanted += [None] * 3
    found = steps.solver_step(step, wanted)[0]
    exact = reference_steps.solver_step(step, wanted)[0]
    assert_close(found, exact.double(), 10 * STEP)
