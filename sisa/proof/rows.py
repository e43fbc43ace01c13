"""Checking the rows of one shard: placed by the key, nobody excluded among them, content and counts as recorded."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import pyarrow as pa

from sisa.layout import HOLDOUT_SLICE
from sisa.ledger import Partition
from sisa.opening import OpenStore
from sisa.proof.problems import guarded, slice_name
from sisa.records.excluded import excluded_rows, superseded_rows
from sisa.records.names import RECORD, SUBJECT
from sisa.records.partition import PartitionRows, read_partition
from sisa.routing.keys import shard_keys


@dataclass(frozen=True)
class SliceRows:
    """What lies on disk for one slice."""

    records: int
    excluded: int
    """How many of these are deleted people's."""
    lacking: int
    """How many more the ledger expects."""
    membership: str


def check_rows(store: OpenStore, shard: int) -> tuple[list[str], dict[int, SliceRows | None]]:
    """Return what is wrong with a shard's rows, and what each of its slices holds (None: unreadable)."""
    problems: list[str] = []
    found: dict[int, SliceRows | None] = {}
    for slice_ in store.all_slices:
        found[slice_] = None
        problems += guarded(partial(_check_slice, store, shard, slice_, found), slice_name(shard, slice_))
    return problems, found


def _check_slice(store: OpenStore, shard: int, slice_: int, found: dict[int, SliceRows | None]) -> list[str]:
    """Return what is wrong with one slice, and note in ``found`` what it holds.

    Raises:
        DamagedError: It is unreadable.
    """
    expected, rows = _read(store, shard, slice_)
    excluded = _excluded(store, rows)
    faults = _uncounted(expected, rows)
    lacking = max(expected.records - len(rows.table), 0) if faults else 0
    found[slice_] = SliceRows(len(rows.table), excluded, lacking, rows.membership)
    exclusions = store.ledger.requests.exclusions().keys()
    old = superseded_rows(rows.table[RECORD], rows.content_digests_N16, exclusions, store.keys.exclusion)
    if old.any():
        faults.append(f"{int(old.sum())} rows that say what a correction superseded")
    if excluded:
        faults.append(f"{excluded} rows of deleted people")
    faults += _misplaced(store, shard, slice_, rows)
    return [f"{slice_name(shard, slice_)}: {fault}" for fault in faults]


def _read(store: OpenStore, shard: int, slice_: int) -> tuple[Partition, PartitionRows]:
    """Read a slice, and what the ledger expects of it at that moment: an erasure may be going on."""
    keys = shard_keys(store.keys.routing, shard)
    while True:
        expected = store.ledger.partitions.get(shard, slice_)
        rows = read_partition(store.layout, store.recipe, keys, shard, slice_)
        if store.ledger.partitions.get(shard, slice_) == expected:
            return expected, rows


def _uncounted(expected: Partition, rows: PartitionRows) -> list[str]:
    records, subjects = len(rows.table), len(rows.table[SUBJECT].unique())
    if faults := _other_files(expected, rows):
        return faults
    if expected.dirty and expected.files:
        return []  # killed between the replacements of two files: each of them is one that the ledger knows
    if expected.dirty and rows.membership == expected.next_membership:
        return []  # killed between the file's replacement and the ledger's line about it
    if rows.membership != expected.membership:
        if records == expected.records:
            return [f"{records} rows, but others than the ledger expects"]
        return [f"{records} rows, not the {expected.records} that the ledger expects"]
    if (records, subjects) != (expected.records, expected.subjects):
        return [
            f"{records} rows of {subjects} people, not {expected.records} of {expected.subjects} as the ledger counts"
        ]
    return []


def _other_files(expected: Partition, rows: PartitionRows) -> list[str]:
    """Hold each of several files against the ledger's line about it."""
    found = rows.by_file()
    if len(found) != len(expected.files):
        counts = [f"{len(files)} files" if files else "a single file" for files in (found, expected.files)]
        return [f"{counts[0]}, but {counts[1]} in the ledger"] if rows.table.num_rows or expected.files else []
    faults = []
    for number, ((records, digest), file) in enumerate(zip(found, expected.files, strict=True)):
        if expected.dirty and digest == file.next_membership:
            continue
        if records != file.records:
            faults.append(f"file {number} has {records} rows, not the {file.records} that the ledger expects")
        elif digest != file.membership:
            faults.append(f"file {number} has {records} rows, but others than the ledger expects")
    return faults


def _excluded(store: OpenStore, rows: PartitionRows) -> int:
    exclusions = store.ledger.requests.exclusions().keys()
    return int(excluded_rows(rows.table[RECORD], rows.table[SUBJECT], exclusions, store.keys.exclusion).sum())


def _misplaced(store: OpenStore, shard: int, slice_: int, rows: PartitionRows) -> list[str]:
    if not len(rows.table):
        return []
    subjects = rows.table[SUBJECT].combine_chunks()
    subjects = subjects if isinstance(subjects, pa.Array) else pa.concat_arrays(subjects.chunks)
    routes = store.router.route(subjects)
    misplaced = routes.shard_N != shard
    if slice_ < HOLDOUT_SLICE:  # of a generation it is its place in time that says the slice
        misplaced |= routes.slice_N != HOLDOUT_SLICE
    elif slice_ > store.recipe.sisa.slices:
        misplaced |= routes.slice_N == HOLDOUT_SLICE
    elif slice_ != HOLDOUT_SLICE or store.recipe.data.holdout.source is None:
        misplaced |= routes.slice_N != slice_
    return [f"{int(misplaced.sum())} rows that the routing key places elsewhere"] if misplaced.any() else []
