"""Every CUDA C++ kernel compiled for every architecture by nvcc and NVRTC, without a GPU."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DEVICE_CODE = ROOT / "csrc" / "cuda"
ARCHS = ("80", "86", "90")
# What a block gets without opting in to more.
MAX_SHARED = 48 * 1024


def kernel_names() -> set[str]:
    return set(
        re.findall(r"^    X\((\w+),", (DEVICE_CODE / "truncated_fft.cuh").read_text(), re.MULTILINE)
    )


@pytest.mark.parametrize("arch", ARCHS)
def test_nvcc_compiles_without_spills(arch: str, tmp_path: Path) -> None:
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if nvcc is None:
        pytest.skip("nvcc is not installed")
    flags = [
        "-O3",
        "-std=c++17",
        "-Xptxas=-v",
        "--Werror=all-warnings",
        f"-gencode=arch=compute_{arch},code=sm_{arch}",
    ]
    source = DEVICE_CODE / "truncated_fft.cu"
    command = [nvcc, *flags, "-c", str(source), "-o", str(tmp_path / "out.o")]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    report = built.stdout + built.stderr
    # ptxas says, for each kernel: name, stack and spills, then registers and shared memory.
    found = re.findall(
        r"entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
        r"(\d+) bytes spill loads(.*?\n.*?)\n",
        report,
        re.DOTALL,
    )
    assert {name for name, *_ in found} == kernel_names()
    for name, stack, stores, loads, used in found:
        assert (stack, stores, loads) == ("0", "0", "0"), name
        shared = re.search(r"(\d+) bytes smem", used)
        assert shared is None or int(shared[1]) <= MAX_SHARED, name


@pytest.mark.parametrize("arch", ARCHS)
def test_nvrtc_compiles_without_host_headers(arch: str) -> None:
    nvrtc = pytest.importorskip("cupy", reason="CuPy is not installed").cuda.nvrtc
    try:
        nvrtc.getVersion()
    except RuntimeError as error:
        pytest.skip(f"NVRTC cannot be loaded: {error}")
    headers = {path.name.encode(): path.read_bytes() for path in DEVICE_CODE.glob("*.cuh")}
    for source in sorted(set(headers) - {b"common.cuh"}):
        program = nvrtc.createProgram(
            f'#include "{source.decode()}"\n', "kernels.cu", tuple(headers.values()), tuple(headers)
        )
        try:
            nvrtc.compileProgram(program, ("--std=c++17", f"--gpu-architecture=sm_{arch}"))
            device_code = nvrtc.getCUBIN(program)
        except nvrtc.NVRTCError as error:
            raise AssertionError(f"{error}\n{nvrtc.getProgramLog(program)}") from None
        finally:
            nvrtc.destroyProgram(program)
        assert device_code[:4] == b"\x7fELF"
        missing = [name for name in kernel_names() if name.encode() not in device_code]
        assert not missing
