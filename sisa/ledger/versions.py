"""Ensemble versions: numbered, immutable maps from shard to stage, or to absent (stage 0).

The highest number is live. A constituent that has seen no record at all doesn't vote: it is absent.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sisa.ledger.database import Database, now
from sisa.ledger.stages import StageRow, Stages


@dataclass(frozen=True)
class Member:
    """The stage that answers for one shard; ``stage`` 0 means that the shard is absent from the vote."""

    shard: int
    stage: int
    key: str
    platform: str


@dataclass(frozen=True)
class Version:
    """One ensemble version. Number 0 stands for nothing published yet."""

    number: int
    cause: str
    created_at: str
    members: tuple[Member, ...]


class Versions:
    """The table of versions."""

    def __init__(self, database: Database, stages: Stages) -> None:
        self._db = database
        self._stages = stages

    def live_number(self) -> int:
        """Return the number of the live version; 0 if none was published."""
        row = self._db.row("SELECT max(number) AS number FROM versions")
        return int(row["number"] or 0) if row is not None else 0

    def live(self) -> Version:
        """Return the live version."""
        with self._db.snapshot():
            return self.get(self.live_number())

    def get(self, number: int) -> Version:
        """Return one version with its members (keys of purged stages are empty)."""
        row = self._db.row("SELECT * FROM versions WHERE number = ?", (number,))
        if row is None:
            return Version(0, "none", "", ())
        members = self._db.rows("SELECT * FROM members WHERE version = ? ORDER BY shard", (number,))
        return Version(
            number,
            row["cause"],
            row["created_at"],
            tuple(Member(m["shard"], m["stage"], m["key"] or "", m["platform"] or "") for m in members),
        )

    def all(self) -> list[tuple[int, str, str]]:
        """Return number, time and cause of every version."""
        return [
            (r["number"], r["created_at"], r["cause"]) for r in self._db.rows("SELECT * FROM versions ORDER BY number")
        ]

    def newest(self, most: int) -> list[dict[str, Any]]:
        """Return the newest versions, oldest first, with their voters and what was measured."""
        rows = self._db.rows(
            "SELECT v.number, v.created_at, v.cause, v.request, m.accuracy,"
            " (SELECT count(*) FROM members WHERE version = v.number AND stage > 0) AS voters"
            " FROM versions v LEFT JOIN measurements m ON m.version = v.number ORDER BY v.number DESC LIMIT ?",
            (most,),
        )
        return [{name: row[name] for name in row.keys()} for row in reversed(rows)]  # noqa: SIM118 - a Row iterates over values

    def measured(self, number: int, *, accuracy: float, log_loss: float, records: int) -> None:
        """Write down how well a version answers on the holdout."""
        with self._db.transaction():
            self._db.rows(
                "INSERT INTO measurements (version, accuracy, log_loss, records) VALUES (?, ?, ?, ?) ON CONFLICT (version)"
                " DO UPDATE SET accuracy = excluded.accuracy, log_loss = excluded.log_loss, records = excluded.records",
                (number, accuracy, log_loss, records),
            )

    def is_measured(self, number: int) -> bool:
        """Say whether it was written down how well a version answers."""
        return self._db.row("SELECT 1 FROM measurements WHERE version = ?", (number,)) is not None

    def publish_fit(self, version: Version, names: Sequence[str], content: str) -> int:
        """Keep the parameters of an aggregation and publish the version that uses them; return the live number.

        Nothing is kept if another version became live meanwhile, or if they are the ones that are used already.
        """
        with self._db.transaction():
            key = json.dumps(list(names))
            if self.live_number() != version.number or self.fit_of(names) == content:
                return self.live_number()
            self._db.rows("DELETE FROM fitted")
            self._db.rows("INSERT INTO fitted VALUES (?, ?)", (key, content))
            return self.publish(version.members, cause="fit")

    def fit_of(self, names: Sequence[str]) -> str | None:
        """Return the parameters that were fitted for exactly these constituents."""
        row = self._db.row("SELECT content FROM fitted WHERE members = ?", (json.dumps(list(names)),))
        return str(row["content"]) if row is not None else None

    def last_quarantine(self) -> int:
        """Return the number of the latest quarantine version: answers of older ones are void."""
        row = self._db.row("SELECT max(number) AS number FROM versions WHERE cause = 'quarantine'")
        return int(row["number"] or 0) if row is not None else 0

    def publish(self, members: Sequence[Member], *, cause: str, request: str | None = None) -> int:
        """Make a new live version and return its number."""
        with self._db.transaction():
            number = self.live_number() + 1
            self._db.rows("INSERT INTO versions VALUES (?, ?, ?, ?)", (number, now(), cause, request))
            self._db.many(
                "INSERT INTO members VALUES (?, ?, ?, ?, ?)",
                [(number, m.shard, m.stage, m.key or None, m.platform or None) for m in members],
            )
            self._db.note("version_published", version=number, cause=cause)
            return number

    def publish_newest(self, *, cause: str, shards: int, code: str, platform: str) -> int:
        """Publish for each shard its newest clean stage on this footing; the same members are no new version."""
        with self._db.transaction():
            best: dict[int, Member] = {shard: Member(shard, 0, "", "") for shard in range(shards)}
            for row in self._stages.all():
                usable = not row.tainted and row.records > 0 and (row.code, row.platform) == (code, platform)
                if usable and row.shard in best and row.stage > best[row.shard].stage:
                    best[row.shard] = Member(row.shard, row.stage, row.key, row.platform)
            members = tuple(best.values())
            live = self.live()
            return live.number if live.members == members else self.publish(members, cause=cause)

    def publish_fallback(self, tainted_from: Mapping[int, int], *, request: str) -> int:
        """Publish the quarantine: each shard of ``tainted_from`` falls back below the stage given there.

        Any other member whose stage is tainted leaves the vote: it was never its own shard's.
        """
        with self._db.transaction():
            self._db.rows("DELETE FROM fitted")  # their parameters descend from what is tainted now
            members = []
            for member in self.live().members:
                row = self._stages.get(member.key, member.platform)
                first = tainted_from.get(member.shard)
                affected = first is not None and member.stage >= first
                if affected or (row is not None and row.tainted):
                    member = self._below(member, row, first or 0)  # noqa: PLW2901 - the member that takes its place
                members.append(member)
            return self.publish(members, cause="quarantine", request=request)

    def _below(self, member: Member, row: StageRow | None, first: int) -> Member:
        """Walk up the chain to the newest stage before ``first``: those have never seen the record.

        A link that leads anywhere but to the stage before, in the same shard, ends the walk: the shard is absent.
        Acceptance is not refused for damage, and must not serve what another shard has seen.
        """
        place = (member.shard, member.stage)
        while row is not None and (row.shard, row.stage) == place and row.stage >= first:
            place = (row.shard, row.stage - 1)
            row = self._stages.get(row.parent_key, row.platform)
        if row is None or (row.shard, row.stage) != place or row.tainted or row.records == 0:
            return Member(member.shard, 0, "", "")
        return Member(member.shard, row.stage, row.key, row.platform)
