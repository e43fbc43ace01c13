"""Finding whom a request is about, and accepting it.

Nothing is changed until every id is known. Then one ledger transaction excludes the people, takes every
stage that saw them out of service and publishes the quarantine version; when ``accept`` returns, that is
durable.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sisa.errors import DamagedError, StoreError, UnknownIdsError
from sisa.layout import HOLDOUT_SLICE
from sisa.ledger import Kind, Request, Target
from sisa.opening import OpenStore
from sisa.records.partition import present_ids
from sisa.routing.ids import canonical_id
from sisa.routing.keys import exclusion_digest

SHOWN = 5
"""How many unknown ids a message names."""


@dataclass(frozen=True)
class Accepted:
    """A request that is durable, and what was asked for in vain."""

    request: Request
    repeated: bool
    missing: list[str]


@dataclass
class _Found:
    places: set[tuple[int, int]] = field(default_factory=set)
    records: list[str] = field(default_factory=list)
    owners: set[str] = field(default_factory=set)


def accept(
    store: OpenStore,
    *,
    subjects: Sequence[str] = (),
    records: Sequence[str] = (),
    reason: str = "",
    ignore_missing: bool = False,
) -> Accepted | None:
    """Accept the deletion of subjects or records; None if no id is known and that is to be ignored.

    Raises:
        UnknownIdsError: An id is unknown; nothing was changed.
        StoreError: The store holds no records yet.
        DamagedError: Rows that the ledger expects are lost or unreadable: nobody can tell whose they were.
    """
    started = time.monotonic()
    with store.ingest_lock().held():
        if not store.ledger.ingested:
            raise StoreError("the store holds no records yet: its ingest has not ended", hint="Run `sisa train`.")
    targets, missing = _resolve(store, subjects, records)
    if missing and not ignore_missing:
        raise _unknown(missing, asked=len(set(subjects) | set(records)))
    if not targets:
        return None
    acceptance = store.ledger.requests.accept(targets, reason=reason)
    if not acceptance.repeated:
        seconds = time.monotonic() - started
        store.ledger.requests.measured(acceptance.request.id, seconds_to_quarantine=seconds)
    return Accepted(store.ledger.requests.get(acceptance.request.id), acceptance.repeated, missing)


def _resolve(store: OpenStore, subjects: Sequence[str], records: Sequence[str]) -> tuple[list[Target], list[str]]:
    """Return a target for each id that is known (now, or from an earlier deletion), and the ids that aren't."""
    own_subjects = store.recipe.data.subject_column == store.recipe.data.record_id
    wanted_subjects = {canonical_id(i): i for i in [*subjects, *(records if own_subjects else ())]}
    wanted_records = {} if own_subjects else {canonical_id(i): i for i in records}
    targets: list[Target] = []
    missing: list[str] = []
    searches: tuple[tuple[Kind, dict[str, str], dict[str, _Found]], ...] = (
        ("subject", wanted_subjects, _find_subjects(store, list(wanted_subjects))),
        ("record", wanted_records, _find_records(store, list(wanted_records))),
    )
    for kind, wanted, found in searches:
        digests = {i: exclusion_digest(store.keys.exclusion, kind, i) for i in wanted}
        before = store.ledger.requests.excluded_by((kind, digest) for digest in digests.values())
        for identifier, digest in digests.items():
            here = found.get(identifier)
            if here is None and (kind, digest) not in before:
                missing.append(wanted[identifier])
                continue
            targets.append(_target(store, kind, digest, here or _Found()))
    return targets, missing


def _target(store: OpenStore, kind: Kind, digest: bytes, found: _Found) -> Target:
    key = store.keys.exclusion
    return Target(
        kind=kind,
        digest=digest,
        places=tuple(sorted(found.places)),
        record_digests=tuple(exclusion_digest(key, "record", record) for record in found.records),
        owner_digests=tuple(exclusion_digest(key, "subject", owner) for owner in sorted(found.owners)),
    )


def _find_subjects(store: OpenStore, wanted: list[str]) -> dict[str, _Found]:
    """Look each subject up where the router says it is, and in the holdout."""
    if not wanted:
        return {}
    routes = store.router.route(pa.array(wanted, pa.string()))
    by_place: defaultdict[tuple[int, int], list[str]] = defaultdict(list)
    for subject, shard, slice_ in zip(wanted, routes.shard_N.tolist(), routes.slice_N.tolist(), strict=True):
        by_place[shard, slice_].append(subject)
        if slice_ != HOLDOUT_SLICE and store.recipe.data.holdout.source is not None:
            by_place[shard, HOLDOUT_SLICE].append(subject)
    found: defaultdict[str, _Found] = defaultdict(_Found)
    for place, subjects in sorted(by_place.items()):
        record_ids, subject_ids = _ids_of(store, *place)
        _note(found, place, record_ids, subject_ids, by=subject_ids, wanted=subjects)
    return dict(found)


def _find_records(store: OpenStore, wanted: list[str]) -> dict[str, _Found]:
    """Look records up everywhere: only their owner's id would say where they are."""
    if not wanted:
        return {}
    found: defaultdict[str, _Found] = defaultdict(_Found)
    for partition in store.ledger.partitions.all():
        place = (partition.shard, partition.slice)
        record_ids, subject_ids = _ids_of(store, *place)
        _note(found, place, record_ids, subject_ids, by=record_ids, wanted=wanted)
    return dict(found)


def _ids_of(store: OpenStore, shard: int, slice_: int) -> tuple[pa.Array, pa.Array]:
    """Return who is in a slice. A lost file must not look as if its people had never been there."""
    expected = store.ledger.partitions.get(shard, slice_)
    record_ids, subject_ids = present_ids(store.layout, shard, slice_)
    lost = len(record_ids) != expected.records and not expected.dirty
    if lost and store.ledger.partitions.get(shard, slice_) == expected:  # else a deletion came in between
        where = f"holdout of shard {shard}" if slice_ == HOLDOUT_SLICE else f"slice {slice_} of shard {shard}"
        raise DamagedError(
            f"the {where} has {len(record_ids)} rows on disk, not the {expected.records} that the ledger expects; "
            "nothing was changed",
            hint="Restore the records of the store from a copy, then ask again; `sisa verify` lists what is wrong.",
        )
    return record_ids, subject_ids


def _note(
    found: defaultdict[str, _Found],
    place: tuple[int, int],
    record_ids: pa.Array,
    subject_ids: pa.Array,
    *,
    by: pa.Array,
    wanted: list[str],
) -> None:
    rows = np.flatnonzero(pc.is_in(by, value_set=pa.array(wanted, pa.string())).to_numpy(zero_copy_only=False))
    if not len(rows):
        return
    taken = pa.array(rows)
    for name, record, subject in zip(
        by.take(taken).to_pylist(), record_ids.take(taken).to_pylist(), subject_ids.take(taken).to_pylist(), strict=True
    ):
        found[name].places.add(place)
        found[name].records.append(record)
        found[name].owners.add(subject)


def _unknown(missing: list[str], *, asked: int) -> UnknownIdsError:
    shown = ", ".join(repr(i) for i in missing[:SHOWN]) + (", ..." if len(missing) > SHOWN else "")
    return UnknownIdsError(
        f"{len(missing)} of {asked} ids are not in the store: {shown}; nothing was changed",
        missing=missing,
        hint="Check the ids, or add --ignore-missing to delete the ones that are there.",
    )
