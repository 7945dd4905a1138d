"""README's table of the digits result."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from benchmarks import digits, report_digits
from benchmarks.report_data import load
from benchmarks.report_tables import tables
from dsno_kernels import commands


def measured(name: str, evaluations: int, distance: float, rate: float | None) -> dict[str, Any]:
    values = {"mean": distance, "deviation": 0.25, "values": [distance - 0.25, distance + 0.25]}
    return {
        "name": name,
        "evaluations": evaluations,
        "images": 6000,
        "frechet": values,
        "precision": values,
        "recall": {"mean": 0.5, "deviation": None, "values": [0.5]},
        "images_per_second": rate,
    }


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """A folder of results, as `benchmarks/digits.py` writes it after `evaluate --json`."""
    (tmp_path / "digits").mkdir()
    table = {
        "device": "cpu",
        "features": "a classifier",
        "reference_images": 1797,
        "seeds": [0, 1],
        "rows": [measured("teacher", 10, 2.5, 512.25), measured("real", 0, 1.0, None)],
        "student_minus_ablation": [-0.125, -0.25],
    }
    (tmp_path / digits.TABLE).write_text(json.dumps(table))
    (tmp_path / digits.SECONDS).write_text(json.dumps(dict.fromkeys(digits.COMMANDS, 60.0)))
    states = {
        "logsnr": [-1.75, 10.0],
        "count": 3000,
        "errors": {"student": [0.0312, 0.05], "ablation": [0.0625, 0.04]},
        "difference": [-0.0313, 0.01],
        "standard_error": [0.001, 0.002],
    }
    (tmp_path / digits.STATES).write_text(json.dumps(states))
    folder = tmp_path / "results"
    folder.mkdir()
    path = digits.write_result(tmp_path, folder)
    assert path.name.startswith("digits-") and list(folder.iterdir()) == [path]
    return folder


def test_the_table_shows_what_was_measured(results: Path) -> None:
    text = tables(load(results))["digits_cpu"]()
    assert "| teacher | 10 | 2.50 ± 0.25 | 2.500 ± 0.250 | 0.500 | 512 |" in text
    assert "| real |  | 1.00 ± 0.25 | 1.000 ± 0.250 | 0.500 |  |" in text
    assert "1,797 real images, 6,000 of each model, 2 draws" in text
    assert "evaluation 1.0; in all 5." in text
    assert "| -1.8 | 0.0312 | 0.0625 | -0.0313 ± 0.0010 | -50.1% |" in text
    assert "| 10.0 | 0.0500 | 0.0400 | +0.0100 ± 0.0020 | +25.0% |" in text
    assert "on 3,000 trajectories" in text
    assert "-0.125, -0.250; mean -0.188: the temporal layers win every draw" in text


def test_a_tie_is_called_one() -> None:
    assert "win every draw" in report_digits.against([-0.1, -0.2])
    assert "win no draw" in report_digits.against([0.1, 0.2])
    assert "no difference is shown" in report_digits.against([0.1, -0.2])


def test_every_command_of_the_recipe_is_accepted() -> None:
    """Also with what a smoke run adds; README shows the same lines."""
    shown = re.findall(r"^python -m dsno_kernels (.*)$", report_digits.commands(), re.MULTILINE)
    assert shown == list(digits.COMMANDS.values())
    for name, command in digits.COMMANDS.items():
        for words in (command, f"{command} {digits.SMOKE[name]}"):
            assert callable(commands.parser().parse_args(shlex.split(words)).run)
