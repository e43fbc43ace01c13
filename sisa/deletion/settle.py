"""After acceptance: erase the rows, purge the weights.

Both are idempotent and resume from the ledger. The order for one request is: stop marks (training of the
shard ends at its next step), rows, tainted stages and everything unentered that may descend from the
rows, state ``stages_purged``, marks away. The rows' lock is held for a rewrite, the shard's lock for a
purge; a trainer gives the latter up when it sees the mark.
"""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from sisa.checkpoints import StageId
from sisa.coordination import Held
from sisa.deletion.files import erase_files, is_older, rows_damage
from sisa.deletion.incoming import sweep_incoming
from sisa.deletion.merge import remove_correction, remove_merged, unwanted, with_corrections
from sisa.deletion.unseen import remember_unseen
from sisa.errors import DamagedError, SisaError
from sisa.files import sweep_temporary
from sisa.layout import SCRATCH_KEY, is_held_out
from sisa.ledger import STATES, Partition, Request
from sisa.lineage import membership
from sisa.opening import OpenStore
from sisa.progress import Reporter
from sisa.records.names import SUBJECT
from sisa.records.partition import PartitionRows, read_partition, rewrite_partition
from sisa.routing.keys import shard_keys
from sisa.training.waiting import sweep_waiting

PURGED = STATES.index("stages_purged")
RESTORE = "Restore the ledger from a copy."


def settle_all(store: OpenStore, reporter: Reporter) -> dict[int, SisaError]:
    """Erase and purge for every open request, and clear the marks of those that are done.

    A slice that is said to hold rows of deleted people is erased too if no open request names it.

    Returns:
        By shard, the damage that keeps rows from being erased: it can't be trained, the others can.
    """
    damaged: dict[int, SisaError] = {}
    for request in store.ledger.requests.open():
        damaged |= settle(store, request, reporter)
    dirty = [p for p in store.ledger.partitions.all() if p.dirty and p.shard not in damaged]
    for partition in dirty:
        try:
            erase_partition(store, partition.shard, partition.slice)
        except DamagedError as error:
            damaged[partition.shard] = error
    if dirty:
        store.ledger.shed()
    _clear_marks(store)
    return damaged


def settle(store: OpenStore, request: Request, reporter: Reporter) -> dict[int, DamagedError]:
    """Take one request from ``accepted`` to ``stages_purged`` (to ``repaired`` if only holdout rows went).

    Returns:
        By shard, why the rows of a slice can't be read, so that nobody's can be erased from it. Then the request
        stays where it is; all weights are purged all the same, and only the stop marks of these shards stay.
    """
    if _purged(store, request):
        return {}
    for shard in request.shards:
        store.coordination.marks.place(shard, request.id)
    damaged: dict[int, DamagedError] = {}
    for shard, slice_ in request.places:
        try:
            erase_partition(store, shard, slice_)
        except DamagedError as error:
            damaged.setdefault(shard, error)
    sweep_incoming(store, reporter)
    for shard in request.shards:
        with contextlib.suppress(_OvertakenError), _shard_held(store, shard, reporter, request):
            sweep_waiting(store.layout, shard)  # a running training has ended by now, and let its rows go
    if not damaged:
        remove_correction(store, request)
        store.ledger.requests.advance(request.id, "rows_erased")
    for shard in request.shards:
        first = min(slice_ for k, slice_ in request.places if k == shard and not is_held_out(slice_))
        purge_shard(store, shard, first_stage=first, reporter=reporter, request=request)
    remove_replays(store)  # they have seen the same rows
    store.ledger.shed()
    if damaged:
        for shard in set(request.shards) - damaged.keys():
            store.coordination.marks.remove(shard, request.id)
        return damaged
    if request.shards:
        store.ledger.requests.advance(request.id, "stages_purged")
    else:
        store.ledger.requests.advance(request.id, "repaired", version_after=request.version_before)
    _clear_marks(store)
    return {}


def erase_partition(store: OpenStore, shard: int, slice_: int) -> None:
    """Rewrite one slice without excluded rows, and with corrected ones; nothing happens if it is clean."""
    with store.coordination.rows(shard).held() as lock:
        store.layout.storage.sweep(store.layout.partition_key(shard, slice_))
        if not store.ledger.partitions.get(shard, slice_).membership:
            raise DamagedError(f"the ledger doesn't know slice {slice_} of shard {shard} any more", hint=RESTORE)
        while (expected := store.ledger.partitions.get(shard, slice_)).dirty:
            _erase_once(store, expected, lock)
        remove_merged(store, shard, slice_)


