"""The weight as kernels read it: the row of the table that serves a problem, and its packing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dsno_kernels.backends.triton import launch
from dsno_kernels.backends.triton.configs import Architecture, Config
from dsno_kernels.backends.triton.launch import Buffer, Operand

# What kernels that can pack take where there is nothing to pack.
NOTHING: dict[str, Any] = {
    "weight_i": 0,
    "weight_o": 0,
    "padded_in": 0,
    "padded_out": 0,
    "stride_wi": 0,
    "stride_wo": 0,
    "stride_wk": 0,
    "stride_wc": 0,
    "ADJOINT": False,
    "PRODUCTS": "",
    "BLOCK_W": 16,
}


class Packing(NamedTuple):
    """Planes to pack a weight into, and the programs and arguments of `pack_weight_tile`."""

    buffer: Buffer
    programs: int
    arguments: dict[str, Any]


class Weight(NamedTuple):
    """How kernels read the weight: as it is, or from planes that are packed first."""

    packing: Packing | None
    arguments: dict[str, Any]

    def buffer(self) -> Tensor | None:
        return None if self.packing is None else self.packing.buffer.empty()


def choose_row(
    table: Architecture,
    kernel: str,
    method: str,
    kind: str,
    rows: int,
    O: int,
    *,
    planes: int = 1,
) -> tuple[Config, bool]:
    """The row of the table that serves a problem, and whether to pack the weight for it.

    Where wide tiles take more than one wave, programs read the weight again and again: it is worth
    rounding and packing it once, by a launch or beside a transform. Tiles that all run at once read
    it as it is, but for those of class "8", whose registers are full. This is a model: it is not
    measured.
    """
    config = table.rows[kernel, method, kind]
    programs = launch.cdiv(rows, config.tile[0]) * launch.cdiv(O, config.tile[2]) * planes
    if programs > table.multiprocessors:
        return config, True
    return table.rows[kernel, method, f"{kind} narrow".strip()], kind == "8"


def plan_weight(
    device: torch.device,
    weight: Operand,
    adjoint: bool,
    method: str,
    block_i: int,
    block_o: int,
    packed: bool,
) -> Weight:
    """The weight as it is, or packed: input channels contiguous and padded to whole tiles."""
    (first, second, K, _), strides, _ = weight
    I, O = (second, first) if adjoint else (first, second)
    if not packed:
        order = (1, 0, 2, 3) if adjoint else (0, 1, 2, 3)
        return Weight(None, _arguments([strides[axis] for axis in order], False, adjoint))
    padded_in, padded_out = launch.cdiv(I, block_i) * block_i, launch.cdiv(O, block_o) * block_o
    halves = 2 if method.endswith("x3") else 1
    shape = (halves, K, 2, padded_out, padded_in)
    size = 16 if min(padded_in, padded_out) <= 16 else 32
    packing = Packing(
        Buffer(shape, launch.operand_dtype(method), device),
        launch.cdiv(padded_in, size) * launch.cdiv(padded_out, size) * 2 * K,
        {
            "weight_i": first,
            "weight_o": second,
            "padded_in": padded_in,
            "padded_out": padded_out,
            "stride_wi": strides[0],
            "stride_wo": strides[1],
            "stride_wk": strides[2],
            "stride_wc": strides[3],
            "ADJOINT": adjoint,
            "PRODUCTS": method,
            "BLOCK_W": size,
        },
    )
    plane = padded_in * padded_out
    return Weight(packing, _arguments((1, padded_in, 2 * plane, plane), True, adjoint))


def _arguments(strides: Sequence[int], packed: bool, adjoint: bool) -> dict[str, Any]:
    """How kernels find W[i, o, k, part]; packed planes are conjugated and transposed already."""
    named = dict(zip(("stride_wi", "stride_wo", "stride_wk", "stride_wc"), strides, strict=True))
    return {**named, "PACKED": packed, "ADJOINT": adjoint and not packed}
