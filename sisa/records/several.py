"""A slice of several files: who is in it, read without its rows, and one file at a time.

Shape suffixes: N records, 16 bytes of a digest.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pyarrow as pa

from sisa.layout import Layout
from sisa.lineage import membership
from sisa.recipe import Recipe
from sisa.records.digest import Digests, id_digests
from sisa.records.names import CONTENT, RECORD, SUBJECT
from sisa.records.partition import PartitionRows, file_numbers_of, partition_key, present
from sisa.records.rowfile import CONTENT_TYPE, damaged, encoded, read_table, rewriting, stored_digests, verified
from sisa.routing.keys import ShardKeys


class Part(NamedTuple):
    """Where one file lies."""

    shard: int
    slice: int
    number: int
    """0..of-1."""
    of: int
    """How many files the slice has."""


def read_heads(layout: Layout, keys: ShardKeys, slice_: int, of: int) -> PartitionRows:
    """Read who is in a slice of several files and the stored digests of what they say, not the rows themselves.

    Returns:
        Rows as they lie, with nothing but ids in their table. That contents fit their digests is not verified.

    Raises:
        DamagedError: A file is missing or unreadable, or its pages don't fit their checksums.
    """
    tables, numbers = [], []
    for number in range(of):
        key = partition_key(layout, keys.shard, slice_, number, of)
        table = present(key, read_table(layout.storage, key, columns=[RECORD, SUBJECT, CONTENT]))
        if table.schema.types != [pa.string(), pa.string(), CONTENT_TYPE]:
            raise damaged(key, "it has no columns of ids and digests")
        if any(table[name].null_count for name in table.column_names):
            raise damaged(key, "ids or digests are missing")
        numbers.append(file_numbers_of(keys, key, table, number, of))
        tables.append(table)
    whole = pa.concat_tables(tables)
    ids_N16, contents_N16 = id_digests(keys, whole[RECORD]), stored_digests(whole[CONTENT])
    digest = membership(ids_N16, contents_N16)
    return PartitionRows(whole.select([RECORD, SUBJECT]), ids_N16, contents_N16, digest, np.concatenate(numbers), of)


def read_file(layout: Layout, recipe: Recipe, keys: ShardKeys, part: Part) -> PartitionRows:
    """Read one of a slice's several files, and verify it as :func:`read_partition` does.

    Raises:
        DamagedError: The file is missing or unreadable, or a row isn't what was written.
    """
    key = partition_key(layout, *part)
    table = present(key, read_table(layout.storage, key))
    table, ids_N16, contents_N16 = verified(recipe, keys, key, table)
    number_N = file_numbers_of(keys, key, table, part.number, part.of)
    digest = membership(ids_N16, contents_N16)
    return PartitionRows(table.drop_columns([CONTENT]), ids_N16, contents_N16, digest, number_N, part.of)


def rewrite_file(layout: Layout, part: Part, table: pa.Table, contents_N16: Digests) -> None:
    """Durably replace one of a slice's several files; it stays there without rows too.

    Raises:
        StoreError: The file can't be written (a full disk, no permission); the old one is still there.
    """
    key = partition_key(layout, *part)
    content = encoded(table, contents_N16)
    with rewriting(key):
        layout.storage.put(key, content)
