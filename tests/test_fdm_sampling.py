"""A momentum model from its file to images: DEIS, UniPC, a learned grid, and the commands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("lmdb")
pytest.importorskip("tqdm")
pytest.importorskip("safetensors")

import dsno_kernels as dk
from dsno_kernels import commands, diffusion, models
from dsno_kernels.diffusion import EDM, FDM, ExactDenoiser, SolverPlan, for_process, time_grid
from dsno_kernels.diffusion.denoisers import Denoiser
from dsno_kernels.models import DSNO, DSNOConfig, EDMDenoiser
from dsno_kernels.training.trajectories import PROCESSES
from tests.helpers import assert_close, rel_rms
from tests.trajectory_runs import everything

CONFIG = DSNOConfig(
    image_size=8,
    image_channels=1,
    channels=32,
    channel_mult=(1,),
    num_res_blocks=1,
    attention_resolutions=(),
    embedding_dim=32,
    time_conv=False,
    init_scale=1.0,
)
PROCESS = FDM(EDM(), 2.0)
FLOAT32 = 1e-6


def denoiser(process: FDM | EDM) -> EDMDenoiser:
    """Untrained, of the same weights for every process."""
    torch.manual_seed(0)
    network = DSNO(CONFIG)
    torch.nn.init.normal_(network.all_modules[-1].weight, std=0.3)  # it starts at zero
    return EDMDenoiser(network, process=process).eval()


def test_every_process_samples_a_momentum_model(tmp_path: Path) -> None:
    """With its own process the state is s x; along EDM's it is x: the same images. Raw networks
    are the "edm" prediction of their own process.
    """
    models.save(denoiser(PROCESS), tmp_path / "teacher.safetensors")
    model = models.load(tmp_path / "teacher.safetensors").double()
    assert model.process == PROCESS
    noise = torch.randn(3, 1, 8, 8, dtype=torch.float64)
    sigmas = time_grid(EDM(), 8, "karras")
    times = PROCESS.clock(sigmas).clamp(max=1.0)

    def raw(x: Tensor, t: Tensor) -> Tensor:
        return model(x, PROCESS.rho(t), raw=True)

    with torch.no_grad():
        for solver in ("tab3", "unipc3", "heun"):
            base = SolverPlan.build(EDM(), sigmas, solver, prediction="x0")
            expected = diffusion.sample(for_process(model, EDM()), 80.0 * noise, base)
            start = PROCESS.sigma(1.0) * noise
            for prediction, function in (("x0", for_process(model, PROCESS)), ("edm", raw)):
                plan = SolverPlan.build(PROCESS, times, solver, prediction=prediction)
                # the grids end at t' = 0, where s = 1
                assert_close(diffusion.sample(function, start, plan), expected, 1e-7)


def test_deis_unipc_and_a_learned_grid_on_one_momentum_process(tmp_path: Path) -> None:
    """Far better than DDIM with as many evaluations; the learned grid beats the same solver's
    usual one.
    """
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(20, 1, 4, 4, generator=generator, dtype=torch.float64) * 2 - 1
    model = for_process(ExactDenoiser(images), PROCESS)
    noise = torch.randn(60, 1, 4, 4, generator=generator, dtype=torch.float64)
    x_T = PROCESS.sigma(1.0) * noise
    fine = SolverPlan.build(PROCESS, time_grid(PROCESS, 200, "log_snr"), "unipc3", prediction="x0")
    expected = diffusion.sample(model, x_T, fine)
    train, held_out = slice(0, 40), slice(40, 60)
    errors = {}
    times = time_grid(PROCESS, 8, "karras")
    for name in ("ddim", "deis3", "unipc3", "dpmpp_3m"):
        plan = SolverPlan.build(
            PROCESS, times, name, history="x0", prediction="x0", end="lower_order_final"
        )
        errors[name] = rel_rms(diffusion.sample(model, x_T[held_out], plan), expected[held_out])
    grid = diffusion.learn_time_grid(model, PROCESS, 8, x_T[train], expected[train])
    grid.save(tmp_path / "grid.json")
    loaded = diffusion.LearnedGrid.load(tmp_path / "grid.json")
    assert loaded.process == PROCESS and loaded.times == grid.times
    found = diffusion.sample(model, x_T[held_out], loaded.plan())
    errors["learned"] = rel_rms(found, expected[held_out])
    assert max(errors["deis3"], errors["unipc3"]) < errors["ddim"] / 5, errors
    assert errors["learned"] < errors["dpmpp_3m"] / 1.5, errors


@pytest.mark.slow
def test_readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The example in README runs as it stands: a model of a file along DEIS, UniPC and an LD3 grid,
    three ways to nearly the same images.
    """
    readme = Path(__file__).parents[1] / "README.md"
    section = readme.read_text().split("\n## Momentum diffusion\n")[1].split("\n## ")[0]
    (code,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    model = denoiser(PROCESS)
    with torch.no_grad():  # as smooth as one of Gaussian data, which few steps sample well
        model.network.all_modules[-1].weight.mul_(0.02)
    (tmp_path / "fdm").mkdir()
    models.save(model, tmp_path / "fdm" / "teacher.safetensors")
    monkeypatch.chdir(tmp_path)
    original, drawn = diffusion.sample, {}

    def sample(model: Denoiser, x: Tensor, plan: SolverPlan) -> Tensor:
        drawn[plan.solver, len(plan.grid) - 1] = original(model, x, plan)
        return drawn[plan.solver, len(plan.grid) - 1]

    monkeypatch.setattr(diffusion, "sample", sample)
    exec(code, {"dk": dk, "torch": torch})
    assert list(drawn) == [("deis3", 10), ("unipc3_bh2", 10), ("dpmpp_3m", 5)]
    expected = drawn["unipc3_bh2", 10]
    assert expected.shape == (64, 1, 8, 8)
    for images in drawn.values():
        assert rel_rms(images, expected) < 0.25  # 0.9 of five steps on the usual grid


def test_train_trajectories_takes_the_denoiser_of_the_file(tmp_path: Path) -> None:
    """Its preconditioner, that is: the same weights without momentum make other images."""
    frames = {}
    for name, process in (("fdm", PROCESS), ("edm", EDM())):
        model = denoiser(process)
        path = tmp_path / f"{name}.safetensors"
        models.save(model, path)
        words = f"train trajectories --teacher {path} --count 5 --steps 4 --device cpu --out"
        assert commands.main([*words.split(), str(tmp_path / name)]) == 0
        frames[name], _ = everything(tmp_path / name)
        sampled = PROCESSES["vp_cosine"]
        plan = SolverPlan.build(sampled, time_grid(sampled, 4), "tab3", prediction="x0")
        with torch.no_grad():
            wanted = diffusion.sample(for_process(model, sampled), frames[name][:, 0], plan)
        assert_close(frames[name][:, -1], wanted, FLOAT32)
    assert torch.equal(frames["fdm"][:, 0], frames["edm"][:, 0])
    assert rel_rms(frames["fdm"][:, -1], frames["edm"][:, -1]) > 1e-2


def test_evaluate_takes_a_momentum_teacher(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("sklearn")
    shown = []
    for name, process in (("fdm", PROCESS), ("edm", EDM())):
        path = tmp_path / f"{name}.safetensors"
        models.save(denoiser(process), path)
        words = f"evaluate --teacher {path} --evaluations 3 --count 80 --seeds 1 --features pixels"
        assert commands.main([*words.split(), "--out", str(tmp_path / "features")]) == 0
        lines = capsys.readouterr().out.splitlines()
        shown.append(next(line.split("|")[4] for line in lines if line.startswith("| teacher")))
    assert shown[0] != shown[1]
