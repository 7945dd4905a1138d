"""Everything the CPU tests promise, on a CUDA device: each backend, each precision, and what only a
device can show.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings

import dsno_kernels as dk
from dsno_kernels import backends
from dsno_kernels.backends import Request
from tests import oracle
from tests.helpers import BUDGETS, IO_BUDGET, assert_close
from tests.strategies import Case, cases
from tests.test_oracle import SHAPES
from tests.test_properties import EXAMPLES, check

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

DSNO_SHAPES = {
    "cifar-8x8": (4, 4, 256, 8, 8),
    "cifar-16x16": (2, 4, 256, 16, 16),
    "imagenet-8x8": (2, 4, 768, 8, 8),
    "odd": (3, 4, 111, 7, 5),
}


def supported(op: str) -> list[str]:
    if not torch.cuda.is_available():
        return []
    request = Request(op, torch.device("cuda", 0), torch.float32)
    return [
        name
        for name in ("triton", "cuda", "reference")
        if backends.unsupported(name, request) is None
    ]


CONV_BACKENDS = supported("spectral_conv")
FFT_BACKENDS = supported("truncated_rfft")


def test_the_kernels_are_there_and_are_what_runs() -> None:
    x, weight = torch.randn(2, 4, 8, 8, 8, device="cuda"), torch.randn(8, 8, 2, 2, device="cuda")
    assert dk.explain("spectral_conv", x, weight).splitlines()[0].endswith(": triton")
    assert dk.explain("truncated_rfft", x).splitlines()[0].endswith(": cuda")


@pytest.mark.parametrize("backend", CONV_BACKENDS)
@pytest.mark.parametrize("precision", BUDGETS)
@pytest.mark.parametrize(
    ("shape", "time_dim", "channel_dim", "O", "K", "n"), SHAPES.values(), ids=SHAPES
)
def test_value_and_gradients(
    backend: str,
    precision: str,
    shape: tuple[int, ...],
    time_dim: int,
    channel_dim: int,
    O: int,
    K: int,
    n: int,
) -> None:
    x = torch.randn(shape, device="cuda", requires_grad=True)
    weight = torch.randn(shape[channel_dim], O, K, 2, device="cuda", requires_grad=True)
    y = dk.spectral_conv(
        x,
        weight,
        time_dim=time_dim,
        channel_dim=channel_dim,
        n=n,
        precision=precision,
        backend=backend,
    )
    exact = oracle.spectral_conv(x, weight, time_dim, channel_dim, n)
    g = torch.randn_like(y)
    assert_close(y, exact, BUDGETS[precision])
    for grad, expected in zip(
        torch.autograd.grad(y, (x, weight), g),
        torch.autograd.grad(exact, (x, weight), g.double()),
        strict=True,
    ):
        assert_close(grad, expected, 1.5 * BUDGETS[precision])


@pytest.mark.parametrize("backend", CONV_BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", DSNO_SHAPES.values(), ids=DSNO_SHAPES)
def test_dsno_shapes_with_the_fused_epilogue(
    backend: str, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    x = torch.randn(shape, device="cuda", dtype=dtype)
    weight = torch.randn(shape[2], shape[2], 2, 2, device="cuda") / shape[2]
    y = dk.spectral_conv(x, weight, activation="leaky_relu", residual=x, backend=backend)
    exact = x.double() + torch.nn.functional.leaky_relu(oracle.spectral_conv(x, weight), 0.01)
    assert_close(y, exact, BUDGETS["fp32"] if dtype == torch.float32 else IO_BUDGET)


@pytest.mark.parametrize("backend", CONV_BACKENDS)
@settings(
    max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True
)
@given(case=cases())
def test_properties_hold_on_the_device(backend: str, case: Case) -> None:
    check("reference" if case.dtype == torch.float64 else backend, case, "cuda")


@pytest.mark.parametrize("backend", FFT_BACKENDS)
@pytest.mark.parametrize(
    ("T", "K"), [(1, 1), (4, 2), (5, 3), (8, 5), (33, 17), (100, 51), (1024, 64), (4096, 128)]
)
@pytest.mark.parametrize("dim", [0, 1, 2])
def test_truncated_transforms(backend: str, T: int, K: int, dim: int) -> None:
    shape = [3, 4, 35]
    shape[dim] = T
    x = torch.randn(shape, device="cuda")
    X = dk.truncated_rfft(x, K, dim, backend=backend)
    exact = torch.fft.rfft(x.double(), dim=dim).narrow(dim, 0, K)
    assert_close(X, exact, BUDGETS["fp32"])
    y = dk.truncated_irfft(X, T, dim, backend=backend)
    assert_close(y, torch.fft.irfft(exact, n=T, dim=dim), BUDGETS["fp32"])


@pytest.mark.parametrize("backend", CONV_BACKENDS)
def test_ten_runs_give_the_same_bits(backend: str) -> None:
    x = torch.randn(4, 4, 64, 16, 16, device="cuda", requires_grad=True)
    weight = torch.randn(64, 64, 2, 2, device="cuda", requires_grad=True)
    first = None
    for _ in range(10):
        y = dk.spectral_conv(x, weight, activation="leaky_relu", residual=x, backend=backend)
        results = (y, *torch.autograd.grad(y.square().sum(), (x, weight)))
        first = first or results
        assert all(torch.equal(a, b) for a, b in zip(results, first, strict=True))


@pytest.mark.parametrize("backend", CONV_BACKENDS)
def test_a_cuda_graph_replays_forward_and_backward(backend: str) -> None:
    if backend == "reference":
        pytest.skip("the promise is about kernels; cuFFT plans are not ours")
    weight = torch.randn(32, 32, 2, 2, device="cuda", requires_grad=True)
    x = torch.randn(2, 4, 32, 8, 8, device="cuda", requires_grad=True)
    g = torch.randn_like(x)

    def step() -> tuple[torch.Tensor, ...]:
        y = dk.spectral_conv(x, weight, activation="leaky_relu", residual=x, backend=backend)
        return y, *torch.autograd.grad(y, (x, weight), g)

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        x.normal_()
        g.normal_()
    graph.replay()
    for replayed, expected in zip(captured, step(), strict=True):
        assert torch.equal(replayed, expected)


@pytest.mark.parametrize("backend", CONV_BACKENDS)
def test_work_runs_on_the_current_stream(backend: str) -> None:
    weight = torch.randn(32, 32, 2, 2, device="cuda")
    stream = torch.cuda.Stream()
    x = torch.zeros(8, 4, 32, 32, 32, device="cuda")
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        x.fill_(1)
        y = dk.spectral_conv(x, weight, backend=backend)
    stream.synchronize()
    assert_close(y, oracle.spectral_conv(torch.ones_like(x), weight), BUDGETS["fp32"])


@pytest.mark.parametrize("backend", CONV_BACKENDS)
def test_offsets_beyond_2_to_the_31_elements(backend: str) -> None:
    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("needs 24 GiB of free GPU memory")
    torch.utils.deterministic.fill_uninitialized_memory = False
    x = torch.empty(9, 4, 64, 1024, 1024, device="cuda", dtype=torch.bfloat16)
    x[-1].normal_()
    weight = torch.randn(64, 1, 2, 2, device="cuda") / 8
    y = dk.spectral_conv(x, weight, backend=backend)[-1]
    tail = x[-1:, :, :, -2:].clone()
    assert_close(y[None, :, :, -2:], oracle.spectral_conv(tail, weight), IO_BUDGET)


def test_a_second_device_is_used_when_the_tensors_are_there() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    x, weight = torch.randn(2, 4, 8, 8, device="cuda:1"), torch.randn(8, 8, 2, 2, device="cuda:1")
    y = dk.spectral_conv(x, weight)
    assert y.device == x.device
    assert_close(y, oracle.spectral_conv(x, weight), BUDGETS["fp32"])


def test_compile_and_autocast_on_the_device() -> None:
    layer = dk.nn.TimeConv(16, 16, 2).cuda()
    x = torch.randn(2, 4, 16, 8, 8, device="cuda")
    torch._dynamo.reset()
    assert torch.equal(torch.compile(layer, fullgraph=True)(x), layer(x))
    with torch.autocast("cuda", torch.bfloat16):
        assert layer(x.bfloat16()).dtype == torch.float32
