"""The integrator steps on CUDA: device code and parameters of the GPU, run on the CPU plain and
under sanitizers.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dsno_kernels.backends import reference_steps
from dsno_kernels.backends.cuda_steps import Steps
from tests import step_shim
from tests.helpers import FLOAT64, IO_BUDGET, assert_close
from tests.strategies import tensor
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
    options |= {"out_dtype": torch.float64, "out": None}
    options.pop("out")
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
