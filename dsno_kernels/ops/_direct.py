"""Whether an op may run without the dispatcher, which costs more time than a small step does."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

_PARAMETER = torch.nn.Parameter
# Looked up once: a step asks them at each call.
_dispatch_modes = torch._C._len_torch_dispatch_stack
_function_modes = torch._C._len_torch_function_stack
_tracing_state = torch._C._get_tracing_state
_profiler_enabled = torch._C._autograd._profiler_enabled


def runs_directly(tensors: Iterable[Tensor | None]) -> bool:
    """Whether nothing has to see the op: no compiler, mode, tracer or profiler is at work, and each
    tensor is memory as it stands (no subclass, no pending negation, no symbolic zero).

    Transforms of torch.func are looked for elsewhere (`under_transform`).
    """
    if (
        torch.compiler.is_compiling()
        or _dispatch_modes()
        or _function_modes()
        or _tracing_state() is not None
        or _profiler_enabled()
    ):
        return False
    for x in tensors:
        if x is None:
            continue
        kind = type(x)
        if kind is not Tensor and kind is not _PARAMETER:
            return False
        if x.is_neg() or x._is_zerotensor():
            return False
    return True
