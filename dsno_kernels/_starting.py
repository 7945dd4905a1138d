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


# `python -m` calls itself so until it has found the module to run; "dsno-kernels" is our script.
if os.path.basename(sys.argv[0]) in ("-m", "dsno-kernels") and (
    signal.getsignal(signal.SIGINT) is signal.default_int_handler
):
    signal.signal(signal.SIGINT, _end)
