"""Launch parameters: one table of data per architecture; nothing is tuned at run time.

`tables/sm_XX.json` holds the table of compute capability X.X. A row is chosen by kernel, by method
(how the products are computed) and by shape class. The fused kernels hold all coefficients of a
tile on chip; their classes are "3" (up to 4 times, 3 coefficients), "4" (up to 4 times) and "8" (up
to 8). A class without a row, where no tile fits the registers, and all longer transforms run on the
planar kernels. `narrow` rows serve problems whose wide tiles take no more than one wave. GPUs
without a table take that of the smallest shared memory, which fits everywhere.

Every tile reads its weights from L2. A program that walked over its pixels with the weights of C <=
64 in shared memory would spill where that might pay: at T = 8 by 1.9 KB a thread on sm_90 (C = 64)
and 0.4 KB on sm_86 (C = 32), whose tensor cores take both operands from registers. So tiles are 64
channels wide where that compiles: x is then read once, and from 32 pixels on L2 takes no longer
than DRAM, within 7 % by the model.

The `source` of a row says how it was chosen: "compiled" (it compiles without spills, as
tests/test_triton_aot.py checks for all rows), "modeled: .." (best in the model of
benchmarks/tuning_model.py) or "measured: .." (fastest on the GPU it names). benchmarks/tune.py
writes the tables.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

TABLES = Path(__file__).parent / "tables"

METHODS = ("ieee", "tf32x3", "tf32", "bf16x3", "bf16")
_FUSED = ("3", "4", "8")
# The shape classes of each kernel.
CLASSES = {
    "spectral_conv": (*_FUSED, *(f"{kind} narrow" for kind in _FUSED)),
    "spectral_conv_weight_grad": _FUSED,
    "spectral_conv_mix": ("", "narrow"),
    "spectral_conv_weight_grad_planes": ("",),
    "truncated_rfft": ("",),
    "truncated_irfft": ("",),
}
SOURCE = re.compile(r"compiled|(modeled|measured): .+")
_HEAD = {
    "architecture": str,
    "fp32_method": str,
    "transform_method": str,
    "real_bins": bool,
    "multiprocessors": int,
}
_ROW = {
    "kernel": str,
    "method": str,
    "class": str,
    "tile": list,
    "warps": int,
    "stages": int,
    "source": str,
}

RowKey = tuple[str, str, str]


class Config(NamedTuple):
    """Tile sizes and launch options; the meaning of the three tile sizes is the kernel's."""

    tile: tuple[int, int, int]
    num_warps: int
    num_stages: int


@dataclass(frozen=True, eq=False)
class Architecture:
    """What the launchers need to know about a GPU generation.

    A table is equal to itself alone: plans of launches are kept by their table.
    """

    fp32_method: str
    transform_method: str  # of the thin transforms of the general kernels: float32-accurate
    # Whether planar kernels have a loop of its own for bins that are real: one product, not four.
    # It takes registers, and where both operands of a product are in registers, some rows spill.
    real_bins: bool
    multiprocessors: int  # of the GPU that the table is for: A100, RTX A6000, H200
    rows: dict[RowKey, Config]


MAX_LENGTH = 8  # of the fused kernels: a tile holds all times and coefficients on chip

PACK_WEIGHT = Config((32, 32, 1), 4, 1)
REDUCE = Config((256, 1, 1), 4, 1)


def shape_class(length: int, coefficients: int) -> str:
    """Shape class of the fused kernels: what a tile has to hold on chip."""
    if length > 4:
        return "8"
    return "3" if coefficients <= 3 else "4"


def table_path(capability: tuple[int, int], folder: Path = TABLES) -> Path:
    return folder / f"sm_{capability[0]}{capability[1]}.json"


