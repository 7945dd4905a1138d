"""Launch parameters: one table per architecture; nothing is tuned at run time.

A row is chosen by kernel, by method (how the products are computed) and by shape class. The fused
kernels hold all coefficients of a tile on chip; their classes are "3" (up to 4 times, 3
coefficients), "4" (up to 4 times) and "8" (up to 8). A class without a row, where no tile fits the
registers, and all longer transforms run on the planar kernels. `narrow` rows serve problems that
would leave most of the GPU idle with the wide tiles. Architectures that are not listed take the
table of the smallest shared memory, which fits everywhere.

The tiles are the largest of a hand-made list that compile without spills, as
tests/test_triton_aot.py checks; none has been timed on a GPU.
"""

from __future__ import annotations

from typing import NamedTuple


class Config(NamedTuple):
    """Tile sizes and launch options; the meaning of the three tile sizes is the kernel's."""

    tile: tuple[int, int, int]
    num_warps: int
    num_stages: int


class Architecture(NamedTuple):
    """What the launchers need to know about a GPU generation."""

    fp32_method: str
    transform_method: str  # of the thin transforms of the general kernels: float32-accurate
    programs: int  # enough to fill the GPU; also how far a reduction over pixels is split
    rows: dict[tuple[str, str, str], Config]


MAX_LENGTH = 8  # of the fused kernels: a tile holds all times and coefficients on chip


PACK_WEIGHT = Config((32, 32, 1), 4, 1)
REDUCE = Config((256, 1, 1), 4, 1)


def shape_class(length: int, coefficients: int) -> str:
    """Shape class of the fused kernels: what a tile has to hold on chip."""
    if length > 4:
        return "8"
    return "3" if coefficients <= 3 else "4"


def _rows(table: dict[str, dict[str, Config]]) -> dict[tuple[str, str, str], Config]:
    """{kernel: {"method class": config}} -> {(kernel, method, class): config}."""
    rows = {}
    for kernel, configs in table.items():
        for key, config in configs.items():
            method, _, kind = key.partition(" ")
            rows[kernel, method, kind] = config
    return rows


_SM90 = _rows(
    {
        "spectral_conv": {
            "tf32x3 3": Config((64, 16, 64), 8, 3),
            "tf32x3 3 narrow": Config((32, 16, 16), 4, 2),
            "tf32x3 4": Config((64, 16, 32), 4, 2),
            "tf32x3 4 narrow": Config((32, 16, 16), 4, 2),
            "tf32x3 8": Config((64, 16, 16), 8, 2),
            "tf32x3 8 narrow": Config((64, 16, 16), 8, 2),
            "bf16x3 3": Config((64, 32, 64), 8, 2),
            "bf16x3 3 narrow": Config((32, 16, 16), 4, 2),
            "bf16x3 4": Config((64, 16, 64), 8, 2),
            "bf16x3 4 narrow": Config((32, 16, 16), 4, 2),
            "bf16x3 8": Config((64, 16, 32), 8, 2),
            "bf16x3 8 narrow": Config((16, 16, 16), 2, 2),
            "tf32 3": Config((64, 32, 64), 8, 3),
            "tf32 3 narrow": Config((32, 32, 32), 4, 2),
            "tf32 4": Config((64, 32, 64), 8, 2),
            "tf32 4 narrow": Config((32, 32, 32), 4, 2),
            "tf32 8": Config((64, 16, 32), 8, 2),
            "tf32 8 narrow": Config((32, 16, 16), 4, 2),
            "bf16 3": Config((64, 32, 64), 8, 3),
            "bf16 3 narrow": Config((32, 32, 32), 4, 2),
            "bf16 4": Config((64, 32, 64), 8, 2),
            "bf16 4 narrow": Config((32, 32, 32), 4, 2),
            "bf16 8": Config((64, 16, 32), 8, 2),
            "bf16 8 narrow": Config((32, 16, 16), 4, 2),
        },
        "spectral_conv_weight_grad": {
            "tf32x3 3": Config((64, 64, 16), 8, 2),
            "tf32x3 4": Config((64, 32, 16), 4, 2),
            "bf16x3 3": Config((64, 64, 16), 8, 2),
            "bf16x3 4": Config((64, 32, 16), 4, 2),
            "bf16x3 8": Config((64, 16, 16), 4, 2),
            "tf32 3": Config((64, 64, 32), 8, 3),
            "tf32 4": Config((64, 64, 16), 8, 2),
            "tf32 8": Config((64, 32, 16), 8, 2),
            "bf16 3": Config((64, 64, 32), 8, 3),
            "bf16 4": Config((64, 64, 16), 8, 2),
            "bf16 8": Config((64, 32, 16), 8, 2),
        },
        "spectral_conv_mix": {
            "tf32x3": Config((64, 32, 64), 8, 2),
            "tf32x3 narrow": Config((32, 16, 32), 4, 2),
            "bf16x3": Config((64, 32, 64), 8, 2),
            "bf16x3 narrow": Config((32, 32, 32), 4, 2),
            "tf32": Config((128, 32, 64), 8, 3),
            "tf32 narrow": Config((32, 32, 32), 4, 2),
            "bf16": Config((128, 32, 64), 8, 3),
            "bf16 narrow": Config((32, 32, 32), 4, 2),
        },
        "spectral_conv_weight_grad_planes": {
            "tf32x3": Config((64, 64, 32), 8, 2),
            "bf16x3": Config((64, 64, 16), 8, 2),
            "tf32": Config((64, 64, 32), 8, 3),
            "bf16": Config((64, 64, 32), 8, 3),
        },
        "truncated_rfft": {
            "tf32x3": Config((64, 32, 32), 4, 2),
        },
        "truncated_irfft": {
            "tf32x3": Config((64, 32, 32), 4, 2),
        },
    }
)


