"""The suite fails on each planted defect: tests that cannot fail prove nothing."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.mutations import MUTATIONS, can_plant
from tests.strategies import BACKENDS


@pytest.mark.parametrize(
    ("backend", "name"),
    [(b, name) for b in BACKENDS for name in MUTATIONS if can_plant(b, name)],
)
def test_a_planted_defect_makes_the_suite_fail(backend: str, name: str) -> None:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-x",
        "-q",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
    ]
    run = subprocess.run(
        [*command, "tests/test_oracle.py", "--mutation", f"{backend}:{name}"],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 1 and "AssertionError" in run.stdout, run.stdout + run.stderr


def test_every_defect_has_a_backend_to_plant_it_in() -> None:
    assert all(any(can_plant(backend, name) for backend in BACKENDS) for name in MUTATIONS)


def test_the_same_tests_pass_without_a_defect() -> None:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-x",
        "-q",
        "-p",
        "no:cacheprovider",
        "tests/test_oracle.py",
    ]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
