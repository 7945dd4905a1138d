"""Dry runs of what `make gpu` starts: no path of it meets a GPU for the first time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import bench_exp_step, bench_ld3, gpu, journal, peers, shapes, targets
from tests import interpreter

ROOT = Path(__file__).resolve().parent.parent
INTERPRETED = ("test_gpu", "test_gpu_model")  # what they run has Triton kernels


def dry_run(*command: str, **more: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {
        **more,
        "DSNO_KERNELS_DRY_RUN": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "PYTEST_ADDOPTS": "",
    }
    environment.pop("PYTEST_XDIST_WORKER", None)
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True
    )


def test_a_dry_run_measures_and_reports(tmp_path: Path) -> None:
    """Machine, a benchmark without pytest-benchmark, the results file, tables and a plot."""
    only = ["info", "bench_overhead", "memcheck", "report"]
    options = [option for name in only for option in ("--only", name)]
    done = dry_run("benchmarks/gpu.py", "--dry-run", "--out", str(tmp_path), *options)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    content = json.loads((tmp_path / "dry-run.json").read_text())
    assert content["machine_info"]["gpu"] == "Dry Run"
    assert set(content["machine_info"]["gemm_gflops"]) == {"fp32", "bf16x3", "tf32", "bf16"}
    entries = [entry["extra_info"] for entry in content["benchmarks"]]
    assert {"overhead", "truncated_rfft", "truncated_irfft"} == {e["op"] for e in entries}
    timed = [entry for entry in entries if entry["op"] != "overhead"]
    assert all(entry["timing"].startswith("device events") for entry in timed)
    assert "Dry Run" in (tmp_path / "gpu_tables.md").read_text()
    assert "--tool memcheck --report-api-errors no" in (tmp_path / "gpu.log").read_text()


# What of each file a dry run must keep: its peers, both passes, guidance, and the host's time.
KEPT = {
    "bench_spectral_conv": [
        *("cifar_b32_32-", "t16_32_c256_k8-", "fno_k32-", "torch.compile(eager)-forward"),
        *(f"-{precision}-dsno_kernels[cpu]-forward_b" for precision in peers.PRECISIONS["cuda"]),
        *(f"-{peer.name.replace(' ', '_')}-" for peer in peers.PEERS if peer.when == peers.SOME),
    ],
    "bench_model": ["small-", "small_classes-", "CUDA graph", "one_graph"],
    "bench_training": [
        f"[digits-{precision}-{work}]"
        for work in ("training", "sampling")
        for precision in ("fp32", "bf16")
    ],
    "bench_exp_step": [
        *(
            f"{peer}-{step}-1]"
            for peer in bench_exp_step.SCHEDULERS
            for step in ("plain", "guided")
        ),
        *("eager-guided-1]", "torch.compile-plain-1]", "overhead[diffusers DEIS-3-guided]"),
        *("test_exp_step_of_one_gib", "test_captured_loop"),
    ],
    "bench_ld3": [f"[64x3x32x32-{peer}-1]" for peer in bench_ld3.PEERS],
    "bench_denoising": [
        *("[64x3x32x32-eager-drawn-1]", "[64x3x32x32-torch.compile-given-1]"),
        *("test_denoising_of_one_gib[drawn]", "test_denoising_of_one_gib[given]"),
        "test_heun[64x3x32x32-1]",
    ],
    "bench_schedulers": [
        *(f"[{kind}-64" for kind in ("scheduler", "scheduler_loop")),
        *("diffusers UniPC-3-guided-1]", "overhead[diffusers DEIS-3]"),
    ],
}


@pytest.mark.parametrize("name", KEPT)
def test_a_dry_run_takes_every_path_and_compiles_once(name: str, tmp_path: Path) -> None:
    made = {stage.name: stage for stage in gpu.stages(tmp_path, tune=False, dry_run=True)}
    attempted = ["--attempted", str(tmp_path / "attempted"), "--collect-only"]
    done = dry_run(*made[name].command[1:], *attempted)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    chosen = [line for line in done.stdout.splitlines() if "::" in line]
    for part in KEPT[name]:
        assert any(part in line for line in chosen), part
    assert len(chosen) < 140
    assert sum("torch.compile" in line for line in chosen) <= 2  # one function, both passes


def test_the_spectral_convolution_is_measured_in_a_dry_run(tmp_path: Path) -> None:
    path = tmp_path / "gpu.jsonl"
    chosen = "fno_k32 and forward_backward and not compile"
    done = dry_run(
        *("-m", "pytest", "benchmarks/bench_spectral_conv.py", "-q", "-p", "no:benchmark"),
        *("--device", "cpu", "--journal", str(path), "-k", chosen),
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    entries = [line["extra_info"] for line in journal.read(path) if "extra_info" in line]
    ours = {e["precision"]: e for e in entries if e["peer"] == "dsno_kernels[cpu]"}
    assert set(ours) == set(peers.PRECISIONS["cuda"])
    shape = next(s for s in shapes.GPU_SHAPES if s.name == "fno_k32").small()
    assert ours["fp32"]["bytes"] == shape.least_bytes("forward_backward")
    assert ours["bf16_io"]["bytes"] == shape.least_bytes("forward_backward", itemsize=2)
    for entry in ours.values():
        assert entry["chosen"] and entry["graph_seconds"] >= 0 and entry["peak_ratio"] == 1
        assert entry["share_of_limit"] == pytest.approx(entry["limit_seconds"] / entry["seconds"])
    assert ours["bf16_io"]["errors"]["y"] > 1e-4  # x and y are rounded indeed


def test_steps_are_measured_against_a_copy_and_a_loop_in_a_dry_run(tmp_path: Path) -> None:
    path = tmp_path / "gpu.jsonl"
    done = dry_run(
        *("-m", "pytest", "benchmarks/bench_exp_step.py", "-q", "-p", "no:benchmark"),
        *("--device", "cpu", "--journal", str(path), "-k", "one_gib or captured_loop"),
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    found = {e["extra_info"]["op"]: e["extra_info"] for e in journal.read(path) if "name" in e}
    copy, loop = found["exp_step_copy"], found["exp_step_loop"]
    assert copy["share_of_copy"] == pytest.approx(2.5 * copy["ratio"])  # five tensors to two
    assert loop["diffusers_ratio"] == loop["ratio"] and loop["steps"] == 20
    for target in targets.TARGETS[-2:]:
        assert found[target.where["op"]][target.metric] > 0


def test_denoising_is_measured_against_a_copy_in_a_dry_run(tmp_path: Path) -> None:
    path = tmp_path / "gpu.jsonl"
    done = dry_run(
        *("-m", "pytest", "benchmarks/bench_denoising.py", "-q", "-p", "no:benchmark"),
        *("--device", "cpu", "--journal", str(path), "-k", "one_gib"),
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    found = [line["extra_info"] for line in journal.read(path) if "name" in line]
    assert {entry["drawn"] for entry in found} == {True, False}
    for entry in found:
        tensors = 5 if entry["drawn"] else 7  # a copy moves two
        assert entry["share_of_copy"] == pytest.approx(tensors / 2 * entry["ratio"])
    aims = [target for target in targets.TARGETS if target.where["op"] == "denoising_copy"]
    assert {target.where["drawn"] for target in aims} == {True, False}


@pytest.mark.parametrize("path", gpu.gpu_tests(), ids=lambda path: path.stem)
def test_the_gpu_tests_pass_in_a_dry_run(path: Path) -> None:
    """Every file that `make gpu` runs; Triton kernels in the interpreter, as far as it goes."""
    interpreted = {}
    if path.stem in INTERPRETED and interpreter.broken() is None:
        interpreted["TRITON_INTERPRET"] = "1"
    done = dry_run(
        "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", str(path), **interpreted
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert " passed" in done.stdout
