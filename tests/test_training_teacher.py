"""The command `train teacher`: its loss, what it writes, and what it says to bad input."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("safetensors")
pytest.importorskip("tqdm")
pytest.importorskip("matplotlib")

import dsno_kernels as dk
from dsno_kernels import commands
from dsno_kernels.diffusion import EDM, FDM, VE, Preconditioner, Process, VPLinear
from dsno_kernels.diffusion.momentum import family
from dsno_kernels.models import EDMDenoiser
from dsno_kernels.models.files import read_tensors, write_tensors
from dsno_kernels.training.images import Images
from dsno_kernels.training.teacher import P_MEAN, P_STD, TeacherTask
from dsno_kernels.training.weight_warm_up import WeightWarmUp
from tests.diffusion_problems import golden
from tests.helpers import assert_close
from tests.training_runs import losses

# Sums of float32.
LOSS = 1e-5
# Much noise, where only the class tells the images apart.
LEARNING = "--steps 80 --warm-up 5 --learning-rate 5e-3"
QUICK = "--device cpu --batch 8 --channel-mult 1 --embedding 32 --learning-rate 1e-3"


class Constant(nn.Module):
    """A network that returns its parameter everywhere, and keeps what it saw."""

    def __init__(self, value: float = 0.25) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.tensor(value))

    def forward(self, x: Tensor, logsnr: Tensor, y: Tensor | None) -> Tensor:
        self.seen = x, logsnr, y
        return self.value.expand(len(x), 1, *x.shape[1:])


def two_images() -> Images:
    images = torch.stack([torch.zeros(1, 2, 2), torch.ones(1, 2, 2)])
    return Images(images, torch.tensor([3, 5]))


PART = {
    "index": torch.tensor([0, 1, 1]),
    "sigma": torch.tensor([0.1, 1.0, 7.0]),
    "noise_seed": torch.tensor([5, 6, 5]),
    "told": torch.tensor([True, True, True]),
    "update": torch.tensor([3, 3, 3]),
}


def task(process: Process = EDM(), **options: Any) -> TeacherTask:  # noqa: B008
    return TeacherTask(two_images(), Preconditioner(process, P_MEAN, P_STD), **options)


@pytest.mark.parametrize("momentum", [False, True], ids=["base", "momentum"])
@pytest.mark.parametrize("base", [EDM(), VE(), VPLinear()], ids=["edm", "ve", "vp"])
def test_the_loss_is_that_of_the_process(base: Process, momentum: bool) -> None:
    """The weighted error of the denoiser, at noisy images of exactly these seeds."""
    process = FDM(base) if momentum else base
    network = Constant()
    model = EDMDenoiser(network, process=process)
    loss = task(process).loss(model, PART)
    loss.backward()
    clean = torch.tensor([0.0, 1.0, 1.0])[:, None, None, None].expand(3, 1, 2, 2)
    noise = [dk.noised(torch.zeros(1, 1, 2, 2), 1.0, seeds=[i]) for i in (5, 6, 5)]
    sigma = PART["sigma"][:, None, None, None]
    noisy = clean + sigma * torch.cat(noise)
    seen = network.seen
    error = model(noisy, PART["sigma"]) - clean
    sd2 = 0.25
    weight = (sigma**2 + sd2) / (sigma**2 * sd2) if base == EDM() else sigma**-2
    expected = (weight * error.square()).mean()
    assert_close(loss, expected, LOSS)
    (slope,) = torch.autograd.grad(expected, network.value)
    assert_close(network.value.grad, slope, LOSS)
    c_in = {"edm": (sigma**2 + sd2).rsqrt(), "ve": 1.0, "vp": (sigma**2 + 1).rsqrt()}
    if momentum:
        c_in = dict.fromkeys(c_in, process.alpha(process.clock(sigma)).float())
    assert_close(seen[0], c_in[family(base)] * noisy, LOSS)
    assert_close(seen[1], -2.0 * PART["sigma"].log()[:, None], LOSS)
    assert seen[2] is None


def test_weights_have_a_ceiling_in_their_warm_up() -> None:
    """It is that of the update, whichever part of the batch, and gone at the end."""
    model = EDMDenoiser(Constant())
    sigma = PART["sigma"].double()
    weight = Preconditioner(EDM()).weight(sigma)
    free = torch.stack([task().loss(model, {k: v[i : i + 1] for k, v in PART.items()})
                        for i in range(3)])  # fmt: skip
    for update, ceiling in [(0, 5.0), (3, 5.0 * 100**0.75), (4, math.inf), (9, math.inf)]:
        part = PART | {"update": torch.full((3,), update)}
        found = task(warm_up=WeightWarmUp(4)).loss(model, part)
        expected = (free * weight.clamp(max=ceiling) / weight).mean()
        assert_close(found, expected, LOSS)


def test_golden_warm_up() -> None:
    """Of the official loss, whose last call under the ceiling is one of a rounding."""
    official = golden("fdm.npz")["loss_edm_warm_clamp_cur"]
    ours = [WeightWarmUp(200).ceiling(i) for i in range(220)]
    assert_close(torch.tensor(ours[:200], dtype=torch.float64), official[:200], 1e-12)
    assert ours[200:] == [math.inf] * 20
    assert [WeightWarmUp(0).ceiling(i) for i in (0, 1)] == [math.inf] * 2
    with pytest.raises(ValueError, match="updates must be at least 0, got -1"):
        WeightWarmUp(-1)
    with pytest.raises(TypeError, match=r"updates must be an integer, got 2\.5"):
        WeightWarmUp(2.5)  # type: ignore[arg-type]
    for last in (5.0, math.inf):
        with pytest.raises(ValueError, match="0 < first < last < inf is required"):
            WeightWarmUp(5, first=500.0, last=last)
    with pytest.raises(TypeError, match="last must be a real number or a tensor, got 'a'"):
        WeightWarmUp(5, last="a")  # type: ignore[arg-type]


def test_batches_do_not_depend_on_the_momentum() -> None:
    """Also their noise levels."""
    for base in (EDM(), VE(), VPLinear()):
        drawn = [
            task(process).draw(torch.Generator().manual_seed(7), 8)
            for process in (base, FDM(base), FDM(base, 2.0))
        ]
        for other in drawn[1:]:
            assert all(torch.equal(drawn[0][name], other[name]) for name in drawn[0])
    seeds = [task(p).draw(torch.Generator().manual_seed(7), 8) for p in (EDM(), VE())]
    assert torch.equal(seeds[0]["noise_seed"], seeds[1]["noise_seed"])
    assert torch.equal(seeds[0]["index"], seeds[1]["index"])


def test_a_conditional_task_tells_the_class_of_the_image() -> None:
    network = Constant()
    model = EDMDenoiser(network)
    conditional = task(conditional=True)
    part = conditional.draw(torch.Generator().manual_seed(0), 16) | {"update": torch.zeros(16)}
    conditional.loss(model, part)
    assert network.seen[2].tolist() == [[3, 5][i] for i in part["index"].tolist()]
    assert set(part["index"].tolist()) == {0, 1}
    dropping = task(conditional=True, drop_classes=0.25)
    part = dropping.draw(torch.Generator().manual_seed(0), 400) | {"update": torch.zeros(400)}
    dropping.loss(model, part)
    assert 70 <= network.seen[2].eq(-1).sum() <= 130


def test_noise_levels_are_log_normal() -> None:
    drawn = [task().draw(torch.Generator().manual_seed(i), 512) for i in range(4)]
    level = torch.cat([part["sigma"] for part in drawn]).log().double()
    # Evenly spread quantiles: their mean and deviation are those of the distribution to 1 / 512.
    assert level.mean().item() == pytest.approx(P_MEAN, abs=0.02)
    assert level.std().item() == pytest.approx(P_STD, abs=0.02)
    within = (level.sub(P_MEAN).abs() < P_STD).double().mean().item()
    assert within == pytest.approx(math.erf(math.sqrt(0.5)), abs=0.01)
    assert not torch.equal(drawn[0]["sigma"], drawn[1]["sigma"])
    assert len(set(drawn[0]["noise_seed"].tolist())) == 512


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Images of two colors, each with its class."""
    labels = np.arange(12) % 2
    noise = np.random.default_rng(0).integers(0, 40, (12, 4, 4), dtype=np.uint8)
    pixels = noise + 200 * labels[:, None, None].astype(np.uint8)
    np.savez(tmp_path / "images.npz", images=pixels, labels=labels)
    return tmp_path / "images.npz"


