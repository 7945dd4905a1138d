"""Checkpoints of the official DSNO project, read and written.

Its training saves one file by ``torch.save``: ``{"model": state dict, "ema": state dict, "args":
argparse.Namespace, "optim": .., "scheduler": ..}``, the last two not in every file. The keys of a
state dict are those of :class:`dsno_kernels.models.DSNO`, some with the "module." of a
``DistributedDataParallel`` in front.

Example:
    >>> config = dk.models.DSNOConfig.cifar10()
    >>> model = dk.integrations.dsno.load("solver-model_final.pt", config)
"""

from __future__ import annotations

import argparse
import io
import os
import re
from collections.abc import Mapping
from typing import Any, TypeGuard

import torch
from torch import Tensor

from dsno_kernels._files import replacing
from dsno_kernels.models.config import DSNOConfig
from dsno_kernels.models.dsno import DSNO
from dsno_kernels.models.files import assign

__all__ = ["load", "save"]

WHICH = ("ema", "model")
PREFIX = "module."
# How PyTorch names a class that a file wants and may not have.
_REFUSED = re.compile(r"GLOBAL (\S+)")


def load(path: str | os.PathLike[str], config: DSNOConfig, which: str = "ema") -> DSNO:
    """A network with the weights of an official checkpoint.

    Reads tensors, plain Python values and ``argparse.Namespace`` only: a file cannot run code.

    Args:
        path: the ``.pt`` file.
        config: the network it was saved from, `DSNOConfig.cifar10()` or `.imagenet64()` for the
            published ones.
        which: "ema", the averaged weights that samples are made with, or "model", those of the last
            training step.

    Returns:
        The network on the CPU in float32, in eval mode.

    Raises:
        ValueError: a file that is no checkpoint, lacks the weights asked for, or does not fit
            config; then the first key that differs is named, with both shapes.
        OSError: a file that cannot be opened.

    Equivalent to: ``model.load_state_dict(torch.load(path)[which])`` of the official project.
    """
    if which not in WHICH:
        raise ValueError(f"unknown weights {which!r}; accepted: 'ema', 'model'")
    content = _read(path)
    state = content.get(which) if isinstance(content, dict) else None
    if not _is_state(state):
        raise ValueError(
            f"{path} is no official DSNO checkpoint: it holds no dict {which!r} of tensors,"
            f" only {_describe(content)}"
        )
    return _filled(config, state, f"{path} ({which})")


def save(model: DSNO, path: str | os.PathLike[str], ema: DSNO | None = None) -> None:
    """Write a checkpoint that the official project reads, in float32.

    Args:
        model: the network of "model".
        path: the ``.pt`` file; an earlier one is replaced only when the new one is complete.
        ema: the network of "ema"; default `model`.

    Raises:
        TypeError: a model that is not a DSNO. OSError: a file that cannot be written.
    """
    averaged = model if ema is None else ema
    for network in (model, averaged):
        if not isinstance(network, DSNO):
            raise TypeError(f"model and ema must be DSNO networks, got {type(network).__name__}")
    states = {
        name: {key: tensor.detach().cpu().float() for key, tensor in network.state_dict().items()}
        for name, network in (("model", model), ("ema", averaged))
    }
    content = io.BytesIO()  # written to a file, a full disk would be a RuntimeError
    torch.save({**states, "args": argparse.Namespace()}, content)
    with replacing(path) as file:
        file.write(content.getbuffer())


def _read(path: str | os.PathLike[str]) -> Any:
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # damage shows in many ways: UnpicklingError, RuntimeError, EOFError
        refused = _REFUSED.search(str(error))
        if refused is None:
            raise ValueError(f"{path} is no checkpoint of PyTorch, or damaged") from error
        raise ValueError(
            f"{path} wants {refused[1]}, which a file may not choose to run; accepted are tensors,"
            " plain Python values and argparse.Namespace: save the state dicts anew"
        ) from None


def _is_state(state: Any) -> TypeGuard[Mapping[str, Tensor]]:
    return isinstance(state, Mapping) and all(isinstance(v, Tensor) for v in state.values())


def _describe(content: Any) -> str:
    if not isinstance(content, dict):
        return f"a {type(content).__name__}"
    return ", ".join(repr(key) for key in list(content)[:8]) or "an empty dict"


def _filled(config: DSNOConfig, state: Mapping[str, Tensor], source: str) -> DSNO:
    """The network of config with these tensors as its parameters, without a copy."""
    if state and all(key.startswith(PREFIX) for key in state):
        state = {key.removeprefix(PREFIX): tensor for key, tensor in state.items()}
    with torch.device("meta"):
        model = DSNO(config)
    assign(model, state, source, "pass the DSNOConfig that it was trained with")
    return model.eval()
