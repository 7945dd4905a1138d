"""What `swap_layers` recognizes, and the look-alikes that it leaves alone."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dsno_kernels as dk
from dsno_kernels import _swap_kernels, backends
from tests.doubles import (
    LAYERS,
    DsnoSpectralConv1d,
    DsnoTimeConv,
    FnoSpectralConv1d,
    Net,
    NeuralopSpectralConv,
    build,
)
from tests.helpers import BUDGETS, assert_close

# Original and kernel both round in float32: twice the budget of one.
FLOAT32 = 2 * BUDGETS["fp32"]

each_layer = pytest.mark.parametrize("name", LAYERS)


@each_layer
def test_layer_on_the_meta_device_is_recognized(name: str) -> None:
    layer, x = build(name)
    shape = layer(x).shape
    layer.to("meta")
    assert dk.swap_layers(layer) == 1
    assert layer(x.to("meta")).shape == shape


class ConjugateSpectralConv1d(FnoSpectralConv1d):
    def complex_weights(self) -> Tensor:
        return self.weights1.conj()


class LastSpectralConv1d(FnoSpectralConv1d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


class BiasedSpectralConv1d(DsnoSpectralConv1d):
    def __init__(self, in_ch: int, out_ch: int, modes1: int) -> None:
        super().__init__(in_ch, out_ch, modes1)
        self.extra = nn.Parameter(torch.zeros(out_ch, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.extra


def _patched() -> nn.Module:
    layer = DsnoSpectralConv1d(6, 6, 2)
    layer.forward = lambda x: x  # type: ignore[method-assign]
    return layer


def _factorized() -> nn.Module:
    layer = NeuralopSpectralConv(6, 6, 4)
    layer.weight = nn.Linear(2, 2)
    return layer


def _half() -> nn.Module:
    layer = NeuralopSpectralConv(6, 6, 4)
    layer.fno_block_precision = "half"
    return layer


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: ConjugateSpectralConv1d(6, 6, 2), "computes something else"),
        (lambda: LastSpectralConv1d(6, 4, 2), "does not take an input"),
        (lambda: BiasedSpectralConv1d(6, 6, 2), "lack: extra"),
        (_patched, "already replaced"),
        (_factorized, "not one plain dense"),
        (_half, "'half', not 'full'"),
    ],
    ids=["conjugate", "channels_last", "bias", "patched", "factorized", "half"],
)
def test_layers_that_compute_something_else_are_left_alone(
    make: Callable[[], nn.Module], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    layer = make()
    before = dict(layer.__dict__)
    with caplog.at_level(logging.INFO, logger="dsno_kernels.swap"):
        assert dk.swap_layers(nn.Sequential(layer)) == 0
    assert reason in caplog.text
    assert "'0'" in caplog.text
    assert layer.__dict__ == before


TIME_CONVS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "difference": lambda x, h: x - F.leaky_relu(h),
    "half": lambda x, h: x + 0.5 * F.leaky_relu(h),
    "linear": lambda x, h: x + h,
    "relu": lambda x, h: x + F.relu(h),
    "input_only": lambda x, h: x,
    "scaled": lambda x, h: 0.5**0.5 * (x + F.leaky_relu(h)),
    "dropout": lambda x, h: x + F.leaky_relu(F.dropout(h, 0.5)),
}


class OtherTimeConv(DsnoTimeConv):
    formula: Callable[[Tensor, Tensor], Tensor]

    def forward(self, x: Tensor) -> Tensor:
        return self.formula(x, self.t_conv(x))


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", TIME_CONVS)
def test_a_time_conv_with_another_formula_gets_only_its_convolution_swapped(
    name: str, dtype: torch.dtype, device: str
) -> None:
    layer = OtherTimeConv(64, 64, 2)
    layer.formula = TIME_CONVS[name]
    nn.init.uniform_(layer.t_conv.weights1, 0, 1 / 64**2)  # as the official layer starts
    layer.to(device, dtype)
    assert dk.swap_layers(layer) == 1
    assert "forward" not in layer.__dict__
    assert "forward" in layer.t_conv.__dict__
    if device == "cpu" and dtype == torch.float32 and name != "dropout":
        x = torch.randn(1, 4, 64, 3, 3)
        actual = layer(x)
        dk.restore_layers(layer)
        assert_close(actual, layer(x), FLOAT32)


def test_a_time_conv_at_the_official_initialization_is_recognized() -> None:
    layer = DsnoTimeConv(64, 64, 2)
    nn.init.uniform_(layer.t_conv.weights1, 0, 1 / 64**2)
    assert dk.swap_layers(layer) == 1
    assert "forward" in layer.__dict__


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_zero_weights_do_not_hide_another_formula(device: str) -> None:
    layer = ConjugateSpectralConv1d(6, 6, 2)
    nn.init.zeros_(layer.weights1)
    assert dk.swap_layers(layer.to(device)) == 0


@each_layer
def test_layer_with_zero_weights_is_recognized_and_keeps_them(name: str) -> None:
    layer, _ = build(name)
    for p in layer.parameters():
        nn.init.zeros_(p)
    versions = [p._version for p in layer.parameters()]
    assert dk.swap_layers(layer) == 1
    assert [p._version for p in layer.parameters()] == versions
    assert all(not p.any() for p in layer.parameters())


def test_float64_layers_are_left_to_the_original() -> None:
    assert dk.swap_layers(DsnoTimeConv(6, 6, 2).double()) == 0


def test_scripted_modules_are_passed_over() -> None:
    scripted = torch.jit.script(nn.Sequential(nn.Linear(2, 2), nn.ReLU()))
    model = nn.Sequential(scripted, DsnoTimeConv(6, 6, 2))
    assert dk.swap_layers(model) == 1
    assert dk.restore_layers(model) == 1
    assert dk.swap_layers(scripted) == 0


def test_the_trial_leaves_the_forced_backend_of_the_process_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[tuple[str, Any]] = []
    original = _swap_kernels.spectral_conv

    def spy(x: Tensor, weight: Tensor, **kwargs: Any) -> Tensor:
        seen.append((backends.forced(), kwargs["backend"]))
        return original(x, weight, **kwargs)

    monkeypatch.setattr(_swap_kernels, "spectral_conv", spy)
    before = backends.forced()
    dk.swap_layers(DsnoTimeConv(6, 6, 2))
    assert seen == [(before, "reference")] * 2


def test_layers_of_this_library_are_not_swapped() -> None:
    assert (
        dk.swap_layers(nn.Sequential(dk.nn.TimeConv(4, 4, 2), dk.nn.SpectralConv1d(4, 4, 2))) == 0
    )


def test_swapping_draws_no_random_numbers_and_calls_no_hooks() -> None:
    model = Net()
    for module in model.modules():
        if not isinstance(module, DsnoSpectralConv1d):
            module.register_forward_hook(lambda *_: pytest.fail("the swap ran a hook"))
    state = torch.get_rng_state()
    dk.swap_layers(model)
    assert torch.equal(torch.get_rng_state(), state)


def test_what_is_not_a_module_is_refused() -> None:
    for function in (dk.swap_layers, dk.restore_layers):
        with pytest.raises(TypeError, match=r"must be a torch\.nn\.Module, got list"):
            function([])  # type: ignore[arg-type]


def test_real_neuraloperator() -> None:
    neuralop = pytest.importorskip("neuralop.layers.spectral_convolution", exc_type=ImportError)
    layer, x = neuralop.SpectralConv(5, 7, (8,)), torch.randn(3, 5, 16)
    expected = layer(x)
    assert dk.swap_layers(layer) == 1
    assert_close(layer(x), expected, FLOAT32)
