"""The rows of one slice: a Parquet file, or several, each written whole or not at all, verified on each read.

Invariants:

* A partition is ``part-00000.parquet`` in its folder, or nothing if it has no rows; or, if it was large when it was
  written, a number of files (:mod:`sisa.records.parts`), all of which are there. Rows leave a file in one durable
  replacement: only the old or the new content of it can ever be read.
* What is read of a file is verified (:mod:`sisa.records.rowfile`).
* Rows come back in canonical order, however they lie in the file.

Shape suffixes: N records, 16 bytes of a digest.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from sisa.layout import Layout
from sisa.lineage import canonical_order, membership
from sisa.recipe import Recipe
from sisa.records.digest import DIGEST_BYTES, Digests
from sisa.records.names import CONTENT, RECORD, SUBJECT
from sisa.records.parts import complete, file_name, numbers_of
from sisa.records.rowfile import (
    CONTENT_TYPE,
    damaged,
    encoded,
    joined,
    no_rows,
    read_table,
    rewriting,
    stored_digests,
    verified,
)
from sisa.routing.keys import ShardKeys


@dataclass(frozen=True)
class PartitionRows:
    """The verified rows of one slice, in canonical order."""

    table: pa.Table
    """N canonical records: ids, features, label."""
    id_digests_N16: Digests
    content_digests_N16: Digests
    membership: str
    """Digest of who is in the slice and what their records say."""
    file_N: NDArray[np.int64] | None = None
    """In which file each record lies, if there are several."""
    files: int = 1
    """How many files the slice has."""

    def by_file(self) -> tuple[tuple[int, str], ...]:
        """Return number of records and membership of each file, if there are several."""
        if self.file_N is None:
            return ()
        found = []
        for number in range(self.files):
            in_N = self.file_N == number
            found.append((int(in_N.sum()), membership(self.id_digests_N16[in_N], self.content_digests_N16[in_N])))
        return tuple(found)


def partition_file(layout: Layout, shard: int, slice_: int, number: int = 0, of: int = 1) -> Path:
    """Return the path of a file with a partition's rows, in a local store."""
    return layout.partition(shard, slice_) / file_name(number, of)


def partition_key(layout: Layout, shard: int, slice_: int, number: int = 0, of: int = 1) -> str:
    """Return the key of a file with a partition's rows."""
    return f"{layout.partition_key(shard, slice_)}/{file_name(number, of)}"


def read_partition(layout: Layout, recipe: Recipe, keys: ShardKeys, shard: int, slice_: int) -> PartitionRows:
    """Read a slice and verify checksums, schema and the content of every row.

    Which rows should be there, this can't know: compare ``membership`` with the ledger's.

    Args:
        layout: The store.
        recipe: Its resolved recipe.
        keys: Keys of ``shard``.
        shard: 0..S-1.
        slice_: 1..R, or 0 for the shard's part of the holdout.

    Raises:
        DamagedError: The file is unreadable, or a row isn't what was written.
    """
    files = _files(layout, shard, slice_)
    if not files:
        empty = np.empty((0, DIGEST_BYTES), np.uint8)
        return PartitionRows(no_rows(recipe), empty, empty, membership(empty, empty))
    parts = [
        (*verified(recipe, keys, key, table), file_numbers_of(keys, key, table, number, len(files)))
        for number, (key, table) in enumerate(files)
    ]
    ids_N16 = np.concatenate([ids for _, ids, _, _ in parts])
    contents_N16 = np.concatenate([contents for _, _, contents, _ in parts])
    order = canonical_order(ids_N16)
    ids_N16, contents_N16 = ids_N16[order], contents_N16[order]
    whole = joined([table.drop_columns([CONTENT]) for table, _, _, _ in parts])
    return PartitionRows(
        whole.take(pa.array(order)).combine_chunks(),
        ids_N16,
        contents_N16,
        membership(ids_N16, contents_N16),
        np.concatenate([number_N for _, _, _, number_N in parts])[order] if len(parts) > 1 else None,
        len(parts),
    )


def present_ids(
    layout: Layout, shard: int, slice_: int, *, file: tuple[int, int] | None = None
) -> tuple[pa.StringArray, pa.StringArray]:
    """Read only who is in a slice: N record ids and N subject ids.

    Args:
        layout: The store.
        shard: 0..S-1.
        slice_: Which slice.
        file: Which of how many files to look into; by default into all that there are.

    Raises:
        DamagedError: A file is unreadable, or its pages don't fit their checksums.
    """
    found = _columns(layout, shard, slice_, {RECORD: pa.string(), SUBJECT: pa.string()}, file=file)
    return _whole(found, RECORD, pa.string()), _whole(found, SUBJECT, pa.string())


