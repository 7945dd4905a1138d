"""Ctrl-C while `python -m dsno_kernels` imports PyTorch, which takes seconds: the process ends with
130, as after Ctrl-C later on, and without a traceback.

The package imports this module first. Where it is imported by another program nothing is changed.
"""

import os
import signal
import sys
from types import FrameType


def _end(number: int, frame: FrameType | None) -> None:
    os._exit(130)


def over() -> None:
    """The commands take over: Ctrl-C is a KeyboardInterrupt again."""
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _our_command() -> bool:
    """Whether this process runs our script, or `python -m dsno_kernels` and no other module."""
    called = os.path.basename(next(iter(sys.argv), ""))
    if called != "-m":  # so `python -m` calls itself until it has found the module
        return called == "dsno-kernels"
    words = iter(sys.orig_argv)
    option = next((word for word in words if word.startswith("-m")), "")
    return (option[2:] or next(words, "")) == "dsno_kernels"


if signal.getsignal(signal.SIGINT) is signal.default_int_handler and _our_command():
    signal.signal(signal.SIGINT, _end)
