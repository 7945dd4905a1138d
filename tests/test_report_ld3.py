"""The benchmark of learned grids on digits, and README's table of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

for package in ("lmdb", "tqdm", "sklearn", "safetensors", "matplotlib", "PIL"):
    pytest.importorskip(package, reason=f"{package} is not installed")

from PIL import Image  # noqa: E402

from benchmarks import journal, ld3_digits, machine, report_ld3  # noqa: E402
from benchmarks.report_data import load  # noqa: E402
from benchmarks.report_plots import draw  # noqa: E402
from benchmarks.report_tables import tables  # noqa: E402
from dsno_kernels import commands  # noqa: E402
from tests.small_models import write_teacher  # noqa: E402


def entry(evaluations: int, learned: float) -> dict[str, Any]:
    return {
        "op": "ld3",
        "teacher": "exact",
        "solver": "dpmpp_3m",
        "seconds": 90.0,
        "evaluations": evaluations,
        "losses": {"uniform": 0.5, "dmn": 0.25, "learned": learned},
    }


def test_a_smoke_run_makes_the_table_and_the_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In this process, of a network made for tests; a second run has nothing left to do."""

    def here(words: list[str], folder: Path | None = None) -> None:
        assert commands.main(words) == 0

    monkeypatch.setattr(ld3_digits, "execute", here)
    monkeypatch.setattr(ld3_digits, "SOLVERS", ("dpmpp_2m", "ipndm2"))
    teacher = write_teacher(tmp_path / "teacher.safetensors")
    words = ["--smoke", "--teacher", str(teacher), "--folder", str(tmp_path / "run")]
    words += ["--results", str(tmp_path / "results")]
    assert ld3_digits.main(words) == 0
    results = load(tmp_path / "results")
    found = results[0].select(op="ld3")
    assert [(e["teacher"], e["solver"], e["evaluations"]) for e in found] == [
        (teacher, solver, n)
        for teacher in ("exact", "network")
        for solver in ("dpmpp_2m", "ipndm2")
        for n in (2, 3)
    ]
    losses = json.loads((tmp_path / "run" / "network-ipndm2" / "losses.json").read_text())
    assert found[-1]["losses"] == {name: values["3"] for name, values in losses.items()}
    text = tables(results)["ld3_cpu"]()
    assert text.count("| trained teacher | `ipndm2` |") == 2
    assert draw(results, tmp_path) == [tmp_path / "ld3.png"]
    with Image.open(tmp_path / "ld3.png") as picture:
        assert picture.size[0] > 500
    monkeypatch.setattr(ld3_digits, "execute", lambda *_: pytest.fail("learned again"))
    assert ld3_digits.main(words) == 0


def test_the_options_are_accepted() -> None:
    for options in ld3_digits.OPTIONS.values():
        words = f"learn-grid {options} {ld3_digits.SMOKE}".split()
        assert callable(commands.parser().parse_args(words).run)


def test_a_row_and_who_wins(tmp_path: Path) -> None:
    cases = [entry(4, 0.125), entry(5, 0.25), entry(6, 0.3)]
    assert report_ld3._row(cases[0], list(cases[0]["losses"])) == [
        *("exact denoiser", "`dpmpp_3m`", "4", "0.5", "0.25", "**0.12**", "2.00x")
    ]
    assert report_ld3.verdict(cases[:1]).endswith("in 1 of 1 cases.")
    text = report_ld3.verdict(cases)
    assert "in 1 of 3 cases; not in: exact denoiser, `dpmpp_3m`, 5; exact" in text


def test_the_table_of_a_step_names_the_aim_where_it_is_one(tmp_path: Path) -> None:
    def step(peer: str, ratio: float, shape: list[int]) -> dict[str, Any]:
        times = {"seconds": 1e-3, "baseline_seconds": ratio * 1e-3, "ratio": ratio}
        return {
            "op": "ld3_step",
            "shape": shape,
            "peer": peer,
            "threads": 1,
            "share_of_copy": 0.5,
        } | times

    shape = report_ld3.STEP_AT
    steps = [step("official LD3", 8.5, shape), step("official LD3", 7.5, [1, 2, 3, 4])]
    steps += [step("official LD3", 7.5, shape), step("torch.compile of official LD3", 1.5, shape)]
    entries = [{"name": str(i), "group": "ld3", "extra_info": info} for i, info in enumerate(steps)]
    toy = {"op": "ld3_toy", "seconds": 2.345, "threads": 2, "held_out": 0.00691}
    entries.append({"name": "toy", "group": "ld3", "extra_info": toy})
    journal.write(tmp_path / "one.json", machine.describe(torch.device("cpu")), entries)
    text = tables(load(tmp_path))["ld3_step_cpu"]()
    assert "learned in 2.3 s on 2 threads, to a held-out mean squared error of 0.0069;" in text
    lines = [line for line in text.splitlines() if "x**" in line]
    assert [line.rsplit("|", 3)[1].strip() for line in lines] == [
        "**8.50x**, met",
        "**7.50x**",
        "**7.50x**, missed",
        "**1.50x**",
    ]
    assert lines[0].startswith("| 64 x 3 x 32 x 32 | 1 | official LD3 | 8.50 ms | 1.00 ms |")
