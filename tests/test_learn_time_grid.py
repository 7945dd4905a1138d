"""Learning of time grids: every solver and process, what it costs, and what it promises."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from dsno_kernels.diffusion import (
    EDM,
    FDM,
    VE,
    DiscreteVP,
    FlowMatching,
    LearnedGrid,
    LearningOptions,
    Process,
    SolverPlan,
    VPCosine,
    VPLinear,
    learn_time_grid,
    sample,
    solvers,
    time_grid,
)
from tests import ranks
from tests.diffusion_problems import Gaussian, Mixture, golden
from tests.learning_problems import SHORT, VP, Network, improves, learned, starts

TOY = Mixture(golden("ld3.npz"))
# One sum over all samples, or one of each process.
ORDER_OF_SUMS = 1e-9
# Solvers without noise: the SDE ones, and those whose noise is asked for, have some.
LINEAR = [name for name in solvers() if not name.startswith("sde_")]


@pytest.mark.parametrize("solver", LINEAR)
def test_every_solver_learns(solver: str) -> None:
    process = FlowMatching(t_min=0.02, t_max=0.98) if solver == "flow_euler" else VP
    history = "flow" if solver == "flow_euler" else None
    grid = learned(process, solver=solver, history=history)
    assert improves(grid)
    assert grid.times[0] == process.t_max and grid.times[-1] == process.t_min
    assert (
        grid.denoiser_times
        != LearnedGrid.of_plan(
            SolverPlan.build(process, grid.times, solver, history=history, end=grid.end)
        ).denoiser_times
    )


PROCESSES = (
    VPCosine(),
    DiscreteVP.scaled_linear(100),
    VE(),
    EDM(),
    FlowMatching(t_min=0.01, t_max=0.99),
    FDM(EDM()),
    FDM(VPLinear()),
)


@pytest.mark.parametrize("mode", ["log_snr", "time"])
@pytest.mark.parametrize("process", PROCESSES, ids=repr)
def test_every_process_learns(process: Process, mode: str) -> None:
    options = dataclasses.replace(SHORT, mode=mode, iterations=12)
    grid = learned(process, solver="dpmpp_2m", options=options)
    assert improves(grid) and grid.provenance["mode"] == mode


def test_ends_where_sigma_or_alpha_vanish_are_kept() -> None:
    process = FlowMatching()
    grid = learned(process, solver="dpmpp_2m")
    assert improves(grid) and grid.provenance["mode"] == "time"
    assert (grid.times[0], grid.times[-1]) == (1.0, 0.0)
    with pytest.raises(ValueError, match="mode 'log_snr' needs alpha > 0 and sigma > 0"):
        learned(process, options=LearningOptions(mode="log_snr"))


@pytest.mark.parametrize("prediction", ["eps", "v", "edm"])
def test_what_a_model_predicts_is_converted(prediction: str) -> None:
    assert improves(learned(EDM(), solver="unipc3", prediction=prediction))


def test_coefficients_are_learned_with_the_times() -> None:
    plain = learned(solver="unipc2")
    grid = learned(solver="unipc2", options=dataclasses.replace(SHORT, coefficients=True))
    assert improves(grid) and grid.times != plain.times
    added = torch.tensor(grid.corrections, dtype=torch.float64)
    plan = dataclasses.replace(grid, corrections=None).plan()
    assert grid.plan().table.equal(plan.table + added)
    assert not bool(added[plan.table == 0].any())
    for name in ("A", "B", "s", "c_in"):
        assert not bool(added[:, plan.columns[name]].any())


def test_the_corrected_plan_is_what_was_judged() -> None:
    problem = Gaussian(VP, 1.0)
    grid = learn_time_grid(
        lambda x, t: problem.prediction("x0", x, t),
        *(VP, 3, problem.x_T, problem.at(VP.t_min)),
        options=LearningOptions(iterations=5, coefficients=True, validation=0.0, soft=False),
    )
    made = sample(lambda x, t: problem.prediction("x0", x, t), problem.x_T, grid.plan())
    loss = (made - problem.at(VP.t_min)).square().mean()
    assert float(loss) == pytest.approx(grid.loss, rel=1e-9)


def test_labels_and_guidance_go_with_their_samples() -> None:
    network, x_T = Network(), starts()
    y, scale = torch.arange(8), torch.linspace(0.5, 2.0, 8, dtype=torch.float64)
    arguments: dict[str, Any] = {
        "kwargs": {"y": y},
        "unconditional": {"y": torch.zeros_like(y)},
        "guidance": scale,
    }
    whole, parts = (
        learn_time_grid(
            *(network, VP, 3, x_T),
            **arguments,
            options=dataclasses.replace(SHORT, batch=batch, recompute=batch is not None),
        )
        for batch in (None, 3)
    )
    assert improves(whole)
    assert whole.times == pytest.approx(parts.times, rel=ORDER_OF_SUMS)
    made = sample(network, x_T, whole.plan(), **arguments)
    teacher = SolverPlan.build(
        *(VP, time_grid(VP, 20, "karras"), "unipc3_bh1"), end="lower_order_final", prediction="x0"
    )
    loss = (made - sample(network, x_T, teacher, **arguments))[6:].square().mean()
    assert float(loss.detach()) == pytest.approx(whole.loss, rel=1e-6)
    assert all(parameter.grad is None for parameter in network.parameters())


def test_no_evaluation_is_wasted() -> None:
    network, x_T = Network(), starts(10)
    targets = starts(10)
    losses: list[float] = []
    options = LearningOptions(iterations=10, rounds=2, validation=0.2, soft=False)
    grid = learn_time_grid(
        *(network, VP, 5, x_T, targets),
        options=options,
        callback=lambda i, loss: losses.append(loss),
    )
    assert tuple(losses) == grid.losses
    # One probe of one sample; N calls a training loss, none for a point seen before; 3 validations.
    assert network.calls.count(1) == 1
    assert network.calls.count(8) == 5 * len(losses)
    assert network.calls.count(2) == 5 * 3
    assert len(network.calls) == 1 + 5 * len(losses) + 5 * 3
    assert len(set(losses)) == len(losses)
    assert grid.provenance["evaluations"] == sum(network.calls) - 1
    soft = learn_time_grid(
        *(network, VP, 5, x_T, targets), options=dataclasses.replace(options, soft=True)
    )
    # Two more passes over the training data between rounds.
    assert soft.provenance["evaluations"] == 5 * (8 * (len(soft.losses) + 2) + 2 * 3)


def test_weights_and_starts_stay_as_they_are() -> None:
    network, x_T = Network(), starts()
    before, weights = x_T.clone(), [p.detach().clone() for p in network.parameters()]
    learn_time_grid(network, VP, 3, x_T, options=SHORT)
    assert x_T.equal(before) and not x_T.requires_grad
    assert all(map(torch.equal, weights, network.parameters()))


@pytest.mark.parametrize("optimizer", ["lbfgs", "adam"])
def test_the_same_again_for_the_same_seed(optimizer: str) -> None:
    options = dataclasses.replace(SHORT, optimizer=optimizer, batch=2, seed=5)
    first, second = (learned(options=options) for _ in range(2))
    assert first == second
    if optimizer == "adam":
        assert learned(options=dataclasses.replace(options, seed=6)).times != first.times


def test_starts_move_within_their_ball_and_lower_the_loss() -> None:
    seen: list[Tensor] = []
    network, x_T = Network(), starts()

    def watched(x: Tensor, t: Tensor) -> Tensor:
        if float(t.detach()) == VP.t_max:
            seen.append(x.detach().clone())
        return network(x, t)

    options = LearningOptions(iterations=9, rounds=3, radius=0.05, validation=0.0)
    learn_time_grid(watched, VP, 3, x_T, options=options)
    away = torch.stack([(x - x_T).norm(dim=1) for x in seen if len(x) == len(x_T)])
    assert float(away.max()) <= 0.05 * float(VP.sigma(1.0)) * (1 + 1e-12)
    assert float(away.max()) > 0.04


def test_learning_goes_on_from_a_grid_of_before() -> None:
    first = learned()
    again = learned(grid=torch.tensor(first.times, dtype=torch.float64))
    assert again.baselines["initial"] < first.baselines["initial"]
    assert again.times[0] == first.times[0]
    with pytest.raises(ValueError, match="grid must hold 5 times, got 4"):
        learned(grid=torch.tensor([1.0, 0.5, 0.1, 0.001]))


def test_losses_by_name_and_by_function() -> None:
    assert improves(learned(loss="l1"))

    def largest(made: Tensor, wanted: Tensor) -> Tensor:
        return (made - wanted).abs().amax(1)

    grid = learned(loss=largest)
    assert improves(grid) and grid.provenance["loss"] == "largest"
    with pytest.raises(ValueError, match="one number a sample"):
        learned(loss=lambda made, wanted: (made - wanted).mean())
    with pytest.raises(ValueError, match="unknown loss 'l3'; known are l2, l1, lpips"):
        learned(loss="l3")


def test_samples_are_compared_after_decoding() -> None:
    problem = Gaussian(VP, 1.0)
    wanted = 2 * problem.at(VP.t_min)[:, :2]
    more: dict[str, Any] = {"options": dataclasses.replace(SHORT, validation=0.5)}
    shapes: list[tuple[int, ...]] = []

    def decode(x: Tensor) -> Tensor:
        shapes.append(tuple(x.shape))
        return 2 * x[:, :2]

    def model(x: Tensor, t: Tensor) -> Tensor:
        return problem.prediction("x0", x, t)

    assert improves(learn_time_grid(model, VP, 3, problem.x_T, wanted, decode=decode, **more))
    assert set(shapes) == {(2, 6)}
    with pytest.raises(ValueError, match=r"have shape \(2, 2\), their targets \(2, 3\)"):
        learn_time_grid(model, VP, 3, problem.x_T, wanted[:, [0, 1, 1]], decode=decode, **more)


def test_lpips_asks_for_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "lpips", None)
    with pytest.raises(ImportError, match="pip install lpips"):
        learned(loss="lpips")


def test_the_bar_counts_training_losses(capsys: pytest.CaptureFixture[str]) -> None:
    grid = learned(progress=True)
    assert f"{len(grid.losses)}/{SHORT.iterations}" in capsys.readouterr().err


def worker(folder: Path) -> dict[str, Any]:
    x_T = 80 * golden("ld3.npz")["train_latents"][:21].double()
    grid = learn_time_grid(
        *(TOY.denoise, EDM(), 4, x_T),
        options=LearningOptions(iterations=8, rounds=2),
        out=folder / "grid.json",
    )
    return dataclasses.asdict(dataclasses.replace(grid, process=None))


def test_processes_share_the_samples(tmp_path: Path) -> None:
    alone = worker(tmp_path)
    (tmp_path / "grid.json").unlink()
    both = ranks.run(worker, tmp_path, tmp_path)
    assert both[0]["times"] == both[1]["times"] and both[0]["losses"] == both[1]["losses"]
    assert both[0]["times"] == pytest.approx(alone["times"], rel=1e-6)
    assert both[0]["losses"] == pytest.approx(alone["losses"], rel=1e-6)
    assert LearnedGrid.load(tmp_path / "grid.json").times == both[0]["times"]
    together = sum(one["provenance"]["evaluations"] for one in both)
    assert together == alone["provenance"]["evaluations"]


def stopped_by_the_second() -> int:
    """More processes than samples that judge, and a callback that ends in one process only."""
    stop = dist.get_rank() == 1
    grid = learn_time_grid(
        *(Network(), VP, 3, starts(3)),
        options=SHORT,
        callback=lambda i, loss: stop and i == 1,
    )
    return len(grid.losses)


def test_a_callback_in_one_process_ends_learning_in_all(tmp_path: Path) -> None:
    assert ranks.run(stopped_by_the_second, tmp_path) == [2, 2]


def one_sample_for_two(optimizer: str) -> tuple[float, ...]:
    """Of two samples one is trained on, and one judges."""
    options = dataclasses.replace(SHORT, optimizer=optimizer, batch=4, validation=0.5)
    return learn_time_grid(Network(), VP, 3, starts(2), options=options).times


@pytest.mark.parametrize("optimizer", ["lbfgs", "adam"])
def test_a_process_may_have_no_sample(optimizer: str, tmp_path: Path) -> None:
    both = ranks.run(one_sample_for_two, tmp_path, optimizer)
    assert both[0] == both[1] == pytest.approx(one_sample_for_two(optimizer), rel=ORDER_OF_SUMS)


def test_the_mode_of_the_caller_does_not_matter() -> None:
    network = Network()
    expected = learn_time_grid(network, VP, 3, starts(), options=SHORT)
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            assert learn_time_grid(network, VP, 3, starts(), options=SHORT) == expected


def test_six_steps_of_a_gaussian_become_fifty_times_more_exact() -> None:
    grid = learned(steps=6, options=LearningOptions(validation=0.25))
    assert improves(grid, 0.02)
