"""Checking ensemble versions: one member for each shard, its own stage, and in the live one the newest clean one."""

from __future__ import annotations

from sisa.ledger import Member, StageRow, Version
from sisa.opening import OpenStore
from sisa.proof.chain import Expected, first_waiting_stage


def check_versions(store: OpenStore, expected: Expected) -> list[str]:
    """Return what is wrong with the live version, and with the members of those before it."""
    with store.ledger.database.snapshot():
        live = store.ledger.versions.live()
        if live.number == 0:
            return ["no version was ever published: the training has not ended"]
        stages = {(row.key, row.platform): row for row in store.ledger.stages.all()}
        problems = []
        for number, _, _ in store.ledger.versions.all():
            version = store.ledger.versions.get(number)
            problems += _uneven(store, version)
            for member in version.members:
                row = stages.get((member.key, member.platform))
                faults = _member_faults(member, row, live=number == live.number)
                if not faults and row is not None and number == live.number:
                    faults = _live_faults(store, member, row, expected)
                problems += [f"version {number}: shard {member.shard} {fault}" for fault in faults]
        return problems + _behind(store, live)


def _uneven(store: OpenStore, version: Version) -> list[str]:
    if [member.shard for member in version.members] == list(range(store.shards)):
        return []
    return [f"version {version.number}: it doesn't have exactly one member for each shard"]


def _member_faults(member: Member, row: StageRow | None, *, live: bool) -> list[str]:
    """A stage that was purged since is struck from old versions; what is still named must be what it is called."""
    if member.stage == 0:
        return ["is absent, and yet it names a stage"] if member.key or member.platform else []
    if not live and not member.key:
        return []
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
