"""A pytest plugin of `gpu.py`: a share of the tests, and a fresh start where CUDA is lost.

After an illegal memory access every later CUDA call of a process fails too. `--attempted FILE`
keeps the names of the tests that have begun, and leaves those out that stand there: the same
command, run again, goes on behind the test that broke. The last line `LOST` asks for that.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.gpu import LOST


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("dsno_kernels restart")
    group.addoption("--attempted", type=Path, metavar="FILE", required=True)
    group.addoption("--shard", default="0/1", metavar="I/N", help="run every Nth test from I")


def lost() -> bool:
    """Whether CUDA answers with the error of an earlier kernel."""
    if not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def attempted(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


class Restart:
    def __init__(self, config: pytest.Config) -> None:
        self.path: Path = config.getoption("--attempted")
        self.index, self.count = map(int, config.getoption("--shard").split("/"))
        self.session: pytest.Session | None = None

    def pytest_sessionstart(self, session: pytest.Session) -> None:
        self.session = session

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(
        self, config: pytest.Config, items: list[pytest.Item]
    ) -> None:
        begun = set(attempted(self.path))
        kept = [item for item in items[self.index :: self.count] if item.nodeid not in begun]
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = kept

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._write(nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed and lost():
            self._write(LOST)
            assert self.session is not None
            self.session.shouldstop = LOST

    def _write(self, line: str) -> None:
        with self.path.open("a") as file:
            file.write(line + "\n")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Restart(config), "dsno-restart")
