"""Every row of the launch tables, compiled for the GPUs it is meant for; no GPU is needed.

A row passes when nothing spills, its shared memory fits, its products run where they should (wgmma
on Hopper, mma on Ampere, float32 units for "ieee"), every address is computed in 64 bits, and every
load in its main loop is 16 bytes wide where pixels are contiguous and aligned.
"""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import functools
import multiprocessing
import os
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter replaces the compiler", allow_module_level=True)

from dsno_kernels._modes import coefficients
from dsno_kernels.backends import triton as backend
from dsno_kernels.backends.triton import configs
from dsno_kernels.backends.triton.configs import Architecture
from tests import triton_aot
from tests.triton_aot import Launch, Report

# Shared memory that one program may use, bytes (CUDA programming guide, table of compute
# capabilities): 163, 99 and 227 KiB.
SHARED = {80: 166_912, 86: 101_376, 90: 232_448}
SIZES = {"*fp32": 4, "*fp16": 2, "*bf16": 2, "*u8": 1, "*i32": 4}
AXES = {"time_dim": 1, "channel_dim": 2}
SLOPE = 0.01


class Rows(dict[tuple[str, str, str], configs.Config]):
    """A table that remembers which of its rows were asked for."""

    def __init__(self, rows: dict[tuple[str, str, str], configs.Config]) -> None:
        super().__init__(rows)
        self.seen: set[tuple[str, str, str]] = set()

    def __getitem__(self, key: tuple[str, str, str]) -> configs.Config:
        self.seen.add(key)
        return super().__getitem__(key)


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def forward(
    T: int,
    K: int,
    batch: int,
    precision: str,
    dtype: torch.dtype = torch.float32,
    C: int = 256,
    size: int = 32,
    signs: bool = True,
) -> None:
    x = meta(batch, T, C, size, size, dtype=dtype)
    backend.spectral_conv(
        x, meta(C, C, K, 2), n=T, bias=meta(C), residual=x, negative_slope=SLOPE,
        save_positive=signs, out_dtype=dtype, precision=precision, **AXES,
    )  # fmt: skip


