"""From a batch as the source has it to the canonical columns that partitions, digests and learners share.

Canonical means: the same values give the same bytes, however the source encodes them. Numbers are float64
without negative zero, categories and ids are NFC text, vectors are float32 (uint8 where the source's type
is), a label is the index of its class. NaN and null are one thing: missing. In uint8 vectors a missing
element is an Arrow null, anywhere else a number it is NaN.

What can't be read is refused with the column's name and a count, never with a value other than a label.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from sisa.errors import SourceError
from sisa.recipe import Recipe
from sisa.recipe.wording import NAMED
from sisa.records.kinds import is_number, plain_array
from sisa.records.names import LABEL, RECORD, SUBJECT
from sisa.routing.ids import canonical_ids, check_utf8, is_text, nfc

SHOWN = 5
"""How many values a message names."""
# Made once and with their types: Arrow takes longer to make a scalar than to look through a column with it.
_NAN = pa.scalar(np.nan, pa.float64())
_BOOLEANS = [tuple(pa.scalar(text, pa.string()) for text in pair) for pair in (("true", "1"), ("false", "0"))]


def source_columns(recipe: Recipe) -> list[str]:
    """Return the columns of the source that a resolved recipe names; no other is ever read."""
    data = recipe.data
    return list(dict.fromkeys([data.record_id, data.subject_column, *data.features, data.label]))


def canonical_batch(batch: pa.RecordBatch, recipe: Recipe) -> pa.RecordBatch:
    """Encode records: ids, features and labels.

    Args:
        batch: N rows with the columns that the recipe names.
        recipe: A resolved recipe.

    Returns:
        N rows: ``_sisa_record``, ``_sisa_subject``, the features in recipe order, ``_sisa_label``.

    Raises:
        SourceError: A column is missing, or a value isn't what the recipe says it is.
    """
    return encode_with(batch, recipe, *canonical_pairs(batch, recipe))


def encode_with(
    batch: pa.RecordBatch, recipe: Recipe, records: pa.StringArray, subjects: pa.StringArray
) -> pa.RecordBatch:
    """Encode records whose canonical ids are known already; see :func:`canonical_batch`.

    Raises:
        SourceError: A column is missing, or a value isn't what the recipe says it is.
    """
    features = features_batch(batch, recipe)
    labels = _labels(_plain_column(batch, recipe.data.label), recipe.data.label, recipe.data.class_names)
    names = [RECORD, SUBJECT, *features.schema.names, LABEL]
    return pa.record_batch([records, subjects, *features.columns, labels], names=names)


def canonical_pairs(batch: pa.RecordBatch, recipe: Recipe) -> tuple[pa.StringArray, pa.StringArray]:
    """Return the canonical ids of records and of their subjects.

    Raises:
        SourceError: An id is missing, empty or of another type than ids are.
    """
    data = recipe.data
    records = canonical_ids(_column(batch, data.record_id), column=data.record_id)
    if data.subject_column == data.record_id:
        return records, records
    return records, canonical_ids(_column(batch, data.subject_column), column=data.subject_column)


def features_batch(batch: pa.RecordBatch, recipe: Recipe) -> pa.RecordBatch:
    """Encode features alone, as prediction needs them.

    Raises:
        SourceError: A column is missing, or a value isn't what the recipe says it is.
    """
    check_columns(batch.schema.names, recipe.data.features, what="the input")
    arrays = []
    for name in recipe.data.features:
        spec = recipe.data.columns[name]
        array = _plain_column(batch, name)
        if spec.type == "numeric":
            arrays.append(pa.array(_numbers(array, name)))
        elif spec.type == "categorical":
            arrays.append(_categories(array, name))
        else:
            arrays.append(_vectors(array, name, size=spec.size or 0))
    return pa.record_batch(arrays, names=list(recipe.data.features))


def check_columns(present: Sequence[str], wanted: Iterable[str], *, what: str) -> None:
    """Make sure that a table has the columns that it must have.

    Raises:
        SourceError: Some are missing; the first are named, with the nearest name that is there.
    """
    there = set(present)
    missing = [name for name in wanted if name not in there]
    if missing:
        # A search for near names takes a moment, and the wrong table may lack thousands of columns.
        shown = [f"{name!r}{nearest(name, present)}" for name in missing[:NAMED]]
        more = f", and {len(missing) - NAMED} more" if len(missing) > NAMED else ""
        raise SourceError(
            f"{what} has no column {', no column '.join(shown)}{more}", hint="Column names are case-sensitive."
        )


def nearest(name: str, present: Sequence[str]) -> str:
    """Suggest a column for a name that isn't there."""
    near = difflib.get_close_matches(name, present, n=1, cutoff=0.6)
    return f" (did you mean {near[0]!r}?)" if near else ""


def label_texts(array: pa.Array, name: str) -> pa.StringArray:
    """Return the text form of labels, as classes are compared; nulls stay.

    Raises:
        SourceError: A label is not valid text; the column is named.
    """
    return _texts(_plain(array, name))


def _column(batch: pa.RecordBatch, name: str) -> pa.Array:
    if batch.schema.get_field_index(name) < 0:  # the names of a wide table take a while to list
        check_columns(batch.schema.names, [name], what="the table")
    return batch.column(name)


def _plain_column(batch: pa.RecordBatch, name: str) -> pa.Array:
    return _plain(_column(batch, name), name)


