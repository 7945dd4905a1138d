"""The tree of commands: what is imported when, and how a command ends."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dsno_kernels import commands
from dsno_kernels.models import ModelFileError
from dsno_kernels.training.errors import CommandError


def add(
    monkeypatch: pytest.MonkeyPatch, name: str, run: Callable[[argparse.Namespace], None]
) -> None:
    """A command with one option, in a module of its own."""
    module = types.ModuleType("made_up")
    module.add_arguments = lambda parser: parser.add_argument("--count", type=int, default=1)
    module.run = run
    monkeypatch.setitem(sys.modules, "made_up", module)
    monkeypatch.setattr(commands, "COMMANDS", {name: ("made up for a test", "made_up")})


@pytest.mark.parametrize("name", ["count", "train count"], ids=["alone", "in a group"])
def test_a_command_gets_its_arguments(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    counts: list[int] = []
    add(monkeypatch, name, lambda arguments: counts.append(arguments.count))
    assert commands.main([*name.split(), "--count", "3"]) == 0
    assert commands.main(name.split()) == 0
    assert counts == [3, 1]


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (CommandError("no such file"), 2, "train count: no such file"),
        (
            ModuleNotFoundError("No module named 'lmdb'", name="lmdb"),
            2,
            "train count: missing lmdb; run: pip install dsno-kernels[train]",
        ),
        (ModelFileError("a.safetensors is broken"), 2, "train count: a.safetensors is broken"),
        (
            OSError(28, "No space left on device", "out/x.png"),
            2,
            "train count: out/x.png: No space left on device",
        ),
        (MemoryError(), 2, "train count: out of memory; give a smaller --batch"),
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
            2,
            "train count: out of memory; give a smaller --batch",
        ),
        (KeyboardInterrupt(), 130, "train count: interrupted"),
        (KeyboardInterrupt("step 7 is saved"), 130, "train count: interrupted; step 7 is saved"),
    ],
    ids=[
        "command",
        "package",
        "model",
        "disk",
        "memory",
        "GPU memory",
        "interrupt",
        "interrupt with a word",
    ],
)
def test_what_ends_a_command_is_one_line(
    error: BaseException,
    code: int,
    line: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def run(arguments: argparse.Namespace) -> None:
        raise error

    add(monkeypatch, "train count", run)
    assert commands.main(["train", "count"]) == code
    assert capsys.readouterr().err.strip() == line


def test_a_tensor_that_does_not_fit_into_memory(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(arguments: argparse.Namespace) -> None:
        arguments.accumulate = 1
        torch.empty(2**60)

    add(monkeypatch, "train count", run)
    assert commands.main(["train", "count"]) == 2
    line = "train count: out of memory; give --accumulate, --activation-checkpointing or a smaller"
    assert capsys.readouterr().err.strip() == f"{line} --batch"


def test_another_runtime_error_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    add(monkeypatch, "count", lambda arguments: torch.zeros(2) @ torch.zeros(3))
    with pytest.raises(RuntimeError, match="size"):
        commands.main(["count"])


def test_a_fault_of_the_library_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(arguments: argparse.Namespace) -> None:
        raise ModuleNotFoundError("No module named 'dsno_kernels.gone'", name="dsno_kernels.gone")

    add(monkeypatch, "count", run)
    with pytest.raises(ModuleNotFoundError, match="gone"):
        commands.main(["count"])


def test_warnings_of_the_package_carry_the_name_of_the_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import logging

    logger = logging.getLogger("dsno_kernels.made_up")
    add(monkeypatch, "count", lambda arguments: logger.warning("%d left out", 2))
    assert commands.main(["count"]) == 0
    assert capsys.readouterr().err == "count: warning: 2 left out\n"
    assert not logging.getLogger("dsno_kernels").handlers


def test_help_imports_no_command() -> None:
    code = (
        "import sys; from dsno_kernels import commands\n"
        "try: commands.main(['--help'])\n"
        "except SystemExit: pass\n"
        "for summary, module in commands.COMMANDS.values(): assert module not in sys.modules\n"
    )
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    for name in commands.COMMANDS:
        assert name.split()[0] in out.stdout


@pytest.mark.parametrize("name", sorted(commands.COMMANDS))
def test_every_command_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        commands.main([*name.split(), "--help"])
    assert stop.value.code == 0
    assert f"python -m dsno_kernels {name}" in capsys.readouterr().out


def test_an_unknown_argument_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        commands.main(["info", "more"])
    assert stop.value.code == 2
    assert "unrecognized arguments: more" in capsys.readouterr().err


@pytest.mark.parametrize(
    "command",
    [
        ["-m", "dsno_kernels", "info"],
        ["-mdsno_kernels", "info"],
        ["-c", "import dsno_kernels"],
        ["-m", "other"],
    ],
)
def test_an_interrupt_while_pytorch_is_imported(command: list[str], tmp_path: Path) -> None:
    """A command ends quietly; another program that imports the package gets its exception."""
    slow = "import sys, time; print('importing', flush=True); time.sleep(600)"
    (tmp_path / "torch.py").write_text(slow)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "__init__.py").write_text("import dsno_kernels")
    process = subprocess.Popen(
        [sys.executable, *command],
        cwd=Path(__file__).parents[1],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # Where the tests run in the background, Ctrl-C is ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout is not None and process.stdout.readline() == "importing\n"
    process.send_signal(signal.SIGINT)
    _, error = process.communicate()
    if command[-1] == "info":
        assert (process.returncode, error) == (130, "")
    else:
        assert error.splitlines()[-1] == "KeyboardInterrupt"
