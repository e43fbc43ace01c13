"""The ledger: one object with a part for each table."""

from __future__ import annotations

import json
from pathlib import Path

from sisa.errors import DamagedError
from sisa.ledger.database import Database
from sisa.ledger.generations import Generations
from sisa.ledger.partitions import Partitions
from sisa.ledger.replicas import Replicas
from sisa.ledger.requests import Requests
from sisa.ledger.stages import Stages
from sisa.ledger.tokens import Tokens
from sisa.ledger.versions import Versions
from sisa.state import JSON


class Ledger:
    """What a store remembers, in SQLite. Not for sharing between threads."""

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
    def open(cls, path: Path) -> Ledger:
        """Open the ledger of a store.

        Raises:
            DamagedError: It is missing or not a ledger.
        """
        return cls(Database(path))

    @classmethod
    def create(cls, path: Path) -> Ledger:
        """Make a new, empty ledger."""
        return cls(Database.create(path))

    def close(self) -> None:
        """Close the file."""
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
            self.database.many("INSERT OR REPLACE INTO facts VALUES (?, ?)", list(facts.items()))

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

    def check(self) -> None:
        """Check the file's own structure.

        Raises:
            DamagedError: SQLite found a fault.
        """
        row = self.database.row("PRAGMA integrity_check")
        if row is None or row[0] != "ok":
            raise DamagedError("ledger: SQLite's integrity check failed", hint="Restore the ledger from a copy.")
