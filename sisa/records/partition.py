"""The rows of one slice: one Parquet file, written whole or not at all, verified on each read.

Invariants:

* A partition is ``part-00000.parquet`` in its folder, or nothing if it has no rows. One file, so that rows
  leave it in one durable replacement, and only the old or the new membership can ever be read.
* Pages carry checksums that are verified; every row carries the keyed digest of its content, which is
  recomputed. A damaged row is an error with a name, never trained on as if it were a correction.
* The whole file carries a seal (:mod:`sisa.records.seal`), which is verified when all of its rows are read.
* No statistics are written: a file says nothing about its rows outside checked pages.
* Rows come back in canonical order, however they lie in the file.

Shape suffixes: N records, 16 bytes of a digest.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as papq
from numpy.typing import NDArray

from sisa.errors import DamagedError, StoreError
from sisa.layout import RECORDS_KEY, Layout, all_slices
from sisa.lineage import canonical_order, membership
from sisa.recipe import Recipe
from sisa.records.digest import DIGEST_BYTES, Digests, content_digests, id_digests
from sisa.records.names import CONTENT, LABEL, RECORD, SUBJECT
from sisa.records.seal import check_seal, seal
from sisa.routing.keys import ShardKeys
from sisa.storage import Storage

FILE = "part-00000.parquet"
_CONTENT_TYPE = pa.binary(DIGEST_BYTES)


@dataclass(frozen=True)
class PartitionRows:
    """The verified rows of one slice, in canonical order."""

    table: pa.Table
    """N canonical records: ids, features, label."""
    id_digests_N16: Digests
    content_digests_N16: Digests
    membership: str
    """Digest of who is in the slice and what their records say."""


def partition_file(layout: Layout, shard: int, slice_: int) -> Path:
    """Return the path of the file with a partition's rows, in a local store."""
    return layout.partition(shard, slice_) / FILE


def partition_key(layout: Layout, shard: int, slice_: int) -> str:
    """Return the key of the file with a partition's rows."""
    return f"{layout.partition_key(shard, slice_)}/{FILE}"


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
    key = partition_key(layout, shard, slice_)
    table = _read(layout.storage, key)
    if table is None:
        empty = np.empty((0, DIGEST_BYTES), np.uint8)
        return PartitionRows(_no_rows(recipe), empty, empty, membership(empty, empty))
    problem = _schema_problem(table.schema, recipe)
    if problem:
        raise _damaged(key, problem)
    try:
        ids_N16 = id_digests(keys, table[RECORD])
        contents_N16 = content_digests(keys, table, recipe)
        stored_N16 = _stored_digests(table[CONTENT])
    except (pa.ArrowException, ValueError, IndexError) as error:
        raise _damaged(key, "its rows can't be decoded") from error
    if not np.array_equal(contents_N16, stored_N16):
        raise _damaged(key, "the content of a row is not what was written")
    order = canonical_order(ids_N16)
    ids_N16, contents_N16 = ids_N16[order], contents_N16[order]
    ordered = table.drop_columns([CONTENT]).take(pa.array(order)).combine_chunks()
    return PartitionRows(ordered, ids_N16, contents_N16, membership(ids_N16, contents_N16))


def present_ids(layout: Layout, shard: int, slice_: int) -> tuple[pa.StringArray, pa.StringArray]:
    """Read only who is in a slice: N record ids and N subject ids.

    Raises:
        DamagedError: The file is unreadable, or its pages don't fit their checksums.
    """
    key = partition_key(layout, shard, slice_)
    table = _read(layout.storage, key, columns=[RECORD, SUBJECT])
    if table is None:
        return pa.array([], pa.string()), pa.array([], pa.string())
    if table.schema.names != [RECORD, SUBJECT] or any(type_ != pa.string() for type_ in table.schema.types):
        raise _damaged(key, "it has no columns of ids")
    records, subjects = (
        pa.concat_arrays([*table[name].chunks, pa.array([], pa.string())]) for name in (RECORD, SUBJECT)
    )
    if records.null_count or subjects.null_count:
        raise _damaged(key, "ids are missing")
    return records, subjects


def present_contents(layout: Layout, shard: int, slice_: int) -> tuple[pa.StringArray, Digests]:
    """Read which records are in a slice, and the stored digests of what they say, without recomputing them.

    Raises:
        DamagedError: The file is unreadable, or its pages don't fit their checksums.
    """
    key = partition_key(layout, shard, slice_)
    table = _read(layout.storage, key, columns=[RECORD, CONTENT])
    if table is None:
        return pa.array([], pa.string()), np.empty((0, DIGEST_BYTES), np.uint8)
    if table.schema.names != [RECORD, CONTENT] or table.schema.types != [pa.string(), _CONTENT_TYPE]:
        raise _damaged(key, "it has no columns of ids and digests")
    return pa.concat_arrays([*table[RECORD].chunks, pa.array([], pa.string())]), _stored_digests(table[CONTENT])


