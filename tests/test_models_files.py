"""Models as files: what is written comes back, and what cannot be used says why."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import pytest
import torch

pytest.importorskip("safetensors")

import dsno_kernels as dk
from dsno_kernels.models import DSNO, DSNOConfig, EDMDenoiser, ModelFileError, files
from tests.faults import full_disk
from tests.helpers import assert_close

TINY = DSNOConfig(
    image_size=8,
    image_channels=1,
    channels=32,
    channel_mult=(1,),
    num_res_blocks=1,
    attention_resolutions=(),
    embedding_dim=32,
    num_classes=3,
)
LOGSNR = torch.tensor([-2.0, 0.0, 3.0])
# Weights of 11 bits: half a unit in the last place is 2**-12 of each.
HALF = 2**-12


def test_a_dsno_comes_back(tmp_path: Path) -> None:
    model, path = DSNO(TINY).eval(), tmp_path / "model.safetensors"
    dk.models.save(model, path, logsnr=LOGSNR.tolist(), provenance={"seed": 3})
    state = torch.get_rng_state()
    loaded = dk.models.load(path, kernels=False)
    assert torch.equal(torch.get_rng_state(), state)
    assert isinstance(loaded, DSNO) and not loaded.training and not loaded.kernels
    assert loaded.config == TINY
    for (name, expected), (other, value) in zip(
        model.state_dict().items(), loaded.state_dict().items(), strict=True
    ):
        assert name == other and torch.equal(value, expected)
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    metadata = dk.models.read_metadata(path)
    assert metadata["kind"] == "dsno"
    assert json.loads(metadata["logsnr"]) == LOGSNR.tolist()
    assert json.loads(metadata["provenance"]) == {"seed": 3}
    x, y = torch.randn(2, 1, 8, 8), torch.tensor([0, 2])
    assert torch.equal(dk.models.load(path)(x, LOGSNR, y), model(x, LOGSNR, y))


def test_a_denoiser_comes_back(tmp_path: Path) -> None:
    network = DSNO(dataclasses.replace(TINY, time_conv=False, num_classes=0))
    model = EDMDenoiser(network, sigma_data=0.25).eval()
    dk.models.save(model, tmp_path / "teacher.safetensors")
    loaded = dk.models.load(tmp_path / "teacher.safetensors", kind="edm_denoiser")
    x = torch.randn(2, 1, 8, 8)
    assert loaded.sigma_data == 0.25
    assert torch.equal(loaded(x, 0.7), model(x, 0.7))


def test_half_precision_halves_the_file_and_loads_as_float32(tmp_path: Path) -> None:
    model = DSNO(TINY)
    paths = tmp_path / "full", tmp_path / "half"
    dk.models.save(model, paths[0])
    dk.models.save(model, paths[1], dtype=torch.float16)
    assert paths[1].stat().st_size < 0.6 * paths[0].stat().st_size
    loaded = dk.models.load(paths[1])
    for name, value in loaded.state_dict().items():
        assert value.dtype == torch.float32
        if value.any():
            assert_close(value, model.state_dict()[name], HALF if value.abs().max() > 1e-3 else 0.5)


def test_a_weight_that_half_precision_makes_infinite(path: Path) -> None:
    model, before = DSNO(TINY), path.read_bytes()
    weight = model.all_modules[0].weight
    with torch.no_grad():
        weight[0, :2] = torch.tensor([float("inf"), -1e5])
    with pytest.raises(
        ModelFileError, match=r"0\.weight reaches 1e\+05, float16 ends at 6.55e\+04"
    ):
        dk.models.save(model, path, dtype=torch.float16)
    assert path.read_bytes() == before
    dk.models.save(model, path, dtype=torch.bfloat16)
    with torch.no_grad():
        weight[0, 1] = -6e4
    dk.models.save(model, path, dtype=torch.float16)  # what was infinite stays that
    assert dk.models.load(path).all_modules[0].weight[0, :2].tolist() == [float("inf"), -6e4]


def test_what_no_file_can_hold(path: Path) -> None:
    before = path.read_bytes()
    for wrong in (torch.int8, torch.complex64, "float16"):
        with pytest.raises(TypeError, match=rf"dtype must be .*torch\.float64, got {wrong}"):
            dk.models.save(DSNO(TINY), path, dtype=wrong)  # type: ignore[arg-type]
    for name in ("kind", "process"):
        with pytest.raises(ModelFileError, match=f"the model writes its {name} itself"):
            dk.models.save(DSNO(TINY), path, **{name: "another"})
    assert path.read_bytes() == before


def test_the_name_of_a_packaged_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "PACKAGED", tmp_path)
    dk.models.save(DSNO(TINY), tmp_path / "squares.safetensors")
    assert dk.models.load("squares").config == TINY
    (tmp_path / "here" / "squares").mkdir(parents=True)  # a folder is no model
    monkeypatch.chdir(tmp_path / "here")
    assert dk.models.load("squares").config == TINY


def test_a_file_goes_before_a_packaged_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also one without a suffix, next to another that has it."""
    monkeypatch.setattr(files, "PACKAGED", tmp_path / "weights")
    monkeypatch.chdir(tmp_path)
    for path, classes in (("weights/m", 7), ("m", 1), ("there", 2), ("there", 3)):
        Path(path).parent.mkdir(exist_ok=True)
        suffix = ".safetensors" if classes in (7, 3) else ""
        config = dataclasses.replace(TINY, num_classes=classes)
        dk.models.save(DSNO(config), f"{path}{suffix}")
    assert dk.models.load("m").config.num_classes == 1
    assert dk.models.load(tmp_path / "there").config.num_classes == 2
    with pytest.raises(ModelFileError, match=r"gone does not exist"):
        dk.models.load(tmp_path / "gone")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    dk.models.save(DSNO(TINY), tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match=r"nowhere\.st does not exist; give a model file"):
        dk.models.load(tmp_path / "nowhere.st")


