"""Gradients of every order, the memory they cost, and torch.func."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import forward_ad, gradcheck, gradgradcheck

import dsno_kernels as dk
from tests import oracle
from tests.helpers import BUDGETS, FLOAT64, assert_close
from tests.strategies import BACKENDS


def double(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize(
    ("T", "n", "K"), [(1, 1, 1), (5, 5, 2), (4, 4, 3), (4, 7, 3), (6, 4, 3)], ids=lambda v: str(v)
)
@pytest.mark.parametrize("activation", [None, "leaky_relu"])
def test_gradcheck_and_gradgradcheck(T: int, n: int, K: int, activation: str | None) -> None:
    x, weight, bias, residual = (
        double(2, T, 2, 3),
        double(2, 3, K, 2),
        double(3),
        double(2, n, 3, 3),
    )

    def run(*args: torch.Tensor) -> torch.Tensor:
        return dk.spectral_conv(
            args[0],
            args[1],
            n=n,
            bias=args[2],
            residual=args[3],
            activation=activation,
            negative_slope=0.3,
        )

    assert gradcheck(run, (x, weight, bias, residual))
    assert gradgradcheck(run, (x, weight, bias, residual))


def test_weight_grad_and_transforms_pass_gradgradcheck() -> None:
    x, g, spectrum = (
        double(2, 4, 3),
        double(2, 5, 2),
        torch.randn(2, 3, 2, dtype=torch.complex128, requires_grad=True),
    )
    for run, inputs in [
        (lambda x, g: dk.spectral_conv_weight_grad(x, g, 3), (x, g)),
        (lambda x: dk.truncated_rfft(x, 3, 1), (x,)),
        (lambda s: dk.truncated_irfft(s, 4, 1), (spectrum,)),
        (lambda s: dk.truncated_irfft(s, 7, 1), (spectrum,)),
    ]:
        assert gradcheck(run, inputs)
        assert gradgradcheck(run, inputs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_penalty_runs_on_the_kernels(backend: str) -> None:
    """Double backward is where a detached or once-differentiable backward goes wrong without a
    word.
    """
    x, weight = (
        torch.randn(2, 4, 5, 9, requires_grad=True),
        torch.randn(5, 7, 2, 2, requires_grad=True),
    )

    def penalty(y: torch.Tensor) -> tuple[torch.Tensor, ...]:
        grads = torch.autograd.grad(y.square().sum(), (x, weight), create_graph=True)
        return torch.autograd.grad(sum(grad.square().sum() for grad in grads), (x, weight))

    exact = penalty(torch.nn.functional.leaky_relu(oracle.spectral_conv(x, weight), 0.2))
    ours = penalty(
        dk.spectral_conv(x, weight, activation="leaky_relu", negative_slope=0.2, backend=backend)
    )
    for grad, expected in zip(ours, exact, strict=True):
        assert_close(grad, expected, 5 * BUDGETS["fp32"])


@pytest.mark.parametrize("backend", BACKENDS)
def test_backward_saves_x_and_one_bit_an_element(backend: str) -> None:
    x, weight = (
        torch.randn(2, 4, 32, 16, 16, requires_grad=True),
        torch.randn(32, 32, 2, 2, requires_grad=True),
    )
    saved: list[int] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor.numel() * tensor.element_size())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        dk.spectral_conv(x, weight, activation="leaky_relu", residual=x, backend=backend)
    size = 4 * x.numel()
    assert sum(saved) == size + 4 * weight.numel() + size // 32


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_with_stride_0_and_other_layouts(backend: str) -> None:
    x, weight = (
        torch.randn(2, 4, 6, 5, 3, requires_grad=True),
        torch.randn(6, 6, 2, 2, requires_grad=True),
    )
    exact = torch.autograd.grad(oracle.spectral_conv(x, weight).sum(), (x, weight))
    for y in (
        dk.spectral_conv(x, weight, backend=backend).sum(),
        dk.spectral_conv(x, weight, backend=backend).permute(4, 3, 2, 1, 0).contiguous().sum(),
    ):
        for grad, expected in zip(torch.autograd.grad(y, (x, weight)), exact, strict=True):
            assert_close(grad, expected, 5 * BUDGETS["fp32"])


def test_torch_func_grad_vjp_jvp_vmap_jacobians() -> None:
    x, weight = (
        torch.randn(3, 4, 2, 5, dtype=torch.float64),
        torch.randn(2, 3, 2, 2, dtype=torch.float64),
    )
    dx, dw = torch.randn_like(x), torch.randn_like(weight)

    def ours(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return dk.spectral_conv(x, weight, activation="leaky_relu")

    def exact(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.leaky_relu(oracle.spectral_conv(x, weight), 0.01)

    assert_close(
        torch.func.jvp(ours, (x, weight), (dx, dw))[1],
        torch.func.jvp(exact, (x, weight), (dx, dw))[1],
        FLOAT64,
    )
    y, pull = torch.func.vjp(ours, x, weight)
    for grad, expected in zip(pull(y), torch.func.vjp(exact, x, weight)[1](y), strict=True):
        assert_close(grad, expected, FLOAT64)
    weights = torch.stack([weight, 2 * weight])
    assert_close(
        torch.func.vmap(ours, (None, 0))(x, weights),
        torch.stack([exact(x, w) for w in weights]),
        FLOAT64,
    )
    assert_close(
        torch.func.jacrev(ours)(x[:1], weight), torch.func.jacrev(exact)(x[:1], weight), FLOAT64
    )
    assert_close(
        torch.func.hessian(lambda w: ours(x, w).pow(3).sum())(weight),
        torch.func.hessian(lambda w: exact(x, w).pow(3).sum())(weight),
        FLOAT64,
    )
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(ours(forward_ad.make_dual(x, dx), weight)).tangent
    assert_close(tangent, torch.func.jvp(lambda x: exact(x, weight), (x,), (dx,))[1], FLOAT64)
    for transform in (dk.truncated_rfft, dk.truncated_irfft):
        value = (
            x if transform is dk.truncated_rfft else torch.randn(3, 2, 2, 5, dtype=torch.complex128)
        )
        mapped = torch.func.vmap(
            lambda v, t=transform: t(v, 2 if t is dk.truncated_rfft else 4, 0)
        )(value)
        assert_close(
            mapped, transform(value, 2 if transform is dk.truncated_rfft else 4, 1), FLOAT64
        )


def test_a_forced_kernel_under_torch_func_is_refused() -> None:
    x, weight = torch.randn(2, 4, 2, 5), torch.randn(2, 3, 2, 2)
    with pytest.raises(NotImplementedError, match=r"does not run under torch\.func"):
        torch.func.jvp(lambda x: dk.spectral_conv(x, weight, backend="cpu"), (x,), (x,))


def test_activation_checkpointing_gives_the_same_gradients() -> None:
    from torch.utils.checkpoint import checkpoint

    x, weight = (
        torch.randn(2, 4, 6, 5, requires_grad=True),
        torch.randn(6, 6, 2, 2, requires_grad=True),
    )

    def layer(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return dk.spectral_conv(x, weight, activation="leaky_relu", residual=x)

    plain = torch.autograd.grad(layer(x, weight).square().sum(), (x, weight))
    for reentrant in (False, True):
        y = checkpoint(layer, x, weight, use_reentrant=reentrant)
        x.grad = weight.grad = None
        y.square().sum().backward()
        assert torch.equal(x.grad, plain[0]) and torch.equal(weight.grad, plain[1])


@pytest.mark.parametrize("activation", [None, "leaky_relu"])
def test_forward_mode_over_a_graph_that_was_built_outside_it(activation: str | None) -> None:
    """A backward that runs ops without a forward-mode rule gives tangents of zero in silence."""
    x, weight = double(2, 4, 3, 5), double(3, 3, 2, 2)
    v = torch.randn_like(x)
    outs = dk.spectral_conv(x, weight, activation=activation), oracle.spectral_conv(x, weight)
    if activation:
        outs = outs[0], torch.nn.functional.leaky_relu(outs[1], 0.01)

    def gradient(y: torch.Tensor, g: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(y, (x, weight), g, retain_graph=True)

    g = torch.ones_like(x)
    tangents = [torch.func.jvp(lambda g, y=y: gradient(y, g), (g,), (v,))[1] for y in outs]
    for tangent, expected in zip(*tangents, strict=True):
        assert_close(tangent, expected, FLOAT64)
