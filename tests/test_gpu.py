"""Everything the CPU tests promise, on a CUDA device: values and gradients of each op, on each
backend, in each precision. What only a device can show is in test_gpu_device.py.

Each new shape class makes Triton compile for seconds: there are few, and odd ones.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import dsno_kernels as dk
from tests import gpu_sanitizer, oracle
from tests.helpers import BUDGETS, IO_BUDGET, assert_close
from tests.on_device import DEVICE, DRY_RUN, marks, serving, sized

pytestmark = marks

CONV_BACKENDS = serving("spectral_conv")
FFT_BACKENDS = serving("truncated_rfft")

# shape, time_dim, channel_dim, O, K, n
SHAPES = {
    "odd": ((3, 5, 7, 5, 7), 1, 2, 4, 3, 5),
    "planar": ((2, 6, 16, 3, 5), 2, 1, 6, 9, 16),
    "nyquist": ((2, 4, 8, 6, 6), 1, 2, 8, 3, 4),
    "one-time": ((2, 1, 3, 7), 1, 2, 3, 1, 1),
    "time-last": ((5, 6, 33), 2, 1, 4, 9, 33),
    "shorter": ((2, 9, 5, 9), 1, 2, 7, 4, 6),
    "long": ((3, 8, 300), 2, 1, 8, 20, 300),
}
CASES = [
    (name, precision)
    for name in SHAPES
    for precision in BUDGETS
    if precision == "fp32" or name in ("odd", "planar")
]
DSNO_SHAPES = {
    "narrow": sized(4, 4, 256, 8, 8),
    "wide": sized(16, 4, 256, 32, 32),
    "imagenet": sized(2, 4, 768, 8, 8),
    "odd": sized(3, 4, 111, 7, 5),
}


def randn(*shape: int, dtype: torch.dtype = torch.float32, grad: bool = False) -> Tensor:
    return torch.randn(shape, device=DEVICE).to(dtype).requires_grad_(grad)


def check_gradients(
    y: Tensor, exact: Tensor, leaves: tuple[Tensor, ...], budget: float, g: Tensor | None = None
) -> None:
    """y and the gradients of the leaves against those of `exact`, which is float64."""
    g = torch.randn_like(y) if g is None else g
    assert_close(y, exact, budget)
    for grad, expected in zip(
        torch.autograd.grad(y, leaves, g),
        torch.autograd.grad(exact, leaves, g.double()),
        strict=True,
    ):
        assert_close(grad, expected, 1.5 * budget)


def test_uninitialized_memory_is_poisoned() -> None:
    """What every other test here relies on: an output that is not written shows."""
    assert torch.empty(1000, device=DEVICE).isnan().all()


def test_every_op_on_every_backend(capsys: pytest.CaptureFixture[str]) -> None:
    """The calls that compute-sanitizer watches, here with poisoned memory."""
    assert gpu_sanitizer.main(["--device", DEVICE.type]) == 0, capsys.readouterr().out


def test_the_kernels_are_there_and_are_what_runs() -> None:
    x, weight = randn(2, 4, 8, 8, 8), randn(8, 8, 2, 2)
    conv, fft = ("cpu", "cpu") if DRY_RUN else ("triton", "cuda")
    assert dk.explain("spectral_conv", x, weight).splitlines()[0].endswith(f": {conv}")
    assert dk.explain("truncated_rfft", x, 2).splitlines()[0].endswith(f": {fft}")


@pytest.mark.parametrize("backend", CONV_BACKENDS)
@pytest.mark.parametrize(("name", "precision"), CASES, ids="-".join)
def test_value_and_gradients(backend: str, name: str, precision: str) -> None:
    shape, time_dim, channel_dim, O, K, n = SHAPES[name]
    x = randn(*shape, grad=True)
    weight = randn(shape[channel_dim], O, K, 2, grad=True)
    axes = {"time_dim": time_dim, "channel_dim": channel_dim, "n": n}
    y = dk.spectral_conv(x, weight, precision=precision, backend=backend, **axes)
    exact = oracle.spectral_conv(x, weight, **axes)
    check_gradients(y, exact, (x, weight), BUDGETS[precision])


@pytest.mark.parametrize("backend", CONV_BACKENDS)
@pytest.mark.parametrize("precision", BUDGETS)
def test_every_precision_at_the_shape_of_dsno(backend: str, precision: str) -> None:
    """Large enough for the wide tiles of each launch table."""
    shape = DSNO_SHAPES["wide"]
    x, weight = randn(*shape, grad=True), randn(shape[2], shape[2], 2, 2, grad=True)
    y = dk.spectral_conv(x, weight, precision=precision, backend=backend)
    check_gradients(y, oracle.spectral_conv(x, weight), (x, weight), BUDGETS[precision])


@pytest.mark.parametrize("backend", CONV_BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", DSNO_SHAPES.values(), ids=DSNO_SHAPES)
def test_dsno_shapes_with_the_fused_epilogue(
    backend: str, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    x = randn(*shape, dtype=dtype)
    weight, bias = randn(shape[2], shape[2], 2, 2) / shape[2], randn(shape[2])
    y = dk.spectral_conv(x, weight, bias=bias, activation="leaky_relu", residual=x, backend=backend)
    h = oracle.spectral_conv(x, weight) + bias.double()[:, None, None]
    exact = x.double() + torch.nn.functional.leaky_relu(h, 0.01)
    assert y.dtype == dtype
    assert_close(y, exact, BUDGETS["fp32"] if dtype == torch.float32 else IO_BUDGET)


@pytest.mark.parametrize("backend", CONV_BACKENDS)
def test_gradients_of_the_fused_epilogue_in_bfloat16(backend: str) -> None:
    """The sign of h comes from the forward's own bits, so the slope is that of the side taken."""
    x = randn(*sized(4, 4, 64, 8, 8), dtype=torch.bfloat16, grad=True)
    C = x.shape[2]
    weight, bias = randn(C, C, 2, 2, grad=True), randn(C, grad=True)
    y = dk.spectral_conv(
        x, weight, bias=bias, activation="leaky_relu", residual=x, precision="fp32", backend=backend
    )
    h = oracle.spectral_conv(x, weight) + bias.double()[:, None, None]
    exact = x.double() + torch.nn.functional.leaky_relu(h, 0.01)
    check_gradients(y, exact, (x, weight, bias), IO_BUDGET)


