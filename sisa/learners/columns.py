"""The records of one shard as arrays, in the order that training starts from.

Rows come slice by slice and, within a slice, in canonical order; whoever builds :class:`Columns` sorted them so.
Features are grouped by kind, and within a kind they keep the recipe's order. No file is opened here.

Shape suffixes: N records, P numeric features, D elements of a vector.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import pyarrow as pa

from sisa.recipe import ColumnSpec, Recipe

if TYPE_CHECKING:
    from sisa.routing.keys import ShardKeys

RECORD_COLUMN = "_sisa_record"
LABEL_COLUMN = "_sisa_label"
MISSING = -1
"""Code of a category that isn't there."""

Array: TypeAlias = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Categories:
    """One categorical feature: codes into a list of texts."""

    codes_N: Array
    """int32; ``MISSING`` where there is no value."""
    values: tuple[str, ...]
    """What codes stand for, in no particular order; values that no code uses mean nothing."""


@dataclass(frozen=True)
class Columns:
    """Features, labels, order ids and slice numbers of records."""

    numeric_NP: Array
    """float64, column by column in memory; NaN where there is no value."""
    categories: tuple[Categories, ...]
    vectors: tuple[Array, ...]
    """Each (N, D): uint8, or float32 with NaN where there is no value."""
    labels_N: Array
    """int64 class indices."""
    uids_N: Array
    """uint64 keyed hashes that decide the order within an epoch."""
    slices_N: Array
    """int32, ascending."""

    def __post_init__(self) -> None:
        count = len(self.labels_N)
        others = [self.numeric_NP, self.uids_N, self.slices_N, *self.vectors, *(c.codes_N for c in self.categories)]
        if any(len(array) != count for array in others):
            raise ValueError(f"columns differ in length: {count} labels, {[len(array) for array in others]} others")
        if bool((self.slices_N[1:] < self.slices_N[:-1]).any()):
            raise ValueError("records must come slice by slice, in ascending order")

    @classmethod
    def concatenate(cls, parts: Sequence[Columns]) -> Columns:
        """Put the records of ``parts`` one after another; without parts there is nothing to tell the features.

        Raises:
            ValueError: There are no parts, or their slices don't ascend.
        """
        if not parts:
            raise ValueError("expected at least one part")
        if len(parts) == 1:
            return parts[0]
        return cls(
            numeric_NP=np.concatenate([part.numeric_NP.T for part in parts], axis=1).T,
            categories=tuple(_joined(columns) for columns in zip(*(part.categories for part in parts), strict=True)),
            vectors=tuple(np.concatenate(vectors) for vectors in zip(*(part.vectors for part in parts), strict=True)),
            labels_N=np.concatenate([part.labels_N for part in parts]),
            uids_N=np.concatenate([part.uids_N for part in parts]),
            slices_N=np.concatenate([part.slices_N for part in parts]),
        )

    @property
    def count(self) -> int:
        """Number of records."""
        return len(self.labels_N)

    def through(self, slice_: int) -> Columns:
        """Return the records of slices 1..``slice_``, without a copy."""
        return self.rows(slice(0, int(np.searchsorted(self.slices_N, slice_, side="right"))))

    def first_slice(self) -> Columns:
        """Return the records of the first slice that has any, without a copy."""
        return self.through(int(self.slices_N[0])) if self.count else self

    def rows(self, which: slice | Array) -> Columns:
        """Return a range of records (a view), or those of an index or mask array (a copy)."""
        return Columns(
            numeric_NP=self.numeric_NP[which],
            categories=tuple(Categories(c.codes_N[which], c.values) for c in self.categories),
            vectors=tuple(vector[which] for vector in self.vectors),
            labels_N=self.labels_N[which],
            uids_N=self.uids_N[which],
            slices_N=self.slices_N[which],
        )


