"""Swapped layers: results and state stay, and copies keep to their own weights."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import dsno_kernels as dk
from dsno_kernels import _swap_kernels
from tests.doubles import (
    LAYERS,
    VIDEO,
    DsnoTimeConv,
    Net,
    NeuralopSpectralConv,
    build,
)
from tests.helpers import BUDGETS, IO_BUDGET, assert_close

# Original and kernel both round in float32: twice the budget of one.
FLOAT32 = 2 * BUDGETS["fp32"]
# Gradients of a bias or weight are sums over many such terms.
GRADIENT = 5 * BUDGETS["fp32"]

each_layer = pytest.mark.parametrize("name", LAYERS)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The calls that reach `spectral_conv` from swapped layers, while the test runs."""
    seen: list[dict[str, Any]] = []
    original = _swap_kernels.spectral_conv

    def spy(x: Tensor, weight: Tensor, **kwargs: Any) -> Tensor:
        seen.append(kwargs)
        return original(x, weight, **kwargs)

    monkeypatch.setattr(_swap_kernels, "spectral_conv", spy)
    return seen


@each_layer
def test_swapped_layer_gives_the_values_and_gradients_of_the_original(
    name: str, calls: list[dict[str, Any]]
) -> None:
    layer, x = build(name)
    original = copy.deepcopy(layer)
    assert dk.swap_layers(layer) == 1
    calls.clear()
    x1, x2 = x.clone().requires_grad_(), x.clone().requires_grad_()
    expected, actual = original(x1), layer(x2)
    assert len(calls) == 1
    assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
    assert_close(actual, expected, FLOAT32)
    cotangent = torch.randn_like(expected)
    expected.backward(cotangent)
    actual.backward(cotangent)
    assert x1.grad is not None
    assert x2.grad is not None
    assert_close(x2.grad, x1.grad, GRADIENT)
    for p, q in zip(layer.parameters(), original.parameters(), strict=True):
        assert p.grad is not None
        assert q.grad is not None
        assert_close(p.grad, q.grad, GRADIENT)


@each_layer
def test_restoring_is_exact_and_both_are_idempotent(name: str) -> None:
    layer, x = build(name)
    before = [dict(module.__dict__) for module in layer.modules()]
    expected = layer(x)
    assert [dk.swap_layers(layer), dk.swap_layers(layer)] == [1, 0]
    assert [dk.restore_layers(layer), dk.restore_layers(layer)] == [1, 0]
    assert [module.__dict__ for module in layer.modules()] == before
    assert torch.equal(layer(x), expected)


@each_layer
def test_deepcopy_of_a_swapped_layer_uses_its_own_weights(
    name: str, calls: list[dict[str, Any]]
) -> None:
    layer, x = build(name)
    dk.swap_layers(layer)
    twin = copy.deepcopy(layer)
    expected = layer(x)
    calls.clear()
    assert torch.equal(twin(x), expected)
    assert len(calls) == 1
    for p in twin.parameters():
        nn.init.zeros_(p)
    assert torch.equal(layer(x), expected)
    assert not torch.equal(twin(x), expected)
    assert dk.restore_layers(twin) == 1
    assert dk.restore_layers(layer) == 1


@each_layer
def test_pickle_of_a_swapped_layer_is_swapped_and_independent(
    name: str, calls: list[dict[str, Any]]
) -> None:
    layer, x = build(name)
    dk.swap_layers(layer)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    expected = layer(x)
    for twin in (torch.load(file, weights_only=False), pickle.loads(pickle.dumps(layer))):
        calls.clear()
        assert torch.equal(twin(x), expected)
        assert len(calls) == 1
        for p in twin.parameters():
            nn.init.zeros_(p)
        assert torch.equal(layer(x), expected)


@each_layer
def test_compiles_without_a_graph_break(name: str) -> None:
    torch._dynamo.reset()
    layer, x = build(name)
    dk.swap_layers(layer)
    compiled = torch.compile(
        nn.Sequential(layer, nn.Identity()), backend="aot_eager", fullgraph=True
    )
    assert_close(compiled(x), layer(x), FLOAT32)


def test_counts_names_and_state_of_a_model() -> None:
    model = Net()
    parameters, keys = [id(p) for p in model.parameters()], list(model.state_dict())
    assert dk.swap_layers(model) == 2
    assert [id(p) for p in model.parameters()] == parameters
    assert list(model.state_dict()) == keys
    assert isinstance(model.blocks[0], DsnoTimeConv)
    Net().load_state_dict(model.state_dict(), strict=True)
    model.load_state_dict(Net().state_dict(), strict=True)
    assert dk.restore_layers(model) == 2


