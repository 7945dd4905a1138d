"""What makes this library fit into others; each part is imported when it is first used."""

from __future__ import annotations

import importlib
from types import ModuleType

__all__ = ["diffusers", "dsno", "edm"]


def __getattr__(name: str) -> ModuleType:
    if name in __all__:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
