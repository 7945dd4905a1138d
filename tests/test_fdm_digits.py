"""The benchmark of momentum diffusion on digits: it runs and continues; what its tables say."""

from __future__ import annotations

import json
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("safetensors")
pytest.importorskip("sklearn")

from benchmarks import fdm_digits, journal, report_fdm
from benchmarks.report_data import load
from benchmarks.report_tables import tables
from dsno_kernels import commands


def entry(momentum: bool, seed: int, updates: int, evaluations: int, value: float) -> Any:
    return {
        "op": "fdm",
        "process": "ve",
        "momentum": momentum,
        "seed": seed,
        "updates": updates,
        "evaluations": evaluations,
        "last": updates == 20,
        "frechet": value,
        "images": 1500,
        "features": "a classifier",
    }


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """Momentum wins after 10 updates and loses after 20, but for five evaluations."""
    measured = {  # base and momentum, seed 0 and seed 1
        (10, 12): ((8.0, 8.5), (6.0, 7.5)),
        (20, 12): ((4.0, 4.5), (4.5, 6.0)),
        (20, 5): ((5.0, 5.0), (4.5, 5.5)),
    }
    entries = [
        entry(momentum, seed, *place, values[momentum][seed])
        for place, values in measured.items()
        for momentum in (False, True)
        for seed in (0, 1)
    ]
    benchmarks = [{"name": str(i), "extra_info": one} for i, one in enumerate(entries)]
    machine = {"device": "cpu", "cpu": "a CPU", "isa": ["avx2"], "cores": 2, "torch": "2"}
    journal.write(tmp_path / "fdm-a.json", machine, benchmarks)
    return tmp_path


def test_the_tables_show_what_was_measured(results: Path) -> None:
    text = tables(load(results))["fdm_cpu"]()
    assert "| VE | 8.25 ± 0.35 / **6.75 ± 1.06** | **4.25 ± 0.35** / 5.25 ± 1.06 |" in text
    assert "| VE | 5.00 ± 0.00 / 5.00 ± 0.71 | **4.25 ± 0.35** / 5.25 ± 1.06 |" in text
    assert "over 2 seeds" in text and "DPM-Solver++(2M)" in text and "1,500 images" in text
    assert "better in every seed in 1 of 3 cases, worse in every seed in 1; in the other 1" in text


def test_a_run_that_has_not_ended_says_so() -> None:
    """Who wins is then decided on the seeds that both have."""
    some = [entry(False, 0, 20, 12, 3.0), entry(True, 0, 20, 12, 2.0), entry(False, 1, 20, 12, 1.0)]
    assert report_fdm.seeds(some) == "1 to 2 seeds"
    assert report_fdm.seeds(some[:2]) == "1 seed"
    assert "better in every seed in 1 of 1 cases" in report_fdm.verdict(some)


def test_the_picture_is_drawn(results: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    report_fdm.draw(load(results), tmp_path / "fdm.png")
    assert (tmp_path / "fdm.png").read_bytes()[:4] == b"\x89PNG"


def test_every_command_is_accepted() -> None:
    """Same batches with and without momentum, and no option that a process has no use for."""
    size = fdm_digits.Size()
    seen = set()
    for run in fdm_digits.runs(size):
        parsed = commands.parser().parse_args(shlex.split(run.command(600, Path("out"), size)))
        assert (parsed.process, parsed.momentum, parsed.seed) == (
            run.process,
            run.momentum,
            run.seed,
        )
        assert parsed.p_mean == (-1.2 if run.process == "edm" else 0.0)
        seen.add(run.name)
    assert len(seen) == 18


def test_a_smoke_run_measures_everything_and_continues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = fdm_digits.SMOKE
    monkeypatch.setattr(fdm_digits, "PROCESSES", ("ve",))
    arguments = ["--smoke", "--folder", str(tmp_path / "fdm"), "--results", str(tmp_path)]
    ran: list[list[str]] = []

    def here(words: list[str]) -> None:
        ran.append(words)
        if len(ran) == 3:  # as if the third command had been stopped
            raise subprocess.CalledProcessError(130, words)
        assert commands.main(words) == 0

    monkeypatch.setattr(fdm_digits, "execute", here)
    assert fdm_digits.main(arguments) == 2
    (path,) = tmp_path.glob("fdm-*.json")
    assert len(json.loads(path.read_text())["benchmarks"]) == 3  # of the training that ended
    assert fdm_digits.main(arguments) == 0
    assert len(ran) == 5  # two runs of two stops, and the one that was stopped
    entries = [one["extra_info"] for one in json.loads(path.read_text())["benchmarks"]]
    cases = {(e["momentum"], e["updates"], e["evaluations"]) for e in entries}
    assert cases == {(m, u, n) for m in (False, True) for u, n in [(1, 3), (2, 3), (2, 2)]}
    assert len(entries) == 6 and all(e["images"] == size.images for e in entries)
    assert all(e["last"] == (e["updates"] == 2) for e in entries)
