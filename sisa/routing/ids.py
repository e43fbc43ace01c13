"""The one canonical text form of an id, whatever the type that a table keeps it in.

Integers are decimal, texts are NFC, UUIDs are the lower-case form with hyphens. An id that is missing or
empty names nobody, and a float or a date has more than one text: these are refused, never guessed.

NFC is Python's own (:mod:`unicodedata`) everywhere, for one text as for a column of them: other libraries
follow other versions of Unicode, and an id would be another one when it is typed than when it is read.
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


def id_text(value: object, *, where: str) -> str:
    """Return the text of an id that a program gives: what a column of that type would have it be.

    Args:
        value: A text, an integer (Python's or numpy's) or a UUID.
        where: What the caller calls it (an argument, a field), for messages.

    Raises:
        UserError: It is of another type, which may have more than one text.

    >>> id_text(17, where="subjects")
    '17'
    """
    if isinstance(value, str):
        return str.__str__(value)  # an enumeration's member is its value
    if isinstance(value, int | np.integer) and not isinstance(value, bool):
        return str(int(value))
    if isinstance(value, uuid.UUID):
        return str(value)
    kind = "None" if value is None else f"a value of type {type(value).__name__}"
    raise UserError(
        f"{where}: expected ids that are texts, integers or UUIDs, got {kind}",
        hint="Give each id as the table has it, as a text if in doubt.",
    )


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
    check_utf8(texts, what=f"column {column!r}")
    empty = int(np.count_nonzero(np.diff(_offsets(texts)) == 0))
    if empty:
        raise SourceError(
            f"column {column!r}: {empty} of {len(texts)} ids are empty; every record needs one",
            hint="Give these rows an id, or leave them out of the source.",
        )
    return nfc(texts)


def check_utf8(texts: pa.StringArray, *, what: str) -> None:
    """Make sure that texts are texts: Arrow takes any bytes for one, and stumbles where it looks into them.

    Args:
        texts: N texts, nulls among them or not.
        what: Where they come from, for the message.

    Raises:
        SourceError: Some aren't valid UTF-8.
    """
    try:
        texts.validate(full=True)
    except pa.ArrowInvalid as error:
        wrong = sum(not _is_utf8(content) for content in texts.view(pa.binary()).to_pylist())
        raise SourceError(
            f"{what}: {wrong} of {len(texts)} texts read so far are not valid UTF-8",
            hint="Write them as UTF-8 (a whole CSV file can be converted with iconv), or leave these rows out.",
        ) from error


def nfc(texts: pa.StringArray) -> pa.StringArray:
    """Normalise valid texts to NFC; ASCII is NFC already, and most texts are ASCII."""
    ascii_N = pc.string_is_ascii(texts)
    if pc.all(ascii_N).as_py() is not False:
        return texts
    others_N = pc.invert(ascii_N).fill_null(False)
    normal = [unicodedata.normalize("NFC", text) for text in texts.filter(others_N).to_pylist()]
    return pc.replace_with_mask(texts, others_N, pa.array(normal, pa.string()))


def _is_utf8(content: bytes | None) -> bool:
    try:
        (content or b"").decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _offsets(texts: pa.StringArray) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
    if len(texts) == 0:
        return np.zeros(1, np.int32)
    return np.frombuffer(texts.buffers()[1], np.int32, len(texts) + 1, offset=4 * texts.offset)
