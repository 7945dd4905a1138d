"""The commands of `python -m dsno_kernels`; the module of a command is imported when it is chosen.

Such a module has ``add_arguments(parser)`` and ``run(arguments)``. What ends a command early is one
line on stderr: with exit code 2 a `CommandError`, a `ModelFileError`, a package that is missing,
too little memory or a file system that refuses; with exit code 130 Ctrl-C, and SIGTERM where a
network is trained.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from dsno_kernels import _starting
from dsno_kernels.models.files import ModelFileError
from dsno_kernels.training.errors import CommandError

# Command: (what it does, its module).
COMMANDS = {
    "info": (
        "versions, devices, and which backend would run each op",
        "dsno_kernels.info",
    ),
    "demo": (
        "train a small DSNO on real images and compare the layers",
        "dsno_kernels.demo",
    ),
    "train teacher": (
        "1. a denoiser of real images",
        "dsno_kernels.training.teacher",
    ),
    "train trajectories": (
        "2. from noise to image, step by step, by a teacher",
        "dsno_kernels.training.trajectories",
    ),
    "train dsno": (
        "3. the sampler, which learns the trajectories",
        "dsno_kernels.training.student",
    ),
    "learn-grid": (
        "the best times for a solver with few steps, learned from a teacher",
        "dsno_kernels.time_grids.command",
    ),
    "sample": (
        "images from noise, one forward pass each",
        "dsno_kernels.sampling.command",
    ),
    "evaluate": (
        "how close samples are to real images, over several seeds",
        "dsno_kernels.evaluation.command",
    ),
}
GROUPS = {"train": "from a data set to a one-forward sampler, step by step"}

# Optional packages: what is imported, what pip installs, and the extra that has it.
EXTRAS = {
    "sklearn": ("scikit-learn", "train"),
    "tqdm": ("tqdm", "train"),
    "matplotlib": ("matplotlib", "train"),
    "PIL": ("pillow", "train"),
    "safetensors": ("safetensors", "train"),
    "lmdb": ("lmdb", "train"),
    "diffusers": ("diffusers", "diffusers"),
}


class LazyParser(argparse.ArgumentParser):
    """A parser that asks the module of its command for its arguments when it is used."""

    def __init__(self, *args: Any, module: str | None = None, **options: Any) -> None:
        super().__init__(*args, **options)
        self._module = module

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        if self._module is not None:
            module = importlib.import_module(self._module)
            module.add_arguments(self)
            self.set_defaults(run=module.run)
            self._module = None
        return super().parse_known_args(args, namespace)


def parser() -> argparse.ArgumentParser:
    """The parser of all commands; its result has ``run``, and the words of the command in
    ``command`` and ``step``.
    """
    root = LazyParser(prog="python -m dsno_kernels", description=_description())
    levels = {"": root.add_subparsers(dest="command", metavar="COMMAND", required=True)}
    for name, (summary, module) in COMMANDS.items():
        group, _, leaf = name.rpartition(" ")
        if group not in levels:
            branch = levels[""].add_parser(group, help=GROUPS[group], description=GROUPS[group])
            levels[group] = branch.add_subparsers(dest="step", metavar="STEP", required=True)
        levels[group].add_parser(leaf, help=summary, description=summary, module=module)
    return root


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: the words after ``python -m dsno_kernels``; None takes those of the process.

    Returns:
        The exit code: 0; 2 for what the user can mend; 130 after Ctrl-C.
    """
    _starting.over()
    name = "dsno_kernels"
    try:
        arguments = parser().parse_args(argv)
        name = " ".join(filter(None, (arguments.command, getattr(arguments, "step", None))))
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            name += f" (rank {os.environ.get('RANK', '?')})"
        with _warnings(name):
            arguments.run(arguments)
    except (CommandError, ModelFileError) as error:
        return _end(f"{name}: {error}", 2)
    except ModuleNotFoundError as error:
        if error.name not in EXTRAS:
            raise
        package, extra = EXTRAS[error.name]
        return _end(f"{name}: missing {package}; run: pip install dsno-kernels[{extra}]", 2)
    except OSError as error:
        reason = error.strerror or str(error)
        return _end(f"{name}: {f'{error.filename}: ' if error.filename else ''}{reason}", 2)
    except (MemoryError, RuntimeError) as error:
        if not _no_memory(error):
            raise
        advice = "give a smaller --batch"
        if hasattr(arguments, "accumulate"):
            advice = "give --accumulate, --activation-checkpointing or a smaller --batch"
        return _end(f"{name}: out of memory; {advice}", 2)
    except KeyboardInterrupt as stop:
        return _end(f"\n{name}: interrupted{'; ' if stop.args else ''}{stop}", 130)
    return 0


def _no_memory(error: Exception) -> bool:
    """Whether it says that memory is used up; PyTorch has an exception for that on GPUs only."""
    import torch

    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        "DefaultCPUAllocator" in str(error)
    )


def _description() -> str | None:
    return sys.modules["dsno_kernels"].__doc__


def _end(message: str, code: int) -> int:
    print(message, file=sys.stderr)
    return code


@contextlib.contextmanager
def _warnings(name: str) -> Iterator[None]:
    """What the package logs as a warning, on stderr under the name of the command."""
    handler = logging.StreamHandler()
    handler.setLevel(logging.WARNING)
    handler.setFormatter(logging.Formatter(f"{name}: warning: %(message)s"))
    logger = logging.getLogger("dsno_kernels")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
