"""The one canonical text form of an id, whatever the type that a table keeps it in.

Integers are decimal, texts are NFC, UUIDs are the lower-case form with hyphens. An id that is missing or
empty names nobody, and a float or a date has more than one text: these are refused, never guessed.
"""

from __future__ import annotations

import unicodedata
import uuid

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sisa.errors import SourceError, UserError


def canonical_id(text: str) -> str:
    r"""Return the canonical form of an id that somebody typed.

    >>> canonical_id("e\u0301") == "\u00e9"
    True

    Raises:
        UserError: The text is empty, or no Unicode text.
    """
    if not text:
        raise UserError("an id is empty", hint="Give the id as it stands in the table.")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError("an id is not valid Unicode text", hint="Give the id in UTF-8.") from error
    return unicodedata.normalize("NFC", text)


def canonical_ids(array: pa.Array | pa.ChunkedArray, *, column: str) -> pa.StringArray:
    """Return the canonical text of each id.

    Args:
        array: N ids: integers, texts or UUIDs, dictionary-encoded or not.
        column: Name of the column, for messages.

    Raises:
        SourceError: The column has another type, or an id is null, empty or not valid text.
    """
    problem = id_type_problem(array.type)
    if problem:
        raise SourceError(f"column {column!r}: {problem}", hint="Ids are integers, texts or UUIDs.")
    if isinstance(array, pa.ChunkedArray):
        array = pa.concat_arrays(array.chunks) if array.num_chunks else pa.array([], array.type)
    if pa.types.is_dictionary(array.type):
        # Before nulls are counted: an entry of the dictionary can be null as well as a row.
        array = array.dictionary_decode()
    if array.null_count:
        raise SourceError(
            f"column {column!r}: {array.null_count} of {len(array)} ids are missing; every record needs one",
            hint="Give these rows an id, or leave them out of the source.",
        )
    return _texts(array, column)


def id_type_problem(type_: pa.DataType) -> str:
    """Say why a column of this type can't hold ids; empty if it can."""
    inner = type_.value_type if pa.types.is_dictionary(type_) else type_
    if pa.types.is_integer(inner) or is_text(inner) or isinstance(inner, pa.UuidType):
        return ""
    if pa.types.is_null(inner):
        return "all ids are missing; every record needs one"
    return f"an id can't be of type {inner}; expected integers, texts or UUIDs"


def is_text(type_: pa.DataType) -> bool:
    """Tell whether values of this type are texts."""
    return bool(pa.types.is_string(type_) or pa.types.is_large_string(type_) or pa.types.is_string_view(type_))


def _texts(array: pa.Array, column: str) -> pa.StringArray:
    if isinstance(array.type, pa.UuidType):
        return pa.array([str(uuid.UUID(bytes=value)) for value in array.storage.to_pylist()], pa.string())
    if not is_text(array.type):
        return array.cast(pa.string())
    texts = array if pa.types.is_string(array.type) else array.cast(pa.string())
    try:
        texts.validate(full=True)
    except pa.ArrowInvalid as error:
        raise SourceError(f"column {column!r}: an id is not valid UTF-8 text") from error
    empty = int(np.count_nonzero(np.diff(_offsets(texts)) == 0))
    if empty:
        raise SourceError(
            f"column {column!r}: {empty} of {len(texts)} ids are empty; every record needs one",
            hint="Give these rows an id, or leave them out of the source.",
        )
    return nfc(texts)


def nfc(texts: pa.StringArray) -> pa.StringArray:
    """Normalise texts to NFC; ASCII is NFC already."""
    if pc.all(pc.string_is_ascii(texts)).as_py() is not False:
        return texts
    return pc.utf8_normalize(texts, form="NFC")


def _offsets(texts: pa.StringArray) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
    if len(texts) == 0:
        return np.zeros(1, np.int32)
    return np.frombuffer(texts.buffers()[1], np.int32, len(texts) + 1, offset=4 * texts.offset)
