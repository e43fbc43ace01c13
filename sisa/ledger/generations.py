"""The generations that were added after the first ingest: each is a new last slice of every shard.

A generation is whole in the ledger or not there: what its slices hold, its line and its event are one transaction.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sisa.errors import StaleError
from sisa.ledger.database import Database, now
from sisa.ledger.partitions import Partition, insert_partitions


@dataclass(frozen=True)
class Generation:
    """One generation. Its trained rows are slice R+g of each shard, its held-out ones slice -g."""

    number: int
    """1, 2, ...; 0 would be the first ingest."""
    created_at: str
    records: int
    """Rows that it brought, held-out ones included."""


class Generations:
    """The table of generations."""

    def __init__(self, database: Database) -> None:
        self._db = database

    def count(self) -> int:
        """Return how many there are."""
        row = self._db.row("SELECT coalesce(max(number), 0) AS number FROM generations")
        return int(row["number"]) if row is not None else 0

    def all(self) -> list[Generation]:
        """Return them in order."""
        rows = self._db.rows("SELECT * FROM generations ORDER BY number")
        return [Generation(row["number"], row["created_at"], row["records"]) for row in rows]

    def publish(
        self, number: int, partitions: Sequence[Partition], *, newest_request: int, check: Callable[[], None]
    ) -> bool:
        """Make a generation part of the store, at once and whole.

        Args:
            number: The next one.
            partitions: What its slices hold, empty ones included.
            newest_request: Number of the newest request whose exclusions these rows were held against.
            check: Makes sure, when others have to wait for their turn to write, that the rows are still there.

        Returns:
            False if a request was accepted since, so that the rows may be somebody's who is deleted by now: then
            nothing was changed.

        Raises:
            StaleError: Another one became the next meanwhile.
        """
        with self._db.transaction():
            check()
            if self._db.newest_request() != newest_request:
                return False
            if self.count() != number - 1:
                raise StaleError("another generation was added meanwhile", hint="Run the command again.")
            records = sum(partition.records for partition in partitions)
            self._db.rows("INSERT INTO generations VALUES (?, ?, ?)", (number, now(), records))
            insert_partitions(self._db, partitions)
            self._db.note("generation_added", generation=number, records=records)
            return True
