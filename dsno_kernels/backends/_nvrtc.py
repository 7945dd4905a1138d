"""Compiling the CUDA device code at run time: NVRTC, as CuPy binds it, on the same `.cuh` files."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from types import ModuleType

from dsno_kernels.backends._launch import device_code_folder

OPTIONS = ("--std=c++17",)


@functools.lru_cache(maxsize=1)
def nvrtc() -> tuple[ModuleType | None, str | None]:
    """CuPy's binding of NVRTC and None, or None and why it is not there."""
    try:
        from cupy.cuda import nvrtc as found
    except ImportError as error:
        return None, f"CuPy cannot be imported ({error}); `pip install cupy-cuda13x`"
    try:
        found.getVersion()
    except (RuntimeError, OSError) as error:
        how = '`pip install "nvidia-cuda-nvrtc==13.0.*"` (with CUDA 12: nvidia-cuda-nvrtc-cu12)'
        return None, f"NVRTC cannot be loaded ({error}); {how}"
    return found, None


def target(capability: tuple[int, int], supported: Sequence[int]) -> str:
    """What to compile for: the GPU itself or, where it is newer than NVRTC, PTX for the driver."""
    number = 10 * capability[0] + capability[1]
    if number in supported:
        return f"sm_{number}"
    return f"compute_{max(arch for arch in supported if arch < number)}"


@functools.cache
def compiled(source: str, architecture: str) -> bytes:
    """Device code of one `.cuh`, for "sm_90" or, as PTX, for "compute_90".

    Raises:
        RuntimeError: NVRTC's log.
    """
    binding, reason = nvrtc()
    assert binding is not None, reason
    headers = {path.name.encode(): path.read_bytes() for path in device_code_folder().glob("*.cuh")}
    program = binding.createProgram(
        f'#include "{source}"\n', "kernels.cu", tuple(headers.values()), tuple(headers)
    )
    try:
        binding.compileProgram(program, (*OPTIONS, f"--gpu-architecture={architecture}"))
        read = binding.getCUBIN if architecture.startswith("sm_") else binding.getPTX
        code: bytes = read(program)
    except binding.NVRTCError as error:
        log = binding.getProgramLog(program)
        raise RuntimeError(f"NVRTC: {error} ({source} for {architecture})\n{log}") from None
    finally:
        binding.destroyProgram(program)
    return code
