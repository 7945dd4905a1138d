"""The student: its start from a teacher, its loss, and the command from data to model file."""

from __future__ import annotations

import dataclasses
import sys
import types
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dsno_kernels.models import DSNO, DSNOConfig, EDMDenoiser, logsnr_schedule
from dsno_kernels.training import trajectory_loss
from dsno_kernels.training.errors import CommandError
from dsno_kernels.training.from_teacher import initialize_from_teacher
from dsno_kernels.training.trajectory_loss import StudentTask, frame_weights
from dsno_kernels.training.trajectory_source import Source
from tests.helpers import FLOAT64, assert_close

TINY = DSNOConfig(
    image_size=8,
    image_channels=1,
    channels=32,
    channel_mult=(1, 1),
    num_res_blocks=1,
    attention_resolutions=(4,),
    embedding_dim=64,
)
TEACHER = dataclasses.replace(TINY, time_conv=False)


def drawn(model: nn.Module, seed: int = 0) -> nn.Module:
    """The model with random numbers for all weights, so that none is near zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            fan = p[0].numel() if p.ndim > 1 else p.numel()
            p.copy_(0.7 * fan**-0.5 * torch.randn(p.shape, generator=generator))
    return model


class MadeUp:
    """Random frames in the place of a `TrajectoryDataset`."""

    def __init__(self, N: int, T: int, labels: bool) -> None:
        self.frames = torch.randn(N, 1 + T, 1, 8, 8, generator=torch.Generator().manual_seed(1))
        self.labels = torch.arange(N) if labels else None
        self.shape, self.checksum = tuple(self.frames.shape[1:]), "00"

    def __len__(self) -> int:
        return len(self.frames)

    def batch(self, index: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.frames[index], None if self.labels is None else self.labels[index]


def made_up(N: int = 6, T: int = 4, labels: bool = False, **options: Any) -> Source:
    logsnr = logsnr_schedule(torch.linspace(0.9, 0.0, T))
    return Source(MadeUp(N, T, labels), logsnr, torch.device("cpu"), **options)


@pytest.mark.parametrize("kernels", [True, False], ids=["kernels", "eager"])
def test_the_student_begins_as_the_teacher(kernels: bool) -> None:
    """All but the temporal layers is the teacher's, and without them the two are one function."""
    teacher = drawn(DSNO(TEACHER))
    student = DSNO(TINY, kernels=kernels)
    before = {k: v.clone() for k, v in student.state_dict().items()}
    copied, left = initialize_from_teacher(student, EDMDenoiser(teacher))  # type: ignore[arg-type]
    assert left == [key for key in before if "t_conv" in key] and len(left) == 7
    assert sorted(copied + left) == sorted(before) and len(copied) == len(teacher.state_dict())
    assert all(torch.equal(student.state_dict()[key], before[key]) for key in left)
    plain = DSNO(TEACHER, kernels=kernels).eval()
    assert initialize_from_teacher(plain, student)[1] == []  # passes over temporal layers
    noise, _, _ = made_up().batch(torch.arange(3))
    logsnr = made_up().logsnr
    assert_close(plain(noise, logsnr), teacher.eval()(noise, logsnr), 1e-5)


def test_other_shapes_and_kinds_of_weights_are_left() -> None:
    """A conditional student of an unconditional teacher with another image size and width."""
    teacher = drawn(DSNO(TEACHER))
    config = dataclasses.replace(TINY, num_classes=3, image_channels=3, embedding_dim=96)
    copied, left = initialize_from_teacher(DSNO(config), teacher)  # type: ignore[arg-type]
    index = {name.split(".")[1] for name in left if "t_conv" not in name}
    assert {"0", "1", "2"} <= index  # both embeddings and the classes'
    assert "all_modules.3.weight" in left and "all_modules.3.bias" in copied  # the first image
    assert any("Dense_0.weight" in name for name in left)
    assert not any("Dense_0.weight" in name for name in copied)


@pytest.mark.parametrize("wrong", ["student", "teacher"])
def test_only_networks_are_initialized(wrong: str) -> None:
    models = {"student": DSNO(TINY), "teacher": DSNO(TEACHER), wrong: nn.Linear(2, 2)}
    with pytest.raises(TypeError, match=f"{wrong} must be a DSNO"):
        initialize_from_teacher(**models)  # type: ignore[arg-type]


