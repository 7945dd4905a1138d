"""Any call that the documentation allows agrees with the formula: value, sign bits and every
gradient.

`DSNO_KERNELS_FUZZ` is the number of drawn calls for each backend (`make fuzz` sets 10,000).
"""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import Tensor

import dsno_kernels as dk
from dsno_kernels.backends import reference
from dsno_kernels.ops import spectral_conv as op
from tests import oracle
from tests.helpers import BUDGETS, IO_BUDGET, assert_close
from tests.strategies import BACKENDS, Case, cases, tensor

EXAMPLES = int(os.environ.get("DSNO_KERNELS_FUZZ", "300"))
# A result of few elements is not an average: its error may be some of the largest instead of the
# root mean square.
FEW = 4.0


def budget(case: Case, size: int) -> float:
    base = BUDGETS[case.precision]
    if case.dtype in (torch.bfloat16, torch.float16):
        base = max(base, IO_BUDGET)
    return base * (FEW if size < 256 else 1.5)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(
    max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True
)
@given(case=cases())
def test_spectral_conv_and_its_gradients_follow_the_formula(backend: str, case: Case) -> None:
    if case.dtype == torch.float64 and backend != "reference":
        backend = "reference"
    check(backend, case)


def check(backend: str, case: Case, device: str = "cpu") -> None:
    torch.manual_seed(case.seed)
    axes = (case.time_dim, case.channel_dim)
    x = tensor(case.shape, case.dtype, case.memory, case.order, device).requires_grad_()
    weight = torch.randn(
        case.shape[case.channel_dim], case.out_channels, case.modes, 2, device=device
    ).requires_grad_()
    bias = torch.randn(case.out_channels, device=device).requires_grad_() if case.bias else None
    residual = None
    if case.residual:
        residual = tensor(
            case.out_shape, case.dtype, case.memory, case.order, device
        ).requires_grad_()
    slope = 0.2 if case.activation else None
    leaves = [leaf for leaf in (x, weight, bias, residual) if leaf is not None]

    y = dk.spectral_conv(
        x,
        weight,
        time_dim=axes[0],
        channel_dim=axes[1],
        n=case.n,
        bias=bias,
        residual=residual,
        activation="leaky_relu" if case.activation else None,
        negative_slope=0.2,
        precision=case.precision,
        backend=backend,
    )
    g = tensor(case.out_shape, y.dtype, case.memory, case.order, device)
    grads = torch.autograd.grad(y, leaves, g)

    h = oracle.spectral_conv(x, weight, *axes, n=case.n)
    if bias is not None:
        shape = [1] * h.ndim
        shape[axes[1]] = -1
        h = h + bias.double().view(shape)
    exact, linear = h, h
    if slope is not None:
        # Where h is within rounding of 0 either side is right; the gradient must then follow the
        # side that was taken.
        taken = positive_bits(backend, case, x, weight, bias)
        clear = h.abs() > 20 * budget(case, 0) * h.square().mean().sqrt()
        assert torch.equal(taken[clear], (h > 0)[clear])
        exact = torch.where(h > 0, h, slope * h)
        linear = torch.where(taken, h, slope * h)
    if residual is not None:
        exact, linear = exact + residual.double(), linear + residual.double()
    assert y.shape == case.out_shape and y.dtype == case.dtype
    assert_close(y, exact, budget(case, y.numel()))
    for leaf, grad, expected in zip(
        leaves, grads, torch.autograd.grad(linear, leaves, g.double()), strict=True
    ):
        assert grad.shape == leaf.shape and grad.dtype == leaf.dtype
        assert_close_or_dead(grad, expected, leaves, g, budget(case, grad.numel()))


def assert_close_or_dead(
    grad: Tensor, expected: Tensor, leaves: list[Tensor], g: Tensor, limit: float
) -> None:
    """A gradient that is exactly zero by symmetry (dead weights only) must be small against what
    feeds it.
    """
    size = expected.double().norm()
    if size < 1e-9 * g.double().norm():
        assert grad.double().norm() <= limit * (1 + g.double().norm() * leaves[0].double().norm())
    else:
        assert_close(grad, expected, limit)


def positive_bits(
    backend: str, case: Case, x: Tensor, weight: Tensor, bias: Tensor | None
) -> Tensor:
    """The sign bits that the backend saved for the backward of LeakyReLU, as booleans in the shape
    of y.
    """
    with torch.no_grad():
        _, packed = op.op(
            x,
            weight,
            case.time_dim,
            case.channel_dim,
            case.n,
            False,
            bias,
            None,
            0.2,
            torch.float32,
            True,
            None,
            case.precision,
            backend,
        )
    ones = torch.ones(case.out_shape, device=x.device)
    return reference.apply_positive(ones, packed, 0.0, case.time_dim, case.channel_dim).bool()
