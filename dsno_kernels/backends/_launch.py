"""Device, stream and source of the GPU kernels: every backend takes them from here."""

from __future__ import annotations

import contextlib
import functools
from pathlib import Path

import torch


@functools.lru_cache(maxsize=1)
def _several_devices() -> bool:
    return torch.cuda.device_count() > 1


def on_device(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Make `device` the current one; costs nothing where there is only one."""
    if device.type != "cuda" or not _several_devices():
        return contextlib.nullcontext()
    return torch.cuda.device(device)


def raw_stream(device: torch.device) -> int:
    """The current stream of `device`, the `cudaStream_t` that kernels are launched on."""
    index = torch.cuda.current_device() if device.index is None else device.index
    return int(torch._C._cuda_getCurrentRawStream(index))


def not_while_capturing(device: torch.device, what: str) -> None:
    """Refuse what happens at a first call only, and what a CUDA graph cannot hold.

    Raises:
        RuntimeError: the current stream is being captured.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"the first {what}, which a CUDA graph cannot capture: run the same call on {device}"
            " once before the capture"
        )


def device_code_folder() -> Path:
    """The folder of the `.cuh` files: in the installed package, or `csrc/cuda` of a checkout."""
    installed = Path(__file__).parents[1] / "csrc"
    return installed if installed.is_dir() else Path(__file__).parents[2] / "csrc" / "cuda"


def driver_too_old(driver: int, built: str) -> str | None:
    """A driver serves device code of its own major CUDA version and of older ones."""
    if driver // 1000 >= int(built.split(".")[0]):
        return None
    version = f"CUDA {driver // 1000}.{driver % 1000 // 10}" if driver else "no CUDA version"
    return f"its device code is of CUDA {built}, and the driver serves {version}; update the driver"


def uncovered_capability(capability: tuple[int, int], archs: str) -> str | None:
    """Why device code for `archs` ("8.0;8.6;9.0+PTX") does not run on a GPU, or None.

    Device code for X.Y runs on X.Z with Z >= Y; the driver compiles PTX of X.Y for all that is
    newer.
    """
    for arch in archs.split(";"):
        number, _, ptx = arch.strip().partition("+")
        if number[-1:].isalpha():  # 9.0a: for that architecture alone
            if (int(number[0]), int(number[2])) == capability:
                return None
            continue
        major, minor = (int(part) for part in number.split("."))
        if (major == capability[0] and minor <= capability[1]) or (
            ptx and (major, minor) <= capability
        ):
            return None
    found = f"{capability[0]}.{capability[1]}"
    return f"its device code is for compute capability {archs}, and this GPU has {found}"
