"""The reference DSNO: golden output and keys, published sizes, kernels against plain PyTorch."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import dsno_kernels as dk
from dsno_kernels.models import DSNO, DSNOConfig, logsnr_schedule
from dsno_kernels.models.eager import EagerTimeConv
from tests.helpers import assert_close

GOLDEN = Path(__file__).parent / "golden"

# About 20 layers in a row, each within the float32 budget of 1e-6 of the one in plain PyTorch.
MODEL = 1e-5
# The golden output is a bias of 0.03 with an image of 5e-6 on it: half a unit in the last place of
# float32 there, 9e-10, is 2e-4 of the image.
IMAGE = 2e-4
# Where the pre-activation of a temporal layer rounds to the other side of zero, the gradient of one
# element changes by 99 %: a few flips among 1e5 elements stay under 1e-2.
MODEL_GRADIENT = 2e-2

OF_GOLDEN = DSNOConfig(
    image_size=16,
    channels=32,
    channel_mult=(1, 1),
    num_res_blocks=1,
    attention_resolutions=(8,),
    embedding_dim=64,
)
TINY = dataclasses.replace(OF_GOLDEN, image_size=8, attention_resolutions=(4,))
TINY_CLASSES = dataclasses.replace(TINY, channel_mult=(1, 2), head_dim=16, num_classes=5)


def golden() -> dict[str, Tensor]:
    with np.load(GOLDEN / "dsno_model.npz") as file:
        return {key: torch.from_numpy(file[key]) for key in file.files}


def golden_state() -> dict[str, Tensor]:
    return {k.removeprefix("state/"): v for k, v in golden().items() if k.startswith("state/")}


def jittered(model: nn.Module) -> nn.Module:
    """The model with noise on every parameter, so that the layers that start near zero count."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            fan = p[0].numel() if p.ndim > 1 else p.numel()
            p += 0.7 * fan**-0.5 * torch.randn(p.shape, generator=generator)
    return model