def rewrite_partition(layout: Layout, shard: int, slice_: int, keep_N: NDArray[np.bool_], rows: PartitionRows) -> None:
    """Durably replace a slice's file by one without the rows that aren't kept.

    Killed at any instant it leaves the old or the new file. Hold the rows' lock, and sweep the folder's
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
    key = partition_key(layout, shard, slice_)
    if not keep_N.any():
        layout.storage.remove(key)
        return
    kept = with_contents(rows.table.filter(pa.array(keep_N)), rows.content_digests_N16[keep_N])
    file = io.BytesIO()
    write_rows(file, [kept])
    try:
        layout.storage.put(key, file.getbuffer())
    except OSError as error:
        raise StoreError(
            f"partition {_name(key)!r} can't be rewritten: {error.strerror or error}",
            hint="Make room or give permission, then run `sisa repair`: until then the old rows are still there.",
        ) from error


def with_contents(table: pa.Table, contents_N16: Digests) -> pa.Table:
    """Append the column of content digests."""
    buffer = pa.py_buffer(np.ascontiguousarray(contents_N16))
    return table.append_column(
        CONTENT, pa.FixedSizeBinaryArray.from_buffers(_CONTENT_TYPE, len(contents_N16), [None, buffer])
    )


def write_rows(file: Path | BinaryIO, tables: Iterable[pa.Table]) -> None:
    """Write tables of one schema, each as row groups of a sealed file. Not durable by itself."""
    writer: papq.ParquetWriter | None = None
    try:
        for table in tables:
            if writer is None:
                texts = [field.name for field in table.schema if pa.types.is_string(field.type)]
                writer = papq.ParquetWriter(
                    file,
                    table.schema,
                    compression="zstd",
                    use_dictionary=[name for name in texts if name not in {RECORD, SUBJECT}],
                    write_statistics=False,
                    write_page_checksum=True,
                    use_compliant_nested_type=False,
                )
            writer.write_table(table)
    finally:
        if writer is not None:
            writer.close()
    if writer is not None:
        seal(file)


def stray_files(layout: Layout, shards: int, slices: int, *, generations: int = 0) -> list[Path]:
    """List everything under the records that is no part of a local store with so many shards and slices."""
    numbers = all_slices(slices=slices, generations=generations)
    expected = {partition_file(layout, shard, slice_) for shard in range(shards) for slice_ in numbers}
    folders = {folder for path in expected for folder in path.parents}
    return sorted(path for path in _walk(layout.records) if path not in expected and path not in folders)


def stray_keys(layout: Layout, shards: int, slices: int, *, generations: int = 0) -> list[str]:
    """List every key under the records that is no part of a store with so many shards and slices."""
    numbers = all_slices(slices=slices, generations=generations)
    expected = {partition_key(layout, shard, slice_) for shard in range(shards) for slice_ in numbers}
    return [key for key in layout.storage.keys(RECORDS_KEY) if key not in expected]


def _walk(folder: Path) -> Iterator[Path]:
    for path, folders, files in os.walk(folder):
        yield from (Path(path, name) for name in [*folders, *files])


def _read(storage: Storage, key: str, columns: list[str] | None = None) -> pa.Table | None:
    """Read a partition's file with its checksums verified; None if there is none: it holds no rows."""
    try:
        with storage.opened(key) as stream:
            if columns is None:  # who reads two columns of all slices can't wait for the rest of their bytes
                check_seal(stream)
            with papq.ParquetFile(stream, page_checksum_verification=True, pre_buffer=False) as file:
                table = file.read(columns=columns, use_threads=False)
        table.validate(full=True)
    except FileNotFoundError:  # also if its last rows were erased this very moment
        return None
    except (pa.ArrowException, OSError, ValueError, KeyError, MemoryError, OverflowError) as error:
        raise _damaged(key, "it is unreadable, or its bytes don't fit its checksums") from error
    return table


def _stored_digests(column: pa.ChunkedArray) -> Digests:
    array = pa.concat_arrays([*column.chunks, pa.array([], _CONTENT_TYPE)])
    if array.null_count:
        raise ValueError("a digest is missing")
    buffer = array.buffers()[1]
    digests = np.frombuffer(buffer, np.uint8) if buffer is not None else np.empty(0, np.uint8)
    start = array.offset * DIGEST_BYTES
    return digests[start : start + len(array) * DIGEST_BYTES].reshape(-1, DIGEST_BYTES)


def _expected_types(recipe: Recipe) -> dict[str, set[pa.DataType]]:
    types: dict[str, set[pa.DataType]] = {RECORD: {pa.string()}, SUBJECT: {pa.string()}}
    for name, spec in recipe.data.columns.items():
        if spec.type == "vector":
            types[name] = {pa.list_(number, spec.size or 0) for number in (pa.float32(), pa.uint8())}
        else:
            types[name] = {pa.float64() if spec.type == "numeric" else pa.string()}
    return {**types, LABEL: {pa.int32()}, CONTENT: {_CONTENT_TYPE}}


def _schema_problem(schema: pa.Schema, recipe: Recipe) -> str:
    expected = _expected_types(recipe)
    if schema.names != list(expected):
        return "its columns are not those of the recipe"
    wrong = [field.name for field in schema if not any(_same(field.type, type_) for type_ in expected[field.name])]
    return f"column {wrong[0]!r} is of type {schema.field(wrong[0]).type}" if wrong else ""


def _same(one: pa.DataType, other: pa.DataType) -> bool:
    """Compare types; the name that a file gives to a list's elements means nothing."""
    if pa.types.is_fixed_size_list(one) and pa.types.is_fixed_size_list(other):
        return bool(one.list_size == other.list_size and one.value_type == other.value_type)
    return bool(one == other)


def _no_rows(recipe: Recipe) -> pa.Table:
    # Of the two types of a vector the wider: concatenated with other slices it then changes nothing.
    chosen = {name: min(kinds, key=str) for name, kinds in _expected_types(recipe).items() if name != CONTENT}
    return pa.table({name: pa.array([], type_) for name, type_ in chosen.items()})


def _name(key: str) -> str:
    return "/".join(key.split("/")[-3:])


def _damaged(key: str, reason: str) -> DamagedError:
    return DamagedError(
        f"partition {_name(key)!r} is damaged: {reason}",
        hint="Rows can't be retrained: restore the file from a copy, then run `sisa repair`.",
    )
