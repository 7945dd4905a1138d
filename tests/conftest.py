"""Every test starts from one seed, with uninitialized memory full of NaN: an output that is not
written shows.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def seeded_and_poisoned() -> Iterator[None]:
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--mutation",
        help="BACKEND:NAME, a defect to plant before the tests run (see tests/mutations.py)",
    )


def pytest_configure(config: pytest.Config) -> None:
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell starts background jobs
        signal.signal(signal.SIGINT, signal.default_int_handler)
    planted = config.getoption("--mutation")
    if planted:
        from tests import mutations

        mutations.plant(*planted.split(":"))
