"""The shim that runs CUDA device code on the CPU, tested itself."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import shim


@pytest.mark.parametrize("sanitizer", shim.SANITIZERS)
def test_shuffles_atomics_barriers_and_16_bit_floats(sanitizer: str, tmp_path: Path) -> None:
    shim.run(shim.build("test_shim.cpp", tmp_path / "test_shim", sanitizer))


def test_a_missing_barrier_is_found(tmp_path: Path) -> None:
    program = shim.build("race.cpp", tmp_path / "race", "tsan")
    with pytest.raises(AssertionError, match="data race"):
        shim.run(program)
