"""What rows each slice should hold: how many, and the digest of which.

``changes`` counts the deletions accepted for a slice. A stage may be entered into the ledger only if no
slice that it saw has changed since its training was planned. A ``dirty`` slice still holds rows of
deleted people on disk.

A slice of several files has a line for each of them too. While such a slice is erased, each file holds what was expected
of it or what was prepared: so its lines tell what a killed erasure left, file by file.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from sisa.errors import StaleError
from sisa.ledger.database import Database, Row


@dataclass(frozen=True)
class PartitionFile:
    """One of a slice's several files, as the ledger knows it."""

    records: int
    membership: str
    next_records: int | None = None
    next_membership: str | None = None

    @property
    def memberships(self) -> set[str | None]:
        """What it may hold: what is expected, and what was prepared."""
        return {self.membership, self.next_membership}


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
    files: tuple[PartitionFile, ...] = ()
    """In order of their numbers; none if the slice has a single one."""


def insert_partitions(database: Database, partitions: Sequence[Partition]) -> None:
    """Set what new slices hold; to be called in a transaction."""
    database.many(
        "INSERT INTO partitions (shard, slice, records, subjects, membership) VALUES (?, ?, ?, ?, ?)",
        [(p.shard, p.slice, p.records, p.subjects, p.membership) for p in partitions],
    )
    database.many(
        "INSERT INTO partition_files (shard, slice, number, records, membership) VALUES (?, ?, ?, ?, ?)",
        [
            (p.shard, p.slice, number, file.records, file.membership)
            for p in partitions
            for number, file in enumerate(p.files)
        ],
    )


class Partitions:
    """The table of partitions."""

    def __init__(self, database: Database) -> None:
        self._db = database

    def replace_all(self, partitions: Sequence[Partition]) -> None:
        """Set what was ingested, once, and close the ingest."""
        with self._db.transaction():
            self._db.rows("DELETE FROM partitions")
            self._db.rows("DELETE FROM partition_files")
            insert_partitions(self._db, partitions)
            self._db.rows(
                "INSERT INTO facts (name, value) VALUES ('ingested', 'yes')"
                " ON CONFLICT (name) DO UPDATE SET value = excluded.value"
            )
            self._db.note("ingested", records=sum(p.records for p in partitions))

    def all(self, shard: int | None = None) -> list[Partition]:
        """Return the partitions, of one shard or of all, in order."""
        where, parameters = ("WHERE shard = ?", (shard,)) if shard is not None else ("", ())
        with self._db.snapshot():
            rows = self._db.rows(f"SELECT * FROM partitions {where} ORDER BY shard, slice", parameters)  # noqa: S608 - no value in it
            files = self._files(where, parameters)
        return [_partition(row, files[row["shard"], row["slice"]]) for row in rows]

    def get(self, shard: int, slice_: int) -> Partition:
        """Return one partition."""
        where, parameters = "WHERE shard = ? AND slice = ?", (shard, slice_)
        with self._db.snapshot():
            row = self._db.row(f"SELECT * FROM partitions {where}", parameters)  # noqa: S608 - no value in it
            files = self._files(where, parameters)
        return _partition(row, files[shard, slice_]) if row is not None else Partition(shard, slice_, 0, 0, "")

    def _files(self, where: str, parameters: Sequence[int]) -> Mapping[tuple[int, int], list[PartitionFile]]:
        found: defaultdict[tuple[int, int], list[PartitionFile]] = defaultdict(list)
        statement = f"SELECT * FROM partition_files {where} ORDER BY shard, slice, number"  # noqa: S608 - no value in it
        for row in self._db.rows(statement, parameters):
            file = PartitionFile(row["records"], row["membership"], row["next_records"], row["next_membership"])
            found[row["shard"], row["slice"]].append(file)
        return found

    def prepare_erasure(
        self,
        shard: int,
        slice_: int,
        *,
        records: int,
        subjects: int,
        membership: str,
        files: Mapping[int, tuple[int, str]] | None = None,
        check: Callable[[], None],
    ) -> None:
        """Write down what the slice will hold, before a file of it is replaced.

        Args:
            shard: 0..S-1.
            slice_: Which slice.
            records: How many rows it will have.
            subjects: How many owners.
            membership: Digest of them.
            files: The same of those of several files that will be replaced, by number.
            check: Makes sure, when others have to wait for their turn to write, that the rows' lock is still held.
        """
        with self._db.transaction():
            check()
            self._db.rows(
                "UPDATE partition_files SET next_records = NULL, next_membership = NULL"
                " WHERE shard = ? AND slice = ? AND next_membership IS NOT NULL",
                (shard, slice_),
            )
            self._db.many(
                "UPDATE partition_files SET next_records = ?, next_membership = ? WHERE shard = ? AND slice = ? AND number = ?",
                [(rows, digest, shard, slice_, number) for number, (rows, digest) in (files or {}).items()],
            )
            self._db.rows(
                "UPDATE partitions SET next_records = ?, next_subjects = ?, next_membership = ? WHERE shard = ? AND slice = ?",
                (records, subjects, membership, shard, slice_),
            )

    def finish_erasure(
        self, shard: int, slice_: int, *, changes: int, membership: str, check: Callable[[], None]
    ) -> bool:
        """Make the prepared content the expected one; say whether the slice is clean now.

        It is not if another deletion was accepted for it after ``changes`` was read.

        Raises:
            StaleError: Something else than ``membership`` is prepared.
        """
        with self._db.transaction():
            self.adopt_prepared(shard, slice_, membership=membership, check=check)
            self._db.rows(
                "UPDATE partitions SET dirty = CASE WHEN changes = ? THEN 0 ELSE 1 END WHERE shard = ? AND slice = ?",
                (changes, shard, slice_),
            )
            if self.get(shard, slice_).dirty:
                return False
            self._db.rows("DELETE FROM waiting WHERE shard = ? AND slice = ?", (shard, slice_))  # it is merged
            return True

    def adopt_prepared(self, shard: int, slice_: int, *, membership: str, check: Callable[[], None]) -> None:
        """Make the prepared content the expected one, since the file holds it; the slice stays dirty.

        Raises:
            StaleError: Something else than ``membership`` is prepared: somebody was late, or is by now.
        """
        with self._db.transaction():
            check()
            adopted = self._db.rows(
                "UPDATE partitions SET records = next_records, subjects = next_subjects, membership = next_membership,"
                " next_records = NULL, next_subjects = NULL, next_membership = NULL"
                " WHERE shard = ? AND slice = ? AND next_membership = ? RETURNING slice",
                (shard, slice_, membership),
            )
            if not adopted:
                raise StaleError(
                    f"shard {shard}, slice {slice_}: something else was prepared meanwhile",
                    hint="Run the command again.",
                )
            self._db.rows(f"{_ADOPT} WHERE shard = ? AND slice = ? AND next_membership IS NOT NULL", (shard, slice_))

    def adopt_files(self, shard: int, slice_: int, numbers: Collection[int], *, check: Callable[[], None]) -> None:
        """Make the prepared content of some files the expected one, since they hold it; the slice stays as it is."""
        with self._db.transaction():
            check()
            self._db.many(
                f"{_ADOPT} WHERE shard = ? AND slice = ? AND number = ? AND next_membership IS NOT NULL",
                [(shard, slice_, number) for number in numbers],
            )


_ADOPT = (
    "UPDATE partition_files SET records = next_records, membership = next_membership,"
    " next_records = NULL, next_membership = NULL"
)


def _partition(row: Row, files: Sequence[PartitionFile]) -> Partition:
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
        files=tuple(files),
    )
