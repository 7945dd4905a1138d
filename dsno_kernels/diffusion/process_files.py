"""What can be a process, and processes as plain values, for files that name theirs."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor

from dsno_kernels.diffusion.discrete import DiscreteVP
from dsno_kernels.diffusion.processes import Process


def check_process(process: object) -> None:
    """Raise TypeError for what cannot be the process of a learned or optimized grid."""
    needed = ("alpha", "sigma", "rho", "log_snr", "inverse", "t_min", "t_max")
    missing = [name for name in needed if not hasattr(process, name)]
    if isinstance(process, type) or missing:
        why = "it is a class, make one of it" if not missing else f"it has no {missing[0]}"
        raise TypeError(
            f"process must be one of dk.diffusion, such as VPCosine(), or like it; got {process!r}:"
            f" {why}"
        )


def described(process: Any) -> dict[str, Any]:
    """The class and numbers of a process, as JSON can hold them: what `rebuilt` takes.

    A process of another class than those of `dk.diffusion`, or one that holds functions, is
    described by its class and text only.
    """
    name = type(process).__name__
    if type(process) is DiscreteVP:
        return {"kind": name, "alphas_cumprod": process.alphas_cumprod.tolist()}
    if _known().get(name) is type(process) and is_dataclass(process):
        values = {f.name: _plain(getattr(process, f.name)) for f in fields(process) if f.init}
        if not any(value is _OPAQUE for value in values.values()):
            return {"kind": name, **values}
    return {"kind": name, "repr": repr(process)}


def rebuilt(description: dict[str, Any]) -> Any:
    """The process that was described.

    Raises:
        ValueError: it was described by its text only, or not by this version.
    """
    values = dict(description)
    kind = values.pop("kind", None)
    found = _known().get(str(kind))
    if found is None or "repr" in values:
        raise ValueError(f"process {values.get('repr', kind)} cannot be made from a file: give it")
    arguments = {
        key: rebuilt(value) if isinstance(value, dict) else value for key, value in values.items()
    }
    try:
        return found(**arguments)
    except (TypeError, ValueError) as error:
        raise ValueError(f"process {kind} cannot be made of {sorted(values)} ({error})") from None


_OPAQUE = object()


def _plain(value: object) -> object:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Tensor) and value.ndim == 0:
        return float(value)
    if isinstance(value, Process):
        inside = described(value)
        return _OPAQUE if "repr" in inside else inside
    return _OPAQUE


def _known() -> dict[str, type[Process]]:
    """The processes of `dk.diffusion`, by name."""
    from dsno_kernels import diffusion

    found = (getattr(diffusion, name) for name in diffusion.__all__)
    return {
        value.__name__: value
        for value in found
        if isinstance(value, type) and issubclass(value, Process) and value is not Process
    }
