"""Locks and marks on the ledger's server: for hosts that share nothing else.

A lock is an advisory lock of a session of its own: the server lets go of it when the session ends, which a host that is
gone brings about by keepalives, and a process that died by its closed socket. A session that broke is a lock that was
lost; nothing makes a new one in its place. Marks are rows of a table, which workers need to read and nothing else.

A holder that was frozen or cut off may go on after somebody else got the lock: the server can't reach into files. What
is done about that, and what is left, is in ADR 0011.
"""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Callable, Iterator

from sisa.coordination.protocol import Coordination
from sisa.errors import BusyError, LostLockError, StoreError
from sisa.ledger.place import PostgresPlace
from sisa.ledger.session import Session

RETRY_S = 0.05
_HOLDER = """
SELECT a.application_name FROM pg_locks l JOIN pg_stat_activity a ON a.pid = l.pid
WHERE l.locktype = 'advisory' AND l.granted AND l.objsubid = 1
AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())
AND (l.classid::bigint << 32) | l.objid::bigint = ?::bigint
"""


class PostgresCoordination(Coordination):
    """The locks and marks of one store in a database."""

    def __init__(self, place: PostgresPlace) -> None:
        self._place = place
        self._table = TableMarks(place)
        self.marks = self._table

    def lock(self, name: str) -> SessionLock:
        """Return the lock of a name."""
        return SessionLock(self._place, name)

    def close(self) -> None:
        """Close the marks' session."""
        self._table.close()


class SessionLock:
    """An advisory lock; each holder has a session of its own."""

    def __init__(self, place: PostgresPlace, name: str) -> None:
        self._place = place
        self._name = name
        self._number = lock_number(f"{place.schema}/{name}")

    @contextlib.contextmanager
    def held(self, *, timeout_s: float | None = None, poll: Callable[[], None] | None = None) -> Iterator[HeldLock]:
        """Hold it for the length of a ``with`` block."""
        with contextlib.closing(Session(self._place)) as session:
            self._take(session, timeout_s, poll)
            try:
                yield HeldLock(session, self._name)
            finally:  # the end of the session frees it too, but only when the server gets to it
                with contextlib.suppress(StoreError):
                    session.run("SELECT pg_advisory_unlock(?)", (self._number,))

    def _take(self, session: Session, timeout_s: float | None, poll: Callable[[], None] | None) -> None:
        deadline_s = None if timeout_s is None else time.monotonic() + timeout_s
        while not session.run("SELECT pg_try_advisory_lock(?)", (self._number,))[0][0]:
            if deadline_s is not None and time.monotonic() >= deadline_s:
                raise BusyError(
                    f"another operation holds the store ({self._holder(session)}, {self._name})",
                    hint="Wait until it ends, then run the command again.",
                )
            if poll is not None:
                poll()
            time.sleep(RETRY_S)

    def _holder(self, session: Session) -> str:
        found = session.run(_HOLDER, (self._number,))
        return str(found[0][0]).removeprefix("sisa ") if found and found[0][0] else "unknown holder"


class HeldLock:
    """A lock that this process got."""

    def __init__(self, session: Session, name: str) -> None:
        self._session = session
        self._name = name

    def check(self) -> None:
        """Ask the server: as long as it answers in this session, the lock is held.

        Raises:
            LostLockError: The session is gone.
        """
        try:
            self._session.run("SELECT 1")
        except StoreError as error:
            raise LostLockError(
                f"the lock {self._name} was lost while it was needed: {error.message}",
                hint="Run the command again: what was finished is kept, and what wasn't is not used.",
            ) from error


class TableMarks:
    """Rows of the table of marks."""

    def __init__(self, place: PostgresPlace) -> None:
        self._place = place
        self._opened: Session | None = None

    @property
    def _session(self) -> Session:
        if self._opened is None or self._opened.broken:
            self._opened = Session(self._place)
        return self._opened

    def close(self) -> None:
        """Close the session, if there is one."""
        if self._opened is not None:
            self._opened.close()
            self._opened = None

    def place(self, shard: int, request: str) -> None:
        """Put a mark, durably."""
        self._session.run("INSERT INTO marks (shard, request) VALUES (?, ?) ON CONFLICT DO NOTHING", (shard, request))

    def remove(self, shard: int, request: str) -> None:
        """Take a mark away."""
        self._session.run("DELETE FROM marks WHERE shard = ? AND request = ?", (shard, request))

    def any(self, shard: int) -> bool:
        """Say whether there is one for the shard."""
        return bool(self._session.run("SELECT EXISTS (SELECT 1 FROM marks WHERE shard = ?)", (shard,))[0][0])

    def all(self) -> list[tuple[int, str]]:
        """Return every mark."""
        return [(row[0], row[1]) for row in self._session.run("SELECT shard, request FROM marks ORDER BY 1, 2")]


def lock_number(name: str) -> int:
    """Name an advisory lock: they are signed numbers of 64 bits, and shared by all who use the database."""
    return int.from_bytes(hashlib.blake2b(f"sisa/{name}".encode(), digest_size=8).digest(), "big", signed=True)
