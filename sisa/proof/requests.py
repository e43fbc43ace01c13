"""Holding requests and exclusions against the history, which notes what was accepted and when each step was done."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, get_args

from sisa.layout import HOLDOUT_SLICE
from sisa.ledger import STATES, Kind, Request, Waiting
from sisa.ledger.requests import exclusions_digest
from sisa.opening import OpenStore
from sisa.records.waiting import read_waiting
from sisa.routing.keys import shard_keys

KINDS = get_args(Kind)


@dataclass(frozen=True)
class Noted:
    """One line of history."""

    kind: str
    detail: dict[str, Any]


@dataclass
class _Told:
    """What the history tells of one request."""

    accepted: dict[str, Any]
    at: int
    """Place of its acceptance in the history."""
    version_before: object
    state: object = STATES[0]
    quarantine: object = None
    version_after: object = None
    """The version that was live when its state changed last, and where in the history that was."""
    until: int = 0


def waiting_faults(store: OpenStore) -> list[str]:
    """Return what is wrong with the rows that wait to be merged."""
    return [fault for each in store.ledger.requests.all_waiting() for fault in _waiting_faults(store, each)]


def _waiting_faults(store: OpenStore, waiting: Waiting) -> list[str]:
    place = f"ledger: {waiting.request} waits for slice {waiting.slice} of shard {waiting.shard}"
    partition = store.ledger.partitions.get(waiting.shard, waiting.slice)
    if waiting.request not in {request.id for request in store.ledger.requests.open()}:
        return [f"{place}, but is no open request"]
    if waiting.shard not in range(store.shards) or not partition.dirty:
        return [f"{place}, which waits for nobody"]
    keys = shard_keys(store.keys.routing, waiting.shard)
    read_waiting(
        store.layout,
        store.recipe,
        keys,
        request=waiting.request,
        slice_=waiting.slice,
        records=waiting.records,
        membership=waiting.membership,
    )
    return []


def request_faults(events: Sequence[Noted], requests: Sequence[Request]) -> list[str]:
    """Return what the table of requests says otherwise than the history."""
    accepted = Counter(str(event.detail.get("request")) for event in events if event.kind == "request_accepted")
    if accepted != Counter(request.id for request in requests):
        return ["the requests are not those whose acceptance is noted"]
    told, trained = _told(events)
    faults = []
    for request in requests:
        here = told[request.id]
        if here.accepted.get("what") != request.kind:
            faults.append(f"request {request.id} is of another kind than was noted")
        if here.accepted.get("shards") != request.shards:
            faults.append(f"request {request.id} was accepted for other shards than the ledger says")
        if here.state != request.state:
            faults.append(f"request {request.id} is not in the state that was noted last")
        expected = _expected(here, request, trained)
        wrong = [name for name, value in expected.items() if getattr(request, name) != value]
        if wrong:
            faults.append(f"request {request.id} has another {', '.join(wrong)} than was noted")
    return faults


def _told(events: Sequence[Noted]) -> tuple[dict[str, _Told], dict[object, list[int]]]:
    """Return what is told of each request; and, by shard, where in the history its stages were trained."""
    told: dict[str, _Told] = {}
    trained: defaultdict[object, list[int]] = defaultdict(list)
    live: object = 0
    newest: _Told | None = None
    for at, event in enumerate(events):
        here = told.get(str(event.detail.get("request")))
        if event.kind == "stage_trained":
            trained[event.detail.get("shard")].append(at)
        elif event.kind == "version_published":
            live = event.detail.get("version")
            if newest is not None and newest.at == at - 1 and event.detail.get("cause") == "quarantine":
                newest.quarantine = live  # the two are of one transaction
        elif event.kind == "request_accepted":
            newest = told[str(event.detail.get("request"))] = _Told(event.detail, at, live)
        elif event.kind == "records_found" and here is not None:
            here.accepted = {**here.accepted, "records": event.detail.get("records")}
        elif event.kind == "request_state" and here is not None:
            here.state, here.version_after, here.until = event.detail.get("state"), live, at
    return told, dict(trained)


def _expected(here: _Told, request: Request, trained: dict[object, list[int]]) -> dict[str, object]:
    """Return the columns of a request that follow from its history."""
    after: object = None
    retrained = 0
    if here.state == STATES[-1] and request.shards:
        places = [trained.get(shard, []) for shard in request.shards]
        retrained = sum(bisect_left(ats, here.until) - bisect_right(ats, here.at) for ats in places)
        after = here.version_after
    elif here.state == STATES[-1]:  # only rows that were held out went: no constituent has changed
        after = here.version_before
    return {
        "subjects": here.accepted.get("subjects"),
        "records": here.accepted.get("records"),
        "version_before": here.version_before,
        "version_quarantine": here.quarantine,
        "version_after": after,
        "stages_retrained": retrained,
    }


def unseen_targets(store: OpenStore, events: Sequence[Noted], requests: Sequence[Request]) -> bool:
    """Say whether somebody may have been deleted whose rows could not be read, so that they were not counted.

    In a store with a second source for its holdout people may lie in two slices. Of them it is not known whether
    both could be read.
    """
    if any(event.detail.get("unseen") for event in events if event.kind == "request_accepted"):
        return True
    return store.recipe.data.holdout.source is not None and any(
        shard in request.shards and slice_ == HOLDOUT_SLICE for request in requests for shard, slice_ in request.places
    )


def exclusion_faults(store: OpenStore, events: Sequence[Noted]) -> list[str]:
    """Each request excludes exactly those whose digest was noted with its acceptance."""
    rows = store.ledger.database.rows("SELECT kind, digest, request FROM exclusions")
    excluded: defaultdict[str, list[tuple[str, bytes]]] = defaultdict(list)
    for row in rows:
        excluded[row["request"]].append((row["kind"], row["digest"]))
    faults = []
    if any(row["kind"] not in KINDS for row in rows):
        faults.append("exclusions have a line of a kind that there is not")
    # More of a deleted person is found, and excluded, where a slice could not be read at first: the last line counts.
    last = {str(e.detail.get("request")): e for e in events if e.kind in {"request_accepted", "records_found"}}
    for identifier, event in last.items():
        noted = event.detail.get("excluded")
        here = excluded[identifier]
        found = {each: sum(kind == each for kind, _ in here) for each in KINDS}
        if found != noted:
            faults.append(f"request {identifier} excludes {_counts(found)}, it was accepted for {_counts(noted)}")
        elif exclusions_digest(here) != event.detail.get("exclusions"):
            faults.append(f"request {identifier} excludes others than it was accepted for")
    return faults


def _counts(excluded: object) -> str:
    known = excluded if isinstance(excluded, dict) else {}
    contents = f" and {known['content']} superseded contents" if known.get("content") else ""
    return f"{known.get('record', '?')} records and {known.get('subject', '?')} subjects{contents}"
