"""Compile the launches of the Triton backend for a GPU that is not here, and read what came out.

The launchers run on meta tensors; `launch.submit` is replaced by a recorder, so exactly what they
would launch is compiled, specialized as Triton's own launcher does: None and 1 are constants,
multiples of 16 are marked.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import pathlib
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dsno_kernels.backends.triton import launch
from dsno_kernels.backends.triton.configs import Architecture

_POINTERS = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.uint8: "*u8",
}


class Launch(NamedTuple):
    """One specialization of one kernel: hashable, and free of objects that cannot go to another
    process.
    """

    module: str
    kernel: str
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    divisible: tuple[int, ...]
    num_warps: int
    num_stages: int
    capability: int


class Report(NamedTuple):
    """What the compiler made of a launch."""

    registers: int
    stack: int
    shared: int
    tensor_cores: str
    async_copies: int
    narrow_addresses: int


@contextlib.contextmanager
def recorded(table: Architecture, capability: int) -> Iterator[list[Launch]]:
    """Collects the launches of the block instead of running them."""
    launches: list[Launch] = []

    def record(
        kernel: Any, programs: int, config: Any, device: torch.device, /, **arguments: Any
    ) -> None:
        assert 0 < programs < 2**31
        launches.append(
            _specialize(kernel, config.num_warps, config.num_stages, capability, arguments)
        )

    submit, architecture = launch.submit, launch.architecture
    launch.submit, launch.architecture = record, lambda device: table  # type: ignore[assignment]
    try:
        yield launches
    finally:
        launch.submit, launch.architecture = submit, architecture


def _specialize(
    kernel: Any, num_warps: int, num_stages: int, capability: int, arguments: dict[str, Any]
) -> Launch:
    signature, constants, divisible = [], [], []
    for place, parameter in enumerate(kernel.params):
        value = arguments[parameter.name]
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1):
            kind = "constexpr"
            constants.append((parameter.name, value))
        elif isinstance(value, Tensor):
            kind = _POINTERS[value.dtype]
            divisible.append(place)
        elif isinstance(value, float):
            kind = "fp32"
        else:
            kind = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0:
                divisible.append(place)
        signature.append((parameter.name, kind))
    name = kernel.fn.__name__
    return Launch(
        kernel.fn.__module__,
        name,
        tuple(signature),
        tuple(constants),
        tuple(divisible),
        num_warps,
        num_stages,
        capability,
    )


@functools.cache
def _cuobjdump() -> str:
    from triton import knobs

    return str(knobs.nvidia.cuobjdump.path)


def compile_launch(one: Launch) -> Report:
    """Compile for `sm_<capability>` without a device."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    source = ASTSource(
        getattr(importlib.import_module(one.module), one.kernel),
        signature=dict(one.signature),
        constexprs=dict(one.constants),
        attrs={(place,): [["tt.divisibility", 16]] for place in one.divisible},
    )
    options = {"num_warps": one.num_warps, "num_stages": one.num_stages, "enable_fp_fusion": True}
    built = triton.compile(source, target=GPUTarget("cuda", one.capability, 32), options=options)
    with tempfile.TemporaryDirectory() as folder:
        cubin = pathlib.Path(folder) / "kernel.cubin"
        cubin.write_bytes(built.asm["cubin"])
        usage = subprocess.run(
            [_cuobjdump(), "-res-usage", str(cubin)], capture_output=True, text=True, check=True
        )
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage.stdout)
    assert found is not None, usage.stdout
    ptx, ttir = built.asm["ptx"], built.asm["ttir"]
    cores = "wgmma" if "wgmma.mma_async" in ptx else "mma" if "mma.sync" in ptx else "none"
    # Offsets that are added to a pointer: `tt.addptr %p, %o : .., tensor<64x32xi32>` would be 32
    # bits wide.
    narrow = [
        line
        for line in ttir.splitlines()
        if "tt.addptr" in line and re.search(r", (tensor<[^>]*x)?i32>?$", _bare(line))
    ]
    return Report(
        int(found[1]),
        int(found[2]),
        built.metadata.shared,
        cores,
        ptx.count("cp.async."),
        len(narrow),
    )


def _bare(line: str) -> str:
    """A line of IR without its location."""
    return re.sub(r"\s+loc\(.*\)$", "", line).strip()


def launches_of(table: Architecture, capability: int, call: Callable[[], object]) -> list[Launch]:
    with recorded(table, capability) as launches:
        call()
    return launches
