"""The ops: one file each, with its schema, its fake, its autograd and its call of a backend.

Schemas take real tensors in the caller's axes, and are opaque to `torch.compile`. `backend` and
`precision` are strings whose empty value is resolved at each call. Autograd lives outside the
dispatcher (`*Function`), because that is the cheapest place for it; backward is written with the
same differentiable functions, so gradients of every order run on the same kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

library = torch.library.Library("dsno_kernels", "DEF")


def define(schema: str, implementation: object, fake: object) -> torch._ops.OpOverload:
    """Register one op; one implementation for all devices, as `backends.select` chooses later."""
    library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    name = schema.split("(")[0]
    library.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"dsno_kernels::{name}", fake, lib=library)  # type: ignore[arg-type]
    return getattr(torch.ops.dsno_kernels, name).default


def under_transform() -> bool:
    """Whether torch.func or forward-mode AD is at work; `autograd.Function` serves neither."""
    return (
        torch._C._functorch.maybe_current_level() is not None
        or torch.autograd.forward_ad._current_level >= 0
    )


def on_reference(function: Callable[..., Any], backend: str, *args: Any, **options: Any) -> Any:
    """What runs under a transform: the reference, plain PyTorch that is right to any order.

    Raises:
        NotImplementedError: another backend was asked for.
    """
    if backend not in ("", "reference"):
        raise NotImplementedError(
            f"backend {backend!r} does not run under torch.func transforms or forward-mode AD;"
            " only 'reference' does: leave the backend open or ask for that one"
        )
    return function(*args, **options)


def distinct(x: torch.Tensor, other: Any) -> Any:
    """`other`, as a view where it is `x`: Dynamo refuses a Function that gets one tensor twice."""
    if other is x and torch.compiler.is_compiling():
        return x.view_as(x)
    return other
