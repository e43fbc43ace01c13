"""The ledger in a schema of a PostgreSQL database, which many hosts write to at once.

Why it is serializable. Each writing transaction runs at READ COMMITTED, and the first thing that it does is to take its
turn: it updates one row, the counter ``turns``. Who comes second waits for the row's lock, which the first holds until
it has ended; only then does the second's next statement take its snapshot, so that it sees everything that was
committed before and nothing changes under it. Writing transactions therefore have the order of their turns, and each
reads what the ones before it have left. (At REPEATABLE READ the snapshot would be taken before the wait, and be old.)
Readers that need one moment run at REPEATABLE READ, READ ONLY: since commits come one after the other, what they see is
the state after some turn.

The same row makes three other things true. Every transaction writes, so a COMMIT that returns has been made durable
together with all before it: even one that found its request there already. A read-only standby refuses before anything
is decided. And nobody can deadlock, since this lock comes first.

A connection that is lost while COMMIT is on its way leaves open whether it took effect. That is an error that says so;
every step can be repeated, and a deletion that is asked for again is answered with the same request. The same is said
if the server gave up waiting for a synchronous standby, which it tells by a warning and not by an error.
"""

from __future__ import annotations

import contextlib
import re
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

from sisa.errors import BusyError, DamagedError, LostError, SisaError, StoreError
from sisa.ledger.database import Database, Row
from sisa.ledger.place import PostgresPlace
from sisa.ledger.schema import REVISION_OF, check_migratable, check_revision
from sisa.ledger.session import Session, identifier

WRITING = "BEGIN ISOLATION LEVEL READ COMMITTED; UPDATE counters SET last = last + 1 WHERE name = 'turns'"
RETRY_S = 0.2
_CARRIED = re.compile(r"(\d+) dead row versions cannot be removed yet")
READING = "BEGIN ISOLATION LEVEL REPEATABLE READ, READ ONLY"
_IDENTITY = """
SELECT (SELECT oid FROM pg_namespace WHERE nspname = ?) AS schema, (SELECT value FROM facts WHERE name = 'identity')
"""
_FORM = """
SELECT 'relation', c.relname, c.relkind::text || ' ' || c.relpersistence::text, '' FROM pg_class c WHERE c.relnamespace = ?::regnamespace
UNION ALL SELECT 'column', c.relname || '.' || a.attname,
  format_type(a.atttypid, a.atttypmod) || ' ' || a.attnotnull::text || ' ' || a.attnum::text || ' ' || a.attcollation::regcollation::text,
  coalesce(pg_get_expr(d.adbin, d.adrelid), '')
  FROM pg_attribute a JOIN pg_class c ON c.oid = a.attrelid LEFT JOIN pg_attrdef d ON (d.adrelid, d.adnum) = (a.attrelid, a.attnum)
  WHERE c.relnamespace = ?::regnamespace AND a.attnum > 0 AND c.relkind IN ('r', 'v', 'm', 'p', 'f')
UNION ALL SELECT 'index', c.relname, pg_get_indexdef(c.oid), '' FROM pg_class c WHERE c.relnamespace = ?::regnamespace AND c.relkind = 'i'
UNION ALL SELECT 'constraint', conname, pg_get_constraintdef(oid), conrelid::regclass::text FROM pg_constraint WHERE connamespace = ?::regnamespace
UNION ALL SELECT 'trigger', t.tgname, pg_get_triggerdef(t.oid), '' FROM pg_trigger t JOIN pg_class c ON c.oid = t.tgrelid WHERE c.relnamespace = ?::regnamespace
UNION ALL SELECT 'rule', r.rulename, pg_get_ruledef(r.oid), '' FROM pg_rewrite r JOIN pg_class c ON c.oid = r.ev_class WHERE c.relnamespace = ?::regnamespace
UNION ALL SELECT 'policy', p.polname, '', '' FROM pg_policy p JOIN pg_class c ON c.oid = p.polrelid WHERE c.relnamespace = ?::regnamespace
UNION ALL SELECT 'function', p.proname, '', '' FROM pg_proc p WHERE p.pronamespace = ?::regnamespace
"""


