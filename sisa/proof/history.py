"""Checking the history against the tables that it tells of: what is done is noted in the same transaction.

What requests and exclusions say is held against it in ``sisa.proof.requests``. Nothing here is signed: who rewrites
history and tables alike is not found out.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from functools import partial

from sisa.ledger import Request
from sisa.ledger.database import COUNTERS
from sisa.opening import OpenStore
from sisa.proof.problems import guarded, slice_name, stage_name
from sisa.proof.requests import Noted, exclusion_faults, request_faults, unseen_targets

_QUARANTINES = "SELECT number, request FROM versions WHERE cause = 'quarantine'"
_COUNTED = ("requests", "events")
"""Tables of which the ledger remembers the last number that it gave."""


def check_history(store: OpenStore, *, survivors: int | None, lacking: Mapping[tuple[int, int], int]) -> list[str]:
    """Return what history and tables say differently.

    Args:
        store: The store.
        survivors: How many rows that nobody asked to delete lie in the store; None if some are unreadable.
        lacking: Of each slice that has fewer rows than the ledger expects, how many are missing.
    """
    with store.ledger.database.snapshot():
        faults = guarded(partial(_gaps, store), "numbers")
        try:
            events = _events(store)
        except (ValueError, TypeError, RecursionError):
            return [*(f"history was edited: {fault}" for fault in faults), "history was edited: an event is unreadable"]
        requests = store.ledger.requests.all()
        for check, what in (
            (partial(_ingest_faults, store, events, survivors), "ingests"),
            (partial(request_faults, events, requests), "requests"),
            (partial(_version_faults, store, events, requests), "versions"),
            (partial(_stage_faults, store, events), "stages"),
            (partial(exclusion_faults, store, events), "exclusions"),
        ):
            faults += guarded(check, what)
        lost = guarded(partial(_lost_rows, store, events, requests, survivors, lacking), "rows")
    return [*(f"history was edited: {fault}" for fault in faults), *lost]


def _events(store: OpenStore) -> list[Noted]:
    rows = store.ledger.database.rows("SELECT kind, detail FROM events ORDER BY number")
    return [Noted(row["kind"], dict(json.loads(row["detail"]))) for row in rows]


def _gaps(store: OpenStore) -> list[str]:
    """Numbers are given from 1 on without gaps, and the ledger remembers the last one that it gave."""
    rows = store.ledger.database.rows
    given = [(row["name"], row["last"]) for row in rows("SELECT name, last FROM counters")]
    faults = []
    for table in (*_COUNTED, "versions", "generations"):
        found = rows(f"SELECT count(*), coalesce(min(number), 1), coalesce(max(number), 0) FROM {table}")[0]  # noqa: S608 - names are ours
        count, first, last = found
        remembered = [number for name, number in given if name == table]
        if (first, last) != (1, count) or (table in _COUNTED and remembered != [count]):
            faults.append(f"{table} are missing")
    if {name for name, _ in given} != set(COUNTERS):
        faults.append("numbers are remembered of a table that gives none, or not of one that does")
    return faults


def _ingest_faults(store: OpenStore, events: list[Noted], survivors: int | None) -> list[str]:
    ingests = [event.detail.get("records") for event in events if event.kind == "ingested"]
    if len(ingests) != int(store.ledger.ingested):
        return [f"{len(ingests)} ingests are noted, expected {int(store.ledger.ingested)}"]
    added = [(e.detail.get("generation"), e.detail.get("records")) for e in events if e.kind == "generation_added"]
    if added != [(generation.number, generation.records) for generation in store.ledger.generations.all()]:
        return ["the generations are not those whose addition is noted"]
    if survivors is None or not ingests:
        return []
    ingested, remembered = _ingested(store, events), _remembered(store)
    if ingested is not None and ingested >= survivors + remembered:
        return []  # rows that are missing were lost: that is said without accusing anybody
    came = ingests[0] if ingested is None else ingested
    return [f"{came} records were ingested, but {survivors} are there and {remembered} are remembered as deleted"]


def _lost_rows(
    store: OpenStore,
    events: list[Noted],
    requests: list[Request],
    survivors: int | None,
    lacking: Mapping[tuple[int, int], int],
) -> list[str]:
    """Rows that came, are not there and are not remembered as deleted: a lost file explains it as well as an edit."""
    ingested, remembered = _ingested(store, events), _remembered(store)
    if survivors is None or ingested is None or ingested <= survivors + remembered:
        return []
    # Whose slice could not be read was deleted unseen: then fewer records are remembered than were erased.
    if unseen_targets(store, events, requests):
        return []
    missing = ingested - survivors - remembered
    places = ", ".join(f"{count} of {slice_name(*place)}" for place, count in sorted(lacking.items()))
    elsewhere = "" if sum(lacking.values()) == missing else "; the ledger doesn't say of which slice the others are"
    where = f": {places}{elsewhere}" if places else "; the ledger doesn't say of which slice"
    counted = f"{ingested} records were ingested, {survivors} are there, {remembered} are remembered as deleted"
    return [f"{missing} rows are missing{where} ({counted})"]


def _ingested(store: OpenStore, events: list[Noted]) -> int | None:
    """Return how many records ever came; None if the history has no number of it."""
    noted = [event.detail.get("records") for event in events if event.kind == "ingested"]
    if len(noted) != 1 or not isinstance(noted[0], int):
        return None
    return noted[0] + sum(generation.records for generation in store.ledger.generations.all())


def _remembered(store: OpenStore) -> int:
    return sum(kind == "record" for kind, _ in store.ledger.requests.exclusions())


def _version_faults(store: OpenStore, events: list[Noted], requests: list[Request]) -> list[str]:
    noted = [(e.detail.get("version"), e.detail.get("cause")) for e in events if e.kind == "version_published"]
    faults = []
    if noted != [(number, cause) for number, _, cause in store.ledger.versions.all()]:
        faults.append("the versions are not those whose publication is noted")
    quarantines = {(row["request"], row["number"]) for row in store.ledger.database.rows(_QUARANTINES)}
    wanted = {(r.id, r.version_quarantine) for r in requests if r.version_quarantine is not None}
    due = {r.id for r in requests if r.shards and r.version_before}  # before the first version nothing is in service
    if quarantines != wanted or {identifier for identifier, _ in wanted} != due:
        faults.append("the quarantine versions are not those of the requests")
    return faults


def _stage_faults(store: OpenStore, events: list[Noted]) -> list[str]:
    """A stage that was trained is there, or it was purged."""
    rows = store.ledger.database.rows("SELECT shard, stage FROM past_stages")
    past = Counter((row["shard"], row["stage"]) for row in rows)
    there = Counter((row.shard, row.stage) for row in store.ledger.stages.all())
    trained, purged = (
        Counter((e.detail.get("shard"), e.detail.get("stage")) for e in events if e.kind == kind)
        for kind in ("stage_trained", "stage_purged")
    )
    return [
        f"{stage_name(*place)} was not trained or purged as often as is noted"
        for place in sorted(there | past | trained | purged, key=repr)
        if trained[place] != there[place] + past[place] or purged[place] != past[place]
    ]