def feature_specs(recipe: Recipe) -> list[tuple[str, ColumnSpec]]:
    """Return the features of a resolved recipe with what they are, in recipe order."""
    return [(name, recipe.data.columns[name]) for name in recipe.data.features]


def columns_from_table(
    table: pa.Table, recipe: Recipe, *, keys: ShardKeys | None = None, slices_N: Array | None = None
) -> Columns:
    """Read the canonical columns of a table that is in memory.

    Args:
        table: Canonical columns of the features of ``recipe``; with ``keys`` the record ids too. Labels are read
            if they are there.
        recipe: A resolved recipe.
        keys: Keys of the shard, from which the order ids derive; without them all are 0 (enough to predict).
        slices_N: Slice of each row, ascending; by default all rows are of slice 1.

    Returns:
        The records in the order of the table.
    """
    count = table.num_rows
    specs = feature_specs(recipe)
    labelled = LABEL_COLUMN in table.column_names
    return Columns(
        numeric_NP=_numeric([_array(table, name) for name, spec in specs if spec.type == "numeric"], count=count),
        categories=tuple(_categories(_array(table, name)) for name, spec in specs if spec.type == "categorical"),
        vectors=tuple(_vector(_array(table, name)) for name, spec in specs if spec.type == "vector"),
        labels_N=_plain(_array(table, LABEL_COLUMN), np.int64) if labelled else np.zeros(count, np.int64),
        uids_N=_uids(table, keys) if keys is not None else np.zeros(count, np.uint64),
        slices_N=np.ones(count, np.int32) if slices_N is None else np.asarray(slices_N, np.int32),
    )


def _array(table: pa.Table, name: str) -> pa.Array:
    column = table.column(name)
    if column.num_chunks == 1:  # combining even one chunk would copy it
        return column.chunk(0)
    combined = column.combine_chunks()
    return combined.chunk(0) if isinstance(combined, pa.ChunkedArray) else combined


def _plain(array: pa.Array, dtype: type[np.generic]) -> Array:
    return np.asarray(array.to_numpy(zero_copy_only=False), dtype)


def _uids(table: pa.Table, keys: ShardKeys) -> Array:
    from sisa.routing.siphash import siphash_text  # predictions need no routing

    return siphash_text(keys.order, _array(table, RECORD_COLUMN))


def _numeric(arrays: list[pa.Array], *, count: int) -> Array:
    numeric_PN = np.empty((len(arrays), count), np.float64)
    for row_N, array in zip(numeric_PN, arrays, strict=True):
        row_N[:] = array.to_numpy(zero_copy_only=False)
    return numeric_PN.T


def _categories(array: pa.Array) -> Categories:
    encoded = array if isinstance(array, pa.DictionaryArray) else array.dictionary_encode()
    codes_N = encoded.indices.fill_null(MISSING).to_numpy(zero_copy_only=False)
    return Categories(np.asarray(codes_N, np.int32), tuple(encoded.dictionary.to_pylist()))


def _joined(parts: tuple[Categories, ...]) -> Categories:
    codes: dict[str, int] = {}
    for part in parts:
        for value in part.values:
            codes.setdefault(value, len(codes))
    tables = [np.array([*(codes[value] for value in part.values), MISSING], np.int32) for part in parts]
    return Categories(
        np.concatenate([table[part.codes_N] for table, part in zip(tables, parts, strict=True)]), tuple(codes)
    )


def _vector(array: pa.Array) -> Array:
    size = array.type.list_size
    elements = array.values.slice(array.offset * size, len(array) * size)
    vector_ND: Array = elements.to_numpy(zero_copy_only=False).reshape(len(array), size)
    if elements.null_count == 0 and array.null_count == 0 and vector_ND.dtype == np.uint8:
        return vector_ND
    vector_ND = np.asarray(vector_ND, np.float32)
    if array.null_count:
        vector_ND = vector_ND.copy()
        vector_ND[array.is_null().to_numpy(zero_copy_only=False)] = np.nan
    return vector_ND
