"""`make gpu` without a GPU: timing, journal and stages; test_dry_run.py runs what they start."""

from __future__ import annotations

import inspect
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import (
    compile_ahead,
    events,
    gpu,
    host_cuda,
    journal,
    peers,
    report_data,
    report_tables,
    shapes,
)
from tests import gpu_sanitizer

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")


def parameters(function: Any) -> list[str]:
    return [name for name in inspect.signature(function).parameters if name != "self"]


def test_the_stand_in_takes_the_arguments_of_torch_cuda() -> None:
    for name, own in vars(host_cuda.HostCuda).items():
        if name.startswith("__"):
            continue
        real = getattr(torch.cuda, name)
        if inspect.isclass(own):
            for method in set(vars(own)) - set(vars(object)) - {"__dict__", "__weakref__"}:
                if not method.startswith("__"):
                    own_names = parameters(getattr(own, method))
                    if method != "replay":  # bound in C++, without a signature
                        assert own_names == parameters(getattr(real, method))[: len(own_names)]
                    assert callable(getattr(real, method))
        elif name != "get_device_properties":
            own_names = parameters(getattr(host_cuda.HostCuda, name))
            assert own_names == parameters(real)[: len(own_names)], name
    assert "enable_timing" in inspect.signature(torch.cuda.Event.__new__).parameters


class Clock:
    """A device whose time passes only in what is called."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.log = 0.0, []
        clock = self

        class Event(host_cuda.Event):
            def record(self, stream: Any = None) -> None:
                self.time = clock.now
                clock.log.append("mark")

        monkeypatch.setattr(host_cuda.HostCuda, "Event", Event)
        monkeypatch.setenv("DSNO_KERNELS_DRY_RUN", "1")
        monkeypatch.setattr(events, "chill", lambda device, reads=1: self.work("chill", 0.5))

    def work(self, name: str, seconds: float) -> None:
        self.now += seconds
        self.log.append(name)


def test_only_the_call_itself_is_timed_and_its_caches_are_cold(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = Clock(monkeypatch)
    found = events.time_beside(
        lambda: clock.work("call", 0.25), lambda: clock.work("eager", 1.0), CPU
    )
    assert found["seconds"] == pytest.approx(0.25)
    assert found["baseline_seconds"] == pytest.approx(1.0)
    assert found["ratio"] == found["ratio_q1"] == found["ratio_q3"] == pytest.approx(4)
    assert found["rounds"] >= events.ROUNDS[0]
    assert not found["host_bound"] and not found["baseline_host_bound"]
    one_round = ["chill", "mark", "eager", "mark", "chill", "mark", "call", "mark"]
    rounds = clock.log[-len(one_round) * found["rounds"] :]
    assert rounds == one_round * found["rounds"]


def test_an_entry_says_where_the_host_takes_longer_than_the_device(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = Clock(monkeypatch)

    def slow_to_start() -> None:
        time.sleep(2e-3)
        clock.work("call", 1e-3)

    found = events.time_beside(slow_to_start, lambda: clock.work("eager", 1e-2), CPU)
    assert found["host_bound"] and found["host_seconds"] > found["seconds"]
    assert not found["baseline_host_bound"]
    what = {"op": "model", "shape": "m", "batch": 1, "precision": "fp32", "direction": "forward"}
    source = report_data.Source("toaster", "0123456789", False, "2030-01-02T03:04:05")
    entry = found | what | {"peer": "ours", "source": source}
    entry |= {"seconds": 1e-3, "baseline_seconds": 1e-2, "host_seconds": 3e-3}
    machine = {"device": "cuda", "gpu": "Abacus", "cuda": "13.0", "cores": 2, "torch": "2.0"}
    table = report_tables.model([report_data.Result(machine, [entry])])
    assert "| 10.0 ms | 1.00 ms (host-bound: 3.00 ms) |" in table


def test_the_buffer_is_read_for_as_long_as_the_host_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    Clock(monkeypatch)  # a read takes half a second
    reads = [events.reads_that_cover(host, CPU) for host in (0.0, 1.0, 2.0, 1e9)]
    assert reads[0] == 1
    assert 0.5 * 4 * reads[1] >= 1.0
    assert reads == sorted(reads) and reads[-1] == 1 + events.MOST_READS


def test_every_shape_is_measured_in_every_precision_and_what_matters_first() -> None:
    cases = peers.cases("cuda", shapes.GPU_SHAPES)
    ours = [(s.name, p) for s, p, peer in cases if peer.name == "dsno_kernels[triton]"]
    wanted = {(s.name, p) for s in shapes.GPU_SHAPES for p in peers.PRECISIONS["cuda"]}
    assert set(ours) == wanted and len(ours) == len(wanted)
    assert len(shapes.GPU_SHAPES) == 22
    assert set(shapes.REPRESENTATIVE) == {s.name for s in shapes.GPU_SHAPES if s.all_peers}
    whens = [peer.when for _, _, peer in cases]
    assert whens == sorted(whens)
    compiled = {(s.name, peer.name) for s, _, peer in cases if peer.when == peers.COMPILED}
    assert len(compiled) == 2 * len(shapes.REPRESENTATIVE)
    ahead = [(s.name, precision) for s, precision in compile_ahead.convolutions()]
    assert set(ahead) == wanted and len(ahead) == len(wanted)
    steps = [name for part in compile_ahead.parts() for name, _ in part]
    assert {f"{name} {precision}" for name, precision in wanted} < set(steps)


def test_a_journal_survives_a_cut_and_the_later_entry_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "gpu.jsonl"
    assert journal.write_results(path, tmp_path) is None
    journal.append(path, {"machine_info": {"gpu": "A"}, "slug": "a"})
    assert journal.write_results(path, tmp_path) is None
    for name, seconds in (("x", 1.0), ("y", 2.0), ("x", 3.0)):
        journal.append(path, {"name": name, "group": "g", "extra_info": {"seconds": seconds}})
    with path.open("a") as file:
        file.write('{"name": "z", "extra')
    monkeypatch.setenv("DSNO_KERNELS_COMMIT", "abc")
    written = journal.write_results(path, tmp_path)
    assert written == tmp_path / "a.json"
    content = json.loads(written.read_text())
    assert content["commit_info"] == {"id": "abc", "dirty": None}
    found = {entry["name"]: entry["extra_info"]["seconds"] for entry in content["benchmarks"]}
    assert found == {"x": 3.0, "y": 2.0}
    assert not list(tmp_path.glob("*.partial"))


def python(code: str, **options: Any) -> gpu.Stage:
    return gpu.Stage("stage", [sys.executable, "-c", code], 60, 10, **options)


def test_a_stage_is_stopped_at_its_deadline_with_all_it_started(tmp_path: Path) -> None:
    """What it printed stays; a child that holds on to its own output is ended with it."""
    code = (
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "print('child', child.pid, flush=True)\n"
        "time.sleep(600)\n"
    )
    log = tmp_path / "log"
    outcome = gpu.run(python(code), 3.0, log, dict(os.environ))
    assert outcome.state.startswith("stopped at its deadline")
    assert outcome.seconds < 30
    pid = int(log.read_text().split("child")[-1])
    assert ended(pid, within=60.0)


def ended(pid: int, within: float) -> bool:
    """Whether a process is gone, or a zombie, in so many seconds: a kill takes effect when the
    process is next scheduled.
    """
    deadline = time.monotonic() + within
    while time.monotonic() < deadline:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX":
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.05)
    return False


BROKEN = """
import os
import pytest
import torch

