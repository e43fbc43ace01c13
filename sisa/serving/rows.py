"""JSON rows to the columns that constituents read, without the detour by Arrow that costs half a millisecond a call.

The rules are those of :mod:`sisa.records.encode`: numbers are finite, without negative zero; a category is NFC text,
integers and booleans have their text form; null is missing. A message names the row's position and the column,
never a value.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from sisa.errors import UserError
from sisa.learners.columns import MISSING, Array, Categories, Columns, feature_specs
from sisa.recipe import Recipe
from sisa.records.encode import check_columns

LARGEST_FLOAT32 = float(np.finfo(np.float32).max)


class RowReader:
    """Reads rows for one recipe."""

    def __init__(self, recipe: Recipe) -> None:
        specs = feature_specs(recipe)
        self.names = [name for name, _ in specs]
        self._wanted = frozenset(self.names)
        self._numeric = [name for name, spec in specs if spec.type == "numeric"]
        self._categorical = [name for name, spec in specs if spec.type == "categorical"]
        self._vectors = [(name, spec.size or 0) for name, spec in specs if spec.type == "vector"]

    def read(self, rows: Sequence[Any]) -> Columns:
        """Return the columns of B rows, each an object with a value for every feature.

        Raises:
            UserError: A row isn't an object, lacks a feature, has one that isn't any, or a value of another kind.
        """
        for position, row in enumerate(rows):
            if not isinstance(row, dict) or row.keys() != self._wanted:
                raise self._misfit(row, position)
        count = len(rows)
        numeric_PB = np.empty((len(self._numeric), count), np.float64)
        for values_B, name in zip(numeric_PB, self._numeric, strict=True):
            values_B[:] = _column(rows, name, _number)
        numeric_PB += 0.0  # no negative zero
        return Columns(
            numeric_NP=numeric_PB.T,
            categories=tuple(_categories(_column(rows, name, _category)) for name in self._categorical),
            vectors=tuple(_vector(rows, name, size) for name, size in self._vectors),
            labels_N=np.zeros(count, np.int64),
            uids_N=np.zeros(count, np.uint64),
            slices_N=np.ones(count, np.int32),
        )

    def _misfit(self, row: Any, position: int) -> UserError:
        where = f"rows[{position}]"
        if not isinstance(row, dict):
            return UserError(
                f"{where}: expected an object with a value for each feature, got {_kind(row)}",
                hint=f"For example {{{self.names[0]!r}: ...}}.",
            )
        try:
            check_columns(list(row), self.names, what=where)
        except UserError as error:
            return UserError(error.message, hint="A value that is not known is null.")
        strangers = sorted(row.keys() - self._wanted)
        return UserError(
            f"{where}: {strangers[0]!r:.100} is no feature of this model",
            hint="Leave it out: a model is asked about nothing that it has not learned from.",
        )


def _column(rows: Sequence[Any], name: str, read: Callable[[Any], Any]) -> list[Any]:
    values = []
    for position, row in enumerate(rows):
        try:
            values.append(read(row[name]))
        except (TypeError, ValueError, OverflowError) as error:
            raise UserError(f"rows[{position}].{name}: {error}", hint="A value that is not known is null.") from None
    return values


def _number(value: Any) -> float:
    if value is None:
        return math.nan
    if not isinstance(value, int | float):
        raise TypeError(f"expected a number, got {_kind(value)}")
    number = float(value)
    if not math.isfinite(number):
        raise ValueError("expected a finite number")
    return number


def _category(value: Any) -> str | None:
    if value is None or isinstance(value, str):
        return value if value is None or value.isascii() else _nfc(value)
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    raise TypeError(f"expected a text, got {_kind(value)}")


def _nfc(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("the text is not valid Unicode") from None
    return unicodedata.normalize("NFC", text)


def _categories(texts: list[str | None]) -> Categories:
    codes: dict[str | None, int] = {None: MISSING}
    values: list[str] = []
    for text in texts:
        if text is not None and text not in codes:
            codes[text] = len(values)
            values.append(text)
    return Categories(np.array([codes[text] for text in texts], np.int32), tuple(values))


def _vector(rows: Sequence[Any], name: str, size: int) -> Array:
    def elements(value: Any) -> list[float]:
        if value is None:
            return [math.nan] * size
        if not isinstance(value, list) or len(value) != size:
            got = f"a list of {len(value)}" if isinstance(value, list) else _kind(value)
            raise TypeError(f"expected a list of {size} numbers, got {got}")
        return [_single(element) for element in value]

    vectors_BD = np.array(_column(rows, name, elements), np.float64).reshape(len(rows), size)
    return (vectors_BD + 0.0).astype(np.float32)


def _single(value: Any) -> float:
    number = _number(value)
    if abs(number) > LARGEST_FLOAT32:
        raise ValueError("expected a number that single precision can hold")
    return number


def _kind(value: Any) -> str:
    kinds = {bool: "true or false", str: "a text", dict: "an object", list: "a list", type(None): "null"}
    return kinds.get(type(value), "a number")
