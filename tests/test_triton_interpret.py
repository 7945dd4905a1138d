"""The Triton kernels in Triton's interpreter, and when the backend imports Triton."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys

import pytest
import torch

import dsno_kernels as dk
from dsno_kernels.backends import Request
from dsno_kernels.backends import triton as backend
from tests import interpreter

ROOT = pathlib.Path(__file__).parent.parent


def test_every_kernel_in_the_interpreter() -> None:
    interpreter.run_tests("tests/triton_interpreted.py")


@pytest.mark.parametrize(
    ("triton", "numpy", "expected"),
    [("3.6.0", "2.4.0", True), ("3.6.0", "2.3.5", False), ("3.7.1", "2.4.0", False)],
)
def test_where_the_interpreter_fails(
    triton: str, numpy: str, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    versions = {"triton": triton, "numpy": numpy}
    monkeypatch.setattr("importlib.metadata.version", versions.__getitem__)
    assert (interpreter.broken() is not None) is expected


def test_importing_the_package_does_not_import_triton() -> None:
    code = (
        "import sys, dsno_kernels, dsno_kernels.backends.triton; assert 'triton' not in sys.modules"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, check=True)


@pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter does run on the CPU"
)
def test_a_cpu_tensor_is_refused_with_its_reason() -> None:
    with pytest.raises(NotImplementedError, match=r"CUDA device|not installed"):
        dk.spectral_conv(torch.randn(1, 4, 3, 2, 2), torch.randn(3, 3, 2, 2), backend="triton")


def test_float64_is_refused() -> None:
    reason = backend.unsupported(Request("spectral_conv", torch.device("cpu"), torch.float64))
    assert reason is not None and "float64" in reason
