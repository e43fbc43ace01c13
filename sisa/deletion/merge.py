"""Corrected rows on their way into their slices.

They wait below a prefix that is called after their request, in partitions like a store's, from before the acceptance on.
A slice that a correction touches is dirty, and is rewritten as after a deletion: without what is excluded (people,
records, and what was superseded), and with the rows that wait for it, unless they are excluded by now. When it is
clean, what waited for it is removed. Each step can be repeated: a row that is merged already isn't merged again.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from sisa.ledger import Request, Waiting
from sisa.lineage import membership
from sisa.opening import OpenStore
from sisa.records.excluded import excluded_rows, superseded_rows
from sisa.records.names import RECORD, SUBJECT
from sisa.records.partition import PartitionRows
from sisa.records.waiting import read_waiting
from sisa.routing.keys import shard_keys


def unwanted(store: OpenStore, rows: PartitionRows, exclusions: Collection[tuple[str, bytes]]) -> NDArray[np.bool_]:
    """Mark, of N rows, those of deleted people and those that say what a correction superseded."""
    key = store.keys.exclusion
    gone_N = excluded_rows(rows.table[RECORD], rows.table[SUBJECT], exclusions, key)
    old_N = superseded_rows(rows.table[RECORD], rows.content_digests_N16, exclusions, key)
    marked_N: NDArray[np.bool_] = gone_N | old_N
    return marked_N


def with_corrections(
    store: OpenStore, shard: int, slice_: int, rows: PartitionRows, keep_N: NDArray[np.bool_]
) -> tuple[PartitionRows, NDArray[np.bool_]]:
    """Append the rows that wait for a slice; return all, and which of them stay. The rows' lock is held.

    Raises:
        DamagedError: Rows that wait are damaged.
    """
    for each in store.ledger.requests.waiting(shard, slice_):
        waiting = _waiting(store, each)
        there = set(rows.table[RECORD].filter(pa.array(keep_N)).to_pylist())
        wanted_N = ~unwanted(store, waiting, store.ledger.requests.exclusions().keys())
        wanted_N &= np.array([record not in there for record in waiting.table[RECORD].to_pylist()], np.bool_)
        rows, keep_N = _joined(rows, waiting), np.concatenate([keep_N, wanted_N])
    return rows, keep_N


def _waiting(store: OpenStore, waiting: Waiting) -> PartitionRows:
    return read_waiting(
        store.layout,
        store.recipe,
        shard_keys(store.keys.routing, waiting.shard),
        request=waiting.request,
        slice_=waiting.slice,
        records=waiting.records,
        membership=waiting.membership,
    )


def _joined(rows: PartitionRows, more: PartitionRows) -> PartitionRows:
    schema = pa.schema([_wider(one, other) for one, other in zip(rows.table.schema, more.table.schema, strict=True)])
    table = pa.concat_tables([rows.table.cast(schema), more.table.cast(schema)])
    ids_N16 = np.concatenate([rows.id_digests_N16, more.id_digests_N16])
    contents_N16 = np.concatenate([rows.content_digests_N16, more.content_digests_N16])
    return PartitionRows(table, ids_N16, contents_N16, membership(ids_N16, contents_N16))


def _wider(one: pa.Field, other: pa.Field) -> pa.Field:
    """Of the two types of a vector the wider."""
    return min(one, other, key=lambda f: str(f.type.value_type)) if pa.types.is_fixed_size_list(one.type) else one


def remove_merged(store: OpenStore, shard: int, slice_: int) -> None:
    """Remove what waited for a slice that is clean: it was merged, or is excluded. The rows' lock is held."""
    with store.ledger.database.snapshot():
        if store.ledger.partitions.get(shard, slice_).dirty:
            return
        merged = store.ledger.requests.merged(shard, slice_)
    for request in merged:
        place = store.layout.correction(request.id).partition_key(shard, slice_)
        store.layout.storage.remove_all(place)
        store.layout.storage.sweep_beside(place)  # half-removed by somebody who was killed


def remove_correction(store: OpenStore, request: Request) -> None:
    """Remove what waited because of a correction of which every row is merged."""
    if request.kind == "correction":
        place = store.layout.correction_key(request.id)
        store.layout.storage.remove_all(place)
        store.layout.storage.sweep_beside(place)
