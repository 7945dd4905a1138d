"""The Triton kernels of `group_norm_silu` in the interpreter. Run by test_group_norm_triton.py with
TRITON_INTERPRET=1; not collected alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import dsno_kernels as dk
from dsno_kernels.backends import reference_norm
from dsno_kernels.backends import triton as backend
from dsno_kernels.backends.triton import group_norm
from tests.helpers import BUDGETS, IO_BUDGET, assert_close
from tests.test_group_norm_silu import SHAPES, chain, exact_leaves, problem

BUDGET = BUDGETS["fp32"]
DENSE = (2, 2, 6, 5, 3)


@pytest.fixture(params=["whole", "walked"])
def tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Groups on chip, or walked in tiles of 2 channels and 8 pixels."""
    if request.param == "walked":
        monkeypatch.setattr(group_norm, "WHOLE", 8)
        monkeypatch.setattr(group_norm, "TILE", 16)
        monkeypatch.setattr(group_norm, "MOST_CHANNELS", 2)
    forget_plans()
    yield
    forget_plans()


def forget_plans() -> None:
    """Plans hold the tiles of their time."""
    group_norm.plan_forward.cache_clear()
    group_norm.plan_backward.cache_clear()


def ordered(x: Tensor, order: str) -> Tensor:
    """The values of x `[B, T, C, H, W]` in another memory order."""
    if order == "channels_last":
        return x.movedim(2, -1).contiguous().movedim(-1, 2)
    if order == "batch_last":
        return x.permute(1, 2, 3, 4, 0).contiguous().permute(4, 0, 1, 2, 3)
    if order == "crop":
        return torch.nn.functional.pad(x, (1, 2), value=float("nan"))[..., 1:-2]
    return x


def check(
    x: Tensor, groups: int, budget: float = BUDGET, g_order: str = "contiguous", **options: Any
) -> None:
    """Forward and backward against the reference in float64."""
    C = x.shape[2]
    weight, bias = torch.randn(2, C)
    exact = [weight.double(), bias.double()]
    wide = {k: v.double() if isinstance(v, Tensor) else v for k, v in options.items()}
    out_dtype = wide.pop("out_dtype", None) or x.dtype
    y, mean, rstd = backend.group_norm_silu(x, groups, weight, bias, **options)
    wide_y, *statistics = reference_norm.group_norm_silu(x.double(), groups, *exact, **wide)
    assert y.dtype == out_dtype
    assert_close(y, wide_y, budget)
    for actual, expected in zip((mean, rstd), statistics, strict=True):
        assert_close(actual, expected, BUDGET)
    for name in ("eps", "channels_last", "out_dtype"):
        options.pop(name, None), wide.pop(name, None)
    g = ordered(torch.randn(x.shape).to(out_dtype), g_order)
    grads = backend.group_norm_silu_backward(g, x, mean, rstd, weight, bias, **options)
    wanted = reference_norm.group_norm_silu_backward(
        g.double(), x.double(), *statistics, *exact, **wide
    )
    for grad, expected in zip(grads, wanted, strict=True):
        assert (grad is None) is (expected is None)
        if grad is not None and expected is not None:
            assert_close(grad, expected, 5 * budget)


@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("groups", [1, 2, 6])
def test_forward_and_backward(tiles: None, groups: int, silu: bool) -> None:
    scale, shift = torch.randn(2, 2, 2, 6)
    check(torch.randn(DENSE) + 0.5, groups, scale=scale, shift=shift, silu=silu, eps=1e-3)


@pytest.mark.parametrize("order", ["channels_last", "batch_last", "crop"])
def test_any_memory_order(tiles: None, order: str) -> None:
    scale, shift = torch.randn(2, 1, 6, 2).mT.expand(-1, 2, -1, -1)  # the same for both samples
    x = ordered(torch.randn(DENSE), order)
    for channels_last, g_order in ((False, order), (True, "channels_last"), (False, "contiguous")):
        check(
            x, 3, g_order=g_order, scale=scale, shift=shift, silu=True, channels_last=channels_last
        )


def test_an_image_shared_by_all_times(tiles: None) -> None:
    x = torch.randn(2, 1, 6, 3, 3).expand(-1, 3, -1, -1, -1)
    check(x, 2, scale=torch.randn(1, 3, 6).expand(2, -1, -1), shift=None, silu=True)


def test_scale_and_shift_are_optional(tiles: None) -> None:
    x = torch.randn(DENSE)
    check(x, 2, scale=None, shift=None)
    check(x, 2, scale=None, shift=torch.randn(2, 2, 6))


def test_float16_in_and_out(tiles: None) -> None:
    scale, shift = torch.randn(2, 2, 2, 6).half()
    check(torch.randn(DENSE).half(), 2, IO_BUDGET, scale=scale, shift=shift)
    check(torch.randn(DENSE), 2, IO_BUDGET, scale=scale, shift=shift, out_dtype=torch.float16)


def test_one_value_a_group() -> None:
    check(torch.randn(2, 1, 3, 1), 3, scale=torch.randn(2, 1, 3))


def test_more_samples_than_a_step_of_the_parameters() -> None:
    check(torch.randn(35, 2, 18, 3), 3, scale=torch.randn(35, 2, 18), shift=None)


def test_a_mean_far_from_zero_costs_no_digits(tiles: None) -> None:
    x, (weight, bias) = torch.randn(DENSE) + 1000.0, torch.randn(2, 6)
    y, _, _ = backend.group_norm_silu(x, 2, weight, bias)
    # Half a unit in the last place of the mean, 3e-5, against a deviation of 1.
    assert_close(y, reference_norm.forward(x.double(), 2, weight.double(), bias.double()), 1e-4)


@pytest.mark.parametrize("name", SHAPES)
def test_public_function_and_gradients(name: str) -> None:
    leaves, groups, channel_dim = problem(name)
    x, weight, bias, scale, shift = leaves
    y = dk.group_norm_silu(
        x, groups, weight, bias,
        scale=scale, shift=shift, channel_dim=channel_dim, backend="triton",
    )  # fmt: skip
    exact = exact_leaves(leaves)
    expected = chain(exact[0], groups, *exact[1:], channel_dim=channel_dim)
    assert_close(y, expected, BUDGET)
    g = torch.randn_like(y)
    for grad, wanted in zip(
        torch.autograd.grad(y, leaves, g),
        torch.autograd.grad(expected, exact, g.double()),
        strict=True,
    ):
        assert_close(grad, wanted, 5 * BUDGET)


def test_a_nan_stays_in_its_group() -> None:
    x = torch.randn(DENSE)
    x[1, 1, 3, 0, 0] = float("nan")
    y, _, _ = backend.group_norm_silu(x, 3, torch.ones(6), torch.zeros(6))
    hit = torch.isnan(y)
    assert hit[1, 1, 2:4].all() and hit.sum() == 2 * 15


def test_runs_are_bit_equal(tiles: None) -> None:
    x, (weight, bias), g = torch.randn(DENSE), torch.randn(2, 6), torch.randn(DENSE)

    def run() -> tuple[Tensor, ...]:
        y, mean, rstd = backend.group_norm_silu(x, 2, weight, bias)
        return y, *backend.group_norm_silu_backward(g, x, mean, rstd, weight, bias)[:3]

    for first, again in zip(run(), run(), strict=True):
        assert torch.equal(first, again)
