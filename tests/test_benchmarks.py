"""The benchmarks run once on small shapes, and the report says what its results files say."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import measure, peers, report, shapes, targets
from benchmarks.report_data import load

pytest.importorskip("pytest_benchmark")

ROOT = Path(__file__).resolve().parent.parent

README = """# Title
<!-- benchmark:begin spectral_conv_cpu -->
old
<!-- benchmark:end spectral_conv_cpu -->
between
<!-- benchmark:begin peers_cpu -->
<!-- benchmark:end peers_cpu -->
<!-- benchmark:begin overhead_cpu -->
<!-- benchmark:end overhead_cpu -->
<!-- benchmark:begin spectral_conv_gpu -->
<!-- benchmark:end spectral_conv_gpu -->
end
"""


def test_benchmarks_run_on_small_shapes() -> None:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "benchmarks",
        "--benchmark-disable",
        "-q",
        "--device",
        "cpu",
    ]
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "PYTEST_ADDOPTS": "",
        "OMP_NUM_THREADS": "1",
    }
    environment.pop("PYTEST_XDIST_WORKER", None)
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert " passed" in done.stdout


def test_benchmarks_stop_when_their_time_has_passed() -> None:
    command = [sys.executable, "-m", "pytest", "benchmarks/bench_overhead.py", "--minutes", "0"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTEST_ADDOPTS": ""}
    environment.pop("PYTEST_XDIST_WORKER", None)
    done = subprocess.run(
        [*command, "--benchmark-disable", "-q", "-rs"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert "the 0 minutes of this run have passed" in done.stdout
    assert "10 skipped" in done.stdout and "passed in" not in done.stdout


def conv_entry(peer: str, precision: str, direction: str, seconds: float) -> dict[str, Any]:
    return {
        "op": "spectral_conv",
        "shape": "A",
        "precision": precision,
        "direction": direction,
        "peer": peer,
        "errors": {"y": 2e-7, "dx": 2.5e-7, "dW": 3e-7},
        "seconds": seconds,
        "baseline_seconds": 0.05,
        "ratio": 0.05 / seconds,
        "gflops": 250.0,
        "share_of_gemm": 0.8,
        "gbytes": 4.0,
        "share_of_copy": 0.1,
        "saved_in_x": 1.06 if peer != "eager" else 2.06,
    }


def named(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"name": f"test[{i}]", "extra_info": entry} for i, entry in enumerate(entries)]


@pytest.fixture
def made_up(tmp_path: Path) -> Path:
    """A README and a results folder with one machine that never was."""
    entries = [
        conv_entry("eager", "fp32", "forward", 0.05),
        conv_entry("dsno_kernels[cpu]", "fp32", "forward", 0.01),
        conv_entry("dsno_kernels[cpu]", "bf16", "forward", 0.005),
        {"op": "overhead", "peer": "eager", "direction": "forward", "seconds": 5e-5},
        {
            "op": "truncated_rfft",
            "size": [8, 64, 1024],
            "modes": 32,
            "dim": 2,
            "seconds": 1e-4,
            "baseline_seconds": 2e-4,
            "ratio": 2.0,
        },
    ]
    content = {
        "machine_info": {
            "device": "cpu",
            "cpu": "Toaster 3000",
            "isa": ["avx2"],
            "cores": 2,
            "torch": "2.0",
        },
        "commit_info": {"id": "0123456789abcdef", "dirty": False},
        "datetime": "2030-01-02T03:04:05",
        "benchmarks": named(entries),
    }
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "toaster.json").write_text(json.dumps(content))
    (tmp_path / "README.md").write_text(README)
    return tmp_path


def arguments(folder: Path) -> list[str]:
    return ["--readme", str(folder / "README.md"), "--results", str(folder / "results")]


def test_report_fills_the_tables_and_is_idempotent(made_up: Path) -> None:
    assert report.main([*arguments(made_up), "--check"]) == 1
    assert (made_up / "README.md").read_text() == README  # --check writes nothing
    assert report.main(arguments(made_up)) == 0
    text = (made_up / "README.md").read_text()
    assert "**5.00x** | 4x |" in text
    assert "**10.00x** | 6x |" in text
    assert "1.06 (eager 2.06)" in text
    assert "Toaster 3000, avx2, 2 cores; PyTorch 2.0; 2030-01-02; commit `0123456789`" in text
    assert "old" not in text
    assert "between" in text
    assert "Not measured yet." in text.split("benchmark:begin spectral_conv_gpu")[1]
    assert (made_up / "results" / "spectral_conv.png").stat().st_size > 1000
    assert report.main([*arguments(made_up), "--check"]) == 0
    assert report.main(arguments(made_up)) == 0
    assert (made_up / "README.md").read_text() == text


def test_report_without_any_results_says_not_measured(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(README)
    (tmp_path / "results").mkdir()
    assert report.main(arguments(tmp_path)) == 0
    assert "Not measured yet." in (tmp_path / "README.md").read_text()


def write_file(folder: Path, name: str, entries: dict[str, dict[str, Any]], **more: Any) -> None:
    """Another results file of the machine of `made_up`."""
    content = json.loads((folder / "results" / "toaster.json").read_text())
    content["benchmarks"] = [{"name": n, "extra_info": entry} for n, entry in entries.items()]
    (folder / "results" / f"{name}.json").write_text(json.dumps(content | more))


def test_files_of_one_machine_are_one_result_and_the_newest_entry_counts(made_up: Path) -> None:
    """Whatever the order of the names; a caption names the files that its table is made of."""
    new, old = ("2030-01-03T00:00:00", "2030-01-01T00:00:00")
    again = conv_entry("dsno_kernels[cpu]", "fp32", "forward", 0.02)
    commit = {"id": "fedcba9876543210", "dirty": True}
    write_file(made_up, "a", {"test[1]": again}, datetime=new, commit_info=commit)
    write_file(made_up, "z", {"test[2]": again | {"precision": "bf16"}}, datetime=old)
    small = {
        "op": "model",
        "shape": "small",
        "batch": 2,
        "peer": "dsno_kernels",
        "precision": "fp32",
        "direction": "forward",
        "seconds": 0.002,
        "baseline_seconds": 0.005,
        "ratio": 2.5,
    }
    write_file(made_up, "model", {"test_model[small]": small}, datetime=new)
    (result,) = load(made_up / "results")
    assert len(result.entries) == 6
    path = made_up / "README.md"
    path.write_text(
        README + "<!-- benchmark:begin model_cpu -->\n<!-- benchmark:end model_cpu -->\n"
    )
    assert report.main(arguments(made_up)) == 0
    text = path.read_text()
    assert "| 20.0 ms | **2.50x** | 4x |" in text and "**5.00x**" not in text
    assert "**10.00x** | 6x |" in text  # of toaster.json: z.json is older
    sources = (
        "2030-01-02; commit `0123456789`; `benchmarks/results/toaster.json`; and "
        "2030-01-03; commit `fedcba9876` with local changes; `benchmarks/results/a.json`."
    )
    assert f"Toaster 3000, avx2, 2 cores; PyTorch 2.0; {sources}" in text
    model = text.split("benchmark:begin model_cpu")[1]
    assert "| small, B=2 | dsno_kernels | fp32 | forward | 5.00 ms | 2.00 ms |" in model
    assert "2030-01-03; commit `0123456789`; `benchmarks/results/model.json`.\n" in model


@pytest.mark.parametrize("change", [{"torch": "2.1"}, {"cores": 4}], ids=["PyTorch", "cores"])
def test_files_of_another_machine_or_pytorch_stay_apart(
    made_up: Path, change: dict[str, Any]
) -> None:
    content = json.loads((made_up / "results" / "toaster.json").read_text())
    entry = {"test[1]": conv_entry("dsno_kernels[cpu]", "fp32", "forward", 0.02)}
    write_file(made_up, "a", entry, machine_info=content["machine_info"] | change)
    assert sorted(len(result.entries) for result in load(made_up / "results")) == [1, 5]


GPU_TABLES = (
    "targets_gpu",
    "spectral_conv_gpu",
    "peers_gpu",
    "overhead_gpu",
    "model_gpu",
    "exp_step_gpu",
    "schedulers_gpu",
)


def gpu_entry(shape: str, precision: str, direction: str, peer: str, **more: Any) -> dict[str, Any]:
    """Half of the limit and 10 times as fast as the eager layer."""
    return {
        **conv_entry(peer, precision, direction, 0.005),
        "shape": shape,
        "share_of_limit": 0.5,
        "host_seconds": 3e-5,
        "peak_ratio": 0.3,
        "error_ratio": 0.9,
        "timing": "device events, L2 cold",
        **more,
    }


@pytest.fixture
def made_up_gpu(tmp_path: Path) -> Path:
    """A README with the tables of a GPU, and results of one that never was."""
    triton, cuda = "dsno_kernels[triton]", "dsno_kernels[cuda]"
    shape = "t16_32_c256_k8"
    entries = [
        gpu_entry("cifar_b32_32", "tf32", "forward", triton),
        gpu_entry("cifar_b32_32", "tf32", "forward_backward", triton),
        gpu_entry("cifar_b32_32", "tf32", "forward", "torch.fft + bmm"),
        gpu_entry(shape, "tf32", "forward", triton, chosen=True, seconds=0.005, graph_seconds=4e-6),
        gpu_entry(shape, "tf32", "forward", cuda, chosen=False, seconds=0.001),
        {
            "op": "model",
            "shape": "cifar10",
            "batch": 16,
            "peer": "dsno_kernels",
            "precision": "tf32",
            "direction": "forward",
            "seconds": 0.002,
            "baseline_seconds": 0.005,
            "ratio": 2.5,
        },
    ]
    machine = {"device": "cuda", "gpu": "Abacus 9", "cuda": "13.0", "cores": 2, "torch": "2.0"}
    machine |= {"triton": "3.6", "copy_gbytes": 4300.0, "gemm_gflops": {"tf32": 390e3}}
    content = {
        "machine_info": machine,
        "commit_info": {"id": "0123456789abcdef", "dirty": False},
        "datetime": "2030-01-02T03:04:05",
        "benchmarks": named(entries),
    }
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "abacus-9.json").write_text(json.dumps(content))
    (tmp_path / "results" / "tune-abacus-9.json").write_text("{}")  # not of these benchmarks
    marks = (f"<!-- benchmark:begin {n} -->\n<!-- benchmark:end {n} -->" for n in GPU_TABLES)
    (tmp_path / "README.md").write_text("\n".join(marks))
    return tmp_path


def test_report_of_a_gpu(made_up_gpu: Path) -> None:
    assert report.main(arguments(made_up_gpu)) == 0
    text = (made_up_gpu / "README.md").read_text()
    title = "| CIFAR-10, B=32, 32 x 32, C=256 | tf32 |"
    assert f"{title} forward | share of the limit | ≥ 75% | 50%, **missed** |" in text
    assert f"{title} forward | speed-up over eager | ≥ 12x | 10x, **missed** |" in text
    assert f"{title} forward + backward | peak memory / eager | ≤ 0.4 | 0.3, met |" in text
    assert "Abacus 9, CUDA 13.0; PyTorch 2.0, Triton 3.6; 2030-01-02" in text
    assert "copy 4.30 TB/s; matrix product tf32 390 TFLOP/s" in text
    assert "| cifar10, B=16 | dsno_kernels | tf32 | forward | 5.00 ms | 2.00 ms | **2.50x**" in text
    assert (
        "| DSNO-CIFAR, whole model | tf32 | forward | speed-up over eager | ≥ 2x | 2.5x, met"
        in text
    )
    # What runs by itself is shown, not what would have been faster.
    (row,) = [line for line in text.splitlines() if line.startswith("| T=16") and "4.00 µs" in line]
    assert "| 5.00 ms | **10.00x** | 6x | 50%" in row
    assert "| torch.fft + bmm |" in text.split("benchmark:begin peers_gpu")[1]
    assert (made_up_gpu / "results" / "share_of_limit.png").stat().st_size > 1000
    assert not (made_up_gpu / "results" / "spectral_conv.png").exists()
    assert report.main([*arguments(made_up_gpu), "--check"]) == 0


def test_without_a_gpu_every_table_of_it_says_not_measured(made_up_gpu: Path) -> None:
    (made_up_gpu / "results" / "abacus-9.json").unlink()
    assert report.main(arguments(made_up_gpu)) == 0
    text = (made_up_gpu / "README.md").read_text()
    assert text.count("| not measured yet |") == len(targets.TARGETS)
    assert text.count("Not measured yet.") == len(GPU_TABLES) - 1
    assert not list((made_up_gpu / "results").glob("*.png"))


@pytest.mark.parametrize(
    "change",
    [
        ("README.md", README.replace("begin peers_cpu", "begin no_such_table")),
        ("README.md", README.replace("<!-- benchmark:end peers_cpu -->", "")),
        ("results/toaster.json", "{}"),
        ("results/toaster.json", '{"machine_info":'),
    ],
    ids=["unknown table", "marker without partner", "no results file", "half a file"],
)
def test_report_refuses_what_it_cannot_read(
    made_up: Path, change: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    (made_up / change[0]).write_text(change[1])
    before = (made_up / "README.md").read_text()
    assert report.main(arguments(made_up)) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
    assert (made_up / "README.md").read_text() == before


@pytest.mark.parametrize("T", [1, 4, 5, 8], ids="T={}".format)
def test_work_of_a_shape_counts_real_products(T: int) -> None:
    modes = T // 2 + 1
    shape = shapes.Shape("all", "", (1, T, 3, 1, 1), modes)
    assert shape.real_coefficients == T  # all modes: as many numbers as the signal has
    n_real = 2 if T % 2 == 0 else 1
    assert shape.real_products == n_real + 4 * (modes - n_real)
    assert shape.flop("forward") == 2 * 9 * shape.real_products


def test_dft_tables_reproduce_the_signal() -> None:
    for T in (2, 4, 5, 9):
        F, G = peers.dft_tables(T, T // 2 + 1, torch.device("cpu"))
        assert torch.allclose(G @ F, torch.eye(T), atol=1e-5)


def test_saved_bytes_of_the_convolution_are_x_and_the_weight() -> None:
    """Nothing but x and the weight is kept: what the memory column of the tables counts."""
    shape = shapes.CPU_SHAPES[1].small()
    x = torch.randn(shape.size, requires_grad=True)
    weight = torch.randn(shape.channels, shape.channels, shape.modes, 2, requires_grad=True)
    call = next(p for p in peers.PEERS if p.name == "dsno_kernels[reference]").make(
        shape, "fp32", x.device
    )
    saved = measure.saved_bytes(lambda: call(x, weight))
    assert saved == 4 * (x.numel() + weight.numel())
