"""Dynamic thresholding on a CUDA device: the places of a stable sort, with one block or several."""

from __future__ import annotations

import math

import pytest
import torch

import dsno_kernels as dk
from dsno_kernels.backends import reference
from tests import test_threshold
from tests.on_device import DEVICE, DRY_RUN, cuda, marks, serving, sized

pytestmark = marks

BACKENDS = serving("abs_rank")
KERNELS = [name for name in BACKENDS if name != "reference"]
OPS = torch.ops.dsno_kernels
SHAPES = [(3, 1), (600, 35), (8, 3, 64, 64), (1, 3, 256, 256), (2, 3, 1023, 1025)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_places_are_those_of_a_stable_sort(
    shape: tuple[int, ...], dtype: torch.dtype, backend: str
) -> None:
    x = torch.randn(sized(*shape), device=DEVICE).to(dtype)
    size = x[0].numel()
    for rank in (0, int(0.995 * (size - 1)), size - 1):
        expected = reference.abs_rank(x.cpu(), rank)
        for _ in range(3):  # atomics in another order
            assert torch.equal(OPS.abs_rank(x, rank, backend).cpu(), expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(4, 500), (2, 100_003)], ids=str)
def test_nan_and_offset_memory(shape: tuple[int, ...], backend: str) -> None:
    x = torch.randn(shape[0], shape[1] + 1, device=DEVICE)[:, 1:]
    x[1, 77] = math.nan
    y = dk.dynamic_threshold(x, 0.9, backend=backend)
    assert bool(y[1].isnan().all()) and not bool(y[0].isnan().any())
    exact = test_threshold.published(x[:1].double().cpu(), 0.9, 1.0, "dpm_solver")
    test_threshold.assert_close(y[:1], exact, test_threshold.STEP)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("shape", [(4, 500), (2, 100_003)], ids=str)
@pytest.mark.skipif(DRY_RUN, reason="captures a CUDA graph")
def test_a_cuda_graph_holds_it(shape: tuple[int, ...], backend: str) -> None:
    x = torch.randn(shape, device=DEVICE)
    dk.dynamic_threshold(x, 0.9, backend=backend)
    graph = cuda().CUDAGraph()
    with cuda().graph(graph):
        y = dk.dynamic_threshold(x, 0.9, backend=backend)
    for _ in range(3):
        x.copy_(3 * torch.randn_like(x))
        graph.replay()
        assert torch.equal(y, dk.dynamic_threshold(x, 0.9, backend=backend))