def no_context(*_):
    raise RuntimeError("CUDA error: an illegal memory access was encountered")

@pytest.mark.parametrize("i", range(9))
def test_one(i, monkeypatch):
    print("ran", i)
    if i == 2:
        os.abort()
    if i == 4:
        torch.cuda.is_initialized, torch.cuda.synchronize = (lambda: True), no_context
        no_context()
    assert not torch.cuda.is_initialized()
"""


def test_tests_go_on_behind_one_that_breaks_cuda(tmp_path: Path) -> None:
    """One that ends the process and one that loses the context cost themselves only."""
    (tmp_path / "test_broken.py").write_text(BROKEN)
    options = ["-p", "no:cacheprovider", "-p", "benchmarks.restart", "-c", os.devnull, "-v"]
    command = [sys.executable, "-m", "pytest", *options, str(tmp_path / "test_broken.py")]
    log, environment = tmp_path / "log", os.environ | {"PYTHONPATH": str(ROOT)}
    stage = gpu.Stage("test", command, 60, 10, shards=2)
    assert gpu.run(stage, 120, log, environment).state == "failed"
    text = log.read_text()
    for i in range(9):
        assert text.count(f"test_one[{i}] PASSED") == (i not in (2, 4)), i
    assert text.count("test_one[4] FAILED") == 1
    assert text.count("test_one[2] ") == 1
    assert sorted(path.name for path in tmp_path.glob("log*")) == ["log"]


def test_a_stage_without_a_test_has_not_passed(tmp_path: Path) -> None:
    (tmp_path / "test_nothing.py").write_text("")
    command = [sys.executable, "-m", "pytest", "-p", "benchmarks.restart", "-c", os.devnull]
    stage = gpu.Stage("test", [*command, str(tmp_path)], 60, 10, shards=2)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    assert gpu.run(stage, 60, tmp_path / "log", environment).state == "failed"


@pytest.mark.parametrize(
    ("code", "options", "seconds", "state"),
    [
        ("print('fine')", {}, 60, "passed"),
        ("raise SystemExit(3)", {}, 60, "failed"),
        ("", {"needs": ("no_such_module",)}, 60, "skipped: no_such_module not installed"),
        ("", {"skip": "of a reason"}, 60, "skipped: of a reason"),
        ("", {}, 0.5, "skipped: no time is left"),
    ],
)
def test_the_state_of_a_stage(
    code: str, options: dict[str, Any], seconds: float, state: str, tmp_path: Path
) -> None:
    outcome = gpu.run(python(code, **options), seconds, tmp_path / "log", dict(os.environ))
    assert outcome.state.startswith(state)


@pytest.mark.parametrize(
    ("code", "text", "state"),
    [
        (0, "42 calls ran\n========= ERROR SUMMARY: 0 errors", "passed"),
        (0, "========= ERROR SUMMARY: 1 error", "failed"),
        (0, "RACECHECK SUMMARY: 2 hazards displayed (2 errors, 0 warnings)", "failed"),
        (
            0,
            "Warning: Race\nRACECHECK SUMMARY: 1 hazard displayed (0 errors, 1 warning)",
            "passed,",
        ),
        (1, "========= ERROR SUMMARY: 0 errors", "failed"),
        (0, "42 calls ran, and the tool said nothing", "failed"),
        (1, f"========= Error: {gpu.REFUSED}", "skipped"),
        (None, "", "stopped"),
    ],
)
def test_what_the_sanitizer_says(code: int | None, text: str, state: str, tmp_path: Path) -> None:
    made = {stage.name: stage for stage in gpu.stages(tmp_path, tune=False, dry_run=False)}
    for name in ("memcheck", "racecheck"):
        assert gpu.state_of(made[name], code, text, 1.0).startswith(state)


@pytest.mark.parametrize(
    ("stage", "state", "expected"),
    [
        ("test", "passed", False),
        ("test", "failed", True),
        ("test", "stopped at its deadline of 200 s", True),
        ("test", "skipped: pytest not installed", True),
        ("build", "failed", True),
        ("memcheck", "failed", True),
        ("memcheck", "stopped at its deadline of 75 s", False),
        ("memcheck", "skipped: compute-sanitizer is not on PATH", False),
        ("compile", "failed", False),
        ("bench_overhead", "failed", True),
        ("bench_overhead", "stopped at its deadline of 30 s", False),
    ],
)
def test_what_fails_a_run(stage: str, state: str, expected: bool) -> None:
    assert gpu.fails(gpu.Outcome(stage, state, 1.0)) is expected


def test_later_stages_keep_their_reserve(tmp_path: Path) -> None:
    made = gpu.stages(tmp_path, tune=True, dry_run=False)
    left = 60 * gpu.MINUTES
    assert sum(stage.reserve for stage in made) <= left
    for i, stage in enumerate(made):  # each takes all that it may
        seconds = gpu.deadline(stage, made[i + 1 :], left, 1.0)
        assert stage.reserve <= seconds <= stage.limit
        left -= seconds
    assert left >= 0


def test_arguments_that_make_no_sense(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for arguments in (["--dry-run"], ["--dry-run", "--out", str(tmp_path), "--only", "nothing"]):
        with pytest.raises(SystemExit) as stopped:
            gpu.main(arguments)
        assert stopped.value.code == 2
    with monkeypatch.context() as patch:
        patch.setattr("importlib.util.find_spec", lambda name: None)
        with pytest.raises(SystemExit):
            gpu.main(["--out", str(tmp_path)])
    assert "has no torch and no pytest: name a Python that has" in capsys.readouterr().err
    monkeypatch.setattr(gpu, "sees_a_gpu", lambda: False)
    assert gpu.main(["--out", str(tmp_path)]) == 2
    assert "sees no CUDA device" in capsys.readouterr().out
    assert not (tmp_path / "gpu.log").exists()


def test_the_sanitizer_script_checks_what_it_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert gpu_sanitizer.main(["--device", "cpu"]) == 0
    assert "0 of them wrong" in capsys.readouterr().out
    right = gpu_sanitizer.dk.spectral_conv

    def wrong(x: torch.Tensor, weight: torch.Tensor, **options: Any) -> torch.Tensor:
        scale = 1.0 if options["backend"] == "reference" else 1.1
        return scale * right(x, weight, **options)

    monkeypatch.setattr(gpu_sanitizer.dk, "spectral_conv", wrong)
    assert gpu_sanitizer.main(["--device", "cpu"]) == 1
