"""Every CUDA C++ kernel compiled for every architecture by nvcc and NVRTC, without a GPU, and what
the compiler made of it.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import pytest

from dsno_kernels.backends import _nvrtc

ROOT = Path(__file__).parents[1]
DEVICE_CODE = ROOT / "csrc" / "cuda"
ARCHS = ("80", "86", "90")
# What a block gets without opting in to more.
MAX_SHARED = 48 * 1024
# kThreads * kBlocks of common.cuh share 65,536 registers, given out by eight.
MAX_REGISTERS = 65536 // (128 * 3) // 8 * 8


def kernel_names(source: Path) -> set[str]:
    return set(re.findall(r"^    X\((\w+),", source.read_text(), re.MULTILINE))


SOURCES = sorted(path for path in DEVICE_CODE.glob("*.cuh") if kernel_names(path))


def cuobjdump() -> str | None:
    """CUDA's or, as nvcc is often packed without it, that of Triton."""
    triton = importlib.util.find_spec("triton")
    if triton is None or triton.origin is None:
        return shutil.which("cuobjdump")
    return str(Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump")


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
@pytest.mark.parametrize("arch", ARCHS)
def test_nvcc_compiles_without_local_memory(arch: str, source: Path, tmp_path: Path) -> None:
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if nvcc is None:
        pytest.skip("nvcc is not installed")
    flags = ["-O3", "-std=c++17", "-Xptxas=-v", "--Werror=all-warnings"]
    flags += [f"-gencode=arch=compute_{arch},code=sm_{arch}", "-cubin"]
    kernels, cubin = tmp_path / "kernels.cu", tmp_path / "kernels.cubin"
    kernels.write_text(f'#include "{source.name}"\n')
    command = [nvcc, *flags, f"-I{DEVICE_CODE}", str(kernels), "-o", str(cubin)]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    # ptxas says, for each kernel: name, stack and spills, then registers and shared memory.
    found = re.findall(
        r"entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
        r"(\d+) bytes spill loads(.*?\n.*?)\n",
        built.stdout + built.stderr,
        re.DOTALL,
    )
    assert {name for name, *_ in found} == kernel_names(source)
    for name, stack, stores, loads, used in found:
        assert (stack, stores, loads) == ("0", "0", "0"), name
        registers = re.search(r"Used (\d+) registers", used)
        assert registers is not None and int(registers[1]) <= MAX_REGISTERS, name
        shared = re.search(r"(\d+) bytes smem", used)
        assert shared is None or int(shared[1]) <= MAX_SHARED, name
    check_instructions(cubin)


def check_instructions(cubin: Path) -> None:
    """No local memory; kernels of v neighboring columns move them in one instruction."""
    tool = cuobjdump()
    if tool is None:
        pytest.skip("cuobjdump is not installed (it comes with triton)")
    report = subprocess.run([tool, "-sass", str(cubin)], capture_output=True, text=True, check=True)
    functions = re.split(r"\n\s*Function : ", report.stdout)[1:]
    assert functions
    for function in functions:
        name = function.split()[0]
        accesses = re.findall(r"\b(LDG|STG|LDL|STL)((?:\.\w+)*)", function)
        assert not any(kind in ("LDL", "STL") for kind, _ in accesses), name
        columns = re.fullmatch(r"truncated_(i?)rfft_columns_(f32|f16|bf16|f64)_v(\d)_c\d", name)
        if columns is None or columns[3] == "1":
            continue
        item = {"f64": 8, "f32": 4}.get(columns[2], 2)
        signal = min(16, int(columns[3]) * item)
        widths = {kind: Counter[int]() for kind in ("LDG", "STG")}
        for kind, modifiers in accesses:
            width = re.search(r"\.(64|128|U16)", modifiers)
            widths[kind][{"64": 8, "128": 16, "U16": 2}[width[1]] if width else 4] += 1
        # Spectra, pairs of at least four floats, and the table always come by 16 bytes.
        loaded, stored = (16, signal) if columns[1] else (signal, 16)
        assert set(widths["STG"]) == {stored}, (name, widths)
        # Narrow ones skip the imaginary parts of the bins that have none.
        wide = widths["LDG"][16] + (widths["LDG"][loaded] if loaded < 16 else 0)
        assert wide >= 2 * (widths["LDG"].total() - wide), (name, widths)


@pytest.mark.parametrize("arch", ARCHS)
def test_nvrtc_compiles_without_host_headers(arch: str) -> None:
    """What backend "cupy" does at its first call."""
    nvrtc, reason = _nvrtc.nvrtc()
    if nvrtc is None:
        pytest.skip(str(reason))
    assert int(arch) in nvrtc.getSupportedArchs()
    for source in SOURCES:
        device_code = _nvrtc.compiled(source.name, f"sm_{arch}")
        assert device_code[:4] == b"\x7fELF"
        missing = [name for name in kernel_names(source) if name.encode() not in device_code]
        assert not missing
