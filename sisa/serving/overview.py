"""``GET /state``: all that the operator's page shows, as plain data, from one moment of the ledger."""

from __future__ import annotations

import hashlib
import json
from datetime import UTC, datetime
from typing import Any

from sisa.ensemble.live import rule_in_use
from sisa.layout import is_held_out
from sisa.ledger import Ledger, StageRow, Version
from sisa.opening import OpenStore
from sisa.serving.deletions import described
from sisa.store.status import summary

MOST = 200
"""Versions and requests that are told, the newest."""


def overview(store: OpenStore, *, lease_s: float) -> dict[str, Any]:
    """Return where the store stands."""
    ledger = store.ledger
    with ledger.database.snapshot():
        version = ledger.versions.live()
        waiting = ledger.requests.open()
        requests = [described(request) for request in ledger.requests.newest(MOST)]
        return {
            "store": store.layout.name,
            "now": datetime.now(UTC).isoformat(timespec="milliseconds"),
            **summary(store),
            "classes": store.classes,
            "aggregation": store.recipe.sisa.aggregation_name,
            "aggregation_in_use": rule_in_use(store.recipe, ledger, version),
            "stages": _stages(store, version),
            "versions": _versions(ledger),
            "requests": requests,
            "open_requests": len(waiting),
            "oldest_open_at": waiting[0].created_at if waiting else None,
            "replicas": [
                {"id": row.id, "version": row.version, "confirmed": row.version >= ledger.versions.last_quarantine()}
                for row in ledger.replicas.all()
            ],
            "lease_seconds": lease_s,
        }


def etag(told: dict[str, Any]) -> str:
    """Return a tag that changes with anything but the time of asking."""
    content = json.dumps({**told, "now": ""}, sort_keys=True, ensure_ascii=False)
    return f'"{hashlib.sha256(content.encode()).hexdigest()[:32]}"'


def _stages(store: OpenStore, version: Version) -> list[dict[str, Any]]:
    rows = {(row.shard, row.stage): row for row in store.ledger.stages.all() if not row.tainted}
    serving = {member.shard: member.stage for member in version.members}
    taken = _taken_from(store)
    return [
        _stage(shard, stage, rows.get((shard, stage)), serving=serving.get(shard, 0), taken=taken.get(shard))
        for shard in range(store.shards)
        for stage in range(1, store.slices + 1)
    ]


def _taken_from(store: OpenStore) -> dict[int, tuple[int, str]]:
    """By shard: the first stage that open deletions took out of service, and the state of the one furthest on."""
    taken: dict[int, tuple[int, str]] = {}
    for request in store.ledger.requests.open():
        for shard, slice_ in request.places:
            if not is_held_out(slice_):
                first, _ = taken.get(shard, (slice_, ""))
                taken[shard] = (min(first, slice_), request.state)
    return taken


def _stage(
    shard: int, stage: int, row: StageRow | None, *, serving: int, taken: tuple[int, str] | None
) -> dict[str, Any]:
    state = "trained"
    if row is None:
        state = "empty"
        if taken is not None and stage >= taken[0]:
            state = "retraining" if taken[1] == "repairing" else "quarantined"
    elif not row.records:
        state = "empty"
    elif stage == serving:
        state = "serving"
    return {
        "shard": shard,
        "stage": stage,
        "state": state,
        "records": row.records if row else 0,
        "created_at": row.created_at if row else None,
    }


def _versions(ledger: Ledger) -> list[dict[str, Any]]:
    return [
        {
            "number": row["number"],
            "created_at": row["created_at"],
            "cause": row["cause"],
            "request": row["request"],
            "voters": row["voters"],
            "accuracy": row["accuracy"],
        }
        for row in ledger.versions.newest(MOST)
    ]
