"""The command `train trajectories`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

for package in ("lmdb", "tqdm", "sklearn", "safetensors"):
    pytest.importorskip(package, reason=f"{package} is not installed")

from dsno_kernels import commands, diffusion, models  # noqa: E402
from dsno_kernels.diffusion import ExactDenoiser, SolverPlan, for_process, time_grid  # noqa: E402
from dsno_kernels.models import DSNO, DSNOConfig, EDMDenoiser, logsnr_schedule  # noqa: E402
from dsno_kernels.training import images  # noqa: E402
from dsno_kernels.training.trajectories import PROCESSES, TrajectoryDataset  # noqa: E402
from tests.helpers import assert_close  # noqa: E402
from tests.trajectory_runs import everything  # noqa: E402

FLOAT32 = 1e-6


def run(folder: Path, *words: str) -> int:
    return commands.main(["train", "trajectories", "--out", str(folder), "--device", "cpu", *words])


def last_line(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().err.strip().splitlines()[-1]


@pytest.fixture
def few_digits(monkeypatch: pytest.MonkeyPatch) -> images.Images:
    data = images.Images(*(tensor[:100] for tensor in images.digits()))
    monkeypatch.setattr(images, "digits", lambda: data)
    return data


def teacher(path: Path, classes: int = 0, **metadata: object) -> EDMDenoiser:
    """An untrained one, as a file."""
    torch.manual_seed(0)
    config = DSNOConfig(
        image_size=8,
        image_channels=1,
        channels=32,
        channel_mult=(1,),
        num_res_blocks=1,
        attention_resolutions=(),
        embedding_dim=32,
        num_classes=classes,
        time_conv=False,
        init_scale=1.0,
    )
    model = EDMDenoiser(DSNO(config), sigma_data=0.5).eval()
    models.save(model, path, **metadata)
    return model


def test_the_exact_teacher(
    few_digits: images.Images, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--teacher", "exact", "--count", "30", "--batch", "16", "--steps", "12"]
    words += ["--process", "dsno", "--solver", "dpmpp_2m", "--times", "5", "12", "--seed", "3"]
    assert run(tmp_path, *words) == 0
    frames, labels = everything(tmp_path)
    assert frames.shape == (30, 3, 1, 8, 8) and labels is None
    process = PROCESSES["dsno"]
    plan = SolverPlan.build(process, time_grid(process, 12), "dpmpp_2m", prediction="x0")
    model = for_process(ExactDenoiser(few_digits.images), process)
    with torch.no_grad():
        wanted = diffusion.sample(model, frames[:, 0], plan, frames=[5, 12])
    assert_close(frames[:, 1:], wanted, FLOAT32)
    data = TrajectoryDataset(tmp_path)
    assert data.manifest is not None and few_digits.fingerprint() in data.manifest["teacher"]
    capsys.readouterr()
    assert run(tmp_path, *words, "--verify") == 0
    shard = tmp_path / "shard-00000-of-00001"
    assert capsys.readouterr().out == f"Wrote {shard}, and every value is as it was\n"


@pytest.mark.parametrize("labels", [[], ["--labels", "4", "7"]], ids=["all", "some"])
def test_classes_of_the_exact_teacher(
    labels: list[str], few_digits: images.Images, tmp_path: Path
) -> None:
    words = ["--teacher", "exact", "--conditional", "--count", "25", "--guidance", "1.0"]
    assert run(tmp_path, *words, "--steps", "16", "--grid", "log_snr", *labels) == 0
    frames, y = everything(tmp_path)
    assert y is not None
    assert y.tolist() == (list(range(10)) if not labels else [4, 7] * 5)[:10] * 2 + y.tolist()[20:]
    assert few_digits.labels is not None
    nearest = torch.cdist(frames[:, -1].flatten(1), few_digits.images.flatten(1))
    assert torch.equal(few_digits.labels[nearest.argmin(1)], y)


@pytest.mark.parametrize("classes", [0, 3])
def test_a_teacher_of_a_file(classes: int, tmp_path: Path) -> None:
    model = teacher(tmp_path / "teacher.safetensors", classes)
    words = ["--teacher", str(tmp_path / "teacher.safetensors"), "--count", "7", "--steps", "4"]
    assert run(tmp_path / "made", *words) == 0
    frames, y = everything(tmp_path / "made")
    assert (None if y is None else y.tolist()) == ([0, 1, 2, 0, 1, 2, 0] if classes else None)
    process = PROCESSES["vp_cosine"]
    plan = SolverPlan.build(process, time_grid(process, 4), "tab3", prediction="x0")
    kwargs = {} if y is None else {"y": y}
    with torch.no_grad():
        wanted = diffusion.sample(
            for_process(model, process), frames[:, 0], plan, kwargs=kwargs, frames=[1, 2, 3, 4]
        )
    assert_close(frames[:, 1:], wanted, FLOAT32)


def test_the_process_of_dsno() -> None:
    process = PROCESSES["dsno"]
    grid = time_grid(process, 10)
    expected = logsnr_schedule(torch.linspace(1, 0, 11, dtype=torch.float64))
    assert_close(2 * process.log_snr(grid), expected, 1e-9)


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--solver", "euclid"], "unknown solver 'euclid'"),
        (["--grid", "even"], "unknown kind of time grid 'even'"),
        (["--steps", "0"], "steps must be at least 1"),
        (["--t-end", "2"], "is required of VPCosine"),
        (["--solver", "sde_dpmpp_2"], "adds noise"),
        (["--times", "40"], "positions must be in 1..16"),
        (["--labels", "11", "--conditional"], "--labels 11: the teacher knows [0, 1"),
        (["--guidance", "2"], "guidance needs classes"),
        (["--teacher", "nothing.safetensors"], "nothing.safetensors does not exist"),
        (["--data", "nowhere"], "--data nowhere does not exist"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_options_are_one_line(
    words: list[str], text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path, *(["--teacher", "exact"] if "--teacher" not in words else []), *words) == 2
    error = capsys.readouterr().err
    assert text in error and len(error.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_data_without_classes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import numpy as np

    np.savez(tmp_path / "images.npz", images=np.zeros((3, 8, 8), np.uint8))
    words = ["--teacher", "exact", "--data", str(tmp_path / "images.npz"), "--conditional"]
    assert run(tmp_path / "made", *words) == 2
    assert "has no classes" in last_line(capsys)


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--data", "c.npz"], "--data goes with --teacher exact; the teacher"),
        (["--size", "8"], "--size goes with --teacher exact"),
        (["--classes"], "--classes goes with --teacher exact"),
        (["--conditional"], "teacher.safetensors knows no classes; leave it out"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_options_of_the_exact_teacher_alone(
    words: list[str], text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher(tmp_path / "teacher.safetensors")
    words = ["--teacher", str(tmp_path / "teacher.safetensors"), *words]
    assert run(tmp_path / "made", *words) == 2
    assert text in last_line(capsys)


def test_guidance_of_a_trained_teacher(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    teacher(tmp_path / "teacher.safetensors", 3)
    words = ["--teacher", str(tmp_path / "teacher.safetensors"), "--guidance", "2"]
    words += ["--count", "5", "--steps", "4"]
    assert run(tmp_path / "made", *words) == 2
    assert "--guidance needs a teacher that also knows no class" in last_line(capsys)
    model = teacher(tmp_path / "teacher.safetensors", 3, drop_classes=0.1)
    assert run(tmp_path / "made", *words) == 0
    frames, y = everything(tmp_path / "made")
    assert y is not None
    process = PROCESSES["vp_cosine"]
    plan = SolverPlan.build(process, time_grid(process, 4), "tab3", prediction="x0")
    given, none = {"y": y}, {"y": torch.full_like(y, -1)}
    with torch.no_grad():
        wanted = diffusion.sample(
            for_process(model, process),
            frames[:, 0],
            plan,
            kwargs=given,
            unconditional=none,
            guidance=2.0,
            frames=[1, 2, 3, 4],
        )
    assert_close(frames[:, 1:], wanted, FLOAT32)
    teacher(tmp_path / "teacher.safetensors", 3, drop_classes="much")
    assert run(tmp_path / "made", *words) == 2
    assert "its drop_classes must be a number, got much" in last_line(capsys)


@pytest.mark.usefixtures("few_digits")
def test_other_options_and_damage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--teacher", "exact", "--count", "6", "--steps", "4"]
    assert run(tmp_path, *words) == 0
    assert run(tmp_path, *words[:-1], "5") == 2
    assert "plan.steps is 4 there and 5 now" in last_line(capsys)
    path = tmp_path / "shard-00000-of-00001" / "sha256.txt"
    path.write_text("0" * 64)
    assert run(tmp_path, *words) == 0
    assert run(tmp_path, *words, "--verify") == 2
    assert "do not have the checksum" in last_line(capsys)


@pytest.mark.usefixtures("few_digits")
def test_interrupt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = []
    forward = ExactDenoiser.forward

    def interrupted(self: ExactDenoiser, *args: object) -> torch.Tensor:
        calls.append(args)
        if len(calls) > 6:
            raise KeyboardInterrupt
        return forward(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(ExactDenoiser, "forward", interrupted)
    words = ["--teacher", "exact", "--count", "6", "--batch", "4", "--steps", "4"]
    assert run(tmp_path, *words) == 130
    assert "has 4 of 6 trajectories; the same command goes on" in last_line(capsys)
    monkeypatch.setattr(ExactDenoiser, "forward", forward)
    assert run(tmp_path, *words) == 0
    assert len(TrajectoryDataset(tmp_path, verify=True)) == 6


def test_under_torchrun(tmp_path: Path) -> None:
    """What torchrun starts, with its environment; the processes need no group."""
    teacher(tmp_path / "teacher.safetensors")
    out = tmp_path / "made"
    words = ["--teacher", str(tmp_path / "teacher.safetensors"), "--count", "5", "--steps", "4"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "dsno_kernels", "train", "trajectories", "--out", str(out), *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        command, env=environment, cwd=Path(__file__).parents[1], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert len(list(out.glob("shard-*-of-00002"))) == 2
    assert run(tmp_path / "one", *words) == 0
    assert_close(everything(out)[0], everything(tmp_path / "one")[0], 1e-5)
