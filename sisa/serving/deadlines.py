"""A time limit for blocks that all may take equally long: what ``asyncio.timeout`` does, for less than a tenth of a request.

The oldest block is the next one to be late, so that one timer is enough for all of them. They belong to one event loop at
a time.
"""

from __future__ import annotations

import asyncio
from types import TracebackType
from typing import Self, cast


class Deadlines:
    """Makes time limits."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._running: dict[Deadline, None] = {}  # oldest first
        self._timer: asyncio.TimerHandle | None = None

    def one(self) -> Deadline:
        """Return a context manager, for the running task, that raises TimeoutError when the time is over."""
        return Deadline(self)

    def begin(self, deadline: Deadline) -> None:
        """Watch a block."""
        loop = asyncio.get_running_loop()
        deadline.until_s = loop.time() + self._seconds
        self._running[deadline] = None
        if self._timer is None:
            self._timer = loop.call_at(deadline.until_s, self._look)

    def end(self, deadline: Deadline) -> None:
        """Watch a block no more; nothing is left on the event loop after the last."""
        del self._running[deadline]
        if not self._running and self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _look(self) -> None:
        loop = asyncio.get_running_loop()
        self._timer = None
        for deadline in self._running:
            if deadline.until_s > loop.time():
                self._timer = loop.call_at(deadline.until_s, self._look)
                return
            deadline.expire()


class Deadline:
    """The time limit of one block."""

    __slots__ = ("_all", "_cancelled_before", "_task", "expired", "until_s")

    def __init__(self, every: Deadlines) -> None:
        self._all = every
        self.until_s = 0.0
        """On the event loop's clock."""
        self.expired = False

    def __enter__(self) -> Self:
        """Begin."""
        self._task = cast("asyncio.Task[object]", asyncio.current_task())
        self._cancelled_before = self._task.cancelling()
        self._all.begin(self)
        return self

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        """End; a cancellation that is ours becomes a TimeoutError, anybody else's goes on."""
        self._all.end(self)
        if self.expired and self._task.uncancel() <= self._cancelled_before and kind is asyncio.CancelledError:
            raise TimeoutError

    def expire(self) -> None:
        """Cancel the block's task, once."""
        if not self.expired:
            self.expired = True
            self._task.cancel()
