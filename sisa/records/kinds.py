"""Which column types can be what kind of feature, label or id. Decided from types, never from values.

"Not supported yet" and "can't be" are different answers: the first may come, the second makes no sense.
"""

from __future__ import annotations

from typing import Literal

import pyarrow as pa

from sisa.routing.ids import is_text

Kind = Literal["numeric", "categorical", "vector"]


def plain_type(type_: pa.DataType) -> pa.DataType:
    """Return the type of the values behind a dictionary encoding or an extension type."""
    if pa.types.is_dictionary(type_):
        return plain_type(type_.value_type)
    if isinstance(type_, pa.BaseExtensionType) and not isinstance(type_, pa.UuidType):
        return plain_type(type_.storage_type)
    return type_


def plain_array(array: pa.Array) -> pa.Array:
    """Return the values behind a dictionary encoding, an extension type or a text view."""
    if isinstance(array, pa.ExtensionArray) and not isinstance(array.type, pa.UuidType):
        return plain_array(array.storage)
    if isinstance(array, pa.DictionaryArray):
        return plain_array(array.dictionary_decode())
    if is_text(array.type) and not pa.types.is_string(array.type):
        return array.cast(pa.string())
    return array


def is_number(type_: pa.DataType) -> bool:
    """Tell whether values of this type are numbers (a bool counts: it is 0 or 1)."""
    t = pa.types
    return bool(t.is_integer(type_) or t.is_floating(type_) or t.is_decimal(type_) or t.is_boolean(type_))


def default_kind(type_: pa.DataType) -> Kind | None:
    """Return the kind of a feature of this type that the recipe doesn't declare; None if it must, or can't."""
    inner = plain_type(type_)
    if is_number(inner):
        return "numeric"
    if is_text(inner):
        return "categorical"
    if pa.types.is_fixed_size_list(inner):
        return "vector"
    return None


def kind_problem(type_: pa.DataType, kind: Kind | None, *, csv: bool) -> str:
    """Say why a column of this type can't be a feature of this kind; empty if it can.

    Args:
        type_: Type of the column in the table.
        kind: Declared kind, None if the recipe leaves it to the type.
        csv: Whether the table is CSV, where all columns are text that the declared kind gives a type.
    """
    inner = plain_type(type_)
    if csv:
        return "a vector in a CSV file is not supported yet; use Parquet" if kind == "vector" else ""
    if pa.types.is_null(inner):
        return "" if kind in {"numeric", "categorical"} else "all values are missing; declare its type"
    if default_kind(type_) is None:
        return f"{_described(inner)} is not supported yet; expected numbers, text or fixed-size lists of numbers"
    if pa.types.is_fixed_size_list(inner) and not inner.list_size:
        return "a list of 0 numbers says nothing; expected a fixed-size list of at least 1 number"
    if pa.types.is_fixed_size_list(inner) and not is_number(plain_type(inner.value_type)):
        return f"a list of {inner.value_type} is not supported yet; expected a list of numbers"
    return _kind_mismatch(inner, kind)


def _kind_mismatch(inner: pa.DataType, kind: Kind | None) -> str:
    if pa.types.is_fixed_size_list(inner):
        return "" if kind in {None, "vector"} else f"a list can't be {kind}; declare it as vector"
    if kind == "vector":
        return f"a column of {inner} can't be a vector; expected a fixed-size list of numbers"
    if kind == "numeric" and not is_number(inner):
        return "text can't be numeric; store numbers in the table, or declare it categorical"
    if kind == "categorical" and (pa.types.is_floating(inner) or pa.types.is_decimal(inner)):
        return f"a column of {inner} can't be categorical; expected text, integers or booleans"
    return ""


def label_problem(type_: pa.DataType) -> str:
    """Say why a column of this type can't be the label; empty if it can."""
    inner = plain_type(type_)
    if pa.types.is_floating(inner) or pa.types.is_decimal(inner):
        return f"it is of type {inner}: regression targets are not supported yet; expected integers, text or booleans"
    if pa.types.is_integer(inner) or pa.types.is_boolean(inner) or is_text(inner):
        return ""
    return f"{_described(inner)} can't be a class label; expected integers, text or booleans"


def _described(type_: pa.DataType) -> str:
    t = pa.types
    if t.is_list(type_) or t.is_large_list(type_) or t.is_list_view(type_) or t.is_large_list_view(type_):
        return "a list of variable length"
    if t.is_temporal(type_):
        return f"a time ({type_})"
    if t.is_nested(type_):
        return "a nested column"
    return f"a column of type {type_}"
