"""Checking the history against the tables that it tells of: what is done is noted in the same transaction.

Nothing here is signed: who rewrites history and tables alike is not found out.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from typing import Any

from sisa.ledger import STATES, Request
from sisa.opening import OpenStore
from sisa.proof.problems import stage_name

_QUARANTINES = "SELECT number, request FROM versions WHERE cause = 'quarantine'"
_NUMBERED = ("events", "requests", "versions")
_BY_REQUEST = "SELECT request, count(*) AS total, sum(kind = 'record') AS records FROM exclusions GROUP BY request"


@dataclass(frozen=True)
class _Event:
    kind: str
    detail: dict[str, Any]


def check_history(store: OpenStore, *, survivors: int | None) -> list[str]:
    """Return what history and tables say differently.

    Args:
        store: The store.
        survivors: How many rows that nobody asked to delete lie in the store; None if some are unreadable.
    """
    with store.ledger.database.snapshot():
        faults = _gaps(store)
        try:
            events = _events(store)
        except (ValueError, TypeError):
            return [*(f"history was edited: {fault}" for fault in faults), "history was edited: an event is unreadable"]
        requests = store.ledger.requests.all()
        faults += _ingest_faults(store, events, requests, survivors)
        faults += _request_faults(events, requests)
        faults += _version_faults(store, events, requests)
        faults += _stage_faults(store, events)
        faults += _exclusion_faults(store, requests)
    return [f"history was edited: {fault}" for fault in faults]


def _events(store: OpenStore) -> list[_Event]:
    rows = store.ledger.database.rows("SELECT kind, detail FROM events ORDER BY number")
    return [_Event(row["kind"], dict(json.loads(row["detail"]))) for row in rows]


def _gaps(store: OpenStore) -> list[str]:
    """Numbers are given without gaps, and SQLite remembers the last one that it gave."""
    faults = []
    rows = store.ledger.database.rows
    given = {row["name"]: row["seq"] for row in rows("SELECT name, seq FROM sqlite_sequence")}
    for table in _NUMBERED:
        numbers = [row["number"] for row in rows(f"SELECT number FROM {table} ORDER BY number")]  # noqa: S608 - names are ours
        last = given.get(table, 0) if table != "versions" else len(numbers)
        if numbers != list(range(1, last + 1)):
            faults.append(f"{table} are missing")
    return faults


def _ingest_faults(store: OpenStore, events: list[_Event], requests: list[Request], survivors: int | None) -> list[str]:
    ingests = [event.detail.get("records") for event in events if event.kind == "ingested"]
    if len(ingests) != int(store.ledger.ingested):
        return [f"{len(ingests)} ingests are noted, expected {int(store.ledger.ingested)}"]
    if survivors is None or not ingests:
        return []
    remembered = sum(kind == "record" for kind, _ in store.ledger.requests.exclusions())
    known = survivors + remembered
    # Somebody whose slice could not be read was deleted unseen: then fewer records are remembered than were erased.
    if ingests[0] == known or (requests and isinstance(ingests[0], int) and ingests[0] > known):
        return []
    return [f"{ingests[0]} records were ingested, but {survivors} are there and {remembered} are remembered as deleted"]


def _request_faults(events: list[_Event], requests: list[Request]) -> list[str]:
    accepted = [event.detail for event in events if event.kind == "request_accepted"]
    if Counter(str(detail.get("request")) for detail in accepted) != Counter(request.id for request in requests):
        return ["the requests are not those whose acceptance is noted"]
    shards = {detail["request"]: detail.get("shards") for detail in accepted}
    states = {request.id: STATES[0] for request in requests}
    states |= {str(e.detail.get("request")): str(e.detail.get("state")) for e in events if e.kind == "request_state"}
    faults = []
    for request in requests:
        if shards[request.id] != request.shards:
            faults.append(f"request {request.id} was accepted for other shards than the ledger says")
        if states[request.id] != request.state:
            faults.append(f"request {request.id} is not in the state that was noted last")
    return faults


def _version_faults(store: OpenStore, events: list[_Event], requests: list[Request]) -> list[str]:
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


def _stage_faults(store: OpenStore, events: list[_Event]) -> list[str]:
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


def _exclusion_faults(store: OpenStore, requests: list[Request]) -> list[str]:
    """Each request excludes somebody, and each record that it found, unless an earlier one did for the same slice."""
    rows = store.ledger.database.rows(_BY_REQUEST)
    excluded = {row["request"]: (row["total"], row["records"]) for row in rows}
    earlier: set[tuple[int, int]] = set()
    faults = []
    for request in requests:
        total, records = excluded.get(request.id, (0, 0))
        overlaps = not earlier.isdisjoint(request.places)
        if not total or records > request.records or (records < request.records and not overlaps):
            faults.append(f"request {request.id} excludes {records} records, it was accepted for {request.records}")
        earlier |= set(request.places)
    return faults
