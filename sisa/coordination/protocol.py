"""What processes of one store ask of each other: to keep out, and to stop.

A **lock** has one holder and is let go when its holder dies. What it protects lies elsewhere, in files that don't ask
whether whoever writes still holds it. Hence the rule: a holder asks :meth:`Held.check` right before anybody can see
what it did, and again before it tells anyone; and whoever gets a lock sweeps what a holder before it may have left.

A **stop mark** is put beside a shard by a deletion: whoever trains the shard looks for marks, drops what it has and
lets go of the lock.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Protocol


class Held(Protocol):
    """A lock that somebody holds."""

    def check(self) -> None:
        """Make sure that it is still held.

        Raises:
            LostLockError: It isn't, or nobody can tell.
        """


class HeldElsewhere:
    """Stands for a lock that the process in charge holds, and asks about."""

    def check(self) -> None:
        """That process does."""


class Lock(Protocol):
    """A lock, by name."""

    def held(
        self, *, timeout_s: float | None = None, poll: Callable[[], None] | None = None
    ) -> AbstractContextManager[Held]:
        """Hold the lock for the length of a ``with`` block.

        Args:
            timeout_s: How long to wait for it; None waits for ever, 0 doesn't wait.
            poll: Called between tries, several times a second.

        Raises:
            BusyError: Someone else still held it when the time was up.
            StoreError: It can't be asked for.
        """


class Marks(Protocol):
    """The stop marks."""

    def place(self, shard: int, request: str) -> None:
        """Put a request's mark beside a shard, durably."""

    def remove(self, shard: int, request: str) -> None:
        """Take a mark away; nothing happens if it is gone."""

    def any(self, shard: int) -> bool:
        """Say whether whoever trains the shard has to stop."""

    def all(self) -> list[tuple[int, str]]:
        """Return every mark: its shard, and its request."""


class Coordination(ABC):
    """The locks and the marks of one store. For one thread."""

    marks: Marks

    @abstractmethod
    def lock(self, name: str) -> Lock:
        """Return the lock of a name: ``operation``, ``ingest`` or ``create``."""

    @abstractmethod
    def close(self) -> None:
        """Close what is open; locks are held by ``with`` blocks and not touched."""

    def shard(self, shard: int) -> Lock:
        """Return the lock of whoever trains, or purges, stages of a shard."""
        return self.lock(f"shard-{shard:04d}")

    def rows(self, shard: int) -> Lock:
        """Return the lock for the moment in which rows of a shard are rewritten."""
        return self.lock(f"rows-{shard:04d}")
