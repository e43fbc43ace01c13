"""Reading request bodies: what can't be understood is a 4xx that says what to change, never what came.

A body is small, what it stands for may not be. Arrow's compressed buffers, and views that name one long text many
times, may be of any size: they are refused before they are looked into. Dictionaries, which many writers use, are
measured before they are unpacked.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Collection, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from anyio.to_thread import run_sync
from starlette.requests import ClientDisconnect, Request

from sisa.errors import SourceError
from sisa.records.kinds import is_number
from sisa.records.streams import read_stream
from sisa.routing.ids import is_text
from sisa.serving.limits import Refused, Threads

INLINE_BYTES = 2**16
"""Larger JSON is parsed in a thread, so that health and small requests needn't wait for it."""
PARSED_AT_ONCE = 2
"""So many of those: what comes of a body may be many times as large."""
MAX_UNPACKED_BYTES = 2**28
"""So many bytes of text may stand behind the dictionary of a column."""
NOT_JSON = "the body is no valid JSON (in UTF-8, without NaN and Infinity)"
NO_STREAM = "the body is no whole Arrow IPC stream"
IN_PARTS = "Send it in parts."
HEADER_TYPE, HEADER, DATA, COMPRESSION = 1, 2, 1, 3
"""Fields of Message, DictionaryBatch and RecordBatch: https://github.com/apache/arrow/blob/main/format/Message.fbs"""
DICTIONARY_BATCH, RECORD_BATCH = 2, 3


_PARSING = Threads(PARSED_AT_ONCE)


async def json_object(request: Request, *, unique: bool = False) -> dict[str, Any]:
    """Return the JSON object that a request carries.

    Args:
        request: The request.
        unique: Whether to refuse an object that names a field twice, of which JSON readers keep one.

    Raises:
        Refused: 415 for another type of content, 400 for what is no JSON object.
    """
    kind = content_type(request)
    if kind not in {"application/json", ""}:
        raise Refused(415, "the body is not JSON", hint="Send it with content-type: application/json.")
    content = await whole_body(request)
    if len(content) <= INLINE_BYTES:
        found = _parsed(content, unique)
    else:
        found = await run_sync(_parsed, content, unique, limiter=_PARSING.get())
    if not isinstance(found, dict):
        raise Refused(400, "expected a JSON object", hint='For example {"rows": [...]}.')
    return found


def _parsed(content: bytes, unique: bool) -> Any:
    try:
        text = content.decode("utf-8-sig")  # json would guess at UTF-16, and let halves of surrogates pass
        return (UNIQUE if unique else PLAIN).decode(text)
    except (ValueError, RecursionError):
        raise Refused(400, NOT_JSON, hint="Check it with a JSON tool.") from None


def _no_constant(name: str) -> float:
    raise ValueError(name)


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise Refused(400, "an object of the body names a field twice", hint="Name each field once.")
    return found


PLAIN = json.JSONDecoder(parse_constant=_no_constant)
UNIQUE = json.JSONDecoder(parse_constant=_no_constant, object_pairs_hook=_each_once)


def content_type(request: Request) -> str:
    """Return the body's media type, without parameters."""
    named = next((value for name, value in request.scope["headers"] if name == b"content-type"), b"")
    return str(named, "latin-1").partition(";")[0].strip().lower()


async def whole_body(request: Request) -> bytes:
    """Read a request's body. Once: nothing keeps it.

    Raises:
        ClientDisconnect: The client left before its end.
    """
    parts = []
    while True:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        parts.append(message.get("body", b""))
        if not message.get("more_body", False):
            return b"".join(parts)


def only_known(body: Mapping[str, Any], known: Mapping[str, str], *, what: str) -> None:
    """Make sure that an object has no other fields.

    Args:
        body: The object.
        known: Fields that it may have, and what they are.
        what: What the caller calls it.

    Raises:
        Refused: 422.
    """
    strange = [name for name in body if name not in known]
    if strange:
        raise Refused(422, f"{what}: {strange[0]!r:.60} is no field", hint=f"Fields are: {', '.join(known)}.")


# --- Arrow ---


