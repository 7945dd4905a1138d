"""The manifest of a folder of trajectories: what they are, so that a run goes on with the same."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from dsno_kernels._files import replacing
from dsno_kernels.diffusion import SolverPlan

NAME = "manifest.json"
# What may differ between two runs of one data set.
_FREE = ("version", "batch")
# Grids are computed: another machine's logarithm may end in another bit.
_SAME = 1e-9
# No log-SNR, time or scale is as large; a JSON number may be.
_LARGEST = 1e30
# exp(-40 / 2) is the noise of an image in float32; a manifest holds no infinity.
_LARGEST_LOGSNR = 40.0


class TrajectoryError(ValueError):
    """Why trajectories cannot be written or read, in one sentence."""


def make(
    plan: SolverPlan,
    positions: Sequence[int],
    *,
    count: int,
    shape: Sequence[int],
    shards: int,
    seed: int,
    batch: int,
    classes: Sequence[int] | None,
    guidance: dict[str, float] | None,
    precision: str,
    teacher: str,
) -> dict[str, Any]:
    """The manifest of a run of `write_trajectories`; see there."""
    from dsno_kernels import __version__

    grid = plan.grid.detach()
    logsnr = _logsnr(plan, grid)
    return {
        "format": 1,
        "version": __version__,
        "process": repr(plan.process),
        "plan": {
            "solver": plan.solver,
            "steps": len(grid) - 1,
            "history": plan.history,
            "end": plan.end,
            "prediction": plan.prediction,
            "grid": grid.tolist(),
            "grid_logsnr": logsnr,
            "model_times": plan.model_times.detach().tolist(),
        },
        "teacher": teacher,
        "classes": None if classes is None else list(classes),
        "guidance": guidance,
        "precision": precision,
        "seed": seed,
        "batch": batch,
        "count": count,
        "shards": shards,
        "shape": list(shape),
        "positions": list(positions),
        "times": grid[list(positions)].tolist(),
        "logsnr": [logsnr[i] for i in positions],
        "noise_scale": noise_scale(plan),
    }


def noise_scale(plan: SolverPlan) -> float:
    r"""Standard deviation of the state that a plan starts from, for data of deviation 1:
    :math:`\sqrt{\alpha^2 + \sigma^2}`, which is 1 for variance preserving processes.
    """
    start = plan.grid[0].detach()
    return float(torch.hypot(plan.process.alpha(start), plan.process.sigma(start)))


def replace(path: Path, content: bytes) -> None:
    """Write a file, and make its folder; it appears complete or not at all.

    Raises:
        TrajectoryError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            file.write(content)
    except OSError as error:
        raise TrajectoryError(f"{path} cannot be written ({error.strerror})") from None


def _logsnr(plan: SolverPlan, grid: torch.Tensor) -> list[float]:
    """log(alpha^2 / sigma^2): the models' log-SNR, twice that of the processes."""
    values = 2.0 * plan.process.log_snr(grid)
    return values.clamp(-_LARGEST_LOGSNR, _LARGEST_LOGSNR).tolist()


def settle(folder: Path, wanted: dict[str, Any]) -> dict[str, Any]:
    """The manifest of the folder: the one there if it is the same data set, else the new one.

    Raises:
        TrajectoryError: the one there is of another data set; names the first difference.
    """
    path = folder / NAME
    if not path.exists():
        replace(path, f"{json.dumps(wanted, indent=1, allow_nan=False)}\n".encode())
    found = read(folder)
    # What is read back is what would have been written.
    for name, here, given in _differences(found, json.loads(json.dumps(wanted)), ""):
        raise TrajectoryError(
            f"{path} is of other trajectories: {name} is {here} there and {given} now; give"
            " another folder, or the settings of before"
        )
    return found


def read(folder: Path) -> dict[str, Any]:
    """The manifest of a folder.

    Raises:
        TrajectoryError: there is none, or it is damaged.
    """
    path = folder / NAME
    try:
        manifest = json.loads(path.read_text())
    except FileNotFoundError:
        raise TrajectoryError(f"{folder} holds no trajectories: it has no {NAME}") from None
    except (ValueError, OSError) as error:
        raise TrajectoryError(f"{path} cannot be read ({error})") from None
    if not isinstance(manifest, dict) or manifest.get("format") != 1:
        raise TrajectoryError(f"{path} is no manifest that this version knows")
    keys = ("count", "shards", "shape", "positions", "times", "logsnr", "classes")
    if missing := [key for key in keys if key not in manifest]:
        raise TrajectoryError(f"{path} is damaged: {missing[0]} is missing")
    manifest.setdefault("noise_scale", 1.0)  # earlier versions did not write these two
    if isinstance(manifest.get("plan"), dict):
        manifest["plan"].setdefault("end", "full")
    for key, wanted in _wrong(manifest):
        raise TrajectoryError(
            f"{path} is damaged: {key} must be {wanted}, and is {_short(manifest[key])}"
        )
    return manifest


def _wrong(manifest: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Entries that cannot be used, and what they must be."""

    def whole(value: Any, least: int) -> bool:
        return type(value) is int and value >= least

    def number(value: Any) -> bool:
        return type(value) in (int, float) and -_LARGEST < value < _LARGEST

    for key in ("count", "shards"):
        if not whole(manifest[key], 1):
            yield key, "a number of at least 1"
    shape, positions, classes = (manifest[key] for key in ("shape", "positions", "classes"))
    if not isinstance(shape, list) or len(shape) != 3 or not all(whole(n, 1) for n in shape):
        yield "shape", "[C, H, W]"
    if not isinstance(positions, list) or not all(whole(n, 0) for n in positions):
        yield "positions", "a list of places"
    for key in ("times", "logsnr"):
        values = manifest[key]
        if not isinstance(values, list) or not all(map(number, values)):
            yield key, "a list of numbers"
        if len(values) != len(positions):
            yield key, f"{len(positions)} numbers"
    if classes is not None and not (isinstance(classes, list) and classes):
        yield "classes", "null or a list"
    if not number(manifest["noise_scale"]) or not manifest["noise_scale"] > 0:
        yield "noise_scale", "a positive number"


def _differences(found: Any, given: Any, name: str) -> Iterator[tuple[str, str, str]]:
    """Name and values of what differs."""
    if isinstance(found, dict) and isinstance(given, dict):
        for key in {**given, **found}:
            if name or key not in _FREE:
                where = f"{name}.{key}" if name else key
                yield from _differences(found.get(key), given.get(key), where)
    elif isinstance(found, list) and isinstance(given, list) and len(found) == len(given):
        for i, pair in enumerate(zip(found, given, strict=True)):
            yield from _differences(*pair, f"{name}[{i}]")
    elif isinstance(found, float) and isinstance(given, float):
        if not math.isclose(found, given, rel_tol=_SAME, abs_tol=_SAME):
            yield name, repr(found), repr(given)
    elif found != given:
        yield name, _short(found), _short(given)


def _short(value: Any) -> str:
    if isinstance(value, list) and len(value) > 4:
        return f"a list of {len(value)}"
    return "absent" if value is None else repr(value)
