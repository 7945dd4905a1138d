"""Learned grids as values and files."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dsno_kernels.diffusion import (
    EDM,
    VE,
    DiscreteVP,
    FlowMatching,
    GridFileError,
    LearnedGrid,
    Process,
    SolverPlan,
    VPCosine,
    VPLinear,
    sample,
    time_grid,
)
from tests.diffusion_problems import golden

NOISE = EDM()
PROCESSES = (
    VPLinear(beta_max=torch.tensor(19.0, dtype=torch.float64)),
    VPCosine(normalized=False),
    DiscreteVP.scaled_linear(50),
    VE(),
    EDM(sigma_max=60.0),
    FlowMatching(shift=3.0),
)


def grid_of(process: Any = NOISE, solver: str = "dpmpp_3m", **more: Any) -> LearnedGrid:
    times = time_grid(process, 4)
    options = {"end": "lower_order_final", "prediction": "x0"}
    calls = SolverPlan.build(process, times, solver, **options).model_times * (1 - 1e-3)
    plan = SolverPlan.build(process, times, solver, denoiser_times=calls, **options)
    return LearnedGrid.of_plan(plan, **more)


@pytest.mark.parametrize("process", PROCESSES, ids=lambda p: type(p).__name__)
def test_a_file_holds_all_of_a_grid(process: Process, tmp_path: Path) -> None:
    columns = grid_of(process).plan().table.shape[1]
    corrections = [[0.1 * (i - j) for j in range(columns)] for i in range(4)]
    grid = grid_of(
        process,
        corrections=corrections,
        loss=0.25,
        baselines={"log_snr": 1.0},
        losses=(3.0, 2.0),
        provenance={"seed": 0, "loss": "l2"},
    )
    path = tmp_path / "grid.json"
    grid.save(path)
    read = LearnedGrid.load(path)
    if not isinstance(process, VPLinear):  # whose tensor became a number
        assert read == grid
    assert read.times == grid.times and read.denoiser_times == grid.denoiser_times
    assert read.plan().table.equal(grid.plan().table)
    assert [file.name for file in tmp_path.iterdir()] == ["grid.json"]


def test_a_plan_is_that_of_its_times_with_the_corrections_added() -> None:
    grid = grid_of()
    plain = SolverPlan.build(
        grid.process,
        grid.times,
        grid.solver,
        end=grid.end,
        denoiser_times=grid.denoiser_times,
        prediction="x0",
    )
    assert grid.plan().table.equal(plain.table)
    added = torch.zeros_like(plain.table)
    added[:, plain.columns["a_b"]] = 0.5
    corrected = grid_of(corrections=added.tolist()).plan()
    assert corrected.table.equal(plain.table + added)
    x = torch.randn(2, 3, dtype=torch.float64)
    assert not sample(lambda x, t: x, x, corrected).equal(sample(lambda x, t: x, x, plain))
    assert grid.plan(prediction="v").prediction == "v"


def test_lists_to_paste() -> None:
    flow = grid_of(FlowMatching(shift=3.0))
    assert flow.sigmas() == pytest.approx([3 * t / (1 + 2 * t) for t in flow.times])
    assert flow.rhos()[0] == float("inf") and flow.rhos()[-1] == 0
    assert grid_of().rhos() == grid_of().sigmas() == list(grid_of().times)
    assert (grid_of().steps, grid_of(solver="heun").evaluations) == (4, 7)


@pytest.mark.parametrize(
    ("use", "message"),
    [
        ({"process": VPLinear()}, "learned for the process EDM.* not for VPLinear"),
        ({"solver": "unipc3"}, "learned for solver 'dpmpp_3m', not for 'unipc3_bh2'"),
        ({"solver": "dpmpp_2m"}, "not for 'dpmpp_2m'"),
        ({"order": 2}, "order=2 contradicts the 3"),
        ({"steps": 5}, "has 4 steps, not 5"),
    ],
)
def test_a_grid_is_refused_for_anything_else(use: dict[str, Any], message: str) -> None:
    same = {"process": EDM(sigma_data=1.0), "solver": "dpmpp_3m", "order": 3, "steps": 4}
    assert grid_of().plan(**same).evaluations == 4
    with pytest.raises(ValueError, match=message):
        grid_of().plan(**use)


def damaged(content: dict[str, Any], **changes: Any) -> str:
    return json.dumps({**content, **changes})


@pytest.mark.parametrize(
    "change",
    [
        {"steps": 5},
        {"loss": "abc"},
        {"losses": [10**400]},
        {"baselines": {"log_snr": None}},
        {"provenance": 5},
        {"corrections": [[math.nan] * len(grid_of().plan().table[0])] * 4},
    ],
    ids=lambda change: next(iter(change)),
)
def test_files_with_a_damaged_value_are_refused(change: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "grid.json"
    grid_of().save(path)
    path.write_text(damaged(json.loads(path.read_text()), **change))
    with pytest.raises(GridFileError, match=r"grid\.json"):
        LearnedGrid.load(path)


def test_files_that_are_no_grid_are_refused_in_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "grid.json"
    grid_of().save(path)
    content = json.loads(path.read_text())
    times = content["times"]
    part = {key: value for key, value in content.items() if key != "solver"}
    for text, message in [
        ("{", "cannot be read as JSON"),
        ("[1, 2]", "is no time grid"),
        (json.dumps({"kind": "another"}), "is no time grid"),
        (damaged(content, format=2), "has format 2; this version knows format 1"),
        (json.dumps(part), "is no whole grid"),
        (damaged(content, times=times[::-1]), "learned for the process"),
        (damaged(content, times=times[:3]), "steps is 4, and the times are those of 2"),
        (damaged(content, denoiser_times=times[:2]), "one time an evaluation"),
        (damaged(content, denoiser_times=[81.0, *times[1:4]]), "lies outside of the times"),
        (damaged(content, corrections=[[1.0]]), "shape of the table"),
        (damaged(content, solver="magic"), "unknown solver 'magic'"),
        (damaged(content, process={"kind": "Magic"}), "process Magic cannot be made"),
        (damaged(content, process={"kind": "VPLinear"}), "learned for the process VPLinear"),
        (damaged(content, process={"kind": "EDM", "s": 1}), "process EDM cannot be made"),
    ]:
        path.write_text(text)
        with pytest.raises(GridFileError, match=message) as raised:
            LearnedGrid.load(path)
        assert str(path) in str(raised.value) and "\n" not in str(raised.value)
    with pytest.raises(GridFileError, match=r"does not exist; give a grid file"):
        LearnedGrid.load(tmp_path / "other.json")


class Doubled(EDM):
    """A process of the user's own: a file can name it, not make it."""

    def sigma(self, t: float | Tensor) -> Tensor:
        return 2 * super().sigma(t)

    def log_snr(self, t: float | Tensor) -> Tensor:
        return super().log_snr(2 * torch.as_tensor(t))

    def inverse(self, log_snr: float | Tensor) -> Tensor:
        return super().inverse(log_snr) / 2


