"""Every backend against the literal formula at fixed shapes, odd sizes first. The mutation tests
run this file.
"""

from __future__ import annotations

import pytest
import torch

import dsno_kernels as dk
from tests import oracle
from tests.helpers import BUDGETS, assert_close
from tests.strategies import BACKENDS

# shape, time_dim, channel_dim, O, K, n
SHAPES = {
    "B3-T5-I7-O4-5x7-K3": ((3, 5, 7, 5, 7), 1, 2, 4, 3, 5),
    "B2-T4-C8-6x6-K2": ((2, 4, 8, 6, 6), 1, 2, 8, 2, 4),
    "B2-T4-C8-6x6-K3-nyquist": ((2, 4, 8, 6, 6), 1, 2, 8, 3, 4),
    "B2-T1-C3-7-K1": ((2, 1, 3, 7), 1, 2, 3, 1, 1),
    "BCTHW-T8-K5": ((2, 6, 8, 3, 5), 2, 1, 6, 5, 8),
    "BCL-L33-K9": ((5, 6, 33), 2, 1, 4, 9, 33),
    "BTC-T16-K9": ((7, 16, 5), 1, 2, 5, 9, 16),
    "T6-to-n9-K4": ((2, 6, 5, 9), 1, 2, 7, 4, 9),
    "T9-to-n6-K4": ((2, 9, 5, 9), 1, 2, 7, 4, 6),
}


def test_the_cpu_kernels_are_built() -> None:
    """Without them the tests below would pass on the reference alone, and prove nothing."""
    assert "cpu" in BACKENDS


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("shape", "time_dim", "channel_dim", "O", "K", "n"), SHAPES.values(), ids=SHAPES
)
def test_value_and_gradients(
    backend: str, shape: tuple[int, ...], time_dim: int, channel_dim: int, O: int, K: int, n: int
) -> None:
    x = torch.randn(shape, requires_grad=True)
    weight = torch.randn(shape[channel_dim], O, K, 2, requires_grad=True)
    y = dk.spectral_conv(
        x, weight, time_dim=time_dim, channel_dim=channel_dim, n=n, backend=backend
    )
    exact = oracle.spectral_conv(x, weight, time_dim, channel_dim, n)
    g = torch.randn_like(y)
    assert_close(y, exact, BUDGETS["fp32"])
    dx, dW = torch.autograd.grad(exact, (x, weight), g.double())
    for grad, expected in zip(torch.autograd.grad(y, (x, weight), g), (dx, dW), strict=True):
        assert_close(grad, expected, BUDGETS["fp32"])
    alone = dk.spectral_conv_weight_grad(
        x.detach(), g, K, time_dim=time_dim, channel_dim=channel_dim, backend=backend
    )
    assert_close(alone, dW, BUDGETS["fp32"])


@pytest.mark.parametrize("backend", BACKENDS)
def test_dead_imaginary_weights_move_neither_value_nor_gradient(backend: str) -> None:
    x, weight = torch.randn(2, 6, 5, 9, requires_grad=True), torch.randn(5, 5, 4, 2)
    moved = weight.clone()
    moved[:, :, [0, 3], 1] += 100
    y, y_moved = (dk.spectral_conv(x, w, backend=backend) for w in (weight, moved))
    assert torch.equal(y, y_moved)
    g = torch.randn_like(y)
    dx, dx_moved = (torch.autograd.grad(value, x, g)[0] for value in (y, y_moved))
    assert torch.equal(dx, dx_moved)
    dW = dk.spectral_conv_weight_grad(x.detach(), g, 4, backend=backend)
    assert torch.equal(dW[:, :, [0, 3], 1], torch.zeros(5, 5, 2))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("T", "K"), [(1, 1), (5, 3), (8, 5), (16, 3), (33, 17), (100, 51)])
@pytest.mark.parametrize("dim", [0, 1, 2])
def test_truncated_transforms(backend: str, T: int, K: int, dim: int) -> None:
    shape = [3, 4, 7]
    shape[dim] = T
    x = torch.randn(shape, requires_grad=True)
    X = dk.truncated_rfft(x, K, dim, backend=backend)
    expected = torch.fft.rfft(x.double(), dim=dim).narrow(dim, 0, K)
    assert X.dtype == torch.complex64
    assert_close(X, expected, BUDGETS["fp32"])
    y = dk.truncated_irfft(X, T, dim, backend=backend)
    exact = torch.fft.irfft(expected, n=T, dim=dim)
    assert_close(y, exact, BUDGETS["fp32"])
    g = torch.randn_like(y)
    (grad,), (expected_grad,) = (
        torch.autograd.grad(y, x, g),
        torch.autograd.grad(exact, x, g.double()),
    )
    assert_close(grad, expected_grad, BUDGETS["fp32"])