@pytest.mark.parametrize("backend", CONV_BACKENDS)
def test_double_backward(backend: str) -> None:
    """Second derivatives run on the same kernels: gradients of <dx, v> and <dW, w>."""
    x, weight = randn(2, 4, 6, 3, 5, grad=True), randn(6, 6, 2, 2, grad=True)
    g = randn(2, 4, 6, 3, 5, grad=True)
    v, w = torch.randn_like(x), torch.randn_like(weight)

    def second(y: Tensor) -> tuple[Tensor, ...]:
        dx, dW = torch.autograd.grad(y, (x, weight), g.to(y.dtype), create_graph=True)
        return torch.autograd.grad((dx * v).sum() + (dW * w).sum(), (x, weight, g))

    actual = second(dk.spectral_conv(x, weight, precision="fp32", backend=backend))
    expected = second(oracle.spectral_conv(x, weight))
    for a, e in zip(actual, expected, strict=True):
        assert_close(a, e.double(), 2 * BUDGETS["fp32"])


@pytest.mark.parametrize("backend", CONV_BACKENDS)
@pytest.mark.parametrize("memory", ["channels_last", "sliced", "expanded gradient"])
def test_memory_orders(backend: str, memory: str) -> None:
    """Strides pass through, and y is in the memory order of x."""
    x = randn(2, 4, 6, 3, 5)
    if memory == "channels_last":
        x = x.movedim(2, -1).contiguous().movedim(-1, 2)
    elif memory == "sliced":
        x = randn(5, 8, 6, 3, 10)[1::2, ::2, :, :, ::2]
    x = x.detach().requires_grad_()
    weight = randn(6, 6, 2, 2, grad=True)
    y = dk.spectral_conv(x, weight, precision="fp32", backend=backend)
    if memory == "channels_last":
        assert y.stride() == x.stride()
    g = None
    if memory == "expanded gradient":
        g = torch.randn(1, device=DEVICE).expand_as(y)
    exact = oracle.spectral_conv(x, weight)
    check_gradients(y, exact, (x, weight), 2 * BUDGETS["fp32"], g)


@pytest.mark.parametrize("backend", CONV_BACKENDS)
def test_an_empty_batch(backend: str) -> None:
    x, weight = randn(0, 4, 6, 3, 5, grad=True), randn(6, 6, 2, 2, grad=True)
    y = dk.spectral_conv(x, weight, backend=backend)
    dx, dW = torch.autograd.grad(y.sum(), (x, weight))
    assert y.shape == dx.shape == x.shape and not dW.any()


@pytest.mark.parametrize("backend", FFT_BACKENDS)
@pytest.mark.parametrize(
    ("T", "K", "dim"),
    [(1, 1, 0), (5, 3, 1), (33, 17, 2), (100, 51, 0), (1024, 64, 1), (1024, 64, 2), (4096, 128, 2)],
)
def test_truncated_transforms(backend: str, T: int, K: int, dim: int) -> None:
    if DRY_RUN and T > 100:
        pytest.skip("too long for the interpreter")
    shape = [3, 4, 35]
    shape[dim] = T
    x = randn(*shape)
    X = dk.truncated_rfft(x, K, dim, backend=backend)
    exact = torch.fft.rfft(x.double(), dim=dim).narrow(dim, 0, K)
    assert_close(X, exact, BUDGETS["fp32"])
    y = dk.truncated_irfft(X, T, dim, backend=backend)
    assert_close(y, torch.fft.irfft(exact, n=T, dim=dim), BUDGETS["fp32"])


def test_compile_and_autocast() -> None:
    layer = dk.nn.TimeConv(16, 16, 2).to(DEVICE)
    x = randn(2, 4, 16, 8, 8)
    torch._dynamo.reset()
    assert torch.equal(torch.compile(layer, fullgraph=True)(x), layer(x))
    with torch.autocast(DEVICE.type, torch.bfloat16):
        assert layer(x.bfloat16()).dtype == torch.float32
