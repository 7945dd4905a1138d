"""The report's tables of training by denoising, of entries as the benchmark writes them."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.report_data import Result
from benchmarks.report_tables import tables
from tests.test_report_steps import LARGE, MACHINES, SMALL, SOURCE


def entry(op: str, ratio: float, **more: Any) -> dict[str, Any]:
    """1 ms for ours, on one thread."""
    times = {"seconds": 1e-3, "baseline_seconds": ratio * 1e-3, "ratio": ratio}
    common = {"peer": "eager", "threads": 1, "drawn": True, "shape": SMALL, "share_of_copy": 0.5}
    errors = {"errors": {"x": 1e-7, "grad": 3e-7}}
    return {"op": op, **common, **times, **errors, "source": SOURCE, **more}


def rendered(kind: str, *entries: dict[str, Any]) -> list[str]:
    return tables([Result(MACHINES[kind], list(entries))])[f"denoising_{kind}"]().splitlines()


def test_a_row_says_whether_the_aim_is_met() -> None:
    lines = rendered(
        "cpu",
        entry("denoising", 4.9, drawn=False),
        entry("denoising", 5.0),
        entry("denoising", 2.0, peer="torch.compile"),
        entry("denoising", 7.0, shape=LARGE, threads=2),
        entry("heun", 6.5, shape=LARGE, steps=10, errors={"x": 2e-7, "peer": 1e-6}),
    )
    assert lines[0].startswith("Toaster, avx2, 2 cores; PyTorch 2.0; 2030-01-02; commit `0123")
    assert lines[2] == (
        "| images | noise | threads | peer | its time | this library | speed-up (≥ 5x) | of copy |"
        " error |"
    )
    small = "| 64 x 3 x 32 x 32"
    assert lines[4:8] == [
        f"{small} | drawn | 1 | eager | 5.00 ms | 1.00 ms | **5.00x**, met | 50% | 3.0e-07 |",
        f"{small} | drawn | 1 | torch.compile | 2.00 ms | 1.00 ms | **2.00x** | 50% | 3.0e-07 |",
        f"{small} | given | 1 | eager | 4.90 ms | 1.00 ms | **4.90x**, missed | 50% | 3.0e-07 |",
        "| 8 x 3 x 256 x 256 | drawn | 2 | eager | 7.00 ms | 1.00 ms | **7.00x** | 50% | 3.0e-07 |",
    ]
    assert lines[11] == (
        "| 8 x 3 x 256 x 256 | 1 | 650 µs | 100 µs | **6.50x**, met | 1.0e-06 | 2.0e-07 |"
    )


def test_a_gpu_has_no_such_aims() -> None:
    copy = entry("denoising_copy", 0.4, drawn=False, gbytes=4000.0, share_of_copy=0.87)
    lines = rendered("gpu", entry("denoising", 9.0), copy)
    assert "| 64 x 3 x 32 x 32 | drawn | eager | 9.00 ms | 1.00 ms | **9.00x** | 50% |" in lines[4]
    assert "Images of 1 GiB, noise given: 4000 GB/s, 87% of the rate of a copy." in lines
    assert not any(word in "\n".join(lines) for word in (", met", "missed", "≥"))


@pytest.mark.parametrize("kind", MACHINES)
def test_without_entries_nothing_is_said(kind: str) -> None:
    other = Result(MACHINES[kind], [entry("exp_step", 1.0, guided=False)])
    assert tables([other])[f"denoising_{kind}"]() == "Not measured yet."
