"""What the property tests draw: tensors of any axes, memory order, offset, stride and dtype, and
the ops' options.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from hypothesis import strategies as st
from torch import Tensor

from dsno_kernels import backends
from dsno_kernels.backends import Request

# The backends that can run here; with TRITON_INTERPRET=1 the interpreted Triton kernels are among
# them.
BACKENDS = [
    name
    for name in ("reference", "cpu", "triton")
    if backends.unsupported(name, Request("spectral_conv", torch.device("cpu"), torch.float32))
    is None
]

DTYPES = (torch.float32, torch.float32, torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclasses.dataclass(frozen=True)
class Case:
    """One drawn call of `spectral_conv`."""

    shape: tuple[int, ...]
    time_dim: int
    channel_dim: int
    out_channels: int
    modes: int
    n: int
    dtype: torch.dtype
    memory: str
    order: tuple[int, ...]
    bias: bool
    activation: bool
    residual: bool
    precision: str
    seed: int

    @property
    def out_shape(self) -> tuple[int, ...]:
        shape = list(self.shape)
        shape[self.time_dim], shape[self.channel_dim] = self.n, self.out_channels
        return tuple(shape)


@st.composite
def cases(draw: st.DrawFn, max_elements: int = 4096) -> Case:
    ndim = draw(st.integers(2, 5))
    time_dim, channel_dim = draw(st.permutations(range(ndim)))[:2]
    shape = [draw(st.integers(1, 5)) for _ in range(ndim)]
    shape[time_dim] = draw(st.one_of(st.integers(1, 9), st.sampled_from([16, 17, 33, 64])))
    shape[channel_dim] = draw(st.one_of(st.integers(1, 9), st.sampled_from([16, 17, 40])))
    pixels = ndim - 1 if ndim - 1 not in (time_dim, channel_dim) else None
    if pixels is not None:
        shape[pixels] = draw(st.sampled_from([1, 2, 7, 8, 9, 16, 33, 35, 70]))
    while math.prod(shape) > max_elements:
        axis = max(range(ndim), key=shape.__getitem__)
        shape[axis] = shape[axis] // 2
    T = shape[time_dim]
    n = draw(st.one_of(st.just(T), st.integers(1, 17)))
    limit = min(T, n) // 2 + 1
    return Case(
        shape=tuple(shape),
        time_dim=time_dim,
        channel_dim=channel_dim,
        out_channels=draw(st.one_of(st.just(shape[channel_dim]), st.integers(1, 18))),
        modes=draw(st.one_of(st.just(limit), st.integers(1, limit))),
        n=n,
        dtype=draw(st.sampled_from(DTYPES)),
        memory=draw(
            st.sampled_from(
                ["contiguous", "contiguous", "permuted", "sliced", "offset", "expanded"]
            )
        ),
        order=tuple(draw(st.permutations(range(ndim)))),
        bias=draw(st.booleans()),
        activation=draw(st.booleans()),
        residual=draw(st.booleans()),
        precision=draw(st.sampled_from(["fp32", "fp32", "fp32", "bf16x3", "tf32", "bf16"])),
        seed=draw(st.integers(0, 2**31)),
    )


def tensor(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    memory: str,
    order: tuple[int, ...],
    device: str = "cpu",
) -> Tensor:
    """Normal values of one shape, laid out in memory as asked."""

    def randn(*size: int) -> Tensor:
        return torch.randn(*size, dtype=torch.float64).to(device, dtype)

    if memory == "permuted":
        inverse = sorted(range(len(order)), key=order.__getitem__)
        return randn(*(shape[axis] for axis in order)).permute(inverse)
    if memory == "sliced":
        return randn(*(2 * size + 1 for size in shape))[tuple(slice(1, None, 2) for _ in shape)]
    if memory == "offset":
        return randn(math.prod(shape) + 3)[3:].view(shape)
    if memory == "expanded":
        return randn(*(1 if axis == order[0] else size for axis, size in enumerate(shape))).expand(
            shape
        )
    return randn(*shape)
