"""Checkpoints of the official project: both layouts, what is refused, and the way back."""

from __future__ import annotations

import argparse
import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import dsno_kernels as dk
from dsno_kernels.integrations import dsno
from dsno_kernels.models import DSNO, DSNOConfig
from tests.faults import full_disk
from tests.helpers import assert_close

GOLDEN = Path(__file__).parent / "golden"
MODEL = 1e-5  # as in test_models.py
SMALL = DSNOConfig(
    image_size=16,
    channels=32,
    channel_mult=(1, 1),
    num_res_blocks=1,
    attention_resolutions=(8,),
    embedding_dim=64,
)

Shapes = dict[str, tuple[int, ...]]

# The official networks, written down from their construction: R a residual block from one width to
# another, A attention, T a temporal layer.
CIFAR10 = (
    ["linear 256 1024", "linear 1024 1024", "conv 3 256"]
    + ["R 256 256", "T 256"] * 3
    + ["R 256 256"]
    + ["R 256 256", "A 256", "T 256"] * 3
    + ["R 256 256"]
    + ["R 256 256", "A 256", "T 256"] * 3
    + ["R 256 256", "A 256", "T 256", "R 256 256"]
    + ["R 512 256", "A 256", "T 256"] * 4
    + ["R 256 256"]
    + ["R 512 256", "A 256", "T 256"] * 4
    + ["R 256 256"]
    + ["R 512 256", "T 256"] * 4
    + ["norm 256", "conv 256 3"]
)
IMAGENET64 = (
    ["linear 192 768", "linear 768 768", "linear 1000 768", "conv 3 192"]
    + ["R 192 192", "T 192"] * 3
    + ["R 192 192"]
    + ["R 192 384", "A 384", "T 384"]
    + ["R 384 384", "A 384", "T 384"] * 2
    + ["R 384 384"]
    + ["R 384 576", "A 576", "T 576"]
    + ["R 576 576", "A 576", "T 576"] * 2
    + ["R 576 576"]
    + ["R 576 768", "A 768", "T 768"]
    + ["R 768 768", "A 768", "T 768"] * 2
    + ["R 768 768", "A 768", "T 768", "R 768 768"]
    + ["R 1536 768", "A 768", "T 768"] * 3
    + ["R 1344 768", "A 768", "T 768"]
    + ["R 768 768"]
    + ["R 1344 576", "A 576", "T 576"]
    + ["R 1152 576", "A 576", "T 576"] * 2
    + ["R 960 576", "A 576", "T 576"]
    + ["R 576 576"]
    + ["R 960 384", "A 384", "T 384"]
    + ["R 768 384", "A 384", "T 384"] * 2
    + ["R 576 384", "A 384", "T 384"]
    + ["R 384 384"]
    + ["R 576 192", "T 192"]
    + ["R 384 192", "T 192"] * 3
    + ["norm 192", "conv 192 3"]
)


