"""What only a device can show: streams, CUDA graphs, runs that agree bit by bit, offsets beyond
2^31, several devices.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import dsno_kernels as dk
from tests import oracle
from tests.helpers import BUDGETS, IO_BUDGET, assert_close
from tests.on_device import DEVICE, DRY_RUN, cuda, marks, needs_memory, serving, sized

pytestmark = marks

CONV_BACKENDS = serving("spectral_conv")
KERNELS = [name for name in CONV_BACKENDS if name != "reference"]  # cuFFT's promises are not ours
CUBLAS = [name for name in CONV_BACKENDS if name in ("cuda", "cupy", "reference")]


@pytest.fixture(params=["highest", "high"])
def matmul_precision(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(request.param)
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("backend", CUBLAS)
@pytest.mark.usefixtures("matmul_precision")
@pytest.mark.parametrize("precision", ["fp32", "tf32"])
def test_products_of_cublas_whatever_the_switch_says(backend: str, precision: str) -> None:
    """Long sums over channels, which TF32 would round visibly."""
    axes = {"time_dim": 2, "channel_dim": 1}
    x = torch.randn(sized(4, 128, 256), device=DEVICE, requires_grad=True)
    weight = torch.randn(*sized(128, 16, 3), 2, device=DEVICE, requires_grad=True)
    y = dk.spectral_conv(x, weight, precision=precision, backend=backend, **axes)
    g = torch.randn_like(y)
    grads = torch.autograd.grad(y, (x, weight), g)
    exact = oracle.spectral_conv(x, weight, **axes)
    expected = torch.autograd.grad(exact, (x, weight), g.double())
    for found, right in zip((y, *grads), (exact, *expected), strict=True):
        assert_close(found, right, BUDGETS["fp32"])


@pytest.mark.usefixtures("matmul_precision")
def test_gradients_of_torch_func_whatever_the_switch_says() -> None:
    """They run on the reference, and its gradients after it has returned."""
    x = torch.randn(sized(4, 8, 128, 6), device=DEVICE)
    weight = torch.randn(*sized(128, 16, 3), 2, device=DEVICE)
    y, pull = torch.func.vjp(dk.spectral_conv, x, weight)
    exact, exact_pull = torch.func.vjp(oracle.spectral_conv, x.double(), weight.double())
    g = torch.randn_like(y)
    for found, right in zip((y, *pull(g)), (exact, *exact_pull(g.double())), strict=True):
        assert_close(found, right, BUDGETS["fp32"])


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("shape", [(4, 4, 64, 16, 16), (2, 16, 32, 8, 8)], ids=str)
def test_ten_runs_give_the_same_bits(backend: str, shape: tuple[int, ...]) -> None:
    shape = sized(*shape)
    C = shape[2]
    x = torch.randn(shape, device=DEVICE, requires_grad=True)
    weight = torch.randn(C, C, 2, 2, device=DEVICE, requires_grad=True)
    first = None
    for _ in range(10):
        y = dk.spectral_conv(x, weight, activation="leaky_relu", residual=x, backend=backend)
        results = (y, *torch.autograd.grad(y.square().sum(), (x, weight)))
        first = first or results
        assert all(torch.equal(a, b) for a, b in zip(results, first, strict=True))


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("T", [4, 16, 128], ids="T={}".format)
def test_a_cuda_graph_replays_forward_and_backward(backend: str, T: int) -> None:
    C = 6 if DRY_RUN else 32
    weight = torch.randn(C, C, 2, 2, device=DEVICE, requires_grad=True)
    x = torch.randn(2, T, C, 8, 8, device=DEVICE, requires_grad=True)
    g = torch.randn_like(x)

    def step() -> tuple[torch.Tensor, ...]:
        y = dk.spectral_conv(x, weight, activation="leaky_relu", residual=x, backend=backend)
        return y, *torch.autograd.grad(y, (x, weight), g)

    side = cuda().Stream()
    side.wait_stream(cuda().current_stream())
    with cuda().stream(side):
        for _ in range(3):
            step()
    cuda().current_stream().wait_stream(side)
    graph = cuda().CUDAGraph()
    with cuda().graph(graph):
        captured = step()
    with torch.no_grad():
        x.normal_()
        g.normal_()
    graph.replay()
    if DRY_RUN:
        pytest.skip("the stand-in's graph replays nothing")
    for replayed, expected in zip(captured, step(), strict=True):
        assert torch.equal(replayed, expected)


@pytest.mark.parametrize("backend", CONV_BACKENDS)
def test_work_runs_on_the_current_stream(backend: str) -> None:
    """x is written late on a side stream: a kernel on another stream would read zeros."""
    shape = sized(8, 4, 32, 32, 32)
    weight = torch.randn(shape[2], shape[2], 2, 2, device=DEVICE)
    x = torch.zeros(shape, device=DEVICE)
    dk.spectral_conv(x, weight, backend=backend)  # what is compiled at first use is compiled here
    cuda().synchronize()
    stream = cuda().Stream()
    with cuda().stream(stream):
        cuda()._sleep(20_000_000)
        x.fill_(1)
        y = dk.spectral_conv(x, weight, backend=backend)
    stream.synchronize()
    assert_close(y, oracle.spectral_conv(torch.ones_like(x), weight), BUDGETS["fp32"])


@pytest.mark.parametrize("backend", KERNELS)
def test_offsets_beyond_2_to_the_31_elements(backend: str) -> None:
    needs_memory(24)
    torch.utils.deterministic.fill_uninitialized_memory = False
    shape = sized(9, 4, 64, 1024, 1024)
    x = torch.empty(shape, device=DEVICE, dtype=torch.bfloat16)
    x[-1].normal_()
    weight = torch.randn(shape[2], 1, 2, 2, device=DEVICE) / 8
    y = dk.spectral_conv(x, weight, backend=backend)[-1:]
    tail = slice(-2, None)
    assert_close(y[:, :, :, tail], oracle.spectral_conv(x[-1:, :, :, tail], weight), IO_BUDGET)


@pytest.mark.parametrize("backend", serving("truncated_rfft"))
def test_transforms_beyond_2_to_the_31_elements(backend: str) -> None:
    needs_memory(24)
    torch.utils.deterministic.fill_uninitialized_memory = False
    x = torch.empty(sized(5, 8, 1 << 26), device=DEVICE, dtype=torch.bfloat16)
    x[-1, :, -64:].normal_()
    spectrum = dk.truncated_rfft(x, 1, dim=1, backend=backend)[-1:, :, -64:]
    exact = torch.fft.rfft(x[-1:, :, -64:].double(), dim=1)[:, :1]
    assert_close(spectrum, exact, BUDGETS["fp32"])


def test_a_second_device_is_used_when_the_tensors_are_there() -> None:
    if cuda().device_count() < 2:
        pytest.skip("needs two CUDA devices")
    x, weight = torch.randn(2, 4, 8, 8, device="cuda:1"), torch.randn(8, 8, 2, 2, device="cuda:1")
    y = dk.spectral_conv(x, weight)
    assert y.device == x.device
    assert_close(y, oracle.spectral_conv(x, weight), BUDGETS["fp32"])


def test_tensors_on_two_devices_are_refused() -> None:
    """The CPU is the second device of a machine with one GPU, `meta` that of a dry run."""
    x = torch.randn(2, 4, 8, 8, device=DEVICE)
    weight = torch.randn(8, 8, 2, 2, device="meta" if DRY_RUN else "cpu")
    with pytest.raises(ValueError, match="device"):
        dk.spectral_conv(x, weight)
