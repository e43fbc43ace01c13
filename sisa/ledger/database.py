"""What the parts of the ledger ask of a database, whichever engine it is.

Statements are plain SQL that SQLite and PostgreSQL both speak, with ``?`` for values. All writing happens in
:meth:`Database.transaction`: one writer at a time, and what it reads can't change before it writes. Reads that span
statements happen in :meth:`Database.snapshot`. Numbers that history counts with come from a table, not from the
engine, so that there are no gaps and the last one is remembered on both.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterator, Sequence
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from typing import Any, ClassVar, Protocol

from sisa.errors import DamagedError

BUSY_TIMEOUT_S = 60.0
"""How long a writer waits for its turn."""
COUNTERS = ("events", "requests", "turns")
"""Rows of the table of counters: the last number that a table gave; and, where writers queue, how many had a turn."""


class Row(Protocol):
    """One row of an answer: by position, by name, or all values in order."""

    def __getitem__(self, key: Any, /) -> Any:
        """Return one value."""

    def __iter__(self) -> Iterator[Any]:
        """Iterate over the values."""

    def keys(self) -> list[str]:
        """Return the columns' names."""


class Database(ABC):
    """A connection to one ledger; open it per process and per thread."""

    remote: ClassVar[bool]
    """Whether a server is asked over a network: then whoever must not wait doesn't ask."""
    opened_as: Hashable
    """What :meth:`identity` answered when it was opened."""

    @abstractmethod
    def close(self) -> None:
        """Close the connection."""

    @abstractmethod
    def rows(self, statement: str, parameters: Sequence[Any] = ()) -> list[Row]:
        """Run a statement and return its rows."""

    @abstractmethod
    def many(self, statement: str, parameters: Sequence[Sequence[Any]]) -> None:
        """Run a statement once for each set of parameters."""

    @abstractmethod
    def transaction(self) -> AbstractContextManager[None]:
        """Write everything in the block, or nothing; nested blocks join the outer one."""

    @abstractmethod
    def snapshot(self) -> AbstractContextManager[None]:
        """Read a state in which nothing changes between the statements of the block."""

    @abstractmethod
    def hold(self) -> AbstractContextManager[None]:
        """Read, and let nobody commit before the block ends.

        Raises:
            StoreError: On the way out: the hold may have been lost, so that somebody could commit meanwhile.
        """

    @abstractmethod
    def identity(self) -> Hashable:
        """Say which ledger the place names now; another one has another identity.

        Raises:
            StoreError: There is none, or it can't be reached.
        """

    @abstractmethod
    def stale(self) -> bool:
        """Say, without waiting, that this connection is of no use any more: the ledger has to be opened again.

        Raises:
            StoreError: There is no ledger.
        """

    @abstractmethod
    def commits(self) -> int:
        """Return a number that changes when another connection commits."""

    @abstractmethod
    def be_patient(self, seconds: float) -> None:
        """Set how long this connection waits for others before it says that the ledger is busy."""

    @abstractmethod
    def shed(self, *tables: str) -> None:
        """Have the engine let go of what was deleted from tables."""

    @abstractmethod
    def check(self) -> None:
        """Check what the engine can check of itself.

        Raises:
            DamagedError: It found a fault.
        """

    @abstractmethod
    def form(self) -> set[tuple[str, ...]]:
        """Describe every table, column, index, trigger and whatever else there is; the second item is a name."""

    @abstractmethod
    def expected_form(self) -> set[tuple[str, ...]]:
        """Describe the same of an empty ledger that is made for this purpose."""

    def row(self, statement: str, parameters: Sequence[Any] = ()) -> Row | None:
        """Run a statement and return its first row, or None."""
        found = self.rows(statement, parameters)
        return found[0] if found else None

    def next_number(self, counter: str) -> int:
        """Give the next number of a counter; to be called in a transaction."""
        row = self.row("UPDATE counters SET last = last + 1 WHERE name = ? RETURNING last", (counter,))
        if row is None:
            raise DamagedError(
                f"the ledger doesn't remember the last number of its {counter}",
                hint="Restore the ledger from a copy; `sisa verify` lists what is wrong.",
            )
        return int(row[0])

    def newest_request(self) -> int:
        """Return the number of the newest request; 0 before the first."""
        row = self.row("SELECT coalesce(max(number), 0) AS number FROM requests")
        return int(row["number"]) if row is not None else 0

    def note(self, kind: str, **detail: object) -> None:
        """Write one line of history: numbers, states and places, never an id or a digest of a record."""
        with self.transaction():
            self.rows(
                "INSERT INTO events (number, at, kind, detail) VALUES (?, ?, ?, ?)",
                (self.next_number("events"), now(), kind, json.dumps(detail, sort_keys=True)),
            )


def now() -> str:
    """Return the wall clock as text, for people; nothing is decided by it."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")
