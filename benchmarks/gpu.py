"""Build, test and measure on a CUDA machine in one command of a few minutes: `make gpu`.

    python benchmarks/gpu.py [--minutes 9] [--out DIR] [--only STAGE ...] [--tune] [--dry-run]

It needs this checkout, a Python with torch, triton, pybind11 and pytest, and nvcc; no network and
no installation. The stages run one after the other, each in a process of its own that is stopped at
its deadline, so that a stage that hangs costs its own time only. What each has found is on disk
when it ends: `gpu.log` (everything the stages print), `gpu.jsonl` (each benchmark as it completes)
and `<gpu>.json`, which `report.py` turns into README's tables. Of a run that was killed, `--only
report` makes them of what it had measured. The exit code is 1 where the build, a test or a check of
a benchmark failed.

`--dry-run` runs every path of it on the CPU, with small shapes and a stand-in for `torch.cuda`; its
times mean nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the script runs from a checkout, installed or not

from benchmarks import journal  # noqa: E402

MINUTES = 9.0  # that the limits below are made for; another --minutes scales them
TAIL = 12  # lines of a stage's output that are shown when it ends
REFUSED = "Device not supported"  # compute-sanitizer, where the machine's runtime lacks it
# "ERROR SUMMARY: 2 errors", "RACECHECK SUMMARY: 3 hazards displayed (0 errors, 3 warnings)"
SUMMARY = re.compile(r"SUMMARY: .*?(\d+) errors?")
RESTARTS = 8  # of a process of tests whose CUDA context is lost
# What is done without where a module is not installed.
MODULES = {
    "pytest": "no tests and no benchmarks",
    "hypothesis": "no drawn calls among the tests",
    "pybind11": "no build: the CUDA C++ kernels are those that are built already, or none",
    "setuptools": "no build",
    "triton": "no Triton kernels",
    "cupy": "no CuPy backend",
    "diffusers": "none of its schedulers among the peers",
    "matplotlib": "no plot",
}
LOST = "the CUDA context is lost"  # what benchmarks/restart.py writes then
NO_TESTS = 5  # pytest's exit code where a share of the tests is empty
TABLES = (
    "targets_gpu",
    "spectral_conv_gpu",
    "peers_gpu",
    "overhead_gpu",
    "model_gpu",
    "student_gpu",
    "exp_step_gpu",
    "ld3_step_gpu",
    "schedulers_gpu",
    "denoising_gpu",
)


class Benchmarks(NamedTuple):
    """A file of benchmarks: its limit is that of its entries, `seconds` each with their set-up."""

    entries: int
    seconds: float
    reserve: float
    dry_run: str = ""  # what of it a dry run leaves out, each path taken once
    needs: tuple[str, ...] = ("pytest", "torch")


LARGE_OR_AGAIN = "16x4 or 256x256 or -2] or compile and (guided or overhead)"
BENCHMARKS = {
    "bench_spectral_conv": Benchmarks(480, 0.5, 105, "compile and real"),
    "bench_overhead": Benchmarks(10, 3, 15),
    "bench_model": Benchmarks(43, 2.5, 40),
    "bench_training": Benchmarks(8, 5, 20),
    "bench_exp_step": Benchmarks(42, 1.3, 20, LARGE_OR_AGAIN),
    "bench_ld3": Benchmarks(6, 4, 10, LARGE_OR_AGAIN),
    "bench_denoising": Benchmarks(16, 1.5, 15, "16x3 or 256x256 or -2]"),
    "bench_schedulers": Benchmarks(36, 1.2, 20, LARGE_OR_AGAIN, ("pytest", "torch", "diffusers")),
}


class Stage(NamedTuple):
    """A command with the most seconds it may take, and those that earlier stages leave to it."""

    name: str
    command: list[str]
    limit: float
    reserve: float
    needs: tuple[str, ...] = ()  # modules without which it does not run
    skip: str = ""  # why it does not run here
    shards: int = 0  # processes that share its tests, each started again where CUDA is lost
    environment: dict[str, str] = {}  # noqa: RUF012


class Outcome(NamedTuple):
    stage: str
    state: str  # "passed", "failed", "stopped at its deadline" or "skipped: WHY"
    seconds: float


def capability() -> str | None:
    """The compute capability of the first GPU as nvidia-smi says it, "9.0"."""
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    lines = done.stdout.split()
    return lines[0] if lines else None


def sanitizer() -> str | None:
    return shutil.which("compute-sanitizer") or shutil.which(
        "compute-sanitizer", path="/usr/local/cuda/bin"
    )


def stages(out: Path, tune: bool, dry_run: bool) -> list[Stage]:
    python, device = sys.executable, "cpu" if dry_run else "cuda"
    # The stand-in of standin.py on every machine: one path, and pytest-benchmark is not needed.
    pytest = [python, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:benchmark", "--tb=short"]
    pytest += ["-p", "benchmarks.restart"]
    measure = [*pytest, "-q", "-rs", "--device", device, "--journal", str(out / "gpu.jsonl")]
    build = [python, "setup.py", "-q", "build_ext", "--inplace"]
    archs = {} if os.environ.get("TORCH_CUDA_ARCH_LIST") else {"TORCH_CUDA_ARCH_LIST": capability()}
    once = [python, "tests/gpu_sanitizer.py", "--device", device]
    uncached = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # each tensor has bounds of its own
    interpreted = {"TRITON_INTERPRET": "1"} if dry_run else {}
    tests = ["--continue-on-collection-errors"]
    tests += [str(path.relative_to(ROOT)) for path in gpu_tests()]
    # Most of their time is Triton's compiler, which takes one core.
    workers = max(1, min(6, (os.cpu_count() or 1) // 2))
    if dry_run:
        build = [*build[:3], "--name"]
    checks = []
    for tool in ("memcheck", "racecheck"):
        program = sanitizer() or "compute-sanitizer"
        # PyTorch asks the driver for functions that it may not have: no errors of the kernels.
        check = [program, "--tool", tool, "--report-api-errors", "no", *once]
        skip = "" if sanitizer() else "compute-sanitizer is not on PATH"
        skip = f"dry run: {shlex.join(check)}" if dry_run else skip
        checks.append(Stage(tool, check, 75, 20, ("torch",), skip, uncached))
    made = [
        Stage("info", [python, "-m", "dsno_kernels", "info"], 60, 5, ("torch",)),
        Stage(
            "build",
            build,
            150,
            60,
            ("setuptools", "pybind11"),
            environment={key: value for key, value in archs.items() if value},
        ),
        Stage(
            "test",
            [*pytest, "-m", "gpu", "-v", "--durations=8", "--maxfail=40", *tests],
            200,
            90,
            ("pytest", "torch"),
            shards=workers,
        ),
        # Without the sanitizer first: whatever Triton compiles is then in its cache.
        Stage("sanitize", once, 60, 15, ("torch",), environment=interpreted),
        *checks,
        Stage(
            "compile",
            [python, "benchmarks/compile_ahead.py", "--device", device],
            90,
            35,
            ("pytest", "triton"),
            environment=interpreted,
        ),
    ]
    for name, (entries, each, reserve, left_out, needs) in BENCHMARKS.items():
        path = ROOT / "benchmarks" / f"{name}.py"
        missing = "" if path.exists() else f"benchmarks/{name}.py does not exist"
        command = [*measure, str(path)]
        if dry_run and left_out:
            command += ["-k", f"not ({left_out})"]
        made.append(Stage(name, command, entries * each, reserve, needs, missing, shards=1))
    if tune:
        command = [python, "benchmarks/tune.py", "--budget", "10" if dry_run else "60"]
        command += ["--dry-run", "--arch", "90"] if dry_run else []
        made.append(Stage("tune", command, 120, 40, ("pytest", "triton")))
    made.append(Stage("report", report(out), 30, 10))
    return made


def gpu_tests() -> list[Path]:
    """Test files that ask for a GPU; others may import what this machine does not have."""
    return [
        path
        for path in sorted((ROOT / "tests").glob("test_*.py"))
        if path.name.startswith("test_gpu") or "mark.gpu" in path.read_text()
    ]


def report(out: Path) -> list[str]:
    """README's tables from benchmarks/results; from another folder, tables of their own."""
    command = [sys.executable, "benchmarks/report.py", "--results", str(out)]
    if out == ROOT / "benchmarks" / "results":
        return command
    tables = out / "gpu_tables.md"
    marks = "benchmark:begin", "benchmark:end"
    blocks = [[f"<!-- {mark} {name} -->" for mark in marks] for name in TABLES]
    tables.write_text("\n\n".join("\n".join(block) for block in blocks) + "\n")
    return [*command, "--readme", str(tables)]


