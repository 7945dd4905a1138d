from __future__ import annotations

from dsno_kernels.backends import Request


def unsupported(request: Request) -> str | None:
    return "not built yet"
