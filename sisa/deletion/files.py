"""Erasing rows from a slice of several files: only those files are read as a whole, and written anew, that hold such rows.

Of the other files ids and digests are read, since the slice's membership covers them. What each file will hold is written
down before the first one is replaced. Killed in between, each file holds what was expected of it or what was prepared; which,
its own membership says. It is written down before anything else is prepared, so that any number of kills leaves
files that the ledger knows.

Shape suffix: N records of a slice.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from sisa.coordination import Held
from sisa.deletion.merge import read_waiting_rows, unwanted
from sisa.deletion.unseen import remember_unseen
from sisa.errors import DamagedError
from sisa.ledger import STATES, Partition
from sisa.lineage import membership
from sisa.opening import OpenStore
from sisa.records.excluded import excluded_rows
from sisa.records.names import RECORD, SUBJECT
from sisa.records.partition import PartitionRows
from sisa.records.parts import numbers_of
from sisa.records.rowfile import joined
from sisa.records.several import Part, read_file, read_heads, rewrite_file
from sisa.routing.keys import ShardKeys, shard_keys

Exclusions = Collection[tuple[str, bytes]]


@dataclass(frozen=True)
class _Arriving:
    """Corrected rows that wait for a slice and aren't in it yet."""

    table: pa.Table
    ids_N16: NDArray[np.uint8]
    contents_N16: NDArray[np.uint8]
    file_N: NDArray[np.int64]


def erase_files(store: OpenStore, expected: Partition, lock: Held) -> None:
    """Rewrite the files of one slice that hold excluded rows, or get corrected ones; its rows' lock is held.

    Raises:
        DamagedError: A file isn't what the ledger knows of it.
    """
    shard, slice_, of = expected.shard, expected.slice, len(expected.files)
    keys = shard_keys(store.keys.routing, shard)
    heads = read_heads(store.layout, keys, slice_, of)
    found = heads.by_file()
    _adopt(store, expected, heads, found, lock)
    exclusions = store.ledger.requests.exclusions().keys()
    keep_N = ~unwanted(store, heads, exclusions)
    remember_unseen(store, heads, ~keep_N)
    arriving = _arriving(store, keys, slice_, heads.table[RECORD].filter(pa.array(keep_N)), exclusions)
    assert heads.file_N is not None
    touched = np.union1d(heads.file_N[~keep_N], [n for rows in arriving for n in rows.file_N]).astype(int).tolist()
    left_ids = np.concatenate([heads.id_digests_N16[keep_N], *(rows.ids_N16 for rows in arriving)])
    left_contents = np.concatenate([heads.content_digests_N16[keep_N], *(rows.contents_N16 for rows in arriving)])
    people = [heads.table[SUBJECT].filter(pa.array(keep_N)), *(rows.table[SUBJECT] for rows in arriving)]
    left = membership(left_ids, left_contents)
    store.ledger.partitions.prepare_erasure(
        shard,
        slice_,
        records=len(left_ids),
        subjects=len(pa.chunked_array([c for column in people for c in column.chunks], pa.string()).unique()),
        membership=left,
        files={number: _left_in(heads, keep_N, arriving, number) for number in touched},
        check=lock.check,
    )
    for number in touched:
        rows = read_file(store.layout, store.recipe, keys, Part(shard, slice_, number, of))
        if rows.membership != found[number][1]:
            raise rows_damage(store, shard, slice_)
        stay_N = ~unwanted(store, rows, exclusions)
        new = [(part.table.filter(pa.array(part.file_N == number)), part) for part in arriving]
        table = joined([rows.table.filter(pa.array(stay_N)), *(table for table, _ in new)])
        contents = [part.contents_N16[part.file_N == number] for _, part in new]
        lock.check()
        rewrite_file(
            store.layout,
            Part(shard, slice_, number, of),
            table,
            np.concatenate([rows.content_digests_N16[stay_N], *contents]),
        )
    lock.check()  # else whoever holds it by now may have erased more, and these files are older than the ledger says
    store.ledger.partitions.finish_erasure(shard, slice_, changes=expected.changes, membership=left, check=lock.check)


