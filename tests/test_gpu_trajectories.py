"""Denoisers and trajectories on a CUDA device: what the CPU gives."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dsno_kernels.diffusion import (
    DiscreteVP,
    ExactDenoiser,
    FlowMatching,
    Process,
    SolverPlan,
    VPCosine,
    for_process,
    sample,
    time_grid,
)
from tests.helpers import assert_close
from tests.on_device import DEVICE, DRY_RUN, marks

pytestmark = marks

# Scores in float64, the rest in float32; over a trajectory that is multiplied by less than 100.
MEAN, TRAJECTORY = 1e-6, 1e-4


def data() -> tuple[torch.Tensor, torch.Tensor]:
    images = torch.randn(200, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    return images, torch.arange(200) % 5


@pytest.mark.parametrize("sigma", [0.0, 0.3, 3.0, 1e4], ids=str)
def test_exact_denoiser(sigma: float) -> None:
    images, labels = data()
    x, y = images[:7] + sigma * torch.randn(7, 3, 8, 8), torch.arange(7) % 6 - 1
    expected = ExactDenoiser(images.double(), labels)(x.double(), sigma, y)
    there = ExactDenoiser(images, labels).to(DEVICE)
    made = there(x.to(DEVICE), sigma, y.to(DEVICE))
    assert made.device.type == torch.device(DEVICE).type
    assert_close(made, expected, MEAN)
    assert_close(there(x.to(DEVICE), torch.full((7,), sigma), y.to(DEVICE)), expected, MEAN)


@pytest.mark.parametrize(
    "process", [VPCosine(), FlowMatching(), DiscreteVP.linear()], ids=lambda p: type(p).__name__
)
def test_sampling(process: Process) -> None:
    images, labels = data()
    solver = "flow_euler" if isinstance(process, FlowMatching) else "tab3"
    plan = SolverPlan.build(process, time_grid(process, 12), solver, prediction="x0")
    x, y = torch.randn(5, 3, 8, 8), torch.arange(5)
    model = for_process(ExactDenoiser(images, labels).to(DEVICE), process)
    made = sample(model, x.to(DEVICE), plan, kwargs={"y": y.to(DEVICE)})
    host = for_process(ExactDenoiser(images, labels), process)
    assert_close(made, sample(host, x, plan, kwargs={"y": y}), TRAJECTORY)


@pytest.mark.skipif(DRY_RUN, reason="a graph of a GPU")
def test_sampling_in_a_cuda_graph() -> None:
    process, (images, _) = VPCosine(), data()
    plan = SolverPlan.build(process, time_grid(process, 12), "tab3", prediction="x0")
    model = for_process(ExactDenoiser(images).to(DEVICE), process)
    x = torch.randn(5, 3, 8, 8, device=DEVICE)
    with torch.no_grad():
        assert_close(sample(model, x, plan, cuda_graph=True), sample(model, x, plan), TRAJECTORY)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_trajectories(precision: str, tmp_path: Path) -> None:
    for package in ("lmdb", "tqdm"):
        pytest.importorskip(package, reason=f"{package} is not installed")
    from tests.trajectory_runs import COUNT, SHAPE, everything, write

    write(tmp_path / "device", device=DEVICE, precision=precision, classes=[1, 2], guidance=1.5)
    write(tmp_path / "host", classes=[1, 2], guidance=1.5)
    frames, labels = everything(tmp_path / "device")
    expected, wanted = everything(tmp_path / "host")
    assert labels is not None and wanted is not None and torch.equal(labels, wanted)
    assert frames.shape == (COUNT, 5, *SHAPE)
    assert torch.equal(frames[:, 0], expected[:, 0])
    assert_close(frames, expected, TRAJECTORY)  # tanh stays float32 under autocast