class Process:
    """One process of a stage, in a group of its own, with its output in a file."""

    def __init__(self, stage: Stage, index: int, log: Path, environment: dict[str, str]) -> None:
        self.environment = environment | stage.environment
        self.output = log.with_suffix(f".{index}")
        self.begun = log.with_suffix(f".{index}.attempted")
        self.command = stage.command
        if stage.shards:
            shard = f"{index}/{stage.shards}"
            self.command = [*stage.command, "--attempted", str(self.begun), "--shard", shard]
        self.restarts = RESTARTS if stage.shards else 0
        self.failed = self.ran = False
        for path in (self.output, self.begun):
            path.unlink(missing_ok=True)
        self.start()

    def start(self) -> None:
        with self.output.open("ab") as file:
            self.process = subprocess.Popen(
                self.command,
                cwd=ROOT,
                env=self.environment,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def running(self) -> bool:
        """Whether it still runs; it is started again where a test broke CUDA or the process."""
        code = self.process.poll()
        if code is None:
            return True
        self.failed = self.failed or code not in (0, NO_TESTS)
        self.ran = self.ran or code != NO_TESTS
        lost = self.begun.exists() and self.begun.read_text().splitlines()[-1:] == [LOST]
        if (code < 0 or lost) and self.restarts:
            self.restarts -= 1
            self.kill()
            self.start()
            return True
        return False

    def kill(self) -> None:
        """End it and what it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def text(self) -> str:
        """All it has printed; its files go."""
        text = self.output.read_text(errors="replace")
        for path in (self.output, self.begun):
            path.unlink(missing_ok=True)
        return text


def run(stage: Stage, seconds: float, log: Path, environment: dict[str, str]) -> Outcome:
    """Run a stage for at most `seconds`, its output into the log; show the end of it."""
    missing = [name for name in stage.needs if importlib.util.find_spec(name) is None]
    skip = stage.skip or (f"{', '.join(missing)} not installed" if missing else "")
    skip = skip or ("no time is left" if seconds < 1 else "")
    title = f"\n==== {stage.name}: {shlex.join(stage.command)}\n"
    if skip:
        write(log, f"{title}skipped: {skip}\n")
        return Outcome(stage.name, f"skipped: {skip}", 0.0)
    start = time.monotonic()
    processes: list[Process] = []
    try:
        for index in range(max(1, stage.shards)):
            processes.append(Process(stage, index, log, environment))
        while sum(process.running() for process in processes):  # every one is asked
            if time.monotonic() - start > seconds:
                break
            time.sleep(0.05)
        stopped = any(process.process.poll() is None for process in processes)
    finally:  # also when this script is interrupted
        for process in processes:
            process.kill()
        text = "".join(process.text() for process in processes)
        write(log, title + text)
    print("\n".join(text.splitlines()[-TAIL:]), flush=True)
    failed = any(process.failed for process in processes)
    code = None if stopped else int(failed or not any(process.ran for process in processes))
    return Outcome(stage.name, state_of(stage, code, text, seconds), time.monotonic() - start)


def write(log: Path, text: str) -> None:
    with log.open("a") as file:
        file.write(text)


def state_of(stage: Stage, code: int | None, text: str, seconds: float) -> str:
    """What an exit code (None: stopped) and an output say."""
    if code is None:
        return f"stopped at its deadline of {seconds:.0f} s"
    if "--report-api-errors" in stage.command:  # its exit code is that of the program it watches
        if REFUSED in text:
            return f"skipped: compute-sanitizer says {REFUSED!r}"
        found = SUMMARY.findall(text)
        if code or not found or any(int(errors) for errors in found):
            return "failed"
        return "passed" + (", with warnings" if "Warning:" in text else "")
    return "failed" if code else "passed"


def deadline(stage: Stage, later: list[Stage], left: float, scale: float) -> float:
    """Its limit, or less where the stages after it would lose their reserve."""
    return max(
        min(stage.reserve * scale, left),
        min(stage.limit * scale, left - scale * sum(after.reserve for after in later)),
    )


def fails(outcome: Outcome) -> bool:
    """Whether a test or check failed. What was stopped elsewhere has kept what it had found."""
    if outcome.stage in ("compile", "tune"):  # the benchmarks and tests show what is wrong
        return False
    if outcome.state.startswith("stopped"):
        return outcome.stage in ("info", "build", "test")
    needed = outcome.stage in ("info", "build", "test") and "not installed" in outcome.state
    return outcome.state == "failed" or needed


def sees_a_gpu() -> bool:
    code = "import sys, torch; sys.exit(not torch.cuda.is_available())"
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=MINUTES, help="for everything")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--only", action="append", metavar="STAGE", help="may be given repeatedly")
    parser.add_argument("--tune", action="store_true", help="also tune launch parameters, briefly")
    parser.add_argument("--commit", help="to write into the results, where there is no git here")
    parser.add_argument("--dry-run", action="store_true", help="every path, on the CPU")
    options = parser.parse_args(argv)
    out = options.out.resolve()
    if options.dry_run and out == ROOT / "benchmarks" / "results":
        parser.error("--dry-run needs --out: its numbers do not belong into benchmarks/results")
    out.mkdir(parents=True, exist_ok=True)
    chosen = stages(out, options.tune, options.dry_run)
    names = [stage.name for stage in chosen]
    unknown = [name for name in options.only or [] if name not in names]
    if unknown:
        parser.error(f"unknown stage {unknown[0]!r}; accepted: {', '.join(names)}")
    lacking = [name for name in ("torch", "pytest") if importlib.util.find_spec(name) is None]
    if lacking:
        parser.error(
            f"{sys.executable} has no {' and no '.join(lacking)}: name a Python that has,"
            " make gpu PY=.., or install it"
        )
    if not options.dry_run and options.only != ["report"] and not sees_a_gpu():
        print("gpu: PyTorch sees no CUDA device here; --dry-run --out DIR runs on the CPU")
        return 2
    if options.only:
        chosen = [stage for stage in chosen if stage.name in options.only]
    else:
        for name in ("gpu.jsonl", "gpu.log"):
            (out / name).unlink(missing_ok=True)
    environment = os.environ | {"PYTHONUNBUFFERED": "1", "PYTHONFAULTHANDLER": "1"}
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    if options.commit:
        os.environ["DSNO_KERNELS_COMMIT"] = options.commit
    if options.dry_run:
        # One thread: small work, and often on a machine that does other work too.
        environment |= {"DSNO_KERNELS_DRY_RUN": "1", "OMP_NUM_THREADS": "1"}

    for name, without in MODULES.items():
        if importlib.util.find_spec(name) is None:
            print(f"gpu: {name} is not installed: {without}")
    end, scale = time.monotonic() + 60 * options.minutes, options.minutes / MINUTES
    outcomes = []
    results = journal.write_results(out / "gpu.jsonl", out)
    for i, stage in enumerate(chosen):
        seconds = deadline(stage, chosen[i + 1 :], end - time.monotonic(), scale)
        print(f"==== {stage.name}, at most {seconds:.0f} s", flush=True)
        outcomes.append(run(stage, seconds, out / "gpu.log", environment))
        results = journal.write_results(out / "gpu.jsonl", out)
    print("\n==== summary")
    for outcome in outcomes:
        print(f"{outcome.stage:<20} {outcome.seconds:6.1f} s  {outcome.state}")
    print(f"results: {results or 'none'}; everything printed: {out / 'gpu.log'}")
    return int(any(fails(outcome) for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
