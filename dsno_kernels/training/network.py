"""The shape of a network on the command line, and its file."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dsno_kernels.models import DSNOConfig, files
from dsno_kernels.training.errors import CommandError
from dsno_kernels.training.options import Options


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of :func:`config`; the defaults suit 8x8 images."""
    group = parser.add_argument_group("network")
    group.add_argument(
        "--channels", type=int, default=32, metavar="N", help="of level 1; default: %(default)s"
    )
    group.add_argument(
        "--channel-mult",
        type=int,
        nargs="+",
        default=(1, 2),
        metavar="N",
        help="width of each level in multiples of --channels; default: 1 2",
    )
    group.add_argument(
        "--res-blocks", type=int, default=1, metavar="N", help="a level; default: %(default)s"
    )
    group.add_argument(
        "--attention",
        type=int,
        nargs="*",
        default=(),
        metavar="N",
        help="image sizes at which self-attention follows each block; default: none",
    )
    group.add_argument("--heads", type=int, default=1, metavar="N", help="default: %(default)s")
    group.add_argument(
        "--embedding", type=int, default=128, metavar="N", help="width; default: %(default)s"
    )
    group.add_argument(
        "--dropout", type=float, default=0.0, metavar="X", help="default: %(default)s"
    )


def config(arguments: argparse.Namespace, **fields: Any) -> DSNOConfig:
    """The network of a command line.

    Args:
        arguments: what `add_arguments` asked for.
        **fields: further ones of the configuration.

    Raises:
        CommandError: options that make no network.
    """
    try:
        return DSNOConfig(
            channels=arguments.channels,
            channel_mult=tuple(arguments.channel_mult),
            num_res_blocks=arguments.res_blocks,
            attention_resolutions=tuple(arguments.attention),
            num_heads=arguments.heads,
            embedding_dim=arguments.embedding,
            dropout=arguments.dropout,
            **fields,
        )
    except ValueError as error:
        raise CommandError(f"these options make no network: {error}") from None


def save(model: nn.Module, path: Path, **metadata: Any) -> None:
    """Write a trained model, beside its checkpoint; arguments of `dsno_kernels.models.save`.

    Raises:
        CommandError: it cannot be written.
    """
    try:
        files.save(model, path, **metadata)
    except OSError as error:
        raise CommandError(
            f"{path} cannot be written ({error.strerror}); the checkpoint beside it is whole: make"
            " room, and the same command writes it"
        ) from None
    print(f"Wrote {path}: {sum(p.numel() for p in model.parameters()):,} parameters", flush=True)


def provenance(options: Options, data: str) -> dict[str, Any]:
    """Where a trained model comes from, for its file.

    Args:
        options: of the learning.
        data: what it learned from: a name, and a checksum.
    """
    from dsno_kernels import __version__

    return {
        "command": shlex.join(["python", "-m", "dsno_kernels", *sys.argv[1:]]),
        "seed": options.seed,
        "steps": options.steps,
        "data": data,
        "version": __version__,
        "torch": torch.__version__,
    }
