"""Ctrl-C while something runs that must not be left half-done."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType


@contextlib.contextmanager
def interrupts_deferred() -> Iterator[None]:
    """Let a Ctrl-C that comes during a ``with`` block wait for its end; a second one doesn't wait.

    Ray that is interrupted while it connects or disconnects takes the process down with it when that ends.
    """
    ours = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(ours):
        yield  # nobody would be interrupted here
        return
    came = False

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal came
        if came:
            ours(number, frame)
        came = True

    signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, ours)
        if came:
            signal.raise_signal(signal.SIGINT)
