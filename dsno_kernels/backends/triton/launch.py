"""The one place that launches: plans, the shortest way to a compiled kernel, and what the GPU is.

Triton looks at every argument of every call to find the code that is specialized for it, which
costs tens of microseconds. Here all that does not change between calls of one plan is decided once:
a `Launch` holds every argument but the pointers. Its first call goes through Triton; later calls
hand the pointers of the moment to the compiled kernel itself.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton import knobs

from dsno_kernels import _layout
from dsno_kernels._layout import Axes
from dsno_kernels.backends import _launch
from dsno_kernels.backends.triton import configs
from dsno_kernels.backends.triton.configs import Architecture, Config

# Plans that an op keeps: one for each combination of shapes, strides, dtypes and options.
PLANS = 1024

# What a plan knows of a tensor: shape, strides, dtype.
Operand = tuple[tuple[int, ...], tuple[int, ...], torch.dtype]
# Launcher, function and metadata of a compiled kernel.
Direct = tuple[Callable[..., Any], Any, Any]


class Buffer(NamedTuple):
    """A tensor to allocate."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    def empty(self) -> Tensor:
        return torch.empty(self.shape, dtype=self.dtype, device=self.device)


@functools.lru_cache(maxsize=64)
def architecture(device: torch.device) -> Architecture:
    """The table of a device; the interpreter takes that of the safe architecture."""
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)
    if device.type == "cuda" and capability not in configs.ARCHITECTURES:
        warnings.warn(
            "no launch table for compute capability {}.{}: Triton kernels take the rows of sm_86;"
            " `python benchmarks/tune.py` measures a table".format(*capability),
            stacklevel=2,
        )
    return configs.ARCHITECTURES.get(capability, configs.SAFE)


def submit(
    kernel: Any, programs: int, config: Config, device: torch.device, /, **arguments: Any
) -> Any:
    """Launch `programs` programs on the current stream of `device`; returns the compiled kernel."""
    with _launch.on_device(device):
        return kernel[(programs,)](
            **arguments,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            enable_fp_fusion=True,
        )


class Launch:
    """A planned launch: `programs` programs with every argument but the pointers.

    The pointers are the first parameters of a kernel; `run` passes them.
    """

    __slots__ = (
        "arguments",
        "config",
        "device",
        "direct",
        "kernel",
        "pointers",
        "programs",
        "rest",
    )

    def __init__(
        self, kernel: Any, programs: int, config: Config, device: torch.device, /, **arguments: Any
    ) -> None:
        self.kernel, self.programs, self.config, self.device = kernel, programs, config, device
        self.arguments = arguments
        count = len(kernel.arg_names) - len(arguments)
        self.pointers = tuple(kernel.arg_names[:count])
        self.rest = tuple(arguments[name] for name in kernel.arg_names[count:])
        # Compiled kernels by what Triton specializes on in a pointer: missing or not, and its
        # alignment. All else that it specializes on is in the arguments.
        self.direct: dict[tuple[bool | None, ...], Direct | None] = {}


def run(planned: Launch, *tensors: Tensor | None) -> None:
    """Launch on the current stream of the device, with the pointers in the kernel's order."""
    pointers = [None if tensor is None else tensor.data_ptr() for tensor in tensors]
    alignment = tuple([None if pointer is None else pointer % 16 == 0 for pointer in pointers])
    direct = planned.direct.get(alignment)
    if direct is None or _observed(planned.kernel):
        if alignment not in planned.direct:
            _launch.not_while_capturing(planned.device, "call for these shapes compiles kernels")
        compiled = submit(
            planned.kernel,
            planned.programs,
            planned.config,
            planned.device,
            **dict(zip(planned.pointers, tensors, strict=True)),
            **planned.arguments,
        )
        planned.direct[alignment] = direct_call(compiled)
        return
    launcher, function, metadata = direct
    with _launch.on_device(planned.device):
        stream = _launch.raw_stream(planned.device)
        # No hooks (`_observed` has looked), and so no metadata for them.
        launcher(
            planned.programs, 1, 1, stream, function, metadata, None, None, None,
            *pointers, *planned.rest,
        )  # fmt: skip


