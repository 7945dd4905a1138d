"""What ends a command of `python -m dsno_kernels`, in one line."""

from __future__ import annotations


class CommandError(Exception):
    """Why a command cannot go on: what was given, what is accepted, what to do; one sentence."""
