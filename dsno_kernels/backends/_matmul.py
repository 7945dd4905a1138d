"""Products of complex matrices against PyTorch's TF32 switch, which lowers those of cuBLAS.

Of the promised errors only that of bf16 holds with it: where cuBLAS cuts operands to tf32 instead
of rounding them, the error is 7.7e-4, beyond that of tf32. All other precisions do without.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import torch
from torch import Tensor

_TF32_FROM = (8, 0)
_switch = threading.Lock()


def tf32_breaks(precision: str) -> bool:
    """Whether cuBLAS products, as the switch stands, could miss the promise of `precision`."""
    return precision != "bf16" and torch.backends.cuda.matmul.fp32_precision == "tf32"


@contextlib.contextmanager
def _tf32_off() -> Iterator[None]:
    """Turn the switch, which must be on, off for a while.

    Afterwards it inherits from `torch.backends.fp32_precision` where that says the same, so that a
    later change of that one still arrives.
    """
    matmul = torch.backends.cuda.matmul
    matmul.fp32_precision = "ieee"
    try:
        yield
    finally:
        matmul.fp32_precision = "none"
        if matmul.fp32_precision != "tf32":
            matmul.fp32_precision = "tf32"


def products(a: Tensor, b: Tensor, precision: str) -> Tensor:
    """`torch.bmm` of complex matrices within the error of `precision`.

    The switch is of the process: it is turned off for the time of the launch, and only where it is
    on. Products that other threads launch meanwhile are at most more accurate.
    """
    if precision == "bf16":
        return torch.bmm(a, b)
    # The lock comes first: another thread may have turned the switch off for a while.
    with _switch, _tf32_off() if tf32_breaks(precision) else contextlib.nullcontext():
        return torch.bmm(a, b)


def out_of_reach(spectrum: Tensor, precision: str) -> Tensor:
    """The spectrum in complex128 where TF32 would lower its products, else as it is.

    For products that PyTorch differentiates: their gradients run later, when the switch would be on
    again. It counts as it stands now.
    """
    device = spectrum.device
    if device.type != "cuda" or spectrum.dtype != torch.complex64:
        return spectrum
    with _switch:
        breaks = tf32_breaks(precision)
    if breaks and torch.cuda.get_device_capability(device) >= _TF32_FROM:
        return spectrum.to(torch.complex128)
    return spectrum
