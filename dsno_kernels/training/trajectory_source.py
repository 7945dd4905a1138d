"""Batches of trajectories on the device of a training."""

from __future__ import annotations

import contextlib
import math
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dsno_kernels.training.errors import CommandError
from dsno_kernels.training.manifest import TrajectoryError
from dsno_kernels.training.trajectory_data import TrajectoryDataset

HELD = 2 << 30  # bytes of trajectories that are kept on the device
CHUNK = 1024  # samples that are read at once to be kept


class Source:
    """Noises, the teacher's states and labels, on a device.

    A small data set is held there whole. A large one is read batch by batch; see `reading_ahead`.

    Args:
        dataset: a `TrajectoryDataset`, or what has its ``batch``, ``len``, ``shape``, ``labels``
            and ``checksum``; frame 0 is the noise.
        logsnr: of the states, frames 1.., ``(F - 1,)``.
        device: of the training.
        held: bytes up to which it is held whole.
        noise_scale: standard deviation of frame 0, by which it is divided: a student starts from
            standard normal noise, whatever the process of its teacher.

    Attributes:
        logsnr: float32 ``(T,)`` on the device, with T = F - 1.
        image_shape: ``(C, H, W)``.
        classes: one more than the largest label; 0 without labels.
        checksum: of the data set, where it has one.
    """

    def __init__(
        self,
        dataset: Any,
        logsnr: Tensor,
        device: torch.device,
        held: int = HELD,
        *,
        noise_scale: float = 1.0,
    ) -> None:
        self.dataset, self.device, self.noise_scale = dataset, device, noise_scale
        self.logsnr = logsnr.to(device, torch.float32)
        self.image_shape: tuple[int, int, int] = tuple(dataset.shape[1:])
        self.checksum: str | None = dataset.checksum
        self.classes = 0 if dataset.labels is None else int(dataset.labels.max()) + 1
        self._ahead: Iterator[tuple[list[int], Any]] | None = None
        self._held = self._whole() if _bytes(dataset) <= held else None

    def __len__(self) -> int:
        return len(self.dataset)

    def batch(self, index: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Noises ``(B, C, H, W)``, states ``(B, T, C, H, W)`` and labels ``(B,)`` or None of the
        samples `index`, ``(B,)`` on the CPU.
        """
        if self._held is None:
            return self._read(index)
        place = index.to(self.device)
        noise, states, labels = self._held
        return noise[place], states[place], None if labels is None else labels[place]

    @contextlib.contextmanager
    def reading_ahead(self, parts: Iterator[dict[str, Tensor]]) -> Iterator[None]:
        """Within it another process reads what :meth:`batch` is asked for, the samples
        ``part["index"]`` in this order, and a thread pins it for a GPU; nothing where all is held.
        """
        if self._held is not None:
            yield
            return
        loader = DataLoader(
            _Batches(self.dataset),
            batch_size=None,
            sampler=(part["index"].tolist() for part in parts),
            num_workers=1,
            pin_memory=self.device.type == "cuda",
            worker_init_fn=_block_signals,
            generator=torch.Generator(),  # the global one is the training's
            # A fork would share the lock of the folder, and the state of CUDA and of threads.
            multiprocessing_context="forkserver",
        )
        before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
        _block_signals()  # the process starts like this
        try:
            self._ahead = iter(loader)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        try:
            yield
        finally:
            self._ahead = None  # which ends that process

    def _whole(self) -> tuple[Tensor, Tensor, Tensor | None]:
        N, (F, *image) = len(self), self.dataset.shape
        noise = torch.empty(N, *image, device=self.device)
        states = torch.empty(N, F - 1, *image, device=self.device)
        for index in torch.arange(N).split(CHUNK):
            noise[index], states[index], _ = self._read(index)
        labels = self.dataset.labels
        return noise, states, None if labels is None else labels.to(self.device)

    def _read(self, index: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        if self._ahead is None:
            frames, labels = self.dataset.batch(index)
        else:
            asked, found = next(self._ahead)
            if isinstance(found, str):
                raise TrajectoryError(found)
            assert asked == index.tolist()
            frames, labels = found
        if self.device.type == "cuda":  # a copy from pinned memory does not hold up the host
            frames = frames.pin_memory().to(self.device, non_blocking=True)
            labels = None if labels is None else labels.to(self.device, non_blocking=True)
        return frames[:, 0] / self.noise_scale, frames[:, 1:].contiguous(), labels


class _Batches(Dataset[tuple[list[int], Any]]):
    """Batches by the numbers of their samples; what cannot be read is a sentence."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __getitem__(self, index: list[int]) -> tuple[list[int], Any]:
        try:
            return index, self.dataset.batch(index)
        except TrajectoryError as error:
            return index, str(error)


def _block_signals(_: int = 0) -> None:
    """What asks to end a run is for the process that trains."""
    signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))


def _bytes(dataset: Any) -> int:
    return 4 * len(dataset) * math.prod(dataset.shape)


def open_source(
    path: Path,
    device: torch.device,
    *,
    t_idx: Sequence[int] | None = None,
    shape: Sequence[int] | None = None,
    logsnr: Sequence[float] | None = None,
    verify: bool = False,
) -> Source:
    """The trajectories of a folder.

    Args:
        path: as `TrajectoryDataset` takes it.
        device: of the training.
        t_idx: which states, by place among the frames stored, where 0 is the noise; None takes all.
        shape: ``(C, F, H, W)`` of an LMDB of the official project, which does not say.
        logsnr: of the states to learn, for such a one.
        verify: compare all values with their checksums first. Where all are held they are read
            anyway, and this is done wherever there are checksums.

    Raises:
        CommandError: no trajectories there, damaged ones, or arguments that do not fit them.
    """
    states = None if t_idx is None else [i for i in t_idx if i != 0]
    if states is not None and (not states or states != sorted(set(states))):
        raise CommandError(f"--t-idx must be increasing places of states, got {list(t_idx or ())}")
    try:
        dataset = TrajectoryDataset(path, None if states is None else [0, *states], shape)
        if verify or (dataset.checksum is not None and _bytes(dataset) <= HELD):
            dataset.verify()
    except ValueError as error:
        raise CommandError(str(error)) from None
    T = dataset.shape[0] - 1
    if len(dataset) == 0 or T == 0:
        raise CommandError(f"{path} holds {len(dataset)} trajectories of {T} states: none to learn")
    own = None if dataset.logsnr is None else dataset.logsnr[1:]
    if own is not None and logsnr is not None:
        raise CommandError(f"--logsnr is for an LMDB without a manifest; {path} has its own")
    values = own if logsnr is None else torch.tensor(logsnr, dtype=torch.float64)
    if values is None or len(values) != T:
        given = "none" if values is None else str(len(values))
        raise CommandError(f"--logsnr needs a number for each of the {T} states, got {given}")
    if logsnr is not None and not (
        bool(values.isfinite().all()) and bool((values.diff() > 0).all())
    ):
        raise CommandError(
            f"--logsnr must be numbers that increase from noise to image, got {list(logsnr)}"
        )
    return Source(dataset, values, device, noise_scale=dataset.noise_scale)
