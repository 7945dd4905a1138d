"""Networks of EDM's and FDM's layout: the official numbers from the official state dicts."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("safetensors")

import safetensors.torch

import dsno_kernels as dk
from dsno_kernels.diffusion import EDM, FDM, VE, from_edm
from dsno_kernels.integrations import edm
from tests.diffusion_problems import golden
from tests.helpers import assert_close, rel_rms

# Some twenty layers of float32.
OFFICIAL = 2e-6
PROCESSES = {"ddpmpp": FDM(EDM(), 2.0), "ncsnpp": FDM(VE())}


def state(arch: str, prefix: str = "") -> dict[str, Tensor]:
    """Of the official preconditioner, whose names begin with "model."."""
    start = f"{arch}/state/"
    values = golden("fdm_networks.npz")
    return {
        prefix + k.removeprefix(start): v.clone() for k, v in values.items() if k.startswith(start)
    }


@pytest.mark.parametrize("arch", PROCESSES)
def test_golden_networks(arch: str) -> None:
    """The raw network, and the denoiser of its momentum process around it."""
    values = golden("fdm_networks.npz")
    x, sigma = values[f"{arch}/x"], values[f"{arch}/sigma"]
    network = edm.convert(state(arch))
    y = torch.tensor([2, 0, 1]) if network.label_dim else None
    one_hot = None if y is None else torch.eye(3)[y]
    with torch.no_grad():
        raw = network(x / (1 + sigma[:, None, None, None]), sigma.log() / 4, one_hot)
        assert_close(raw, values[f"{arch}/F"], OFFICIAL)
        denoiser = from_edm(network, process=PROCESSES[arch])
        assert_close(denoiser(x, sigma, y), values[f"{arch}/denoised"], OFFICIAL)
        if y is not None:
            told = denoiser(x, sigma, torch.full((3,), -1))
            assert_close(told, values[f"{arch}/denoised_no_class"], OFFICIAL)
        base = from_edm(network, process=PROCESSES[arch].base)  # c_in is what momentum changes
        assert rel_rms(base(x, sigma, y), values[f"{arch}/denoised"]) > 100 * OFFICIAL


def test_states_and_weights_of_any_precision() -> None:
    """A sampler's float64 state goes through float32 weights; bfloat16 weights work, too."""
    x = golden("fdm_networks.npz")["ddpmpp/x"].double()
    network = edm.convert(state("ddpmpp"))
    denoiser = from_edm(network, process=PROCESSES["ddpmpp"])
    with torch.no_grad():
        expected = denoiser(x, 0.7)
        assert expected.dtype == torch.float64
        assert_close(denoiser(x.float(), 0.7), expected, OFFICIAL)
        found = from_edm(network.bfloat16(), process=PROCESSES["ddpmpp"])(x, 0.7)
    assert_close(found, expected, 0.05)


def test_arguments_that_the_network_cannot_take() -> None:
    network = edm.convert(state("ncsnpp"))
    x = torch.zeros(2, network.config.image_channels, 8, 8)
    with pytest.raises(ValueError, match="augment_labels were given, but the network has none"):
        network(x, torch.zeros(2), augment_labels=torch.zeros(2, 9))
    with pytest.raises(ValueError, match="classes must be at least 0, got -1"):
        from_edm(network, classes=-1)


def test_the_shape_is_read_from_the_names() -> None:
    config = edm.convert(state("ddpmpp")).config
    assert (config.image_size, config.image_channels, config.channels) == (8, 2, 8)
    assert (config.channel_mult, config.num_blocks) == ((1, 2), 1)
    assert (config.attention_resolutions, config.num_classes) == ((4,), 3)
    assert (config.augment_dim, config.ncsnpp) == (9, False)
    assert edm.convert(state("ncsnpp")).config.channel_mult == (1, 2, 1)
    assert edm.convert(state("ncsnpp")).config.ncsnpp


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("kind", ["safetensors", "pt"])
def test_files(kind: str, prefix: str, tmp_path: Path) -> None:
    path, tensors = tmp_path / f"weights.{kind}", state("ddpmpp", prefix)
    if kind == "pt":
        torch.save(tensors, path)
    else:
        safetensors.torch.save_file(tensors, path)
    network = dk.integrations.edm.load(path)
    assert not network.training
    wanted = edm.convert(state("ddpmpp")).state_dict()
    assert all(torch.equal(value, wanted[name]) for name, value in network.state_dict().items())


class Runs:
    """What a pickle may do when it is opened."""

    opened = False

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return setattr, (Runs, "opened", True)


def test_a_pickle_of_objects_runs_nothing(tmp_path: Path) -> None:
    path = tmp_path / "network-snapshot.pkl"
    path.write_bytes(pickle.dumps({"ema": Runs()}, protocol=2))
    with pytest.raises(ValueError, match="no file of tensors alone, or damaged"):
        edm.load(path)
    torch.save({"ema": Runs()}, tmp_path / "weights.pt")
    with pytest.raises(ValueError, match=r"dk\.integrations\.edm says how"):
        edm.load(tmp_path / "weights.pt")
    assert not Runs.opened


def without(name: str) -> dict[str, Tensor]:
    tensors = state("ddpmpp")
    del tensors[name]
    return tensors


@pytest.mark.parametrize(
    ("tensors", "match"),
    [
        ({}, "the state dict holds no SongUNet"),
        ({"weight": torch.zeros(3)}, "holds no SongUNet of DDPM"),
        ({"ema": "weights"}, "holds no state dict of tensors"),
        ({3: torch.zeros(3)}, "holds no state dict of tensors"),
        (without("model.enc.8x8_conv.weight"), "holds no SongUNet"),
        (
            state("ddpmpp") | {"model.enc.8x8_conv.weight": torch.zeros(0, 2, 3, 3)},
            "holds no SongUNet",
        ),
        (
            state("ddpmpp") | {"model.enc.8x8_conv.weight": torch.zeros(2, 2, 3, 3)},
            "holds no SongUNet",
        ),
        (
            state("ddpmpp") | {"model.map_label.weight": torch.zeros(())},
            "map_label.weight",
        ),
        (
            state("ddpmpp") | {"model.enc.8x8_block0.conv1.weight": torch.zeros(())},
            "holds no SongUNet",
        ),
        (without("model.dec.8x8_block0.conv0.weight"), "dec.8x8_block0.conv0.weight"),
        (state("ddpmpp") | {"model.extra": torch.zeros(2)}, "extra"),
        (
            state("ddpmpp") | {"model.map_layer0.weight": torch.zeros(3, 8)},
            r"map_layer0\.weight has shape \(3, 8\)",
        ),
    ],
)
def test_state_dicts_that_do_not_fit(tensors: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        edm.convert(tensors)


def test_files_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        edm.load(tmp_path / "none.pt")
    with pytest.raises(ValueError, match="does not exist"):
        edm.load(tmp_path / "none.safetensors")


def test_a_process_without_a_preconditioner() -> None:
    with pytest.raises(TypeError, match="a VP, VE or EDM process is required"):
        from_edm(lambda x, c, y: x, process=dk.diffusion.FlowMatching())
