"""Triton's interpreter, in a process of its own: the decorator of a kernel decides when it is
imported.
"""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.version import Version

ROOT = Path(__file__).parent.parent


def broken() -> str | None:
    """Why the interpreter cannot run with what is installed, or None."""
    triton, numpy = (Version(importlib.metadata.version(name)) for name in ("triton", "numpy"))
    if triton < Version("3.7") and numpy >= Version("2.4"):
        return (
            f"the interpreter of Triton {triton} fails with NumPy {numpy}: use NumPy 2.3 or older"
        )
    return None


def run_tests(path: str) -> None:
    """Run a file of tests whose kernels are interpreted; all of them must pass."""
    pytest.importorskip("triton")
    reason = broken()
    if reason:
        pytest.skip(reason)
    environment = os.environ | {
        "TRITON_INTERPRET": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]),
    }
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", path]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
