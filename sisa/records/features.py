"""Rows to predict on: from memory in whatever form a caller has them, or from a file, batch by batch."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as papq

from sisa.errors import SourceError, UserError
from sisa.recipe import Recipe
from sisa.records.encode import check_columns, features_batch
from sisa.records.source import Source, open_source


def feature_table(rows: Any, recipe: Recipe) -> pa.Table:
    """Encode rows (B) in memory as the canonical features of a recipe.

    Args:
        rows: A pyarrow Table or RecordBatch, a dict of columns, a pandas DataFrame, or a 2-D array: of shape
            (B, features) where every feature is numeric, (B, size) where the only one is a vector.
        recipe: A resolved recipe.

    Raises:
        UserError: Rows of another form.
        SourceError: A feature is missing or isn't what the recipe says it is.
    """
    table = _as_table(rows, recipe)
    check_columns(table.schema.names, recipe.data.features, what="the rows")
    wanted = table.select(list(recipe.data.features)).combine_chunks()
    batches = wanted.to_batches() or [pa.RecordBatch.from_pylist([], schema=wanted.schema)]
    return pa.Table.from_batches([features_batch(batch, recipe) for batch in batches])


def _as_table(rows: Any, recipe: Recipe) -> pa.Table:
    if isinstance(rows, pa.Table):
        return rows
    if isinstance(rows, pa.RecordBatch):
        return pa.Table.from_batches([rows])
    if isinstance(rows, np.ndarray):
        return _from_array(rows, recipe)
    try:
        if isinstance(rows, dict):
            return pa.table({name: _column(name, values, recipe) for name, values in rows.items()})
        if hasattr(rows, "columns") and hasattr(rows, "to_dict"):
            return pa.Table.from_pandas(rows, preserve_index=False)
    except (pa.ArrowException, ValueError, TypeError) as error:
        raise UserError(f"rows can't be read as a table: {error}", hint="Give columns of equal length.") from error
    raise UserError(
        f"rows: expected a pyarrow Table, a dict of columns, a DataFrame or a 2-D array, got {type(rows).__name__}"
    )


def _column(name: str, values: Any, recipe: Recipe) -> pa.Array:
    spec = recipe.data.columns.get(name)
    if spec is not None and spec.type == "vector" and not isinstance(values, pa.Array | pa.ChunkedArray):
        return _vectors(np.asarray(values, np.float32), spec.size or 0, name)
    return values if isinstance(values, pa.Array | pa.ChunkedArray) else pa.array(values)


def _from_array(rows: np.ndarray[Any, Any], recipe: Recipe) -> pa.Table:
    names = list(recipe.data.features)
    specs = [recipe.data.columns[name] for name in names]
    if len(specs) == 1 and specs[0].type == "vector":
        return pa.table({names[0]: _vectors(rows, specs[0].size or 0, names[0])})
    if any(spec.type != "numeric" for spec in specs):
        raise UserError(
            "rows: an array can stand only for numeric features, or for one vector",
            hint="Give a table or a dict with the columns' names.",
        )
    if rows.ndim != 2 or rows.shape[1] != len(names):
        raise UserError(f"rows: expected an array of shape (B, {len(names)}), got {rows.shape}")
    return pa.table({name: pa.array(np.ascontiguousarray(rows[:, i])) for i, name in enumerate(names)})


def _vectors(rows: np.ndarray[Any, Any], size: int, name: str) -> pa.Array:
    flat = rows.reshape(len(rows), -1) if rows.ndim > 1 and len(rows) else rows
    if flat.ndim != 2 or flat.shape[1] != size:
        raise UserError(f"{name}: expected an array of shape (B, {size}), got {rows.shape}")
    return pa.FixedSizeListArray.from_arrays(pa.array(np.ascontiguousarray(flat).reshape(-1)), size)


def open_input(uri: str, recipe: Recipe, *, added: tuple[str, ...]) -> Source:
    """Open a table to predict on.

    Args:
        uri: As for a source of records.
        recipe: A resolved recipe.
        added: Names of the columns that the answer adds; the input must not have them.

    Raises:
        SourceError: It can't be read, lacks a feature or has a column of that name already.
    """
    source = open_source(uri)
    check_columns(source.schema.names, recipe.data.features, what=f"the input {uri!r}")
    taken = [name for name in added if name in source.schema.names]
    if taken:
        raise SourceError(
            f"the input {uri!r} has a column {taken[0]!r} already, which the answer would add",
            hint="Rename or drop it.",
        )
    return source


@contextlib.contextmanager
def table_writer(path: Path, schema: pa.Schema) -> Iterator[papq.ParquetWriter]:
    """Write a Parquet file with page checksums, batch by batch."""
    writer = papq.ParquetWriter(path, schema, compression="zstd", write_page_checksum=True)
    try:
        yield writer
    finally:
        writer.close()