def test_time_conv_is_one_fused_call(calls: list[dict[str, Any]]) -> None:
    model = Net()
    dk.swap_layers(model)
    calls.clear()
    model(torch.randn(VIDEO))
    assert [call["activation"] for call in calls] == ["leaky_relu", "leaky_relu"]
    assert all(call["residual"] is not None for call in calls)


def test_shared_modules_count_once() -> None:
    layer = DsnoTimeConv(6, 6, 2)
    model = nn.ModuleDict({"a": layer, "b": nn.Sequential(layer), "conv": layer.t_conv})
    assert dk.swap_layers(model) == 1
    assert dk.restore_layers(model) == 1


def test_context_manager_leaves_earlier_swaps_and_restores_after_errors() -> None:
    model = Net()
    dk.swap_layers(model.blocks[0])
    with dk.swapped(model) as count:
        assert count == 1
        assert "forward" in model.blocks[2].__dict__
    assert "forward" not in model.blocks[2].__dict__
    assert "forward" in model.blocks[0].__dict__
    with pytest.raises(KeyError), dk.swapped(model):
        raise KeyError
    assert dk.restore_layers(model) == 1


def test_optimizer_made_before_the_swap_trains_the_same_weights() -> None:
    torch.manual_seed(0)
    model, x = Net(), torch.randn(VIDEO)
    other = copy.deepcopy(model)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, other)]
    dk.swap_layers(model)
    for _ in range(2):
        for m, optimizer in zip((model, other), optimizers, strict=True):
            optimizer.zero_grad()
            m(x).square().mean().backward()
            optimizer.step()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert_close(p, q, GRADIENT)


def test_hooks_on_the_layer_and_inside_it_still_run() -> None:
    layer, x = DsnoTimeConv(6, 6, 2), torch.randn(VIDEO)
    seen: list[str] = []
    layer.register_forward_hook(lambda *_: seen.append("outer"))
    dk.swap_layers(layer)
    expected = layer(x)
    assert seen == ["outer"]
    layer.t_conv.register_forward_hook(lambda *_: seen.append("inner"))
    assert_close(layer(x), expected, FLOAT32)
    assert seen == ["outer", "inner", "outer"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("name", ["dsno_conv", "dsno_time_conv"])
def test_other_input_dtypes_give_the_dtype_and_values_of_the_original(
    name: str, dtype: torch.dtype
) -> None:
    layer, x = build(name)
    expected = layer(x.to(dtype))
    dk.swap_layers(layer)
    actual = layer(x.to(dtype))
    assert actual.dtype == expected.dtype
    assert_close(actual, expected, FLOAT32)


@each_layer
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_gives_the_dtype_and_values_of_the_original(name: str, dtype: torch.dtype) -> None:
    layer, x = build(name)
    with torch.autocast("cpu", torch.bfloat16):
        expected = layer(x.to(dtype))
        dk.swap_layers(layer)
        actual = layer(x.to(dtype))
    assert actual.dtype == expected.dtype
    assert_close(actual, expected, FLOAT32)


@pytest.mark.parametrize("length", [4, 5, 8, 9, 16, 33])
@pytest.mark.parametrize("output", [None, 6, 8, 16, 21])
def test_neuralop_output_lengths(length: int, output: int | None) -> None:
    torch.manual_seed(0)
    layer = NeuralopSpectralConv(3, 4, 8)
    x = torch.randn(2, 3, length)
    arguments = {} if output is None else {"output_shape": (output,)}
    expected = layer(x, **arguments)
    dk.swap_layers(layer)
    assert_close(layer(x, **arguments), expected, FLOAT32)


def test_neuralop_modes_can_change_after_the_swap(calls: list[dict[str, Any]]) -> None:
    layer = NeuralopSpectralConv(3, 4, 8)
    dk.swap_layers(layer)
    twin = copy.deepcopy(layer)
    dk.restore_layers(twin)
    x = torch.randn(2, 3, 17)
    for module in (layer, twin):
        module.n_modes = [3]
    calls.clear()
    assert_close(layer(x), twin(x), FLOAT32)
    assert len(calls) == 1
    for module in (layer, twin):
        module.fno_block_precision = "double"  # not ours: the original runs
    layer(x)
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        ("dsno_conv", torch.randn(2, 3, 6, 3, 5)),
        ("dsno_conv", torch.randn(2, 5, 7, 3, 5)),
        ("dsno_time_conv", torch.randn(2, 5, 6)),
        ("fno", torch.randn(2, 6, 4)),
        ("fno", torch.randn(2, 6, 11, dtype=torch.float64)),
        ("neuralop", torch.randn(2, 5, 11)),
        ("neuralop", None),
    ],
    ids=[
        "too_few_times",
        "channels",
        "dimensions",
        "too_short",
        "float64",
        "neuralop_channels",
        "not_a_tensor",
    ],
)
def test_input_that_fails_fails_as_in_the_original(name: str, bad: Any) -> None:
    layer, _ = build(name)

    def outcome() -> tuple[type, str]:
        try:
            return type(layer(bad)), ""
        except Exception as error:
            return type(error), str(error)

    expected = outcome()
    dk.swap_layers(layer)
    assert outcome() == expected


