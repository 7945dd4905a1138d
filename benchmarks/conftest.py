"""Options, parameters and the results file of the benchmarks.

`pytest benchmarks` measures and writes `benchmarks/results/<machine>.json`; `pytest benchmarks
--benchmark-disable` runs every case once on small shapes and writes nothing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import machine
from benchmarks.peers import PEERS, PRECISIONS
from benchmarks.shapes import shapes

RESULTS = Path(__file__).parent / "results"


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("dsno_kernels")
    group.addoption(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to measure"
    )
    group.addoption(
        "--results",
        metavar="NAME",
        help="write benchmarks/results/NAME.json, also for a part of the suite",
    )


def device_of(config: pytest.Config) -> torch.device:
    name = config.getoption("--device")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    elif name == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--device cuda, but PyTorch sees no CUDA device here")
    return torch.device(name)


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Choose where pytest-benchmark writes its JSON, unless the caller chose already."""
    option = config.option
    if option.benchmark_disable or option.benchmark_json or option.collectonly:
        return
    whole = not option.keyword and all(Path(argument).is_dir() for argument in config.args)
    name = config.getoption("--results") or (machine.slug(device_of(config)) if whole else None)
    if name:
        RESULTS.mkdir(exist_ok=True)
        option.benchmark_json = RESULTS / f"{name}.json"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`case` = (shape, precision, peer): every peer of a shape right after the eager layer."""
    if "case" not in metafunc.fixturenames:
        return
    kind = device_of(metafunc.config).type
    cases = [
        pytest.param(
            (shape, precision, peer), id=f"{shape.name}-{precision}-{peer.name}".replace(" ", "_")
        )
        for shape in shapes(kind)
        for precision in PRECISIONS[kind]
        for peer in PEERS
        if precision in peer.precisions
    ]
    metafunc.parametrize("case", cases)


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    return device_of(request.config)


@pytest.fixture(scope="session")
def smoke(request: pytest.FixtureRequest) -> bool:
    """Whether nothing is timed: small shapes, nothing compiled."""
    return bool(request.config.option.benchmark_disable)


def pytest_benchmark_update_machine_info(
    config: pytest.Config, machine_info: dict[str, Any]
) -> None:
    machine_info.clear()
    machine_info.update(machine.describe(device_of(config)))


def pytest_benchmark_update_commit_info(config: pytest.Config, commit_info: dict[str, Any]) -> None:
    kept = {key: commit_info.get(key) for key in ("id", "dirty")}
    commit_info.clear()
    commit_info.update(kept)


def pytest_benchmark_update_json(
    config: pytest.Config, benchmarks: list[Any], output_json: dict[str, Any]
) -> None:
    """Keep what the report needs; single rounds and the paths of this machine are left out."""
    for entry in output_json["benchmarks"]:
        stats = {key: entry["stats"][key] for key in ("min", "median", "iqr", "rounds")}
        for key in set(entry) - {"group", "name", "extra_info"}:
            del entry[key]
        entry["stats"] = stats
