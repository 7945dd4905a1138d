"""Drawn calls on a CUDA device, as tests/test_properties.py draws them on the CPU.

Triton compiles for each new kind of call: `DSNO_KERNELS_GPU_FUZZ` is how many there are.
"""

from __future__ import annotations

import os

import pytest
import torch

pytest.importorskip("hypothesis")

from hypothesis import HealthCheck, given, settings

from tests.on_device import DEVICE, DRY_RUN, marks, serving
from tests.strategies import Case, cases
from tests.test_properties import check

pytestmark = marks

EXAMPLES = int(os.environ.get("DSNO_KERNELS_GPU_FUZZ", "2" if DRY_RUN else "5"))


@pytest.mark.parametrize("backend", serving("spectral_conv"))
@settings(
    max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True
)
@given(case=cases())
def test_drawn_calls_follow_the_formula(backend: str, case: Case) -> None:
    check("reference" if case.dtype == torch.float64 else backend, case, DEVICE.type)
