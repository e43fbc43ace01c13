"""What rows each slice should hold: how many, and the digest of which.

``changes`` counts the deletions accepted for a slice. A stage may be entered into the ledger only if no
slice that it saw has changed since its training was planned. A ``dirty`` slice still holds rows of
deleted people on disk.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sisa.ledger.database import Database, Row


@dataclass(frozen=True)
class Partition:
    """One slice of one shard, as the ledger knows it; slice 0 holds the shard's part of the holdout."""

    shard: int
    slice: int
    records: int
    subjects: int
    membership: str
    next_membership: str | None = None
    next_records: int | None = None
    changes: int = 0
    dirty: bool = False


class Partitions:
    """The table of partitions."""

    def __init__(self, database: Database) -> None:
        self._db = database

    def replace_all(self, partitions: Sequence[Partition]) -> None:
        """Set what was ingested, once, and close the ingest."""
        with self._db.transaction():
            self._db.rows("DELETE FROM partitions")
            self._db.many(
                "INSERT INTO partitions (shard, slice, records, subjects, membership) VALUES (?, ?, ?, ?, ?)",
                [(p.shard, p.slice, p.records, p.subjects, p.membership) for p in partitions],
            )
            self._db.rows(
                "INSERT INTO facts (name, value) VALUES ('ingested', 'yes')"
                " ON CONFLICT (name) DO UPDATE SET value = excluded.value"
            )
            self._db.note("ingested", records=sum(p.records for p in partitions))

    def all(self, shard: int | None = None) -> list[Partition]:
        """Return the partitions, of one shard or of all, in order."""
        where, parameters = ("WHERE shard = ?", (shard,)) if shard is not None else ("", ())
        return [
            _partition(r)
            for r in self._db.rows(f"SELECT * FROM partitions {where} ORDER BY shard, slice", parameters)  # noqa: S608 - no value in it
        ]

    def get(self, shard: int, slice_: int) -> Partition:
        """Return one partition."""
        row = self._db.row("SELECT * FROM partitions WHERE shard = ? AND slice = ?", (shard, slice_))
        return _partition(row) if row is not None else Partition(shard, slice_, 0, 0, "")

    def prepare_erasure(self, shard: int, slice_: int, *, records: int, subjects: int, membership: str) -> None:
        """Write down what the slice will hold, before its file is replaced."""
        with self._db.transaction():
            self._db.rows(
                "UPDATE partitions SET next_records = ?, next_subjects = ?, next_membership = ? WHERE shard = ? AND slice = ?",
                (records, subjects, membership, shard, slice_),
            )

    def finish_erasure(self, shard: int, slice_: int, *, changes: int) -> bool:
        """Make the prepared content the expected one; say whether the slice is clean now.

        It is not if another deletion was accepted for it after ``changes`` was read.
        """
        with self._db.transaction():
            self.adopt_prepared(shard, slice_)
            self._db.rows(
                "UPDATE partitions SET dirty = CASE WHEN changes = ? THEN 0 ELSE 1 END WHERE shard = ? AND slice = ?",
                (changes, shard, slice_),
            )
            if self.get(shard, slice_).dirty:
                return False
            self._db.rows("DELETE FROM waiting WHERE shard = ? AND slice = ?", (shard, slice_))  # it is merged
            return True

    def adopt_prepared(self, shard: int, slice_: int) -> None:
        """Make the prepared content the expected one, since the file holds it; the slice stays dirty."""
        with self._db.transaction():
            self._db.rows(
                "UPDATE partitions SET records = next_records, subjects = next_subjects, membership = next_membership,"
                " next_records = NULL, next_subjects = NULL, next_membership = NULL WHERE shard = ? AND slice = ?",
                (shard, slice_),
            )


def _partition(row: Row) -> Partition:
    return Partition(
        shard=row["shard"],
        slice=row["slice"],
        records=row["records"],
        subjects=row["subjects"],
        membership=row["membership"],
        next_membership=row["next_membership"],
        next_records=row["next_records"],
        changes=row["changes"],
        dirty=bool(row["dirty"]),
    )
