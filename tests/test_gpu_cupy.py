"""CuPy on a GPU: arrays that share memory and stream with PyTorch, and the backend that NVRTC
compiles.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import dsno_kernels as dk
from dsno_kernels.backends import _launch, _nvrtc, _transforms
from dsno_kernels.backends import cupy as backend_module
from tests import cupy_double, oracle
from tests.helpers import BUDGETS, IO_BUDGET, assert_close
from tests.on_device import DEVICE, DRY_RUN, cuda, marks, serving

pytestmark = marks

# Both of cuBLAS and of the same device code.
COMPOSED = ("cuda", "cupy")
BACKENDS = ["cupy"] if DRY_RUN else [b for b in serving("spectral_conv") if b in COMPOSED]
SHAPE, WEIGHT = (3, 4, 6, 5, 7), (6, 9, 3, 2)


@pytest.fixture
def cupy(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    if DRY_RUN:
        with cupy_double.installed(monkeypatch) as double:
            yield double
        return
    module = pytest.importorskip("cupy", reason="CuPy is not installed")
    try:
        module.zeros(2) + 1
    except Exception as error:  # whatever CuPy misses: headers, NVRTC, a newer driver
        pytest.skip(f"CuPy does not work here: {error}")
    yield module


@pytest.fixture
def dkc(cupy: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    if DRY_RUN:  # it holds the double of another test
        monkeypatch.delitem(sys.modules, "dsno_kernels.cupy", raising=False)
    return importlib.import_module("dsno_kernels.cupy")


@pytest.fixture
def served(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[None]:
    """In a dry run the backend `cupy` on the shim."""
    if not DRY_RUN:
        yield
        return
    monkeypatch.setattr(backend_module, "unsupported", lambda request: None)
    with cupy_double.installed(monkeypatch):
        cupy_double.compile_on_the_shim(monkeypatch, tmp_path_factory)
        yield


def arrays(cupy: Any, *shapes: tuple[int, ...]) -> list[Any]:
    return [cupy.asarray(torch.randn(shape).numpy()) for shape in shapes]


def tensor(array: Any) -> torch.Tensor:
    """The values of an array, on the CPU."""
    return torch.from_numpy(array.get())


def test_memory_is_shared_both_ways(cupy: Any, dkc: Any) -> None:
    (x,) = arrays(cupy, SHAPE)
    seen = dkc._tensor(x)
    assert seen.data_ptr() == x.data.ptr and (seen.device.index or 0) == x.device.id
    seen.fill_(2)
    cuda().synchronize()
    assert (x == 2).all()
    back = dkc._array(seen)
    back[...] = 3
    cupy.cuda.get_current_stream().synchronize()
    assert (seen == 3).all() and back.data.ptr == x.data.ptr


def test_every_function(cupy: Any, dkc: Any) -> None:
    x, weight, bias, residual = arrays(cupy, SHAPE, WEIGHT, (9,), (3, 4, 9, 5, 7))
    y = dkc.spectral_conv(x, weight, bias=bias, residual=residual, precision="fp32")
    exact = oracle.spectral_conv(tensor(x), tensor(weight))
    exact = exact + tensor(bias).double()[:, None, None] + tensor(residual).double()
    assert isinstance(y, cupy.ndarray)
    assert_close(tensor(y), exact, BUDGETS["fp32"])
    grad = dkc.spectral_conv_weight_grad(x, residual, 3, precision="fp32")
    expected = dk.spectral_conv_weight_grad(tensor(x).double(), tensor(residual).double(), 3)
    assert_close(tensor(grad), expected, BUDGETS["fp32"])
    spectrum = dkc.truncated_rfft(x, 3, dim=1)
    assert spectrum.dtype == cupy.complex64
    back = dkc.truncated_irfft(spectrum, 4, dim=1)
    assert_close(tensor(back), tensor(x).double(), BUDGETS["fp32"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_halves_pass_both_ways(cupy: Any, dkc: Any, dtype: torch.dtype) -> None:
    values = torch.randn(SHAPE, device=DEVICE).to(dtype)
    try:
        x = dkc._array(values)
    except TypeError as error:
        if dtype == torch.float16 or "does not exchange torch.bfloat16" not in str(error):
            raise
        pytest.skip(str(error))
    assert x.data.ptr == values.data_ptr()
    assert torch.equal(dkc._tensor(x), values)
    (weight,) = arrays(cupy, WEIGHT)
    y = dkc.spectral_conv(x, weight)
    assert y.dtype == x.dtype
    assert_close(dkc._tensor(y), oracle.spectral_conv(values.cpu(), tensor(weight)), IO_BUDGET)


def test_strides_pass_through(cupy: Any, dkc: Any) -> None:
    x, weight = arrays(cupy, SHAPE, WEIGHT)
    for view in (cupy.asfortranarray(x), x[:, :, :, ::2], x.transpose(0, 1, 2, 4, 3)):
        found = dkc.spectral_conv(view, weight, precision="fp32")
        assert_close(tensor(found), oracle.spectral_conv(tensor(view), tensor(weight)), 1e-6)
    with pytest.raises(ValueError, match="ascontiguousarray"):
        dkc.spectral_conv(x[::-1], weight)


@pytest.mark.parametrize("kind", ["null", "own", "non_blocking", "per_thread"])
def test_work_runs_on_the_current_stream(cupy: Any, dkc: Any, kind: str) -> None:
    stream = {
        "null": lambda: cupy.cuda.Stream.null,
        "own": cupy.cuda.Stream,
        "non_blocking": lambda: cupy.cuda.Stream(non_blocking=True),
        "per_thread": lambda: cupy.cuda.Stream.ptds,
    }[kind]()
    (weight,) = arrays(cupy, (16, 16, 2, 2))
    x = cupy.zeros((8, 4, 16, 32, 32), cupy.float32)
    busy = cupy.zeros(2 if DRY_RUN else 2**26, cupy.float32)
    busy += 1
    dkc.spectral_conv(x, weight)  # compiles, if it has to
    cupy.cuda.Device().synchronize()
    with stream:
        for _ in range(100):  # some milliseconds
            busy += 1
        x.fill(1)
        y = dkc.spectral_conv(x, weight, precision="fp32")
        z = y + 1  # CuPy's own work comes after it
    stream.synchronize()
    exact = oracle.spectral_conv(torch.ones(8, 4, 16, 32, 32), tensor(weight))
    assert_close(tensor(y), exact, BUDGETS["fp32"])
    assert (z == y + 1).all()


def test_steps(cupy: Any, dkc: Any) -> None:
    x, h = arrays(cupy, (3, 35), (3, 35))
    y = dkc.exp_step(x, [h], [0.5, 2.0])
    assert isinstance(y, cupy.ndarray)
    assert_close(tensor(y), 0.5 * tensor(x).double() + 2 * tensor(h).double(), BUDGETS["fp32"])
    step = dkc.solver_step(x, h, [0.0, 1.0, 0.5, 2.0, 0.0, 1.0, 0.0, 1.0])
    assert_close(tensor(step.base), tensor(y).double(), BUDGETS["fp32"])


def test_results_own_their_memory(cupy: Any, dkc: Any) -> None:
    x, weight = arrays(cupy, SHAPE, WEIGHT)
    y = dkc.spectral_conv(x, weight, precision="fp32")
    others = [torch.full(y.shape, torch.nan, device=DEVICE) for _ in range(20)]
    assert y.data.ptr not in {other.data_ptr() for other in others}
    assert_close(tensor(y), oracle.spectral_conv(tensor(x), tensor(weight)), BUDGETS["fp32"])


def test_arrays_on_two_devices(cupy: Any, dkc: Any) -> None:
    if not DRY_RUN and torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    (x,) = arrays(cupy, SHAPE)
    with cupy.cuda.Device(1):
        (weight,) = arrays(cupy, WEIGHT)
        other = cupy.ones(SHAPE, cupy.float32)
    with pytest.raises(ValueError, match="on one device"):
        dkc.spectral_conv(x, weight)
    y = dkc.spectral_conv(other, weight)  # the current device is another one
    assert y.device.id == 1


@pytest.mark.parametrize(
    ("shape", "time_dim", "channel_dim", "n"),
    [((3, 6, 130), 2, 1, 130), ((2, 70, 4, 2, 4), 1, 2, 64), ((2, 96, 8), 1, 2, 200)],
    ids=["fno", "video", "channels-last"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_backend_of_nvrtc(
    served: None,
    shape: tuple[int, ...],
    time_dim: int,
    channel_dim: int,
    n: int,
    dtype: torch.dtype,
) -> None:
    if _nvrtc.nvrtc()[0] is None:
        pytest.skip(str(_nvrtc.nvrtc()[1]))
    axes = {"time_dim": time_dim, "channel_dim": channel_dim, "n": n}
    x = torch.randn(shape, device=DEVICE).to(dtype).requires_grad_()
    weight = torch.randn(shape[channel_dim], 5, 20, 2, device=DEVICE, requires_grad=True)
    exact = oracle.spectral_conv(x, weight, **axes)
    g = torch.randn_like(exact).to(dtype)
    budget = BUDGETS["fp32"] if dtype == torch.float32 else IO_BUDGET
    with dk.use_backend("cupy"):
        y = dk.spectral_conv(x, weight, precision="fp32", **axes)
        grads = torch.autograd.grad(y, (x, weight), g)
    expected = torch.autograd.grad(exact, (x, weight), g.double())
    for found, right in zip((y, *grads), (exact, *expected), strict=True):
        assert_close(found, right, 1.5 * budget)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_first_call_under_capture_says_what_to_do(
    backend: str, served: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.randn(3, 77, device=DEVICE)
    if DRY_RUN:
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        monkeypatch.setattr(
            _transforms,
            "not_while_capturing",
            lambda _, what: _launch.not_while_capturing(torch.device("cuda"), what),
        )
    graph = cuda().CUDAGraph()
    with pytest.raises(RuntimeError, match="once before the capture"), cuda().graph(graph):
        dk.truncated_rfft(x, 7, backend=backend)
