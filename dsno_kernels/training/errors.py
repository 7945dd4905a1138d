"""What ends a command of `python -m dsno_kernels`, in one line."""

from __future__ import annotations

import tempfile
from pathlib import Path


class CommandError(Exception):
    """Why a command cannot go on: what was given, what is accepted, what to do; one sentence."""


def prepare_folder(path: Path, option: str = "--out") -> None:
    """Make the output folder, which an option named, and find out now rather than after the work
    whether it can be written.

    Raises:
        CommandError: it cannot.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise CommandError(
            f"{option} {path} cannot be written ({error.strerror}); give a folder that can"
        ) from None
