"""DTensor: the ops on two gloo processes give what one process gives, and send nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import dsno_kernels as dk
from dsno_kernels.ops.group_norm_silu import GroupNormSiluFunction
from tests import ranks
from tests.helpers import assert_close

# Each shard sums in another order than the whole: half of the float32 budget of helpers.py.
SUMMED = 5e-7


class Case(NamedTuple):
    """A call and the axes it is sharded over: of x (and the residual), of the weight, of y."""

    x: tuple[int, ...]
    x_axis: int | None
    weight_axis: int | None
    y_axis: int | None  # None: replicated, or partial sums
    silent: bool = True  # whether nothing is sent
    options: dict[str, Any] = {}  # noqa: RUF012
    residual: bool = False
    cotangent_axis: int | None = None  # where it is not that of y


ACTIVE = {"activation": "leaky_relu"}
CASES = {
    "batch": Case((2, 4, 6, 5, 7), 0, None, 0),
    "batch, uneven": Case((3, 4, 6, 5, 7), 0, None, 0),
    "height": Case((2, 4, 6, 4, 7), 3, None, 3),
    "height, uneven": Case((2, 4, 6, 5, 7), 3, None, 3),
    "width": Case((2, 4, 6, 3, 6), 4, None, 4),
    "batch, activation": Case((3, 4, 6, 5, 7), 0, None, 0, True, ACTIVE, True),
    "height, activation": Case((2, 4, 6, 4, 8), 3, None, 3, True, ACTIVE, True),
    "width, activation": Case((2, 4, 6, 4, 8), 4, None, None, False, ACTIVE, True),
    "broken bytes, activation": Case((2, 4, 6, 4, 5), 3, None, None, False, ACTIVE, True),
    "height, its gradient by batch": Case((2, 4, 6, 4, 8), 3, None, 3, False, ACTIVE, True, 0),
    "output channels": Case((2, 4, 6, 3, 5), None, 1, 2),
    "output channels, activation": Case((2, 4, 6, 3, 5), None, 1, 2, True, ACTIVE),
    "input channels": Case((2, 4, 6, 3, 5), 2, 0, None),
    "time last": Case(
        (16, 6, 8), 0, None, 0, True, {"time_dim": 2, "channel_dim": 1, **ACTIVE}, True
    ),
}


NORM_AXES = {"normalization, batch": 0, "normalization, time": 1}
MODULE = CASES["batch"]
# What consists of partial sums where the weight is sharded over that axis.
PARTIAL = {0: "y", 1: "x"}


def tensors(case: Case) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """x, weight, residual and the cotangent of y."""
    generator = torch.Generator().manual_seed(3)
    channels = case.x[case.options.get("channel_dim", 2)]
    x, cotangent, other = (torch.randn(case.x, generator=generator) for _ in range(3))
    weight = torch.randn(channels, channels, 2, 2, generator=generator)
    return x, weight, other if case.residual else None, cotangent


Place = Callable[[Tensor, "int | None"], Tensor]


def placed(case: Case, place: Place) -> tuple[dict[str, Tensor], Tensor]:
    """The inputs, which require gradients, and the cotangent; `place` may shard along an axis."""
    x, weight, residual, cotangent = tensors(case)
    inputs = {"x": place(x, case.x_axis), "weight": place(weight, case.weight_axis)}
    if residual is not None:
        inputs["residual"] = place(residual, case.x_axis)
    axis = case.y_axis if case.cotangent_axis is None else case.cotangent_axis
    return inputs, place(cotangent, axis)


def results(
    inputs: dict[str, Tensor], cotangent: Tensor, options: dict[str, Any]
) -> dict[str, Tensor]:
    """y, and the gradients of all inputs."""
    for tensor in inputs.values():
        tensor.requires_grad_()
    y = dk.spectral_conv(**inputs, **options)
    y.backward(cotangent)
    return {"y": y.detach()} | {k: v.grad for k, v in inputs.items() if v.grad is not None}


def norm_inputs(place: Place, axis: int) -> tuple[dict[str, Tensor], Tensor]:
    """Inputs of `group_norm_silu` and the cotangent, sharded over the batch or time."""
    generator = torch.Generator().manual_seed(4)
    sizes = {"x": (3, 2, 8, 4, 4), "scale": (3, 2, 8), "shift": (3, 2, 8)}
    inputs = {k: place(torch.randn(v, generator=generator), axis) for k, v in sizes.items()}
    inputs |= {k: place(torch.randn(8, generator=generator), None) for k in ("weight", "bias")}
    return inputs, place(torch.randn(sizes["x"], generator=generator), axis)


def norm_results(inputs: dict[str, Tensor], cotangent: Tensor) -> dict[str, Tensor]:
    """y and all gradients, through the two ops as a GPU's kernels are called."""
    for tensor in inputs.values():
        tensor.requires_grad_()
    x, scale, shift, weight, bias = inputs.values()
    y = GroupNormSiluFunction.apply(
        x, 4, weight, bias, scale, shift, 1e-5, True, False, x.dtype, "reference"
    )
    y.backward(cotangent)
    return {"y": y.detach()} | {k: v.grad for k, v in inputs.items() if v.grad is not None}