class PostgresDatabase(Database):
    """A connection to the schema of one ledger."""

    remote: ClassVar[bool] = True

    def __init__(self, place: PostgresPlace) -> None:
        """Connect and look.

        Raises:
            StoreError: The server can't be reached, or the ledger has another form.
            DamagedError: The schema is missing.
        """
        self.place = place
        self._session = Session(place)
        self._writing = False
        try:
            self._system = str(self.rows("SELECT system_identifier FROM pg_control_system()")[0][0])
            check_revision(_revision(self._session), f"the ledger at {place.shown}")
            self.opened_as = self.identity()
        except BaseException:
            self.close()
            raise

    @classmethod
    def create(cls, place: PostgresPlace, facts: Mapping[str, str]) -> PostgresDatabase:
        """Make a ledger with some facts in it, in one transaction; what a killed attempt left is replaced.

        Raises:
            DamagedError: A ledger of that name holds an ingest that has ended.
        """
        from sisa.ledger.migrate import migrate_postgres

        session = Session(place)
        with contextlib.closing(session):
            if _is_ingested(session):
                raise DamagedError(
                    f"the ledger at {place.shown} has the schema {place.schema} of a store whose recipe.yaml is missing",
                    hint="Restore recipe.yaml from a copy: making the ledger anew would forget who was deleted.",
                )
            name = identifier(place.schema)
            session.run("BEGIN")
            session.run(f"DROP SCHEMA IF EXISTS {name} CASCADE")
            session.run(f"CREATE SCHEMA {name}")
            session.guarded(lambda: migrate_postgres(session.connection))
            session.many("INSERT INTO facts (name, value) VALUES (?, ?)", list(facts.items()))
            _commit(session)
        return cls(place)

    @classmethod
    def migrate(cls, place: PostgresPlace) -> None:
        """Bring an older ledger forward, in one transaction."""
        from sisa.ledger.migrate import migrate_postgres

        with contextlib.closing(Session(place)) as session:
            _take_turn(session)
            check_migratable(_revision(session), f"the ledger at {place.shown}")
            session.guarded(lambda: migrate_postgres(session.connection))
            _commit(session)

    def close(self) -> None:
        """Close the connection."""
        self._session.close()

    def rows(self, statement: str, parameters: Sequence[Any] = ()) -> list[Row]:
        """Run a statement and return its rows."""
        return list(self._session.run(statement, parameters))

    def many(self, statement: str, parameters: Sequence[Sequence[Any]]) -> None:
        """Run a statement once for each set of parameters."""
        self._session.many(statement, parameters)

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """Write everything in the block, or nothing; nested blocks join the outer one.

        Raises:
            BusyError: Others had their turns for too long.
            StoreError: It may or may not have taken effect, or it certainly hasn't; the message says which.
        """
        if self._session.in_transaction:
            if not self._writing:
                raise RuntimeError("a snapshot can't be written in")
            yield
            return
        try:
            _take_turn(self._session)
            self._writing = True
            yield
            _commit(self._session)
        except BaseException:
            self._roll_back()
            raise
        finally:
            self._writing = False

    @contextlib.contextmanager
    def snapshot(self) -> Iterator[None]:
        """Read a state in which nothing changes between the statements of the block."""
        if self._session.in_transaction:
            yield
            return
        self._session.run(READING)
        try:
            yield
        finally:
            self._roll_back()

    def _roll_back(self) -> None:
        if not self._session.broken and self._session.in_transaction:
            with contextlib.suppress(SisaError):  # what went wrong first is what has to be told
                self._session.run("ROLLBACK")

    def hold(self) -> contextlib.AbstractContextManager[None]:
        """Read, and let nobody commit before the block ends: here only a writer can do that."""
        return self.transaction()

    def identity(self) -> tuple[str, int, str]:
        """Say which ledger this is: of which cluster, which schema, and a random fact that was made with it.

        Every statement is about what the schema's name means at that moment; a restored dump has another number.
        """
        found = self.rows(_IDENTITY, (self.place.schema,))[0]
        return self._system, int(found[0] or 0), str(found[1])

    def stale(self) -> bool:
        """Say whether the connection is gone. While it lives, names can't mean another server's tables."""
        return self._session.broken

    def commits(self) -> int:
        """Return how many had their turn to write."""
        row = self.row("SELECT last FROM counters WHERE name = 'turns'")
        return int(row[0]) if row is not None else -1

    def be_patient(self, seconds: float) -> None:
        """Set how long this connection waits for others, and for an answer."""
        self._session.be_patient(seconds)

    def shed(self, *tables: str) -> None:
        """Write tables anew without their dead rows; the old files are removed.

        The write-ahead log, standbys and backups keep what they have: see the guarantee.

        Raises:
            BusyError: Somebody still sees what was deleted: the server carries it along until their transaction ends.
        """
        deadline_s = time.monotonic() + self._session.patience_s
        for table in tables:
            while self._written_anew(table):
                if time.monotonic() > deadline_s:
                    raise BusyError(
                        f"the ledger at {self.place.shown} keeps what was deleted from {table}: an older transaction "
                        "in this database still sees it",
                        hint="End it (a dump, an idle session: see pg_stat_activity), then run `sisa repair`.",
                    )
                time.sleep(RETRY_S)

    def _written_anew(self, table: str) -> int:
        """Write a table anew; return how many rows that were deleted had to be carried along."""
        with self._session.unhurried():
            self._session.told.clear()
            self._session.run(f"VACUUM (FULL, VERBOSE) {identifier(table)}")
        return sum(int(number) for text in self._session.told for number in _CARRIED.findall(text))

    def check(self) -> None:
        """Nothing to ask: a server checks pages as they are read (if it was made with checksums), and all are read."""

    def form(self) -> set[tuple[str, ...]]:
        """Describe every object of the schema."""
        return self._form(self.place.schema)

    def expected_form(self) -> set[tuple[str, ...]]:
        """Describe every object of a new ledger: one is made in a transaction that is rolled back."""
        from sisa.ledger.migrate import migrate_postgres

        schema = f"sisa_form_{secrets.token_hex(8)}"
        with contextlib.closing(Session(PostgresPlace(self.place.url, schema))) as session:
            session.run("BEGIN")
            session.run(f"CREATE SCHEMA {identifier(schema)}")
            session.guarded(lambda: migrate_postgres(session.connection))
            return _form_of(session, schema)

    def _form(self, schema: str) -> set[tuple[str, ...]]:
        return _form_of(self._session, schema)


