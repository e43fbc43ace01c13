"""What ``sisa status`` says. Reads the ledger alone: no rows, no weights, no torch."""

from __future__ import annotations

from typing import Any

from sisa.layout import is_held_out
from sisa.ledger import Request, Version
from sisa.opening import OpenStore


def status(store: OpenStore) -> dict[str, Any]:
    """Return the store's state as plain data."""
    ledger = store.ledger
    with ledger.database.snapshot():
        version = ledger.versions.live()
        waiting = {shard for request in ledger.requests.open() for shard in request.shards}
        return {
            **summary(store),
            "requests": [request_json(request) for request in ledger.requests.all()],
            "constituents": [_constituent(store, version, shard, waiting) for shard in range(store.shards)],
        }


def summary(store: OpenStore) -> dict[str, Any]:
    """Return the part of the state that is as large for any number of requests."""
    ledger = store.ledger
    with ledger.database.snapshot():
        version = ledger.versions.live()
        partitions = ledger.partitions.all()
        return {
            "version": version.number,
            "state": _state(store, version, repair_due=bool(ledger.requests.open())),
            "records": sum(p.records for p in partitions if not is_held_out(p.slice)),
            "subjects": sum(p.subjects for p in partitions if not is_held_out(p.slice)),
            "holdout_records": sum(p.records for p in partitions if is_held_out(p.slice)),
            "shards": store.shards,
            "slices": store.slices,
            "generations": store.generations,
        }


def _state(store: OpenStore, version: Version, *, repair_due: bool) -> str:
    if not store.ledger.ingested:
        return "ingesting"
    if version.number == 0:
        return "training"
    if repair_due:
        return "repair due"
    newest = {row.shard for row in store.ledger.stages.all() if row.stage == store.slices and not row.tainted}
    return "ready" if len(newest) == store.shards or not store.generations else "training due"


def _constituent(store: OpenStore, version: Version, shard: int, waiting: set[int]) -> dict[str, Any]:
    member = next((m for m in version.members if m.shard == shard), None)
    row = store.ledger.stages.get(member.key, member.platform) if member is not None and member.stage else None
    return {
        "shard": shard,
        "stage": row.stage if row else 0,
        "key": row.key if row else "",
        "state_digest": row.state_digest if row else "",
        "records": row.records if row else 0,
        "quarantined": shard in waiting,
    }


def request_json(request: Request) -> dict[str, Any]:
    """Return a request as plain data."""
    return {
        "request": request.id,
        "kind": request.kind,
        "state": request.state,
        "created_at": request.created_at,
        "updated_at": request.updated_at,
        "reason": request.reason,
        "subjects": request.subjects,
        "records": request.records,
        "shards": request.shards,
        "slices": sorted({slice_ for _, slice_ in request.places if not is_held_out(slice_)}),
        "stages_retrained": request.stages_retrained,
        "version_before": request.version_before,
        "version_quarantine": request.version_quarantine,
        "version_after": request.version_after,
        "seconds_to_quarantine": request.seconds_to_quarantine,
        "note": request.note,
    }
