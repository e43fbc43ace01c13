"""Which stages exist. A tainted stage has seen a deleted record: never served, never built on, soon purged."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sisa.errors import DamagedError
from sisa.ledger.database import Database, Row, now
from sisa.ledger.partitions import Partitions


@dataclass(frozen=True)
class StageRow:
    """One trained stage of one constituent."""

    key: str
    platform: str
    code: str
    shard: int
    stage: int
    parent_key: str
    records: int
    state_digest: str
    full_digest: str
    worker: str
    seconds: float
    created_at: str
    tainted: bool = False


class Stages:
    """The table of stages."""

    def __init__(self, database: Database, partitions: Partitions) -> None:
        self._db = database
        self._partitions = partitions

    def enter(self, row: StageRow, *, changes: Mapping[int, int]) -> bool:
        """Enter a stage that was trained or found; say whether it may be used.

        Args:
            row: The stage.
            changes: The ``changes`` of slices 1..stage that its training was planned with.

        Returns:
            False if a deletion touched one of its slices meanwhile: then nothing was entered.

        Raises:
            DamagedError: The same key gave other bits before.
        """
        return self.enter_all([(row, changes)])[0]

    def enter_all(self, found: Sequence[tuple[StageRow, Mapping[int, int]]]) -> list[bool]:
        """Enter stages that arrived together, each as :meth:`enter` does, in one transaction: one wait for the disk.

        Args:
            found: Each stage with the ``changes`` that its training was planned with.

        Returns:
            For each of them whether it may be used.

        Raises:
            DamagedError: A key gave other bits before; the others were entered.
        """
        with self._db.transaction():
            answers = [self._enter(row, changes) for row, changes in found]
        for answer in answers:
            if isinstance(answer, DamagedError):
                raise answer
        return [answer is True for answer in answers]

    def _enter(self, row: StageRow, changes: Mapping[int, int]) -> bool | DamagedError:
        """Enter one stage and say whether it may be used; or what is wrong, and then nothing was written."""
        if self.overtaken(row.shard, row.stage, changes=changes):
            return False
        known = self.get(row.key, row.platform)
        if known is not None and known.full_digest != row.full_digest:
            return DamagedError(
                f"stage {row.stage} of shard {row.shard} was trained again and gave other bits",
                hint="Training is not reproducible on this platform: check the model for randomness of its own.",
            )
        if known is not None:
            return not known.tainted
        self._db.rows(
            "INSERT INTO stages VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, 0)",
            (
                row.key, row.platform, row.code, row.shard, row.stage, row.parent_key, row.records,
                row.state_digest, row.full_digest, row.worker, row.seconds, row.created_at,
            ),
        )  # fmt: skip
        self._db.note("stage_trained", shard=row.shard, stage=row.stage, worker=row.worker)
        return True

    def overtaken(self, shard: int, stage: int, *, changes: Mapping[int, int]) -> bool:
        """Say whether a deletion touched slices 1..stage since ``changes`` was read."""
        now_there = {p.slice: p.changes for p in self._partitions.all(shard)}
        return any(now_there.get(s, 0) != changes.get(s, 0) for s in range(1, stage + 1))

    def get(self, key: str, platform: str) -> StageRow | None:
        """Return one stage, or None."""
        row = self._db.row("SELECT * FROM stages WHERE key = ? AND platform = ?", (key, platform))
        return _stage(row) if row is not None else None

    def all(self, shard: int | None = None) -> list[StageRow]:
        """Return all stages, tainted ones included, in order of shard and stage."""
        where, parameters = ("WHERE shard = ?", (shard,)) if shard is not None else ("", ())
        return [
            _stage(r)
            for r in self._db.rows(f"SELECT * FROM stages {where} ORDER BY shard, stage, code, platform", parameters)  # noqa: S608 - no value in it
        ]

    def tainted(self, shard: int | None = None) -> list[StageRow]:
        """Return the stages that have to be purged."""
        return [row for row in self.all(shard) if row.tainted]

    def trained_since(self, request: str, shards: Sequence[int]) -> int:
        """Count the stages of ``shards`` that were trained after a request was accepted."""
        accepted = self._db.row(
            "SELECT max(number) FROM events WHERE kind = 'request_accepted' AND detail LIKE ?",
            (f"%{json.dumps({'request': request})[1:-1]}%",),
        )
        since = accepted[0] if accepted is not None else None
        if since is None:
            return 0
        rows = self._db.rows("SELECT detail FROM events WHERE number > ? AND kind = 'stage_trained'", (since,))
        return sum(json.loads(row["detail"]).get("shard") in shards for row in rows)

    def retire_others(self, *, code: str, platform: str) -> None:
        """Mark for purging every stage that was made on another footing."""
        with self._db.transaction():
            self._db.rows("UPDATE stages SET tainted = 1 WHERE code <> ? OR platform <> ?", (code, platform))
            if self.tainted():
                self._db.rows("DELETE FROM fitted")

    def forget(self, row: StageRow) -> None:
        """Strike a purged stage: history keeps its place and times, neither key nor digests."""
        with self._db.transaction():
            self._db.rows("DELETE FROM stages WHERE key = ? AND platform = ?", (row.key, row.platform))
            self._db.rows(
                "UPDATE members SET key = NULL, platform = NULL WHERE key = ? AND platform = ?", (row.key, row.platform)
            )
            self._db.rows("INSERT INTO past_stages VALUES (?, ?, ?, ?)", (row.shard, row.stage, row.created_at, now()))
            self._db.note("stage_purged", shard=row.shard, stage=row.stage)


def _stage(row: Row) -> StageRow:
    values = {name: row[name] for name in row.keys()}  # noqa: SIM118 - a Row iterates over values
    values["tainted"] = bool(values["tainted"])
    return StageRow(**values)