def present_contents(layout: Layout, shard: int, slice_: int) -> tuple[pa.StringArray, Digests]:
    """Read which records are in a slice, and the stored digests of what they say, without recomputing them.

    Raises:
        DamagedError: A file is unreadable, or its pages don't fit their checksums.
    """
    found = _columns(layout, shard, slice_, {RECORD: pa.string(), CONTENT: CONTENT_TYPE})
    digests = [stored_digests(table[CONTENT]) for table in found]
    return _whole(found, RECORD, pa.string()), np.concatenate([np.empty((0, DIGEST_BYTES), np.uint8), *digests])


def _columns(
    layout: Layout, shard: int, slice_: int, types: dict[str, pa.DataType], *, file: tuple[int, int] | None = None
) -> list[pa.Table]:
    names = list(types)
    if file is not None:
        key = partition_key(layout, shard, slice_, *file)
        files = [(key, present(key, read_table(layout.storage, key, names)))]
    else:
        files = _files(layout, shard, slice_, names)
    for key, table in files:
        if table.schema.names != names or table.schema.types != list(types.values()):
            raise damaged(
                key, "it has no columns of ids" if CONTENT not in types else "it has no columns of ids and digests"
            )
        if any(table[name].null_count for name in names):
            raise damaged(key, "ids or digests are missing")
    return [table for _, table in files]


def _whole(tables: list[pa.Table], name: str, type_: pa.DataType) -> pa.Array:
    return pa.concat_arrays([*(chunk for table in tables for chunk in table[name].chunks), pa.array([], type_)])


def _files(layout: Layout, shard: int, slice_: int, columns: list[str] | None = None) -> list[tuple[str, pa.Table]]:
    """Read every file of a slice: most have one, and then nothing is listed."""
    key = partition_key(layout, shard, slice_)
    table = read_table(layout.storage, key, columns)
    if table is not None:
        return [(key, table)]
    keys = several_keys(layout, shard, slice_)
    return [(key, present(key, read_table(layout.storage, key, columns))) for key in keys]


def rewrite_partition(layout: Layout, shard: int, slice_: int, keep_N: NDArray[np.bool_], rows: PartitionRows) -> None:
    """Durably replace a slice's file by one without the rows that aren't kept; of several, those that hold such rows.

    Killed at any instant it leaves the old or the new content of each file. Hold the rows' lock, and sweep the folder's
    temporary files before: those of a killed rewrite hold people's rows.

    Args:
        layout: The store.
        shard: 0..S-1.
        slice_: 1..R, or 0 for the holdout.
        keep_N: Which of ``rows`` stay.
        rows: What :func:`read_partition` gave.

    Raises:
        ValueError: ``keep_N`` isn't as long as ``rows``.
        StoreError: The file can't be written (a full disk, no permission); the old one is still there.
    """
    if keep_N.shape != (rows.table.num_rows,):
        raise ValueError(f"{rows.table.num_rows} rows, but {keep_N.shape} decisions")
    if rows.file_N is None and not keep_N.any():
        layout.storage.remove(partition_key(layout, shard, slice_))
        return
    file_N = np.zeros(len(keep_N), np.int64) if rows.file_N is None else rows.file_N
    for number in [0] if rows.file_N is None else np.unique(file_N[~keep_N]).tolist():
        kept_N = keep_N & (file_N == number)
        content = encoded(rows.table.filter(pa.array(kept_N)), rows.content_digests_N16[kept_N])
        key = partition_key(layout, shard, slice_, number, rows.files)
        with rewriting(key):
            layout.storage.put(key, content)


def several_keys(layout: Layout, shard: int, slice_: int) -> list[str]:
    """Return the keys of a slice's files, in order, if it has several; else none.

    Raises:
        DamagedError: One of them is missing.
    """
    folder = layout.partition_key(shard, slice_)
    names, problem = complete(key.rpartition("/")[2] for key in layout.storage.keys(folder))
    if problem:
        raise damaged(f"{folder}/*", problem)
    return [f"{folder}/{name}" for name in names]


def file_numbers_of(keys: ShardKeys, key: str, table: pa.Table, number: int, of: int) -> NDArray[np.int64]:
    """Return the file's number for each row, having made sure that the key places them there."""
    if of > 1:
        try:
            placed = bool((numbers_of(keys, table[SUBJECT], of) == number).all())
        except ValueError as error:
            raise damaged(key, "ids are missing") from error
        if not placed:
            raise damaged(key, "it holds rows that belong into another file")
    return np.full(table.num_rows, number, np.int64)


def present(key: str, table: pa.Table | None) -> pa.Table:
    """Return a table.

    Raises:
        DamagedError: Its file is missing.
    """
    if table is None:
        raise damaged(key, "it is missing")
    return table
