"""The report's tables of sampler steps, of entries in the form that the benchmarks write."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.report_data import Result, Source
from benchmarks.report_tables import tables

SOURCE = Source("toaster", "0123456789abcdef", False, "2030-01-02T03:04:05")
MACHINES = {
    "cpu": {"device": "cpu", "cpu": "Toaster", "isa": ["avx2"], "cores": 2, "torch": "2.0"},
    "gpu": {"device": "cuda", "gpu": "Abacus", "cuda": "13.0", "cores": 2, "torch": "2.0"},
}
LARGE, SMALL = [8, 3, 256, 256], [64, 3, 32, 32]


def entry(op: str, peer: str, ratio: float, **more: Any) -> dict[str, Any]:
    """1 ms for ours, on one thread."""
    times = {"seconds": 1e-3, "baseline_seconds": ratio * 1e-3, "ratio": ratio}
    common = {"guided": False, "threads": 1, "share_of_copy": 0.9, "shape": SMALL, "steps": 1}
    return {"op": op, "peer": peer, **common, **times, "source": SOURCE, **more}


def rendered(name: str, kind: str, *entries: dict[str, Any]) -> list[str]:
    """The lines of a table."""
    return tables([Result(MACHINES[kind], list(entries))])[f"{name}_{kind}"]().splitlines()


def test_a_row_of_steps_says_which_aims_are_met() -> None:
    lines = rendered(
        "exp_step",
        "cpu",
        entry("exp_step", "eager", 3.0),
        entry("exp_step", "torch.compile", 1.9),
        entry("exp_step", "diffusers DEIS-3", 10.0, seconds=3e-3),
        entry("exp_step", "diffusers UniPC-3", 14.0),
        entry("exp_step", "torch.compile", 1.5, guided=True),
        entry("exp_step", "diffusers DPM++3M", 8.5, threads=2),
        entry("exp_step", "eager", 2.0, shape=LARGE, share_of_copy=0.84),
    )
    assert lines[0].startswith("Toaster, avx2, 2 cores; PyTorch 2.0; 2030-01-02; commit `0123")
    assert lines[2:4] == [
        "| shape | step | threads | time | of copy | eager | torch.compile (≥ 2x) |"
        " DEIS-3 (≥ 10x) | UniPC-3 (≥ 15x) | DPM++3M (≥ 8x) |",
        "|" + " --- |" * 10,
    ]
    # Our time is the median over the peers; torch.compile's aim is that of the plain step.
    assert lines[4:8] == [
        "| 64 x 3 x 32 x 32 | plain | 1 | 1.00 ms | 90% | 3.0x | 1.9x, **missed** | 10.0x, met |"
        " 14.0x, **missed** |  |",
        "| 64 x 3 x 32 x 32 | plain | 2 | 1.00 ms | 90% |  |  |  |  | 8.5x, met |",
        "| 64 x 3 x 32 x 32 | guided | 1 | 1.00 ms | 90% |  | 1.5x |  |  |  |",
        "| 8 x 3 x 256 x 256 | plain | 1 | 1.00 ms | 84%, **missed** | 2.0x |  |  |  |  |",
    ]


def test_a_missed_aim_stands_beside_its_limit() -> None:
    moved = {
        "copy_seconds": 2e-3,
        "traffic": {"read": 4.0, "written": 1.0},
        "peer_traffic": {"read": 19.0, "written": 14.0},
    }
    lines = rendered(
        "exp_step",
        "cpu",
        entry("exp_step", "diffusers DEIS-3", 9.0, **moved),
        entry("exp_step", "diffusers DPM++3M", 9.0, **moved),
        entry("exp_step", "eager", 3.0),
    )
    assert lines[4].endswith("| 9.0x of 4.5x, **missed** | 9.0x, met | 3.0x |")
    assert lines[6:9] == [
        "| tensors moved, ours : theirs | DEIS-3 | DPM++3M |",
        "| --- | --- | --- |",
        "| plain | 5 : 33 | 5 : 33 |",
    ]


def test_the_time_in_the_kernel_stands_in_brackets() -> None:
    lines = rendered(
        "exp_step",
        "cpu",
        entry("exp_step", "eager", 3.0, kernel_seconds=3e-4),
        entry("exp_step", "torch.compile", 3.0, kernel_seconds=5e-4),
        entry("exp_step", "eager", 3.0, guided=True, kernel_seconds=3e-4),
        entry("exp_step", "torch.compile", 3.0, guided=True),
    )
    assert "| 1.00 ms (400 µs) | 90% |" in lines[4]
    assert "| 1.00 ms | 90% |" in lines[5]  # an entry of before this was measured
    assert "In brackets the part of our time in the kernel" in lines[-1]
    lines = rendered(
        "schedulers", "cpu", entry("scheduler", "diffusers DDIM", 4.0, kernel_seconds=1e-4)
    )
    assert lines[4].endswith("| 1.00 ms (100 µs), 4.0x |")


def test_host_time_of_a_step_beside_its_aim() -> None:
    entries = [
        entry("exp_step_overhead", "eager", 2.0, seconds=24e-6, baseline_seconds=48e-6),
        entry("exp_step_overhead", "diffusers DEIS-3", 3.0, seconds=26e-6),
        entry("exp_step_overhead", "eager", 2.0, seconds=26e-6, guided=True),
    ]
    for made in entries:
        del made["shape"], made["threads"]  # they are not written
    lines = rendered("exp_step", "cpu", *entries)
    assert lines[2] == "| 256 elements | step | host time | ours (≤ 25 µs) | speed-up |"
    assert lines[4] == "| eager | plain | 48.0 µs | 24.0 µs, met | **2.0x** |"
    assert lines[5].startswith("| DEIS-3 | plain |") and "| 26.0 µs, **missed** |" in lines[5]
    assert "| 26.0 µs |" in lines[6]  # guided is `solver_step`, which has no such aim


def test_schedulers_have_a_time_each() -> None:
    overhead = entry("scheduler_overhead", "diffusers DEIS-3", 9.0, seconds=59e-6)
    del overhead["shape"], overhead["threads"], overhead["guided"]
    lines = rendered(
        "schedulers",
        "cpu",
        entry("scheduler", "diffusers DEIS-3", 9.5),
        entry("scheduler", "diffusers DDIM", 4.0, seconds=2e-3),
        entry("scheduler_loop", "diffusers DEIS-3", 7.0, steps=20),
        overhead,
    )
    assert lines[2] == "| shape | step | threads | DEIS-3 (≥ 10x) | DDIM |"
    assert (
        lines[4] == "| 64 x 3 x 32 x 32 | plain | 1 | 1.00 ms, 9.5x, **missed** | 2.00 ms, 4.0x |"
    )
    assert lines[6] == "| 20 steps | threads | DEIS-3 |"
    assert lines[8] == "| 64 x 3 x 32 x 32 | 1 | 1.00 ms, 7.0x |"
    assert lines[10] == "| 256 elements | step | host time | ours (≤ 60 µs) | speed-up |"
    assert lines[12].endswith("| 59.0 µs, met | **9.0x** |")


def test_the_aims_of_a_cpu_are_not_those_of_a_gpu() -> None:
    text = "\n".join(
        rendered("exp_step", "gpu", entry("exp_step", "diffusers DEIS-3", 5.0, shape=LARGE))
        + rendered("schedulers", "gpu", entry("scheduler", "diffusers DEIS-3", 5.0))
    )
    assert "| shape | step | time | of copy | DEIS-3 |" in text
    assert "| shape | step | DEIS-3 |" in text
    assert "missed" not in text and ", met" not in text and "≥" not in text


@pytest.mark.parametrize("name", ["exp_step_cpu", "schedulers_cpu", "exp_step_gpu"])
def test_without_entries_there_is_no_caption(name: str) -> None:
    other = Result(MACHINES["cpu"], [entry("overhead", "eager", 1.0, direction="forward")])
    assert tables([other])[name]() == "Not measured yet."
