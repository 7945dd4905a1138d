"""What a measurement must say about the machine it was made on."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
from pathlib import Path
from typing import Any

import torch

from benchmarks.host_cuda import cuda, on_gpu

_ISA = ("amx_bf16", "avx512_bf16", "avx512f", "avx2")


def cpu_flags() -> set[str]:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return set()
    found = re.search(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)
    return set(found[1].split()) if found else set()


def cpu_model() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    model = found[1] if found else platform.processor() or platform.machine()
    return re.sub(r"\((?:R|TM)\)|\s+CPU\b|@.*$", "", model).strip()


def describe(device: torch.device) -> dict[str, Any]:
    """Versions and hardware; no host name and no path."""
    info: dict[str, Any] = {
        "device": "cuda" if on_gpu(device) else device.type,
        "cpu": cpu_model(),
        "isa": [name for name in _ISA if name in cpu_flags()],
        "cores": _cores(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "neuraloperator": _version("neuraloperator"),
    }
    if on_gpu(device):
        properties = cuda().get_device_properties(device)
        info |= {
            "gpu": properties.name,
            "gpu_memory_gib": round(properties.total_memory / 2**30, 1),
            "capability": f"{properties.major}.{properties.minor}",
            "l2_mib": round(getattr(properties, "L2_cache_size", 0) / 2**20),
            "cuda": torch.version.cuda,
        }
    return info


def slug(device: torch.device) -> str:
    """The name of the results file: the GPU's model, or the CPU's with widest ISA and cores."""
    info = describe(device)
    isa = info["isa"][0] if info["isa"] else "portable"
    name = info.get("gpu") or f"{info['cpu']} {isa} {info['cores']} cores"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _cores() -> int:
    """Cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
