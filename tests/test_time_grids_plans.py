"""Learned grids where commands sample with a solver: `evaluate` and `train trajectories`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

for package in ("lmdb", "tqdm", "sklearn", "safetensors"):
    pytest.importorskip(package, reason=f"{package} is not installed")

from dsno_kernels import commands, diffusion  # noqa: E402
from dsno_kernels.diffusion import LearnedGrid, SolverPlan, time_grid  # noqa: E402
from dsno_kernels.time_grids.plans import PROCESSES, plan_of  # noqa: E402
from dsno_kernels.training import images  # noqa: E402
from dsno_kernels.training.trajectories import TrajectoryDataset  # noqa: E402
from tests.helpers import assert_close  # noqa: E402
from tests.small_models import write_teacher  # noqa: E402
from tests.trajectory_runs import everything  # noqa: E402

FLOAT32 = 1e-6


def learned(path: Path, process: str = "vp_cosine", solver: str = "dpmpp_2m") -> LearnedGrid:
    """A grid with times of its own for the denoiser, as a file."""
    noising = PROCESSES[process]
    times = time_grid(noising, 4, "log_snr")
    moved = times[:-1].clone()
    moved[1:] *= 0.98
    plan = SolverPlan.build(noising, times, solver, denoiser_times=moved, prediction="x0")
    grid = LearnedGrid.of_plan(plan)
    grid.save(path)
    return grid


def test_the_plan_of_a_file(tmp_path: Path) -> None:
    grid = learned(tmp_path / "grid.json", "dsno")
    for plan in (
        plan_of(str(tmp_path / "grid.json"), None),
        plan_of(str(tmp_path / "grid.json"), 4, process="dsno", solver="dpmpp_2m"),
    ):
        assert plan.solver == "dpmpp_2m" and plan.process == PROCESSES["dsno"]
        assert plan.grid.tolist() == list(grid.times)
        assert plan.model_times.tolist() == list(grid.denoiser_times)


def test_the_plan_of_a_kind() -> None:
    plan = plan_of("power", 5, process="vp_linear", order=3.0, t_end=0.01)
    expected = time_grid(PROCESSES["vp_linear"], 5, "power", order=3.0, t_end=0.01)
    assert torch.equal(plan.grid, expected) and plan.solver == "tab3"


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--process", "vp_linear"], "learned for the process"),
        (["--solver", "tab2"], "learned for solver 'dpmpp_2m', not for 'tab2'"),
        (["--steps", "5"], "has 4 steps, not 5"),
        (["--grid-order", "2"], "leave order out"),
        (["--t-end", "0.1"], "leave t_end out"),
        (["--grid", "broken.json"], "broken.json cannot be read as JSON"),
        (["--grid", "other.json"], "other.json is no time grid"),
        (["--grid", "gone.json"], "gone.json does not exist"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_grid_for_something_else_is_one_line(
    words: list[str],
    text: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    learned(Path("grid.json"))
    Path("broken.json").write_text('{"kind": ')
    Path("other.json").write_text("{}")
    command = ["train", "trajectories", "--teacher", "exact", "--grid", "grid.json"]
    assert commands.main([*command, "--device", "cpu", "--out", "made", *words]) == 2
    error = capsys.readouterr().err
    assert text in error and len(error.strip().splitlines()) == 1


def test_trajectories_on_a_learned_grid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = images.Images(*(tensor[:50] for tensor in images.digits()))
    monkeypatch.setattr(images, "digits", lambda: data)
    grid = learned(tmp_path / "grid.json")
    words = ["train", "trajectories", "--teacher", "exact", "--grid", str(tmp_path / "grid.json")]
    assert commands.main([*words, "--count", "5", "--device", "cpu", "--out", str(tmp_path)]) == 0
    frames, _ = everything(tmp_path)
    plan = grid.plan()
    model = diffusion.for_process(diffusion.ExactDenoiser(data.images), plan.process)
    with torch.no_grad():
        wanted = diffusion.sample(model, frames[:, 0], plan, frames=[1, 2, 3, 4])
    assert_close(frames[:, 1:], wanted, FLOAT32)
    manifest = TrajectoryDataset(tmp_path).manifest
    assert manifest is not None and manifest["times"] == list(grid.times)


def test_evaluate_puts_learned_grids_beside_kinds(tmp_path: Path) -> None:
    teacher = write_teacher(tmp_path / "teacher.safetensors")
    path, numbers = tmp_path / "grid.json", tmp_path / "numbers.json"
    learned(path)
    words = ["evaluate", "--teacher", teacher, "--grid", "uniform", path, "--evaluations", 2, 4]
    words += ["--features", "pixels", "--count", 70, "--seeds", 1, "--device", "cpu"]
    words += ["--json", numbers, "--out", tmp_path]
    assert commands.main([*map(str, words)]) == 0
    rows = json.loads(numbers.read_text())["rows"]
    assert [(row["name"], row["evaluations"]) for row in rows[:3]] == [
        ("teacher, tab3, 2 evaluations, uniform grid", 2),
        ("teacher, tab3, 4 evaluations, uniform grid", 4),
        (f"teacher, dpmpp_2m, 4 evaluations, {path} grid", 4),
    ]
    assert len({row["frechet"]["mean"] for row in rows[:3]}) == 3