_SM80 = _rows(
    {
        "spectral_conv": {
            "tf32x3 3": Config((64, 16, 32), 4, 2),
            "tf32x3 3 narrow": Config((32, 16, 16), 4, 2),
            "tf32x3 4": Config((32, 16, 16), 4, 2),
            "tf32x3 4 narrow": Config((32, 16, 16), 4, 2),
            "bf16x3 3": Config((64, 16, 32), 4, 2),
            "bf16x3 3 narrow": Config((16, 16, 16), 4, 2),
            "bf16x3 4": Config((64, 16, 32), 4, 2),
            "bf16x3 4 narrow": Config((32, 16, 16), 4, 2),
            "bf16x3 8": Config((64, 16, 16), 8, 2),
            "bf16x3 8 narrow": Config((16, 16, 16), 2, 2),
            "tf32 3": Config((128, 16, 32), 8, 2),
            "tf32 3 narrow": Config((32, 32, 32), 4, 2),
            "tf32 4": Config((64, 16, 32), 4, 2),
            "tf32 4 narrow": Config((32, 32, 32), 4, 2),
            "tf32 8": Config((32, 16, 16), 4, 2),
            "tf32 8 narrow": Config((32, 16, 16), 4, 2),
            "bf16 3": Config((128, 16, 32), 8, 2),
            "bf16 3 narrow": Config((32, 32, 32), 4, 2),
            "bf16 4": Config((64, 16, 32), 4, 2),
            "bf16 4 narrow": Config((32, 32, 32), 4, 2),
            "bf16 8": Config((32, 16, 16), 4, 2),
            "bf16 8 narrow": Config((32, 16, 16), 4, 2),
        },
        "spectral_conv_weight_grad": {
            "tf32x3 3": Config((64, 32, 16), 4, 2),
            "tf32x3 4": Config((64, 16, 16), 4, 2),
            "bf16x3 3": Config((64, 64, 16), 8, 2),
            "bf16x3 4": Config((64, 32, 16), 4, 2),
            "bf16x3 8": Config((64, 16, 16), 4, 2),
            "tf32 3": Config((64, 64, 16), 8, 2),
            "tf32 4": Config((64, 32, 16), 4, 2),
            "tf32 8": Config((32, 16, 16), 4, 2),
            "bf16 3": Config((64, 64, 16), 8, 2),
            "bf16 4": Config((64, 64, 16), 8, 2),
            "bf16 8": Config((32, 16, 16), 4, 2),
        },
        "spectral_conv_mix": {
            "tf32x3": Config((64, 16, 32), 4, 2),
            "tf32x3 narrow": Config((32, 16, 32), 4, 2),
            "bf16x3": Config((64, 32, 64), 8, 2),
            "bf16x3 narrow": Config((32, 32, 32), 4, 2),
            "tf32": Config((128, 32, 64), 8, 3),
            "tf32 narrow": Config((32, 32, 32), 4, 2),
            "bf16": Config((128, 32, 64), 8, 3),
            "bf16 narrow": Config((32, 32, 32), 4, 2),
        },
        "spectral_conv_weight_grad_planes": {
            "tf32x3": Config((64, 32, 16), 4, 2),
            "bf16x3": Config((64, 64, 16), 8, 2),
            "tf32": Config((64, 64, 32), 8, 3),
            "bf16": Config((64, 64, 32), 8, 3),
        },
        "truncated_rfft": {
            "tf32x3": Config((64, 32, 16), 4, 2),
        },
        "truncated_irfft": {
            "tf32x3": Config((64, 32, 16), 8, 2),
        },
    }
)


