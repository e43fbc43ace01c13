"""One SQLite file, opened so that no commit is lost and no deleted value stays in it.

``journal_mode=TRUNCATE`` and ``synchronous=FULL`` make a returned commit durable; ``secure_delete``
overwrites what is deleted. All writing happens in ``BEGIN IMMEDIATE`` transactions, so that what a
transaction reads can't change before it writes.
"""

from __future__ import annotations

import contextlib
import json
import sqlite3
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sisa.errors import BusyError, DamagedError, StoreError

SCHEMA_VERSION = 1
BUSY_TIMEOUT_S = 60.0
UNWRITABLE = frozenset({sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR_WRITE, sqlite3.SQLITE_READONLY})
"""SQLite's codes for a disk or a permission that stands in the way: the ledger itself is whole."""
RESTORE = "Restore the ledger from a copy that was made while no command ran."

SCHEMA = """
CREATE TABLE facts (name TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT;
CREATE TABLE partitions (
    shard INTEGER NOT NULL, slice INTEGER NOT NULL, records INTEGER NOT NULL, subjects INTEGER NOT NULL,
    membership TEXT NOT NULL, next_records INTEGER, next_subjects INTEGER, next_membership TEXT, changes INTEGER NOT NULL DEFAULT 0, dirty INTEGER NOT NULL DEFAULT 0,
    PRIMARY KEY (shard, slice)) STRICT;
CREATE TABLE generations (number INTEGER PRIMARY KEY, created_at TEXT NOT NULL, records INTEGER NOT NULL) STRICT;
CREATE TABLE requests (
    number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, kind TEXT NOT NULL DEFAULT 'deletion',
    created_at TEXT NOT NULL, updated_at TEXT NOT NULL, state TEXT NOT NULL, reason TEXT NOT NULL, subjects INTEGER NOT NULL, records INTEGER NOT NULL,
    version_before INTEGER NOT NULL, version_quarantine INTEGER, version_after INTEGER,
    stages_retrained INTEGER NOT NULL DEFAULT 0, seconds_to_quarantine REAL NOT NULL DEFAULT 0,
    note TEXT NOT NULL DEFAULT '', regime TEXT NOT NULL DEFAULT '') STRICT;
CREATE TABLE request_partitions (
    request TEXT NOT NULL, shard INTEGER NOT NULL, slice INTEGER NOT NULL, PRIMARY KEY (request, shard, slice)) STRICT;
CREATE TABLE exclusions (
    kind TEXT NOT NULL, digest BLOB NOT NULL, request TEXT NOT NULL, PRIMARY KEY (kind, digest)) STRICT;
CREATE TABLE stages (
    key TEXT NOT NULL, platform TEXT NOT NULL, code TEXT NOT NULL, shard INTEGER NOT NULL, stage INTEGER NOT NULL,
    parent_key TEXT NOT NULL, records INTEGER NOT NULL, state_digest TEXT NOT NULL, full_digest TEXT NOT NULL,
    worker TEXT NOT NULL, seconds REAL NOT NULL, created_at TEXT NOT NULL, tainted INTEGER NOT NULL DEFAULT 0,
    PRIMARY KEY (key, platform)) STRICT;
CREATE INDEX stages_by_place ON stages (shard, stage);
CREATE TABLE past_stages (
    shard INTEGER NOT NULL, stage INTEGER NOT NULL, created_at TEXT NOT NULL, purged_at TEXT NOT NULL) STRICT;
CREATE TABLE versions (
    number INTEGER PRIMARY KEY, created_at TEXT NOT NULL, cause TEXT NOT NULL, request TEXT) STRICT;
CREATE TABLE members (
    version INTEGER NOT NULL, shard INTEGER NOT NULL, stage INTEGER NOT NULL, key TEXT, platform TEXT,
    PRIMARY KEY (version, shard)) STRICT;
CREATE INDEX members_by_key ON members (key);
CREATE TABLE replicas (
    id TEXT PRIMARY KEY, version INTEGER NOT NULL, lease_s REAL NOT NULL, since TEXT NOT NULL) STRICT;
CREATE TABLE events (
    number INTEGER PRIMARY KEY AUTOINCREMENT, at TEXT NOT NULL, kind TEXT NOT NULL, detail TEXT NOT NULL) STRICT;
CREATE TABLE measurements (
    version INTEGER PRIMARY KEY, accuracy REAL NOT NULL, log_loss REAL NOT NULL, records INTEGER NOT NULL) STRICT;
CREATE TABLE fitted (members TEXT PRIMARY KEY, content TEXT NOT NULL) STRICT;
CREATE TABLE submissions (key BLOB PRIMARY KEY, body BLOB NOT NULL, at TEXT NOT NULL) STRICT;
CREATE TABLE tokens (
    id TEXT PRIMARY KEY, digest BLOB NOT NULL, scopes TEXT NOT NULL, name TEXT NOT NULL, created_at TEXT NOT NULL,
    last_used_on TEXT) STRICT;
"""


class Database:
    """A connection to the ledger's file; open it per process and per thread."""

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.exists():
            raise DamagedError(f"the store's ledger ({path.name}) is missing", hint=RESTORE)
        try:
            self._connection = sqlite3.connect(
                path.as_uri() + "?mode=rw", uri=True, timeout=BUSY_TIMEOUT_S, isolation_level=None
            )
            self._connection.row_factory = sqlite3.Row
            for pragma in ("journal_mode=TRUNCATE", "synchronous=FULL", "secure_delete=ON", "temp_store=MEMORY"):
                self._connection.execute(f"PRAGMA {pragma}")
            version = self._connection.execute("PRAGMA user_version").fetchone()[0]
        except sqlite3.Error as error:
            raise _translated(error, path) from error
        if version != SCHEMA_VERSION:
            self._connection.close()
            raise DamagedError(
                f"the store's ledger ({path.name}): expected schema version {SCHEMA_VERSION}, found {version}",
                hint="Use the release that made the store; or, if its ledger was replaced, restore it from a copy.",
            )

    @classmethod
    def create(cls, path: Path) -> Database:
        """Make an empty ledger at ``path``, whole or not at all."""
        try:
            with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
                connection.execute("PRAGMA journal_mode=TRUNCATE")
                connection.execute("PRAGMA synchronous=FULL")
                connection.executescript(f"BEGIN;{SCHEMA}PRAGMA user_version={SCHEMA_VERSION};COMMIT;")
        except sqlite3.Error as error:
            raise _translated(error, path) from error
        return cls(path)

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()

    def rows(self, statement: str, parameters: Sequence[Any] = ()) -> list[sqlite3.Row]:
        """Run a statement and return its rows."""
        try:
            return self._connection.execute(statement, parameters).fetchall()
        except sqlite3.Error as error:
            raise _translated(error, self.path) from error

    def row(self, statement: str, parameters: Sequence[Any] = ()) -> sqlite3.Row | None:
        """Run a statement and return its first row, or None."""
        found = self.rows(statement, parameters)
        return found[0] if found else None

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

    def newest_request(self) -> int:
        """Return the number of the newest request; 0 before the first."""
        row = self.row("SELECT coalesce(max(number), 0) AS number FROM requests")
        return int(row["number"]) if row is not None else 0

    def note(self, kind: str, **detail: object) -> None:
        """Write one line of history: numbers, states and places, never an id or a digest of a record."""
        self.rows(
            "INSERT INTO events (at, kind, detail) VALUES (?, ?, ?)", (now(), kind, json.dumps(detail, sort_keys=True))
        )


def now() -> str:
    """Return the wall clock as text, for people; nothing is decided by it."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


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