def test_precision_is_passed_on(calls: list[dict[str, Any]]) -> None:
    model = Net()
    with dk.swapped(model, precision="tf32"):
        calls.clear()
        model(torch.randn(VIDEO))
    assert [call["precision"] for call in calls] == ["tf32", "tf32"]
    with pytest.raises(ValueError, match="unknown precision"):
        dk.swap_layers(model, precision="fp8")


@each_layer
def test_default_precision_is_the_original_s_whatever_the_matmul_setting(
    name: str, calls: list[dict[str, Any]]
) -> None:
    layer, x = build(name)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        expected = layer(x)
        dk.swap_layers(layer)
        calls.clear()
        assert_close(layer(x), expected, FLOAT32)
    finally:
        torch.set_float32_matmul_precision(before)
    assert [call["precision"] for call in calls] == ["fp32"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("swap_first", [True, False], ids=["swap_then_cast", "cast_then_swap"])
@pytest.mark.parametrize("name", ["dsno_conv", "dsno_time_conv", "fno_pairs"])
def test_module_in_half_precision_stays_in_it_in_either_order(
    name: str, swap_first: bool, dtype: torch.dtype
) -> None:
    layer, x = build(name)
    x = x.to(dtype)
    expected = copy.deepcopy(layer).to(dtype).float()(x.float())
    if swap_first:
        assert dk.swap_layers(layer) == 1
    layer.to(dtype)
    if not swap_first:
        assert dk.swap_layers(layer) == 1
    y = layer(x)
    assert y.dtype == dtype
    # The product in the precision of the dtype, then y rounded to it.
    assert_close(y, expected, BUDGETS["bf16"] + IO_BUDGET)
    assert layer(x.float()).dtype == torch.float32


def test_model_with_other_layers_runs_in_bfloat16_after_the_swap() -> None:
    model, x = Net(), torch.randn(VIDEO, dtype=torch.bfloat16)
    dk.swap_layers(model)
    assert model.to(torch.bfloat16)(x).dtype == torch.bfloat16


def test_a_forward_kept_on_its_own_says_that_its_layer_is_gone() -> None:
    layer, x = build("dsno_conv")
    dk.swap_layers(layer)
    forward = layer.forward
    del layer
    with pytest.raises(ReferenceError, match="no longer exists"):
        forward(x)


def test_a_deleted_model_is_freed_at_once() -> None:
    model = Net()
    dk.swap_layers(model)
    alive = weakref.ref(model.blocks[0])
    gc.disable()
    try:
        del model
        assert alive() is None
    finally:
        gc.enable()


def test_data_parallel_replicas_use_their_own_weights(calls: list[dict[str, Any]]) -> None:
    layer, x = build("dsno_conv")
    dk.swap_layers(layer)
    replica = layer._replicate_for_data_parallel()
    replica.weights1 = (
        2 * layer.weights1.detach()
    )  # as `replicate` does, with copies on another device
    calls.clear()
    assert_close(replica(x), 2 * layer(x), FLOAT32)
    assert len(calls) == 2


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1
    )
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("swap_first", [True, False], ids=["swap_then_wrap", "wrap_then_swap"])
def test_distributed_data_parallel(
    process_group: None, swap_first: bool, calls: list[dict[str, Any]]
) -> None:
    torch.manual_seed(0)
    model, x = Net(), torch.randn(VIDEO)
    other = copy.deepcopy(model)
    other(x).square().mean().backward()
    if swap_first:
        assert dk.swap_layers(model) == 2
    wrapped = nn.parallel.DistributedDataParallel(model)
    if not swap_first:
        assert dk.swap_layers(wrapped) == 2
    calls.clear()
    wrapped(x).square().mean().backward()
    assert len(calls) == 2
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert p.grad is not None
        assert q.grad is not None
        assert_close(p.grad, q.grad, GRADIENT)


def test_functional_call_uses_the_weights_it_is_given() -> None:
    layer, x = build("dsno_time_conv")
    dk.swap_layers(layer)
    zeros = {name: torch.zeros_like(p) for name, p in layer.named_parameters()}
    assert torch.equal(torch.func.functional_call(layer, zeros, x), x)
