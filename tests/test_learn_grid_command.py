"""The command `learn-grid`: files, table, picture, faults, several processes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

for package in ("lmdb", "tqdm", "sklearn", "safetensors", "matplotlib", "PIL"):
    pytest.importorskip(package, reason=f"{package} is not installed")

from PIL import Image  # noqa: E402

from dsno_kernels import commands, diffusion  # noqa: E402
from dsno_kernels.diffusion import LearnedGrid  # noqa: E402
from dsno_kernels.time_grids import command, problem  # noqa: E402
from dsno_kernels.training import images  # noqa: E402
from tests import ranks  # noqa: E402
from tests.helpers import assert_close  # noqa: E402
from tests.small_models import write_teacher  # noqa: E402

SMALL = ["--count", "30", "--held-out", "20", "--teacher-steps", "12", "--iterations", "16"]


def learn(folder: Path, *words: object) -> int:
    return commands.main(
        ["learn-grid", "--device", "cpu", "--out", str(folder), *SMALL, *map(str, words)]
    )


@pytest.fixture
def few_digits(monkeypatch: pytest.MonkeyPatch) -> images.Images:
    data = images.Images(*(tensor[:40] for tensor in images.digits()))
    monkeypatch.setattr(images, "digits", lambda: data)
    return data


def test_grids_table_and_picture(
    few_digits: images.Images, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert learn(tmp_path, "--steps", 5, 3, "--solver", "dpmpp_2m") == 0
    files = {path.name for path in tmp_path.iterdir()}
    assert files == {"dpmpp_2m-3.json", "dpmpp_2m-5.json", "losses.json", "grids.png"}
    losses = json.loads((tmp_path / "losses.json").read_text())
    assert set(losses) == {*problem.HAND_MADE, "learned"}
    assert all(list(values) == ["3", "5"] for values in losses.values())
    with Image.open(tmp_path / "grids.png") as picture:
        assert len(set(picture.convert("RGB").getdata())) > 100
    out = capsys.readouterr().out
    assert "| grid | 3 evaluations | 5 evaluations |" in out and "| learned | " in out

    # The losses are those that `sample` makes of the held-out noises on these grids.
    grid = LearnedGrid.load(tmp_path / "dpmpp_2m-5.json")
    assert grid.loss == losses["learned"]["5"]
    assert grid.baselines == {name: losses[name]["5"] for name in problem.HAND_MADE}
    assert len(grid.losses) == 16 and "stopped" not in grid.provenance
    assert few_digits.fingerprint() in grid.provenance["teacher"]
    process = grid.process
    model = diffusion.for_process(diffusion.ExactDenoiser(few_digits.images), process)
    fine = diffusion.time_grid(process, 12, "log_snr")
    ends = {"end": "lower_order_final", "prediction": "x0"}
    teacher = diffusion.SolverPlan.build(process, fine, "unipc3_bh2", **ends)
    noise = problem.standard_normal((1, 8, 8), range(20), 0, problem.HELD_OUT)
    uniform = diffusion.SolverPlan.build(
        process, diffusion.time_grid(process, 5), "dpmpp_2m", **ends
    )
    with torch.no_grad():
        wanted = diffusion.sample(model, noise, teacher)
        for plan, loss in ((grid.plan(), grid.loss), (uniform, grid.baselines["uniform"])):
            made = diffusion.sample(model, noise, plan)
            assert loss == pytest.approx(float((made - wanted).square().mean()), rel=1e-4)


def test_the_same_seed_makes_the_same_files(few_digits: images.Images, tmp_path: Path) -> None:
    words = ("--steps", 4, "--solver", "unipc2_bh2", "--process", "edm", "--loss", "l1")
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert learn(tmp_path / name, *words, "--seed", seed) == 0
    a, b, c = ((tmp_path / name / "unipc2_bh2-4.json").read_bytes() for name in "abc")
    assert a == b != c
    pictures = [(tmp_path / name / "grids.png").read_bytes() for name in "ab"]
    assert pictures[0] == pictures[1]


def test_a_teacher_with_classes_and_guidance(tmp_path: Path) -> None:
    path = write_teacher(tmp_path / "teacher.safetensors", classes=3, drop_classes=0.1)
    words = ("--teacher", path, "--steps", 2, "--count", 6, "--held-out", 4, "--iterations", 3)
    assert learn(tmp_path, *words, "--guidance", 1.5, "--teacher-steps", 4) == 0
    grid = LearnedGrid.load(tmp_path / "dpmpp_3m-2.json")
    assert grid.provenance["guidance"] == 1.5 and grid.evaluations == 2


def test_learned_grids_sample_with_the_other_commands(
    few_digits: images.Images, tmp_path: Path
) -> None:
    assert learn(tmp_path, "--steps", 4) == 0
    words = ["train", "trajectories", "--teacher", "exact", "--count", "3", "--device", "cpu"]
    grid = tmp_path / "dpmpp_3m-4.json"
    assert commands.main([*words, "--grid", str(grid), "--out", str(tmp_path / "made")]) == 0


def test_an_interrupted_run_leaves_its_best_grids(
    few_digits: images.Images,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Ctrl-C while the second grid is learned."""
    original = diffusion.learn_time_grid

    def stopped(model: Any, process: Any, steps: int, *args: Any, **options: Any) -> LearnedGrid:
        def interrupt(i: int, loss: float) -> None:
            if steps == 4 and i == 2:
                raise KeyboardInterrupt

        return original(model, process, steps, *args, **options | {"callback": interrupt})

    monkeypatch.setattr(command, "learn_time_grid", stopped)
    assert learn(tmp_path, "--steps", 3, 4) == 130
    assert f"the best grids so far are in {tmp_path}" in capsys.readouterr().err
    for steps in (3, 4):
        assert LearnedGrid.load(tmp_path / f"dpmpp_3m-{steps}.json").steps == steps


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--solver", "euclid"], "unknown solver 'euclid'"),
        (["--solver", "sde_dpmpp_2"], "--solver sde_dpmpp_2 adds noise"),
        (["--steps", "5", "1"], "--steps must be at least 2, got 1"),
        (
            ["--steps", "3", "12"],
            "--steps 12 needs a teacher that takes more: --teacher-steps is 12",
        ),
        (["--count", "1"], "--count must be at least 2, got 1"),
        (["--teacher", "gone.safetensors"], "gone.safetensors does not exist"),
        (["--data", "nowhere"], "--data nowhere does not exist"),
        (["--guidance", "2"], "--guidance needs classes"),
        (["--guidance", "nan", "--conditional"], "--guidance must be finite, got nan"),
        (["--seed", "-1"], "seed must be in 0 .. 2**64 - 1, got -1"),
        (["--out", "file"], "--out file cannot be written"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_options_are_one_line(
    words: list[str],
    text: str,
    few_digits: images.Images,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(problem, "sample", None)  # found before the teacher is asked
    Path("file").touch()
    assert learn(tmp_path / "made", *words) == 2
    error = capsys.readouterr().err
    assert text in error and len(error.strip().splitlines()) == 1
    assert error.startswith("learn-grid: ")


def test_two_noises_are_enough(few_digits: images.Images, tmp_path: Path) -> None:
    words = ("--steps", 2, "--count", 2, "--held-out", 1, "--iterations", 2)
    assert learn(tmp_path, *words) == 0
    assert LearnedGrid.load(tmp_path / "dpmpp_3m-2.json").provenance["samples"] == 2


def test_more_steps_than_the_costs_of_gits_have_by_default(
    few_digits: images.Images, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "GITS_STEPS", 3)
    assert learn(tmp_path, "--steps", 5, "--iterations", 2) == 0


def test_bars_show_the_teacher_and_each_grid(
    few_digits: images.Images, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert learn(tmp_path, "--steps", 3, 4, "--batch", 8) == 0
    bars = capsys.readouterr().err
    # 4 and 3 batches on 12 steps, and the steps of the costs; the bar is there before the first.
    total = 7 * 12 + problem.GITS_STEPS
    assert f"teacher:   0%|          | 0/{total}" in bars and f"{total}/{total}" in bars
    assert "3 steps:" in bars and "4 steps:" in bars


def small_run(folder: Path) -> int:
    data = images.Images(*(tensor[:40] for tensor in images.digits()))
    images.digits = lambda: data  # type: ignore[assignment]
    return learn(folder, "--steps", 3, "--iterations", 4)


def test_two_processes_learn_the_grid_of_one(few_digits: images.Images, tmp_path: Path) -> None:
    assert ranks.run(small_run, tmp_path, tmp_path / "two") == [0, 0]
    assert small_run(tmp_path / "one") == 0
    one, two = (LearnedGrid.load(tmp_path / name / "dpmpp_3m-3.json") for name in ("one", "two"))
    assert_close(torch.tensor(two.times), torch.tensor(one.times), 1e-4)
    assert two.loss == pytest.approx(one.loss, rel=1e-3)
