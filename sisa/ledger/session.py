"""One session with a PostgreSQL server: set up so that a commit is durable and nothing waits for ever.

What is set for each session, whatever the server's defaults: commits wait until they are on disk (and on the
synchronous standbys, if the server has some); statements, waits for others and pauses within a transaction have an
end; keepalives on both sides notice a host that is gone. The client has a deadline of its own for each statement, for
a server that is frozen while its machine answers.

What would void it: a pooler between us and the server that hands sessions around per transaction; a server that runs
with ``fsync`` off, which is refused.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from typing import Any, TypeVar

import psycopg
from psycopg import errors, sql
from psycopg.pq import TransactionStatus

from sisa.errors import StoreError
from sisa.ledger.database import BUSY_TIMEOUT_S
from sisa.ledger.faults import PRIMARY, failure, unreachable
from sisa.ledger.place import PostgresPlace

CONNECT_TIMEOUT_S = 10
IDLE_S, INTERVAL_S, PROBES = 10, 5, 3
"""Keepalives: a peer that is gone is noticed after some 25 seconds."""
GRACE_S = 10.0
"""How much longer the client waits for an answer than the server is allowed to take."""
OLDEST_SERVER = 140000
MANY = 10_000
"""Sets of values that are sent at once."""
SETTINGS = {
    "synchronous_commit": "on",
    "lock_timeout": f"{BUSY_TIMEOUT_S:.0f}s",
    "statement_timeout": f"{BUSY_TIMEOUT_S:.0f}s",
    "idle_in_transaction_session_timeout": f"{BUSY_TIMEOUT_S:.0f}s",
    "idle_session_timeout": "0",
    "default_transaction_isolation": "read committed",
    "client_connection_check_interval": f"{INTERVAL_S}s",
    "tcp_keepalives_idle": str(IDLE_S),
    "tcp_keepalives_interval": str(INTERVAL_S),
    "tcp_keepalives_count": str(PROBES),
    "tcp_user_timeout": f"{IDLE_S + INTERVAL_S * PROBES}s",
    "client_min_messages": "warning",
    "standard_conforming_strings": "on",
    "bytea_output": "hex",
    "row_security": "off",
}
_Result = TypeVar("_Result")


class Row:
    """One row of an answer, as ``sqlite3.Row`` is: by position, by name, or all values in order."""

    __slots__ = ("_names", "_values")

    def __init__(self, names: dict[str, int], values: tuple[Any, ...]) -> None:
        self._names = names
        self._values = values

    def __getitem__(self, key: Any, /) -> Any:
        return self._values[key if isinstance(key, int) else self._names[key]]

    def __iter__(self) -> Iterator[Any]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def keys(self) -> list[str]:
        """Return the columns' names."""
        return list(self._names)


def _row_maker(cursor: Any) -> Callable[[Sequence[Any]], Row]:
    names = {column.name: position for position, column in enumerate(cursor.description or ())}
    return lambda values: Row(names, tuple(values))


class _Connection(psycopg.Connection[Row]):
    """A connection that gives up on a server that doesn't answer."""

    deadline_s: float | None = BUSY_TIMEOUT_S + GRACE_S

    def wait(self, gen: Any, interval: float = 0.1, timeout: float | None = None) -> Any:
        try:
            return super().wait(gen, interval, self.deadline_s if timeout is None else timeout)
        except errors._WaitTimeout:
            self.pgconn.finish()  # the answer may still come, to a question that isn't asked any more
            raise


