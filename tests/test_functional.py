"""What the public functions accept, and the one sentence they answer with to everything else."""

from __future__ import annotations

import re
import threading

import pytest
import torch

import dsno_kernels as dk
from tests.strategies import BACKENDS

X, W = torch.randn(2, 4, 3, 5, 7), torch.randn(3, 6, 2, 2)

BAD_CALLS = {
    "no time": (lambda: dk.spectral_conv(X[:, :0], W), ValueError, "at least 1, got 0"),
    "K = 0": (lambda: dk.spectral_conv(X, W[:, :, :0]), ValueError, "must be in 1..3"),
    "K > T//2+1": (
        lambda: dk.spectral_conv(X, torch.randn(3, 6, 4, 2)),
        ValueError,
        "1..3 for 4 time points",
    ),
    "K > n//2+1": (lambda: dk.spectral_conv(X, W, n=1), ValueError, "1..1 for 1 time points"),
    "n = 0": (
        lambda: dk.spectral_conv(X, W, n=0),
        ValueError,
        "n must have a length of at least 1",
    ),
    "channels": (
        lambda: dk.spectral_conv(X, torch.randn(4, 6, 2, 2)),
        ValueError,
        "x has 3 channels (axis channel_dim) but weight (4, 6, 2, 2) expects 4",
    ),
    "no output channels": (
        lambda: dk.spectral_conv(X, W[:, :0]),
        ValueError,
        "at least one input and output channel",
    ),
    "complex x": (
        lambda: dk.spectral_conv(X.cfloat(), W),
        TypeError,
        "x must be real floating point",
    ),
    "integer x": (lambda: dk.spectral_conv(X.long(), W), TypeError, "got torch.int64"),
    "not a tensor": (
        lambda: dk.spectral_conv([1.0], W),
        TypeError,
        "x must be a torch.Tensor, got list",
    ),
    "complex weight": (
        lambda: dk.spectral_conv(X, torch.view_as_complex(W)),
        TypeError,
        "weight must be real",
    ),
    "weight (I,O,K)": (lambda: dk.spectral_conv(X, W[..., 0]), ValueError, "(I, O, K, 2)"),
    "weight (I,O,K,3)": (
        lambda: dk.spectral_conv(X, torch.randn(3, 6, 2, 3)),
        ValueError,
        "(I, O, K, 2)",
    ),
    "devices": (lambda: dk.spectral_conv(X, W.to("meta")), ValueError, "x on cpu, weight on meta"),
    "same axis": (
        lambda: dk.spectral_conv(X, W, time_dim=2),
        ValueError,
        "must differ; both name axis 2",
    ),
    "same axis, negative": (lambda: dk.spectral_conv(X, W, time_dim=-3), ValueError, "must differ"),
    "axis out of range": (
        lambda: dk.spectral_conv(X, W, time_dim=5),
        ValueError,
        "time_dim=5 is out of range",
    ),
    "scalar x": (
        lambda: dk.spectral_conv(torch.tensor(1.0), W),
        ValueError,
        "out of range for shape ()",
    ),
    "bias": (
        lambda: dk.spectral_conv(X, W, bias=torch.zeros(3)),
        ValueError,
        "bias must have shape (6,), got (3,)",
    ),
    "residual": (
        lambda: dk.spectral_conv(X, W, residual=X),
        ValueError,
        "shape of the result, (2, 4, 6, 5, 7)",
    ),
    "activation": (
        lambda: dk.spectral_conv(X, W, activation="gelu"),
        ValueError,
        "unknown activation 'gelu'",
    ),
    "out_dtype": (
        lambda: dk.spectral_conv(X, W, out_dtype=torch.int32),
        TypeError,
        "out_dtype must be one of",
    ),
    "precision": (
        lambda: dk.spectral_conv(X, W, precision="fp8"),
        ValueError,
        "unknown precision 'fp8'; accepted",
    ),
    "backend": (
        lambda: dk.spectral_conv(X, W, backend="tpu"),
        ValueError,
        "unknown backend 'tpu'; accepted",
    ),
    "backend here": (
        lambda: dk.spectral_conv(X, W, backend="cuda"),
        NotImplementedError,
        "'cuda' cannot run spectral_conv on cpu",
    ),
    "use_backend": (
        lambda: dk.use_backend("tpu").__enter__(),
        ValueError,
        "unknown backend 'tpu'; accepted",
    ),
    "grad shape": (
        lambda: dk.spectral_conv_weight_grad(X, X[:1], 2),
        ValueError,
        "grad_output must have the shape of x",
    ),
    "grad axes": (
        lambda: dk.spectral_conv_weight_grad(X, X[0], 2),
        ValueError,
        "grad_output must have the shape of x",
    ),
    "grad modes": (
        lambda: dk.spectral_conv_weight_grad(X, X, 4),
        ValueError,
        "must be in 1..3",
    ),
    "rfft modes": (lambda: dk.truncated_rfft(X, 9), ValueError, "must be in 1..4"),
    "rfft complex": (
        lambda: dk.truncated_rfft(X.cfloat(), 2),
        TypeError,
        "x must be real floating point",
    ),
    "rfft dim": (lambda: dk.truncated_rfft(X, 2, 7), ValueError, "dim=7 is out of range"),
    "irfft real": (lambda: dk.truncated_irfft(X, 4), TypeError, "spectrum must be torch.complex64"),
    "irfft too many": (
        lambda: dk.truncated_irfft(X.cfloat(), 4),
        ValueError,
        "must be in 1..3",
    ),
    "n is a float": (lambda: dk.spectral_conv(X, W, n=4.0), TypeError, "n must be an integer"),
    "n is a bool": (lambda: dk.spectral_conv(X, W, n=True), TypeError, "n must be an integer"),
    "time_dim is a string": (
        lambda: dk.spectral_conv(X, W, time_dim="a"),
        TypeError,
        "time_dim must be an integer, got 'a'",
    ),
    "modes is a float": (
        lambda: dk.truncated_rfft(X, 2.0),
        TypeError,
        "modes must be an integer, got 2.0",
    ),
    "slope": (
        lambda: dk.spectral_conv(X, W, activation="leaky_relu", negative_slope=None),
        TypeError,
        "negative_slope must be a number, got None",
    ),
    "sparse": (lambda: dk.spectral_conv(X.to_sparse(), W), TypeError, "x must be a dense"),
    "explain a bad call": (
        lambda: dk.explain("spectral_conv", X.long(), W),
        TypeError,
        "x must be real floating point",
    ),
    "explain": (lambda: dk.explain("fft"), ValueError, "unknown op 'fft'; accepted"),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_input_gets_one_clear_sentence(name: str) -> None:
    call, kind, text = BAD_CALLS[name]
    with pytest.raises(kind, match=re.escape(text)) as error:
        call()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("empty", ["batch", "pixels"])
def test_empty_tensors_give_empty_results_with_gradients(backend: str, empty: str) -> None:
    x = (X[:0] if empty == "batch" else X[..., :0]).clone().requires_grad_()
    weight, bias = W.clone().requires_grad_(), torch.randn(6, requires_grad=True)
    y = dk.spectral_conv(x, weight, bias=bias, activation="leaky_relu", backend=backend)
    assert y.shape == (*x.shape[:2], 6, *x.shape[3:])
    dx, dW, db = torch.autograd.grad(y.sum(), (x, weight, bias))
    assert dx.shape == x.shape and not dW.any() and not db.any() and dW.shape == weight.shape
    assert dk.truncated_rfft(x, 2, 1).shape == (x.shape[0], 2, *x.shape[2:])


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_passes_through_to_its_own_pixel_only(backend: str) -> None:
    x = X.clone()
    x[1, 2, 0, 3, 4] = float("nan")
    y = dk.spectral_conv(x, W, activation="leaky_relu", backend=backend)
    expected = torch.zeros_like(y, dtype=torch.bool)
    expected[1, :, :, 3, 4] = True
    assert torch.equal(y.isnan(), expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_output_dtype(backend: str, dtype: torch.dtype) -> None:
    assert dk.spectral_conv(X.to(dtype), W, backend=backend).dtype == dtype
    assert (
        dk.spectral_conv(X.to(dtype), W, out_dtype=torch.float32, backend=backend).dtype
        == torch.float32
    )
    y = dk.spectral_conv(X.to(dtype), W, residual=torch.zeros(2, 4, 6, 5, 7), backend=backend)
    assert y.dtype == torch.float32


@pytest.mark.parametrize("backend", BACKENDS)
def test_memory_order_of_the_input_is_kept(backend: str) -> None:
    w = torch.randn(3, 3, 2, 2)
    assert dk.spectral_conv(X, w, backend=backend).is_contiguous()
    channels_last = X.movedim(2, -1).contiguous().movedim(-1, 2)
    assert dk.spectral_conv(channels_last, w, backend=backend).stride() == channels_last.stride()
    time_last = torch.randn(8, 3, 9)
    assert dk.spectral_conv(
        time_last, w, time_dim=2, channel_dim=1, backend=backend
    ).is_contiguous()


@pytest.mark.parametrize("backend", BACKENDS)
def test_inputs_are_never_changed(backend: str) -> None:
    x, weight, residual = X.clone(), W.clone(), torch.randn(2, 4, 6, 5, 7)
    before = residual.clone()
    dk.spectral_conv(x, weight, activation="leaky_relu", residual=residual, backend=backend)
    assert torch.equal(x, X) and torch.equal(weight, W) and torch.equal(residual, before)


def test_use_backend_nests_and_restores() -> None:
    with dk.use_backend("reference"):
        assert "reference" in dk.explain("spectral_conv", X, W).splitlines()[0]
        with pytest.raises(NotImplementedError, match="cuda"), dk.use_backend("cuda"):
            dk.spectral_conv(X, W)
        assert torch.equal(dk.spectral_conv(X, W), dk.spectral_conv(X, W, backend="reference"))


def test_explain_names_every_backend_with_its_reason() -> None:
    lines = dk.explain("spectral_conv", X.double(), W).splitlines()
    assert lines[0].startswith("spectral_conv on cpu, torch.float64, precision fp32: reference")
    assert [line.replace("->", "  ").split()[0] for line in lines[1:]] == [
        "cpu",
        "reference",
        "cuda",
        "triton",
        "cupy",
    ]
    assert all(len(line.split()) > 1 for line in lines[1:])


def test_explain_tells_of_a_forced_backend_that_cannot_run() -> None:
    lines = dk.explain("spectral_conv", X, W, backend="cuda").splitlines()
    assert lines[0].endswith("cuda is asked for and cannot")
    assert dk.explain("spectral_conv", X[:0], W) == "no backend runs: the result is empty"


def test_use_backend_holds_for_its_own_thread_only() -> None:
    names = []
    with dk.use_backend("reference"):
        thread = threading.Thread(
            target=lambda: names.append(dk.explain("spectral_conv", X, W, backend=None))
        )
        thread.start()
        thread.join()
        first, second = dk.use_backend("cpu"), dk.use_backend("cpu")
        first.__enter__()
        second.__enter__()
        second.__exit__()
        first.__exit__()
        assert dk.explain("spectral_conv", X, W).splitlines()[0].endswith(": reference")
    expected = "cpu" if "cpu" in BACKENDS else "reference"
    assert names[0].splitlines()[0].endswith(f": {expected}")
