"""Any call that the documentation allows agrees with the formula: value, sign bits, gradients.

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
from tests.helpers import BUDGETS, IO_BUDGET
from tests.strategies import BACKENDS, Case, cases, tensor

EXAMPLES = int(os.environ.get("DSNO_KERNELS_FUZZ", "300"))
SLOPE = 0.2
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
    leaves, g = draw(case, case.seed, device)
    x, weight, bias, residual = leaves
    y = dk.spectral_conv(
        x,
        weight,
        time_dim=case.time_dim,
        channel_dim=case.channel_dim,
        n=case.n,
        bias=bias,
        residual=residual,
        activation="leaky_relu" if case.activation else None,
        negative_slope=SLOPE,
        precision=case.precision,
        backend=backend,
    )
    assert y.shape == case.out_shape and y.dtype == case.dtype
    present = [leaf for leaf in leaves if leaf is not None]
    results = [y, *torch.autograd.grad(y, present, g)]

    taken = None
    if case.activation:
        # Where h is within rounding of 0 either side is right; the gradient follows the one taken.
        taken = positive_bits(backend, case, x, weight, bias)
        h = pre_activation(case, x, weight, bias)
        clear = h.abs() > 20 * budget(case, 0) * h.square().mean().sqrt()
        assert torch.equal(taken[clear], (h > 0)[clear])
    expected = formula(case, leaves, g, taken)
    for i, (result, exact) in enumerate(zip(results, expected, strict=True)):
        assert result.dtype == (y, *present)[i].dtype
        error = float((result.detach().double() - exact).norm())
        size = float(exact.norm())
        limit = budget(case, result.numel())
        if error > limit * size:
            # A sum of few terms can nearly cancel: its error counts against its usual size.
            others = [formula(case, *draw(case, case.seed + j, device), None) for j in (1, 2, 3)]
            size = max(float(values[i].norm()) for values in others)
        assert error <= limit * size, (
            f"result {i}: relative error {error / size:.3g} over {limit:.3g}"
        )


def draw(case: Case, seed: int, device: str) -> tuple[list[Tensor | None], Tensor]:
    """x, weight, bias and residual as leaves (None where the case has none), and a cotangent."""
    torch.manual_seed(seed)
    in_channels = case.shape[case.channel_dim]
    leaves: list[Tensor | None] = [
        tensor(case.shape, case.dtype, case.memory, case.order, device),
        torch.randn(in_channels, case.out_channels, case.modes, 2, device=device),
        torch.randn(case.out_channels, device=device) if case.bias else None,
        tensor(case.out_shape, case.dtype, case.memory, case.order, device)
        if case.residual
        else None,
    ]
    for leaf in leaves:
        if leaf is not None:
            leaf.requires_grad_()
    return leaves, tensor(case.out_shape, case.dtype, case.memory, case.order, device)


def pre_activation(case: Case, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    h = oracle.spectral_conv(x, weight, case.time_dim, case.channel_dim, case.n)
    if bias is None:
        return h
    return h + bias.double().view([-1 if d == case.channel_dim else 1 for d in range(h.ndim)])


def formula(
    case: Case, leaves: list[Tensor | None], g: Tensor, taken: Tensor | None
) -> list[Tensor]:
    """y and the gradients of the leaves in float64; `taken`: the side of LeakyReLU if not h's."""
    x, weight, bias, residual = leaves
    h = pre_activation(case, x, weight, bias)
    value = derivative = h
    if case.activation:
        value = torch.where(h > 0, h, SLOPE * h)
        derivative = torch.where(h > 0 if taken is None else taken, h, SLOPE * h)
    if residual is not None:
        value, derivative = value + residual.double(), derivative + residual.double()
    present = [leaf for leaf in leaves if leaf is not None]
    grads = torch.autograd.grad(derivative, present, g.double())
    return [value.detach(), *(grad.double() for grad in grads)]


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
            SLOPE,
            torch.float32,
            True,
            None,
            case.precision,
            backend,
        )
    ones = torch.ones(case.out_shape, device=x.device)
    return reference.apply_positive(ones, packed, 0.0, case.time_dim, case.channel_dim).bool()
