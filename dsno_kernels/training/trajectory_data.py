"""Trajectories to learn from: `TrajectoryDataset`."""

from __future__ import annotations

import bisect
import contextlib
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from dsno_kernels.training import manifest as manifests
from dsno_kernels.training.images import MOST_CLASSES
from dsno_kernels.training.manifest import TrajectoryError
from dsno_kernels.training.trajectory_files import CHECKSUM, LABELS, ShardReader, found


def shard_name(shard: int, shards: int) -> str:
    return f"shard-{shard:05d}-of-{shards:05d}"


def shard_range(shard: int, shards: int, count: int) -> range:
    """The samples of a shard."""
    return range(shard * count // shards, (shard + 1) * count // shards)


class TrajectoryDataset(Dataset[Any]):
    """Trajectories from noise to image, of `write_trajectories` or of the official DSNO project.

    A sample is a tensor ``(F, C, H, W)``, or with classes a pair of it and its label; frame 0 is
    the noise. It can go to the worker processes of a DataLoader, forked or spawned.

    Args:
        path: a folder with a manifest; or one LMDB of the official project, ``labels.npy`` in it or
            beside it, or a folder with that in ``lmdb``.
        t_idx: which frames, by their place among those stored; None takes all.
        shape: ``(C, F, H, W)`` of what is stored; for a single LMDB, which does not say.
        verify: compare all values with their checksums, which reads everything.

    Attributes:
        manifest: None for a single LMDB.
        logsnr: log(alpha^2 / sigma^2) of the frames, float64 ``(F,)``; None for a single LMDB.
        labels: int64 ``(N,)``, or None.
        noise_scale: standard deviation of frame 0; 1 for a single LMDB, whose process is variance
            preserving.
        checksum: of all values, hexadecimal; None for a single LMDB.

    Raises:
        TrajectoryError: (a ValueError) no trajectories there, incomplete or damaged ones.

    Example:
        >>> data = TrajectoryDataset("trajectories", t_idx=[0, 2, 4])
        >>> frames, labels = data.batch([5, 3, 8])  # (3, 3, C, H, W), (3,) or None
    """

    def __init__(
        self,
        path: str | Path,
        t_idx: Sequence[int] | None = None,
        shape: Sequence[int] | None = None,
        verify: bool = False,
    ) -> None:
        self.path = Path(path)
        self.manifest: dict[str, Any] | None = None
        self.logsnr: Tensor | None = None
        self.noise_scale = 1.0
        self.checksum: str | None = None
        single = next(
            (p for p in (self.path, self.path / "lmdb") if (p / "data.mdb").exists()), None
        )
        if single is not None:
            self._begin_single(single, shape)
        else:
            self._begin(shape)
        C, F, H, W = self._stored
        self._t_idx = list(range(F)) if t_idx is None else [int(i) for i in t_idx]
        if not self._t_idx or not all(0 <= i < F for i in self._t_idx):
            raise ValueError(f"t_idx must be places in 0..{F - 1}, got {self._t_idx}")
        self.shape = (len(self._t_idx), C, H, W)
        if self.logsnr is not None:
            self.logsnr = self.logsnr[self._t_idx]
        if verify:
            self.verify()

    def _begin_single(self, path: Path, shape: Sequence[int] | None) -> None:
        if shape is None or len(shape) != 4:
            raise ValueError(
                f"{path} is one LMDB: give the shape (C, F, H, W) of what it stores, got {shape}"
            )
        self._stored = tuple(int(n) for n in shape)
        places = (path / LABELS, path.parent / LABELS)
        self.labels = next((_labels(p) for p in places if p.exists()), None)
        length = ShardReader.of(path).length
        if length is None:
            if self.labels is None:
                raise TrajectoryError(f"{path} does not say how many samples it has: no b'length'")
            length = len(self.labels)
        if self.labels is not None:
            _same_length(path, length, self.labels)
        self._paths, self._starts = [path], [0, length]

    def _begin(self, shape: Sequence[int] | None) -> None:
        self.manifest = manifest = manifests.read(self.path)
        C, H, W = manifest["shape"]
        self._stored = (C, len(manifest["positions"]), H, W)
        if shape is not None and tuple(shape) != self._stored:
            raise TrajectoryError(f"{self.path} stores {self._stored}, not {tuple(shape)}")
        self.logsnr = torch.tensor(manifest["logsnr"], dtype=torch.float64)
        self.noise_scale = manifest["noise_scale"]
        shards, count = manifest["shards"], manifest["count"]
        self._paths = [self.path / shard_name(i, shards) for i in range(shards)]
        ranges = [shard_range(i, shards, count) for i in range(shards)]
        self._starts = [0, *(r.stop for r in ranges)]
        digests, labels = hashlib.sha256(), []
        for path, wanted in zip(self._paths, ranges, strict=True):
            there = (ShardReader.of(path).length or 0) if path.exists() else 0
            if there != len(wanted) or not (path / CHECKSUM).exists():
                raise TrajectoryError(
                    f"{path} has {there} of {len(wanted)} samples: run the command that made it"
                    " again, which goes on where it stopped"
                )
            digests.update((path / CHECKSUM).read_bytes())
            if manifest["classes"] is not None:
                labels.append(_labels(path / LABELS))
                _same_length(path, there, labels[-1])
        self.checksum = digests.hexdigest()
        self.labels = torch.cat(labels) if labels else None

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index: int) -> Tensor | tuple[Tensor, Tensor]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Any]:
        """What a DataLoader asks for: a whole batch."""
        frames, labels = self.batch(indices)
        return list(frames) if labels is None else list(zip(frames, labels, strict=True))

    def batch(self, indices: Sequence[int] | Tensor) -> tuple[Tensor, Tensor | None]:
        """Frames, float32 ``(B, F, C, H, W)`` with time inside the channels in memory, and labels
        ``(B,)`` or None.

        Raises:
            IndexError: an index out of range. TrajectoryError: a damaged file.
        """
        given = [int(i) for i in indices]
        F, C, H, W = self.shape
        frames = np.empty((len(given), C, F, H, W), np.float32)
        every = self._t_idx == list(range(self._stored[1]))
        numbers = int(np.prod(self._stored))
        with contextlib.ExitStack() as stack:
            opened: dict[int, Any] = {}
            for row, index in zip(frames, given, strict=True):
                if not 0 <= index < len(self):
                    raise IndexError(f"index {index} is out of range for {len(self)} trajectories")
                shard = bisect.bisect_right(self._starts, index) - 1
                if shard not in opened:
                    reader = self._reader(shard)
                    opened[shard] = stack.enter_context(reader.values())
                path, number = self._paths[shard], index - self._starts[shard]
                value = np.frombuffer(
                    found(path, number, opened[shard](b"%d" % number)), np.float32
                )
                if value.size != numbers:
                    raise TrajectoryError(
                        f"{path} has {value.size} numbers in sample {number}, not {numbers} as"
                        f" {self._stored} has"
                    )
                stored = value.reshape(self._stored)
                row[...] = stored if every else stored[:, self._t_idx]
        labels = (
            None if self.labels is None else self.labels[torch.tensor(given, dtype=torch.int64)]
        )
        return torch.from_numpy(frames).transpose(1, 2), labels

    def verify(self) -> None:
        """Read all values and compare them with their checksums.

        Raises:
            TrajectoryError: they differ, or there are none.
        """
        for shard in range(len(self._paths)):
            length = self._starts[shard + 1] - self._starts[shard]
            self._reader(shard).verify(length)

    def _reader(self, shard: int) -> ShardReader:
        """Kept open in this process, as long as this data set lives."""
        readers: dict[int, ShardReader] = self.__dict__.setdefault("_readers", {})
        if shard not in readers:
            readers[shard] = ShardReader.of(self._paths[shard])
        return readers[shard]

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_readers"}


def _same_length(path: Path, samples: int, labels: Tensor) -> None:
    if len(labels) != samples:
        raise TrajectoryError(f"{path} has {samples} samples, but {len(labels)} labels")


def _labels(path: Path) -> Tensor:
    try:
        values = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise TrajectoryError(f"{path} cannot be read ({error})") from None
    if values.ndim != 1 or values.dtype.kind not in "iu":
        raise TrajectoryError(f"{path} must hold integers (N,), got {values.dtype} {values.shape}")
    if values.size and not 0 <= int(values.min()) <= int(values.max()) < MOST_CLASSES:
        raise TrajectoryError(
            f"{path} must hold classes in 0..{MOST_CLASSES - 1},"
            f" got {values.min()} to {values.max()}"
        )
    return torch.from_numpy(values.astype(np.int64))
