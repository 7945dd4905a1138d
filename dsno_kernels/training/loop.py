"""The training engine: updates of a model on batches of a task, on one process or many.

What is random in an update comes from the seed and the number of the update alone, and every
process takes its slice of the same global batch. So a run that was stopped at any moment continues
exactly, and the number of processes, or of the parts in which they accumulate gradients, changes
the loss by rounding only. Dropout is the exception: its masks are drawn part by part, so with it
another number is another run, as good and not the same.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.tensor import DTensor
from torch.optim.swa_utils import AveragedModel

from dsno_kernels.training import checkpoint, distributed, interrupts
from dsno_kernels.training.checkpoint import State
from dsno_kernels.training.errors import CommandError, prepare_folder
from dsno_kernels.training.history import History, Row
from dsno_kernels.training.options import Options

# Updates between two looks at the losses, for each of which the host waits for a GPU.
LOOK_EVERY = 20

Ahead = Callable[[Iterator[dict[str, Tensor]]], AbstractContextManager[None]]


class Task(Protocol):
    """What is learned."""

    def draw(self, generator: torch.Generator, batch: int) -> dict[str, Tensor]:
        """What is random in one global batch (indices, noise levels, seeds of noise): small tensors
        on the CPU whose first axis is `batch`. Every process draws all of it.
        """

    def loss(self, model: nn.Module, part: dict[str, Tensor]) -> Tensor:
        """The mean loss of some of these samples; it calls the model and touches nothing else of
        it. ``part["update"]`` holds the number of updates done before, for each sample.
        """


def fit(
    model: nn.Module,
    task: Task,
    options: Options,
    out: Path,
    metadata: Mapping[str, Any],
    ahead: Ahead | None = None,
) -> nn.Module:
    """Train a model, continuing from the checkpoint in `out` if there is one.

    Writes into `out`: ``checkpoint.safetensors``, complete or not at all, ``loss.csv`` (a row an
    update) and, at the end, ``loss.png``. Called by each process of the default group.

    Args:
        model: on the device of this process, with the same weights in all; trained in place.
        task: draws batches and computes losses.
        options: of the learning.
        out: the folder, made if it is not there.
        metadata: what else a checkpoint must agree on (configuration, data), as JSON values.
        ahead: entered for all the updates, with what this process will ask the task for the loss
            of, in that order; each batch is then drawn twice.

    Returns:
        The average of the weights over the updates, a model of its own, in evaluation mode.

    Raises:
        CommandError: the batch does not divide, a checkpoint of another run, a folder that cannot
        be written or in which another run trains, a loss or a gradient that is not finite.
        KeyboardInterrupt: after Ctrl-C or SIGTERM, which save what was done; says where the run
        continues. A second one does not wait for the update, and saves nothing.

    Example:
        >>> average = fit(model, task, Options(steps=1000, batch=64, learning_rate=1e-3), out, {})
    """
    pieces = distributed.size() * options.accumulate
    if options.batch % pieces:
        raise CommandError(
            f"--batch {options.batch} does not divide into {distributed.size()} processes times"
            f" --accumulate {options.accumulate}; give a multiple of {pieces}"
        )
    prepare_folder(out)
    device = next(model.parameters()).device
    path = out / checkpoint.NAME
    try:
        with (
            checkpoint.only_run(out),
            torch.random.fork_rng([device] if device.type == "cuda" else []),
        ):
            return _run(model, task, options, path, metadata, ahead)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"{checkpoint.earlier(path)}; the same command {_goes_on(path)}"
        ) from None
    except OSError as error:
        raise CommandError(
            f"{error.filename or out}: {error.strerror}; {checkpoint.earlier(path)}; when that is"
            f" mended, the same command {_goes_on(path)}"
        ) from None


def _goes_on(path: Path) -> str:
    return "continues" if path.exists() else "starts anew"


def _run(
    model: nn.Module,
    task: Task,
    options: Options,
    path: Path,
    metadata: Mapping[str, Any],
    ahead: Ahead | None,
) -> nn.Module:
    """`fit`, in the folder that is there."""
    result = copy.deepcopy(model).to("meta")
    average = AveragedModel(model)
    called = distributed.parallelize(model.train(), options.parallel)
    if distributed.size() > 1 and options.parallel == "fsdp":
        distributed.shard(average.module)
    optimizer = torch.optim.Adam(
        model.parameters(), lr=options.learning_rate, betas=options.betas, fused=True
    )
    state = State(model, average, optimizer)
    split = {"accumulate": options.accumulate, "processes": distributed.size()}
    identity = {**metadata, **options.identity()}
    if options.resume == "same" and _drops(model):
        identity |= split
    step = checkpoint.restore(path, state, identity)
    if step > options.steps:
        raise CommandError(
            f"{path} has {step} updates behind it, --steps is {options.steps}; give --steps {step}"
            " or more, or another --out"
        )
    coming = (part for i in range(step, options.steps) for part in _draw(task, options, i)[0])
    history = History(path.parent, step) if distributed.rank() == 0 else None
    pending: list[Tensor] = []
    with (
        ahead(coming) if ahead and step < options.steps else nullcontext(),
        _progress(options.steps, step) as bar,
        distributed.activation_checkpointing(model, options.activation_checkpointing),
        interrupts.noted() as signals,
    ):
        while step < options.steps:
            pending.append(update(called, state, task, options, step))
            bar.update()
            step += 1
            saves = step % options.checkpoint_every == 0 or step == options.steps
            stops = bool(signals) and distributed.size() == 1
            if saves or stops or len(pending) == LOOK_EVERY:
                stops = distributed.anywhere(bool(signals), next(model.parameters()).device)
                rows = _look(pending, step, options, path)
                pending = []
                if history is not None:
                    history.add(rows)
                bar.set_postfix(loss=f"{rows[-1][1]:.4g}", refresh=False)
            if saves or stops:
                checkpoint.save(
                    path, state, step, {**metadata, **dataclasses.asdict(options), **split}
                )
            if stops:
                distributed.agree(None)  # no process ends, and none is ended, before that is saved
                raise KeyboardInterrupt
    if history is not None:
        history.draw()
    whole = get_model_state_dict(average.module, options=StateDictOptions(full_state_dict=True))
    result.load_state_dict(whole, assign=True)
    return result.eval()


def _drops(model: nn.Module) -> bool:
    return any(isinstance(layer, nn.Dropout) and layer.p > 0.0 for layer in model.modules())


def update(called: nn.Module, state: State, task: Task, options: Options, step: int) -> Tensor:
    """One update of the weights and their average.

    Args:
        called: the model to call, see `distributed.parallelize`.
        state: changed in place.
        step: updates done before.

    Returns:
        The loss of this process's share of the batch, and the norm of the gradient, ``(2,)``.
    """
    device = next(state.model.parameters()).device
    parts, seed = _draw(task, options, step)
    torch.manual_seed(seed + distributed.rank())  # dropout
    bf16 = options.precision == "bf16"
    total = torch.zeros((), device=device)
    for i, part in enumerate(parts):
        with distributed.gradients_stay(called, i < len(parts) - 1):
            with torch.autocast(device.type, torch.bfloat16) if bf16 else nullcontext():
                loss = task.loss(called, part) / len(parts)
            loss.backward()
        total += loss.detach()
    norm = nn.utils.clip_grad_norm_(state.model.parameters(), options.clip_norm or math.inf)
    for group in state.optimizer.param_groups:
        group["lr"] = options.rate(step)
    state.optimizer.step()
    state.optimizer.zero_grad()
    state.average.multi_avg_fn = partial(_blend, weight=options.ema_weight(step))
    state.average.update_parameters(state.model)
    return torch.stack([total, norm.full_tensor() if isinstance(norm, DTensor) else norm])


def _draw(task: Task, options: Options, step: int) -> tuple[list[dict[str, Tensor]], int]:
    """What is random in an update: this process's parts of the batch, and another seed."""
    first, second = np.random.SeedSequence((options.seed, step)).generate_state(2).tolist()
    batch = task.draw(torch.Generator().manual_seed(first), options.batch)
    batch["update"] = torch.full((options.batch,), step)
    return distributed.parts(batch, options.accumulate), second


