"""Small runs of `write_trajectories`, also as a process of its own that ends as it is told:

python -m tests.trajectory_runs FOLDER [hang | kill]
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsno_kernels.diffusion import SolverPlan, VPCosine, time_grid

SHAPE = (2, 3, 4)
COUNT, BATCH = 20, 6
PROCESS = VPCosine()
PLAN = SolverPlan.build(PROCESS, time_grid(PROCESS, 8), "tab3", prediction="x0")


def denoiser(x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
    """Some smooth function of everything it is given."""
    shift = 0.0 if y is None else 0.1 * y.reshape(-1, 1, 1, 1).to(x.dtype)
    return torch.tanh(x * (1.5 - t) + shift)


def write(folder: Path, model: Callable[..., Tensor] = denoiser, **changed: Any) -> None:
    from dsno_kernels.training.trajectories import write_trajectories

    options = {"plan": PLAN, "count": COUNT, "shape": SHAPE, "batch": BATCH, **changed}
    write_trajectories(folder, model, **options)


def everything(folder: Path) -> tuple[Tensor, Tensor | None]:
    """All frames and labels of a complete and undamaged folder."""
    from dsno_kernels.training.trajectories import TrajectoryDataset

    data = TrajectoryDataset(folder, verify=True)
    return data.batch(range(len(data)))


def hanging(x: Tensor, t: Tensor) -> Tensor:
    """Stops for ever in the third batch; by then the first is written."""
    hanging.calls = getattr(hanging, "calls", 0) + 1  # type: ignore[attr-defined]
    if hanging.calls > 2 * PLAN.evaluations:  # type: ignore[attr-defined]
        print("hanging", flush=True)
        time.sleep(600)
    return denoiser(x, t)


class Killing:
    """Values of which the third ends the process, in the middle of a transaction."""

    def __init__(self, values: Any) -> None:
        self.values = values

    def __iter__(self) -> Iterator[Any]:
        for i, value in enumerate(self.values):
            if i == 2:
                os.kill(os.getpid(), signal.SIGKILL)
            yield value


def main(folder: str, how: str = "") -> None:
    from dsno_kernels.training.trajectory_files import ShardWriter

    torch.set_num_threads(1)
    if how == "kill":
        append = ShardWriter.append

        def killed(self: ShardWriter, first: int, values: Any) -> None:
            append(self, first, Killing(values) if first else values)

        ShardWriter.append = killed  # type: ignore[method-assign]
    write(Path(folder), hanging if how == "hang" else denoiser)


if __name__ == "__main__":
    main(*sys.argv[1:])