def arrow_table(content: bytes, features: Collection[str]) -> pa.Table:
    """Return the table that an Arrow IPC stream holds; what its columns stand for fits into memory.

    Args:
        content: The stream.
        features: Columns that it may have.

    Raises:
        Refused: 400 for what is no whole stream, 413 for one that would unpack to too much, 422 for one that is
            compressed, or has a column twice, one that is no feature, or one of a type that no feature has.
    """
    try:
        with pa.ipc.open_stream(content) as stream:  # noqa: TID251 - a body, before it may become a table
            _check_schema(stream.schema, features)
    except (pa.ArrowException, OSError, ValueError, MemoryError, OverflowError):
        raise Refused(400, NO_STREAM, hint="Write it with pyarrow.ipc.new_stream.") from None
    if _is_compressed(content):
        raise Refused(422, "the Arrow stream is compressed", hint="Write it without IpcWriteOptions(compression=...).")
    try:
        table = read_stream(content)
    except SourceError as error:
        raise Refused(400, error.message, hint=error.hint) from None
    for name in table.schema.names:
        if sum(_text_bytes(chunk) for chunk in table.column(name).chunks) > MAX_UNPACKED_BYTES:
            raise Refused(413, f"column {name!r} unpacks to more than {MAX_UNPACKED_BYTES:,} bytes", hint=IN_PARTS)
    return table


def _check_schema(schema: pa.Schema, features: Collection[str]) -> None:
    strange = [name for name in schema.names if name not in features]
    if strange:
        raise Refused(422, f"column {strange[0]!r:.100} is no feature of this model", hint="Leave it out.")
    if len(set(schema.names)) != len(schema.names):
        raise Refused(422, "a column occurs more than once", hint="Name each feature once.")
    for field in schema:
        if not _is_taken(field.type):
            hint = "Send numbers, booleans, texts (string or large_string), or lists of numbers."
            raise Refused(422, f"column {field.name!r}: its type is not taken over HTTP", hint=hint)


def _is_taken(type_: pa.DataType) -> bool:
    t = pa.types
    if isinstance(type_, pa.BaseExtensionType):
        return _is_taken(type_.storage_type)
    if t.is_dictionary(type_):
        return _is_plain(type_.value_type)
    if t.is_list(type_) or t.is_large_list(type_) or t.is_fixed_size_list(type_):
        return is_number(type_.value_type) or t.is_null(type_.value_type)
    return _is_plain(type_)


def _is_plain(type_: pa.DataType) -> bool:
    t = pa.types
    return bool(is_number(type_) or t.is_null(type_) or t.is_string(type_) or t.is_large_string(type_))


def _is_compressed(content: bytes) -> bool:
    """Say whether a message of a stream has compressed buffers; Arrow has checked its headers when it is looked at."""
    try:
        messages = pa.ipc.MessageReader.open_stream(content)  # noqa: TID251 - the same
        return any(_has_compression(message.metadata.to_pybytes()) for message in messages)
    except (pa.ArrowException, OSError, ValueError, MemoryError, OverflowError, struct.error):
        return False  # then it can't be read as a table either


def _has_compression(header: bytes) -> bool:
    """Look for the field ``compression`` in a message's flatbuffer."""
    message = struct.unpack_from("<I", header, 0)[0]
    kind_at, batch = _field(header, message, HEADER_TYPE), _target(header, message, HEADER)
    kind = header[kind_at] if kind_at else 0
    if kind == DICTIONARY_BATCH and batch:
        batch = _target(header, batch, DATA)
    return kind in {DICTIONARY_BATCH, RECORD_BATCH} and batch > 0 and _field(header, batch, COMPRESSION) > 0


def _field(header: bytes, table: int, number: int) -> int:
    """Return where a table of a flatbuffer has a field; 0 if it hasn't."""
    slots = table - struct.unpack_from("<i", header, table)[0]
    if 4 + 2 * number >= struct.unpack_from("<H", header, slots)[0]:
        return 0
    offset = struct.unpack_from("<H", header, slots + 4 + 2 * number)[0]
    return table + offset if offset else 0


def _target(header: bytes, table: int, number: int) -> int:
    at = _field(header, table, number)
    return at + struct.unpack_from("<I", header, at)[0] if at else 0


def _text_bytes(array: pa.Array) -> int:
    """Return how many bytes of text an array stands for; 0 where that isn't more than the array itself."""
    if isinstance(array, pa.ExtensionArray):
        return _text_bytes(array.storage)
    if not isinstance(array, pa.DictionaryArray) or not is_text(array.dictionary.type):
        return 0
    lengths = pc.binary_length(array.dictionary).take(array.indices)
    return int(pc.sum(lengths.cast(pa.int64())).as_py() or 0)
