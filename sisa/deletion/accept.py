"""Finding whom a request is about, and accepting it.

Nothing is changed until every id is known. Then one ledger transaction excludes the people, takes every
stage that saw them out of service and publishes the quarantine version; when ``accept`` returns, that is
durable, and no replica answers from an older version any more.
"""

from __future__ import annotations

import time
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sisa.deletion.confirm import await_replicas
from sisa.errors import DamagedError, StaleError, StoreError, UnknownIdsError, UserError
from sisa.layout import HOLDOUT_SLICE, held_out_of, is_held_out
from sisa.ledger import Kind, Partition, Request, Target
from sisa.opening import OpenStore, key_check
from sisa.records.partition import present_ids
from sisa.records.parts import numbers_of
from sisa.routing.ids import canonical_id
from sisa.routing.keys import exclusion_digests, shard_keys

LONGEST_REASON = 10_000
SHOWN = 5
"""How many unknown ids a message names."""


@dataclass(frozen=True)
class Accepted:
    """A request that is durable, and what was asked for in vain."""

    request: Request
    repeated: bool
    missing: list[str]
    earlier: tuple[Request, ...] = ()
    """The other requests by which some of the ids were deleted before."""
    damage: DamagedError | None = None
    """Rows that can't be read, so that nobody can tell which of them have to be erased."""

    @property
    def requests(self) -> tuple[Request, ...]:
        """Every request that the ids belong to."""
        return (self.request, *self.earlier)


@dataclass
class _Found:
    places: set[tuple[int, int]] = field(default_factory=set)
    records: list[str] = field(default_factory=list)
    owners: set[str] = field(default_factory=set)
    unseen: bool = False


@dataclass
class _Search:
    """Where ids were found, and what could not be searched."""

    found: defaultdict[str, _Found] = field(default_factory=lambda: defaultdict(_Found))
    damage: DamagedError | None = None


def accept(
    store: OpenStore,
    *,
    subjects: Sequence[str] = (),
    records: Sequence[str] = (),
    reason: str = "",
    regime: str = "",
    ignore_missing: bool = False,
) -> Accepted | None:
    """Accept the deletion of subjects or records; None if no id is known and that is to be ignored.

    A subject whose slice can't be read is accepted unseen, since the routing key says where the rows must have
    been: what may have seen them goes out of service, and they are erased when the file is restored.

    Raises:
        UserError: The reason is no line of text.
        UnknownIdsError: An id is unknown; nothing was changed.
        StoreError: The store holds no records yet.
        DamagedError: A record may lie among rows that are lost or unreadable; nothing was changed.
    """
    started = time.monotonic()
    check_reason(reason)
    with store.ingest_lock().held():
        if not store.ledger.ingested:
            raise StoreError("the store holds no records yet: its ingest has not ended", hint="Run `sisa train`.")
    while True:
        generations = store.generations
        targets, missing, damage = _resolve(store, subjects, records)
        if missing and not ignore_missing:
            raise _unknown(missing, asked=len(set(subjects) | set(records)))
        if not targets:
            return None
        try:
            acceptance = store.ledger.requests.accept(
                targets,
                reason=reason,
                regime=regime,
                key_check=key_check(store.keys.exclusion),
                generations=generations,
            )
        except StaleError:  # rows came in that may be theirs: look again
            continue
        break
    quarantines = [r.version_quarantine or 0 for r in (acceptance.request, *acceptance.earlier)]
    await_replicas(store, max(quarantines))
    if not acceptance.repeated:
        seconds = time.monotonic() - started
        store.ledger.requests.measured(acceptance.request.id, seconds_to_quarantine=seconds)
    request = store.ledger.requests.get(acceptance.request.id)
    return Accepted(request, acceptance.repeated, missing, acceptance.earlier, damage)


def check_reason(reason: str) -> None:
    """Make sure that a reason can be shown in a line: control characters would be a terminal's commands.

    Raises:
        UserError: It can't.
    """
    if len(reason) > LONGEST_REASON:
        raise UserError(
            f"reason: at most {LONGEST_REASON:,} characters, got {len(reason):,}", hint="Refer to a ticket instead."
        )
    if any(unicodedata.category(character) in {"Cc", "Cf", "Zl", "Zp"} for character in reason):
        raise UserError(
            "reason: expected one line of text, got a control character",
            hint="Leave out line breaks, tabs and invisible characters.",
        )