def _plain(array: pa.Array, name: str) -> pa.Array:
    """The values behind an encoding; texts among them are texts."""
    plain = plain_array(array)
    if is_text(plain.type):
        check_utf8(plain, what=f"column {name!r}")
    return plain


def _texts(array: pa.Array) -> pa.StringArray:
    """Text form of texts, integers and booleans (``true`` and ``false``)."""
    return nfc(array if pa.types.is_string(array.type) else array.cast(pa.string()))


def _numbers(array: pa.Array, name: str) -> NDArray[np.float64]:
    """(N,) float64; missing is NaN, negative zero is zero."""
    if pa.types.is_decimal(array.type):
        array = array.cast(pa.string())  # Arrow's own way to float64 is off by an ulp now and then
    if pa.types.is_null(array.type):
        return np.full(len(array), np.nan)
    if is_text(array.type):
        array = _parsed(array, name)
    elif not is_number(array.type):
        raise SourceError(f"column {name!r} is numeric in the recipe, but of type {array.type} here")
    numbers_N: NDArray[np.float64] = (
        array.cast(pa.float64(), safe=False).fill_null(_NAN).to_numpy(zero_copy_only=False) + 0.0
    )
    _check_finite(numbers_N, name)
    numbers_N[np.isnan(numbers_N)] = np.nan  # one bit pattern
    return numbers_N


def _parsed(texts: pa.StringArray, name: str) -> pa.DoubleArray:
    trimmed = pc.utf8_lower(pc.utf8_trim_whitespace(texts))
    for word, digit in _BOOLEANS:
        trimmed = pc.if_else(pc.equal(trimmed, word), digit, trimmed)
    try:
        return trimmed.cast(pa.float64())
    except pa.ArrowInvalid:
        wrong = sum(not _parses(text) for text in trimmed.drop_null().to_pylist())
        raise SourceError(
            f"column {name!r} is numeric in the recipe, but {wrong} of {len(texts)} values read so far are no numbers",
            hint=f"Mend the values (an empty field is missing), or declare columns.{name}.type: categorical.",
        ) from None


def _parses(text: str) -> bool:
    try:
        pa.array([text]).cast(pa.float64())
    except pa.ArrowInvalid:
        return False
    return True


def _check_finite(numbers: NDArray[Any], name: str) -> None:
    infinite = int(np.isinf(numbers).sum())
    if infinite:
        raise SourceError(
            f"column {name!r} has {infinite} infinite values (or too large for its type); no model can be trained on them",
            hint="Replace them by a number, or by a missing value.",
        )


def _categories(array: pa.Array, name: str) -> pa.StringArray:
    t = pa.types
    if not (is_text(array.type) or t.is_integer(array.type) or t.is_boolean(array.type) or t.is_null(array.type)):
        raise SourceError(f"column {name!r} is categorical in the recipe, but of type {array.type} here")
    return _texts(array)


def _vectors(array: pa.Array, name: str, *, size: int) -> pa.FixedSizeListArray:
    if not pa.types.is_fixed_size_list(array.type) or array.type.list_size != size:
        raise SourceError(f"column {name!r} is a vector of {size} numbers in the recipe, but of type {array.type} here")
    # Not flatten(), which leaves out the elements of a missing list.
    elements = _plain(array.values.slice(array.offset * size, len(array) * size), name)
    absent = np.repeat(array.is_null().to_numpy(zero_copy_only=False), size) if array.null_count else None
    if pa.types.is_uint8(elements.type) or pa.types.is_boolean(elements.type):
        elements = elements.cast(pa.uint8())
        if absent is not None:
            elements = pc.if_else(pa.array(absent), pa.scalar(None, pa.uint8()), elements)
    else:
        numbers = _singles(elements, name)
        if absent is not None:
            numbers[absent] = np.nan
        elements = pa.array(numbers)
    return pa.FixedSizeListArray.from_arrays(elements, size)


def _singles(elements: pa.Array, name: str) -> NDArray[np.float32]:
    """float32; by way of float64, so that a whole number is rounded alike from any type."""
    if not pa.types.is_float32(elements.type):
        with np.errstate(over="ignore"):
            numbers = _numbers(elements, name).astype(np.float32)
    else:
        numbers = elements.fill_null(np.nan).to_numpy(zero_copy_only=False) + np.float32(0.0)
        numbers[np.isnan(numbers)] = np.nan
    _check_finite(numbers, name)
    return numbers


def _labels(plain: pa.Array, name: str, classes: Sequence[str]) -> pa.Int32Array:
    if plain.null_count:
        raise SourceError(
            f"label {name!r}: {plain.null_count} of {len(plain)} records read so far have no label",
            hint="Label these records, or leave them out of the source.",
        )
    if not (is_text(plain.type) or pa.types.is_integer(plain.type) or pa.types.is_boolean(plain.type)):
        raise SourceError(f"label {name!r} is of type {plain.type}; expected integers, text or booleans")
    texts = _texts(plain)
    indices = pc.index_in(texts, value_set=pa.array(list(classes), pa.string()))
    if indices.null_count:
        unknown = pc.unique(texts.filter(indices.is_null())).to_pylist()
        shown = ", ".join(repr(value) for value in sorted(unknown)[:SHOWN]) + (", ..." if len(unknown) > SHOWN else "")
        raise SourceError(
            f"label {name!r}: {indices.null_count} of {len(plain)} records read so far have a label outside "
            f"data.classes: {shown}",
            hint=f"Declared are {', '.join(map(repr, classes))}. Add the class, or leave these records out of the source.",
        )
    return indices.cast(pa.int32())
