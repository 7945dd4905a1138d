"""Processes and devices: the group that torchrun asks for, and a model spread over it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.rendezvous import rendezvous
from torch.utils.checkpoint import checkpoint

from dsno_kernels.models import DSNO
from dsno_kernels.training.errors import CommandError

# How gloo and NCCL say that another process of the group has gone.
PEER_GONE = ("gloo/transport", "ncclRemoteError", "remote process exited")


def rank() -> int:
    """Of this process in the group; 0 without one."""
    return dist.get_rank() if dist.is_initialized() else 0


def size() -> int:
    """Processes in the group; 1 without one."""
    return dist.get_world_size() if dist.is_initialized() else 1


@contextlib.contextmanager
def started(device: str = "auto") -> Iterator[torch.device]:
    """The device of this process, in the group that torchrun's environment describes.

    Args:
        device: "cpu", "cuda" or "auto" (a GPU where there is one).

    Raises:
        CommandError: no CUDA device, or fewer than processes on this machine; within it, another
        process that has ended.
    """
    chosen = choose_device(device)
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield chosen
        return
    # Where torchrun starts dead processes again, its store still holds their addresses.
    store, rank, size = next(rendezvous("env://"))
    store = PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
        dist.init_process_group("nccl", store=store, rank=rank, world_size=size, device_id=chosen)
    else:
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    try:
        yield chosen
    except RuntimeError as error:
        if not any(sign in str(error) for sign in PEER_GONE):
            raise
        raise CommandError(
            "another process of this run has ended; what it said is the reason, and the same"
            " command continues"
        ) from None
    finally:
        dist.destroy_process_group()


def choose_device(name: str) -> torch.device:
    """The device of "auto", "cpu" or "cuda"; under torchrun each process has its own GPU."""
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise CommandError("--device cuda, but PyTorch sees no CUDA device here; use --device cpu")
    if not available or name == "cpu":
        return torch.device("cpu")
    local, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if local >= count:
        raise CommandError(
            f"process {local} on this machine has no GPU of its own: it has {count}; start"
            f" {count} processes, or use --device cpu"
        )
    return torch.device("cuda", local)


def parts(batch: dict[str, Tensor], accumulate: int) -> list[dict[str, Tensor]]:
    """This process's share of a global batch, in `accumulate` equal parts."""
    pieces = size() * accumulate
    chunks = {name: tensor.chunk(pieces) for name, tensor in batch.items()}
    first = rank() * accumulate
    return [
        {name: chunk[i] for name, chunk in chunks.items()} for i in range(first, first + accumulate)
    ]


def mean(values: Tensor) -> Tensor:
    """The mean over the processes."""
    if size() > 1:
        dist.all_reduce(values)
    return values / size()


def anywhere(flag: bool, device: torch.device) -> bool:
    """Whether it is so in any process."""
    return bool(mean(torch.tensor(float(flag), device=device)) > 0)


def agree(error: str | None) -> None:
    """Tell all processes what the first one says; the others' own words do not count.

    Raises:
        CommandError: on each of them, where that is an error.
    """
    said = [error]
    if size() > 1:
        dist.broadcast_object_list(said)
    if said[0] is not None:
        raise CommandError(said[0])


def parallelize(model: nn.Module, kind: str) -> nn.Module:
    """The model to call in training, whose gradients are the mean over the processes.

    Args:
        model: on the device of this process; with "fsdp" its parameters are sharded in place.
        kind: "ddp" or "fsdp".
    """
    if size() == 1:
        return model
    if kind == "fsdp":
        return shard(model)
    return nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)


def shard(model: nn.Module) -> nn.Module:
    """FSDP2: each block of a DSNO network is gathered when it computes."""
    kind = next(model.parameters()).device.type
    mesh = init_device_mesh(kind, (size(),))
    for block in blocks(model):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


@contextlib.contextmanager
def gradients_stay(model: nn.Module, stay: bool) -> Iterator[None]:
    """Within it a backward pass adds to the gradients of this process only, if `stay`."""
    if isinstance(model, nn.parallel.DistributedDataParallel):
        with model.no_sync() if stay else contextlib.nullcontext():
            yield
        return
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(not stay)
    yield


@contextlib.contextmanager
def activation_checkpointing(model: nn.Module, enabled: bool) -> Iterator[None]:
    """Within it the blocks of a DSNO network keep only their inputs for the backward pass."""
    changed = list(blocks(model)) if enabled else []
    for block in changed:
        forward: Any = block.forward
        block.forward = partial(checkpoint, forward, use_reentrant=False)
    try:
        yield
    finally:
        for block in changed:
            del block.forward  # the instance's: the class's is seen again


def blocks(model: nn.Module) -> Iterator[nn.Module]:
    """Residual, attention and temporal blocks: the layers of DSNO that have layers."""
    for module in model.modules():
        if isinstance(module, DSNO):
            yield from (layer for layer in module.all_modules if any(layer.children()))
