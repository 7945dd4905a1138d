"""Sampling in one evaluation on a CUDA device: plain, as a CUDA graph, and under autocast."""

from __future__ import annotations

import pytest
import torch

import dsno_kernels as dk
from tests.helpers import assert_close
from tests.on_device import DEVICE, DRY_RUN, marks
from tests.small_models import LOGSNR, network
from tests.test_capture import capture_on_the_host

pytestmark = marks

# Some ten layers; TF32, where PyTorch's convolutions use it, rounds operands to 10 bits.
TF32, BF16 = 1e-2, 1e-1


@pytest.mark.parametrize("cuda_graph", [False, True], ids=["plain", "graph"])
@pytest.mark.parametrize("classes", [0, 3], ids=["unconditional", "conditional"])
def test_samples_are_those_of_the_cpu(
    classes: int, cuda_graph: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = dk.generate(network(classes), 7, logsnr=LOGSNR, seed=2)
    if DRY_RUN and cuda_graph:
        capture_on_the_host(monkeypatch)
    model = network(classes).to(DEVICE)
    for precision, budget in (("fp32", TF32), ("bf16", BF16)):
        images = dk.generate(
            model, 7, logsnr=LOGSNR, seed=2, batch=3, precision=precision, cuda_graph=cuda_graph
        )
        assert images.device.type == DEVICE.type
        assert images.dtype == torch.float32
        assert_close(images, expected, budget)
