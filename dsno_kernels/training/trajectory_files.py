"""Trajectories in LMDB: one shard as the official DSNO project has it, read and written.

A shard is a folder with ``data.mdb``: key ``b"0"``, ``b"1"``, .. -> float32 bytes of
``(C, F, H, W)``, noise to image along F; key ``b"length"`` -> how many, in decimal; beside it
``labels.npy`` where there are classes, and ``sha256.txt``, of the values in the order of their
keys, when the shard is complete.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import threading
import weakref
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from dsno_kernels.training.manifest import TrajectoryError

CHECKSUM = "sha256.txt"
LABELS = "labels.npy"
_LENGTH = b"length"
# An LMDB begins with two pages of this size or more.
_PAGE = 4096


class ShardReader:
    """A shard opened for reading, once in a process: LMDB allows no more. A forked process goes on
    with it, which is safe because no lock is used.

    Args:
        path: the folder with ``data.mdb``.

    Attributes:
        length: how many samples are there; None where the file does not say.

    Raises:
        TrajectoryError: no LMDB there, or a damaged one.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._environment = _open(path, readonly=True, lock=False, readahead=False)
        with self.values() as get:
            stored = get(_LENGTH)
        try:
            self.length = None if stored is None else int(bytes(stored))
        except ValueError:
            raise TrajectoryError(f"{path} is damaged: its length is {bytes(stored)!r}") from None

    @classmethod
    def of(cls, path: Path) -> ShardReader:
        """The reader of this process."""
        key = os.path.realpath(path)
        with _opening:
            reader = _opened.get(key)
            if reader is None:
                reader = _opened[key] = cls(path)
            return reader

    @contextlib.contextmanager
    def values(self) -> Iterator[Any]:
        """``get(key)``: a view of the value, valid inside the context, or None."""
        import lmdb

        try:
            with self._environment.begin(buffers=True) as transaction:
                yield transaction.get
        except lmdb.Error as error:
            raise TrajectoryError(f"{self.path} is damaged ({error}); make it again") from None

    def checksum(self, length: int) -> str:
        """SHA-256 of the values in the order of their keys."""
        digest = hashlib.sha256()
        with self.values() as get:
            for i in range(length):
                digest.update(found(self.path, i, get(b"%d" % i)))
        return digest.hexdigest()

    def verify(self, length: int) -> None:
        """Compare the values with their checksum.

        Raises:
            TrajectoryError: they differ, or there is no checksum.
        """
        path = self.path / CHECKSUM
        if not path.exists():
            raise TrajectoryError(f"{self.path} has no {CHECKSUM} to compare with")
        if self.checksum(length) != path.read_text().strip():
            raise TrajectoryError(
                f"{self.path} is damaged: its values do not have the checksum in {CHECKSUM}; remove"
                " it and run the command that made it again"
            )

    def __del__(self) -> None:
        if hasattr(self, "_environment"):
            self._environment.close()


_opened: weakref.WeakValueDictionary[str, ShardReader] = weakref.WeakValueDictionary()
_opening = threading.Lock()


class ShardWriter:
    """A shard that grows by whole batches: what a killed process had not yet written in full is not
    there.

    Args:
        path: the folder; it is made where it does not exist.
        map_size: bytes of address space to begin with; it grows as needed.

    Raises:
        TrajectoryError: a damaged LMDB; another process at work; a full disk.
    """

    def __init__(self, path: Path, map_size: int) -> None:
        self.path = path
        with self._reported():
            path.mkdir(parents=True, exist_ok=True)
        data = path / "data.mdb"
        if data.exists() and data.stat().st_size > 0:  # a process may end before the first byte
            _open(path, readonly=True, lock=False).close()  # which looks whether the file is whole
        map_size = max(map_size, 2 * data.stat().st_size if data.exists() else 0)
        self._environment = _open(path, map_size=_pages(map_size), new=True)

    @property
    def length(self) -> int:
        """Samples written."""
        with self._reported(), self._environment.begin() as transaction:
            return int(transaction.get(_LENGTH, b"0"))

    def append(self, first: int, values: Iterable[Any]) -> None:
        """Write the samples `first`, .., contiguous arrays, in one transaction.

        Raises:
            TrajectoryError: they do not follow what is there; they cannot be written.
        """
        import lmdb

        with self._reported():
            while True:
                try:
                    return self._append(first, values)
                except lmdb.MapFullError:
                    self._environment.set_mapsize(2 * self._environment.info()["map_size"])

    def _append(self, first: int, values: Iterable[Any]) -> None:
        with self._environment.begin(write=True) as transaction:
            there = int(transaction.get(_LENGTH, b"0"))
            if there != first:
                raise TrajectoryError(
                    f"{self.path} has {there} samples, not the {first} of a moment ago: another"
                    " process writes there; end one of them"
                )
            number = first
            for value in values:
                transaction.put(b"%d" % number, value)
                number += 1
            transaction.put(_LENGTH, b"%d" % number)

    def close(self) -> None:
        self._environment.close()

    @contextlib.contextmanager
    def _reported(self) -> Iterator[None]:
        import lmdb

        try:
            yield
        except (OSError, lmdb.Error) as error:
            if isinstance(error, lmdb.MapFullError):
                raise
            # LMDB reports a full disk as an error of input and output.
            reason = f"{getattr(error, 'strerror', None) or error}{_room(self.path)}"
            raise TrajectoryError(
                f"{self.path} cannot be written ({reason}); what was complete is kept: mend that"
                " and run the same command again"
            ) from None


def found(path: Path, index: int, value: Any) -> Any:
    """The value, if there is one."""
    if value is None:
        raise TrajectoryError(f"{path} is damaged: it has no sample {index}; make it again")
    return value


def _open(path: Path, *, new: bool = False, **options: Any) -> Any:
    """The LMDB environment of a folder, if its file is whole: to read behind the end of a cut one
    would end the process.
    """
    import lmdb

    data = path / "data.mdb"
    if not new and not data.exists():
        raise TrajectoryError(f"{path} holds no trajectories: it has no data.mdb")
    size = data.stat().st_size if data.exists() else 0
    advice = "it was cut or is no LMDB; remove it and run the command that made it again"
    if not new and size < 2 * _PAGE:
        raise TrajectoryError(f"{data} is damaged: {advice}")
    try:
        environment = lmdb.open(str(path), meminit=False, **options)
    except lmdb.Error as error:
        if "already open" in str(error):
            raise TrajectoryError(
                f"{path} is open in this process; delete the TrajectoryDataset that reads it, or"
                " end the run that writes it"
            ) from None
        raise TrajectoryError(f"{data} is damaged ({error}): {advice}") from None
    needed = (environment.info()["last_pgno"] + 1) * environment.stat()["psize"]
    size = data.stat().st_size  # again: another process may have written
    if not new and size < needed:
        environment.close()
        raise TrajectoryError(f"{data} is damaged, {size} bytes long of {needed}: {advice}")
    return environment


def _room(path: Path) -> str:
    try:
        return f"; {shutil.disk_usage(path).free >> 20} MiB of the disk are free"
    except OSError:
        return ""


def _pages(size: int) -> int:
    return -(-max(size, 1) // 65536) * 65536