@functools.cache
def load(path: Path) -> Architecture:
    """The table in a file, checked; `ValueError` names the file and the row that is wrong."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path.name} is not JSON: {error}") from None
    return parse(data, path.name)


def parse(data: Any, name: str) -> Architecture:
    """The table in what a JSON file holds; `name` is that of the file, for errors.

    Raises:
        ValueError: A field is missing, of a wrong type or value, a row stands twice, or a row that
            the launchers rely on is missing.
    """
    _check_fields(data, {**_HEAD, "rows": list}, name)
    if f"{data['architecture']}.json" != name:
        raise ValueError(f"{name} holds the table of {data['architecture']}: rename one of them")
    for field in ("fp32_method", "transform_method"):
        _check_choice(data[field], METHODS, field, name)
    if data["multiprocessors"] < 1:
        count = data["multiprocessors"]
        raise ValueError(f"{name}: multiprocessors is {count}; give a positive number")
    rows: dict[RowKey, Config] = {}
    for number, row in enumerate(data["rows"], 1):
        key, config = _parse_row(row, f"{name}, row {number}")
        if key in rows:
            raise ValueError(f"{name}, row {number}: {' '.join(key).strip()} stands twice")
        rows[key] = config
    for key in _needed(data["fp32_method"], data["transform_method"], rows):
        if key not in rows:
            raise ValueError(f"{name} has no row for {' '.join(key).strip()}: add one")
    return Architecture(**{name: data[name] for name in _HEAD if name != "architecture"}, rows=rows)


def _parse_row(row: Any, place: str) -> tuple[RowKey, Config]:
    _check_fields(row, _ROW, place)
    kernel, method, kind = row["kernel"], row["method"], row["class"]
    _check_choice(kernel, tuple(CLASSES), "kernel", place)
    _check_choice(method, METHODS, "method", place)
    _check_choice(kind, CLASSES[kernel], "class", place)
    tile = row["tile"]
    if len(tile) != 3 or not all(type(size) is int and _is_power(size, 16, 1024) for size in tile):
        raise ValueError(f"{place}: tile is {tile}; give three powers of two from 16 to 1024")
    if not _is_power(row["warps"], 1, 32):
        raise ValueError(f"{place}: warps is {row['warps']}; give a power of two from 1 to 32")
    if not 1 <= row["stages"] <= 8:
        raise ValueError(f"{place}: stages is {row['stages']}; give 1 to 8")
    if not SOURCE.fullmatch(row["source"]):
        raise ValueError(
            f"{place}: source is {row['source']!r}; give 'compiled', 'modeled: ..' or"
            " 'measured: ..'"
        )
    return (kernel, method, kind), Config((tile[0], tile[1], tile[2]), row["warps"], row["stages"])


def _needed(fp32: str, transform: str, rows: Mapping[RowKey, Config]) -> Iterator[RowKey]:
    """Rows that the launchers look up without asking whether they are there."""
    for method in dict.fromkeys((fp32, "bf16x3", "tf32", "bf16")):
        yield "spectral_conv_mix", method, ""
        yield "spectral_conv_mix", method, "narrow"
        yield "spectral_conv_weight_grad_planes", method, ""
    yield "truncated_rfft", transform, ""
    yield "truncated_irfft", transform, ""
    for kernel, method, kind in rows:
        if kernel == "spectral_conv":
            yield kernel, method, kind.split()[0]
            yield kernel, method, f"{kind.split()[0]} narrow"


def _check_fields(data: Any, fields: Mapping[str, type], place: str) -> None:
    if not isinstance(data, dict):
        raise ValueError(f"{place}: expected an object, got {type(data).__name__}")
    if set(data) != set(fields):
        raise ValueError(f"{place}: fields are {', '.join(data)}; expected {', '.join(fields)}")
    for field, kind in fields.items():
        if type(data[field]) is not kind:
            raise ValueError(f"{place}: {field} is {data[field]!r}; expected {kind.__name__}")


def _check_choice(value: str, choices: tuple[str, ...], field: str, place: str) -> None:
    if value not in choices:
        accepted = ", ".join(repr(choice) for choice in choices)
        raise ValueError(f"{place}: {field} is {value!r}; expected one of {accepted}")


def _is_power(value: int, least: int, largest: int) -> bool:
    return least <= value <= largest and value & (value - 1) == 0


class _Tables(Mapping[tuple[int, int], Architecture]):
    """{compute capability: table}; a file is read when it is first asked for."""

    def __getitem__(self, capability: tuple[int, int]) -> Architecture:
        path = table_path(capability)
        if not path.is_file():
            raise KeyError(capability)
        return load(path)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        for path in sorted(TABLES.glob("sm_*.json")):
            major, minor = divmod(int(path.stem.removeprefix("sm_")), 10)
            yield major, minor

    def __len__(self) -> int:
        return len(list(iter(self)))


ARCHITECTURES = _Tables()
SAFE = ARCHITECTURES[8, 6]
