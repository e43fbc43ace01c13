"""Keyed digests of records: who a record is, and what it says.

Keyed BLAKE2b under the shard's digest key: without the key neither digest lets anyone test a guess. The
content digest covers the subject's id (another owner is another content), every feature in recipe order,
and the class; each value has one fixed-width form, so neither row order nor encoding can move a digest.

Shape suffixes: N records, 16 bytes of a digest, W bytes of a row.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from sisa.recipe import Recipe
from sisa.records.names import LABEL, SUBJECT
from sisa.routing.keys import ShardKeys

DIGEST_BYTES = 16
ROWS = 16_384
"""Records digested at a time, which bounds the memory of their rows."""

Digests = NDArray[np.uint8]


def id_digests(keys: ShardKeys, record_ids: pa.Array | pa.ChunkedArray) -> Digests:
    """Digest canonical record ids.

    Returns:
        (N, 16) uint8.
    """
    return _digests(_hasher(keys, b"sisa-record"), _bytes(record_ids))


def content_digests(keys: ShardKeys, batch: pa.RecordBatch | pa.Table, recipe: Recipe) -> Digests:
    """Digest what canonical records say.

    Args:
        keys: Keys of the shard that the records belong to.
        batch: N canonical records.
        recipe: A resolved recipe.

    Returns:
        (N, 16) uint8.
    """
    parts = [np.empty((0, DIGEST_BYTES), np.uint8)]
    hasher = _hasher(keys, b"sisa-content")
    for start in range(0, batch.num_rows, ROWS):
        part = batch.slice(start, ROWS)
        rows_NW = _rows(keys, part, recipe)
        width = rows_NW.shape[1]
        view = memoryview(rows_NW.reshape(-1).data)
        subjects = _bytes(part.column(SUBJECT))
        # The row has a fixed width, so what follows it can only be the subject.
        rows = [b"".join((view[i * width : (i + 1) * width], subject)) for i, subject in enumerate(subjects)]
        parts.append(_digests(hasher, rows))
    return np.concatenate(parts)


def _hasher(keys: ShardKeys, purpose: bytes) -> Any:
    return hashlib.blake2b(digest_size=DIGEST_BYTES, key=keys.digest, person=purpose)


def _digests(hasher: Any, messages: Any) -> Digests:
    digests = []
    for message in messages:
        copy = hasher.copy()  # the keyed first block is hashed once, not once a record
        copy.update(message)
        digests.append(copy.digest())
    return np.frombuffer(b"".join(digests), np.uint8).reshape(-1, DIGEST_BYTES)


def _bytes(texts: pa.Array | pa.ChunkedArray) -> NDArray[np.object_]:
    binary: NDArray[np.object_] = texts.cast(pa.binary()).to_numpy(zero_copy_only=False)
    return binary


def _rows(keys: ShardKeys, part: pa.RecordBatch | pa.Table, recipe: Recipe) -> Digests:
    """(N, W): each feature in its fixed width, then the class index."""
    columns = []
    for name in recipe.data.features:
        array = _whole(part.column(name))
        kind = recipe.data.columns[name].type
        if kind == "numeric":
            columns.append(_as_bytes(array.to_numpy(zero_copy_only=False).astype("<f8", copy=False)))
        elif kind == "categorical":
            columns.append(_category_rows(keys, array))
        else:
            columns.append(_as_bytes(vector_values(array).astype("<f4", copy=False)))
    columns.append(_as_bytes(_whole(part.column(LABEL)).to_numpy(zero_copy_only=False).astype("<i8")))
    return np.concatenate(columns, axis=1)


def _category_rows(keys: ShardKeys, array: pa.StringArray) -> Digests:
    """(N, 16): a digest of each category; zeros for a missing one."""
    encoded = array.dictionary_encode()
    values = _digests(_hasher(keys, b"sisa-category"), _bytes(encoded.dictionary))
    table = np.concatenate([values, np.zeros((1, DIGEST_BYTES), np.uint8)])
    codes = encoded.indices.fill_null(len(values)).to_numpy(zero_copy_only=False)
    rows_N16: Digests = table[codes]
    return rows_N16


def vector_values(array: pa.FixedSizeListArray) -> NDArray[Any]:
    """(N, D) numbers of canonical vectors; NaN (and then float32) where there is none."""
    size = array.type.list_size
    elements = array.values.slice(array.offset * size, len(array) * size)
    if elements.null_count:
        elements = elements.cast(pa.float32()).fill_null(np.nan)
    values: NDArray[Any] = elements.to_numpy(zero_copy_only=False).reshape(len(array), size)
    return values


def _as_bytes(values: NDArray[Any]) -> Digests:
    """View (N, ...) numbers as the bytes of each row."""
    flat = np.ascontiguousarray(values).reshape(len(values), -1)
    if not flat.size:
        return np.empty((len(values), flat.shape[1] * flat.itemsize), np.uint8)
    return flat.view(np.uint8)


def _whole(column: pa.Array | pa.ChunkedArray) -> pa.Array:
    if isinstance(column, pa.ChunkedArray):
        return pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)
    return column
