"""`sample` as one compiled graph and as one replayed CUDA graph: one code for all rows (T9).

The CUDA graph is a stand-in here; tests/test_gpu_sample.py has the real one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from dsno_kernels import diffusion
from dsno_kernels.diffusion import EDM, CapturedSampler, SolverPlan, VPLinear, time_grid
from tests.helpers import assert_close
from tests.test_capture import capture_on_the_host

VP = VPLinear()
FLOAT64 = 1e-13
X = torch.zeros(2, 3, 4, dtype=torch.float64)
CASES = {
    "tab3": {},
    "ddim": {},
    "unipc3": {},
    "heun": {"S_churn": 3.0},
    "sde_dpmpp_2": {},
    "tab2": {"process": EDM(), "prediction": "edm"},
}


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    with torch.no_grad():
        yield
    torch._dynamo.reset()


def plan_of(name: str, steps: int = 20) -> SolverPlan:
    options = dict(CASES.get(name, {}))
    process = options.pop("process", VP)
    return SolverPlan.build(process, time_grid(process, steps), name, **options)


def model(x: Tensor, t: Tensor, shift: float = 0.0) -> Tensor:
    return torch.tanh(x + t + shift)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(1)


def noise_of(row: int) -> Tensor:
    seeded = torch.Generator().manual_seed(row + 7)
    return torch.randn(2, 3, 4, generator=seeded, dtype=torch.float64)


def compiled_by_a_counter(monkeypatch: pytest.MonkeyPatch) -> CompileCounterWithBackend:
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda run, **options: compiled(run, backend=counter, **options)
    )
    return counter


@pytest.mark.parametrize("name", CASES)
def test_one_compiled_graph_for_twenty_steps(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    counter, plan = compiled_by_a_counter(monkeypatch), plan_of(name)
    for _ in range(2):  # a second sample needs no new graph
        x = torch.randn(2, 3, 4, dtype=torch.float64)
        ours = diffusion.sample(model, x, plan, compile=True, generator=generator())
        assert_close(ours, diffusion.sample(model, x, plan, generator=generator()), FLOAT64)
    assert counter.frame_count == 1 and counter.op_count > 3


def embedded(x: Tensor, t: Tensor, label: Tensor) -> Tensor:
    return torch.tanh(x + t + label.reshape(-1, 1, 1))


def guided_by(label: Tensor, scale: float | Tensor) -> dict[str, Any]:
    return {
        "kwargs": {"label": label},
        "unconditional": {"label": torch.zeros(2)},
        "guidance": scale,
    }


def test_one_graph_serves_other_plans_and_guidance_scales(monkeypatch: pytest.MonkeyPatch) -> None:
    counter = compiled_by_a_counter(monkeypatch)
    x = torch.randn(2, 3, 4, dtype=torch.float64)
    for steps in (*range(2, 13), 63):
        plan = plan_of("tab1", steps)
        ours = diffusion.sample(model, x, plan, compile=True)
        assert_close(ours, plan.replay(model, x), FLOAT64)
    assert counter.frame_count == 1
    plan, graphs = plan_of("tab1", 4), []
    for k in range(12):
        options = guided_by(torch.ones(2), 1 + k / 2)
        ours = diffusion.sample(embedded, x, plan, compile=True, **options)
        assert_close(ours, diffusion.sample(embedded, x, plan, **options), FLOAT64)
        graphs.append(counter.frame_count)
    assert graphs[0] > 1 and graphs == graphs[:1] * 12


def test_graphs_beyond_the_limit_of_dynamo_replace_the_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    counter, plan = compiled_by_a_counter(monkeypatch), plan_of("tab1", 4)
    with torch._dynamo.config.patch(recompile_limit=2):
        for batch in (1, 2, 3, 4, 4):
            x = torch.randn(batch, 3)
            ours = diffusion.sample(model, x, plan, compile=True)
            assert_close(ours, plan.replay(model, x.double()), 1e-5)
    assert counter.frame_count == 4


def test_inductor_compiles_model_and_step() -> None:
    x = torch.randn(2, 3, 4)
    plan = plan_of("dpmpp_2m", 4)
    ours = diffusion.sample(model, x, plan, compile=True)
    assert_close(ours, plan.replay(model, x.double()), 1e-5)


@pytest.mark.parametrize("name", CASES)
def test_a_captured_row_replays_as_all_rows(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    capture_on_the_host(monkeypatch)
    plan = plan_of(name)
    x = torch.randn(2, 3, 4, dtype=torch.float64).transpose(1, 2).contiguous().transpose(1, 2)
    before = x.clone()
    ours = diffusion.sample(model, x, plan, cuda_graph=True, generator=generator())
    assert_close(ours, diffusion.sample(model, x, plan, generator=generator()), FLOAT64)
    assert torch.equal(x, before) and ours.stride() == x.stride()
    ours = diffusion.sample(model, x, plan, cuda_graph=True, noise=noise_of)
    assert_close(ours, plan.replay(model, x, noise=noise_of), FLOAT64)


def test_captured_rows_with_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    """Frames, guidance, callback, history, and a bfloat16 model."""
    capture_on_the_host(monkeypatch)
    seeds = torch.tensor([0.95, 0.99], dtype=torch.float64)
    plan = SolverPlan.build(VP, torch.linspace(0.9, 0.1, 7, dtype=torch.float64), "tab2")
    seeded = SolverPlan.build(VP, plan.grid, "tab2", start=seeds)
    x = torch.randn(2, 3, 4)
    seen: dict[bool, list[tuple[int, Tensor, Tensor]]] = {False: [], True: []}

    def run(graph: bool, plan: SolverPlan, history: tuple[Tensor, ...]) -> Tensor:
        def callback(i: int, t: Tensor, x: Tensor, h: Tensor) -> None:
            seen[graph].append((i, x, h))

        return diffusion.sample(
            *(model, x, plan),
            kwargs={"shift": 1.0}, unconditional={"shift": 0.0}, guidance=torch.tensor(1.5),
            split_guidance=True, history=history, frames=[0, 3, 6], callback=callback,
            model_dtype=torch.bfloat16, cuda_graph=graph,
        )  # fmt: skip

    for path, history in [(plan, ()), (seeded, (x.sin(), x.cos()))]:
        ours, expected = run(True, path, history), run(False, path, history)
        assert ours.shape == (2, 3, 3, 4)
        assert_close(ours, expected, 1e-6)
    assert len(seen[True]) == 12
    for one, other in zip(seen[True], seen[False], strict=True):
        assert one[0] == other[0]
        assert_close(one[1], other[1], 1e-6)
        assert_close(one[2], other[2], 1e-6)


def test_what_is_refused() -> None:
    x, plan = torch.randn(2, 3, 4), plan_of("tab3", 4)
    with pytest.raises(ValueError, match="needs x_T on a CUDA device, got cpu"):
        diffusion.sample(model, x, plan, cuda_graph=True)
    with pytest.raises(ValueError, match="exclude each other"):
        diffusion.sample(model, x, plan, cuda_graph=True, compile=True)
    with torch.enable_grad(), pytest.raises(ValueError, match=r"under torch.no_grad\(\)"):
        diffusion.sample(model, x, plan, compile=True)


def test_values_that_are_not_finite_name_their_row(monkeypatch: pytest.MonkeyPatch) -> None:
    capture_on_the_host(monkeypatch)
    plan = plan_of("tab3", 8)
    limit = float(plan.model_times[4])

    def broken(x: Tensor, t: Tensor) -> Tensor:
        return torch.where(t > limit + 1e-6, x, torch.nan)

    with pytest.raises(ValueError, match="NaN or infinity at row 4 of the plan"):
        diffusion.sample(broken, torch.randn(2, 3, 4), plan, cuda_graph=True)


@pytest.mark.parametrize("name", CASES)
def test_a_captured_sampler_serves_many_calls(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    capture_on_the_host(monkeypatch)
    plan = plan_of(name)
    shift = torch.zeros(())
    options = {"kwargs": {"shift": 1.0}, "unconditional": {"shift": shift}, "guidance": 1.5}
    sampler = CapturedSampler(model, X, plan, split_guidance=True, **options)
    first = None
    for call in range(2):
        shift.fill_(call)
        x = torch.randn(2, 3, 4, dtype=torch.float64)
        more = {"generator": torch.Generator().manual_seed(call)}
        expected = diffusion.sample(
            model, x, plan, split_guidance=True, frames=[0, 20], **options, **more
        )
        more["generator"].manual_seed(call)
        ours = sampler(x, **more)
        assert_close(ours, expected[:, 1], FLOAT64)
        more["generator"].manual_seed(call)
        assert_close(sampler(x, frames=[0, 20], **more), expected, FLOAT64)
        if first is None:
            first = ours, ours.clone()
    assert torch.equal(*first)  # not overwritten by later calls


def test_a_captured_sampler_sees_guided_labels_change(monkeypatch: pytest.MonkeyPatch) -> None:
    """In one call on the doubled batch too, for which the labels are joined anew in each row."""
    capture_on_the_host(monkeypatch)
    x, label, plan = torch.randn(2, 3, 4), torch.zeros(2), plan_of("tab1", 4)
    sampler = CapturedSampler(embedded, x, plan, **guided_by(label, 2.0))
    for value in (0.5, 1.0):
        label.fill_(value)
        assert_close(
            sampler(x), diffusion.sample(embedded, x, plan, **guided_by(label, 2.0)).double(), 1e-6
        )


def test_what_a_captured_sampler_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_of("tab3", 4)
    with pytest.raises(ValueError, match="needs x_T on a CUDA device, got cpu"):
        CapturedSampler(model, X, plan)
    capture_on_the_host(monkeypatch)
    sampler = CapturedSampler(model, X, plan)
    with torch.enable_grad():
        assert not sampler(X.clone().requires_grad_()).requires_grad
    with pytest.raises(TypeError, match=r"captured as torch.float64, got torch.float32"):
        sampler(X.float())
    with pytest.raises(ValueError, match=r"shape \(2, 3, 4\) on cpu, got \(1, 3, 4\)"):
        sampler(X[:1])
    with pytest.raises(ValueError, match="starts from 0 history entries, got 1"):
        sampler(X, history=[X])
    with pytest.raises(ValueError, match="NaN or infinity at row 0"):
        sampler(X * torch.nan)
