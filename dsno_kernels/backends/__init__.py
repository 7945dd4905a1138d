"""Choosing a backend happens here and nowhere else.

Each backend is a module with the ops it has as functions of one signature (that of `reference`) and
a function `unsupported(request) -> str | None`: None where it can serve the request, else the
reason in a few words.
"""

from __future__ import annotations

import functools
import importlib
import os
import threading
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

import torch

NAMES = ("cpu", "cuda", "triton", "cupy", "reference")

# Triton serves spectral convolutions of up to this length, whose times fit the tiles of its
# kernels; longer ones go through truncated transforms and cuBLAS, which read x in one pass however
# long it is. To be measured.
LONGEST_FUSED = 64


class Request(NamedTuple):
    """What an op asks of a backend; everything a backend may refuse."""

    op: str
    device: torch.device
    dtype: torch.dtype
    precision: str = "fp32"
    length: int = 0  # of the longest transform; 0 where it is not known
    modes: int = 0
    channels: int = 0  # the most of an operand; 0 where it is not known


# Ops that are two others in one pass: a backend that cannot do that for a request runs the two.
PARTS = {"spectral_conv_backward": ("spectral_conv", "spectral_conv_weight_grad")}


def order(request: Request) -> tuple[str, ...]:
    """The backends for a request, fastest first. One that is not listed for a device runs there
    only when it is forced.
    """
    if request.device.type == "cpu":
        return "cpu", "reference"
    if request.device.type != "cuda":
        return ("reference",)
    if request.op.startswith("spectral_conv") and request.length <= LONGEST_FUSED:
        return "triton", "cuda", "cupy", "reference"
    return "cuda", "cupy", "triton", "reference"


def check_name(name: str) -> str:
    if name not in NAMES:
        raise ValueError(f"unknown backend {name!r}; accepted: {', '.join(map(repr, NAMES))}")
    return name


class _State(threading.local):
    """What one thread has asked for."""

    forced = os.environ.get("DSNO_KERNELS_BACKEND", "")
    explaining = False


_state = _State()


def forced() -> str:
    """The backend that `use_backend` or `DSNO_KERNELS_BACKEND` asks for; "" leaves the choice."""
    return check_name(_state.forced) if _state.forced else ""


class use_backend:
    """Run every op inside a `with` block, and the backward of those ops, on one backend.

    It holds for the thread that enters the block.

    Args:
        name: "reference", "cpu", "cuda", "triton" or "cupy". An op that this backend cannot run
            raises `NotImplementedError` with the reason.

    Raises:
        ValueError: an unknown name.

    Example:
        >>> with dk.use_backend("reference"):
        ...     y = dk.spectral_conv(x, weight)
    """

    def __init__(self, name: str) -> None:
        self.name = check_name(name)
        self.before: list[str] = []

    def __enter__(self) -> None:
        self.before.append(_state.forced)
        _state.forced = self.name

    def __exit__(self, *_: object) -> None:
        _state.forced = self.before.pop()


def _module(name: str) -> ModuleType:
    return importlib.import_module(f"{__name__}.{name}")


def _lacks(op: str) -> str:
    return f"it does not have {op}"


@functools.lru_cache(maxsize=1024)
def unsupported(name: str, request: Request) -> str | None:
    """Why a backend cannot serve a request; None where it can, be it in parts."""
    reason = _not_whole(name, request)
    if reason is None or request.op not in PARTS:
        return reason
    reasons = (_not_whole(name, request._replace(op=part)) for part in PARTS[request.op])
    return next((reason for reason in reasons if reason), None)


def _not_whole(name: str, request: Request) -> str | None:
    """Why a backend cannot serve a request by one function of its own."""
    try:
        module = _module(name)
    except ModuleNotFoundError as error:
        if error.name == f"{__name__}.{name}":
            return "it is not part of this version"
        return f"it cannot be imported ({error})"
    except ImportError as error:
        return f"it cannot be imported ({error})"
    return _refusal(module, request)


def _refusal(module: ModuleType, request: Request) -> str | None:
    """As `_not_whole`, of a backend that is imported."""
    if not hasattr(module, request.op):
        return _lacks(request.op)
    reason: str | None = module.unsupported(request)
    return reason


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
    chosen = next(n for n in order(request) if unsupported(n, request) is None)
    if chosen == "reference" and request.device.type == "cuda":
        _report_fallback(request)
    return _module(chosen)


# Ops and compute capabilities that `_report_fallback` has warned of.
_reported: set[tuple[str, tuple[int, int]]] = set()


def _report_fallback(request: Request) -> None:
    """Warn, once for each op and kind of GPU, that no kernel serves what kernels are for.

    float64, and an op that no backend of GPUs has, are for the reference by design; an op of
    `PARTS` leaves the warning to its parts.
    """
    if request.op in PARTS:
        return
    reasons = {n: unsupported(n, request) for n in order(request) if n != "reference"}
    if request.dtype == torch.float64 or set(reasons.values()) == {_lacks(request.op)}:
        return
    capability = torch.cuda.get_device_capability(request.device)
    if (request.op, capability) not in _reported:
        _reported.add((request.op, capability))
        found = "{}.{}".format(*capability)
        why = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
        warnings.warn(
            f"no kernel of dsno_kernels runs {request.op} in {request.dtype} on this GPU (compute"
            f" capability {found}); the slower PyTorch reference does. {why}",
            stacklevel=2,
        )


class Explained(Exception):
    """Carries the request of a call that is explained instead of run."""

    def __init__(self, request: Request, forced_name: str) -> None:
        super().__init__(request, forced_name)
        self.request, self.forced_name = request, forced_name


def select(name: str, request: Request) -> ModuleType:
    """The backend that serves a request: the named one or, for "", the first in order that can.

    Raises:
        NotImplementedError: the named backend cannot, with its reason.
    """
    if _state.explaining:
        raise Explained(request, name)
    return _select(name, request)


def select_whole(name: str, request: Request) -> ModuleType | None:
    """As `select`, for an op of `PARTS`; None where the backend runs it in parts."""
    module = select(name, request)
    return module if _refusal(module, request) is None else None


def explain_call(run: Callable[[], object]) -> str:
    """What `explain_request` says of the first op that `run` would call; the op does not run."""
    _state.explaining = True
    try:
        with torch.no_grad():
            run()
    except Explained as call:
        return explain_request(call.request, call.forced_name)
    finally:
        _state.explaining = False
    return "no backend runs: the result is empty"


def explain_request(request: Request, forced_name: str = "") -> str:
    """One line a backend: which one `select` takes for a request, and why not the others."""
    names = order(request)
    chosen = forced_name or next(n for n in names if unsupported(n, request) is None)
    verdict = (
        chosen if unsupported(chosen, request) is None else f"{chosen} is asked for and cannot"
    )
    lines = [
        f"{request.op} on {request.device.type}, {request.dtype},"
        f" precision {request.precision}: {verdict}"
    ]
    for name in (*names, *(n for n in NAMES if n not in names)):
        reason = unsupported(name, request)
        if reason is None:
            reason = "runs" if name == chosen else "could run"
            apart = _not_whole(name, request) if request.op in PARTS else None
            if apart:
                reason += f", as {' and '.join(PARTS[request.op])}: {apart}"
        lines.append(f"  {'->' if name == chosen else '  '} {name:<9} {reason}")
    return "\n".join(lines)
