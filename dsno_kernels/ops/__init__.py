"""The ops: one file each, with its schema, its fake, its autograd and its call of a backend.

Schemas take real tensors in the caller's axes, and are opaque to `torch.compile`. `backend` and
`precision` are strings whose empty value is resolved at each call. Autograd lives outside the
dispatcher (`*Function`), because that is the cheapest place for it; backward is written with the
same differentiable functions, so gradients of every order run on the same kernels.
"""

from __future__ import annotations

import torch

library = torch.library.Library("dsno_kernels", "DEF")


def define(schema: str, implementation: object, fake: object) -> torch._ops.OpOverload:
    """Register one op; one implementation for all devices, as `backends.select` chooses later."""
    library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    name = schema.split("(")[0]
    library.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"dsno_kernels::{name}", fake, lib=library)  # type: ignore[arg-type]
    return getattr(torch.ops.dsno_kernels, name).default
