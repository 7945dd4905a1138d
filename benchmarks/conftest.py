"""Options, parameters and the results file of the benchmarks.

`pytest benchmarks` measures and writes `benchmarks/results/<machine>.json`; `pytest benchmarks
--benchmark-disable` runs every case once on small shapes and writes nothing. On a GPU `gpu.py` runs
them, with a journal.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import journal, machine, measure, standin
from benchmarks.host_cuda import dry_run, on_gpu
from benchmarks.peers import cases
from benchmarks.shapes import Shape, shapes

BEGUN = time.monotonic()
RESULTS = Path(__file__).parent / "results"
DRY_RUN = ("cifar_b32_32", "t16_32_c256_k8", "fno_k32")  # a shape of each order of axes and path


def pytest_addoption(parser: pytest.Parser, pluginmanager: pytest.PytestPluginManager) -> None:
    if not pluginmanager.hasplugin("benchmark"):
        pluginmanager.register(standin, "benchmark-standin")
    group = parser.getgroup("dsno_kernels")
    group.addoption(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to measure"
    )
    group.addoption(
        "--results",
        metavar="NAME",
        help="write benchmarks/results/NAME.json, also for a part of the suite",
    )
    group.addoption(
        "--minutes", type=float, help="skip what has not begun when so much time has passed"
    )
    group.addoption(
        "--journal",
        metavar="FILE",
        type=Path,
        help="append each entry to FILE as soon as it is measured, and write no results file",
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
    if option.benchmark_disable or option.benchmark_json or option.collectonly or option.journal:
        return
    whole = not option.keyword and all(Path(argument).is_dir() for argument in config.args)
    name = config.getoption("--results") or (machine.slug(device_of(config)) if whole else None)
    if name:
        RESULTS.mkdir(exist_ok=True)
        option.benchmark_json = RESULTS / f"{name}.json"


def measured_shapes(config: pytest.Config) -> list[Shape]:
    """The shapes of the device; where nothing is timed, small ones that nothing is compiled for."""
    device = device_of(config)
    found = shapes("cuda" if on_gpu(device) else "cpu")
    if config.option.benchmark_disable:
        return [shape.small() for shape in found]
    if dry_run():
        some = [shape.small() for shape in found if shape.name in DRY_RUN]
        return [dataclasses.replace(some[0], compiled=True), *some[1:]]
    return list(found)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`case` = (shape, precision, peer)."""
    if "case" not in metafunc.fixturenames:
        return
    kind = "cuda" if on_gpu(device_of(metafunc.config)) else "cpu"
    params = [
        pytest.param(
            (shape, precision, peer), id=f"{shape.name}-{precision}-{peer.name}".replace(" ", "_")
        )
        for shape, precision, peer in cases(kind, measured_shapes(metafunc.config))
    ]
    metafunc.parametrize("case", params)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What matters most first: a run may end before the last."""
    items.sort(key=lambda item: item.path.stem != "bench_spectral_conv")


def pytest_runtest_setup(item: pytest.Item) -> None:
    minutes = item.config.getoption("--minutes")
    if minutes is not None and time.monotonic() - BEGUN > 60 * minutes:
        pytest.skip(f"the {minutes:g} minutes of this run have passed")


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    return device_of(request.config)


@pytest.fixture(scope="session")
def smoke(request: pytest.FixtureRequest) -> bool:
    """Whether nothing is timed: small shapes, nothing compiled."""
    return bool(request.config.option.benchmark_disable)


@pytest.fixture(scope="session")
def journal_file(request: pytest.FixtureRequest, device: torch.device) -> Path | None:
    """The journal, with a line on this machine and its limits, which warms the GPU's clocks."""
    path: Path | None = request.config.getoption("--journal")
    if path:
        machine_info = machine.describe(device) | measure.rates(device)
        journal.append(path, {"machine_info": machine_info, "slug": machine.slug(device)})
    return path


@pytest.fixture(autouse=True)
def journaled(request: pytest.FixtureRequest, journal_file: Path | None) -> Iterator[None]:
    if journal_file is None:
        yield
        return
    benchmark = request.getfixturevalue("benchmark")
    yield
    if benchmark.extra_info:
        entry = {"group": benchmark.group, "name": request.node.name}
        journal.append(journal_file, {**entry, "extra_info": dict(benchmark.extra_info)})


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(
    config: pytest.Config, machine_info: dict[str, Any]
) -> None:
    machine_info.clear()
    machine_info.update(machine.describe(device_of(config)))


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_commit_info(config: pytest.Config, commit_info: dict[str, Any]) -> None:
    commit_info.clear()
    commit_info.update(journal.commit())


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_json(
    config: pytest.Config, benchmarks: list[Any], output_json: dict[str, Any]
) -> None:
    """Keep what the report needs; single rounds and the paths of this machine are left out."""
    for entry in output_json["benchmarks"]:
        stats = {key: entry["stats"][key] for key in ("min", "median", "iqr", "rounds")}
        for key in set(entry) - {"group", "name", "extra_info"}:
            del entry[key]
        entry["stats"] = stats
