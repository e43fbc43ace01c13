"""One SQLite file, opened so that no commit is lost and no deleted value stays in it.

``journal_mode=TRUNCATE`` and ``synchronous=FULL`` make a returned commit durable; ``secure_delete``
overwrites what is deleted. All writing happens in ``BEGIN IMMEDIATE`` transactions, so that what a
transaction reads can't change before it writes.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

from sisa.errors import BusyError, DamagedError, StoreError
from sisa.ledger.database import BUSY_TIMEOUT_S, Database, Row
from sisa.ledger.schema import REVISION_OF, check_migratable, check_revision

UNWRITABLE = frozenset({sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR_WRITE, sqlite3.SQLITE_READONLY})
"""SQLite's codes for a disk or a permission that stands in the way: the ledger itself is whole."""
RESTORE = "Restore the ledger from a copy that was made while no command ran."
PRAGMAS = ("journal_mode=TRUNCATE", "synchronous=FULL", "secure_delete=ON", "temp_store=MEMORY")


class SqliteDatabase(Database):
    """A connection to the ledger's file."""

    remote: ClassVar[bool] = False

    def __init__(self, path: Path) -> None:
        self.path = path
        self._name = os.fspath(path)
        if not path.exists():
            raise DamagedError(f"the store's ledger ({path.name}) is missing", hint=RESTORE)
        self.opened_as = self.identity()
        self._connection = _connected(path)
        try:
            check_revision(_revision(self._connection, path), f"the store's ledger ({path.name})")
            if self.stale():
                raise StoreError(f"the store's ledger ({path.name}) is being replaced", hint="Try again.")
        except BaseException:
            self._connection.close()
            raise

    @classmethod
    def create(cls, path: Path) -> SqliteDatabase:
        """Make an empty ledger at ``path``, whole or not at all."""
        from sisa.ledger.migrate import migrate_sqlite

        try:
            with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
                connection.execute("PRAGMA journal_mode=TRUNCATE")
                connection.execute("PRAGMA synchronous=FULL")
                migrate_sqlite(connection)
        except sqlite3.Error as error:
            raise _translated(error, path) from error
        return cls(path)

    @classmethod
    def migrate(cls, path: Path) -> None:
        """Bring an older ledger forward, whole or not at all."""
        from sisa.ledger.migrate import migrate_sqlite

        if not path.exists():
            raise DamagedError(f"the store's ledger ({path.name}) is missing", hint=RESTORE)
        with contextlib.closing(_connected(path)) as connection:
            check_migratable(_revision(connection, path), f"the store's ledger ({path.name})")
            migrate_sqlite(connection)

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()

    def rows(self, statement: str, parameters: Sequence[Any] = ()) -> list[Row]:
        """Run a statement and return its rows."""
        try:
            return self._connection.execute(statement, parameters).fetchall()
        except sqlite3.Error as error:
            raise _translated(error, self.path) from error

    def many(self, statement: str, parameters: Sequence[Sequence[Any]]) -> None:
        """Run a statement once for each set of parameters."""
        try:
            self._connection.executemany(statement, parameters)
        except sqlite3.Error as error:
            raise _translated(error, self.path) from error

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """Write everything in the block, or nothing; nested blocks join the outer one."""
        if self._connection.in_transaction:
            yield
            return
        self.rows("BEGIN IMMEDIATE")
        try:
            yield
            self.rows("COMMIT")
        except BaseException:
            if self._connection.in_transaction:
                with contextlib.suppress(sqlite3.Error):  # what went wrong first is what has to be told
                    self._connection.execute("ROLLBACK")
            raise

    @contextlib.contextmanager
    def snapshot(self) -> Iterator[None]:
        """Read a state in which nothing changes between the statements of the block."""
        if self._connection.in_transaction:
            yield
            return
        self.rows("BEGIN")
        try:
            yield
        finally:
            self._connection.execute("ROLLBACK")

    def hold(self) -> contextlib.AbstractContextManager[None]:
        """Read, and let nobody commit before the block ends: in this engine a reader does that from its first read."""
        return self.snapshot()

    def identity(self) -> tuple[int, int]:
        """Say which file the ledger's path names. It is not opened: closing it would drop SQLite's locks."""
        try:
            found = os.stat(self._name)  # noqa: PTH116 - half the time
        except OSError as error:
            raise StoreError(f"the store's ledger ({self.path.name}) can't be found: {error.strerror}") from error
        return found.st_dev, found.st_ino

    def stale(self) -> bool:
        """Say whether another file has the ledger's name: what is written to the open one is lost."""
        return self.identity() != self.opened_as

    def commits(self) -> int:
        """Return what SQLite counts for us: it changes when another connection commits."""
        row = self.row("PRAGMA data_version")
        return int(row[0]) if row is not None else -1

    def be_patient(self, seconds: float) -> None:
        """Set how long this connection waits for others' commits."""
        self.rows(f"PRAGMA busy_timeout={seconds * 1000:.0f}")

    def shed(self, *tables: str) -> None:
        """Nothing is left to do: ``secure_delete`` has overwritten it."""

    def check(self) -> None:
        """Check the file's own structure."""
        row = self.row("PRAGMA integrity_check")
        if row is None or row[0] != "ok":
            raise DamagedError("ledger: SQLite's integrity check failed", hint="Restore the ledger from a copy.")

    def form(self) -> set[tuple[str, ...]]:
        """Describe every object of the file."""
        return _form(self._connection)

    def expected_form(self) -> set[tuple[str, ...]]:
        """Describe every object of a new ledger."""
        from sisa.ledger.migrate import migrate_sqlite

        with contextlib.closing(sqlite3.connect(":memory:", isolation_level=None)) as fresh:
            migrate_sqlite(fresh)
            return _form(fresh)


def _connected(path: Path) -> sqlite3.Connection:
    try:
        connection = sqlite3.connect(path.as_uri() + "?mode=rw", uri=True, timeout=BUSY_TIMEOUT_S, isolation_level=None)
    except sqlite3.Error as error:
        raise _translated(error, path) from error
    connection.row_factory = sqlite3.Row
    try:
        for pragma in PRAGMAS:
            connection.execute(f"PRAGMA {pragma}")
    except sqlite3.Error as error:
        connection.close()
        raise _translated(error, path) from error
    return connection


def _revision(connection: sqlite3.Connection, path: Path) -> str | None:
    try:
        row = connection.execute(REVISION_OF).fetchone()
    except sqlite3.Error as error:
        if isinstance(error, sqlite3.OperationalError) and "no such table" in str(error):
            return None
        raise _translated(error, path) from error
    return str(row[0]) if row is not None else None


def _form(connection: sqlite3.Connection) -> set[tuple[str, ...]]:
    rows = connection.execute("SELECT type, name, tbl_name, coalesce(sql, '') FROM sqlite_schema")
    return {(kind, name, table, " ".join(statement.split())) for kind, name, table, statement in rows}


def _translated(error: sqlite3.Error, path: Path) -> StoreError:
    if isinstance(error, sqlite3.OperationalError) and "locked" in str(error):
        return BusyError(
            f"the store's ledger ({path.name}) was locked for {BUSY_TIMEOUT_S:.0f} s", hint="Run the command again."
        )
    if getattr(error, "sqlite_errorcode", None) in UNWRITABLE:
        return StoreError(
            f"the store's ledger ({path.name}) can't be written: {error}; nothing was changed",
            hint="Make room or give permission, then run the command again.",
        )
    return DamagedError(
        f"the store's ledger ({path.name}) can't be used: {error}",
        hint=RESTORE,
    )
