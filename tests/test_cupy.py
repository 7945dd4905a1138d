"""CuPy without a GPU: arrays, streams and kernels by doubles (cupy_double.py), NVRTC by itself.

test_dry_run.py runs the tests of test_gpu_cupy.py on the same doubles.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import dsno_kernels as dk
from dsno_kernels import functional
from dsno_kernels.backends import Request, _nvrtc
from dsno_kernels.backends import cupy as backend
from tests import cupy_double, oracle
from tests.cupy_double import Array, Cupy
from tests.helpers import BUDGETS, assert_close

CUDA = torch.device("cuda", 0)


@pytest.fixture
def cupy(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cupy]:
    with cupy_double.installed(monkeypatch) as double:
        yield double


@pytest.fixture
def dkc(cupy: Cupy, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.delitem(sys.modules, "dsno_kernels.cupy", raising=False)
    yield importlib.import_module("dsno_kernels.cupy")
    sys.modules.pop("dsno_kernels.cupy", None)
    vars(dk).pop("cupy", None)


X, W = torch.randn(2, 3, 4, 5, 7), torch.randn(4, 6, 2, 2)


def test_arrays_in_and_out_without_a_copy(dkc: ModuleType, cupy: Any) -> None:
    x = Array(X.clone())
    seen: list[int] = []
    original = dkc._tensor

    def record(array: Array) -> Tensor:
        tensor = original(array)
        seen.append(tensor.data_ptr())
        return tensor

    dkc._tensor = record
    bias, residual = torch.randn(6), torch.randn(2, 3, 6, 5, 7)
    y = dkc.spectral_conv(
        x, Array(W), bias=Array(bias), residual=Array(residual), activation="leaky_relu"
    )
    assert isinstance(y, Array)
    assert x.tensor.data_ptr() in seen and len(seen) == 4
    expected = dk.spectral_conv(X, W, bias=bias, residual=residual, activation="leaky_relu")
    assert torch.equal(y.tensor, expected)
    assert cupy.used == [("device", CUDA), ("stream", (0x1230, 0))]


def test_no_public_function_is_missing(dkc: ModuleType) -> None:
    for name in set(functional.__all__) - {"OPS", "SolverStep", "explain"}:
        assert getattr(dkc, name).__wrapped__ is getattr(functional, name)


def test_dynamic_threshold(dkc: ModuleType) -> None:
    found = dkc.dynamic_threshold(Array(3 * X), 0.9, 2.0)
    assert torch.equal(found.tensor, dk.dynamic_threshold(3 * X, 0.9, 2.0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_halves(dkc: ModuleType, dtype: torch.dtype) -> None:
    y = dkc.spectral_conv(Array(X.to(dtype)), Array(W))
    assert torch.equal(y.tensor, dk.spectral_conv(X.to(dtype), W))
    name = str(dtype).removeprefix("torch.")
    y = dkc.spectral_conv(Array(X), Array(W), out_dtype=name)
    assert torch.equal(y.tensor, dk.spectral_conv(X, W, out_dtype=dtype))


def test_a_dtype_that_cupy_does_not_exchange(dkc: ModuleType, cupy: Any) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise BufferError("bfloat16 has no DLPack code")

    x = Array(X.bfloat16())
    x.__dlpack__ = refuse  # type: ignore[method-assign]
    with pytest.raises(TypeError, match=r"CuPy 14.2.0 does not exchange bfloat16 .* use float16"):
        dkc.spectral_conv(x, Array(W))
    cupy.from_dlpack = refuse
    with pytest.raises(TypeError, match=r"does not exchange torch.bfloat16 .*no DLPack code"):
        dkc.spectral_conv(Array(X), Array(W), out_dtype="bfloat16")


def test_results_own_their_memory(dkc: ModuleType) -> None:
    y = dkc.truncated_irfft(dkc.truncated_rfft(Array(X), 4, dim=4), 7, dim=4)
    # These would take the memory if it had been given back.
    others = [torch.full_like(y.tensor, torch.nan) for _ in range(100)]
    assert y.tensor.data_ptr() not in {other.data_ptr() for other in others}
    assert_close(y.tensor, X.double(), BUDGETS["fp32"])


def test_every_function(dkc: ModuleType) -> None:
    grad = torch.randn(2, 3, 6, 5, 7)
    found = dkc.spectral_conv_weight_grad(Array(X), Array(grad), 2)
    assert torch.equal(found.tensor, dk.spectral_conv_weight_grad(X, grad, 2))
    spectrum = dkc.truncated_rfft(Array(X), 2, dim=1)
    assert spectrum.dtype.name == "complex64"
    assert torch.equal(spectrum.tensor, dk.truncated_rfft(X, 2, 1))


def test_steps_take_arrays_lists_of_arrays_and_numbers(dkc: ModuleType) -> None:
    x, history = torch.randn(2, 3, 4), [torch.randn(2, 3, 4) for _ in range(2)]
    expected = dk.exp_step(x, history, (0.9, 0.2, -0.1))
    arrays = [Array(h) for h in history]
    assert torch.equal(dkc.exp_step(Array(x), arrays, (0.9, 0.2, -0.1)).tensor, expected)
    table = torch.tensor([[0.0, 0.0, 0.0], [0.9, 0.2, -0.1]])
    for index in (1, Array(torch.tensor(1))):
        found = dkc.exp_step(Array(x), tuple(arrays), Array(table), index=index)
        assert torch.equal(found.tensor, expected)
    same = Array(x.clone())
    assert dkc.exp_step(same, arrays, (0.9, 0.2, -0.1), inplace=True).tensor.data_ptr() == (
        same.tensor.data_ptr()
    )
    with pytest.raises(TypeError, match=r"history\[1\] must be a cupy.ndarray, got torch.Tensor"):
        dkc.exp_step(Array(x), [arrays[0], history[1]], (0.9, 0.2, -0.1))


def test_a_result_of_several_arrays(dkc: ModuleType) -> None:
    x, output = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    row = [0.0, 1.0, 1.02, -0.3, 0.0, 1.0, 0.0, 0.5]  # DDIM
    expected = dk.solver_step(x, output, row, input_dtype=torch.float16)
    found = dkc.solver_step(Array(x), Array(output), row, input_dtype="float16")
    assert type(found) is type(expected)
    for one, other in zip(found, expected, strict=True):
        assert (one is None) == (other is None)
        assert one is None or torch.equal(one.tensor, other)


def test_normalization(dkc: ModuleType) -> None:
    x, weight, bias = torch.randn(2, 6, 5), torch.randn(6), torch.randn(6)
    found = dkc.group_norm_silu(Array(x), 3, Array(weight), Array(bias))
    assert torch.equal(found.tensor, dk.group_norm_silu(x, 3, weight, bias))


def test_strides_pass_through(dkc: ModuleType) -> None:
    fortran = X.permute(4, 3, 2, 1, 0).contiguous().permute(4, 3, 2, 1, 0)
    found = dkc.spectral_conv(Array(fortran), Array(W))
    assert_close(found.tensor, oracle.spectral_conv(X, W), BUDGETS["fp32"])


def test_no_gradients_are_recorded(dkc: ModuleType) -> None:
    weight = Array(W)
    weight.tensor = W.clone()
    assert not dkc.spectral_conv(Array(X), weight).tensor.requires_grad


@pytest.mark.parametrize("dtype", ["float16", np.float64, np.dtype("float32")], ids=str)
def test_out_dtype_is_one_of_numpy(dkc: ModuleType, dtype: Any) -> None:
    y = dkc.spectral_conv(Array(X), Array(W), out_dtype=dtype)
    assert y.dtype.name == np.dtype(dtype).name


@pytest.mark.parametrize(
    ("pointer", "stream"),
    [(0, ("default", 1)), (1, ("default", 1)), (2, ("default", 1)), (0x7F00, (0x7F00, 1))],
    ids=["null", "legacy", "per-thread", "own"],
)
def test_streams(dkc: ModuleType, cupy: Any, pointer: int, stream: tuple[Any, int]) -> None:
    cupy.stream = pointer
    dkc.truncated_rfft(Array(X, device=1), 2)
    assert cupy.used == [("device", torch.device("cuda", 1)), ("stream", stream)]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda f: f(np.zeros((2, 3, 4)), Array(W)), TypeError, "x must be .* got numpy.ndarray"),
        (lambda f: f(3, Array(W)), TypeError, "x must be a cupy.ndarray, got int"),
        (lambda f: f([Array(X)], Array(W)), TypeError, "x must be a cupy.ndarray, got list"),
        (lambda f: f(None, Array(W)), TypeError, "x must be a cupy.ndarray, got NoneType"),
        (lambda f: f(Array(X), Array(W), bias=0.5), TypeError, "bias must be .* got float"),
        (lambda f: f(Array(X), W), TypeError, "weight must be .* got torch.Tensor"),
        (lambda f: f(Array(X.int()), Array(W)), TypeError, "x must be one of float16.* got int32"),
        (
            lambda f: f(Array(X), Array(W, device=1)),
            ValueError,
            "on one device, got x on 0, weight on 1",
        ),
        (lambda f: f(Array(X), Array(W), out_dtype="int8"), TypeError, "out_dtype must be one of"),
        (lambda f: f(Array(X), Array(W[:3])), ValueError, "x has 4 channels"),
        (lambda f: f(Array(X)), TypeError, "weight"),
    ],
)
def test_refused_arrays(dkc: ModuleType, call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(dkc.spectral_conv)


@pytest.mark.parametrize("strides", [(-4,), (6,)])
def test_refused_strides(dkc: ModuleType, strides: tuple[int, ...]) -> None:
    x = Array(torch.randn(8))
    x.strides = strides
    with pytest.raises(ValueError, match=r"which DLPack cannot carry .* cupy.ascontiguousarray"):
        dkc.truncated_rfft(x, 2)


class TestBackend:
    @pytest.fixture(autouse=True)
    def on_the_cpu(
        self,
        cupy: Cupy,
        monkeypatch: pytest.MonkeyPatch,
        tmp_path_factory: pytest.TempPathFactory,
    ) -> None:
        cupy_double.compile_on_the_shim(monkeypatch, tmp_path_factory)

    def test_the_ops_run_their_plans(self, cupy: Cupy) -> None:
        with pytest.warns(UserWarning, match="compiles its CUDA kernels for sm_90 with NVRTC"):
            y, _ = backend.spectral_conv(X, W, time_dim=1, channel_dim=2, n=3)
        assert_close(y, oracle.spectral_conv(X, W), BUDGETS["fp32"])
        spectrum = backend.truncated_rfft(X, 2, dim=1)
        back = backend.truncated_irfft(spectrum, 3, dim=1)
        assert_close(back, X.double(), BUDGETS["fp32"])
        grad = torch.randn(2, 3, 6, 5, 7)
        found = backend.spectral_conv_weight_grad(X, grad, 2, time_dim=1, channel_dim=2)
        assert_close(found, dk.spectral_conv_weight_grad(X.double(), grad.double(), 2), 1e-6)
        assert set(cupy.launches) == {(0, 0xABC)}

    def test_it_compiles_and_warns_once(self) -> None:
        with pytest.warns(UserWarning, match="NVRTC"):
            backend.truncated_rfft(X, 2, dim=1)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            backend.truncated_rfft(X, 1, dim=1)

    def test_it_does_not_compile_while_capturing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        with pytest.raises(RuntimeError, match="compiles, which a CUDA graph cannot capture"):
            backend._module(0)

    def test_it_serves_what_cuda_serves(self) -> None:
        assert backend.unsupported(Request("spectral_conv", CUDA, torch.float32)) is None
        assert backend.unsupported(Request("truncated_rfft", CUDA, torch.float64)) is None

    def test_refusals(self, monkeypatch: pytest.MonkeyPatch, cupy: Cupy) -> None:
        request = Request("spectral_conv", CUDA, torch.float32)
        cpu = Request("spectral_conv", torch.device("cpu"), torch.float32)
        assert backend.unsupported(cpu) == "it needs CUDA tensors"
        cupy.cuda.runtime.driverGetVersion = lambda: 12080
        reason = backend.unsupported(request)
        assert reason is not None and "the driver serves CUDA 12.8; update" in reason
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
        reason = backend.unsupported(request)
        assert reason is not None and "8.0 or newer, and this GPU has 7.5" in reason
        monkeypatch.setattr(_nvrtc, "nvrtc", lambda: (None, "no NVRTC"))
        assert backend.unsupported(request) == "no NVRTC"


@pytest.fixture
def fresh_nvrtc() -> Iterator[None]:
    _nvrtc.nvrtc.cache_clear()
    yield
    _nvrtc.nvrtc.cache_clear()


@pytest.mark.usefixtures("fresh_nvrtc")
def test_cupy_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)
    monkeypatch.setitem(sys.modules, "cupy.cuda", None)
    reason = backend.unsupported(Request("truncated_rfft", CUDA, torch.float32))
    assert reason is not None and reason.endswith("`pip install cupy-cuda13x`")


@pytest.mark.usefixtures("fresh_nvrtc")
def test_nvrtc_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    def version() -> None:
        raise RuntimeError("libnvrtc.so.13: cannot open shared object file")

    cuda = ModuleType("cupy.cuda")
    cuda.nvrtc = SimpleNamespace(getVersion=version)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "cupy", ModuleType("cupy"))
    monkeypatch.setitem(sys.modules, "cupy.cuda", cuda)
    reason = backend.unsupported(Request("truncated_rfft", CUDA, torch.float32))
    assert reason is not None
    assert reason.startswith("NVRTC cannot be loaded (libnvrtc.so.13: cannot open")
    assert "pip install" in reason and "nvidia-cuda-nvrtc" in reason


@pytest.mark.parametrize(
    ("capability", "expected"),
    [((8, 0), "sm_80"), ((9, 0), "sm_90"), ((8, 7), "compute_86"), ((12, 0), "compute_90")],
)
def test_targets(capability: tuple[int, int], expected: str) -> None:
    assert _nvrtc.target(capability, [75, 80, 86, 90]) == expected


def test_the_compiler_says_what_is_wrong() -> None:
    if _nvrtc.nvrtc()[0] is None:
        pytest.skip(str(_nvrtc.nvrtc()[1]))
    with pytest.raises(RuntimeError, match=r"missing.cuh for sm_90"):
        _nvrtc.compiled("missing.cuh", "sm_90")


def test_ptx_for_a_newer_gpu() -> None:
    if _nvrtc.nvrtc()[0] is None:
        pytest.skip(str(_nvrtc.nvrtc()[1]))
    code = _nvrtc.compiled("truncated_fft.cuh", "compute_80")
    assert b".target sm_80" in code and b"truncated_rfft_rows_f32" in code
