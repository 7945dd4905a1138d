"""Op `abs_rank`, where in each sample the |x| of two neighboring ranks stand, and dynamic
thresholding from it.

Places have no derivative; what is gathered from them has. So the quantile is this op and plain
PyTorch, differentiable to any order, with the gradient of `torch.quantile`: it falls on the two
elements between which the quantile lies.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dsno_kernels.backends import Request, reference, select
from dsno_kernels.ops import define, on_reference, under_transform

DEFINITIONS = ("dpm_solver", "diffusers")


def _run(x: Tensor, rank: int, backend: str) -> Tensor:
    if x.shape[0] == 0:
        return _fake(x, rank, backend)
    places: Tensor = select(backend, Request("abs_rank", x.device, x.dtype)).abs_rank(x, rank)
    return places


def _fake(x: Tensor, rank: int, backend: str) -> Tensor:
    return x.new_empty((x.shape[0], 2), dtype=torch.int64)


op = define("abs_rank(Tensor x, SymInt rank, str backend) -> Tensor", _run, _fake)


def abs_quantile(x: Tensor, ratio: float, backend: str) -> Tensor:
    """The quantile of |x| in each sample, `[B]`, interpolated linearly as `torch.quantile` does."""
    x = x[:, None] if x.ndim == 1 else x
    size = 1  # of a sample
    for length in x.shape[1:]:
        size = size * length
    position = ratio * (size - 1)
    rank = int(position)
    if under_transform():
        places = on_reference(reference.abs_rank, backend, x, rank)
    else:
        places = op(x.detach(), rank, backend)
    pair = x.flatten(1).gather(1, places).abs()  # [B, 2]
    return torch.lerp(pair[:, 0], pair[:, 1], position - rank)


def threshold_scale(
    x: Tensor, ratio: float, max_value: float, definition: str, backend: str
) -> Tensor:
    """s of each sample, `[B]`."""
    quantile = abs_quantile(x, ratio, backend)
    if definition == "dpm_solver":
        return quantile.clamp(min=max_value)
    return quantile.clamp(min=1.0, max=max_value)


def divide_by_scale(x: Tensor, s: Tensor) -> Tensor:
    """x clamped to [-s, s] and divided by s, a number a sample."""
    s = s.reshape(-1, *[1] * (x.ndim - 1))
    return torch.clamp(x, -s, s) / s
