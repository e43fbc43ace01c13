"""Deletions over HTTP: the same acceptance as ``sisa delete``; what follows runs in the background."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from datetime import datetime
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.datastructures import QueryParams
from starlette.requests import Request
from starlette.responses import Response

from sisa.deletion.accept import Accepted, accept
from sisa.errors import UnknownIdsError, UserError
from sisa.ledger import Request as Deletion
from sisa.opening import OpenStore
from sisa.planning.clocks import check_regime, due_at
from sisa.routing.ids import id_text
from sisa.routing.keys import derive
from sisa.serving.answer import json_response
from sisa.serving.bodies import json_object, only_known
from sisa.serving.limits import Refused
from sisa.serving.repairer import Repairer
from sisa.serving.stores import ThreadStores
from sisa.store.status import request_json

FIELDS = {"subjects": "list", "records": "list", "reason": "text", "regime": "text", "ignore_missing": "true or false"}
LONGEST_KEY = 255
MOST_LISTED = 1_000


class Deletions:
    """Takes deletions in and tells how they go."""

    def __init__(self, stores: ThreadStores, repairer: Repairer) -> None:
        self._stores = stores
        self._repairer = repairer

    async def submit(self, request: Request) -> Response:
        """Answer ``POST /deletions``: 202 when no replica answers any more with what the rows have left behind.

        Raises:
            Refused: The body can't be understood, or its Idempotency-Key stands for another one.
            UnknownIdsError: An id is unknown; nothing was changed.
            StoreError: The store is damaged or can't be written.
        """
        body = await json_object(request, unique=True)
        key = request.headers.get("idempotency-key", "")
        if len(key) > LONGEST_KEY:
            raise Refused(422, f"Idempotency-Key: at most {LONGEST_KEY} characters", hint="A UUID will do.")
        return await run_in_threadpool(self._submit, body, key)

    def _submit(self, body: dict[str, Any], key: str) -> Response:
        subjects, records = _ids(body)
        ignore_missing = body.get("ignore_missing", False)
        if not isinstance(ignore_missing, bool):
            raise Refused(422, "ignore_missing: expected true or false", hint="Leave it out if every id must be known.")
        reason, regime = _text(body, "reason"), _text(body, "regime")
        check_regime(regime)
        store = self._stores.get()
        with self._claimed(store, key, body) if key else nullcontext():
            accepted = accept(
                store,
                subjects=subjects,
                records=records,
                reason=reason,
                regime=regime,
                ignore_missing=ignore_missing,
            )
        self._repairer.wake()
        return json_response(_receipt(accepted, [*subjects, *records]), status=202)

    @contextmanager
    def _claimed(self, store: OpenStore, key: str, body: dict[str, Any]) -> Iterator[None]:
        """Bind an Idempotency-Key to its body, unless it is refused; only keyed digests of both are kept."""
        secret = derive(store.keys.exclusion, "idempotency")
        content = json.dumps(body, sort_keys=True).encode()
        digests = [hashlib.blake2b(text, key=secret, digest_size=16).digest() for text in (key.encode(), content)]
        if not store.ledger.requests.claim(digests[0], digests[1]):
            raise Refused(
                422, "Idempotency-Key: it was used with another body before", hint="Use a new key for a new deletion."
            )
        try:
            yield
        except UserError:  # nothing was accepted: the body may be mended
            store.ledger.requests.unclaim(digests[0])
            raise

    def page(self, query: QueryParams) -> dict[str, Any]:
        """Return a page of deletions, oldest first, and after which the next one begins; None after the last.

        Raises:
            Refused: 422: ``limit`` or ``after`` is not what it may be.
        """
        text = query.get("limit", str(MOST_LISTED))
        limit = int(text) if text.isascii() and text.isdigit() and len(text) <= len(str(MOST_LISTED)) else 0
        if not 1 <= limit <= MOST_LISTED:
            raise Refused(422, f"limit: expected a number from 1 to {MOST_LISTED:,}", hint="Leave it out for the most.")
        try:
            found = self._stores.get().ledger.requests.page(after=query.get("after"), most=limit + 1)
        except UserError:
            raise Refused(422, "after: the store has no such request", hint="Take it from `next`.") from None
        shown = found[:limit]
        return {
            "deletions": [described(deletion) for deletion in shown],
            "next": shown[-1].id if len(found) > limit else None,
        }

    def one(self, identifier: str) -> dict[str, Any]:
        """Return one deletion, its timeline and what it left behind.

        Raises:
            Refused: 404.
        """
        ledger = self._stores.get().ledger
        try:
            deletion = ledger.requests.get(identifier)
        except UserError:
            raise Refused(404, "the store has no such request", hint="GET /deletions lists them.") from None
        events = _concerning(ledger.events(), deletion)
        return {
            **described(deletion),
            "timeline": [{"at": event["at"], "what": what} for event in events if (what := _told(event, deletion))],
            "evidence": {
                "stages_purged": _stages(events, "stage_purged"),
                "stages_retrained": _stages(events, "stage_trained"),
                "version_quarantine": deletion.version_quarantine,
                "version_after": deletion.version_after,
            },
        }


def described(deletion: Deletion) -> dict[str, Any]:
    """Return a deletion as plain data, with its clock."""
    due = due_at(datetime.fromisoformat(deletion.created_at), deletion.regime)
    return {**request_json(deletion), "regime": deletion.regime, "due_at": due.isoformat() if due else None}


def _receipt(accepted: Accepted | None, asked: list[str]) -> dict[str, Any]:
    if accepted is None:
        return {"request": "", "requests": [], "state": "repaired", "version_quarantine": None, "missing": asked,
                "repeated": False}  # fmt: skip
    request = accepted.request
    return {
        "request": request.id,
        "requests": [each.id for each in accepted.requests],
        "state": request.state,
        "version_quarantine": request.version_quarantine,
        "missing": accepted.missing,
        "repeated": accepted.repeated,
    }


def _ids(body: dict[str, Any]) -> tuple[list[str], list[str]]:
    only_known(body, FIELDS, what="the body")
    given = {name: body[name] for name in ("subjects", "records") if name in body}
    if len(given) != 1:
        raise Refused(422, "expected either subjects or records", hint='For example {"subjects": ["p17"]}.')
    (name, ids), *_ = given.items()
    if not isinstance(ids, list) or not ids:
        raise Refused(422, f"{name}: expected a list of ids", hint='For example {"subjects": ["p17"]}.')
    texts = [id_text(each, where=name) for each in ids]
    return (texts, []) if name == "subjects" else ([], texts)


def _text(body: dict[str, Any], name: str) -> str:
    value = body.get(name, "")
    if not isinstance(value, str):
        raise Refused(422, f"{name}: expected a text", hint="Leave it out if there is none.")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise Refused(422, f"{name}: it is not valid Unicode", hint="Send it in UTF-8.") from None
    return value


def unknown_ids(error: UnknownIdsError) -> str:
    """Say that ids are unknown without repeating them: an answer's text may be logged by who asked."""
    count = len(error.missing)
    return f"{count:,} id{' is' if count == 1 else 's are'} not in the store; nothing was changed"


