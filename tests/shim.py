"""Builds tests/cuda_shim: the CUDA device code as CPU programs, plain or under a sanitizer."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "tests" / "cuda_shim"
SANITIZERS = {
    "plain": [],
    "asan+ubsan": ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "tsan": ["-fsanitize=thread"],  # a race between the threads of a block: a missing barrier
}
FLAGS = [
    "-std=c++20",
    "-O1",
    "-g",
    "-fno-strict-aliasing",
    "-Wall",
    "-Wextra",
    "-Wno-unknown-pragmas",
    "-pthread",
]


def build(source: str, output: Path, sanitizer: str = "asan+ubsan", *flags: str) -> Path:
    """Compile one file of tests/cuda_shim; skips the test where there is no compiler."""
    if not shutil.which("g++"):
        pytest.skip("g++ is not installed")
    includes = [f"-I{FOLDER}", f"-I{ROOT / 'csrc' / 'cuda'}"]
    command = ["g++", *FLAGS, *flags, *SANITIZERS[sanitizer], *includes, str(FOLDER / source)]
    built = subprocess.run([*command, "-o", str(output)], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return output


def run(program: Path, *arguments: Path) -> str:
    """Standard output of a program that must end well."""
    command = [str(program), *map(str, arguments)]
    ran = subprocess.run(command, capture_output=True, text=True)
    if "unexpected memory mapping" in ran.stderr:
        pytest.skip("ThreadSanitizer cannot run under this kernel's address randomization")
    assert ran.returncode == 0, ran.stderr
    return ran.stdout