def _adopt(
    store: OpenStore, expected: Partition, heads: PartitionRows, found: tuple[tuple[int, str], ...], lock: Held
) -> None:
    """Make sure that each file is one that the ledger knows, and write down which were replaced by somebody who was killed.

    Raises:
        DamagedError: One isn't.
    """
    known = all(digest in file.memberships for (_, digest), file in zip(found, expected.files, strict=True))
    if not known and not is_older(store, heads, expected):
        raise rows_damage(store, expected.shard, expected.slice)
    if heads.membership == expected.next_membership:
        store.ledger.partitions.adopt_prepared(
            expected.shard, expected.slice, membership=heads.membership, check=lock.check
        )
        return
    done = [n for n, file in enumerate(expected.files) if file.next_membership == found[n][1]]
    if done:
        store.ledger.partitions.adopt_files(expected.shard, expected.slice, done, check=lock.check)


def _arriving(
    store: OpenStore, keys: ShardKeys, slice_: int, present: pa.ChunkedArray, exclusions: Exclusions
) -> list[_Arriving]:
    """Read the corrected rows that wait for a slice, but for those that are excluded by now or in it already.

    Args:
        store: The store.
        keys: Of the shard.
        slice_: The slice.
        present: Ids of the records that stay.
        exclusions: What is excluded.

    Raises:
        DamagedError: Rows that wait are damaged.
    """
    arriving: list[_Arriving] = []
    of = len(store.ledger.partitions.get(keys.shard, slice_).files)
    for each in store.ledger.requests.waiting(keys.shard, slice_):
        rows = read_waiting_rows(store, each)
        there = pa.chunked_array([*present.chunks, *(c for a in arriving for c in a.table[RECORD].chunks)], pa.string())
        wanted_N = ~unwanted(store, rows, exclusions)
        wanted_N &= ~pc.is_in(rows.table[RECORD], value_set=there.combine_chunks()).to_numpy()
        if wanted_N.any():
            table = rows.table.filter(pa.array(wanted_N))
            file_N = numbers_of(keys, table[SUBJECT], of)
            arriving.append(_Arriving(table, rows.id_digests_N16[wanted_N], rows.content_digests_N16[wanted_N], file_N))
    return arriving


def _left_in(
    heads: PartitionRows, keep_N: NDArray[np.bool_], arriving: list[_Arriving], number: int
) -> tuple[int, str]:
    """Return number and membership of the records that a file will hold."""
    assert heads.file_N is not None
    in_N = keep_N & (heads.file_N == number)
    ids = [heads.id_digests_N16[in_N], *(rows.ids_N16[rows.file_N == number] for rows in arriving)]
    contents = [heads.content_digests_N16[in_N], *(rows.contents_N16[rows.file_N == number] for rows in arriving)]
    left = np.concatenate(ids)
    return len(left), membership(left, np.concatenate(contents))


def is_older(store: OpenStore, rows: PartitionRows, expected: Partition) -> bool:
    """Whether these are the expected (or the prepared) rows and, with an older file, deleted people's that were erased before.

    Of the requests that wait for this slice, some may have been erased from it already, the oldest first.
    """
    place = (expected.shard, expected.slice)
    waiting = [r.id for r in store.ledger.requests.open() if r.state == STATES[0] and place in r.places]
    exclusions = store.ledger.requests.exclusions()
    for first in range(len(waiting) + 1):
        due = set(waiting[first:])
        erased = {pair for pair, request in exclusions.items() if request not in due}
        keep_N = ~excluded_rows(rows.table[RECORD], rows.table[SUBJECT], erased, store.keys.exclusion)
        left = membership(rows.id_digests_N16[keep_N], rows.content_digests_N16[keep_N])
        if left in {expected.membership, expected.next_membership}:
            return True
    return False


def rows_damage(store: OpenStore, shard: int, slice_: int) -> DamagedError:
    """Return the error that says that a slice holds other rows than the ledger expects."""
    folder = store.layout.partition_key(shard, slice_)
    return DamagedError(
        f"the rows of shard {shard}, slice {slice_} are not those that the ledger expects",
        hint=f"Restore the files under {folder} from a copy, then run `sisa repair`.",
    )