def _concerning(events: list[dict[str, Any]], deletion: Deletion) -> list[dict[str, Any]]:
    """Pick what happened because of a deletion: its own steps, and between its begin and its end the stages that saw it.

    Deletions that touch one shard at the same time are repaired together: such a stage is evidence of each.
    """
    numbers = [event["number"] for event in events if event.get("request") == deletion.id]
    first, last = min(numbers, default=0), max(numbers, default=0) if not deletion.open else float("inf")
    first_stages: dict[int, float] = {}
    for shard, slice_ in deletion.places:
        first_stages[shard] = min(slice_ or math.inf, first_stages.get(shard, math.inf))  # slice 0 is held out
    return [
        event
        for event in events
        if event.get("request") == deletion.id
        or (
            first < event["number"] < last
            and event["kind"].startswith("stage_")
            and event["stage"] >= first_stages.get(event["shard"], math.inf)
        )
        or (event["kind"] == "version_published" and event.get("version") in _versions(deletion))
    ]


def _versions(deletion: Deletion) -> set[int | None]:
    return {deletion.version_quarantine, deletion.version_after} - {None}


def _told(event: dict[str, Any], deletion: Deletion) -> str:
    kind = event["kind"]
    if kind == "version_published":
        role = "quarantine" if event["version"] == deletion.version_quarantine else "repaired"
        return f"version {event['version']} published ({role})"
    if kind == "request_state":
        return str(event["state"]).replace("_", " ")
    if kind in {"stage_purged", "stage_trained"}:
        done = "purged" if kind == "stage_purged" else "retrained"
        return f"stage {event['stage']} of shard {event['shard']} {done}"
    return "accepted" if kind == "request_accepted" else ""


def _stages(events: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    names = ("shard", "stage", "at", "worker")
    return [{name: event[name] for name in names if name in event} for event in events if event["kind"] == kind]