def train(data: Path, out: Path, more: str = "") -> int:
    command = f"train teacher --data {data} --out {out} {QUICK} {more}"
    return commands.main(command.split())


def test_the_command_writes_a_denoiser(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert train(data, out, f"--conditional {LEARNING} --seed 4") == 0
    assert sorted(path.name for path in out.iterdir()) == [
        "checkpoint.safetensors",
        "loss.csv",
        "loss.png",
        "teacher.safetensors",
    ]
    assert f"Wrote {out / 'teacher.safetensors'}" in capsys.readouterr().out
    teacher = dk.models.load(out / "teacher.safetensors", kind="edm_denoiser")
    assert isinstance(teacher, EDMDenoiser)
    with np.load(data) as file:
        images = torch.from_numpy(file["images"]).float() / 127.5 - 1.0
    assert teacher.sigma_data == pytest.approx(images.std().item(), rel=1e-5)
    provenance = json.loads(dk.models.read_metadata(out / "teacher.safetensors")["provenance"])
    assert (provenance["seed"], provenance["steps"]) == (4, 80)
    assert str(data) in provenance["data"]
    # It has learned what the class says: at much noise, the mean of the class.
    noise = 3.0 * torch.randn(64, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    means = [teacher(noise, 3.0, torch.full((64,), y)).mean().item() for y in (0, 1)]
    expected = [images[y::2].mean().item() for y in (0, 1)]
    assert means[1] - means[0] == pytest.approx(expected[1] - expected[0], rel=0.4)


def test_the_command_continues_and_refuses_other_data(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert train(data, out, "--decay constant --steps 2") == 0
    assert train(data, out, "--decay constant --steps 3") == 0
    whole = tmp_path / "whole"
    assert train(data, whole, "--decay constant --steps 3") == 0
    assert (out / "loss.csv").read_text() == (whole / "loss.csv").read_text()
    capsys.readouterr()
    assert train(data, out, "--decay constant --steps 3 --sigma-data 0.4") == 2
    assert "sigma_data was" in capsys.readouterr().err
    np.savez(data, images=np.zeros((3, 4, 4), np.uint8))
    assert train(data, out, "--decay constant --steps 3 --sigma-data 0.5") == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("train teacher: ") and "is of another run: data was" in error
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ("--steps 0", "--steps must be at least 1, got 0"),
        ("--channels 33", "these options make no network: channels must be a multiple of 32"),
        ("--sigma-data 0", "--sigma-data must be positive, got 0.0"),
        ("--drop-classes 1", "--drop-classes must be in [0, 1), got 1.0"),
        ("--drop-classes 0.5", "--drop-classes needs classes; give --conditional"),
        ("--p-std 0", "--p-std must be positive, got 0.0"),
        ("--multiplier 2", "--multiplier needs --momentum; give it, too"),
        ("--momentum --multiplier 0", "--multiplier must be positive, got 0.0"),
        ("--momentum --multiplier 900", "--multiplier 900 is too large"),
        ("--warm-up-loss -1", "--warm-up-loss must be at least 0, got -1"),
        ("--process vp --p-mean 1", "are of --process edm; vp has no use for them"),
        ("--process ve --sigma-data 1", "are of --process edm; ve has no use for them"),
        ("--size 8", "--size 8 resizes a folder of images"),
        ("--warm-up -1", "--warm-up must be at least 0, got -1"),
    ],
    ids=lambda value: value.split()[0],
)
def test_bad_options_are_one_line(
    options: str, match: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(data, tmp_path / "out", options) == 2
    error = capsys.readouterr().err.strip()
    assert match in error and len(error.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_images_of_one_value(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Only EDM measures them, so only there an option helps."""
    np.savez(data, images=np.full((3, 4, 4), 7, np.uint8))
    assert train(data, tmp_path / "edm", "--steps 1") == 2
    assert "the images are all the same, of one value; give --sigma-data" in capsys.readouterr().err
    assert train(data, tmp_path / "vp", "--steps 1 --process vp") == 0


def test_the_file_says_whether_classes_were_dropped(data: Path, tmp_path: Path) -> None:
    """Which guidance needs."""
    assert train(data, tmp_path, "--conditional --drop-classes 0.25 --steps 1") == 0
    metadata = dk.models.read_metadata(tmp_path / "teacher.safetensors")
    assert float(metadata["drop_classes"]) == 0.25


def test_classes_that_the_data_do_not_have(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.savez(data, images=np.zeros((3, 4, 4), np.uint8))
    assert train(data, tmp_path / "out", "--conditional --sigma-data 0.5") == 2
    assert "--conditional needs classes" in capsys.readouterr().err


def test_labels_that_are_no_numbers_of_classes(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = np.random.default_rng(0).integers(0, 256, (3, 4, 4), dtype=np.uint8)
    np.savez(data, images=images, labels=np.array([0, 1, 39 * 10**9]))
    assert train(data, tmp_path / "out", "--conditional") == 2
    error = capsys.readouterr().err
    assert "has a label 39000000000: that" in error and "number them from 0" in error


def test_images_that_are_all_the_same(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.savez(data, images=np.zeros((3, 4, 4), np.uint8))
    assert train(data, tmp_path / "out") == 2
    assert "give --sigma-data" in capsys.readouterr().err


def run_to(data: Path, out: Path, more: str, stops: tuple[int, ...]) -> dict[str, Tensor]:
    for steps in stops:
        assert train(data, out, f"--decay constant {more} --steps {steps}") == 0
    return read_tensors(out / "checkpoint.safetensors")[0]


@pytest.mark.parametrize("process", ["edm", "vp", "ve"])
def test_a_momentum_run_continues_to_the_bit_within_its_warm_up(
    process: str, data: Path, tmp_path: Path
) -> None:
    more = f"--process {process} --momentum --warm-up-loss 4"
    stopped = run_to(data, tmp_path / "stopped", more, (2, 5))
    whole = run_to(data, tmp_path / "whole", more, (5,))
    assert all(torch.equal(value, whole[name]) for name, value in stopped.items())
    rows = [(tmp_path / name / "loss.csv").read_text() for name in ("stopped", "whole")]
    assert rows[0] == rows[1]


def test_parts_of_a_batch_share_the_ceiling_of_their_update(data: Path, tmp_path: Path) -> None:
    """The warm-up counts updates: not the calls of the loss, as the official one does."""
    more = "--momentum --warm-up-loss 5"
    run_to(data, tmp_path / "whole", more, (3,))
    run_to(data, tmp_path / "parts", f"{more} --accumulate 4", (3,))
    assert_close(losses(tmp_path / "parts"), losses(tmp_path / "whole"), LOSS)


def test_the_file_names_its_process(data: Path, tmp_path: Path) -> None:
    """And the denoiser that is loaded is that of the process; a default file is as it was."""
    x, sigma = torch.randn(2, 1, 4, 4), torch.tensor([0.5, 9.0])
    processes = {}
    for more in ("", "--momentum", "--process vp", "--process ve --momentum --multiplier 1.5"):
        out = tmp_path / f"out{len(processes)}"
        assert train(data, out, f"--steps 2 {more}") == 0
        path = out / "teacher.safetensors"
        assert ("process" in dk.models.read_metadata(path)) == bool(more)
        loaded = dk.models.load(path, kind="edm_denoiser")
        processes[more] = loaded.process
        table = Preconditioner(loaded.process).coefficients(sigma.double())
        c_skip, c_out, c_in = (value[:, None, None, None].float() for value in table[:3])
        output = loaded.network(c_in * x, -2 * sigma.log()[:, None], None)[:, 0]
        assert_close(loaded(x, sigma), c_skip * x + c_out * output, LOSS)
    data_deviation = processes[""].sigma_data
    assert processes[""] == EDM(sigma_data=data_deviation)
    assert processes["--momentum"] == FDM(EDM(sigma_data=data_deviation), 2.0)
    assert processes["--process vp"] == VPLinear(t_min=1e-5)
    assert processes["--process ve --momentum --multiplier 1.5"] == FDM(VE(), 1.5)


@pytest.mark.parametrize(
    ("before", "now", "match"),
    [
        ("", "--momentum", "momentum was None, now it is 2.0"),
        ("--momentum", "", "momentum was 2.0, now it is None"),
        ("--process ve", "--process vp", "process was 've', now it is 'vp'"),
        ("--process ve", "", "process was 've', now it is None"),
        ("", "--warm-up-loss 9", "warm_up_loss was None, now it is 9"),
    ],
    ids=["on", "off", "process", "default", "no warm-up in the checkpoint"],
)
def test_a_checkpoint_of_another_process_is_refused(
    before: str,
    now: str,
    match: str,
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert train(data, tmp_path, f"--decay constant --steps 1 {before}") == 0
    assert train(data, tmp_path, f"--decay constant --steps 2 {now}") == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert match in error and "give the options of that run" in error


def test_a_checkpoint_from_before_processes_continues(data: Path, tmp_path: Path) -> None:
    """It does not name them; with the default process it is the same run."""
    assert train(data, tmp_path, "--decay constant --steps 1") == 0
    path = tmp_path / "checkpoint.safetensors"
    tensors, metadata = read_tensors(path)
    identity = json.loads(metadata["identity"])
    for name in ("process", "momentum", "warm_up_loss"):
        assert identity.pop(name) is None
    write_tensors(path, tensors, {**metadata, "identity": identity})
    assert train(data, tmp_path, "--decay constant --steps 2") == 0