def _erase_once(store: OpenStore, expected: Partition, lock: Held) -> None:
    shard, slice_ = expected.shard, expected.slice
    if expected.files:
        erase_files(store, expected, lock)
        return
    keys = shard_keys(store.keys.routing, shard)
    rows = read_partition(store.layout, store.recipe, keys, shard, slice_)
    known = {expected.membership, expected.next_membership}
    if rows.files > 1 or (rows.membership not in known and not is_older(store, rows, expected)):
        raise rows_damage(store, shard, slice_)
    if rows.membership == expected.next_membership:
        # Killed after the file was replaced and before that was written down. If it stayed so, a second kill
        # after the next preparation would leave rows on disk that the ledger expects no more.
        store.ledger.partitions.adopt_prepared(shard, slice_, membership=rows.membership, check=lock.check)
    on_disk = rows.membership
    keep_N, _ = _survivors(store, rows)
    remember_unseen(store, rows, ~keep_N)
    rows, keep_N = with_corrections(store, shard, slice_, rows, keep_N)
    left = membership(rows.id_digests_N16[keep_N], rows.content_digests_N16[keep_N])
    store.ledger.partitions.prepare_erasure(
        shard,
        slice_,
        records=int(keep_N.sum()),
        subjects=len(rows.table[SUBJECT].filter(pa.array(keep_N)).unique()),
        membership=left,
        check=lock.check,
    )
    if left != on_disk:
        lock.check()
        rewrite_partition(store.layout, shard, slice_, keep_N, rows)
    lock.check()  # else whoever holds it by now may have erased more, and this file is older than the ledger says
    store.ledger.partitions.finish_erasure(shard, slice_, changes=expected.changes, membership=left, check=lock.check)


def erase_restored(store: OpenStore) -> DamagedError | None:
    """Erase deleted people's rows that came back with an older file, where that leaves what the ledger expects.

    Returns:
        The first damage: rows that are unreadable, or others than the ledger expects.
    """
    damage: DamagedError | None = None
    for shard, slice_ in [(p.shard, p.slice) for p in store.ledger.partitions.all()]:
        with store.coordination.rows(shard).held() as lock:
            if (
                store.layout.remote
            ):  # versions that others made; an unfinished file in a folder is somebody's to look at
                store.layout.storage.sweep(store.layout.partition_key(shard, slice_))
            try:
                _erase_restored(store, store.ledger.partitions.get(shard, slice_), lock)
            except DamagedError as error:
                damage = damage or error
    return damage


def _erase_restored(store: OpenStore, expected: Partition, lock: Held) -> None:
    shard, slice_ = expected.shard, expected.slice
    rows = read_partition(store.layout, store.recipe, shard_keys(store.keys.routing, shard), shard, slice_)
    if expected.dirty or rows.membership == expected.membership:
        return  # what is dirty is settled, or has told why it can't be
    keep_N, left = _survivors(store, rows)
    if left != expected.membership:
        raise rows_damage(store, shard, slice_)
    lock.check()
    rewrite_partition(store.layout, shard, slice_, keep_N, rows)


def _survivors(store: OpenStore, rows: PartitionRows) -> tuple[NDArray[np.bool_], str]:
    """Tell which of N rows nobody asked to delete, and the membership of those."""
    exclusions = store.ledger.requests.exclusions().keys()
    keep_N = ~unwanted(store, rows, exclusions)
    return keep_N, membership(rows.id_digests_N16[keep_N], rows.content_digests_N16[keep_N])


def remove_replays(store: OpenStore) -> None:
    """Remove what a replay retrained, running or killed, and what somebody was killed removing."""
    store.layout.storage.remove_all(SCRATCH_KEY)
    sweep_temporary(store.layout.root)


def purge_shard(
    store: OpenStore, shard: int, *, first_stage: int, reporter: Reporter, request: Request | None = None
) -> None:
    """Remove the shard's tainted stages, and everything from ``first_stage`` on that nobody entered.

    Nothing happens if ``request``, for which it is done, was purged meanwhile by another process: what lies
    there unentered may by now be what its repair has just trained.
    """
    with contextlib.suppress(_OvertakenError), _shard_held(store, shard, reporter, request) as lock:
        if request is not None and _purged(store, request):
            return
        rows = store.ledger.stages.all(shard)
        clean = {(row.key, row.platform) for row in rows if not row.tainted}

        def keep(identity: StageId) -> bool:
            kept = identity.stage < first_stage or (identity.key, identity.platform) in clean
            if not kept:
                lock.check()  # whoever holds it by now may have trained, and entered, what we don't know
            return kept

        store.checkpoints.sweep(shard, keep=keep)
        for row in rows:
            if row.tainted:
                lock.check()
                store.checkpoints.remove(StageId(shard, row.stage, row.key, row.platform))
                store.ledger.stages.forget(row)


class _OvertakenError(Exception):
    """Another process did for a request what we waited to do."""


def _shard_held(
    store: OpenStore, shard: int, reporter: Reporter, request: Request | None
) -> AbstractContextManager[Held]:
    """Hold a shard's lock; whoever purged for the request meanwhile may train on, for as long as that takes."""
    told: list[bool] = []

    def waiting() -> None:
        if request is not None and _purged(store, request):
            raise _OvertakenError
        if not told:
            reporter.note(f"waiting for a running training to let go of shard {shard}")
            told.append(True)

    return store.coordination.shard(shard).held(poll=waiting)


def _purged(store: OpenStore, request: Request) -> bool:
    return STATES.index(store.ledger.requests.get(request.id).state) >= PURGED


def _clear_marks(store: OpenStore) -> None:
    """Take away the marks of requests that need none any more."""
    # Marks first, the ledger second: whoever marked has been accepted before, so that none of theirs is missed.
    marks = store.coordination.marks.all()
    needed = {r.id for r in store.ledger.requests.open() if STATES.index(r.state) < PURGED}
    for shard, request in marks:
        if request not in needed:
            store.coordination.marks.remove(shard, request)