def test_frame_weights_are_the_official_ones_up_to_scale() -> None:
    logsnr = torch.tensor([-20.0, -1.0, 3.0, 20.0], dtype=torch.float64)
    official = torch.exp(logsnr).sqrt().clamp(1.0, 10000.0)
    assert_close(frame_weights(logsnr), official / official.sum(), FLOAT64)
    limited = frame_weights(logsnr, limit=2.0)
    assert_close(limited / limited[0], torch.tensor([1.0, 1.0, 2.0, 2.0]), FLOAT64)


class Shifted(nn.Module):
    """A stand-in network: state i is the noise plus i, and the label."""

    def forward(self, x: Tensor, logsnr: Tensor, y: Tensor | None) -> Tensor:
        shift = torch.arange(len(logsnr))[:, None, None, None]
        return x[:, None] + shift + (0 if y is None else y[:, None, None, None, None])


@pytest.mark.parametrize(("name", "power"), [("l1", 1), ("l2", 2)])
@pytest.mark.parametrize("labels", [False, True], ids=["plain", "labels"])
def test_the_loss_weighs_the_mean_difference_of_each_time(
    name: str, power: int, labels: bool
) -> None:
    source = made_up(labels=labels)
    task = StudentTask(source, trajectory_loss.distance(name, 8), weight_limit=3.0)
    index = torch.tensor([4, 1, 4])
    loss = task.loss(Shifted(), {"index": index})
    weights = torch.exp(0.5 * source.logsnr.double()).clamp(1, 3)
    expected = 0.0
    for i in range(4):
        for n in index.tolist():
            noise, *states = source.dataset.frames[n].double()
            made = noise + i + (n if labels else 0)
            each = (made - states[i]).abs() ** power
            expected += float(weights[i] / weights.sum() * each.mean() / 3)
    assert float(loss) == pytest.approx(expected, rel=1e-5)


def test_batches_are_drawn_from_all_samples() -> None:
    task = StudentTask(made_up(N=5))
    drawn = task.draw(torch.Generator().manual_seed(0), 200)["index"]
    assert drawn.shape == (200,) and set(drawn.tolist()) == set(range(5))
    again = task.draw(torch.Generator().manual_seed(0), 200)["index"]
    assert torch.equal(drawn, again)


def test_lpips_is_that_of_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each frame goes to it as an RGB image; its values are averaged a time."""
    monkeypatch.setitem(sys.modules, "lpips", None)
    with pytest.raises(CommandError, match=r"--loss lpips needs the package lpips; run: pip inst"):
        trajectory_loss.distance("lpips", 32)

    class LPIPS(nn.Module):
        def __init__(self, net: str, verbose: bool) -> None:
            super().__init__()
            assert net == "vgg"
            self.features = nn.Conv2d(3, 3, 1, bias=False)
            nn.init.dirac_(self.features.weight)  # which autocast would round to bfloat16

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            assert a.shape[1] == 3
            return (self.features(a) - self.features(b)).square().mean(dim=(1, 2, 3), keepdim=True)

    package = types.ModuleType("lpips")
    package.LPIPS = LPIPS  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "lpips", package)
    with pytest.raises(CommandError, match="images of at least 16x16 pixels, these are 8x8"):
        trajectory_loss.distance("lpips", 8)
    perceptual = trajectory_loss.distance("lpips", 32)
    noise, states, _ = made_up().batch(torch.arange(6))
    made = Shifted()(noise, made_up().logsnr, None)
    with torch.autocast("cpu", torch.bfloat16):
        found = perceptual(made, states)
    assert_close(found, trajectory_loss.l2(made, states), 1e-6)


@pytest.mark.parametrize("labels", [False, True], ids=["plain", "labels"])
def test_held_and_read_batches_are_the_same(labels: bool) -> None:
    index = torch.tensor([5, 0, 5, 2])
    held, read = (made_up(labels=labels, held=held) for held in (1 << 20, 0))
    assert held._held is not None and read._held is None
    for ours, other in zip(held.batch(index), read.batch(index), strict=True):
        assert (ours is None and other is None) or torch.equal(ours, other)  # type: ignore[arg-type]
    assert held.classes == read.classes == (6 if labels else 0)
