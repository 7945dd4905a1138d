"""The CUDA C++ transforms on a device, on the cases of test_cuda_truncated_fft.py; a dry run takes
the same device code on the CPU.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dsno_kernels.backends import Request, cuda, reference
from dsno_kernels.backends._composed import Composed
from tests import shim
from tests.helpers import assert_close
from tests.on_device import DEVICE, DRY_RUN, marks
from tests.test_cuda_truncated_fft import (
    BUDGETS,
    DTYPES,
    IRFFT_CASES,
    RFFT_CASES,
    VIEWS,
    convert,
    spectrum_view,
)

pytestmark = marks


@pytest.fixture(scope="module")
def ops(tmp_path_factory: pytest.TempPathFactory) -> Any:
    if DRY_RUN:
        return Composed(shim.plain_launch(tmp_path_factory.mktemp("shim")))
    reason = cuda.unsupported(Request("truncated_rfft", DEVICE, torch.float32))
    if reason:
        pytest.skip(reason)
    return cuda


def on_device(x: Tensor) -> Tensor:
    """The view x of a copy of its whole storage."""
    storage = x.as_strided((x.untyped_storage().nbytes() // x.element_size(),), (1,), 0)
    return storage.to(DEVICE).as_strided(x.shape, x.stride(), x.storage_offset())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "dim", "modes", "view"), RFFT_CASES)
def test_truncated_rfft(
    ops: Any, shape: tuple[int, ...], dim: int, modes: int, view: str, dtype: torch.dtype
) -> None:
    x = convert(VIEWS[view](shape), dtype)
    actual = ops.truncated_rfft(on_device(x), modes, dim=dim)
    assert_close(actual, reference.truncated_rfft(x.double(), modes, dim=dim), BUDGETS[dtype])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "dim", "n", "view"), IRFFT_CASES)
def test_truncated_irfft(
    ops: Any, shape: tuple[int, ...], dim: int, n: int, view: str, dtype: torch.dtype
) -> None:
    x = convert(spectrum_view(view, shape), dtype)
    actual = ops.truncated_irfft(on_device(x), n, dim=dim)
    assert_close(actual, reference.truncated_irfft(x.double(), n, dim=dim), BUDGETS[dtype])