def _resolve(
    store: OpenStore, subjects: Sequence[str], records: Sequence[str]
) -> tuple[list[Target], list[str], DamagedError | None]:
    """Return a target for each id that is known (now, or from an earlier deletion), the ids that aren't, and damage.

    Raises:
        DamagedError: A record was not found, and not all rows could be searched.
    """
    own_subjects = store.recipe.data.subject_column == store.recipe.data.record_id
    wanted_subjects = {canonical_id(i): i for i in [*subjects, *(records if own_subjects else ())]}
    wanted_records = {} if own_subjects else {canonical_id(i): i for i in records}
    targets: list[Target] = []
    missing: list[str] = []
    damage: DamagedError | None = None
    searches: tuple[tuple[Kind, dict[str, str], _Search], ...] = (
        ("subject", wanted_subjects, _find_subjects(store, list(wanted_subjects))),
        ("record", wanted_records, _find_records(store, list(wanted_records))),
    )
    for kind, wanted, search in searches:
        digests = _digests(store, kind, wanted)
        before = store.ledger.requests.excluded_by((kind, digest) for digest in digests.values())
        records_of = _digests(store, "record", {r for here in search.found.values() for r in here.records})
        owners_of = _digests(store, "subject", {o for here in search.found.values() for o in here.owners})
        for identifier, digest in digests.items():
            here = search.found.get(identifier)
            if here is None and (kind, digest) not in before:
                if kind == "record" and search.damage is not None:
                    raise DamagedError(f"{search.damage.message}; nothing was changed", hint=search.damage.hint)
                missing.append(wanted[identifier])
                continue
            here = here or _Found()
            targets.append(
                Target(
                    kind=kind,
                    digest=digest,
                    places=tuple(sorted(here.places)),
                    record_digests=tuple(records_of[record] for record in here.records),
                    owner_digests=tuple(owners_of[owner] for owner in here.owners),
                    unseen=here.unseen,
                )
            )
        if kind == "subject":
            damage = search.damage
    return targets, missing, damage


def _digests(store: OpenStore, kind: Kind, ids: Iterable[str]) -> dict[str, bytes]:
    ordered = list(ids)
    return dict(zip(ordered, exclusion_digests(store.keys.exclusion, kind, ordered), strict=True))


def _find_subjects(store: OpenStore, wanted: list[str]) -> _Search:
    """Look each subject up where the key says it is, in every generation too; who can't be looked up may be there."""
    search = _Search()
    if not wanted:
        return search
    routes = store.router.route(pa.array(wanted, pa.string()))
    generations = store.generations
    by_place: defaultdict[tuple[int, int], list[str]] = defaultdict(list)
    for subject, shard, slice_ in zip(wanted, routes.shard_N.tolist(), routes.slice_N.tolist(), strict=True):
        for number in _slices_of_subject(store, slice_, generations=generations):
            by_place[shard, number].append(subject)
    for place, subjects in sorted(by_place.items()):
        try:
            record_ids, subject_ids = ids_of(store, *place, subjects=subjects)
        except DamagedError as error:
            search.damage = search.damage or error
            for subject in subjects:
                search.found[subject].places.add(place)
                search.found[subject].owners.add(subject)
                search.found[subject].unseen = True
            continue
        _note(search.found, place, record_ids, subject_ids, by=subject_ids, wanted=subjects)
    return search


def _slices_of_subject(store: OpenStore, slice_: int, *, generations: int) -> list[int]:
    """Return every slice of its shard in which a subject that the key places in ``slice_`` may have rows."""
    if slice_ == HOLDOUT_SLICE:
        return [held_out_of(generation) for generation in range(generations + 1)]
    second = [HOLDOUT_SLICE] if store.recipe.data.holdout.source is not None else []
    first = store.recipe.sisa.slices
    return [*second, slice_, *range(first + 1, first + generations + 1)]


def _find_records(store: OpenStore, wanted: list[str]) -> _Search:
    """Look records up everywhere: only their owner's id would say where they are."""
    search = _Search()
    for partition in store.ledger.partitions.all() if wanted else ():
        place = (partition.shard, partition.slice)
        try:
            record_ids, subject_ids = ids_of(store, *place)
        except DamagedError as error:
            search.damage = search.damage or error
            continue
        _note(search.found, place, record_ids, subject_ids, by=record_ids, wanted=wanted)
    return search


def ids_of(
    store: OpenStore, shard: int, slice_: int, *, subjects: Sequence[str] | None = None
) -> tuple[pa.Array, pa.Array]:
    """Return who is in a slice. A lost file must not look as if its people had never been there.

    Args:
        store: The store.
        shard: 0..S-1.
        slice_: Which slice.
        subjects: Look only where these may be: of several files, into theirs.

    Returns:
        Ids of records and of their owners.

    Raises:
        DamagedError: Not as many are there as there should be.
    """
    expected = store.ledger.partitions.get(shard, slice_)
    where = f"holdout of shard {shard}" if is_held_out(slice_) else f"slice {slice_} of shard {shard}"
    if not expected.files:
        ids = present_ids(store.layout, shard, slice_)
        _check_there(store, expected, f"the {where}", len(ids[0]), (expected.records, expected.next_records))
        return ids
    of = len(expected.files)
    numbers = range(of)
    if subjects is not None:
        keys = shard_keys(store.keys.routing, shard)
        numbers = np.unique(numbers_of(keys, pa.array(subjects, pa.string()), of)).tolist()
    found = []
    for number in numbers:
        file = expected.files[number]
        found.append(present_ids(store.layout, shard, slice_, file=(number, of)))
        there = len(found[-1][0])
        _check_there(store, expected, f"file {number} of the {where}", there, (file.records, file.next_records))
    return pa.concat_arrays([ids for ids, _ in found]), pa.concat_arrays([owners for _, owners in found])


def _check_there(
    store: OpenStore, expected: Partition, where: str, there: int, wanted: tuple[int | None, int | None]
) -> None:
    if there in wanted:
        return
    if store.ledger.partitions.get(expected.shard, expected.slice) == expected:  # else a deletion came in between
        raise DamagedError(
            f"{where} has {there} rows on disk, not the {wanted[0]} that the ledger expects",
            hint="Restore the file from a copy, then run `sisa repair`; `sisa verify` lists what is wrong.",
        )


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
