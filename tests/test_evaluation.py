"""Distances between sets of images, against closed forms; the command `evaluate`."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("sklearn")
pytest.importorskip("safetensors")
pytest.importorskip("tqdm")
PIL_Image = pytest.importorskip("PIL.Image")

import dsno_kernels as dk  # noqa: E402
from dsno_kernels import commands  # noqa: E402
from dsno_kernels.evaluation import classifier, features, report, sets  # noqa: E402
from dsno_kernels.evaluation.manifold import precision_recall  # noqa: E402
from dsno_kernels.training import images  # noqa: E402
from tests.helpers import assert_close  # noqa: E402
from tests.small_models import LOGSNR, network, write_student, write_teacher  # noqa: E402

frechet_distance = dk.evaluation.frechet_distance


def random(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def whitened(N: int, D: int) -> Tensor:
    """Vectors of mean 0 and covariance 1, exactly."""
    x = random(N, D)
    return torch.linalg.qr(x - x.mean(0)).Q * math.sqrt(N - 1)


def test_frechet_distance_of_two_normals_with_one_basis() -> None:
    """Covariances that commute: |m1 - m2|^2 + sum (s1 - s2)^2."""
    x, rotation = whitened(200, 5), torch.linalg.qr(random(5, 5, seed=1)).Q
    s1, s2 = torch.tensor([1.0, 2.0, 3.0, 0.0, 0.5]), torch.tensor([2.0, 2.0, 0.0, 0.0, 4.0])
    m1, m2 = random(5, seed=2), random(5, seed=3)
    first, second = ((x * s) @ rotation + m for s, m in ((s1.double(), m1), (s2.double(), m2)))
    expected = (m1 - m2).square().sum() + (s1 - s2).square().sum()
    assert frechet_distance(first, second) == pytest.approx(expected.item(), rel=1e-12)


def test_frechet_distance_of_covariances_that_do_not_commute() -> None:
    """tr (C1^1/2 C2 C1^1/2)^1/2 of 2 x 2 matrices is sqrt(tr(C1 C2) + 2 sqrt(det C1 det C2))."""
    x, A, B = whitened(50, 2), random(2, 2, seed=1), random(2, 2, seed=2)
    C1, C2 = A.T @ A, B.T @ B
    overlap = ((C1 @ C2).trace() + 2 * (C1.det() * C2.det()).sqrt()).sqrt()
    expected = (C1.trace() + C2.trace() - 2 * overlap).item()
    assert frechet_distance(x @ A, x.flip(0) @ B) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("count", [500, 10], ids=["many", "fewer than features"])
def test_frechet_distance_agrees_with_torchmetrics(count: int) -> None:
    fid = pytest.importorskip("torchmetrics.image.fid")
    first, second = random(count, 20), 1.5 * random(count + 3, 20, seed=1) + 0.2
    metric = fid.FrechetInceptionDistance(
        nn.Flatten(), normalize=True, input_img_size=(1, 1, 20)
    ).set_dtype(torch.float64)
    metric.update(first, real=True)
    metric.update(second, real=False)
    # Its eigenvalues of a product leave roots of rounding errors.
    assert frechet_distance(first, second) == pytest.approx(metric.compute().item(), rel=1e-6)


def test_frechet_distance_of_a_set_from_itself_is_rounding() -> None:
    digits = images.digits().images  # with pixels that are the same in all: a singular covariance
    assert abs(frechet_distance(digits, digits)) < 1e-11
    assert abs(frechet_distance(digits + 1000.0, digits + 1000.0)) < 1e-11


@pytest.mark.parametrize(
    ("first", "words"),
    [
        (torch.ones(0, 3), "first set is empty"),
        (torch.ones(4, 2), "vectors of 2 and of 3"),
        (torch.tensor([[0.0, 1.0, math.nan]]), "not finite"),
    ],
    ids=["empty", "length", "nan"],
)
def test_sets_without_a_distance(first: Tensor, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        frechet_distance(first, torch.ones(5, 3))


def test_precision_and_recall_of_sets_on_a_line() -> None:
    """Real images at 0..9, whose balls (k = 3) reach 2, at the ends 3."""
    real = torch.arange(10.0)[:, None]
    samples = torch.tensor([[0.5], [1.0], [1.5], [2.0], [11.9], [12.1]])
    # Covered: 0.5 to 2 and 11.9 (9's ball reaches 12). The samples' balls: 0.5 reaches 2, 1 and 1.5
    # reach 0 .. 2 and 0.5 .. 2.5, 2 reaches 0.5 .. 3.5, 11.9 reaches 1.5 .. 22.3, 12.1 likewise.
    found = precision_recall(real, samples)
    assert found.precision == pytest.approx(5 / 6)
    assert found.recall == 1.0
    near = samples[:4]  # these alone cover 0, 1, 2, 3
    assert precision_recall(real, near) == (1.0, 0.4)


def test_precision_and_recall_of_one_mode_of_two() -> None:
    cluster = random(40, 3)
    real = torch.cat([cluster, random(40, 3, seed=1) + 100.0])
    assert precision_recall(real, cluster + 1e-9).precision == 1.0
    assert precision_recall(real, cluster + 1e-9).recall == 0.5
    assert precision_recall(cluster, real).precision == pytest.approx(0.5)
    assert precision_recall(real, real) == (1.0, 1.0)
    assert precision_recall(real, real + 1e6) == (0.0, 0.0)


def test_precision_and_recall_against_all_pairs() -> None:
    """In one go with a matrix of distances, as the paper writes it."""
    real, samples = random(60, 4), random(45, 4, seed=1) * 0.7

    def covered(points: Tensor, centers: Tensor) -> float:
        own = torch.cdist(centers, centers).sort(1).values[:, 5]  # the first is itself
        return (torch.cdist(points, centers) <= own).any(1).double().mean().item()

    expected = (covered(samples, real), covered(real, samples))
    assert precision_recall(real, samples, k=5) == pytest.approx(expected)
    assert 0.0 < expected[1] < expected[0]


@pytest.mark.parametrize(
    ("shapes", "k", "words"),
    [
        (((10, 2), (10, 3)), 3, "shapes"),
        (((10, 2), (3, 2)), 3, "more than 3 vectors"),
        (((10, 2), (10, 2)), 0, "k >= 1"),
    ],
    ids=["features", "few", "k"],
)
def test_sets_without_precision(
    shapes: tuple[tuple[int, int], tuple[int, int]], k: int, words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        precision_recall(torch.zeros(shapes[0]), torch.zeros(shapes[1]), k)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where one digit classifier is kept for all tests."""
    return tmp_path_factory.mktemp("evaluation")


