"""benchmarks/tune.py on the CPU.

Compiler, clock and GPU are played by fakes; the results of candidates are computed and compared.
"""

from __future__ import annotations

import concurrent.futures
import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from benchmarks import journal, tune, tuning, tuning_clock
from benchmarks.tuning import Rejected, TableFile
from benchmarks.tuning_clock import Stopwatch
from benchmarks.tuning_model import Usage
from dsno_kernels.backends import reference
from dsno_kernels.backends.triton import configs, launch
from dsno_kernels.backends.triton.configs import TABLES, Config, RowKey
from tests.test_tuning import CONFIGS, FITS, H200, ROW, table_data
from tests.triton_aot import Launch, Report


@pytest.fixture
def tables(tmp_path: Path) -> Path:
    folder = tmp_path / "tables"
    shutil.copytree(TABLES, folder)
    return folder


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> list[Launch]:
    """A compiler under which tiles of 256 spill and all else fits; the launches it was given."""
    seen: list[Launch] = []

    def compiled(one: Launch) -> Report:
        seen.append(one)
        spills = any(value == 256 for name, value in one.constants if name.startswith("BLOCK"))
        usage = {"registers": 128, "stack": 16 * spills, "shared": 40_000, "async_copies": 8}
        return Report(**dict.fromkeys(Report._fields, 0) | usage)

    monkeypatch.setattr(tuning, "compiled", compiled)
    monkeypatch.setattr(
        tuning.test_triton_aot,
        "problem_of",
        lambda one, report: "spills" if report.stack else None,
    )
    return seen


MIX = ["--kernels", "spectral_conv_mix", "--methods", "tf32"]
MIX_ROWS: list[RowKey] = [("spectral_conv_mix", "tf32", kind) for kind in ("", "narrow")]


def test_a_dry_run_models_and_changes_nothing(
    tables: Path, compiler: list[Launch], capsys: pytest.CaptureFixture[str]
) -> None:
    before = (tables / "sm_90.json").read_text()
    assert tune.main(["--dry-run", "--arch", "90", "--tables", str(tables), *MIX]) == 0
    assert (tables / "sm_90.json").read_text() == before
    lines = capsys.readouterr().out.strip().splitlines()
    assert [line.startswith("spectral_conv_mix tf32") for line in lines[-2:]] == [True, True]
    assert {one.kernel for one in compiler} == {"spectral_conv_mix_kernel"}


def test_a_dry_run_writes_modeled_rows_but_never_over_a_measured_one(
    tables: Path, compiler: list[Launch]
) -> None:
    data = table_data()
    wide, narrow = (
        next(row for row in data["rows"] if (row["kernel"], row["method"], row["class"]) == key)
        for key in MIX_ROWS
    )
    wide |= {"tile": [16, 16, 16], "source": "compiled"}
    narrow |= {"tile": [16, 16, 16], "source": "measured: 1.0 us"}
    (tables / "sm_90.json").write_text(json.dumps(data))
    command = ["--dry-run", "--arch", "90", "--write", "--tables", str(tables), *MIX]
    assert tune.main(command) == 0
    file = TableFile.open(tables, (9, 0), H200)
    assert file.row(MIX_ROWS[0])["tile"] != [16, 16, 16]
    assert file.row(MIX_ROWS[0])["source"].startswith("modeled: ")
    assert file.row(MIX_ROWS[1]) == narrow


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> SimpleNamespace:
    """A GPU played by the CPU: float64 reference, small shapes, the host's clock."""
    played = SimpleNamespace(capability=(9, 0), results=tmp_path / "results")
    patch = monkeypatch.setattr
    monkeypatch.setenv("DSNO_KERNELS_DRY_RUN", "1")
    patch(torch.cuda, "is_available", lambda: True)
    patch(torch.cuda, "current_device", lambda: 0)
    patch(torch.cuda, "get_device_capability", lambda device: played.capability)
    patch(tune, "gpu_of", lambda device, capability: H200._replace(multiprocessors=100))
    patch(tune.machine, "describe", lambda device: {"gpu": "Toaster 3000", "triton": "3.0"})
    patch(tune.machine, "slug", lambda device: "toaster")
    patch(tune, "workers", concurrent.futures.ThreadPoolExecutor)

    def stopwatch(table: Any, device: torch.device, backend: Any) -> Stopwatch:
        return Stopwatch(table, torch.device("cpu"), reference, small=True)

    patch(tune, "Stopwatch", stopwatch)
    return played


def measured(tables: Path, gpu: SimpleNamespace, *arguments: str) -> int:
    folders = ["--tables", str(tables), "--results", str(gpu.results)]
    patient = ["--seconds-per-row", "1e9", "--budget", "1e9"]
    return tune.main([*folders, *patient, "--jobs", "1", "--most", "2", *arguments])


def test_a_run_on_a_gpu_writes_table_and_journal(
    tables: Path, gpu: SimpleNamespace, compiler: list[Launch]
) -> None:
    assert measured(tables, gpu, *MIX) == 0
    file = TableFile.open(tables, (9, 0), H200)
    for key in MIX_ROWS:
        source = file.row(key)["source"]
        assert source.startswith("measured: ") and "Toaster 3000" in source and "t16_" in source
    assert file.row(ROW) == TableFile.open(TABLES, (9, 0), H200).row(ROW)
    head, *rows = journal.read(gpu.results / "tune-toaster.jsonl")
    assert head["machine_info"]["gpu"] == "Toaster 3000"
    assert [tuple(row["row"]) for row in rows] == MIX_ROWS
    assert all(len(row["tried"]) == 3 and row["tried"][0]["seconds"] > 0 for row in rows)


