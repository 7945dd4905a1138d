"""Write trajectories: solve the teacher's ODE from many noises, and keep states on the way."""

from __future__ import annotations

import io
import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dsno_kernels._noise import standard_normal
from dsno_kernels.diffusion import SolverPlan, sample
from dsno_kernels.training import manifest as manifests
from dsno_kernels.training.images import MOST_CLASSES
from dsno_kernels.training.trajectory_data import shard_name, shard_range
from dsno_kernels.training.trajectory_files import (
    CHECKSUM,
    LABELS,
    ShardReader,
    ShardWriter,
)

FRAMES = 4
# Of the noise, apart from any other use of a seed.
_STREAM = 0x5452414A


@torch.no_grad()
def write_trajectories(
    folder: str | Path,
    denoiser: Callable[..., Tensor],
    plan: SolverPlan,
    *,
    count: int,
    shape: Sequence[int],
    positions: Sequence[int] | None = None,
    classes: Sequence[int] | None = None,
    guidance: float | None = None,
    no_class: int = -1,
    seed: int = 0,
    batch: int = 256,
    shards: int | None = None,
    teacher: str = "",
    device: torch.device | str = "cpu",
    precision: str = "fp32",
    progress: bool = False,
) -> list[Path]:
    r"""Write trajectories of the probability-flow ODE for `TrajectoryDataset`; go on with those
    that are there.

    Sample i starts from noise that depends on (seed, i) alone, times
    :math:`\sqrt{\alpha^2 + \sigma^2}` at ``grid[0]``, which is 1 for variance preserving processes.
    Under torchrun process r of R writes the shards r, r + R, ..

    Args:
        folder: for manifest and shards.
        denoiser: as for `dk.diffusion.sample`; gets ``y``, int64 ``(B,)``, where there are classes.
        plan: a solver without noise.
        count: how many trajectories, over all shards.
        shape: (C, H, W) of an image.
        positions: places in the grid whose states are kept; the noise, 0, always is. By default 4
            evenly spaced ones.
        classes: sample i has class ``classes[i % len(classes)]``; None for no classes.
        guidance: scale of classifier-free guidance.
        no_class: the y that asks for no class there.
        seed: of the noise.
        batch: trajectories at a time, and in a transaction.
        shards: by default as many as processes.
        teacher: what makes one teacher another, such as the hash of its file.
        device: where the denoiser computes.
        precision: "fp32", or "bf16" for autocast; the state is float32.
        progress: show a bar.

    Returns:
        The shards of this process, each of them complete.

    Raises:
        TrajectoryError: (a ValueError) the folder is of other trajectories, damaged, or cannot be
        written. TypeError, ValueError: arguments that do not fit; a denoiser that returns NaN.
        KeyboardInterrupt: its text says how far it came.

    Example:
        >>> process = dk.diffusion.VPCosine()
        >>> grid = dk.diffusion.time_grid(process, 32)
        >>> plan = dk.diffusion.SolverPlan.build(process, grid, "tab3", prediction="x0")
        >>> model = dk.diffusion.for_process(dk.diffusion.ExactDenoiser(images), process)
        >>> write_trajectories("trajectories", model, plan, count=50_000, shape=(1, 8, 8))
    """
    rank, world = _place()
    folder, steps = Path(folder), len(plan.grid) - 1
    if positions is None:
        positions = [round(i * steps / FRAMES) for i in range(1, FRAMES + 1)]
    positions = sorted({0, *positions})
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed must be in 0 .. 2**64 - 1, got {seed}")
    for name, value in (("count", count), ("batch", batch), ("shards", shards)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    _check(plan, positions, shape, classes, guidance, precision)
    if shards is None:
        there = (folder / manifests.NAME).exists()
        shards = manifests.read(folder)["shards"] if there else world
    wanted = manifests.make(
        plan,
        positions,
        count=count,
        shape=shape,
        shards=shards,
        seed=seed,
        batch=batch,
        classes=classes,
        guidance=None if guidance is None else {"scale": guidance, "no_class": no_class},
        precision=precision,
        teacher=teacher,
    )
    manifests.settle(folder, wanted)
    model = _autocast(denoiser, torch.device(device), precision)
    made = _Maker(model, plan, positions, shape, guidance, no_class, seed, torch.device(device))
    own = {
        folder / shard_name(shard, shards): shard_range(shard, shards, count)
        for shard in range(rank, shards, world)
    }
    with _bar(sum(map(len, own.values())), progress and rank == 0) as bar:
        for path, samples in own.items():
            _write_shard(path, samples, made, classes, batch, bar)
    return list(own)


def verify(folder: Path) -> None:
    """Compare the values of this process's shards with their checksums.

    Raises:
        TrajectoryError: they differ.
    """
    found = manifests.read(folder)
    rank, world = _place()
    for shard in range(rank, found["shards"], world):
        reader = ShardReader.of(folder / shard_name(shard, found["shards"]))
        reader.verify(len(shard_range(shard, found["shards"], found["count"])))


def _place() -> tuple[int, int]:
    """Rank and number of processes, as torchrun says."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def _check(
    plan: SolverPlan,
    positions: Sequence[int],
    shape: Sequence[int],
    classes: Sequence[int] | None,
    guidance: float | None,
    precision: str,
) -> None:
    if len(shape) != 3 or min(shape) < 1:
        raise ValueError(f"shape must be (C, H, W) of an image, got {tuple(shape)}")
    if positions[0] < 0 or positions[-1] >= len(plan.grid) or len(positions) == 1:
        raise ValueError(
            f"positions must be in 1..{len(plan.grid) - 1} of the grid, got {list(positions)}"
        )
    if plan.stochastic():
        raise ValueError(f"{plan!r} adds noise: trajectories are those of the ODE")
    if guidance is not None and classes is None:
        raise ValueError("guidance needs classes")
    if classes is not None and len(classes) == 0:
        raise ValueError("classes must name at least one class")
    if classes is not None and not 0 <= min(classes) <= max(classes) < MOST_CLASSES:
        raise ValueError(f"classes must be in 0..{MOST_CLASSES - 1}, got {list(classes)}")
    if precision not in ("fp32", "bf16"):
        raise ValueError(f"precision must be fp32 or bf16, got {precision!r}")


class _Maker:
    """Batches of trajectories."""

    def __init__(
        self,
        denoiser: Callable[..., Tensor],
        plan: SolverPlan,
        positions: Sequence[int],
        shape: Sequence[int],
        guidance: float | None,
        no_class: int,
        seed: int,
        device: torch.device,
    ) -> None:
        self.plan, self.positions, self.shape, self.seed = plan, positions, shape, seed
        self.denoiser, self.device = denoiser, device
        self.guidance, self.no_class = guidance, no_class
        self.scale = manifests.noise_scale(plan)

    def __call__(self, samples: range, y: np.ndarray | None) -> np.ndarray:
        """Values as they are stored, ``(B, C, F, H, W)``."""
        noise = standard_normal(self.shape, samples, self.seed, _STREAM).to(self.device)
        options: dict[str, Any] = {}
        if y is not None:
            options["kwargs"] = {"y": torch.from_numpy(y).to(self.device)}
        if self.guidance is not None:
            none = torch.full_like(options["kwargs"]["y"], self.no_class)
            options |= {"unconditional": {"y": none}, "guidance": self.guidance}
        frames = sample(
            self.denoiser, noise.mul_(self.scale), self.plan, frames=self.positions, **options
        )
        # [B, F, C, H, W] with F outermost in memory: one copy to the layout of the file
        return frames.transpose(1, 2).contiguous().cpu().numpy()


def _autocast(
    denoiser: Callable[..., Tensor], device: torch.device, precision: str
) -> Callable[..., Tensor]:
    """The denoiser in this precision, its result in float32."""

    def called(x: Tensor, t: Tensor, **kwargs: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            return denoiser(x, t, **kwargs).float()

    return called


def _write_shard(
    path: Path,
    samples: range,
    made: _Maker,
    classes: Sequence[int] | None,
    batch: int,
    bar: Any,
) -> None:
    """Fill a shard up, each batch in one transaction while the next is computed."""
    if (path / CHECKSUM).exists() and ShardReader(path).length == len(samples):
        bar.update(len(samples))
        return
    numbers = math.prod(made.shape) * len(made.positions)
    writer = ShardWriter(path, map_size=len(samples) * 4 * numbers * 2 + (1 << 20))
    done = writer.length
    try:
        y = None
        if classes is not None:
            y = np.array([classes[i % len(classes)] for i in samples], np.int64)
            manifests.replace(path / LABELS, _npy(y))
        bar.update(done)
        with ThreadPoolExecutor(1) as thread:
            pending: Future[None] | None = None
            for first in range(done, len(samples), batch):
                part = slice(first, min(first + batch, len(samples)))
                values = made(samples[part], None if y is None else y[part])
                if pending is not None:
                    pending.result()
                pending = thread.submit(writer.append, first, values)
                bar.update(len(values))
            if pending is not None:
                pending.result()
        if len(samples) == 0:
            writer.append(0, ())
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"{path} has {writer.length} of {len(samples)} trajectories; the same command goes on"
        ) from None
    finally:
        writer.close()
    digest = ShardReader(path).checksum(len(samples))
    manifests.replace(path / CHECKSUM, f"{digest}\n".encode())


def _npy(values: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, values)
    return file.getvalue()


def _bar(total: int, show: bool) -> Any:
    from tqdm import tqdm

    return tqdm(total=total, unit="trajectory", dynamic_ncols=True, disable=not show)
