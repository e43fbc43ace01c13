"""Checking ensemble versions: one member for each shard, its own stage, and in the live one the newest clean one."""

from __future__ import annotations

from collections.abc import Collection

from sisa.ledger import Member, StageRow, Version
from sisa.opening import OpenStore
from sisa.proof.chain import Expected, first_waiting_stage

_STRANGE = (
    (
        "SELECT 1 FROM members WHERE version NOT IN (SELECT number FROM versions) LIMIT 1",
        "ledger: members has lines of a version that there is not",
    ),
    (
        "SELECT 1 FROM versions WHERE cause <> 'quarantine' AND request IS NOT NULL LIMIT 1",
        "ledger: a version that is no quarantine names a request",
    ),
)


def check_versions(store: OpenStore, expected: Expected) -> list[str]:
    """Return what is wrong with the live version, and with the members of those before it."""
    with store.ledger.database.snapshot():
        rows = store.ledger.database.rows
        problems = [fault for statement, fault in _STRANGE if rows(statement)]
        live = store.ledger.versions.live()
        if live.number == 0:
            return [*problems, "no version was ever published: the training has not ended"]
        stages = {(row.key, row.platform): row for row in store.ledger.stages.all()}
        purged = {(row["shard"], row["stage"]) for row in rows("SELECT shard, stage FROM past_stages")}
        for number, _, _ in store.ledger.versions.all():
            version = store.ledger.versions.get(number)
            problems += _uneven(store, version)
            for member in version.members:
                row = stages.get((member.key, member.platform))
                faults = _member_faults(member, row, live=number == live.number, purged=purged)
                if not faults and row is not None and number == live.number:
                    faults = _live_faults(store, member, row, expected)
                problems += [f"version {number}: shard {member.shard} {fault}" for fault in faults]
        return problems + _behind(store, live)


def _uneven(store: OpenStore, version: Version) -> list[str]:
    if [member.shard for member in version.members] == list(range(store.shards)):
        return []
    return [f"version {version.number}: it doesn't have exactly one member for each shard"]


def _member_faults(
    member: Member, row: StageRow | None, *, live: bool, purged: Collection[tuple[int, int]]
) -> list[str]:
    """A stage that was purged since is struck from old versions; what is still named must be what it is called."""
    if member.stage == 0:
        return ["is absent, and yet it names a stage"] if member.key or member.platform else []
    if not live and not (member.key or member.platform):
        return [] if (member.shard, member.stage) in purged else ["was served from a stage that there never was"]
    if row is None or (live and row.tainted):
        return ["is served from a stage that is gone or tainted"]
    if (row.shard, row.stage) != (member.shard, member.stage):
        return [f"is served from a stage that is not its own stage {member.stage}"]
    return []


def _live_faults(store: OpenStore, member: Member, row: StageRow, expected: Expected) -> list[str]:
    faults = []
    called_for = expected.get((member.shard, member.stage))
    if called_for is not None and member.key != called_for.key:
        faults.append("is served from a stage that the rows on disk don't call for")
    if store.ledger.footing() != (row.code, row.platform):
        faults.append("is served from a stage of another code or platform")
    if row.records == 0:
        faults.append("votes without having seen a record")
    return faults


def _behind(store: OpenStore, live: Version) -> list[str]:
    """Each shard is served from its newest stage; where a repair is due, at least from the newest before it."""
    footing = store.ledger.footing()
    serving = {member.shard: member.stage for member in live.members}
    problems = []
    for shard in range(store.shards):
        first = first_waiting_stage(store, shard)
        usable = [
            row.stage
            for row in store.ledger.stages.all(shard)
            if not row.tainted and row.records and (row.code, row.platform) == footing and row.stage < first
        ]
        newest = max(usable, default=0)
        if serving.get(shard, 0) < newest:
            problems.append(
                f"version {live.number}: shard {shard} is served from stage {serving.get(shard, 0)}, not {newest}"
            )
    return problems
