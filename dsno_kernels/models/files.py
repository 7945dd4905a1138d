"""Models as files: safetensors with everything that rebuilds the model in the metadata.

The metadata are strings. "kind" is "dsno" or "edm_denoiser"; "config" is the JSON of the network's
`DSNOConfig`; "sigma_data" belongs to an edm_denoiser. Further ones are free: "logsnr" (JSON list of
the times a DSNO was trained on), "provenance" (JSON: command, seed, steps, version, data).
"""

from __future__ import annotations

import contextlib
import dataclasses
import glob
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dsno_kernels.models.config import DSNOConfig
from dsno_kernels.models.denoiser import EDMDenoiser
from dsno_kernels.models.dsno import DSNO

PACKAGED = Path(__file__).parents[1] / "weights"


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
        TypeError: another kind of model. ModelFileError: (a ValueError) a finite weight that is
        infinite in `dtype`. OSError: the file cannot be written. One that was there is as it was.

    Example:
        >>> dk.models.save(model, "student.safetensors", logsnr=logsnr.tolist())
    """
    network = model.network if isinstance(model, EDMDenoiser) else model
    if not isinstance(network, DSNO):
        raise TypeError(f"model must be a DSNO or an EDMDenoiser of one, got {type(model)}")
    own: dict[str, Any] = {"kind": "dsno", "config": dataclasses.asdict(network.config)}
    if isinstance(model, EDMDenoiser):
        own.update(kind="edm_denoiser", sigma_data=model.sigma_data)
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
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ModelFileError(
            f"{path} holds no configuration that this version knows"
            f" ({type(error).__name__}: {error})"
        ) from None
    with torch.device("meta"):
        network = DSNO(config, kernels=kernels)
    assign(network, tensors, path)
    model = EDMDenoiser(network, sigma_data) if found == "edm_denoiser" else network
    return model.eval()


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
    # Not safetensors' own save_file: its errors do not tell a full disk from another fault, and a
    # killed process leaves a temporary file of a random name.
    _remove_leftovers(Path(path))
    part = Path(f"{path}.{os.getpid()}.part")  # another process writes another one
    try:
        with open(part, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def _remove_leftovers(path: Path) -> None:
    """Remove the temporary files of processes that were killed while they wrote this file."""
    for part in path.parent.glob(f"{glob.escape(path.name)}.*.part"):
        pid = part.suffixes[-2][1:]
        if pid.isdecimal():
            try:
                os.kill(int(pid), 0)
            except ProcessLookupError:
                part.unlink(missing_ok=True)
            except (OSError, OverflowError):  # it lives, as another user; or that is no process
                pass


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


def assign(model: nn.Module, tensors: Mapping[str, Tensor], source: str | Path) -> None:
    """Make the tensors the parameters of a model (on any device, or on "meta"), in float32.

    Raises:
        ModelFileError: the first key that only one of them has, or the first shape that differs.
    """
    for name, expected in model.state_dict().items():
        if name not in tensors:
            raise ModelFileError(f"{source} lacks {name}, which its configuration needs")
        if tensors[name].shape != expected.shape:
            raise ModelFileError(
                f"{source}: {name} has shape {tuple(tensors[name].shape)}, its configuration needs"
                f" {tuple(expected.shape)}"
            )
    state = {name: t.float() if t.is_floating_point() else t for name, t in tensors.items()}
    unknown = model.load_state_dict(state, strict=False, assign=True).unexpected_keys
    if unknown:
        raise ModelFileError(f"{source} holds {unknown[0]}, which its configuration has no use for")


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
