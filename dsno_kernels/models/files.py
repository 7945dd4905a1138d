"""Models as files: safetensors with everything that rebuilds the model in the metadata.

The metadata are strings. "kind" is "dsno" or "edm_denoiser"; "config" is the JSON of the network's
`DSNOConfig`; "sigma_data" belongs to an edm_denoiser, and so does "process", the JSON of what
`dsno_kernels.diffusion.process_files` makes of any process but EDM with the usual range. Further
ones are free: "logsnr" (JSON list of the times a DSNO was trained on), "provenance" (JSON: command,
seed, steps, version, data).
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dsno_kernels._files import replacing
from dsno_kernels.diffusion.process_files import described, rebuilt
from dsno_kernels.diffusion.processes import EDM
from dsno_kernels.functional import checks
from dsno_kernels.models.config import DSNOConfig
from dsno_kernels.models.denoiser import EDMDenoiser
from dsno_kernels.models.dsno import DSNO

PACKAGED = Path(__file__).parents[1] / "weights"
_OWN = {"kind", "config", "sigma_data", "process"}  # metadata


class ModelFileError(ValueError):
    """Why a file cannot be used as a model, in one sentence."""


def save(
    model: nn.Module, path: str | Path, *, dtype: torch.dtype | None = None, **metadata: Any
) -> None:
    """Write a model to one file, which appears complete or not at all.

    Args:
        model: a :class:`DSNO`, or an :class:`EDMDenoiser` around one.
        path: of the file; by convention it ends in ``.safetensors``.
        dtype: what floating-point weights are stored as; None keeps theirs.
        **metadata: more of it; what is not a string is stored as JSON.

    Raises:
        TypeError: another kind of model, or a dtype that is not real floating point.
        ModelFileError: (a ValueError) a finite weight that is infinite in `dtype`, a process that
        holds functions, or metadata that the model writes itself. OSError: the file cannot be
        written. One that was there is as it was.

    Example:
        >>> dk.models.save(model, "student.safetensors", logsnr=logsnr.tolist())
    """
    network = model.network if isinstance(model, EDMDenoiser) else model
    if not isinstance(network, DSNO):
        raise TypeError(f"model must be a DSNO or an EDMDenoiser of one, got {type(model)}")
    if dtype not in (None, *checks.REAL_DTYPES):
        raise TypeError(
            f"dtype must be None or one of {checks.names(checks.REAL_DTYPES)}, got {dtype}"
        )
    own: dict[str, Any] = {"kind": "dsno", "config": dataclasses.asdict(network.config)}
    if isinstance(model, EDMDenoiser):
        own.update(kind="edm_denoiser", sigma_data=model.sigma_data)
        # Of EDM's plain process sigma_data says all, also to versions that know no other.
        if model.process != EDM(sigma_data=model.sigma_data):
            own["process"] = described(model.process)
            if "repr" in own["process"]:
                raise ModelFileError(f"a file cannot hold the process {model.process!r}")
    for name in _OWN & metadata.keys():
        raise ModelFileError(f"the model writes its {name} itself; leave it out")
    tensors = {
        name: _stored(name, tensor, dtype) if dtype and tensor.is_floating_point() else tensor
        for name, tensor in network.state_dict().items()
    }
    write_tensors(path, tensors, {**own, **metadata})


def _stored(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    stored = tensor.to(dtype)
    if stored.isinf().sum() > tensor.isinf().sum():
        raise ModelFileError(
            f"{name} reaches {float(tensor.nan_to_num(posinf=0.0, neginf=0.0).abs().max()):.3g},"
            f" {str(dtype).removeprefix('torch.')} ends at {torch.finfo(dtype).max:.3g}; store the"
            " model as float32"
        )
    return stored


def load(
    path: str | Path,
    device: str | torch.device | None = None,
    *,
    kind: str | None = None,
    kernels: bool = True,
) -> Any:
    """The model of a file that :func:`save` wrote, in evaluation mode, its weights in float32.

    Args:
        path: of the file, or the name of a model that comes with the package ("digits") where no
            file here has that name.
        device: where its weights go; None is the CPU.
        kind: the kind that is wanted, "dsno" or "edm_denoiser"; None takes either.
        kernels: as in :class:`DSNO`.

    Raises:
        ModelFileError: (a ValueError) no such file, no model, one of another kind, or weights that
        do not fit its configuration.

    Example:
        >>> model = dk.models.load("student.safetensors", device="cuda")
    """
    tensors, metadata = read_tensors(path, device)
    found = metadata.get("kind", "none")
    if found not in ("dsno", "edm_denoiser") or kind not in (None, found):
        wanted = repr(kind) if kind else "'dsno' or 'edm_denoiser'"
        raise ModelFileError(f"{path} holds a model of kind {found!r}, wanted {wanted}")
    try:
        fields: dict[str, Any] = json.loads(metadata["config"])
        fields = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
        config = DSNOConfig(**fields)
        sigma_data = float(metadata["sigma_data"]) if found == "edm_denoiser" else 0.0
        process = rebuilt(json.loads(metadata["process"])) if "process" in metadata else None
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ModelFileError(
            f"{path} holds no configuration that this version knows"
            f" ({type(error).__name__}: {error})"
        ) from None
    with torch.device("meta"):
        network = DSNO(config, kernels=kernels)
    assign(network, tensors, path)
    if found == "dsno":
        return network.eval()
    try:
        return EDMDenoiser(network, sigma_data, process).eval()
    except (TypeError, ValueError) as error:
        raise ModelFileError(f"{path} holds no denoiser: {error}") from None


def read_metadata(path: str | Path) -> dict[str, str]:
    """The metadata of a file, all of them strings; raises `ModelFileError` as :func:`load`."""
    with _opened(path) as file:
        return file.metadata() or {}


def write_tensors(
    path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]
) -> None:
    """Write a safetensors file that appears complete or not at all.

    Args:
        path: of the file.
        tensors: names and values.
        metadata: what is not a string is stored as JSON.

    Raises:
        OSError: the file cannot be written (the disk is full, say); one that was there is as it
        was.
    """
    import safetensors.torch

    texts = {k: v if isinstance(v, str) else json.dumps(v) for k, v in metadata.items()}
    content = safetensors.torch.save(
        {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, texts
    )
    # Not safetensors' own save_file: its errors do not tell a full disk from another fault.
    with replacing(path) as file:
        file.write(content)


def read_tensors(
    path: str | Path, device: str | torch.device | None = None
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors, on `device` (None is the CPU), and the metadata of a safetensors file.

    Raises:
        ModelFileError: no such file, one that cannot be read, or one that is no safetensors file.
    """
    with _opened(path, device) as file:
        names = file.keys()
        return {name: file.get_tensor(name) for name in names}, file.metadata() or {}