def backward_input(T: int, K: int, batch: int, precision: str, size: int = 32) -> None:
    x = meta(batch, T, 256, size, size)
    positive = meta(batch, T, 256, size * size // 8, dtype=torch.uint8)
    backend.spectral_conv(
        x, meta(256, 256, K, 2), n=T, adjoint=True, x_positive=positive, negative_slope=SLOPE,
        precision=precision, **AXES,
    )  # fmt: skip


def backward_weight(T: int, K: int, precision: str, dtype: torch.dtype = torch.float32) -> None:
    x, positive = meta(8, T, 256, 32, 32, dtype=dtype), meta(8, T, 256, 128, dtype=torch.uint8)
    backend.spectral_conv_weight_grad(
        x, x, K, grad_positive=positive, negative_slope=SLOPE, precision=precision, **AXES
    )


def transforms() -> None:
    backend.truncated_rfft(meta(64, 64, 1024), 32, dim=2)
    backend.truncated_irfft(meta(64, 32, 256, 2), 100, dim=1)


def calls() -> Iterator[Callable[[], object]]:
    """Calls that together use every row, in the element types and epilogues that need most
    registers.
    """
    yield transforms
    for precision in ("fp32", "bf16x3", "tf32", "bf16"):
        for T, K in ((4, 2), (4, 3), (8, 5), (16, 8)):
            yield functools.partial(forward, T, K, 32, precision)
            if K == 2:
                yield functools.partial(forward, T, K, 32, precision, signs=False)
            yield functools.partial(backward_input, T, K, 32, precision)
            yield functools.partial(backward_input, T, min(K, 5), 1, precision, 8)
            yield functools.partial(backward_weight, T, K, precision)
    for precision, dtype in (("bf16", torch.bfloat16), ("tf32", torch.float16)):
        yield functools.partial(forward, 4, 2, 32, precision, dtype)
        yield functools.partial(forward, 4, 2, 32, precision, dtype, signs=False)
        yield functools.partial(backward_weight, 4, 2, precision, dtype)
    yield functools.partial(forward, 64, 16, 8, "tf32")
    yield functools.partial(backward_input, 64, 16, 8, "tf32")
    yield functools.partial(forward, 1, 1, 32, "fp32")
    yield functools.partial(forward, 1, 1, 1, "fp32", torch.float32, 1, 1)  # every 1 is a constant
    yield functools.partial(forward, 9, 1, 1, "fp32", torch.float32, 1, 1)
    yield functools.partial(backend.truncated_rfft, meta(1, 1), 1, dim=1)
    yield functools.partial(
        forward, 4, 2, 2, "fp32", torch.float32, 7, 5
    )  # odd sizes: small tiles, no alignment


def launches(capability: int) -> list[Launch]:
    """The distinct launches of all calls; every row of the table is among them."""
    table = configs.ARCHITECTURES[divmod(capability, 10)]
    rows = Rows(table.rows)
    watched = dataclasses.replace(table, rows=rows)
    found: dict[Launch, None] = {}
    for call in calls():
        found |= dict.fromkeys(triton_aot.launches_of(watched, capability, call))
    assert rows.seen == set(table.rows), f"no case for {set(table.rows) - rows.seen}"
    return list(found)


def problem_of(one: Launch, report: Report) -> str | None:
    constants = dict(one.constants)
    if report.stack or report.local:
        return f"spills: {report.stack} bytes of stack, {report.local} instructions"
    if report.shared > SHARED[one.capability]:
        return f"{report.shared} bytes of shared memory, {SHARED[one.capability]} fit"
    if report.narrow_addresses:
        return f"{report.narrow_addresses} addresses in 32 bits"
    if "METHOD" in constants:
        hopper = one.capability == 90 and left_rows(one, constants) >= 64
        expected = "none" if constants["METHOD"] == "ieee" else "wgmma" if hopper else "mma"
        if report.tensor_cores != expected:
            return f"products run on {report.tensor_cores}, expected {expected}"
    return narrow_access(one, report)


class Tile(NamedTuple):
    """What a program loads or stores at once, with the letter of its strides; planes have none."""

    pointer: str
    letter: str
    elements: int


def narrow_access(one: Launch, report: Report) -> str | None:
    """The rule of 16 bytes: so wide are all loads in the main loop and all stores of tensors whose
    pixels are contiguous and aligned, of spectra, and of packed weights. A tile of fewer bytes a
    thread moves at once.
    """
    loads, stores = tiles_of(one)
    for what, tiles, found in ("load", loads, report.loop_loads), ("store", stores, report.stores):
        needed: collections.Counter[int] = collections.Counter()
        for tile in tiles:
            item = SIZES[dict(one.signature)[tile.pointer]]
            size = item * tile.elements // (32 * one.num_warps)
            # The weight gradient stages 16-bit tensors for operands of 32 bits at half the width.
            halved = item == 2 and "weight_grad" in one.kernel and not is_bfloat16(one)
            largest = 8 if halved else 16
            if is_aligned(one, tile):
                needed[min(size, largest)] += size
        for width in needed:
            wanted = sum(size for other, size in needed.items() if other >= width)
            wide = sum(int(other) * count for other, count in found.items() if int(other) >= width)
            if wide < wanted:
                return f"{wanted} bytes in {what}s of {width} or more expected, got {found}"
    return None


def is_bfloat16(one: Launch) -> bool:
    return str(dict(one.constants)["METHOD"]).startswith("bf16")


def is_aligned(one: Launch, tile: Tile) -> bool:
    places = [name for name, _ in one.signature]
    multiples = {places[place] for place in one.divisible}
    if tile.pointer == "weight_ptr":
        return dict(one.constants)["PACKED"]
    if not tile.letter:
        return "rows" in multiples
    strides = {name for name in places if name.startswith(f"stride_{tile.letter}")}
    contiguous = f"stride_{tile.letter}p"
    return (
        dict(one.constants).get(contiguous) == 1
        and (strides | {"P", "padded_pixels"}) - {contiguous} <= multiples
    )


def planes_of(pointer: str) -> int:
    """Planes of a bin in a spectrum of this type."""
    return 1 if pointer == "*i32" else 2


def tiles_of(one: Launch) -> tuple[list[Tile], list[Tile]]:
    """What a kernel loads in a step of its main loop, and what it stores; without the sign bits
    that it loads or a transform stores, tables, and what is small.
    """
    c = dict(one.constants)
    types = dict(one.signature)
    halves = 2 if str(c.get("METHOD")).endswith("x3") else 1
    # A word holds both parts of a bin.
    numbers = c.get("BLOCK_M", 0) * planes_of(types.get("spectrum_ptr", "")) // 2
    match one.kernel:
        case "spectral_conv_kernel":
            planes = halves * len(coefficients(c["T"], c["K"]))
            stored = [Tile("y_ptr", "y", c["BLOCK_P"] * c["BLOCK_O"])]
            if types["y_positive_ptr"] == "*u8":  # the neighbors that a thread has move at once
                stored.append(Tile("y_positive_ptr", "y", c["BLOCK_P"] // 8 * c["BLOCK_O"]))
            return (
                c["T"] * [Tile("x_ptr", "x", c["BLOCK_P"] * c["BLOCK_I"])]
                + planes * [Tile("weight_ptr", "w", c["BLOCK_I"] * c["BLOCK_O"])],
                c["N"] * stored,
            )
        case "spectral_conv_weight_grad_kernel":
            return (
                c["T"] * [Tile("x_ptr", "x", c["BLOCK_R"] * c["BLOCK_I"])]
                + c["N"] * [Tile("grad_ptr", "g", c["BLOCK_R"] * c["BLOCK_O"])],
                [],
            )
        case "spectral_conv_mix_kernel":
            return (
                planes_of(types["z_ptr"]) * [Tile("z_ptr", "", c["BLOCK_R"] * c["BLOCK_I"])]
                + 2 * halves * [Tile("weight_ptr", "w", c["BLOCK_I"] * c["BLOCK_O"])],
                planes_of(types["y_ptr"]) * [Tile("y_ptr", "", c["BLOCK_R"] * c["BLOCK_O"])],
            )
        case "spectral_conv_weight_grad_planes_kernel":
            return (
                planes_of(types["z_ptr"]) * [Tile("z_ptr", "", c["BLOCK_R"] * c["BLOCK_I"])]
                + planes_of(types["g_ptr"]) * [Tile("g_ptr", "", c["BLOCK_R"] * c["BLOCK_O"])],
                [],
            )
        case "truncated_rfft_kernel":
            return (
                [Tile("x_ptr", "x", c["BLOCK_R"] * c["BLOCK_T"])],
                [Tile("spectrum_ptr", "s", c["BLOCK_R"] * numbers)],
            )
        case "truncated_irfft_kernel":
            return (
                [Tile("spectrum_ptr", "s", c["BLOCK_R"] * numbers)],
                [Tile("y_ptr", "y", c["BLOCK_R"] * c["BLOCK_T"])],
            )
    return [], []


def left_rows(one: Launch, constants: dict[str, Any]) -> int:
    """Rows of the left operand: wgmma takes 64 at a time."""
    name = "BLOCK_I" if "weight_grad" in one.kernel else "BLOCK_P"
    return int(constants[name if name in constants else "BLOCK_R"])


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 86, 90])
def test_every_row_compiles_without_spills(capability: int) -> None:
    found = launches(capability)
    with concurrent.futures.ProcessPoolExecutor(
        2, mp_context=multiprocessing.get_context("spawn")
    ) as pool:
        reports = list(pool.map(triton_aot.compile_launch, found))
    wrong = [
        f"{one.kernel} {dict(one.constants)} {one.num_warps} warps {one.num_stages}: {problem}"
        for one, report in zip(found, reports, strict=True)
        if (problem := problem_of(one, report))
    ]
    assert not wrong, "\n".join(wrong)


def test_an_unknown_gpu_gets_tiles_that_fit_everywhere() -> None:
    assert configs.SAFE is configs.ARCHITECTURES[8, 6]
    assert isinstance(configs.SAFE, Architecture) and min(SHARED.values()) == SHARED[86]
