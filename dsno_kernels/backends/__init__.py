"""Choosing a backend happens here and nowhere else.

Each backend is a module with the ops it has as functions of one signature (that of `reference`) and
a function `unsupported(request) -> str | None`: None where it can serve the request, else the
reason in a few words.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
from collections.abc import Iterator
from types import ModuleType
from typing import NamedTuple

import torch

NAMES = ("cpu", "cuda", "triton", "cupy", "reference")

# Fastest first, for each kind of device. A backend that is not listed for a device runs there only
# when it is forced.
_ORDER = {"cpu": ("cpu", "reference"), "cuda": ("cuda", "triton", "reference")}

OPS = ("spectral_conv", "spectral_conv_weight_grad", "truncated_rfft", "truncated_irfft")


class Request(NamedTuple):
    """What an op asks of a backend; everything a backend may refuse."""

    op: str
    device: torch.device
    dtype: torch.dtype
    precision: str = "fp32"


def check_name(name: str) -> str:
    if name not in NAMES:
        raise ValueError(f"unknown backend {name!r}; accepted: {', '.join(map(repr, NAMES))}")
    return name


_forced = os.environ.get("DSNO_KERNELS_BACKEND", "")


def forced() -> str:
    """The backend asked for by `use_backend` or `DSNO_KERNELS_BACKEND`; "" leaves the choice to
    `select`.
    """
    return check_name(_forced) if _forced else ""


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every op inside the `with` block, and the backward of those ops, on one backend. Holds
    for the process.

    Args:
        name: "reference", "cpu", "cuda", "triton" or "cupy". An op that this backend cannot run
            raises with the reason.
    Raises:
        ValueError: an unknown name.

    Example:
        >>> with dk.use_backend("reference"):
        ...     y = dk.spectral_conv(x, weight)
    """
    global _forced
    before, _forced = _forced, check_name(name)
    try:
        yield
    finally:
        _forced = before


def _module(name: str) -> ModuleType:
    return importlib.import_module(f"{__name__}.{name}")


@functools.lru_cache(maxsize=1024)
def unsupported(name: str, request: Request) -> str | None:
    """Why a backend cannot serve a request; None where it can."""
    try:
        module = _module(name)
    except ModuleNotFoundError as error:
        if error.name == f"{__name__}.{name}":
            return "it is not part of this version"
        return f"it cannot be imported ({error})"
    except ImportError as error:
        return f"it cannot be imported ({error})"
    return module.unsupported(request)


@functools.lru_cache(maxsize=1024)
def _select(name: str, request: Request) -> ModuleType:
    if name:
        reason = unsupported(name, request)
        if reason:
            raise NotImplementedError(
                f"backend {name!r} cannot run {request.op} on {request.device.type}"
                f" {request.dtype}: {reason}"
            )
        return _module(name)
    order = _ORDER.get(request.device.type, ("reference",))
    return next(_module(n) for n in order if unsupported(n, request) is None)


def select(name: str, request: Request) -> ModuleType:
    """The backend that serves a request: the named one or, for "", the first in order that can.

    Raises:
        NotImplementedError: the named backend cannot, with its reason.
    """
    return _select(name, request)


def explain_request(request: Request, forced_name: str = "") -> str:
    """One line a backend: which one `select` takes for a request, and why not the others."""
    order = _ORDER.get(request.device.type, ("reference",))
    chosen = forced_name or next(n for n in order if unsupported(n, request) is None)
    lines = [
        f"{request.op} on {request.device.type}, {request.dtype},"
        f" precision {request.precision}: {chosen}"
    ]
    for name in (*order, *(n for n in NAMES if n not in order)):
        reason = unsupported(name, request)
        if reason is None:
            reason = "runs" if name == chosen else "could run"
        lines.append(f"  {'->' if name == chosen else '  '} {name:<9} {reason}")
    return "\n".join(lines)