def assign(
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    source: str | Path,
    advice: str = "give another file",
) -> None:
    """Make the tensors the parameters of a model (on any device, or on "meta"), in its dtypes.

    Raises:
        ModelFileError: the first key that only one of them has, or the first shape that differs.
    """
    wanted = model.state_dict()
    for name in {**wanted, **tensors}:
        found, needed = (
            tuple(state[name].shape) if name in state else None for state in (tensors, wanted)
        )
        if found != needed:
            difference = (
                f"{name} with shape {needed} is missing in it"
                if found is None
                else f"{name} with shape {found} in it is not in the network"
                if needed is None
                else f"{name} has shape {found} in it and {needed} in the network"
            )
            raise ModelFileError(f"{source} does not fit the configuration: {difference}; {advice}")
    state = {name: tensor.to(wanted[name].dtype).contiguous() for name, tensor in tensors.items()}
    model.load_state_dict(state, assign=True)


@contextlib.contextmanager
def _opened(path: str | Path, device: str | torch.device | None = None) -> Iterator[Any]:
    """A safetensors file, or a packaged one by its name, open for reading."""
    from safetensors import SafetensorError, safe_open

    place = Path(path)
    if place.name == str(path) and not place.is_file():
        named = PACKAGED / f"{path}.safetensors"
        place = named if named.is_file() else place
    try:
        with safe_open(place, framework="pt", device=str(device or "cpu")) as file:
            yield file
    except FileNotFoundError:
        raise ModelFileError(f"{path} does not exist; give a model file (.safetensors)") from None
    except (SafetensorError, OSError) as error:
        raise ModelFileError(
            f"{path} is no safetensors file, or a broken one ({error}); give another, or write it"
            " again"
        ) from None
