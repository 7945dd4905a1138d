"""Launchers of the integrator steps that run their CUDA device code on the CPU."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from dsno_kernels.backends.cuda_steps import Launch
from tests import shim


def plain_launch(folder: Path) -> Launch:
    """In this process, on the tensors themselves."""
    path = shim.build("run_exp_step.cpp", folder / "steps.so", "plain", "-shared", "-fPIC", "-O2")
    library = ctypes.CDLL(str(path))

    def launch(kernel: str, grid: int, params: bytes, tensors: Sequence[Tensor]) -> None:
        arguments = ctypes.c_int64(grid), params, ctypes.c_int64(len(params))
        assert library.launch(kernel.encode(), *arguments) == 0

    return launch


def sanitized_launch(folder: Path, sanitizer: str = "asan+ubsan") -> Launch:
    """In a program under sanitizers, on copies as large as the tensors' storages."""
    program = shim.build("run_exp_step.cpp", folder / "run_exp_step", sanitizer)

    def launch(kernel: str, grid: int, params: bytes, tensors: Sequence[Tensor]) -> None:
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in tensors}
        memory = [
            torch.empty(0, dtype=torch.uint8).set_(storage)  # type: ignore[call-overload]
            for storage in storages.values()
        ]
        pointers = b""
        for place in range(0, len(params), 8):
            (word,) = struct.unpack_from("<Q", params, place)
            for buffer, (start, storage) in enumerate(storages.items()):
                if start <= word < start + storage.nbytes():
                    pointers += struct.pack("<3q", place, buffer, word - start)
        name, count = kernel.encode(), len(pointers) // 24
        head = struct.pack("<5q", len(name), grid, len(params), len(memory), count)
        case, result = folder / "case", folder / "result"
        with case.open("wb") as file:
            file.write(head + name + params)
            for data in memory:
                file.write(struct.pack("<q", data.numel()) + bytes(data.numpy()))
            file.write(pointers)
        shim.run(program, case, result)
        found = torch.frombuffer(bytearray(result.read_bytes()), dtype=torch.uint8)
        for data, after in zip(memory, found.split([d.numel() for d in memory]), strict=True):
            data.copy_(after)

    return launch