def module_shapes(line: str, embedding: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of one of the official modules, in the order of its state dict."""
    kind, *widths = line.split()
    first, last = int(widths[0]), int(widths[-1])
    if kind == "linear":
        yield from {"weight": (last, first), "bias": (last,)}.items()
    elif kind == "conv":
        yield from {"weight": (last, first, 3, 3), "bias": (last,)}.items()
    elif kind == "norm":
        yield from {"weight": (first,), "bias": (first,)}.items()
    elif kind == "T":
        yield "t_conv.weights1", (first, first, 2, 2)
    elif kind == "A":
        yield from {"NINs.W": (first, 3 * first), "NINs.b": (3 * first,)}.items()
        yield from {"NIN_3.W": (first, first), "NIN_3.b": (first,)}.items()
        yield from {"GroupNorm_0.weight": (first,), "GroupNorm_0.bias": (first,)}.items()
    else:
        yield from {"GroupNorm_0.weight": (first,), "GroupNorm_0.bias": (first,)}.items()
        yield from {"Conv_0.weight": (last, first, 3, 3), "Conv_0.bias": (last,)}.items()
        yield from {"Dense_0.weight": (2 * last, embedding), "Dense_0.bias": (2 * last,)}.items()
        yield from {"GroupNorm_1.weight": (last,), "GroupNorm_1.bias": (last,)}.items()
        yield from {"Conv_1.weight": (last, last, 3, 3), "Conv_1.bias": (last,)}.items()
        if first != last:
            yield from {"NIN_0.W": (first, last), "NIN_0.b": (last,)}.items()


def layout(lines: list[str], embedding: int) -> Shapes:
    return {
        f"all_modules.{index}.{name}": shape
        for index, line in enumerate(lines)
        for name, shape in module_shapes(line, embedding)
    }


def golden() -> dict[str, Tensor]:
    with np.load(GOLDEN / "dsno_model.npz") as file:
        return {key: torch.from_numpy(file[key]) for key in file.files}


def golden_state() -> dict[str, Tensor]:
    return {k.removeprefix("state/"): v for k, v in golden().items() if k.startswith("state/")}


def official_file(path: Path, prefix: str = "", **changes: Any) -> Path:
    """A file as the official training writes it, its optimizer and schedulers included."""
    state = {prefix + key: tensor for key, tensor in golden_state().items()}
    layer = nn.Linear(3, 3)
    optimizer = torch.optim.Adam(layer.parameters(), lr=2e-4)
    warm_up = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.001, total_iters=10)
    decay = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones=[20, 30], gamma=0.5)
    scheduler = torch.optim.lr_scheduler.ChainedScheduler([warm_up, decay])
    layer(torch.ones(3)).sum().backward()
    optimizer.step()
    scheduler.step()
    content: dict[str, Any] = {
        "model": {key: tensor + 1.0 for key, tensor in state.items()},
        "ema": state,
        "args": argparse.Namespace(config="configs/cifar/tunet.yaml", seed=321, amp=False),
        "optim": optimizer.state_dict(),
        "scheduler": scheduler.state_dict(),
    }
    torch.save({k: v for k, v in (content | changes).items() if v is not None}, path)
    return path


@pytest.mark.parametrize(
    ("config", "lines", "embedding"),
    [(DSNOConfig.cifar10(), CIFAR10, 1024), (DSNOConfig.imagenet64(), IMAGENET64, 768)],
    ids=["cifar10", "imagenet64"],
)
def test_published_layouts_load_whole(config: DSNOConfig, lines: list[str], embedding: int) -> None:
    """Every key, shape and place of the official networks, without their gigabytes."""
    shapes = layout(lines, embedding)
    state = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    model = dsno._filled(config, state, "a file")
    assert {k: tuple(v.shape) for k, v in model.state_dict().items()} == shapes
    assert list(model.state_dict()) == list(shapes)
    key = list(shapes)[-1]
    with pytest.raises(ValueError, match=rf"{key} with shape \(3,\) is missing in it"):
        dsno._filled(config, {k: v for k, v in state.items() if k != key}, "a file")


@pytest.mark.parametrize("prefix", ["", "module."], ids=["plain", "of DDP"])
def test_a_file_of_the_official_layout_gives_the_golden_output(tmp_path: Path, prefix: str) -> None:
    path = official_file(tmp_path / "solver-model_final.pt", prefix)
    data = golden()
    model = dk.integrations.dsno.load(path, SMALL)
    assert not model.training
    assert_close(model(data["x"], data["logsnr"]), data["out"], MODEL)
    last_step = dsno.load(path, SMALL, which="model").state_dict()
    assert all(torch.equal(v, golden_state()[k] + 1.0) for k, v in last_step.items())


def test_a_loaded_network_trains(tmp_path: Path) -> None:
    model = dsno.load(official_file(tmp_path / "a.pt"), SMALL)
    data = golden()
    model(data["x"], data["logsnr"]).sum().backward()
    assert all(p.grad is not None and p.dtype == torch.float32 for p in model.parameters())


def test_half_precision_weights_load_as_float32(tmp_path: Path) -> None:
    half = {key: tensor.half() for key, tensor in golden_state().items()}
    model = dsno.load(official_file(tmp_path / "a.pt", ema=half), SMALL)
    assert all(torch.equal(v, half[k].float()) for k, v in model.state_dict().items())


def test_saved_files_are_of_the_official_layout(tmp_path: Path) -> None:
    model, averaged = DSNO(SMALL), DSNO(SMALL)
    dsno.save(model, tmp_path / "a.pt", ema=averaged)
    with torch.serialization.safe_globals([argparse.Namespace]):
        content = torch.load(tmp_path / "a.pt", weights_only=True)
    assert set(content) == {"model", "ema", "args"}
    assert list(content["ema"]) == list(golden_state())
    for which, network in (("model", model), ("ema", averaged)):
        loaded = dsno.load(tmp_path / "a.pt", SMALL, which=which).state_dict()
        assert all(torch.equal(v, loaded[k]) for k, v in network.state_dict().items())


def test_a_full_disk_leaves_the_earlier_file(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    path.write_bytes(b"earlier")
    with full_disk(), pytest.raises(OSError, match="File too large"):
        dsno.save(DSNO(SMALL), path)
    assert path.read_bytes() == b"earlier" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("config", "match"),
    [
        (
            dataclasses.replace(SMALL, embedding_dim=96),
            r"all_modules\.0\.weight has shape \(64, 32\) in it and \(96, 32\) in the network",
        ),
        (
            dataclasses.replace(SMALL, modes=1),
            r"all_modules\.4\.t_conv\.weights1 has shape \(32, 32, 2, 2\) in it and",
        ),
        (
            dataclasses.replace(SMALL, time_conv=False),
            r"all_modules\.4\.GroupNorm_0\.weight with shape \(32,\) is missing",
        ),
    ],
    ids=["width", "modes", "no temporal layers"],
)
def test_the_first_key_that_differs_is_named(
    tmp_path: Path, config: DSNOConfig, match: str
) -> None:
    path = official_file(tmp_path / "a.pt")
    with pytest.raises(ValueError, match=rf"a\.pt \(ema\) does not fit .*{match}"):
        dsno.load(path, config)


def test_a_key_too_many_is_named(tmp_path: Path) -> None:
    path = official_file(tmp_path / "a.pt", ema={**golden_state(), "extra.b": torch.ones(2)})
    with pytest.raises(ValueError, match=r"extra\.b with shape \(2,\) in it is not in the network"):
        dsno.load(path, SMALL)


def test_damaged_files_are_said_in_one_line(tmp_path: Path) -> None:
    whole = official_file(tmp_path / "whole.pt").read_bytes()
    for name, content in {
        "half": whole[: len(whole) // 2],
        "flipped": whole[:300] + bytes(200) + whole[500:],
        "empty": b"",
        "text": b"not a checkpoint\n" * 10,
    }.items():
        path = tmp_path / f"{name}.pt"
        path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"{name}\.pt is no checkpoint of PyTorch, or dam"):
            dsno.load(path, SMALL)
    with pytest.raises(FileNotFoundError):
        dsno.load(tmp_path / "none.pt", SMALL)


def test_other_content_is_said_in_one_line(tmp_path: Path) -> None:
    path = official_file(tmp_path / "a.pt", ema=None)
    with pytest.raises(ValueError, match=r"no dict 'ema' of tensors, only 'model', 'args', 'opt"):
        dsno.load(path, SMALL)
    torch.save([1, 2], path)
    with pytest.raises(ValueError, match=r"no dict 'ema' of tensors, only a list"):
        dsno.load(path, SMALL)
    with pytest.raises(ValueError, match=r"unknown weights 'EMA'; accepted: 'ema', 'model'"):
        dsno.load(path, SMALL, which="EMA")


def test_a_file_cannot_bring_code(tmp_path: Path) -> None:
    """What a file wants to call is refused by name, and not called."""
    marker = tmp_path / "ran"

    class MakesFolder:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(marker),)

    path = official_file(tmp_path / "a.pt", args=MakesFolder())
    with pytest.raises(ValueError, match=r"a\.pt wants \w+\.mkdir, which a file may not"):
        dsno.load(path, SMALL)
    assert not marker.exists()


def test_only_networks_are_saved(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="DSNO networks, got Linear"):
        dsno.save(nn.Linear(2, 2), tmp_path / "a.pt")  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())