def test_a_process_of_ones_own_is_given_when_its_grid_is_read(tmp_path: Path) -> None:
    path = tmp_path / "grid.json"
    grid_of(Doubled()).save(path)
    with pytest.raises(GridFileError, match=r"Doubled.* cannot be made from a file: give it"):
        LearnedGrid.load(path)
    assert LearnedGrid.load(path, Doubled()).times == grid_of(Doubled()).times
    with pytest.raises(GridFileError, match="learned for the process Doubled, not for EDM"):
        LearnedGrid.load(path, EDM())


def test_a_failed_write_leaves_the_file_of_before(tmp_path: Path) -> None:
    path = tmp_path / "grid.json"
    grid_of().save(path)
    before = path.read_bytes()
    with pytest.raises(TypeError):
        grid_of(provenance={"tensor": torch.ones(2)}).save(path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["grid.json"]


def test_official_results_are_read(tmp_path: Path) -> None:
    both = golden("ld3.npz")["train_dpm_solver++_5_lambda_best_t_steps"]
    path = tmp_path / "best_v2.pt"
    torch.save({"params1": both[:6], "params2": both[6:], "best_t_steps": both}, path)
    grid = LearnedGrid.from_official(path, EDM(), "dpmpp_3m", order=3, prediction="x0")
    assert (grid.solver, grid.end) == ("dpmpp_3m", "lower_order_final")
    assert grid.times == tuple(both[:6].double().tolist())
    assert grid.denoiser_times == tuple(both[6:11].double().tolist())


def test_official_times_of_a_discrete_model_are_ours_less_one(tmp_path: Path) -> None:
    values = golden("ld3.npz")
    process = DiscreteVP(values["vp_alphas_cumprod"])
    t = values["ns_vp_t"].flip(0)
    path = tmp_path / "best_v2.pt"
    torch.save({"best_t_steps": torch.cat([t, t])}, path)
    grid = LearnedGrid.from_official(path, process, "dpmpp_2m")
    log_snr = process.log_snr(torch.tensor(grid.times, dtype=torch.float64))
    torch.testing.assert_close(log_snr, values["ns_vp_lambda"].flip(0).double(), rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"weights": torch.ones(3)}, "no result of the official LD3 code"),
        ({"best_t_steps": torch.ones(5)}, "must hold N \\+ 1 times"),
        ({"best_t_steps": Path("x")}, "no result of the official LD3 code"),
    ],
)
def test_other_pt_files_are_refused(content: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / "best.pt"
    torch.save(content, path)
    with pytest.raises(GridFileError, match=message):
        LearnedGrid.from_official(path, EDM(), "dpmpp_3m")
    with pytest.raises(GridFileError, match="does not exist"):
        LearnedGrid.from_official(tmp_path / "none.pt", EDM(), "dpmpp_3m")