def test_an_interrupted_run_keeps_the_rows_it_has_chosen(
    tables: Path,
    gpu: SimpleNamespace,
    compiler: list[Launch],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def score(key: RowKey, config: Config, usage: Usage) -> float:
        if key == MIX_ROWS[1]:
            raise KeyboardInterrupt
        return 1e-3

    monkeypatch.setattr(tune, "Stopwatch", lambda *arguments: score)
    before = TableFile.open(TABLES, (9, 0), H200)
    assert measured(tables, gpu, *MIX) == 130
    assert "interrupted" in capsys.readouterr().err
    after = TableFile.open(tables, (9, 0), H200)
    assert after.row(MIX_ROWS[0])["source"].startswith("measured: 1000.0 us")
    assert after.row(MIX_ROWS[1]) == before.row(MIX_ROWS[1])
    assert len(journal.read(gpu.results / "tune-toaster.jsonl")) == 2
    assert not list(tables.glob(".*"))


def test_a_new_architecture_starts_from_the_safe_rows(
    tables: Path, gpu: SimpleNamespace, compiler: list[Launch]
) -> None:
    gpu.capability = (12, 0)
    assert measured(tables, gpu, *MIX) == 0
    data = json.loads((tables / "sm_120.json").read_text())
    table = configs.parse(data, "sm_120.json")
    assert table.multiprocessors == 100 and table.fp32_method == configs.SAFE.fp32_method
    changed = [row for row in data["rows"] if row["source"] != "compiled"]
    assert [(row["kernel"], row["method"], row["class"]) for row in changed] == MIX_ROWS


def test_a_row_that_nothing_fits_is_left_and_said(
    tables: Path,
    gpu: SimpleNamespace,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(tuning, "compiled", lambda one: "does not compile: because")
    before = (tables / "sm_90.json").read_text()
    assert measured(tables, gpu, *MIX, "--classes", "narrow") == 1
    assert (tables / "sm_90.json").read_text() == before
    output = capsys.readouterr()
    assert "none fits" in output.out
    assert output.err == "tune: spectral_conv_mix tf32 narrow: does not compile: because\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--arch", "90"], "--dry-run and --arch belong together"),
        (["--dry-run"], "--dry-run and --arch belong together"),
        (["--write"], "--write belongs to --dry-run"),
        (["--dry-run", "--arch", "75"], "--arch 75: the model has the constants of 80, 86, 90"),
        (["--dry-run", "--arch", "90", "--budget", "0"], "have to be positive"),
        (["--dry-run", "--arch", "90", "--tables", "/nowhere"], "--tables /nowhere is no folder"),
        (["--dry-run", "--arch", "90", "--methods", "fp8"], "--methods 'fp8' is in no row"),
        (["--dry-run", "--arch", "90", *MIX, "--classes", "3"], "no row has these kernels"),
    ],
)
def test_bad_arguments_are_one_sentence(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tune.main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_without_a_gpu_a_run_says_what_works_without_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert tune.main([]) == 2
    assert capsys.readouterr().err.count("\n") == 1


# Clock

KERNELS = list(configs.CLASSES)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("method", ["tf32x3", "bf16"])
def test_a_right_result_is_timed(kernel: str, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSNO_KERNELS_DRY_RUN", "1")
    key = (kernel, method, configs.CLASSES[kernel][0])
    stopwatch = Stopwatch(configs.ARCHITECTURES[9, 0], torch.device("cpu"), reference, small=True)
    assert stopwatch(key, CONFIGS[0], FITS) > 0


class Wrong:
    """A backend with a defect."""

    def __init__(self, defect: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.defect = defect

    def spectral_conv(self, *args: Any, **options: Any) -> tuple[torch.Tensor, None]:
        return self.defect(reference.spectral_conv(*args, **options)[0]), None


def _too_large(y: torch.Tensor) -> torch.Tensor:
    raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")


@pytest.mark.parametrize(
    ("defect", "message"),
    [
        (torch.zeros_like, "error 1.0e.00, 6e-04 is allowed"),
        (lambda y: y * 1.001, "error 1.0e-03"),
        (lambda y: y.index_fill(0, torch.tensor([0]), torch.nan), "error nan"),
        (_too_large, r"^OutOfMemoryError: CUDA out of memory\.$"),
    ],
    ids=["zeros", "slightly wrong", "NaN", "raises"],
)
def test_a_wrong_result_is_rejected(
    defect: Callable[[torch.Tensor], torch.Tensor], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DSNO_KERNELS_DRY_RUN", "1")
    table = configs.ARCHITECTURES[9, 0]
    stopwatch = Stopwatch(table, torch.device("cpu"), Wrong(defect), small=True)
    with pytest.raises(Rejected, match=message):
        stopwatch(ROW, CONFIGS[0], FITS)


def test_launchers_see_the_candidate_in_wide_and_narrow_rows_and_only_then() -> None:
    table = configs.ARCHITECTURES[9, 0]
    before = copy.deepcopy(table.rows)
    candidate = tuning.with_row(table, ROW, CONFIGS[3])
    device = torch.device("cpu")
    with tuning_clock.table_in_use(candidate):
        rows = launch.architecture(device).rows
        changed = {key for key in rows if rows[key] != before[key]}
        assert changed == {key for key in rows if key[:2] == ROW[:2] and key[2].startswith("3")}
    assert launch.architecture(device) is configs.SAFE
    assert table.rows == before
