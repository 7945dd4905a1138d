"""Network weights of EDM's and FDM's official layout.

The projects publish pickles of whole objects (``network-snapshot-*.pkl``), and opening one runs the
code that it names. Such a file is not read here. Where you trust it and have the official code,
write its tensors, which any program can read safely::

    network = pickle.load(open("network-snapshot.pkl", "rb"))["ema"]
    torch.save(network.state_dict(), "weights.pt")  # or safetensors.torch.save_file

Example:
    >>> network = dk.integrations.edm.load("weights.pt")
    >>> process = dk.diffusion.FDM(dk.diffusion.EDM(), multiplier=2.0)
    >>> denoiser = dk.diffusion.from_edm(network, process=process)  # D(x, sigma, y)

The preconditioner is not among the tensors: say the process that the network was trained with,
`EDM()`, `VPLinear(t_min=1e-5)`, `VE()`, or `FDM` of one (the official VE has multiplier 1, whatever
its option said; the official VP ``sigma_min=2**-10``).
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsno_kernels.models.files import assign, read_tensors
from dsno_kernels.models.song_unet import SongUNet, SongUNetConfig

__all__ = ["convert", "load"]

# Of the preconditioner around the network, and of a DistributedDataParallel around both.
_PREFIX = re.compile(r"(module\.)?(model\.)?")


def load(path: str | os.PathLike[str]) -> SongUNet:
    """The raw network of a file of tensors.

    Reads safetensors, and ``.pt`` files of a state dict with tensors only: a file cannot run code.

    Args:
        path: the file; ``.safetensors``, or what ``torch.save`` made of a state dict.

    Returns:
        The network on the CPU in float32, in eval mode.

    Raises:
        ValueError: a pickle of objects, a file that is damaged, or one without such a network (then
            the first key that differs is named, with both shapes), or a .safetensors file that is
            not there. OSError: another file that cannot be opened.
    """
    if Path(path).suffix == ".safetensors":
        return convert(read_tensors(Path(path))[0], str(path))
    return convert(_read(path), str(path))


def convert(state: Mapping[str, Tensor], source: str = "the state dict") -> SongUNet:
    """The raw network of a state dict, whose shape its names and shapes tell.

    Args:
        state: of an official preconditioner ("model.enc..") or of its network ("enc..").
        source: what the messages call it.

    Raises:
        ValueError: no state dict of DDPM++ or NCSN++.
    """
    if not isinstance(state, Mapping) or not all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in state.items()
    ):
        raise ValueError(f"{source} holds no state dict of tensors; see dk.integrations.edm")
    plain = {_PREFIX.sub("", name, count=1): tensor.detach() for name, tensor in state.items()}
    try:
        config = SongUNetConfig.of(plain)
    except ValueError as error:
        raise ValueError(f"{source} holds {error}") from None
    with torch.device("meta"):
        network = SongUNet(config)
    assign(network, plain, source)
    return network.eval()


def _read(path: str | os.PathLike[str]) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # damage and refusal show in many ways
        raise ValueError(
            f"{path} is no file of tensors alone, or damaged; a pickle of the official project must"
            " be written anew as a state dict: dk.integrations.edm says how"
        ) from error