def inputs(config: DSNOConfig, T: int = 4) -> tuple[Tensor, Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(1)
    size = config.image_size
    x = torch.randn(2, config.image_channels, size, size, generator=generator)
    y = torch.tensor([3, 0]) if config.num_classes else None
    return x, logsnr_schedule(torch.linspace(0.9, 0.0, T)), y


@pytest.mark.parametrize("kernels", [True, False], ids=["kernels", "eager"])
def test_golden_output(kernels: bool) -> None:
    data = golden()
    model = DSNO(OF_GOLDEN, kernels=kernels).eval()
    model.load_state_dict(golden_state(), strict=True)
    out = model(data["x"], data["logsnr"])
    assert_close(out, data["out"], MODEL)
    # The bias of the last convolution makes up most of that: compare the image too.
    bias = data["state/all_modules.25.bias"][:, None, None]
    assert_close(out - bias, data["out"] - bias, IMAGE)


def test_state_dict_keys_and_order_are_the_official_ones() -> None:
    expected = (GOLDEN / "dsno_model_keys.txt").read_text().split()
    assert list(DSNO(TINY).state_dict()) == expected
    assert list(DSNO(TINY, kernels=False).state_dict()) == expected


def test_logsnr_schedule() -> None:
    data = golden()
    assert_close(logsnr_schedule(torch.linspace(0.9, 0.0, 4)), data["logsnr"], 1e-6)
    ends = logsnr_schedule(torch.tensor([0.0, 1.0], dtype=torch.float64), min=-15.0, max=10.0)
    assert_close(ends, torch.tensor([10.0, -15.0]), 1e-9)


@pytest.mark.parametrize(
    ("config", "layers", "parameters", "image"),
    [
        (DSNOConfig.cifar10(), 22, 65_771_267, (3, 32, 32)),
        (DSNOConfig.imagenet64(), 29, 329_225_091, (3, 64, 64)),
    ],
    ids=["cifar10", "imagenet64"],
)
def test_published_networks(
    config: DSNOConfig, layers: int, parameters: int, image: tuple[int, ...]
) -> None:
    with torch.device("meta"):
        model = DSNO(config)
        x, logsnr = torch.randn(2, *image), torch.zeros(4)
        y = torch.zeros(2, dtype=torch.long) if config.num_classes else None
    assert sum(isinstance(module, dk.nn.TimeConv) for module in model.modules()) == layers
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert model(x, logsnr, y).shape == (2, 4, *image)


@pytest.mark.parametrize("T", [3, 4], ids=["odd", "even"])
@pytest.mark.parametrize("config", [TINY, TINY_CLASSES], ids=["plain", "classes"])
def test_kernels_and_eager_agree_in_value_and_gradient(config: DSNOConfig, T: int) -> None:
    eager = jittered(DSNO(config, kernels=False))
    kernels = DSNO(config, kernels=True)
    kernels.load_state_dict(eager.state_dict(), strict=True)
    x, logsnr, y = inputs(config, T)
    out, expected = kernels(x, logsnr, y), eager(x, logsnr, y)
    assert_close(out, expected, MODEL)
    frames = expected.detach()
    assert (frames[:, 1:] - frames[:, :-1]).std() > 0.01 * frames.std()  # times are told apart
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
    grads = torch.autograd.grad(out, list(kernels.parameters()), cotangent)
    expected_grads = torch.autograd.grad(expected, list(eager.parameters()), cotangent)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        assert_close(grad, expected_grad, MODEL_GRADIENT)


def test_eager_model_can_be_swapped_and_restored() -> None:
    model = jittered(DSNO(TINY, kernels=False)).eval()
    x, logsnr, _ = inputs(TINY)
    expected = model(x, logsnr)
    count = sum(isinstance(module, EagerTimeConv) for module in model.modules())
    with dk.swapped(model) as swapped:
        assert swapped == count == 7
        assert_close(model(x, logsnr), expected, MODEL)
        assert_close(copy.deepcopy(model)(x, logsnr), expected, MODEL)
    assert torch.equal(model(x, logsnr), expected)


def test_times_mix_only_through_the_temporal_layers() -> None:
    x, logsnr, _ = inputs(TINY)
    other = logsnr.clone()
    other[0] = 5.0
    for config, mixes in ((TINY, True), (dataclasses.replace(TINY, time_conv=False), False)):
        model = jittered(DSNO(config)).eval()
        same = torch.equal(model(x, logsnr)[:, 1:], model(x, other)[:, 1:])
        assert same is not mixes


def test_labels_and_one_hot_rows_mean_the_same() -> None:
    model = jittered(DSNO(TINY_CLASSES)).eval()
    x, logsnr, y = inputs(TINY_CLASSES)
    assert y is not None
    out = model(x, logsnr, y)
    assert torch.equal(out, model(x, logsnr, y.to(torch.int32)))
    assert torch.equal(out, model(x, logsnr, nn.functional.one_hot(y, 5).float()))
    assert not torch.equal(out, model(x, logsnr, y + 1))


def test_no_class_is_a_row_of_zeros() -> None:
    model = jittered(DSNO(TINY_CLASSES)).eval()
    x, logsnr, _ = inputs(TINY_CLASSES)
    rows = torch.tensor([[0.0, 0, 0, 0, 0], [0, 0, 1, 0, 0]])
    assert torch.equal(model(x, logsnr, torch.tensor([-1, 2])), model(x, logsnr, rows))
    for wrong in (-2, 5):
        with pytest.raises(RuntimeError, match="Class values"):
            model(x, logsnr, torch.tensor([0, wrong]))


def test_predict_noise_returns_the_difference() -> None:
    model = jittered(DSNO(TINY)).eval()
    other = DSNO(dataclasses.replace(TINY, predict_noise=True)).eval()
    other.load_state_dict(model.state_dict())
    x, logsnr, _ = inputs(TINY)
    assert_close(other(x, logsnr), (x[:, None] - model(x, logsnr)).detach(), MODEL)


def test_initialization_is_that_of_ddpm() -> None:
    state = DSNO(TINY).state_dict()
    weight = state["all_modules.3.Conv_0.weight"]
    # Uniform on +-b with b**2 = 6 / (fan_in + fan_out), both fans 32 * 9.
    bound = (6 / (2 * 32 * 9)) ** 0.5
    assert 0.99 * bound < weight.abs().max() <= bound
    for key in ("all_modules.3.Conv_1.weight", "all_modules.7.NIN_3.W", "all_modules.25.weight"):
        assert state[key].abs().max() < 1e-5
    nin = state["all_modules.13.NIN_0.W"]
    assert nin.abs().max() <= (0.1 * 6 / (64 + 32)) ** 0.5
    assert not state["all_modules.0.bias"].any()


def test_channels_last_weights_and_autocast_run() -> None:
    model = jittered(DSNO(TINY)).eval()
    x, logsnr, _ = inputs(TINY)
    expected = model(x, logsnr)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    assert_close(model(x, logsnr), expected, MODEL)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(x, logsnr)
    # Some 20 layers whose operands have 8 bits of mantissa.
    assert_close(out, expected, 5e-2)


def test_model_in_bfloat16_runs() -> None:
    model = jittered(DSNO(TINY)).eval()
    x, logsnr, _ = inputs(TINY)
    expected = model(x, logsnr)
    out = model.to(torch.bfloat16)(x.bfloat16(), logsnr)
    assert out.dtype == torch.bfloat16
    # As above, and the weights and every tensor between the layers are rounded too.
    assert_close(out, expected, 1e-1)


def test_compiles_without_a_graph_break() -> None:
    torch._dynamo.reset()
    model = jittered(DSNO(TINY)).eval()
    x, logsnr, _ = inputs(TINY)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        assert_close(compiled(x, logsnr), model(x, logsnr), MODEL)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"channels": 48}, r"multiple of 32"),
        ({"dropout": 2.0}, r"dropout must be in \[0, 1\), got 2\.0"),
        ({"channel_mult": ()}, r"channel_mult"),
        ({"image_size": 15}, r"cannot be halved"),
        ({"num_heads": 3}, r"32 channels do not split into 3 heads"),
        ({"logsnr_input": "linear"}, r"accepted: 'inv_cos', 'sigmoid'"),
        ({"modes": 0}, r"modes must be at least 1"),
    ],
    ids=["groups", "dropout", "levels", "size", "heads", "logsnr_input", "modes"],
)
def test_bad_configurations_are_named(changes: dict[str, object], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        dataclasses.replace(TINY, **changes)


def test_bad_inputs_are_named() -> None:
    x, logsnr, _ = inputs(TINY)
    plain, classes = DSNO(TINY), DSNO(TINY_CLASSES)
    label = torch.tensor([1, 2])
    with pytest.raises(ValueError, match=r"x must have shape \(B, 3, 8, 8\), got \(2, 3, 8, 4\)"):
        plain(x[..., :4], logsnr)
    with pytest.raises(ValueError, match=r"logsnr must have shape \(T,\)"):
        plain(x, logsnr[None])
    with pytest.raises(ValueError, match=r"2 modes need at least 2 times, got 1"):
        plain(x, logsnr[:1])
    with pytest.raises(ValueError, match=r"has no classes"):
        plain(x, logsnr, label)
    with pytest.raises(ValueError, match=r"pass y, labels in 0\.\.4"):
        classes(x, logsnr)
    with pytest.raises(ValueError, match=r"y must have shape \(2,\)"):
        classes(x, logsnr, label[:1])