# The parameters of `CudaLauncher.__call__` in Triton 3.6 and 3.7; `args` are in both at last those
# of the kernel, compile-time ones included.
_CALLS = (
    "gridX gridY gridZ stream function args",
    "gridX gridY gridZ stream function kernel_metadata launch_metadata"
    " launch_enter_hook launch_exit_hook args",
)


def direct_call(compiled: Any) -> Direct | None:
    """How to call a compiled kernel directly; None where its launcher is not one we know.

    None keeps a launch on Triton's own path: in the interpreter, and in versions of Triton whose
    launcher takes other parameters.
    """
    launcher: Any = getattr(compiled, "run", None)
    function, metadata = (getattr(compiled, name, None) for name in ("function", "packed_metadata"))
    if function is None or metadata is None or not known_launcher(type(launcher).__call__):
        return None
    return launcher, function, metadata


@functools.lru_cache(maxsize=16)
def known_launcher(call: Callable[..., Any]) -> bool:
    """Whether a launcher's `__call__` takes the parameters that `run` passes."""
    return " ".join(list(inspect.signature(call).parameters)[1:]) in _CALLS


def _observed(kernel: Any) -> bool:
    """Whether someone (a profiler) has asked Triton to be told of launches."""
    enter, leave = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    return bool(
        kernel.pre_run_hooks or getattr(enter, "calls", enter) or getattr(leave, "calls", leave)
    )


def operand(tensor: Tensor | None) -> Operand | None:
    """What a plan knows of a tensor."""
    return None if tensor is None else (tensor.shape, tensor.stride(), tensor.dtype)


def axes_of(tensor: Operand, time_dim: int, channel_dim: int) -> tuple[Axes, bool]:
    """Canonical axes, and whether they are those of the dense copy that has to be made first."""
    shape, strides, _ = tensor
    axes = _layout.find_axes(shape, strides, time_dim, channel_dim)
    if axes is not None:
        return axes, False
    T, C = shape[time_dim], shape[channel_dim]
    dense = _layout.find_output_layout(shape, strides, time_dim, channel_dim, T, C)
    axes = _layout.find_axes(*dense, time_dim, channel_dim)
    assert axes is not None
    return axes, True


def named_strides(tensor: str, axes: Axes | None) -> dict[str, int]:
    """Strides of `[B, T, C, P]` as kernel arguments; 0 where an axis has one element or none.

    The stride of such an axis says nothing, but an odd one would cost the compiler what it knows
    of alignment.
    """
    strides = (0, 0, 0, 0) if axes is None else axes.strides
    sizes = (0, 0, 0, 0) if axes is None else axes[:4]
    return {
        f"stride_{tensor}{name}": stride if size > 1 else 0
        for name, size, stride in zip("btcp", sizes, strides, strict=True)
    }


def method_of(precision: str, table: Architecture) -> str:
    """How the products of a precision are computed on an architecture."""
    return table.fp32_method if precision == "fp32" else precision


def operand_dtype(method: str) -> torch.dtype:
    return torch.bfloat16 if method.startswith("bf16") else torch.float32


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def block(size: int, largest: int) -> int:
    """The tile for an axis: a power of two, 16 (tensor cores) to `largest`."""
    return min(largest, max(16, 1 << (size - 1).bit_length()))


def blocks(sizes: tuple[int, int, int], config: Config) -> tuple[int, int, int]:
    """The tile of a row of the table, cut to a problem."""
    first, second, third = (block(*pair) for pair in zip(sizes, config.tile, strict=True))
    return first, second, third


def padded_pixels(P: int) -> int:
    """Pixels of a batch entry, padded so that its sign bits fill whole bytes."""
    return cdiv(P, 8) * 8


@functools.cache
def twiddles(length: int, device: torch.device) -> Tensor:
    """cos and -sin of 2 pi j / length, [2, length] float32; exact at quarter turns.

    Never freed: a captured CUDA graph holds its address.
    """
    _launch.not_while_capturing(device, f"transform of length {length} uploads its table")
    turns = torch.arange(length, dtype=torch.float64) * (2 * torch.pi / length)
    table = torch.stack([turns.cos(), -turns.sin()])
    table = torch.where(table.abs() < 1e-12, 0.0, table)
    return table.to(device, torch.float32)
