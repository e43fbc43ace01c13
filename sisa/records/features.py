"""Features without labels or ids: what a prediction is asked about, from a file or from memory."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as papq

from sisa.errors import SourceError, UserError
from sisa.recipe import Recipe
from sisa.records.encode import check_columns, features_batch
from sisa.records.kinds import plain_array, plain_type
from sisa.records.source import Source, open_source


def open_input(uri: str, recipe: Recipe, *, added: Sequence[str] = ()) -> Source:
    """Open a table that holds a recipe's features.

    Args:
        uri: Path or glob, in any format that records come in.
        recipe: A resolved recipe.
        added: Columns that will be added to the table, so that it can't have them already.

    Raises:
        SourceError: The table can't be read, lacks a feature, or has a column that is to be added.
    """
    source = open_source(uri, name="the input")
    check_columns(source.schema.names, recipe.data.features, what=f"the input {uri!r}")
    taken = [name for name in added if name in source.schema.names]
    if taken:
        raise SourceError(
            f"the input {uri!r} has a column {', '.join(map(repr, taken))} already, which the answer adds",
            hint="Rename the column, or leave it out.",
        )
    return source


def feature_table(rows: Any, recipe: Recipe) -> pa.Table:
    """Return the canonical features of rows that are in memory.

    Args:
        rows: B rows: a pyarrow Table or RecordBatch, a dict of columns, a pandas DataFrame, or (where every
            feature is numeric, or the only one a vector) an array with one row for each.
        recipe: A resolved recipe.

    Returns:
        B rows with the features in recipe order, each column in one chunk.

    Raises:
        UserError: A feature is missing, or a value isn't what the recipe says it is.
    """
    table = _table(rows, recipe)
    check_columns(table.schema.names, recipe.data.features, what="the input")
    columns = []
    for name in recipe.data.features:
        column = table.column(name)
        array = pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)
        spec = recipe.data.columns[name]
        columns.append(_fixed(array, name, size=spec.size or 0) if spec.type == "vector" else array)
    batch = pa.record_batch(columns, names=list(recipe.data.features))
    return pa.Table.from_batches([features_batch(batch, recipe)])


@contextlib.contextmanager
def table_writer(path: Path, schema: pa.Schema) -> Iterator[papq.ParquetWriter]:
    """Write a Parquet file batch by batch (``write_batch``); what is written so far stays if it fails.

    Raises:
        UserError: The file can't be written there.
    """
    try:
        with papq.ParquetWriter(path, schema, compression="zstd", write_page_checksum=True) as writer:
            yield writer
    except OSError as error:
        # The backend's own words would name the scratch file.
        reason = os.strerror(error.errno) if error.errno else "no reason given"
        raise UserError(
            f"the folder {str(path.parent)!r} can't be written to: {reason}",
            hint="Choose a place that you may write to.",
        ) from error


def _table(rows: Any, recipe: Recipe) -> pa.Table:
    if isinstance(rows, pa.Table):
        return rows
    if isinstance(rows, pa.RecordBatch):
        return pa.Table.from_batches([rows])
    try:
        if isinstance(rows, dict):
            return pa.table({name: _listed(values) for name, values in rows.items()})
        if hasattr(rows, "columns") and hasattr(rows, "dtypes"):
            return pa.Table.from_pandas(rows, preserve_index=False)
        return _from_array(np.asarray(rows), recipe)
    except (pa.ArrowException, TypeError, ValueError) as error:
        raise UserError(
            f"the input can't be read as a table of features ({type(error).__name__})",
            hint="Give a pyarrow Table, a dict of columns, a pandas DataFrame or an array.",
        ) from error


def _listed(values: Any) -> Any:
    """Arrow takes arrays of one dimension only; a row of more is a list."""
    if isinstance(values, np.ndarray) and values.ndim > 1:
        flat = values.reshape(len(values), -1)
        return pa.FixedSizeListArray.from_arrays(pa.array(flat.reshape(-1)), flat.shape[1])
    return values


def _from_array(array: np.ndarray[Any, Any], recipe: Recipe) -> pa.Table:
    names = list(recipe.data.features)
    kinds = [recipe.data.columns[name].type for name in names]
    if kinds == ["vector"] and array.ndim >= 2:
        return pa.table({names[0]: _listed(array)})
    if set(kinds) == {"numeric"} and array.ndim == 2 and array.shape[1] == len(names):
        return pa.table({name: np.ascontiguousarray(array[:, i]) for i, name in enumerate(names)})
    if set(kinds) == {"numeric"}:
        raise UserError(f"the input has the shape {array.shape}; expected one column for each of {len(names)} features")
    raise UserError(
        "an array can stand for rows only if every feature is numeric, or the only one is a vector",
        hint="Give a pyarrow Table, a dict of columns or a pandas DataFrame.",
    )


def _fixed(array: pa.Array, name: str, *, size: int) -> pa.Array:
    """Lists of variable length are what memory usually holds; here they must all have the vector's."""
    plain = plain_array(array)
    inner = plain_type(plain.type)
    if not (pa.types.is_list(inner) or pa.types.is_large_list(inner)):
        return plain
    try:
        return plain.cast(pa.list_(inner.value_type, size))
    except pa.ArrowException as error:
        raise SourceError(
            f"column {name!r} is a vector of {size} numbers in the recipe; a row has another length"
        ) from error
