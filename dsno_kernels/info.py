"""What this installation is and what would run: the text of `python -m dsno_kernels info`."""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
from types import ModuleType

import torch

import dsno_kernels
from dsno_kernels.functional import OPS

MISSING = "not installed"


def extension() -> tuple[ModuleType | None, str]:
    """The compiled module and what it was built with, or None and why it is missing."""
    try:
        from dsno_kernels import _C
    except ImportError as error:
        how = "build it with `pip install -e . --no-build-isolation` or `make setup`"
        return None, f"missing ({error}); {how}"
    return _C, _C.build_info


def version_of(*distributions: str) -> str:
    """The version of the first installed distribution."""
    for name in distributions:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return MISSING


def driver(module: ModuleType | None) -> str:
    """The newest CUDA version that the driver serves."""
    if not hasattr(module, "cuda_driver_version"):
        return "unknown (the extension has no CUDA part)"
    assert module is not None
    version = module.cuda_driver_version()
    return f"CUDA {version // 1000}.{version % 1000 // 10}" if version else "none"


def devices() -> list[str]:
    """The GPUs that torch sees."""
    if not torch.cuda.is_available():
        return ["none visible to torch"]
    lines = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        memory = properties.total_memory / 2**30
        capability = f"{properties.major}.{properties.minor}"
        lines.append(f"{properties.name}, compute capability {capability}, {memory:.0f} GiB")
    return lines


def instruction_set(module: ModuleType | None) -> str:
    """The instruction set that the CPU kernels use here."""
    if module is None or not hasattr(module, "cpu_isa"):
        return "none (no compiled CPU kernels)"
    return f"{module.cpu_isa()}, of {', '.join(module.cpu_isas())}"


def report() -> str:
    """Versions, devices, and for each op the backend that would run and why others would not."""
    module, build = extension()
    cuda = module.cuda_version if module is not None else ""
    rows = [
        ("dsno_kernels", dsno_kernels.__version__),
        ("Python", f"{platform.python_version()} on {platform.platform()}"),
        ("torch", f"{torch.__version__} (CUDA {torch.version.cuda or 'none'})"),
        ("triton", version_of("triton")),
        ("cupy", version_of("cupy-cuda13x", "cupy-cuda12x", "cupy")),
        ("extension", build),
        (
            "CUDA kernels",
            f"CUDA {cuda} for {module.cuda_archs}" if module and cuda else "not built",
        ),
        ("driver", driver(module)),
        *(("GPU", line) for line in devices()),
        ("CPU kernels", instruction_set(module)),
        ("threads", str(torch.get_num_threads())),
    ]
    lines = [f"{name:<13} {value}" for name, value in rows]
    for op in OPS:
        lines += ["", dsno_kernels.explain(op)]
    return "\n".join(lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`info` has none."""


def run(arguments: argparse.Namespace) -> None:
    """The command `info`."""
    print(report())
