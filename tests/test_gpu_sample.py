"""`sample` on a CUDA device: the numbers of `SolverPlan.replay`, and one replayed CUDA graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dsno_kernels import diffusion
from dsno_kernels.diffusion import EDM, CapturedSampler, SolverPlan, VPLinear, time_grid
from tests.helpers import assert_close
from tests.on_device import DEVICE, DRY_RUN, cuda, marks
from tests.test_capture import capture_on_the_host

pytestmark = marks

VP = VPLinear()
# A network in float32 in 20 rows; a trajectory grows rounding by less than 100.
FLOAT32 = 1e-4
# The same with 8 bits of mantissa in the network, should cuDNN choose another algorithm.
BF16 = 3e-2
CASES: dict[str, dict[str, Any]] = {
    "tab3": {},
    "dpmpp_2m": {},
    "unipc3": {},
    "heun": {"S_churn": 3.0},
    "sde_dpmpp_2": {},
    "tab2": {"process": EDM(), "prediction": "edm"},
}


@pytest.fixture(autouse=True)
def capturable_and_without_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    if DRY_RUN:
        capture_on_the_host(monkeypatch)


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, padding=1)
        self.last = nn.Conv2d(16, 3, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor, shift: float = 0.0) -> Tensor:
        return self.last(torch.tanh(self.first(x) + t.to(x.dtype) + shift))


def problem(name: str) -> tuple[SolverPlan, Network, Tensor]:
    options = dict(CASES[name])
    process = options.pop("process", VP)
    plan = SolverPlan.build(process, time_grid(process, 20), name, **options)
    return plan, Network().to(DEVICE), torch.randn(8, 3, 8, 8).to(DEVICE)


def noise_of(x: Tensor) -> Any:
    def draw(row: int) -> Tensor:
        seeded = torch.Generator().manual_seed(row + 7)
        return torch.randn(x.shape, generator=seeded).to(x)

    return draw


@pytest.mark.parametrize("name", CASES)
def test_sample_is_what_the_plan_replays(name: str) -> None:
    plan, network, x = problem(name)
    with torch.no_grad():
        expected = plan.replay(network.double(), x.double(), noise=noise_of(x.double()))
        ours = diffusion.sample(network.float(), x, plan, noise=noise_of(x))
    assert ours.device == x.device
    assert_close(ours, expected, FLOAT32)


@pytest.mark.parametrize("name", CASES)
def test_a_cuda_graph_of_one_row_gives_the_same_sample(name: str) -> None:
    plan, network, x = problem(name)
    options: dict[str, Any] = {
        "kwargs": {"shift": 1.0}, "unconditional": {"shift": 0.0}, "guidance": 1.5,
        "split_guidance": True,
    }  # fmt: skip

    def sampled(**more: Any) -> Tensor:
        generator = torch.Generator().manual_seed(2)
        return diffusion.sample(network, x, plan, generator=generator, **options, **more)

    with torch.no_grad():
        assert_close(sampled(cuda_graph=True), sampled(), FLOAT32)


@pytest.mark.parametrize("name", CASES)
def test_a_captured_sampler_serves_many_calls(name: str) -> None:
    plan, network, x = problem(name)
    sampler = CapturedSampler(network, x, plan)
    for call in range(3):
        x = torch.randn_like(x)
        with torch.no_grad():
            network.last.weight.mul_(1.1)
            generator = torch.Generator().manual_seed(call)
            expected = diffusion.sample(network, x, plan, generator=generator)
        ours = sampler(x, generator=generator.manual_seed(call))
        assert_close(ours, expected, FLOAT32)


@pytest.mark.parametrize("name", ["tab3", "unipc3"])
def test_a_bfloat16_model_in_a_cuda_graph_with_frames(name: str) -> None:
    plan, network, x = problem(name)
    network = network.bfloat16()
    with torch.no_grad():
        frames, expected = (
            diffusion.sample(
                *(network, x, plan),
                model_dtype=torch.bfloat16, frames=[0, 10, 20], cuda_graph=graph,
            )
            for graph in (True, False)
        )  # fmt: skip
    assert frames.shape == (len(x), 3, *x.shape[1:]) and frames.dtype == torch.float32
    assert torch.equal(frames[:, 0], x)
    assert_close(frames, expected, BF16)


def test_gradients_with_recomputation() -> None:
    plan, network, x = problem("tab3")
    grads = []
    for recompute in (False, True):
        leaves = [x.detach().requires_grad_(), *network.parameters()]
        y = diffusion.sample(network, leaves[0], plan, recompute=recompute)
        grads.append(torch.autograd.grad(y.square().sum(), leaves))
    for plain, recomputed in zip(*grads, strict=True):
        assert_close(recomputed, plain, FLOAT32)


def test_no_wait_for_the_device_between_rows() -> None:
    plan, network, x = problem("tab3")
    with torch.no_grad():
        diffusion.sample(network, x, plan)  # compiles and warms up
        rows = iter(range(plan.evaluations))

        def callback(i: int, *_: object) -> bool:
            cuda().set_sync_debug_mode("error")
            return next(rows) < 0

        try:
            y = diffusion.sample(network, x, plan, callback=callback, check_finite=False)
        finally:
            cuda().set_sync_debug_mode("default")
    assert next(rows, None) is None and bool(y.isfinite().all())
