"""Frames of `sample`: where no graph is recorded, the steps themselves write them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dsno_kernels import diffusion
from dsno_kernels.diffusion import SolverPlan, VPLinear, time_grid
from tests.helpers import assert_close
from tests.strategies import tensor

VP = VPLinear()
PLAN = SolverPlan.build(VP, time_grid(VP, 5), "tab2")
X = torch.linspace(-1, 2, 24).reshape(2, 3, 4)
# One pass rounds as the other does, but for the order of its sums.
FLOAT32 = 1e-6
BF16 = 6.4e-3


def model(x: Tensor, t: Tensor) -> Tensor:
    return torch.tanh(x)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Copies(TorchDispatchMode):
    """Counts the copies into tensors of a size."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.count = size, 0

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if op is torch.ops.aten.copy_.default and args[0].numel() == self.size:
            self.count += 1
        return op(*args, **kwargs or {})


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", ["tab2", "heun", "unipc2", "sde_dpmpp_2"])
def test_a_step_writes_its_frame_and_the_next_reads_it_there(name: str, mode: Any) -> None:
    plan = SolverPlan.build(VP, time_grid(VP, 6), name)
    taken = [0, 1, 2, 2, 4, 6] if name != "unipc2" else [0, 1, 2, 2, 4]
    expected = diffusion.sample(model, X, plan, frames=taken, generator=seeded(3))
    places: list[int] = []

    def placed(x: Tensor, t: Tensor) -> Tensor:
        places.append(x.data_ptr())
        return torch.tanh(x)

    with mode(), Copies(X.numel()) as copies:
        frames = diffusion.sample(placed, X, plan, frames=taken, generator=seeded(3))
    assert_close(frames, expected.double(), FLOAT32)
    assert not frames.requires_grad and frames.transpose(0, 1).is_contiguous()
    assert copies.count == 2  # x_T, and position 2 again
    if not plan.looks_ahead.any():
        assert {frames[:, k].data_ptr() for k in (1, 2, 4)} <= set(places)


@pytest.mark.parametrize(
    "positions",
    [np.array([0, 5]), [np.int64(0), np.int32(5)], torch.tensor([0, 5]), range(0, 6, 5)],
    ids=["array", "numbers", "tensor", "range"],
)
def test_integers_of_any_library_are_positions(positions: Any) -> None:
    frames = diffusion.sample(model, X, PLAN, frames=positions)
    assert torch.equal(frames[:, 0], X)
    assert torch.equal(frames[:, 1], diffusion.sample(model, X, PLAN))


@pytest.mark.parametrize(
    "times",
    [PLAN.grid[[2]].numpy(), PLAN.grid[[2]].float().numpy(), list(PLAN.grid[[2]])],
    ids=["float64", "float32", "tensors"],
)
def test_floats_of_any_library_are_times(times: Any) -> None:
    frames = diffusion.sample(model, X, PLAN, frames=times)
    assert torch.equal(frames, diffusion.sample(model, X, PLAN, frames=[2]))


@pytest.mark.parametrize(
    "frames",
    [3, 0.5, "0", [True], np.array([False]), [None], torch.tensor(1), torch.zeros(1, 2)],
    ids=["int", "float", "str", "bool", "bools", "none", "no_axes", "two_axes"],
)
def test_frames_that_are_no_sequence_of_numbers(frames: Any) -> None:
    with pytest.raises(TypeError, match="frames must be numbers in one sequence"):
        diffusion.sample(model, X, PLAN, frames=frames)


@pytest.mark.parametrize("order", [(0, 2, 3, 1), (3, 0, 1, 2)], ids=["channels_last", "permuted"])
def test_frames_of_other_memory_orders_and_dtypes(order: tuple[int, ...]) -> None:
    plan = SolverPlan.build(VP, time_grid(VP, 5), "dpmpp_2m")
    x = torch.randn(2, 3, 4, 5)
    expected = diffusion.sample(model, x, plan, frames=range(6))
    permuted = tensor(tuple(x.shape), torch.float32, "permuted", order).copy_(x)
    with torch.no_grad():
        assert torch.equal(diffusion.sample(model, permuted, plan, frames=range(6)), expected)
        guided = diffusion.sample(
            *(lambda x, t, c: torch.tanh(x) + c, permuted, plan),
            frames=range(6), kwargs={"c": 0.0}, unconditional={"c": 1.0}, split_guidance=True,
            guidance=torch.ones(2),
        )  # fmt: skip
        assert_close(guided, expected.double(), FLOAT32)
        low = diffusion.sample(model, permuted.bfloat16(), plan, frames=range(6))
    assert low.dtype == torch.bfloat16
    assert_close(low, expected.double(), BF16)


def test_frames_under_vmap() -> None:
    plan = SolverPlan.build(VP, time_grid(VP, 4), "tab2")
    x, shifts = torch.randn(2, 3), torch.randn(5)

    def frames(shift: Tensor) -> Tensor:
        return diffusion.sample(lambda x, t: torch.tanh(x) + shift, x, plan, frames=[0, 2, 4])

    with torch.no_grad():
        together = torch.func.vmap(frames)(shifts)
        assert_close(together, torch.stack([frames(shift) for shift in shifts]).double(), FLOAT32)


def test_frames_without_a_graph_are_time_outermost_in_memory() -> None:
    x = torch.randn(2, 3, 4, dtype=torch.bfloat16)
    with torch.no_grad():
        frames = diffusion.sample(model, x, PLAN, frames=[0, 2, 5, 2])
        final = diffusion.sample(model, x, PLAN)
    assert frames.dtype == torch.bfloat16 and frames.transpose(0, 1).is_contiguous()
    assert torch.equal(frames[:, 0], x) and torch.equal(frames[:, 2], final)
    assert torch.equal(frames[:, 1], frames[:, 3]) and not torch.equal(frames[:, 1], final)
