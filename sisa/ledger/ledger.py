"""The ledger: one object with a part for each table."""

from __future__ import annotations

import json
import secrets
from pathlib import Path

from sisa.ledger.database import Database
from sisa.ledger.generations import Generations
from sisa.ledger.partitions import Partitions
from sisa.ledger.place import Place
from sisa.ledger.replicas import Replicas
from sisa.ledger.requests import Requests
from sisa.ledger.stages import Stages
from sisa.ledger.tokens import Tokens
from sisa.ledger.versions import Versions
from sisa.state import JSON


class Ledger:
    """What a store remembers, in SQLite or PostgreSQL. Not for sharing between threads."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self.partitions = Partitions(database)
        self.generations = Generations(database)
        self.stages = Stages(database, self.partitions)
        self.versions = Versions(database, self.stages)
        self.requests = Requests(database, self.versions)
        self.replicas = Replicas(database, self.versions)
        self.tokens = Tokens(database)

    @classmethod
    def open(cls, place: Place) -> Ledger:
        """Open the ledger of a store.

        Raises:
            DamagedError: It is missing or not a ledger.
            StoreError: Its server can't be reached, or it has the form of another release.
        """
        if isinstance(place, Path):
            from sisa.ledger.sqlite import SqliteDatabase

            return cls(SqliteDatabase(place))
        from sisa.ledger.postgres import PostgresDatabase

        return cls(PostgresDatabase(place))

    @classmethod
    def create(cls, place: Place, **facts: str) -> Ledger:
        """Make a new ledger that remembers some facts, whole or not at all."""
        facts["identity"] = secrets.token_hex(16)
        if isinstance(place, Path):
            from sisa.ledger.sqlite import SqliteDatabase

            ledger = cls(SqliteDatabase.create(place))
            ledger.remember(**facts)
            return ledger
        from sisa.ledger.postgres import PostgresDatabase

        return cls(PostgresDatabase.create(place, facts))

    @classmethod
    def migrate(cls, place: Place) -> None:
        """Bring the ledger of an older release to this one's form; nothing happens if it has that already.

        Nobody else may use the store meanwhile.
        """
        if isinstance(place, Path):
            from sisa.ledger.sqlite import SqliteDatabase

            SqliteDatabase.migrate(place)
            return
        from sisa.ledger.postgres import PostgresDatabase

        PostgresDatabase.migrate(place)

    def close(self) -> None:
        """Close the connection."""
        self.database.close()

    @property
    def ingested(self) -> bool:
        """Whether the records lie in the store, whole."""
        return self.fact("ingested") == "yes"

    def fact(self, name: str) -> str | None:
        """Return a remembered fact, or None."""
        row = self.database.row("SELECT value FROM facts WHERE name = ?", (name,))
        return str(row["value"]) if row is not None else None

    def remember(self, **facts: str) -> None:
        """Set facts."""
        with self.database.transaction():
            self.database.many(
                "INSERT INTO facts (name, value) VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET value = excluded.value",
                list(facts.items()),
            )

    def footing(self) -> tuple[str, str] | None:
        """Return code version and platform id of the live chains; None before the first training."""
        code, platform = self.fact("code"), self.fact("platform")
        return (code, platform) if code is not None and platform is not None else None

    def stand_on(self, *, code: str, platform: str, fingerprint: dict[str, JSON]) -> None:
        """Set the footing on which every constituent has to be trained."""
        self.remember(code=code, platform=platform, fingerprint=json.dumps(fingerprint, sort_keys=True))

    def fingerprint(self) -> dict[str, JSON]:
        """Return the platform fingerprint of the live chains."""
        text = self.fact("fingerprint")
        return dict(json.loads(text)) if text else {}

    def last_event(self) -> int:
        """Return the number of the newest event: the same number means that nothing happened between."""
        row = self.database.row("SELECT max(number) AS number FROM events")
        return int(row["number"] or 0) if row is not None else 0

    def events(self) -> list[dict[str, object]]:
        """Return the history, oldest first."""
        rows = self.database.rows("SELECT * FROM events ORDER BY number")
        return [{"number": r["number"], "at": r["at"], "kind": r["kind"], **json.loads(r["detail"])} for r in rows]

    def shed(self) -> None:
        """Have the engine let go of what purged stages, dropped parameters and erased rows have left in its files.

        Of the rows that is what their slices held: against such a digest a guess about the deleted could be tested.
        """
        self.database.shed("stages", "members", "fitted", "partitions", "partition_files", "waiting")

    def check(self) -> None:
        """Check what the engine can check of itself.

        Raises:
            DamagedError: It found a fault.
        """
        self.database.check()
