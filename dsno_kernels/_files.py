"""Files that appear complete or not at all, whatever ends the process that writes them."""

from __future__ import annotations

import contextlib
import glob
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str], *, many: bool = False) -> Iterator[IO[bytes]]:
    """A file to write, which takes the place of `path` once it is complete and on the disk.

    Until then it has a name of this process, ``<path>.<pid>.part``, and what killed processes left
    under such names is removed.

    Args:
        path: of the file; its folder exists.
        many: one of thousands in its folder: that is not searched, nor is the disk waited for.

    Raises:
        OSError: the file cannot be written. One that was there is as it was.
    """
    path = Path(path)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    if not many:
        _remove_leftovers(path)
    try:
        with open(part, "wb") as file:
            yield file
            if not many:
                file.flush()
                os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        with contextlib.suppress(OSError):  # the first one counts
            part.unlink(missing_ok=True)
        raise


def write_json(path: str | os.PathLike[str], content: Any) -> None:
    """Write JSON as :func:`replacing` does.

    Raises:
        OSError: the file cannot be written.
    """
    text = json.dumps(content, indent=2, ensure_ascii=False)
    with replacing(path) as file:
        file.write(f"{text}\n".encode())


def _remove_leftovers(path: Path) -> None:
    """Remove the temporary files of processes that were killed while they wrote this file."""
    for part in path.parent.glob(f"{glob.escape(path.name)}.*.part"):
        pid = part.suffixes[-2][1:]
        if pid.isdecimal():
            try:
                os.kill(int(pid), 0)
            except ProcessLookupError:
                part.unlink(missing_ok=True)
            except (OSError, OverflowError):  # it lives, as another user; or that is no process
                pass
