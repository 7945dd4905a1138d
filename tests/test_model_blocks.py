"""The blocks of DSNO: the numbers of the official ones, and views alone between their layers."""

from __future__ import annotations

import collections
import types
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import dsno_kernels.ops.group_norm_silu as norm_op
from dsno_kernels.backends import reference
from dsno_kernels.models import DSNO
from dsno_kernels.models.blocks import AttentionBlock, ResidualBlock, concatenate
from dsno_kernels.models.eager import EagerAttentionBlock, EagerResidualBlock, eager_nin
from dsno_kernels.nn import NIN, TimeConv
from tests.helpers import assert_close
from tests.test_models import TINY, inputs, jittered

# Three products and two sums of some 500 terms, each within half a unit in the last place.
BLOCK = 3e-6
# Operands of 8 bits of mantissa in four products in a row.
AUTOCAST = 2e-2


def channels_last(x: Tensor) -> Tensor:
    """The values of x `(B, T, C, H, W)` with its channels last in memory."""
    return x.movedim(2, -1).contiguous().movedim(-1, 2)


def pair(fast: nn.Module, official: nn.Module) -> tuple[nn.Module, nn.Module]:
    """Two forms of a block with the same random parameters."""
    with torch.no_grad():
        for parameter in fast.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    official.load_state_dict(fast.state_dict(), strict=True)
    return fast, official


def compare(fast: nn.Module, official: nn.Module, x: Tensor, *inputs: Tensor) -> None:
    """Value and all gradients; the official block sees the image repeated for each time."""
    repeated = x.requires_grad_().expand(-1, 3, -1, -1, -1)
    leaves, official_leaves = ([x, *inputs, *block.parameters()] for block in (fast, official))
    y, expected = fast(x, *inputs), official(repeated, *inputs)
    assert_close(y, expected, BLOCK)
    g = torch.randn_like(expected)
    for grad, wanted in zip(
        torch.autograd.grad(y, leaves, g),
        torch.autograd.grad(expected, official_leaves, g),
        strict=True,
    ):
        assert_close(grad, wanted, 5 * BLOCK)


@pytest.mark.parametrize("heads", [1, 4])
def test_attention_has_the_official_numbers(heads: int) -> None:
    fast, official = pair(AttentionBlock(32, heads), EagerAttentionBlock(32, heads))
    compare(fast, official, torch.randn(2, 3, 32, 5, 3))


@pytest.mark.parametrize("heads", [1, 4])
def test_attention_under_autocast_has_the_official_numbers(heads: int) -> None:
    """Both take the softmax in float32; here the logits are not rounded either."""
    fast, official = pair(AttentionBlock(32, heads), EagerAttentionBlock(32, heads))
    x = torch.randn(2, 3, 32, 5, 3)
    exact = official(x)
    with torch.autocast("cpu", torch.bfloat16):
        y, rounded = fast(x), official(x)
    assert y.dtype == rounded.dtype == torch.float32
    assert_close(y, exact, AUTOCAST)
    assert_close(rounded, exact, AUTOCAST)


@pytest.mark.parametrize("times", [1, 3], ids=["one_image", "every_time"])
@pytest.mark.parametrize("resample", [None, "up", "down"])
@pytest.mark.parametrize("channels", [(32, 32), (64, 32)], ids=["same", "fewer"])
def test_residual_block_has_the_official_numbers(
    channels: tuple[int, int], resample: str | None, times: int
) -> None:
    arguments = (*channels, 24, 0.0, 1.0, resample)
    fast, official = pair(ResidualBlock(*arguments), EagerResidualBlock(*arguments))
    embedding = torch.randn(1, 3, 24, requires_grad=True)
    compare(fast, official, torch.randn(2, times, channels[0], 4, 6), embedding)


def test_nin_is_the_official_einsum() -> None:
    layer, x = NIN(6, 4, scale=1.0), torch.randn(2, 6, 3, 5)
    assert_close(layer(x), eager_nin(layer, x), BLOCK)
    assert eager_nin(layer, x).is_contiguous()