def _blend(average: list[Tensor], current: list[Tensor], _: Tensor, *, weight: float) -> None:
    torch._foreach_lerp_(average, current, weight)


def _look(pending: list[Tensor], step: int, options: Options, path: Path) -> list[Row]:
    """The rows of the loss curve for the updates up to `step`.

    Raises:
        CommandError: one that is not finite.
    """
    values = distributed.mean(torch.stack(pending)).tolist()
    rows = []
    for number, (loss, norm) in enumerate(values, start=step - len(pending) + 1):
        if not (math.isfinite(loss) and math.isfinite(norm)):
            what = "gradient" if math.isfinite(loss) else "loss"
            again = "continue with --resume changed and" if path.exists() else "start again with"
            raise CommandError(
                f"the {what} of update {number} is not finite; {checkpoint.earlier(path)}; {again}"
                " a smaller --learning-rate or --clip-norm, or mend the data if they are damaged"
            )
        rows.append((number, loss, norm, options.rate(number - 1)))
    return rows


def _progress(total: int, done: int) -> Any:
    """A progress bar, on the first process; where no one watches it says little."""
    from tqdm import tqdm

    seconds = 0.5 if sys.stderr.isatty() else 30.0
    return tqdm(
        total=total,
        initial=done,
        desc="training",
        unit="update",
        dynamic_ncols=True,
        mininterval=seconds,
        disable=distributed.rank() > 0,
    )
