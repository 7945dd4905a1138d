"""The checkpoint of a training run: one safetensors file, the same for any number of processes."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.optim.swa_utils import AveragedModel

from dsno_kernels.models.files import (
    ModelFileError,
    read_metadata,
    read_tensors,
    write_tensors,
)
from dsno_kernels.training import distributed
from dsno_kernels.training.errors import CommandError

NAME = "checkpoint.safetensors"


@dataclass
class State:
    """All that an update changes; of the weights and the average, the optimizer's tensors."""

    model: nn.Module
    average: AveragedModel
    optimizer: torch.optim.Optimizer


@contextlib.contextmanager
def only_run(folder: Path) -> Iterator[None]:
    """Within it no other run trains in the folder; called by all processes.

    The lock is the system's and ends with the process, however that ends. Where the file system
    has no locks there is none.

    Raises:
        CommandError: another run has it.
    """
    with contextlib.ExitStack() as stack:
        error = None
        if distributed.rank() == 0:
            descriptor = os.open(folder, os.O_RDONLY)
            stack.callback(os.close, descriptor)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                error = (
                    f"another run writes into --out {folder}; wait until it ends, or give another"
                    " --out"
                )
            except OSError:
                pass
        distributed.agree(error)
        yield


def save(path: Path, state: State, step: int, identity: Mapping[str, Any]) -> None:
    """Write the state after `step` updates; called by all processes, written by the first.

    Raises:
        OSError: the file cannot be written; an earlier one is as it was.
    """
    gather = StateDictOptions(full_state_dict=True, cpu_offload=True)
    model: dict[str, Any] = get_model_state_dict(state.model, options=gather)
    average: dict[str, Any] = get_model_state_dict(state.average.module, options=gather)
    optimizer: dict[str, Any] = get_optimizer_state_dict(
        state.model, state.optimizer, options=gather
    )
    if distributed.rank() > 0:
        return
    tensors = {f"model.{name}": value for name, value in model.items()}
    tensors |= {f"average.{name}": value for name, value in average.items()}
    for name, values in optimizer["state"].items():
        tensors |= {f"optimizer.{key}.{name}": value for key, value in values.items()}
    write_tensors(path, tensors, {"step": step, "identity": dict(identity)})


def restore(path: Path, state: State, identity: Mapping[str, Any]) -> int:
    """Take the state of a checkpoint; called by all processes, read by the first.

    Args:
        path: of the checkpoint; nothing happens where there is none.
        state: as it was built; filled in place.
        identity: what must be the same in the checkpoint.

    Returns:
        The updates done.

    Raises:
        CommandError: a file that is broken, or of another run.
    """
    found: list[Any] = [None, 0]
    tensors: dict[str, Tensor] = {}
    if distributed.rank() == 0:
        try:
            tensors, found[1] = _read(path, state, identity)
        except CommandError as error:
            found[0] = str(error)
    if distributed.size() > 1:
        dist.broadcast_object_list(found)
    if found[0] is not None:
        raise CommandError(found[0])
    step: int = found[1]
    if step > 0:
        _fill(state, tensors)
        state.average.n_averaged.fill_(step)
    return step


def earlier(path: Path) -> str:
    """What there is to continue from, in words."""
    try:
        step = read_metadata(path)["step"]
    except ModelFileError:
        return "no checkpoint was written yet"
    return f"the checkpoint of step {step} is in {path}"


def _read(path: Path, state: State, identity: Mapping[str, Any]) -> tuple[dict[str, Tensor], int]:
    """The tensors and the step of a checkpoint of this run; none and 0 without one."""
    if not path.exists():
        return {}, 0
    try:
        tensors, metadata = read_tensors(path)
        saved, step = json.loads(metadata["identity"]), int(metadata["step"])
    except (ValueError, KeyError) as error:  # of the file, its JSON, or what is in it
        raise CommandError(
            f"{path} cannot be continued ({error}); remove it, or give another --out"
        ) from None
    before, now = _flat(saved), _flat(json.loads(json.dumps(dict(identity))))
    for name, value in now.items():
        if before.get(name) != value:
            raise CommandError(
                f"{path} is of another run: {name} was {before.get(name)!r}, now it is {value!r};"
                " give the options of that run, or another --out"
            )
    for name, shape in _shapes(state).items():
        if name not in tensors or tensors[name].shape != shape:
            raise CommandError(
                f"{path} cannot be continued (it has no {name} of shape {tuple(shape)}); remove it,"
                " or give another --out"
            )
    return tensors, step


def _shapes(state: State) -> dict[str, torch.Size]:
    """Of the tensors that make a checkpoint."""
    shapes = {f"model.{name}": value.shape for name, value in state.model.state_dict().items()}
    for name, value in state.average.module.state_dict().items():
        shapes[f"average.{name}"] = value.shape
    trained = (item for item in state.model.named_parameters() if item[1].requires_grad)
    for name, parameter in trained:
        shapes[f"optimizer.step.{name}"] = torch.Size()
        for moment in ("exp_avg", "exp_avg_sq"):
            shapes[f"optimizer.{moment}.{name}"] = parameter.shape
    return shapes


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A mapping of mappings as one, with names like "config.channels"."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        inner = isinstance(value, dict)
        flat |= _flat(value, f"{prefix}{name}.") if inner else {f"{prefix}{name}": value}
    return flat


def _fill(state: State, tensors: dict[str, Tensor]) -> None:
    """Put the tensors, which the first process has, where they belong."""
    spread = StateDictOptions(
        full_state_dict=True, broadcast_from_rank0=distributed.size() > 1, cpu_offload=False
    )

    def under(prefix: str) -> dict[str, Any]:
        return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}

    set_model_state_dict(state.model, under("model."), options=spread)
    set_model_state_dict(state.average.module, under("average."), options=spread)
    optimizer: dict[str, Any] = get_optimizer_state_dict(
        state.model, state.optimizer, options=StateDictOptions(full_state_dict=True)
    )
    for name, values in optimizer["state"].items():
        for key in values:
            if tensors:
                values[key] = tensors[f"optimizer.{key}.{name}"]
    if not tensors:
        optimizer = {}
    set_optimizer_state_dict(state.model, state.optimizer, optimizer, options=spread)
