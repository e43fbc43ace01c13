"""One file of rows: Parquet, sealed, with a keyed digest of each row's content, verified when it is read.

Invariants:

* Pages carry checksums that are verified; every row carries the keyed digest of its content, which is
  recomputed. A damaged row is an error with a name, never trained on as if it were a correction.
* The whole file carries a seal (:mod:`sisa.records.seal`), which is verified when all of its rows are read.
* No statistics are written: a file says nothing about its rows outside checked pages.

Shape suffixes: N records, 16 bytes of a digest.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as papq

from sisa.errors import DamagedError, StoreError
from sisa.recipe import Recipe
from sisa.records.digest import DIGEST_BYTES, Digests, content_digests, id_digests
from sisa.records.names import CONTENT, LABEL, RECORD, SUBJECT
from sisa.records.seal import check_seal, seal
from sisa.routing.keys import ShardKeys
from sisa.storage import Storage

CONTENT_TYPE = pa.binary(DIGEST_BYTES)


def with_contents(table: pa.Table, contents_N16: Digests) -> pa.Table:
    """Append the column of content digests."""
    buffer = pa.py_buffer(np.ascontiguousarray(contents_N16))
    return table.append_column(
        CONTENT, pa.FixedSizeBinaryArray.from_buffers(CONTENT_TYPE, len(contents_N16), [None, buffer])
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


def encoded(table: pa.Table, contents_N16: Digests) -> memoryview:
    """Return a file with some rows and the digests of their contents."""
    file = io.BytesIO()
    write_rows(file, [with_contents(table, contents_N16)])
    return file.getbuffer()


@contextlib.contextmanager
def rewriting(key: str) -> Iterator[None]:
    """Turn a disk's refusal into ours.

    Raises:
        StoreError: The file can't be written (a full disk, no permission); the old one is still there.
    """
    try:
        yield
    except OSError as error:
        raise StoreError(
            f"partition {_name(key)!r} can't be rewritten: {error.strerror or error}",
            hint="Make room or give permission, then run `sisa repair`: until then the old rows are still there.",
        ) from error


def read_table(storage: Storage, key: str, columns: list[str] | None = None) -> pa.Table | None:
    """Read a file with its checksums verified; None if there is none.

    Raises:
        DamagedError: It is unreadable, or its bytes don't fit its checksums.
    """
    try:
        with storage.opened(key) as stream:
            source: BinaryIO = stream
            if columns is None:  # who reads two columns of all slices can't wait for the rest of their bytes
                source = io.BytesIO(stream.read())  # a file is small: it is read once, not for its seal and then again
                check_seal(source)
            with papq.ParquetFile(source, page_checksum_verification=True, pre_buffer=False) as file:
                table = file.read(columns=columns, use_threads=False)
        table.validate(full=True)
    except FileNotFoundError:  # also if its last rows were erased this very moment
        return None
    except (pa.ArrowException, OSError, ValueError, KeyError, MemoryError, OverflowError) as error:
        raise damaged(key, "it is unreadable, or its bytes don't fit its checksums") from error
    return table


def verified(recipe: Recipe, keys: ShardKeys, key: str, table: pa.Table) -> tuple[pa.Table, Digests, Digests]:
    """Return a file's rows and the digests of their ids and contents.

    Raises:
        DamagedError: They aren't what was written.
    """
    problem = schema_problem(table.schema, recipe)
    if problem:
        raise damaged(key, problem)
    try:
        ids_N16 = id_digests(keys, table[RECORD])
        contents_N16 = content_digests(keys, table, recipe)
        stored_N16 = stored_digests(table[CONTENT])
    except (pa.ArrowException, ValueError, IndexError) as error:
        raise damaged(key, "its rows can't be decoded") from error
    if not np.array_equal(contents_N16, stored_N16):
        raise damaged(key, "the content of a row is not what was written")
    return table, ids_N16, contents_N16


def stored_digests(column: pa.ChunkedArray) -> Digests:
    """Return the digests that a file has of its rows' contents.

    Raises:
        ValueError: One is missing.
    """
    array = pa.concat_arrays([*column.chunks, pa.array([], CONTENT_TYPE)])
    if array.null_count:
        raise ValueError("a digest is missing")
    buffer = array.buffers()[1]
    digests = np.frombuffer(buffer, np.uint8) if buffer is not None else np.empty(0, np.uint8)
    start = array.offset * DIGEST_BYTES
    return digests[start : start + len(array) * DIGEST_BYTES].reshape(-1, DIGEST_BYTES)


def joined(tables: list[pa.Table]) -> pa.Table:
    """Put canonical rows together; of the two types of a vector the wider is taken, if there are rows of it."""
    tables = [table for table in tables if table.num_rows] or tables[:1]
    schema = tables[0].schema
    if all(table.schema.equals(schema) for table in tables):
        return pa.concat_tables(tables)
    fields = [
        min(fields, key=lambda f: str(_element(f.type))) for fields in zip(*(t.schema for t in tables), strict=True)
    ]
    return pa.concat_tables([table.cast(pa.schema(fields)) for table in tables])


def _element(type_: pa.DataType) -> pa.DataType:
    return type_.value_type if pa.types.is_fixed_size_list(type_) else type_


def no_rows(recipe: Recipe) -> pa.Table:
    """Return canonical records, of which there are none."""
    # Of the two types of a vector the wider: concatenated with other slices it then changes nothing.
    chosen = {name: min(kinds, key=str) for name, kinds in _expected_types(recipe).items() if name != CONTENT}
    return pa.table({name: pa.array([], type_) for name, type_ in chosen.items()})


def _expected_types(recipe: Recipe) -> dict[str, set[pa.DataType]]:
    types: dict[str, set[pa.DataType]] = {RECORD: {pa.string()}, SUBJECT: {pa.string()}}
    for name, spec in recipe.data.columns.items():
        if spec.type == "vector":
            types[name] = {pa.list_(number, spec.size or 0) for number in (pa.float32(), pa.uint8())}
        else:
            types[name] = {pa.float64() if spec.type == "numeric" else pa.string()}
    return {**types, LABEL: {pa.int32()}, CONTENT: {CONTENT_TYPE}}


def schema_problem(schema: pa.Schema, recipe: Recipe) -> str:
    """Say what is wrong with the columns of a file; nothing if they are the recipe's."""
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


def _name(key: str) -> str:
    return "/".join(key.split("/")[-3:])


def damaged(key: str, reason: str) -> DamagedError:
    """Return the error that says what is wrong with a file."""
    return DamagedError(
        f"partition {_name(key)!r} is damaged: {reason}",
        hint="Rows can't be retrained: restore the file from a copy, then run `sisa repair`.",
    )
