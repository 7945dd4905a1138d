"""Compile the launches of the Triton backend for a GPU that is not here, and read what came out.

The launchers run on meta tensors; `launch.submit` and `launch.run` are replaced by recorders, so
exactly what they would launch is compiled, specialized as Triton's own launcher does: None and 1
are constants, multiples of 16 are marked.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import importlib
import pathlib
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from dsno_kernels.backends.triton import launch as planner
from dsno_kernels.backends.triton.configs import Architecture

_POINTERS = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.uint8: "*u8",
    torch.int32: "*i32",
}


# Bytes of a memory instruction by the modifier that says so; without one it is 4.
_BITS = {"128": 16, "64": 8, "32": 4, "U16": 2, "S16": 2, "U8": 1, "S8": 1}


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
    local: int  # instructions that read or write local memory
    shared: int
    tensor_cores: str
    async_copies: int
    narrow_addresses: int
    loop_loads: dict[str, int]  # global loads in the main loop by width in bytes
    stores: dict[str, int]  # global stores by width in bytes


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

    def record_planned(planned: planner.Launch, *tensors: Tensor | None) -> None:
        record(
            planned.kernel,
            planned.programs,
            planned.config,
            planned.device,
            **dict(zip(planned.pointers, tensors, strict=True)),
            **planned.arguments,
        )

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planner, "submit", record)
        patch.setattr(planner, "run", record_planned)
        patch.setattr(planner, "architecture", lambda device: table)
        yield launches


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
        usage, sass = (
            subprocess.run(
                [_cuobjdump(), option, str(cubin)], capture_output=True, text=True, check=True
            ).stdout
            for option in ("-res-usage", "-sass")
        )
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found is not None, usage
    instructions = _instructions(sass)
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
        sum(name.startswith(("LDL", "STL")) for _, name, _ in instructions),
        built.metadata.shared,
        cores,
        ptx.count("cp.async."),
        len(narrow),
        _widths(_main_loop(instructions), "LDG"),
        _widths(instructions, "STG"),
    )


# Address, name with its modifiers, operands; branches name the address that they jump to.
Instruction = tuple[int, str, str]


def _instructions(sass: str) -> list[Instruction]:
    """The instructions of `cuobjdump -sass`: `/*0320*/  @P0 BRA 0x470 ;`."""
    lines = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);", sass)
    assert lines, sass
    return [(int(address, 16), name, operands) for address, name, operands in lines]


def _main_loop(instructions: list[Instruction]) -> list[Instruction]:
    """The longest stretch that a branch back repeats; all instructions where there is no loop."""
    loops = [
        (int(target[1], 16), address)
        for address, name, operands in instructions
        if name.startswith("BRA") and (target := re.search(r"0x([0-9a-f]+)", operands))
        if int(target[1], 16) < address
    ]
    first, last = max(loops, key=lambda loop: loop[1] - loop[0], default=(0, instructions[-1][0]))
    return [one for one in instructions if first <= one[0] <= last]


def _widths(instructions: list[Instruction], kind: str) -> dict[str, int]:
    """How many global loads (LDG, or LDGSTS to shared memory) or stores of each width there are."""
    counts: collections.Counter[str] = collections.Counter()
    for _, name, _ in instructions:
        parts = name.split(".")
        if parts[0] in (kind, f"{kind}STS"):
            bits = next((part for part in parts if part in _BITS), "32")
            counts[str(_BITS[bits])] += 1
    return dict(counts)


def _bare(line: str) -> str:
    """A line of IR without its location."""
    return re.sub(r"\s+loc\(.*\)$", "", line).strip()


def launches_of(table: Architecture, capability: int, call: Callable[[], object]) -> list[Launch]:
    with recorded(table, capability) as launches:
        call()
    return launches
