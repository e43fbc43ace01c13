"""Checking the ledger against itself: its form, the footing, and that each line belongs to a place and a request.

What lies on disk is held against it elsewhere: rows, stages and versions.
"""

from __future__ import annotations

import json

from sisa.layout import is_held_out
from sisa.ledger import STATES
from sisa.opening import OpenStore
from sisa.proof.problems import slice_name, stage_name
from sisa.training.platform import platform_id

FACTS = frozenset({"recipe", "routing_key", "exclusion_key", "identity", "ingested", "code", "platform", "fingerprint"})
"""Everything that a ledger remembers by name."""
_UNANSWERED = """
SELECT shard, slice FROM partitions WHERE dirty = 1 AND NOT EXISTS (
    SELECT 1 FROM request_partitions AS place JOIN requests ON requests.id = place.request
    WHERE requests.state = 'accepted' AND place.shard = partitions.shard AND place.slice = partitions.slice)
"""
_PREPARED = """
SELECT shard, slice FROM partitions
WHERE dirty = 0 AND (next_records IS NOT NULL OR next_subjects IS NOT NULL OR next_membership IS NOT NULL
    OR EXISTS (
        SELECT 1 FROM partition_files AS file
        WHERE file.shard = partitions.shard AND file.slice = partitions.slice
        AND (file.next_records IS NOT NULL OR file.next_membership IS NOT NULL)))
"""
_MISCOUNTED = """
SELECT shard, slice FROM partitions WHERE changes <> (
    SELECT count(*) FROM request_partitions AS place
    WHERE place.shard = partitions.shard AND place.slice = partitions.slice)
"""


def check_ledger(store: OpenStore) -> list[str]:
    """Return what is wrong with the ledger by itself.

    Raises:
        DamagedError: The engine found a fault.
    """
    store.ledger.check()
    problems = _other_form(store) + _other_facts(store) + _other_footing(store)
    if not store.ledger.ingested:
        return [*problems, "the ledger says that the ingest has not ended"]
    with store.ledger.database.snapshot():
        return problems + _strange_places(store) + _unfounded_erasures(store) + _unfinished_requests(store)


def _other_form(store: OpenStore) -> list[str]:
    """A table, a trigger or a view that no ledger has may hold anything, and do anything."""
    database = store.ledger.database
    names = sorted({each[1] for each in database.expected_form() ^ database.form()})
    return [f"ledger: {name} is not what a ledger of this version has" for name in names]


def _other_facts(store: OpenStore) -> list[str]:
    """A fact that nobody asks for may say anything."""
    names = {row["name"] for row in store.ledger.database.rows("SELECT name FROM facts")}
    known = FACTS | {"claim"} if store.layout.remote else FACTS
    return ["ledger: facts has a line that no ledger has"] if names - known else []


def _other_footing(store: OpenStore) -> list[str]:
    """The platform's name is a digest of its fingerprint, which the ledger keeps beside it."""
    text, platform = store.ledger.fact("fingerprint"), store.ledger.fact("platform")
    try:
        told = platform_id(json.loads(text)) if text is not None else None
    except (ValueError, RecursionError):
        told = ""
    if told != platform or (platform is None) != (store.ledger.fact("code") is None):
        return ["ledger: the fingerprint of the platform is not the one that the platform is named after"]
    return []


def _strange_places(store: OpenStore) -> list[str]:
    """Lines about shards, slices and requests that there are not, and slices that no line is about."""
    rows = store.ledger.database.rows
    places = {(shard, slice_) for shard in range(store.shards) for slice_ in store.all_slices}
    told = {(partition.shard, partition.slice) for partition in store.ledger.partitions.all()}
    asked = {(row["shard"], row["slice"]) for row in rows("SELECT shard, slice FROM request_partitions")}
    stages = {(row.shard, row.stage) for row in store.ledger.stages.all()}
    trained = {(shard, slice_) for shard, slice_ in places if not is_held_out(slice_)}
    problems = [f"ledger: {slice_name(*place)}: no line says what it holds" for place in sorted(places - told)]
    problems += [f"ledger: {slice_name(*place)}: there is no such slice" for place in sorted((told | asked) - places)]
    problems += [f"ledger: {stage_name(*place)}: there is no such stage" for place in sorted(stages - trained)]
    files = {(row["shard"], row["slice"]) for row in rows("SELECT DISTINCT shard, slice FROM partition_files")}
    problems += [f"ledger: {slice_name(*place)}: files of no slice" for place in sorted(files - told)]
    for table in ("request_partitions", "exclusions", "marks"):
        if rows(f"SELECT 1 FROM {table} WHERE request NOT IN (SELECT id FROM requests) LIMIT 1"):  # noqa: S608 - names are ours
            problems.append(f"ledger: {table} has lines of a request that there is not")
    return problems


def _unfounded_erasures(store: OpenStore) -> list[str]:
    """What the ledger says of erasures in progress must follow from requests."""
    problems = []
    for statement, fault in (
        (_UNANSWERED, "marked as holding rows of deleted people, which no request asks to erase"),
        (_PREPARED, "an erasure is prepared that nobody asked for"),
        (_MISCOUNTED, "the number of its deletions is not that of the requests for it"),
    ):
        places = [(row["shard"], row["slice"]) for row in store.ledger.database.rows(statement)]
        problems += [f"ledger: {slice_name(*place)}: {fault}" for place in sorted(places)]
    return problems


def _unfinished_requests(store: OpenStore) -> list[str]:
    purged = STATES[STATES.index("stages_purged") :]
    return [
        f"request {r.id}: state {r.state}: rows or weights of deleted people may still be there; `sisa repair` goes on"
        for r in store.ledger.requests.open()
        if r.state not in purged
    ]
