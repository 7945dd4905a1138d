"""The layers: golden values of the official ones, dtypes, state, training wrappers."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import dsno_kernels as dk
from dsno_kernels import backends
from tests.helpers import BUDGETS, IO_BUDGET, assert_close

GOLDEN = Path(__file__).parent / "golden" / "dsno_layer.npz"

# Golden values are float32 themselves: their rounding adds to ours, each within the budget.
GOLDEN_FLOAT32 = 2 * BUDGETS["fp32"]

CPU_BACKENDS = ("reference", "cpu")


def golden(case: str) -> dict[str, Tensor]:
    with np.load(GOLDEN) as file:
        return {
            key.split("/")[1]: torch.from_numpy(file[key])
            for key in file.files
            if key.startswith(case + "/")
        }


def require(backend: str) -> None:
    for op in ("spectral_conv", "spectral_conv_weight_grad"):
        reason = backends.unsupported(
            backend, backends.Request(op, torch.device("cpu"), torch.float32)
        )
        if reason:
            pytest.skip(f"backend {backend}: {reason}")


def official_time_conv(x: Tensor, weight: Tensor) -> Tensor:
    """The official layer, in the dtype of x."""
    spectrum = torch.fft.rfft(x, dim=1)[:, : weight.shape[2]]
    spectrum = torch.einsum("bkihw,iok->bkohw", spectrum, torch.view_as_complex(weight))
    return x + F.leaky_relu(torch.fft.irfft(spectrum, n=x.shape[1], dim=1), 0.01)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("case", ["T5K3C6", "T4K2C8"])
def test_time_conv_gives_the_golden_values_and_gradients(case: str, backend: str) -> None:
    require(backend)
    data = golden(case)
    channels, _, modes, _ = data["weights1"].shape
    layer = dk.nn.TimeConv(channels, channels, modes)
    layer.load_state_dict({"t_conv.weights1": data["weights1"]})
    x = data["x"].requires_grad_()
    with dk.use_backend(backend):
        assert_close(layer.t_conv(x), data["spectral"], GOLDEN_FLOAT32)
        y = layer(x)
        assert_close(y, data["y"], GOLDEN_FLOAT32)
        y.backward(data["gy"])
    assert x.grad is not None
    assert layer.t_conv.weights1.grad is not None
    assert_close(x.grad, data["gx"], GOLDEN_FLOAT32)
    assert_close(layer.t_conv.weights1.grad, data["gw"], GOLDEN_FLOAT32)


def test_state_dict_is_that_of_the_official_layers() -> None:
    def shapes(module: torch.nn.Module) -> dict[str, tuple[int, ...]]:
        return {key: tuple(value.shape) for key, value in module.state_dict().items()}

    assert shapes(dk.nn.SpectralConv1d(3, 5, 2)) == {"weights1": (3, 5, 2, 2)}
    assert shapes(dk.nn.TimeConv(3, 3, 2)) == {"t_conv.weights1": (3, 3, 2, 2)}
    assert shapes(dk.nn.TimeConv(3, 5, 2, with_nin=True)) == {
        "t_conv.weights1": (3, 5, 2, 2),
        "nin.W": (3, 5),
        "nin.b": (5,),
    }


def test_weights_start_uniform_below_one_over_channels() -> None:
    weights = dk.nn.SpectralConv1d(16, 32, 3).weights1
    scaled = weights.detach() * 16 * 32
    assert scaled.min() >= 0
    assert scaled.max() <= 1
    # Mean of 3072 uniform values: 1/2 with a standard deviation of 0.0052.
    assert abs(scaled.mean().item() - 0.5) < 0.03


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_input_gives_float32_as_the_official_layer(dtype: torch.dtype) -> None:
    layer = dk.nn.TimeConv(6, 6, 2)
    x = torch.randn(2, 5, 6, 3, 5).to(dtype)
    y = layer(x)
    assert y.dtype == torch.float32
    # Exact input values, float32 arithmetic: the float32 budget, not that of the dtype.
    assert_close(y, official_time_conv(x.double(), layer.t_conv.weights1.double()), BUDGETS["fp32"])


def test_autocast_changes_nothing() -> None:
    layer = dk.nn.TimeConv(6, 6, 3)
    x = torch.randn(2, 5, 6, 3, 5)
    expected = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        actual = layer(x)
    assert actual.dtype == torch.float32
    assert torch.equal(actual, expected)


def test_module_in_bfloat16_runs_and_trains() -> None:
    layer = dk.nn.TimeConv(6, 6, 2).to(torch.bfloat16)
    x = torch.randn(2, 4, 6, 3, 5, dtype=torch.bfloat16, requires_grad=True)
    y = layer(x)
    assert y.dtype == torch.bfloat16
    assert layer(x.float()).dtype == torch.float32
    assert_close(
        y,
        official_time_conv(x.detach().double(), layer.t_conv.weights1.detach().double()),
        IO_BUDGET,
    )
    y.sum().backward()
    assert layer.t_conv.weights1.grad is not None
    assert layer.t_conv.weights1.grad.dtype == torch.bfloat16
    assert x.grad is not None
    assert x.grad.dtype == torch.bfloat16


def test_module_in_float64_stays_float64() -> None:
    layer = dk.nn.TimeConv(3, 3, 3).double()
    x = torch.randn(1, 5, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    assert layer(x).dtype == torch.float64
    assert torch.autograd.gradcheck(layer, (x,))


def test_nin_projects_the_residual() -> None:
    layer = dk.nn.TimeConv(3, 7, 2, with_nin=True)
    assert layer.nin is not None
    x = torch.randn(2, 4, 3, 5, 3)
    expected = torch.einsum("btchw,co->btohw", x, layer.nin.W) + layer.nin.b[:, None, None]
    expected = expected + F.leaky_relu(layer.t_conv(x), 0.01)
    assert_close(layer(x), expected.detach(), BUDGETS["fp32"])
    assert_close(layer.nin(x[:, 0]), layer.nin(x)[:, 0], BUDGETS["fp32"])


@pytest.mark.parametrize(
    ("shape", "time_dim", "channel_dim"),
    [((3, 6, 9), 2, 1), ((3, 9, 6), 1, 2), ((2, 6, 9, 3, 5), 2, 1), ((2, 3, 5, 6, 9), -1, -2)],
    ids=["BCL", "BLC", "BCTHW", "BHWCT"],
)
def test_axes_can_be_named(shape: tuple[int, ...], time_dim: int, channel_dim: int) -> None:
    layer = dk.nn.SpectralConv1d(6, 4, 3, time_dim=time_dim, channel_dim=channel_dim)
    x = torch.randn(shape)
    moved = x.movedim((time_dim, channel_dim), (-1, -2)).double()
    weight = torch.view_as_complex(layer.weights1.detach().double())
    expected = torch.fft.irfft(
        torch.einsum("...ik,iok->...ok", torch.fft.rfft(moved)[..., :3], weight), n=9
    )
    assert_close(layer(x).movedim((time_dim, channel_dim), (-1, -2)), expected, BUDGETS["fp32"])


def test_precision_option_reaches_the_op() -> None:
    layer = dk.nn.TimeConv(4, 4, 2, precision="tf32")
    x = torch.randn(2, 4, 4, 3, 3)
    assert_close(
        layer(x),
        official_time_conv(x.double(), layer.t_conv.weights1.detach().double()),
        BUDGETS["tf32"],
    )
    assert "tf32" in repr(layer)


def test_copies_are_independent() -> None:
    layer = dk.nn.TimeConv(4, 4, 2)
    x = torch.randn(2, 4, 4, 3, 3)
    expected = layer(x).detach()
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x), expected)
        torch.nn.init.zeros_(other.t_conv.weights1)
        assert torch.equal(other(x), x)
    assert torch.equal(layer(x), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compiles_without_a_graph_break(dtype: torch.dtype) -> None:
    torch._dynamo.reset()
    layer = dk.nn.TimeConv(4, 4, 2)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x = torch.randn(2, 4, 4, 3, 5).to(dtype).requires_grad_()
    y = compiled(x)
    assert torch.equal(y, layer(x))
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert grad.dtype == dtype


def test_bad_sizes_are_named() -> None:
    with pytest.raises(ValueError, match=r"modes must be at least 1, got 0"):
        dk.nn.SpectralConv1d(3, 3, 0)
    with pytest.raises(ValueError, match=r"modes must be at least 1, got 0"):
        dk.nn.TimeConv(3, 4, 0)
    with pytest.raises(ValueError, match=r"with_nin=True"):
        dk.nn.TimeConv(3, 4, 2)
    with pytest.raises(ValueError, match=r"unknown precision 'fp8'"):
        dk.nn.TimeConv(3, 3, 2, precision="fp8")
    with pytest.raises(ValueError, match=r"modes .*must be in 1\.\.2 for 3 time points"):
        dk.nn.TimeConv(3, 3, 3)(torch.randn(1, 3, 3, 2, 2))


@pytest.mark.parametrize("size", [2.5, 2.0, True, "2", None])
def test_sizes_that_are_not_integers_are_refused(size: object) -> None:
    with pytest.raises(TypeError, match=r"^modes must be an integer, got .*$"):
        dk.nn.SpectralConv1d(3, 3, size)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"^in_channels must be an integer, got .*$"):
        dk.nn.TimeConv(size, 3, 2)  # type: ignore[arg-type]
    dk.nn.TimeConv(np.int64(3), 3, np.int32(2))  # type: ignore[arg-type]


def test_model_without_a_configuration_is_refused() -> None:
    with pytest.raises(TypeError, match=r"^config must be a DSNOConfig, got NoneType$"):
        dk.models.DSNO(None)  # type: ignore[arg-type]
