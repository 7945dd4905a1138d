"""README's table of a student's training and sampling."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.report_data import Result
from benchmarks.report_tables import tables
from tests.test_report_steps import MACHINES, SOURCE


def entry(work: str, precision: str, seconds: float) -> dict[str, Any]:
    return {
        "op": "student",
        "shape": "digits",
        "work": work,
        "batch": 64,
        "precision": precision,
        "seconds": seconds,
        "baseline_seconds": 0.4,
        "ratio": 0.4 / seconds,
        "source": SOURCE,
    }


@pytest.mark.parametrize("kind", MACHINES)
def test_steps_and_samples_a_second(kind: str) -> None:
    entries = [entry("training", "fp32", 0.2), entry("sampling", "bf16", 0.1)]
    text = tables([Result(MACHINES[kind], entries)])[f"student_{kind}"]()
    lines = text.splitlines()
    assert SOURCE.name in lines[0]
    assert lines[4:6] == [
        "| digits, B=64 | a training step | fp32 | 400 ms | 200 ms | **2.00x** |"
        " 5 steps, 320 samples |",
        "| digits, B=64 | sampling a batch | bf16 | 400 ms | 100 ms | **4.00x** | 640 images |",
    ]


def test_without_results_it_is_not_measured() -> None:
    made = tables([Result(MACHINES["cpu"], [])])
    assert made["student_cpu"]() == made["student_gpu"]() == "Not measured yet."
