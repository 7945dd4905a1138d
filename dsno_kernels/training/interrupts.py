"""Ctrl-C and SIGTERM while a network is trained: noted at once, obeyed between two updates."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

# What these signals do by themselves. Other handlers are somebody's, and stay.
DEFAULTS: dict[signal.Signals, Any] = {
    signal.SIGINT: signal.default_int_handler,
    signal.SIGTERM: signal.SIG_DFL,
}


@contextlib.contextmanager
def noted() -> Iterator[list[int]]:
    """Within it the first SIGINT or SIGTERM goes into this list, and the next one acts as ever.

    What is in the list when it ends is a KeyboardInterrupt then. Only the main thread of a process
    can listen; in another one the list stays empty.
    """
    signals: list[int] = []
    main = threading.current_thread() is threading.main_thread()
    changed = [n for n, handler in DEFAULTS.items() if main and signal.getsignal(n) == handler]

    def note(number: int, _: FrameType | None) -> None:
        signals.append(number)
        give_back()

    def give_back() -> None:
        for number in changed:
            signal.signal(number, DEFAULTS[number])

    for number in changed:
        signal.signal(number, note)
    try:
        yield signals
    finally:
        give_back()
    if signals:
        raise KeyboardInterrupt