@pytest.mark.parametrize("order", [lambda x: x, channels_last], ids=["contiguous", "last"])
def test_skips_are_appended_in_the_memory_order_of_the_signal(order: Any) -> None:
    h, skip = (
        order(torch.randn(2, 3, 4, 5, 6)),
        torch.randn(2, 1, 2, 5, 6).expand(-1, 3, -1, -1, -1),
    )
    joined = concatenate(h, skip)
    assert torch.equal(joined, torch.cat([h, skip], 2))
    assert joined.stride() == order(joined).stride()


class Copies(TorchDispatchMode):
    """Counts the operators that write a tensor again."""

    NAMES = ("clone", "copy_", "_to_copy", "contiguous", "cat", "stack")

    def __init__(self) -> None:
        super().__init__()
        self.seen: collections.Counter[str] = collections.Counter()

    def __torch_dispatch__(self, func: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in self.NAMES:
            self.seen[name] += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture
def as_with_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """`group_norm_silu` as one op with its own backward, as where a kernel serves it."""
    names = ("group_norm_silu", "group_norm_silu_backward")
    kernels = types.SimpleNamespace(**{name: getattr(reference, name) for name in names})
    monkeypatch.setattr(norm_op, "select", lambda *_: kernels)


# Copies that are part of a derivative: scale and shift are halves of one tensor, q, k and v thirds.
BLOCKS: dict[str, tuple[Any, dict[str, int]]] = {
    "residual": (lambda: ResidualBlock(64, 64, 24, 0.1), {"cat": 1}),
    "residual_projected": (lambda: ResidualBlock(64, 32, 24, 0.1), {"cat": 1}),
    "residual_up": (lambda: ResidualBlock(64, 64, 24, 0.1, resample="up"), {"cat": 1}),
    "residual_down": (lambda: ResidualBlock(64, 64, 24, 0.1, resample="down"), {"cat": 1}),
    "attention": (lambda: AttentionBlock(64, 2), {"stack": 1}),
    "time_conv": (lambda: TimeConv(64, 64, 2), {}),
}


@pytest.mark.parametrize("order", [lambda x: x, channels_last], ids=["contiguous", "last"])
@pytest.mark.parametrize("name", BLOCKS)
def test_no_block_copies_and_each_keeps_the_memory_order(
    name: str, order: Any, as_with_kernels: None
) -> None:
    make, copies_of_backward = BLOCKS[name]
    block = make()
    if order is channels_last:
        block.to(memory_format=torch.channels_last)
    x = order(torch.randn(2, 4, 64, 8, 6)).requires_grad_()
    inputs = (torch.randn(1, 4, 24),) if isinstance(block, ResidualBlock) else ()
    with Copies() as forward:
        y = block(x, *inputs)
    assert not forward.seen
    assert y.stride() == order(y).stride()
    g = order(torch.randn(y.shape))
    with Copies() as backward:
        grads = torch.autograd.grad(y, (x, *block.parameters()), g)
    assert backward.seen == copies_of_backward
    assert grads[0].stride() == x.stride()


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "last"])
def test_the_whole_model_copies_its_skips_and_nothing_else(
    last: bool, as_with_kernels: None
) -> None:
    model = jittered(DSNO(TINY)).eval()
    x, logsnr, _ = inputs(TINY)
    expected = model(x, logsnr)
    if last:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    strides: list[bool] = []
    for module in model.modules():
        if isinstance(module, TimeConv):
            module.register_forward_hook(lambda _m, _i, y: strides.append(y.stride(2) == 1))
    with torch.no_grad(), Copies() as forward:
        out = model(x, logsnr)
    assert_close(out, expected, 10 * BLOCK)
    # Four skips are joined, and the sine and cosine of the embedding.
    assert forward.seen == {"cat": 5}
    assert len(strides) == 7 and all(s is last for s in strides)