class Session:
    """A connection whose failures are errors of ours."""

    def __init__(self, place: PostgresPlace) -> None:
        """Connect.

        Raises:
            StoreError: The server can't be reached, doesn't let us in, or isn't fit to hold a ledger.
        """
        self.place = place
        self.warnings: list[str] = []
        """What the server warned of."""
        self.told: list[str] = []
        """The details of what it told beside its answers."""
        self.patience_s = BUSY_TIMEOUT_S
        try:
            self.connection = _connect(place)
        except psycopg.Error as error:
            raise unreachable(place, error) from error
        try:
            self.connection.add_notice_handler(self._take_notice)
            self._set_up()
        except BaseException:
            self.close()
            raise

    def _take_notice(self, told: psycopg.errors.Diagnostic) -> None:
        if told.severity_nonlocalized == "WARNING":
            self.warnings.append(told.message_primary or "")
        self.told.append(told.message_detail or "")

    def _set_up(self) -> None:
        info = self.connection.info
        if info.server_version < OLDEST_SERVER:
            raise StoreError(
                f"the ledger's server at {self.place.shown} is PostgreSQL {info.server_version // 10000}, expected 14 or newer",
                hint="Use a newer server.",
            )
        settings = [("search_path", f'"{self.place.schema}"' if self.place.schema else ""), *SETTINGS.items()]
        self.run("SELECT " + ", ".join(["set_config(?, ?, false)"] * len(settings)), [x for s in settings for x in s])
        found = self.run(
            "SELECT current_setting('fsync') = 'on' AND current_setting('full_page_writes') = 'on' AS durable,"
            " current_setting('server_encoding') AS encoding, pg_is_in_recovery() AS behind"
        )[0]
        if found["behind"]:
            raise StoreError(
                f"the ledger's server at {self.place.shown} is a standby: it may not know of the latest deletions",
                hint=PRIMARY,
            )
        if not found["durable"]:
            raise StoreError(
                f"the ledger's server at {self.place.shown} runs with fsync or full_page_writes off: "
                "what it calls committed may be lost",
                hint="Switch both on, or use another server.",
            )
        if found["encoding"] != "UTF8":
            raise StoreError(
                f"the ledger's database at {self.place.shown} is encoded in {found['encoding']}, expected UTF8",
                hint="Make a database with ENCODING 'UTF8'.",
            )

    def run(self, statement: str, parameters: Any = ()) -> list[Row]:
        """Run a statement, with ``?`` for values, and return its rows.

        Raises:
            StoreError: It failed.
        """
        return self.guarded(lambda: self._run(statement, parameters))

    def _run(self, statement: str, parameters: Any) -> list[Row]:
        cursor = self.connection.execute(translated(statement), parameters, prepare=None if parameters else False)
        return cursor.fetchall() if cursor.description is not None else []

    def many(self, statement: str, parameters: Sequence[Any]) -> None:
        """Run a statement once for each set of parameters.

        Raises:
            StoreError: One failed.
        """
        for first in range(0, len(parameters), MANY):  # each answer has its own deadline
            self.guarded(partial(self._many, statement, parameters[first : first + MANY]))

    def _many(self, statement: str, parameters: Sequence[Any]) -> None:
        with self.connection.cursor() as cursor:
            cursor.executemany(translated(statement), parameters)

    def guarded(self, work: Callable[[], _Result]) -> _Result:
        """Do something with the connection, and raise what goes wrong as an error of ours.

        Raises:
            StoreError: It went wrong.
        """
        try:
            return work()
        except psycopg.Error as error:
            raise failure(self.place, error, broken=self.broken) from error

    @property
    def broken(self) -> bool:
        """Whether the connection is known to be gone; asks nobody."""
        return self.connection.closed or self.connection.info.transaction_status == TransactionStatus.UNKNOWN

    @property
    def in_transaction(self) -> bool:
        """Whether a transaction was begun and not ended; one whose connection is gone has ended."""
        return not self.broken and self.connection.info.transaction_status != TransactionStatus.IDLE

    def be_patient(self, seconds: float) -> None:
        """Set how long statements and waits for others may take."""
        milliseconds = f"{seconds * 1000:.0f}ms"
        self.run(
            "SELECT set_config('lock_timeout', ?, false), set_config('statement_timeout', ?, false)",
            (milliseconds, milliseconds),
        )
        self.connection.deadline_s = seconds + GRACE_S
        self.patience_s = seconds

    @contextlib.contextmanager
    def unhurried(self) -> Iterator[None]:
        """Let a statement take its time; waiting for others has an end all the same."""
        self.run("SET statement_timeout = 0")
        self.connection.deadline_s = None
        try:
            yield
        finally:
            if not self.broken:
                self.be_patient(self.patience_s)

    def __del__(self) -> None:
        # A thread that ends drops its store without a word.
        if hasattr(self, "connection"):
            self.connection.close()

    def close(self) -> None:
        """Close the connection; the server rolls back what is open and lets go of what is locked."""
        self.connection.close()


def _connect(place: PostgresPlace) -> _Connection:
    connection = _Connection.connect(
        place.url,
        autocommit=True,
        row_factory=_row_maker,
        connect_timeout=CONNECT_TIMEOUT_S,
        keepalives=1,
        keepalives_idle=IDLE_S,
        keepalives_interval=INTERVAL_S,
        keepalives_count=PROBES,
        tcp_user_timeout=(IDLE_S + INTERVAL_S * PROBES) * 1000,
        application_name=f"sisa {socket.gethostname()}:{os.getpid()}",
        client_encoding="utf8",
        options="",
    )
    assert isinstance(connection, _Connection)
    return connection


@lru_cache(maxsize=512)
def translated(statement: str) -> bytes:
    """Write a statement's placeholders as the driver wants them.

    >>> translated("SELECT 7 % 2 WHERE x = ?")
    b'SELECT 7 %% 2 WHERE x = %s'
    """
    return statement.replace("%", "%%").replace("?", "%s").encode()


def identifier(name: str) -> str:
    """Quote a name for use in a statement."""
    return sql.Identifier(name).as_string()
