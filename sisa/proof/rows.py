"""Checking the rows of one shard: placed by the key, nobody excluded among them, content as recorded."""

from __future__ import annotations

import pyarrow as pa

from sisa.errors import SisaError
from sisa.files import TEMPORARY
from sisa.layout import HOLDOUT_SLICE
from sisa.ledger import Partition
from sisa.opening import OpenStore
from sisa.records.excluded import excluded_rows
from sisa.records.names import RECORD, SUBJECT
from sisa.records.partition import PartitionRows, read_partition, stray_files
from sisa.routing.keys import shard_keys


def check_rows(store: OpenStore, shard: int) -> tuple[list[str], list[str | None]]:
    """Return what is wrong with a shard's rows, and the memberships of slices 1..R (None: unreadable)."""
    problems: list[str] = []
    memberships: list[str | None] = []
    keys = shard_keys(store.keys.routing, shard)
    if shard == 0:
        for path in stray_files(store.layout, store.shards, store.slices):
            kind = "unfinished" if path.name.startswith(TEMPORARY) else "unknown"
            problems.append(f"{path.relative_to(store.layout.root)}: {kind} file among the records")
    for slice_ in range(store.slices + 1):
        where = "holdout" if slice_ == HOLDOUT_SLICE else f"slice {slice_}"
        try:
            rows = read_partition(store.layout, store.recipe, keys, shard, slice_)
        except SisaError as error:
            problems.append(error.message)
            memberships.append(None)
            continue
        problems += [f"shard {shard}, {where}: {text}" for text in _faults(store, shard, slice_, rows)]
        memberships.append(rows.membership)
    return problems, memberships[1:]


def _faults(store: OpenStore, shard: int, slice_: int, rows: PartitionRows) -> list[str]:
    faults: list[str] = []
    expected: Partition = store.ledger.partitions.get(shard, slice_)
    if rows.membership != expected.membership:
        faults.append(f"{len(rows.table)} rows, not the {expected.records} that the ledger expects")
    exclusions = store.ledger.requests.exclusions()
    excluded = excluded_rows(rows.table[RECORD], rows.table[SUBJECT], exclusions.keys(), store.keys.exclusion)
    if excluded.any():
        faults.append(f"{int(excluded.sum())} rows of deleted people")
    if len(rows.table):
        subjects = rows.table[SUBJECT].combine_chunks()
        subjects = subjects if isinstance(subjects, pa.Array) else pa.concat_arrays(subjects.chunks)
        routes = store.router.route(subjects)
        misplaced = routes.shard_N != shard
        if slice_ != HOLDOUT_SLICE or store.recipe.data.holdout.source is None:
            misplaced |= routes.slice_N != slice_
        if misplaced.any():
            faults.append(f"{int(misplaced.sum())} rows that the routing key places elsewhere")
    return faults