@pytest.mark.parametrize("size", [0, 5, 5000], ids=["empty", "length cut", "values cut"])
def test_a_file_that_was_cut(size: int, path: Path) -> None:
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ModelFileError, match=r"model\.safetensors is no safetensors file, or a br"):
        dk.models.load(path)
    with pytest.raises(ModelFileError, match=r"write it again"):
        dk.models.read_metadata(path)


def test_a_folder(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match=r"is no safetensors file"):
        dk.models.load(tmp_path)


def test_another_kind(path: Path) -> None:
    with pytest.raises(ModelFileError, match=r"of kind 'dsno', wanted 'edm_denoiser'"):
        dk.models.load(path, kind="edm_denoiser")
    files.write_tensors(path, {}, {"kind": "classifier"})
    with pytest.raises(ModelFileError, match=r"of kind 'classifier', wanted 'dsno' or 'edm_den"):
        dk.models.load(path)


def rewrite(path: Path, **metadata: str) -> dict[str, torch.Tensor]:
    """Change the metadata of the file; its tensors are returned."""
    tensors, found = files.read_tensors(path)
    files.write_tensors(path, tensors, {**found, **metadata})
    return tensors


@pytest.mark.parametrize(
    ("config", "match"),
    [
        ("no json", r"JSONDecodeError"),
        ('{"colour": 1}', r"unexpected keyword argument 'colour'"),
        (json.dumps({**dataclasses.asdict(TINY), "channels": 33}), r"multiple of 32"),
        ("[]", r"AttributeError"),
    ],
    ids=["no JSON", "unknown field", "no network", "list"],
)
def test_a_configuration_that_is_none(config: str, match: str, path: Path) -> None:
    rewrite(path, config=config)
    with pytest.raises(ModelFileError, match=rf"no configuration that this version knows.*{match}"):
        dk.models.load(path)


def test_weights_that_do_not_fit_the_configuration(path: Path) -> None:
    tensors, metadata = files.read_tensors(path)
    first = "all_modules.0.weight"
    wider = json.dumps(dataclasses.asdict(dataclasses.replace(TINY, embedding_dim=64)))
    files.write_tensors(path, tensors, {**metadata, "config": wider})
    error = rf"{first} has shape \(32, 32\) in it and \(64, 32\) in the network; give another"
    with pytest.raises(ModelFileError, match=error):
        dk.models.load(path)
    files.write_tensors(path, {k: v for k, v in tensors.items() if k != first}, metadata)
    with pytest.raises(ModelFileError, match=rf"{first} with shape \(32, 32\) is missing"):
        dk.models.load(path)
    files.write_tensors(path, {**tensors, "more": torch.zeros(1)}, metadata)
    with pytest.raises(ModelFileError, match=r"more with shape \(1,\) in it is not in the net"):
        dk.models.load(path)


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"must be a DSNO or an EDMDenoiser of one"):
        dk.models.save(torch.nn.Linear(2, 2), tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_each_process_writes_a_temporary_file_of_its_own(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace, names = os.replace, []

    def replace_and_note(source: Path, target: Path) -> None:
        names.append(source.name)
        replace(source, target)

    monkeypatch.setattr(os, "replace", replace_and_note)
    for pid in (11, 12):
        monkeypatch.setattr(os, "getpid", lambda pid=pid: pid)
        dk.models.save(DSNO(TINY), path)
    assert names == ["model.safetensors.11.part", "model.safetensors.12.part"]


def test_a_full_disk_leaves_the_earlier_file(path: Path) -> None:
    before = path.read_bytes()
    with full_disk(1000), pytest.raises(OSError, match="File too large"):
        dk.models.save(dk.models.load(path), path, more="metadata")
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == [path.name]
