"""Checks that several public functions share; each raises one sentence on what is wrong."""

from __future__ import annotations

import torch
from torch import Tensor

from dsno_kernels import backends
from dsno_kernels._modes import max_modes

REAL_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def backend(name: str | None) -> str:
    return backends.forced() if name is None else backends.check_name(name)


def names(values: tuple[object, ...]) -> str:
    return ", ".join(map(str, values))


def tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if value.layout != torch.strided or value.is_nested:
        kind = "a nested tensor" if value.is_nested else value.layout
        raise TypeError(f"{name} must be a dense (torch.strided) tensor, got {kind}")


def real(name: str, x: Tensor) -> None:
    tensor(name, x)
    if x.dtype not in REAL_DTYPES:
        raise TypeError(f"{name} must be real floating point ({names(REAL_DTYPES)}), got {x.dtype}")


def integer(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name} must be an integer, got {value!r}")


def dim(name: str, dim: int, x: Tensor) -> int:
    integer(name, dim)
    if not -x.ndim <= dim < x.ndim:
        raise ValueError(f"{name}={dim} is out of range for shape {tuple(x.shape)}")
    return dim % x.ndim


def axes(name: str, x: Tensor, time_dim: int, channel_dim: int) -> tuple[int, int]:
    real(name, x)
    time = dim("time_dim", time_dim, x)
    channel = dim("channel_dim", channel_dim, x)
    if time == channel:
        raise ValueError(
            f"time_dim and channel_dim must differ; both name axis {time} of shape {tuple(x.shape)}"
        )
    length(x.shape[time], f"the time axis (time_dim={time_dim}) of {name}")
    return time, channel


def length(n: int, name: str = "n") -> int:
    integer(name, n)
    if n < 1:
        raise ValueError(f"{name} must have a length of at least 1, got {n}")
    return n


def modes(modes: int, T: int, n: int) -> None:
    integer("modes", modes)
    limit = max_modes(min(T, n))
    if not 1 <= modes <= limit:
        raise ValueError(
            f"modes (K, axis 2 of a weight) must be in 1..{limit} for {min(T, n)} time points"
            f" (at most T//2 + 1), got {modes}"
        )


def weight(weight: Tensor, channels: int, T: int, n: int) -> None:
    real("weight", weight)
    if weight.ndim != 4 or weight.shape[3] != 2:
        raise ValueError(
            "weight must have shape (I, O, K, 2), real and imaginary part last;"
            f" got {tuple(weight.shape)}"
        )
    if weight.shape[0] != channels:
        raise ValueError(
            f"x has {channels} channels (axis channel_dim) but weight {tuple(weight.shape)} expects"
            f" {weight.shape[0]}: the axis or the weight is the wrong one"
        )
    if weight.shape[0] == 0 or weight.shape[1] == 0:
        raise ValueError(
            f"weight must have at least one input and output channel, got {tuple(weight.shape)}"
        )
    modes(weight.shape[2], T, n)


def same_device(tensors: dict[str, Tensor]) -> None:
    if len({tensor.device for tensor in tensors.values()}) > 1:
        places = ", ".join(f"{name} on {tensor.device}" for name, tensor in tensors.items())
        raise ValueError(f"all tensors must be on one device, got {places}")