def _form_of(session: Session, schema: str) -> set[tuple[str, ...]]:
    rows = session.run(_FORM, [identifier(schema)] * _FORM.count("?"))
    return {tuple(str(value).replace(f"{schema}.", "") for value in row) for row in rows}


def _revision(session: Session) -> str | None:
    rows = session.run(REVISION_OF)
    return str(rows[0][0]) if rows else None


def _is_ingested(session: Session) -> bool:
    if session.run("SELECT to_regclass(?)", (f"{identifier(session.place.schema)}.facts",))[0][0] is None:
        return False
    return bool(session.run("SELECT 1 FROM facts WHERE (name, value) = ('ingested', 'yes')"))


def _take_turn(session: Session) -> None:
    """Begin to write: wait until nobody else does."""

    def begin() -> int:
        cursor = session.connection.execute(WRITING, prepare=False)
        cursor.nextset()
        return cursor.rowcount

    if session.guarded(begin) != 1:
        raise DamagedError(
            f"the ledger at {session.place.shown} has lost the row that writers queue at",
            hint="Restore the database from a backup of it; `sisa verify` lists what is wrong.",
        )


def _commit(session: Session) -> None:
    """Commit, durably.

    Raises:
        StoreError: Nobody knows whether it took effect, or whether it is durable.
    """
    session.warnings.clear()
    try:
        done = session.guarded(lambda: session.connection.execute("COMMIT").statusmessage)
    except LostError as error:
        raise LostError(
            f"the ledger at {session.place.shown}: the connection was lost while a change was committed; "
            "nobody knows whether it took effect",
            hint="Run the command again: a deletion that was accepted is answered with the same request.",
        ) from error
    if done != "COMMIT":  # the server rolls back what failed before, and says so in the same breath
        raise StoreError(f"the ledger at {session.place.shown} rolled a change back", hint="Run the command again.")
    if session.warnings:
        raise StoreError(
            f"the ledger at {session.place.shown} committed a change without its synchronous standby: "
            f"{session.warnings[0]}",
            hint="Bring the standby back, then run the command again: it waits until the change is on both.",
        )
