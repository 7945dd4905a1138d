"""The public functions for CuPy arrays: `import dsno_kernels.cupy as dkc`.

Arrays pass to the kernels and back through DLPack without a copy, on the device of the arrays and
on CuPy's current stream of it; nothing waits. The functions are those of `dsno_kernels`, with CuPy
arrays where they have tensors and NumPy dtypes where they have dtypes; results carry no gradients
(`spectral_conv_weight_grad` is one).

Example:
    >>> x, weight = cupy.random.randn(8, 16, 1024), cupy.random.randn(16, 16, 32, 2)
    >>> y = dkc.spectral_conv(x.astype("f4"), weight.astype("f4"), time_dim=2, channel_dim=1)
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import re
from collections.abc import Callable, Iterator
from typing import Any

import cupy
import numpy as np
import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from dsno_kernels import functional

DTYPES = {
    name: getattr(torch, name)
    for name in ("float16", "bfloat16", "float32", "float64", "complex64", "complex128")
}


def _lifted(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of tensors as one of CuPy arrays; its annotations say which arguments are."""
    signature = inspect.signature(function)
    annotations = {name: p.annotation for name, p in signature.parameters.items()}
    tensors = [name for name, annotation in annotations.items() if "Tensor" in annotation]
    dtypes = [name for name, annotation in annotations.items() if "torch.dtype" in annotation]

    @functools.wraps(function)
    def on_arrays(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        given = bound.arguments
        arrays: dict[str, cupy.ndarray] = {}
        for name in tensors:
            if name in given:
                arrays |= _arrays(name, given[name], annotations[name])
        for name in dtypes:
            if isinstance(given.get(name), (str, type, np.dtype)):
                given[name] = _torch_dtype(name, given[name])
        index = _device_index(arrays)
        device = torch.device("cuda", index)
        with (
            torch.cuda.device(device),
            torch.cuda.stream(_current_stream(index, device)),
            torch.no_grad(),
        ):
            for name in given.keys() & tensors:
                given[name] = _converted(given[name], cupy.ndarray, _tensor)
            result = function(*bound.args, **bound.kwargs)
            return _converted(result, Tensor, _array)

    on_arrays.__doc__ = (
        f"`dsno_kernels.{function.__name__}` for CuPy arrays.\n\n"
        "    Raises:\n"
        "        TypeError: what is not a CuPy array, or its dtype.\n"
        "        ValueError: arrays on two devices, or strides that DLPack cannot carry.\n"
        "        Whatever the function itself raises.\n"
    )
    return on_arrays


# What may stand in the place of an array where the annotation of an argument has the word.
_OTHERS: dict[str, tuple[type, ...]] = {
    "None": (type(None),),
    "int": (int,),
    "float": (int, float),
    "Generator": (torch.Generator,),
}


def _arrays(name: str, value: Any, annotation: str) -> dict[str, cupy.ndarray]:
    """The arrays of one argument by name, checked; what else it may be is left to the function."""
    words = set(re.findall(r"\w+", annotation))
    if any(isinstance(value, _OTHERS[word]) for word in words & _OTHERS.keys()):
        return {}
    if isinstance(value, (list, tuple)) and words & {"Sequence", "tuple"}:
        found: dict[str, cupy.ndarray] = {}
        for place, item in enumerate(value):
            found |= _arrays(f"{name}[{place}]", item, annotation)
        return found
    if not isinstance(value, cupy.ndarray):
        kind = f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")
        raise TypeError(f"{name} must be a cupy.ndarray, got {kind}")
    if not (value.dtype.name in ("int32", "int64") and "int" in annotation):
        _torch_dtype(name, value.dtype.name)
    if any(stride < 0 or stride % value.dtype.itemsize for stride in value.strides):
        raise ValueError(
            f"{name} has strides {value.strides}, which DLPack cannot carry (negative, or no whole"
            " number of elements): pass cupy.ascontiguousarray of it"
        )
    return {name: value}


def _torch_dtype(name: str, dtype: Any) -> torch.dtype:
    """Of a dtype of NumPy or its name; NumPy itself does not know "bfloat16"."""
    spelled = dtype if isinstance(dtype, str) and dtype in DTYPES else np.dtype(dtype).name
    if spelled not in DTYPES:
        raise TypeError(f"{name} must be one of {', '.join(DTYPES)}, got {spelled}")
    return DTYPES[spelled]


def _device_index(arrays: dict[str, cupy.ndarray]) -> int:
    indices = {array.device.id for array in arrays.values()}
    if len(indices) > 1:
        places = ", ".join(f"{name} on {array.device.id}" for name, array in arrays.items())
        raise ValueError(f"all arrays must be on one device, got {places}")
    return next(iter(indices)) if indices else cupy.cuda.Device().id


def _current_stream(index: int, device: torch.device) -> torch.cuda.Stream:
    """CuPy's current stream of a device, for PyTorch.

    The null stream (0, 1) and the per-thread default stream (2) both give PyTorch's default stream:
    CUDA orders it with every thread's default stream, and PyTorch's memory is safe only there, as
    all threads share the number 2.
    """
    with cupy.cuda.Device(index):
        pointer = cupy.cuda.get_current_stream().ptr
    if pointer in (0, 1, 2):
        return torch.cuda.default_stream(device)
    return torch.cuda.ExternalStream(pointer, device)


def _converted(value: Any, kind: type, convert: Callable[[Any], Any]) -> Any:
    """A value, or a sequence of values, with those of one kind converted."""
    if isinstance(value, (list, tuple)):
        make = getattr(value, "_make", type(value))  # of a named tuple
        return make(_converted(item, kind, convert) for item in value)
    return convert(value) if isinstance(value, kind) else value


# -1: both sides work on one stream, so neither has to wait for the other.
_NO_WAIT = -1


@contextlib.contextmanager
def _exchange_of(dtype: object) -> Iterator[None]:
    """Some versions of CuPy, and a CuPy without ml_dtypes, do not exchange bfloat16."""
    try:
        yield
    except (BufferError, TypeError, ValueError) as error:
        raise TypeError(
            f"CuPy {cupy.__version__} does not exchange {dtype} with PyTorch ({error}): use float16"
            " or float32, or a newer CuPy with ml_dtypes"
        ) from error


def _tensor(array: cupy.ndarray) -> Tensor:
    """A tensor on the memory of an array, which it keeps alive."""
    with _exchange_of(array.dtype.name):
        return from_dlpack(array.__dlpack__(stream=_NO_WAIT))


class _Exported:
    """A tensor as what `cupy.from_dlpack` takes."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def __dlpack__(self, **_: Any) -> Any:
        return self.tensor.__dlpack__(stream=_NO_WAIT)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.tensor.__dlpack_device__()


def _array(tensor: Tensor) -> cupy.ndarray:
    """An array on the memory of a tensor, which it keeps alive."""
    with _exchange_of(tensor.dtype):
        return cupy.from_dlpack(_Exported(tensor.resolve_conj()))


spectral_conv = _lifted(functional.spectral_conv)
spectral_conv_backward = _lifted(functional.spectral_conv_backward)
spectral_conv_weight_grad = _lifted(functional.spectral_conv_weight_grad)
truncated_rfft = _lifted(functional.truncated_rfft)
truncated_irfft = _lifted(functional.truncated_irfft)
dynamic_threshold = _lifted(functional.dynamic_threshold)
group_norm_silu = _lifted(functional.group_norm_silu)
exp_step = _lifted(functional.exp_step)
solver_step = _lifted(functional.solver_step)
noised = _lifted(functional.noised)
denoising_loss = _lifted(functional.denoising_loss)
