"""The one place that launches: device guard, options, and what the GPU is."""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import torch
from torch import Tensor

from dsno_kernels.backends.triton import configs
from dsno_kernels.backends.triton.configs import Architecture, Config


@functools.lru_cache(maxsize=64)
def architecture(device: torch.device) -> Architecture:
    """The table of a device; the interpreter takes that of the safe architecture."""
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)
    return configs.ARCHITECTURES.get(capability, configs.SAFE)


def submit(
    kernel: Any, programs: int, config: Config, device: torch.device, /, **arguments: Any
) -> None:
    """Launch `programs` programs on the current stream of `device`."""
    guard = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
    with guard:
        kernel[(programs,)](
            **arguments,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            enable_fp_fusion=True,
        )


def method_of(precision: str, table: Architecture) -> str:
    """How the products of a precision are computed on an architecture."""
    return table.fp32_method if precision == "fp32" else precision


def operand_dtype(method: str) -> torch.dtype:
    return torch.bfloat16 if method.startswith("bf16") else torch.float32


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def block(size: int, largest: int) -> int:
    """The tile for an axis: a power of two, 16 (tensor cores) to `largest`."""
    return min(largest, max(16, 1 << (size - 1).bit_length()))


def padded_pixels(P: int) -> int:
    """Pixels of a batch entry, padded so that its sign bits fill whole bytes."""
    return cdiv(P, 8) * 8


@functools.lru_cache(maxsize=64)
def twiddles(length: int, device: torch.device) -> Tensor:
    """cos and -sin of 2 pi j / length, [2, length] float32; exact at quarter turns."""
    turns = torch.arange(length, dtype=torch.float64) * (2 * torch.pi / length)
    table = torch.stack([turns.cos(), -turns.sin()])
    table = torch.where(table.abs() < 1e-12, 0.0, table)
    return table.to(device, torch.float32)
