"""Corrections (GDPR, Article 16): rows that are in the store get new content.

In order: every row of the table is looked up, and everything that can be refused is refused; the new rows are written
to a place where they wait; one ledger transaction accepts the request, which excludes what the rows said, and takes
every stage that saw it out of service, as for a deletion; then slices are rewritten, stages purged and trained.

Killed before the transaction nothing has happened. Killed after it, whatever settles requests goes on.
"""

from __future__ import annotations

import contextlib
import secrets
import time
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from sisa.coordination import Held
from sisa.deletion.accept import Accepted, check_reason, ids_of
from sisa.deletion.confirm import await_replicas
from sisa.deletion.files import rows_damage
from sisa.deletion.incoming import begin_incoming, end_incoming, is_incoming, sweep_held
from sisa.deletion.settle import settle, settle_all
from sisa.errors import SisaError, StaleError, StoreError, UserError
from sisa.execution.options import Execution
from sisa.ledger import STATES, Request, Target, Waiting
from sisa.lineage import membership
from sisa.opening import OpenStore, key_check
from sisa.progress import Reporter
from sisa.recipe import Recipe
from sisa.records import ingest
from sisa.records.arrivals import Intake, arrivals
from sisa.records.digest import content_digests, id_digests
from sisa.records.excluded import excluded_rows, superseded_digests
from sisa.records.grow import grown_recipe
from sisa.records.names import RECORD, SUBJECT
from sisa.records.partition import PartitionRows, read_partition, rewrite_partition
from sisa.records.source import open_source
from sisa.routing.keys import exclusion_digests, shard_keys
from sisa.store.launch import raise_first
from sisa.store.results import Correction
from sisa.store.store import Store

Place = tuple[int, int]


@dataclass
class _Found:
    """What a table would change."""

    targets: list[Target] = field(default_factory=list)
    new: dict[Place, PartitionRows] = field(default_factory=dict)
    unchanged: int = 0
    moved: int = 0
    """Rows whose owner differs."""
    back: int = 0
    """Rows that would say again what a correction superseded."""


def correct(
    store: Store, source: str, *, reason: str, defer: bool, execution: Execution, reporter: Reporter
) -> Correction:
    """Replace the content of rows, and retrain what saw the old one unless that is deferred.

    Raises:
        UserError: The table can't be used, or its rows can't be corrected; nothing was changed.
        StoreError: The store is damaged, or the retraining failed; an accepted request stays accepted.
    """
    started = time.monotonic()
    opened = store.opened
    if not opened.ledger.ingested:
        raise StoreError("the store holds no records yet: its ingest has not ended", hint="Run `sisa train`.")
    check_reason(reason)
    execution.check()
    recipe = grown_recipe(opened.recipe, source)
    while True:
        raise_first(settle_all(opened, reporter))  # what waits is merged: a row has one content that can be superseded
        try:
            request, unchanged = _accepted(opened, recipe, reason)
        except StaleError:  # somebody else asked for something meanwhile: look again
            continue
        break
    repeated = request is None
    if request is not None:
        await_replicas(opened, request.version_quarantine or 0)
        opened.ledger.requests.measured(request.id, seconds_to_quarantine=time.monotonic() - started)
        reporter.note(f"accepted as {request.id}: no prediction uses what these rows said any more")
        raise_first(dict(settle(opened, request, reporter)))
        mine = [request]
    else:
        mine = [waiting for waiting in opened.ledger.requests.open() if waiting.kind == "correction"]
    note = ""
    if mine and not defer:
        note = store.repair_after(Accepted(mine[0], repeated, [], tuple(mine[1:])), execution, reporter)
    told = opened.ledger.requests.get(mine[0].id) if mine else None
    return _answer(store, told, unchanged=unchanged, repeated=repeated and bool(mine), note=note, started=started)


def _answer(
    store: Store, told: Request | None, *, unchanged: int, repeated: bool, note: str, started: float
) -> Correction:
    seconds = round(time.monotonic() - started, 3)
    if told is None:
        version = store.version
        return Correction("", STATES[-1], 0, 0, unchanged, [], 0, version, None, version, 0.0, seconds)
    return Correction(
        request=told.id,
        state=told.state,
        records=told.records,
        subjects=told.subjects,
        unchanged=unchanged,
        shards=told.shards,
        stages_retrained=told.stages_retrained,
        version_before=told.version_before,
        version_quarantine=told.version_quarantine,
        version_after=told.version_after,
        seconds_to_quarantine=round(told.seconds_to_quarantine, 4),
        seconds=seconds,
        repeated=repeated,
        note=note,
    )


def _accepted(opened: OpenStore, recipe: Recipe, reason: str) -> tuple[Request | None, int]:
    """Look rows up and accept their correction; None if nothing differs. Also how many rows don't differ.

    Raises:
        UserError: Rows can't be corrected.
        DamagedError: Not all rows of the store can be searched.
        StaleError: The store changed meanwhile.
    """
    ledger = opened.ledger
    with opened.incoming_lock().held() as lock:
        if is_incoming(opened):
            sweep_held(opened, lock)  # what a killed addition or correction left
        newest, generations = ledger.database.newest_request(), opened.generations
        found = _looked_up(opened, _rows_of(opened, recipe))
        if not found.targets:
            return None, found.unchanged
        mark = begin_incoming(opened)
        try:
            if ledger.database.newest_request() != newest:  # whose rows were erased before they could see the mark
                raise StaleError("somebody else asked for something meanwhile")
            identifier = f"cor-{secrets.token_hex(8)}"
            _write_waiting(opened, identifier, found, lock)
            request = ledger.requests.accept_correction(
                identifier,
                found.targets,
                reason=reason,
                key_check=key_check(opened.keys.exclusion),
                newest_request=newest,
                generations=generations,
                waiting=[
                    Waiting(identifier, *place, rows.table.num_rows, rows.membership)
                    for place, rows in found.new.items()
                ],
                check=lock.check,
            )
        except BaseException:
            with contextlib.suppress(SisaError):  # who lost the lock, or the ledger, leaves it to the next
                sweep_held(opened, lock)
            raise
        end_incoming(opened, mark)
    return request, found.unchanged


