"""Records as rows of bytes of one fixed width, in which they wait on disk, and back. Pure.

A row holds a check word, the numeric features (float64), the vectors (uint8, or float32 where one is *wide*), the codes
of categories (int32) and the label (int32), filled up to whole words. What comes back is, value for value, what went in,
so that preprocessing gives the same bits.

The check word covers the row's bytes and its place: a flipped bit, or a row that reads as zeros or as another, is damage.

Shape suffixes: N records, W bytes of a row, V words of a row after the first one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from sisa.learners.columns import MISSING, Array, Categories, Columns, feature_specs
from sisa.recipe import Recipe

WORD_BYTES = 8
_MIX = np.uint64(0x9E3779B97F4A7C15)
_STEP = 0xBF58476D1CE4E5B9


class TooNarrowError(ValueError):
    """A vector has values that no uint8 holds."""


class Dictionary:
    """The values of one categorical feature so far; their codes never change."""

    def __init__(self) -> None:
        self._codes: dict[str, int] = {}

    @property
    def values(self) -> tuple[str, ...]:
        """The values in the order of their codes."""
        return tuple(self._codes)

    def encode(self, column: Categories) -> Array:
        """Return codes in this dictionary, to which values that are new are added."""
        codes = [self._codes.setdefault(value, len(self._codes)) for value in column.values]
        table = np.array([*codes, MISSING], np.int32)
        codes_N: Array = table[column.codes_N]
        return codes_N


@dataclass(frozen=True)
class RowFormat:
    """Where each part of a row lies."""

    numeric: int
    """Numeric features."""
    categories: int
    """Categorical features."""
    sizes: tuple[int, ...]
    """Elements of each vector."""
    wide: frozenset[int] = frozenset()
    """Which vectors are float32."""

    @classmethod
    def of(cls, recipe: Recipe, *, wide: frozenset[int] = frozenset()) -> RowFormat:
        """Return the format of a resolved recipe's features."""
        specs = [spec for _, spec in feature_specs(recipe)]
        kinds = [spec.type for spec in specs]
        sizes = tuple(spec.size or 1 for spec in specs if spec.type == "vector")
        return cls(kinds.count("numeric"), kinds.count("categorical"), sizes, wide)

    @cached_property
    def _starts(self) -> list[int]:
        """Where the numbers, the codes, the label and each vector start, and where the last one ends."""
        starts = [WORD_BYTES, WORD_BYTES * (1 + self.numeric)]
        starts += [starts[-1] + 4 * self.categories]
        starts += [starts[-1] + 4]
        for index, size in enumerate(self.sizes):
            starts.append(starts[-1] + size * (4 if index in self.wide else 1))
        return starts

    @property
    def width(self) -> int:
        """Bytes of a row."""
        return -(-self._starts[-1] // WORD_BYTES) * WORD_BYTES

    @cached_property
    def _weights(self) -> Array:
        """An odd number for each word: one flipped bit always changes the sum."""
        words = np.arange(1, self.width // WORD_BYTES, dtype=np.uint64)
        return (words * np.uint64(_STEP) + _MIX) | np.uint64(1)

    def pack(self, columns: Columns, dictionaries: Sequence[Dictionary], *, first: int) -> Array:
        """Return the rows of records: (N, W) uint8.

        Args:
            columns: The records.
            dictionaries: One for each categorical feature; they grow.
            first: Place of the first row among all rows of this format.

        Raises:
            TooNarrowError: A vector that isn't wide has something other than uint8.
        """
        numbers, codes, label, *vectors = self._starts
        rows_NW = np.zeros((columns.count, self.width), np.uint8)
        rows_NW[:, numbers:codes] = _bytes(columns.numeric_NP, np.float64)
        for index, (column, dictionary) in enumerate(zip(columns.categories, dictionaries, strict=True)):
            start = codes + 4 * index
            rows_NW[:, start : start + 4] = _bytes(dictionary.encode(column)[:, None], np.int32)
        rows_NW[:, label : label + 4] = _bytes(columns.labels_N[:, None], np.int32)
        for index, (vector_ND, start) in enumerate(zip(columns.vectors, vectors, strict=False)):
            if vector_ND.dtype != np.uint8 and index not in self.wide:
                raise TooNarrowError(f"vector {index} is {vector_ND.dtype}")
            kind = np.float32 if index in self.wide else np.uint8
            rows_NW[:, start : vectors[index + 1]] = _bytes(vector_ND, kind)
        rows_NW.view(np.uint64)[:, 0] = self._checks(rows_NW, np.arange(first, first + columns.count, dtype=np.uint64))
        return rows_NW

    def whole(self, rows_NW: Array, places_N: Array) -> bool:
        """Tell whether these are the rows that were packed for these places."""
        checks_N = self._checks(rows_NW, places_N.astype(np.uint64))
        return np.array_equal(rows_NW.view(np.uint64)[:, 0], checks_N)

    def _checks(self, rows_NW: Array, places_N: Array) -> Array:
        checks_N: Array = rows_NW.view(np.uint64)[:, 1:] @ self._weights
        checks_N += (places_N + np.uint64(1)) * _MIX
        return checks_N

    def unpack(self, rows_NW: Array, values: Sequence[tuple[str, ...]], *, slices_N: Array | None = None) -> Columns:
        """Return the records of rows, without order ids.

        Args:
            rows_NW: What :meth:`pack` gave.
            values: The values of each categorical feature.
            slices_N: Slice of each row; by default all rows are of slice 1.
        """
        numbers, codes, label, *vectors = self._starts
        count = len(rows_NW)
        codes_NC = _numbers(rows_NW[:, codes:label], np.int32)
        return Columns(
            numeric_NP=_numbers(rows_NW[:, numbers:codes], np.float64),
            categories=tuple(Categories(codes_NC[:, index], given) for index, given in enumerate(values)),
            vectors=tuple(
                _numbers(rows_NW[:, start:end], np.float32 if index in self.wide else np.uint8)
                for index, (start, end) in enumerate(zip(vectors, vectors[1:], strict=False))
            ),
            labels_N=_numbers(rows_NW[:, label : label + 4], np.int32)[:, 0].astype(np.int64),
            uids_N=np.zeros(count, np.uint64),
            slices_N=np.ones(count, np.int32) if slices_N is None else slices_N,
        )


def _bytes(values_NK: Array, kind: type[np.generic]) -> Array:
    values_NK = np.ascontiguousarray(values_NK, kind)
    return values_NK.view(np.uint8) if values_NK.shape[1] else np.empty((len(values_NK), 0), np.uint8)


def _numbers(bytes_NK: Array, kind: type[np.generic]) -> Array:
    if kind == np.uint8:
        return bytes_NK
    if not bytes_NK.shape[1]:
        return np.empty((len(bytes_NK), 0), kind)
    return np.ascontiguousarray(bytes_NK).view(kind)