_SM86 = _rows(
    {
        "spectral_conv": {
            "ieee 3": Config((64, 16, 64), 8, 2),
            "ieee 3 narrow": Config((32, 32, 32), 4, 2),
            "ieee 4": Config((64, 16, 64), 8, 2),
            "ieee 4 narrow": Config((32, 32, 32), 4, 2),
            "ieee 8": Config((32, 16, 32), 8, 2),
            "ieee 8 narrow": Config((32, 16, 16), 4, 2),
            "bf16x3 3": Config((64, 16, 32), 4, 2),
            "bf16x3 3 narrow": Config((16, 16, 16), 4, 2),
            "bf16x3 4": Config((64, 16, 32), 4, 2),
            "bf16x3 4 narrow": Config((32, 16, 16), 4, 2),
            "bf16x3 8": Config((64, 16, 16), 8, 2),
            "bf16x3 8 narrow": Config((16, 16, 16), 2, 2),
            "tf32 3": Config((128, 16, 32), 8, 2),
            "tf32 3 narrow": Config((32, 32, 32), 4, 2),
            "tf32 4": Config((64, 16, 32), 4, 2),
            "tf32 4 narrow": Config((32, 32, 32), 4, 2),
            "tf32 8": Config((32, 16, 16), 8, 2),
            "tf32 8 narrow": Config((32, 16, 16), 8, 2),
            "bf16 3": Config((128, 16, 32), 8, 2),
            "bf16 3 narrow": Config((32, 32, 32), 4, 2),
            "bf16 4": Config((64, 16, 32), 4, 2),
            "bf16 4 narrow": Config((32, 32, 32), 4, 2),
            "bf16 8": Config((32, 16, 16), 4, 2),
            "bf16 8 narrow": Config((32, 16, 16), 4, 2),
        },
        "spectral_conv_weight_grad": {
            "ieee 3": Config((32, 32, 16), 4, 2),
            "ieee 4": Config((64, 32, 16), 8, 2),
            "ieee 8": Config((32, 32, 16), 8, 2),
            "bf16x3 3": Config((64, 64, 16), 8, 2),
            "bf16x3 4": Config((64, 32, 16), 4, 2),
            "bf16x3 8": Config((64, 16, 16), 4, 2),
            "tf32 3": Config((64, 64, 16), 8, 2),
            "tf32 4": Config((64, 32, 16), 4, 2),
            "tf32 8": Config((32, 16, 16), 4, 2),
            "bf16 3": Config((64, 64, 16), 8, 2),
            "bf16 4": Config((64, 64, 16), 8, 2),
            "bf16 8": Config((32, 16, 16), 4, 2),
        },
        "spectral_conv_mix": {
            "ieee": Config((64, 16, 64), 8, 2),
            "ieee narrow": Config((32, 32, 32), 4, 2),
            "bf16x3": Config((64, 32, 64), 8, 2),
            "bf16x3 narrow": Config((32, 32, 32), 4, 2),
            "tf32": Config((128, 32, 64), 8, 3),
            "tf32 narrow": Config((32, 32, 32), 4, 2),
            "bf16": Config((128, 32, 64), 8, 3),
            "bf16 narrow": Config((32, 32, 32), 4, 2),
        },
        "spectral_conv_weight_grad_planes": {
            "ieee": Config((64, 64, 16), 8, 2),
            "bf16x3": Config((64, 64, 16), 8, 2),
            "tf32": Config((64, 64, 32), 8, 3),
            "bf16": Config((64, 64, 32), 8, 3),
        },
        "truncated_rfft": {
            "ieee": Config((64, 64, 32), 4, 2),
        },
        "truncated_irfft": {
            "ieee": Config((64, 32, 16), 8, 2),
        },
    }
)

# How many programs fill a GPU: about two for each of its multiprocessors.
ARCHITECTURES = {
    (8, 0): Architecture("tf32x3", "tf32x3", 216, _SM80),
    (8, 6): Architecture("ieee", "ieee", 168, _SM86),
    (8, 9): Architecture("ieee", "ieee", 168, _SM86),
    (9, 0): Architecture("tf32x3", "tf32x3", 264, _SM90),
}
SAFE = ARCHITECTURES[8, 6]
