"""DSNO and `group_norm_silu` on a CUDA device: values, layouts, and the model as a CUDA graph."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import dsno_kernels as dk
from dsno_kernels.models import DSNO, CapturedModel
from tests.helpers import BUDGETS, IO_BUDGET, assert_close
from tests.on_device import DEVICE, DRY_RUN, marks, needs_memory, serving, sized
from tests.test_capture import capture_on_the_host
from tests.test_group_norm_silu import chain, exact_leaves
from tests.test_models import MODEL_GRADIENT, TINY, TINY_CLASSES, inputs, jittered

pytestmark = marks

BACKENDS = serving("group_norm_silu")
# About 20 layers, each within the float32 budget of 1e-6, and cuDNN's choice of algorithm.
MODEL = 2e-5
# As tests/test_models.py: some 20 layers whose operands have 8 bits of mantissa.
AUTOCAST = 5e-2

# x (B, T, C, H, W) and groups: on chip, walked in tiles, the smallest, an odd one.
SHAPES = {
    "cifar": (sized(4, 4, 256, 32, 32), 32),
    "imagenet": (sized(2, 4, 192, 64, 64), 32),
    "small": (sized(4, 4, 768, 8, 8), 32),
    "odd": ((3, 2, 14, 7, 5), 7),
}


def groups_of(shape: tuple[int, ...], groups: int) -> int:
    """The groups, or where a dry run has shrunk the channels, fewer."""
    return groups if shape[2] % groups == 0 else 3


def channels_last(x: Tensor) -> Tensor:
    return x.movedim(2, -1).contiguous().movedim(-1, 2)


@pytest.fixture(autouse=True)
def float32_products() -> Iterator[None]:
    """No TF32 in PyTorch's own products: what is compared is ours with theirs."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@pytest.mark.skipif(DRY_RUN, reason="about the choice on a GPU")
def test_the_kernel_is_what_runs() -> None:
    x, ones = torch.randn(2, 8, 4, 4, device=DEVICE), torch.ones(8, device=DEVICE)
    assert dk.explain("group_norm_silu", x, 4, ones, ones).splitlines()[0].endswith(": triton")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_group_norm_silu(name: str, dtype: torch.dtype, last: bool, backend: str) -> None:
    if DRY_RUN and dtype == torch.bfloat16:
        pytest.skip("the interpreter's bfloat16 is wrong")
    shape, groups = SHAPES[name]
    groups, C = groups_of(shape, groups), shape[2]
    tensors = [
        torch.randn(shape, device=DEVICE) + 0.5,
        *torch.randn(2, C, device=DEVICE),
        *torch.randn(2, 1, shape[1], C, device=DEVICE),
    ]
    if last:
        tensors[0] = channels_last(tensors[0])
    leaves = [tensor.to(dtype).requires_grad_() for tensor in tensors]
    x, weight, bias, scale, shift = leaves
    y = dk.group_norm_silu(
        x, groups, weight, bias, scale=scale, shift=shift, channel_dim=2, backend=backend
    )
    assert y.stride() == x.stride() and y.dtype == dtype
    exact = exact_leaves(leaves)
    expected = chain(exact[0], groups, *exact[1:], channel_dim=2)
    budget = BUDGETS["fp32"] if dtype == torch.float32 else IO_BUDGET
    assert_close(y, expected, budget)
    g = torch.randn_like(y)
    grads = torch.autograd.grad(y, leaves, g)
    for grad, wanted in zip(grads, torch.autograd.grad(expected, exact, g.double()), strict=True):
        assert_close(grad, wanted, 5 * budget)


@pytest.mark.parametrize("backend", BACKENDS)
def test_ten_runs_give_the_same_bits(backend: str) -> None:
    shape = sized(8, 4, 64, 16, 16)
    x = torch.randn(shape, device=DEVICE, requires_grad=True)
    weight, bias = (torch.randn(shape[2], device=DEVICE, requires_grad=True) for _ in range(2))
    first: tuple[Tensor, ...] | None = None
    for _ in range(2 if DRY_RUN else 10):
        y = dk.group_norm_silu(x, 2, weight, bias, channel_dim=2, backend=backend)
        results = (y, *torch.autograd.grad(y.square().sum(), (x, weight, bias)))
        first = first or results
        assert all(torch.equal(a, b) for a, b in zip(results, first, strict=True))


