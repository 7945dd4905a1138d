"""Builds tests/cuda_shim: the CUDA device code as CPU programs, plain or under a sanitizer."""

from __future__ import annotations

import ctypes
import shutil
import struct
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dsno_kernels.backends._composed import Launch
from dsno_kernels.backends._transforms import Plan

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


def plain_launch(folder: Path) -> Launch:
    """A launcher of `Composed` that runs the device code in this process, on CPU tensors."""
    path = build("run_truncated_fft.cpp", folder / "shim.so", "plain", "-shared", "-fPIC", "-O2")
    library = ctypes.CDLL(str(path))

    def launch(plan: Plan, source: Tensor, target: Tensor, table: Tensor) -> None:
        pointers = (ctypes.c_void_p(x.data_ptr()) for x in (source, target, table))
        numbers = (ctypes.c_int64 * len(plan.numbers))(*plan.numbers)
        grid, count = ctypes.c_int64(plan.grid), ctypes.c_size_t(len(plan.numbers))
        assert library.launch(plan.kernel.encode(), grid, *pointers, numbers, count) == 0

    return launch


def sanitized_launch(folder: Path, sanitizer: str = "asan+ubsan") -> Launch:
    """A launcher of `Composed` that runs the device code in a program under sanitizers, whose
    buffers are as large as the tensors reach.
    """
    program = build("run_truncated_fft.cpp", folder / "run_truncated_fft", sanitizer)

    def launch(plan: Plan, source: Tensor, target: Tensor, table: Tensor) -> None:
        name, data, rows = plan.kernel.encode(), memory_of(source), memory_of(table)
        offset, out_bytes = source.data_ptr() % 16, target.numel() * target.element_size()
        sizes = len(name), plan.grid, len(plan.numbers), offset, len(data), out_bytes, len(rows)
        numbers = struct.pack(f"<{len(plan.numbers)}q", *plan.numbers)
        cases, results = folder / "cases", folder / "results"
        cases.write_bytes(struct.pack("<7q", *sizes) + name + numbers + data + rows)
        run(program, cases, results)
        found = torch.frombuffer(bytearray(results.read_bytes()), dtype=target.dtype)
        target.as_strided((target.numel(),), (1,)).copy_(found)

    return launch


def memory_of(x: Tensor) -> bytes:
    """The bytes from the first element of a view to its last."""
    reach = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return bytes(x.as_strided((reach,), (1,)).view(torch.uint8).numpy())