def test_the_digit_classifier_is_good_and_kept(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    digits = images.digits().images[:50]
    first = features.digits(folder)
    accuracy = float(first.name.split(", ")[1].split("%")[0])
    assert accuracy >= 97.0
    vectors = first(digits)
    assert vectors.shape == (50, classifier.FEATURES)
    monkeypatch.setattr(classifier, "train", lambda *_: pytest.fail("trained again"))
    assert torch.equal(features.digits(folder)(digits), vectors)
    monkeypatch.undo()
    path = tmp_path / "digit_classifier.safetensors"
    path.write_bytes(b"broken")
    assert torch.equal(features.digits(tmp_path)(digits), vectors)  # a seed gives one network
    assert "trained again" in caplog.text
    assert dk.models.read_metadata(path)["kind"] == "classifier"


def test_shifted_images_lose_at_most_a_border() -> None:
    image = torch.rand(1, 1, 8, 8) * 2 - 1
    moved = classifier.shifted(image.expand(200, 1, 8, 8))
    padded = nn.functional.pad(image, (1, 1, 1, 1), value=-1.0)
    windows = {
        padded[0, 0, i : i + 8, j : j + 8].numpy().tobytes() for i in range(3) for j in range(3)
    }
    assert {picture[0].numpy().tobytes() for picture in moved} == windows


class Inception(nn.Module):
    """As a TorchScript file: one number a color of the first pixel, or of the second."""

    def forward(self, x: Tensor, return_features: bool = False) -> Tensor:
        assert x.dtype == torch.uint8
        return x[:, :, 0, 0].float() if return_features else x[:, :, 0, 1].float()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_features_of_a_torchscript_file(tmp_path: Path) -> None:
    torch.jit.script(Inception()).save(str(tmp_path / "inception.ts"))
    network = features.torchscript(tmp_path / "inception.ts", torch.device("cpu"))
    pictures = torch.tensor([-1.0, 0.0, 1.0]).view(1, 3, 1, 1).expand(100, 3, 2, 2)
    assert_close(network(pictures), torch.tensor([0.0, 128.0, 255.0]).expand(100, 3), 0.0)
    assert_close(network(pictures[:, :1]), torch.zeros(100, 3), 0.0)


def evaluate(folder: Path, *words: object) -> int:
    return commands.main(["evaluate", "--device", "cpu", "--out", str(folder), *map(str, words)])


def test_a_table_of_models(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    student = write_student(tmp_path / "student.safetensors", classes=10)
    teacher = write_teacher(tmp_path / "teacher.safetensors", classes=10)
    numbers = tmp_path / "new" / "numbers.json"
    words = ("--teacher", teacher, "--student", student, "--evaluations", 2, 3, "--count", 70)
    assert evaluate(folder, *words, "--seeds", 2, "--seed", 7, "--json", numbers) == 0
    content = json.loads(numbers.read_text())
    names = [row["name"] for row in content["rows"]]
    teachers = [f"teacher, tab3, {n} evaluations" for n in (2, 3)]
    floors = ["digits, drawn with replacement", "digits, half against half"]
    assert names == [*teachers, "student", *floors]
    assert [row["evaluations"] for row in content["rows"]] == [2, 3, 1, 0, 0]
    assert content["seeds"] == [7, 8]

    reference = images.digits().images
    network = features.digits(folder)
    expected = [
        frechet_distance(network(dk.generate(student, 70, seed=seed)), network(reference))
        for seed in (7, 8)
    ]
    measured = content["rows"][2]
    assert measured["frechet"]["values"] == pytest.approx(expected, rel=1e-4)
    assert measured["frechet"]["mean"] == pytest.approx(sum(expected) / 2, rel=1e-4)
    assert measured["frechet"]["deviation"] == pytest.approx(
        abs(expected[0] - expected[1]) / math.sqrt(2), rel=1e-2
    )
    assert measured["images"] == 70
    assert measured["images_per_second"] > 0
    drawn, halves = content["rows"][3:]
    assert (drawn["images"], halves["images"]) == (70, 898)
    assert 0.0 < halves["frechet"]["mean"] < drawn["frechet"]["mean"]
    assert drawn["frechet"]["mean"] < 0.2 * measured["frechet"]["mean"]
    assert drawn["precision"]["mean"] == 1.0
    assert 0.8 < halves["precision"]["mean"] < 1.0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(lines) == 7
    assert f"{measured['frechet']['mean']:.2f} ±" in lines[4]


def test_student_and_ablation_are_compared_seed_by_seed(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    student = write_student(tmp_path / "student.safetensors")
    ablation, numbers = tmp_path / "ablation.safetensors", tmp_path / "numbers.json"
    dk.models.save(network(time_conv=False), ablation, logsnr=LOGSNR.tolist())
    words = ("--student", student, "--ablation", ablation, "--count", 70, "--seeds", 2)
    assert evaluate(folder, *words, "--json", numbers) == 0
    content = json.loads(numbers.read_text())
    first, second = (row["frechet"]["values"] for row in content["rows"][:2])
    differences = [first[0] - second[0], first[1] - second[1]]
    assert content["student_minus_ablation"] == pytest.approx(differences)
    line = ", ".join(f"{value:+.2f}" for value in differences)
    assert f"seed by seed: {line}" in capsys.readouterr().out


@pytest.mark.parametrize("process", [dk.diffusion.VPCosine(), dk.diffusion.EDM()], ids=["VP", "VE"])
def test_a_teacher_starts_from_the_noise_of_the_student(process: Any, tmp_path: Path) -> None:
    teacher = write_teacher(tmp_path / "teacher.safetensors", classes=3)
    drawing = sets.Drawing(5, 2, torch.device("cpu"), "fp32")
    grid = dk.diffusion.time_grid(process, 4)
    plan = dk.diffusion.SolverPlan.build(process, grid, "tab2", prediction="x0")
    (samples,) = sets.teachers(str(teacher), {"teacher": plan}, drawing)
    model = dk.diffusion.for_process(dk.models.load(teacher), process)
    noise = dk.sampling.generation.noise_of(network(), range(5), 1)
    noise *= 1.0 if isinstance(process, dk.diffusion.VPCosine) else (1 + 80.0**2) ** 0.5
    with torch.no_grad():
        labels = {"y": torch.tensor([0, 1, 2, 0, 1])}
        x = dk.diffusion.sample(model, noise, plan, kwargs=labels)
    assert samples.evaluations == 4
    assert_close(samples.draw(1), x.clamp(-1, 1), 1e-5)


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Sets of every kind that cannot be compared, and one that can: a.npz."""
    monkeypatch.chdir(tmp_path)
    digits = images.digits().images[:200, 0, :, :, None].numpy()
    np.savez("a.npz", images=digits)
    np.savez("nan.npz", images=np.full((100, 8, 8), np.nan))
    np.savez("few.npz", images=digits[:64])
    np.savez("large.npz", images=np.zeros((100, 16, 16), np.uint8))
    np.savez("color.npz", images=np.zeros((100, 8, 8, 3), np.uint8))
    np.savez("none.npz", images=np.zeros((0, 8, 8), np.uint8))
    Path("broken.npz").write_bytes(b"x")
    Path("broken.ts").write_bytes(b"x")
    Path("sizes").mkdir()
    for name, size in (("a", 8), ("b", 9)):
        PIL_Image.new("L", (size, size)).save(f"sizes/{name}.png")
    write_student(Path("student.safetensors"))
    write_teacher(Path("teacher.safetensors"))
    bad = network()
    with torch.no_grad():
        next(bad.parameters()).fill_(torch.nan)
    dk.models.save(bad, "bad.safetensors", logsnr=LOGSNR.tolist())
    return tmp_path


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize(
    ("words", "error"),
    [
        ("", "nothing to judge"),
        ("gone.npz", "gone.npz does not exist"),
        ("broken.npz", "broken.npz cannot be read"),
        ("none.npz", "none.npz"),
        ("nan.npz", "nan.npz"),
        ("few.npz", "64 images, too few for a covariance of 64 features: its rank would be 63"),
        ("large.npz", "shape (1, 16, 16), digits of (1, 8, 8)"),
        ("color.npz", "shape (3, 8, 8), digits of (1, 8, 8)"),
        ("sizes", "9x9 pixels"),
        ("bad.safetensors", "image 0 holds NaN"),
        ("teacher.safetensors", "kind 'edm_denoiser', wanted 'dsno'"),
        ("--student teacher.safetensors", "kind 'edm_denoiser', wanted 'dsno'"),
        ("--teacher student.safetensors", "kind 'dsno', wanted 'edm_denoiser'"),
        ("--teacher teacher.safetensors --solver none", "unknown solver"),
        ("--teacher teacher.safetensors --grid none", "unknown kind of time grid"),
        ("a.npz --reference student.safetensors", "is a model; give real images"),
        ("large.npz --reference large.npz", "cannot be computed on images of shape (1, 16, 16)"),
        ("a.npz --features broken.ts", "broken.ts is no TorchScript file"),
        ("a.npz --features gone.ts", "gone.ts is no TorchScript file"),
        ("student.safetensors --count 10", "10 images, too few"),
        ("color.npz --reference color.npz", "of shape (3, 8, 8): it takes (1, 8, 8); give --feat"),
        ("a.npz --json a.npz/x.json", "the folder of --json, a.npz cannot be written"),
        (f"a.npz --classifier-seed {2**64}", "--classifier-seed must be in 0 .. 2**64 - 1, got"),
        (f"a.npz --seed {2**64 - 1} --seeds 2", "--seed must be in 0 .. 2**64 - 2, got"),
    ],
    ids=str,
)
def test_what_cannot_be_compared_is_one_line(
    words: str, error: str, files: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate(folder, *words.split()) == 2
    written = capsys.readouterr().err.strip().splitlines()[-1]
    assert written.startswith("evaluate: ")
    assert error in written


def test_fixed_images_are_measured_once(
    files: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate(folder, "a.npz", "digits", "--features", "pixels", "--json", "n.json") == 0
    rows = json.loads(Path("n.json").read_text())["rows"]
    digits = images.digits().images
    expected = frechet_distance(digits[:200], digits)
    assert rows[0]["frechet"]["values"] == [pytest.approx(expected)]
    assert rows[0]["frechet"]["deviation"] is None
    assert rows[1]["frechet"]["mean"] == pytest.approx(0.0, abs=1e-11)
    assert (rows[1]["precision"]["mean"], rows[1]["recall"]["mean"]) == (1.0, 1.0)
    assert "±" not in capsys.readouterr().out.splitlines()[4]


def test_floors_of_sets_too_small_are_left_out() -> None:
    pictures = torch.rand(10, 1, 2, 2)
    reference = report.Reference("few", pictures, features.pixels())
    assert [row.images for row in reference.floors(7, range(3))] == [7, 5]
    assert [row.images for row in reference.floors(4, range(3))] == [5]
    assert report.Reference("fewer", pictures[:8], features.pixels()).floors(4, range(3)) == []