def layer() -> dk.nn.TimeConv:
    torch.manual_seed(5)
    return dk.nn.TimeConv(6, 6, 2)


def whole(tensor: Tensor, axis: int | None) -> Tensor:
    """What one process works on."""
    return tensor.clone()


class Found(NamedTuple):
    whole: dict[str, Tensor]
    placements: dict[str, Any]
    sent: int


def worker() -> dict[str, Found]:
    """Every case with DTensors: the whole results, how they lie, how often something was sent."""
    import torch.distributed.tensor as dt
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.debug import CommDebugMode

    import dsno_kernels.distributed  # noqa: F401

    mesh = init_device_mesh("cpu", (2,))

    def place(tensor: Tensor, axis: int | None) -> Tensor:
        placement = dt.Replicate() if axis is None else dt.Shard(axis)
        return dt.distribute_tensor(tensor, mesh, [placement])

    def counted(call: Callable[..., dict[str, Any]], *args: Any) -> Found:
        with CommDebugMode() as communication:
            made = call(*args)
        sent = communication.get_total_counts()
        placements = {name: tensor.placements[0] for name, tensor in made.items()}
        return Found({k: v.full_tensor() for k, v in made.items()}, placements, sent)

    found = {n: counted(results, *placed(case, place), case.options) for n, case in CASES.items()}
    for name, axis in NORM_AXES.items():
        found[name] = counted(norm_results, *norm_inputs(place, axis))
    x = place(tensors(MODULE)[0], 0)
    found["module"] = counted(module_results, dt.distribute_module(layer(), mesh), x)
    return found


def module_results(module: torch.nn.Module, x: Tensor) -> dict[str, Tensor]:
    y = module(x)
    y.sum().backward()
    (weight,) = module.parameters()
    assert weight.grad is not None
    return {"y": y.detach(), "weight": weight.grad}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Found]:
    """What the second of the two processes has; the rules are registered in those alone."""
    return ranks.run(worker, tmp_path_factory.mktemp("ranks"))[1]


def compare(found: Found, expected: dict[str, Tensor]) -> None:
    assert found.whole.keys() == expected.keys()
    for name, tensor in expected.items():
        assert_close(found.whole[name], tensor, SUMMED)


@pytest.mark.parametrize("name", CASES)
def test_sharded_convolution(name: str, found: dict[str, Found]) -> None:
    case = CASES[name]
    inputs, cotangent = placed(case, whole)
    compare(found[name], results(inputs, cotangent, case.options))
    assert (found[name].sent == 0) is case.silent
    if case.silent:
        placements = found[name].placements
        along = {k: getattr(p, "dim", None) for k, p in placements.items()}
        assert along["y"] == case.y_axis and along["x"] == case.x_axis
        assert along["weight"] == case.weight_axis
        summed = {k for k, p in placements.items() if p.is_partial()}
        assert summed == {"weight" if case.weight_axis is None else PARTIAL[case.weight_axis]}


@pytest.mark.parametrize("name", NORM_AXES)
def test_sharded_normalization(name: str, found: dict[str, Found]) -> None:
    axis = NORM_AXES[name]
    compare(found[name], norm_results(*norm_inputs(whole, axis)))
    assert found[name].sent == 0
    summed = {k for k, p in found[name].placements.items() if p.is_partial()}
    assert summed == {"weight", "bias"}
    assert all(p.is_shard(axis) for k, p in found[name].placements.items() if k not in summed)


def test_sharded_module(found: dict[str, Found]) -> None:
    compare(found["module"], module_results(layer(), tensors(MODULE)[0]))
    assert found["module"].placements["y"].is_shard(0) and found["module"].sent == 0