def test_offsets_beyond_2_to_the_31_elements() -> None:
    needs_memory(16)
    torch.utils.deterministic.fill_uninitialized_memory = False
    # The interpreter's bfloat16 is wrong.
    side, dtype = (4, torch.float32) if DRY_RUN else (1024, torch.bfloat16)
    x = torch.empty(9, 256, side, side, device=DEVICE, dtype=dtype)
    x[-1].normal_()
    weight, bias = torch.randn(2, 256, device=DEVICE)
    y = dk.group_norm_silu(x, 32, weight, bias)[-1:]
    for group in (0, 31):
        part = slice(8 * group, 8 * group + 8)
        exact = chain(x[-1:, part].double(), 1, weight[part].double(), bias[part].double())
        assert_close(y[:, part], exact, IO_BUDGET)


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "last"])
@pytest.mark.parametrize("config", [TINY, TINY_CLASSES], ids=["plain", "classes"])
def test_model_has_the_official_numbers(config: Any, last: bool) -> None:
    official = jittered(DSNO(config, kernels=False)).to(DEVICE)
    ours = DSNO(config).to(DEVICE)
    ours.load_state_dict(official.state_dict())
    if last:
        ours.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    arguments = [None if t is None else t.to(DEVICE) for t in inputs(config)]
    out, expected = ours(*arguments), official(*arguments)
    assert_close(out, expected, MODEL)
    g = torch.randn_like(out)
    for grad, wanted in zip(
        torch.autograd.grad(out, list(ours.parameters()), g),
        torch.autograd.grad(expected, list(official.parameters()), g),
        strict=True,
    ):
        assert_close(grad, wanted, MODEL_GRADIENT)
    with torch.autocast(DEVICE.type, torch.bfloat16), torch.no_grad():
        assert_close(ours(*arguments), expected, AUTOCAST)


@pytest.fixture
def capturable(monkeypatch: pytest.MonkeyPatch) -> None:
    if DRY_RUN:
        capture_on_the_host(monkeypatch)


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "autocast"])
@pytest.mark.parametrize("config", [TINY, TINY_CLASSES], ids=["plain", "classes"])
def test_a_captured_model_replays_what_eager_computes(
    config: Any, autocast: bool, capturable: None
) -> None:
    """Bit by bit, for new inputs and for weights that were updated in place."""
    model = jittered(DSNO(dataclasses.replace(config, dropout=0.1))).to(DEVICE).eval()
    x, logsnr, y = (None if t is None else t.to(DEVICE) for t in inputs(config))
    assert x is not None and logsnr is not None
    classes = () if y is None else (y,)

    def eager(*arguments: Tensor) -> Tensor:
        with torch.no_grad(), torch.autocast(DEVICE.type, torch.bfloat16, enabled=autocast):
            return model(*arguments)

    with torch.autocast(DEVICE.type, torch.bfloat16, enabled=autocast):
        captured = CapturedModel(model, x, logsnr, *classes)
    for step in range(3):
        arguments = (torch.randn_like(x), logsnr - step, *(c.flip(0) for c in classes))
        first = captured(*arguments)
        assert torch.equal(first, eager(*arguments))
        kept = first.clone()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.1)
        updated = captured(*arguments)
        assert torch.equal(updated, eager(*arguments))
        assert torch.equal(first, kept) and not torch.equal(updated, kept)
    model.load_state_dict(DSNO(config).state_dict())
    assert torch.equal(captured(*arguments), eager(*arguments))


def test_a_captured_model_refuses_another_shape(capturable: None) -> None:
    x, logsnr, _ = inputs(TINY)
    x, logsnr = x.to(DEVICE), logsnr.to(DEVICE)
    captured = CapturedModel(DSNO(TINY).to(DEVICE).eval(), x, logsnr)
    with pytest.raises(ValueError, match=r"captured with shape \(2, 3, 8, 8\)"):
        captured(x[:1], logsnr)
    with pytest.raises(ValueError, match=r"got \(2, 3, 8, 8\) on meta"):
        captured(x.to("meta"), logsnr)