def _write_waiting(opened: OpenStore, request: str, found: _Found, lock: Held) -> None:
    """Write the new rows to where they wait for their slices."""
    for (shard, slice_), rows in found.new.items():
        lock.check()
        everything_N = np.ones(rows.table.num_rows, np.bool_)
        rewrite_partition(opened.layout.correction(request), shard, slice_, everything_N, rows)


def _rows_of(opened: OpenStore, recipe: Recipe) -> pa.Table:
    """Read the table of corrections: it is kept in memory.

    Raises:
        UserError: A row can't be used, or is somebody's who was deleted.
    """
    ingest.scan(recipe, routing_key=opened.keys.routing)
    intake = Intake(recipe, open_source(recipe.data.source, name="--source"), opened.router)
    batches = [arrived.batch for arrived in arrivals(intake) if arrived.batch.num_rows]
    if not batches:
        raise UserError(
            f"{recipe.data.source!r} has no row; nothing was changed", hint="Give the rows as they should be."
        )
    table = pa.Table.from_batches(batches).combine_chunks()
    exclusions = opened.ledger.requests.exclusions().keys()
    gone = int(excluded_rows(table[RECORD], table[SUBJECT], exclusions, opened.keys.exclusion).sum())
    if gone:
        raise UserError(
            f"{gone} of {len(table)} rows are deleted people's, or were deleted; nothing was changed",
            hint="Leave them out: what was deleted can't be corrected.",
        )
    return table


def _check_settled(opened: OpenStore, place: tuple[int, int], held: PartitionRows) -> None:
    """Make sure that rows say what they are to say from now on: whoever corrects them again supersedes just that.

    Raises:
        StaleError: They are to be erased, or an accepted correction of some of them isn't merged yet.
        DamagedError: They are others than the ledger expects.
    """
    expected = opened.ledger.partitions.get(*place)
    if expected.dirty or opened.ledger.requests.waiting(*place):
        raise StaleError("rows of an earlier request are still on their way")
    if held.membership != expected.membership:
        raise rows_damage(opened, *place)


def _looked_up(opened: OpenStore, table: pa.Table) -> _Found:
    """Find each row of the table in the store.

    Raises:
        UserError: A row isn't there, or can't be corrected.
        DamagedError: Not all rows of the store can be searched.
    """
    found = _Found()
    index = {record: position for position, record in enumerate(table[RECORD].to_pylist())}
    left = set(index)
    for partition in opened.ledger.partitions.all():
        place = (partition.shard, partition.slice)
        with opened.coordination.rows(partition.shard).held():
            here = left.intersection(ids_of(opened, *place)[0].to_pylist())
            if not here:
                continue
            keys = shard_keys(opened.keys.routing, partition.shard)
            held = read_partition(opened.layout, opened.recipe, keys, *place)
            _check_settled(opened, place, held)
        left -= here
        _compare(opened, place, held, found=found, table=table, index=index)
    problems = [
        (len(left), "have a record id that is not in the store"),
        (found.moved, "have another owner than in the store"),
        (found.back, "say again what a correction superseded"),
    ]
    said = "; ".join(f"{count} of {len(table)} rows {what}" for count, what in problems if count)
    if said:
        raise UserError(
            f"{said}; nothing was changed",
            hint="New rows are for `sisa add`. A row that changes hands is deleted, and added under another record id; "
            "so is one that goes back to what it said before.",
        )
    return found


def _compare(
    opened: OpenStore, place: Place, held: PartitionRows, *, found: _Found, table: pa.Table, index: dict[str, int]
) -> None:
    """Sort the rows of one slice that the table names: the same, other content, another owner."""
    keys = shard_keys(opened.keys.routing, place[0])
    at = [i for i, record in enumerate(held.table[RECORD].to_pylist()) if record in index]
    old = held.table.take(pa.array(at))
    new = table.take(pa.array([index[record] for record in old[RECORD].to_pylist()]))
    old_N16, new_N16 = held.content_digests_N16[at], content_digests(keys, new, opened.recipe)
    owners = [a != b for a, b in zip(old[SUBJECT].to_pylist(), new[SUBJECT].to_pylist(), strict=True)]
    moved_N = np.array(owners, np.bool_)
    differs_N = (old_N16 != new_N16).any(axis=1) & ~moved_N
    found.moved += int(moved_N.sum())
    found.unchanged += int((~differs_N & ~moved_N).sum())
    if not differs_N.any():
        return
    changed = pa.array(differs_N)
    old, new, old_N16, new_N16 = old.filter(changed), new.filter(changed), old_N16[differs_N], new_N16[differs_N]
    key = opened.keys.exclusion
    digests = superseded_digests(old[RECORD], old_N16, key)
    known = opened.ledger.requests.exclusions()
    found.back += sum(("content", digest) in known for digest in superseded_digests(new[RECORD], new_N16, key))
    people = exclusion_digests(key, "subject", old[SUBJECT].to_pylist())
    found.targets += [
        Target("content", digest, (place,), owner_digests=(owner,))
        for digest, owner in zip(digests, people, strict=True)
    ]
    ids_N16 = id_digests(keys, new[RECORD])
    found.new[place] = PartitionRows(new, ids_N16, new_N16, membership(ids_N16, new_N16))
