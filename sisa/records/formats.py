"""How each format of table is opened and read in batches of bounded size.

An opener gives schema, number of rows (None if only reading would tell) and a reader; a reader gives chosen
columns batch by batch. Errors are the backends' own; :mod:`sisa.records.source` explains them.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.ipc as paipc
import pyarrow.parquet as papq
from numpy.typing import NDArray

from sisa.errors import SourceError
from sisa.records.kinds import plain_type

BATCH_BYTES = 8 * 2**20
MOST_ROWS, LEAST_ROWS = 65_536, 256
CSV_BLOCK_BYTES, MOST_CSV_BLOCK_BYTES = 2 * 2**20, 64 * 2**20

Reader = Callable[[Path, Sequence[str]], Iterator[pa.RecordBatch]]


def batch_rows(schema: pa.Schema) -> int:
    """Return how many rows of this schema make a batch of bounded size."""
    width = sum(_width(field.type) for field in schema) or 1
    return max(LEAST_ROWS, min(MOST_ROWS, BATCH_BYTES // width))


def _width(type_: pa.DataType) -> int:
    inner = plain_type(type_)
    if pa.types.is_fixed_size_list(inner):
        return int(inner.list_size) * _width(inner.value_type)
    try:
        return max(1, int(inner.bit_width) // 8)
    except ValueError:
        return 32


def format_of(path: Path) -> str:
    """Tell a file's format from its magic bytes; CSV, which has none, from its name.

    Raises:
        SourceError: It is none that can be read.
    """
    head, tail, size_bytes = _ends(path)
    if not size_bytes:
        raise SourceError(f"{str(path)!r} is an empty file", hint="Write the file again, or leave it out.")
    found = _by_magic(head, tail, size_bytes)
    if found is not None:
        return found
    suffix = path.suffix.lower()
    if suffix == ".csv":
        return "csv"
    if head.startswith(_PARQUET) and suffix in _PARQUET_SUFFIXES:
        return "parquet"  # cut short or damaged: its reader says so
    raise SourceError(
        f"{str(path)!r} is no table that can be read; expected Parquet, Arrow IPC, or CSV (named *.csv)",
        hint="Convert the file to Parquet.",
    )


def is_table(path: Path) -> bool:
    """Tell a table (by its magic bytes or its name) from a text that merely starts like one.

    Raises:
        OSError: The file can't be read.
    """
    return path.suffix.lower() in {".csv", *_PARQUET_SUFFIXES} or _by_magic(*_ends(path)) is not None


_PARQUET, _IPC_FILE, _IPC_STREAM = b"PAR1", b"ARROW1\0\0", b"\xff\xff\xff\xff"
_PARQUET_SUFFIXES = (".parquet", ".pq")
_END_BYTES = 8


def _ends(path: Path) -> tuple[bytes, bytes, int]:
    """Return the first and the last 8 bytes of a file, and its size in bytes."""
    with path.open("rb") as stream:
        head = stream.read(_END_BYTES)
        size_bytes = stream.seek(0, os.SEEK_END)
        stream.seek(max(0, size_bytes - _END_BYTES))
        return head, stream.read(), size_bytes


def _by_magic(head: bytes, tail: bytes, size_bytes: int) -> str | None:
    """Tell a format by its magic in full: ids may be words like PAR1 or ARROW1."""
    if head.startswith(_PARQUET) and tail.endswith(_PARQUET):
        # Between its magic, and before the one at the end, a footer has room whose length stands there in four bytes.
        footer_bytes = int.from_bytes(tail[:4], "little")
        return "parquet" if len(_PARQUET) + footer_bytes + _END_BYTES <= size_bytes else None
    if head == _IPC_FILE:
        return "ipc file"
    return "ipc stream" if head.startswith(_IPC_STREAM) else None


def _open_parquet(path: Path) -> tuple[pa.Schema, int | None, Reader]:
    with papq.ParquetFile(path) as file:
        return file.schema_arrow, file.metadata.num_rows, _read_parquet


def _read_parquet(path: Path, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    # A buffer for each column instead of whole row groups, which may be as large as the file.
    with papq.ParquetFile(path, buffer_size=2**20, pre_buffer=False, page_checksum_verification=True) as file:
        schema = file.schema_arrow  # converted anew each time
        chosen = pa.schema([schema.field(name) for name in columns])
        _check_lists(chosen, path)
        yield from file.iter_batches(batch_size=batch_rows(chosen), columns=list(columns), use_threads=False)


def _check_lists(schema: pa.Schema, path: Path) -> None:
    """Refuse lists of no elements, which the reader of Parquet takes for damage."""
    for field in schema:
        type_ = plain_type(field.type)
        if pa.types.is_fixed_size_list(type_) and not type_.list_size:
            raise SourceError(
                f"{str(path)!r}: column {field.name!r} is a list of 0 elements; expected at least 1",
                hint="Leave the column out of the file.",
            )


def _open_ipc_file(path: Path) -> tuple[pa.Schema, int | None, Reader]:
    with pa.OSFile(str(path)) as stream, paipc.open_file(stream) as reader:
        return reader.schema, None, _read_ipc_file


def _read_ipc_file(path: Path, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    with pa.OSFile(str(path)) as stream, paipc.open_file(stream) as reader:
        for index in range(reader.num_record_batches):
            yield from _cut(reader.get_batch(index), columns)


def _open_ipc_stream(path: Path) -> tuple[pa.Schema, int | None, Reader]:
    with pa.OSFile(str(path)) as stream, paipc.open_stream(stream) as reader:
        return reader.schema, None, _read_ipc_stream


def _read_ipc_stream(path: Path, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    with pa.OSFile(str(path)) as stream, paipc.open_stream(stream) as reader:
        for batch in reader:
            yield from _cut(batch, columns)


def _cut(batch: pa.RecordBatch, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    chosen = batch.select(list(columns))
    for column in chosen.columns:
        _texts_as_bytes(column).validate(full=True)  # IPC has no checksums: at least no offset may point outside
    size = batch_rows(chosen.schema)
    for start in range(0, chosen.num_rows, size):
        yield chosen.slice(start, size)


_BYTES = {pa.string(): pa.binary(), pa.large_string(): pa.large_binary(), pa.string_view(): pa.binary_view()}


def _texts_as_bytes(array: pa.Array) -> pa.Array:
    """View texts as bytes: whether they are UTF-8 is for whoever reads them, and can name the column."""
    if isinstance(array, pa.DictionaryArray):
        return pa.DictionaryArray.from_arrays(array.indices, _texts_as_bytes(array.dictionary), safe=False)
    return array.view(_BYTES[array.type]) if array.type in _BYTES else array


def _open_csv(path: Path) -> tuple[pa.Schema, int | None, Reader]:
    with _csv_reader(path, None) as reader:
        names = reader.schema.names
    return pa.schema([(name, pa.string()) for name in names]), None, _read_csv


def _read_csv(path: Path, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    with _csv_reader(path, columns) as reader:
        yield from reader


def _csv_block_bytes(path: Path) -> int:
    """Return how many bytes to parse at a time: as many as hold enough rows, within limits.

    Each block costs time for each column. If wide rows made blocks of a few rows, that would be time for each value.
    """
    with path.open("rb") as stream:
        start = stream.read(CSV_BLOCK_BYTES)
    row_bytes = len(start) // max(1, start.count(b"\n"))
    return max(CSV_BLOCK_BYTES, min(MOST_CSV_BLOCK_BYTES, LEAST_ROWS * row_bytes))


@contextlib.contextmanager
def _csv_reader(path: Path, columns: Sequence[str] | None) -> Iterator[pacsv.CSVStreamingReader]:
    """Open a CSV file: its header if ``columns`` is None, else those columns as text."""
    invalid: list[tuple[int, int]] = []

    def refuse(row: pacsv.InvalidRow) -> str:
        invalid.append((row.expected_columns, row.actual_columns))
        return "error"

    convert = pacsv.ConvertOptions()
    if columns is not None:
        convert = pacsv.ConvertOptions(
            check_utf8=False,  # left to whoever reads the texts, and can name the column
            column_types=dict.fromkeys(columns, pa.string()),
            include_columns=list(columns),
            null_values=[""],
            strings_can_be_null=True,
            quoted_strings_can_be_null=False,
        )
    try:
        with pacsv.open_csv(
            path,
            read_options=pacsv.ReadOptions(use_threads=False, block_size=_csv_block_bytes(path)),
            parse_options=pacsv.ParseOptions(newlines_in_values=True, invalid_row_handler=refuse),
            convert_options=convert,
        ) as reader:
            yield reader
    except pa.ArrowInvalid as error:
        if not invalid:
            raise
        expected, actual = invalid[0]
        raise SourceError(
            f"{str(path)!r}: a row has {actual} fields where the header has {expected}",
            hint="Quote fields that contain a comma.",
        ) from error


OPENERS: dict[str, Callable[[Path], tuple[pa.Schema, int | None, Reader]]] = {
    "parquet": _open_parquet,
    "ipc file": _open_ipc_file,
    "ipc stream": _open_ipc_stream,
    "csv": _open_csv,
}


DIGITS = pa.schema([("record_id", pa.int64()), ("pixels", pa.list_(pa.uint8(), 64)), ("digit", pa.int64())])


def read_digits(path: Path, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """Scikit-learn's handwritten digits (UCI, Alpaydin and Kaynak 1998): 1,797 images of 8 x 8, values 0..16."""
    values_ND = _digits(path)
    pixels = pa.array(values_ND[:, :64].astype(np.uint8).reshape(-1))
    table = {
        "record_id": pa.array(range(len(values_ND)), pa.int64()),
        "pixels": pa.FixedSizeListArray.from_arrays(pixels, 64),
        "digit": pa.array(values_ND[:, 64].astype(np.int64)),
    }
    yield pa.record_batch([table[name] for name in columns], names=list(columns))


def _digits(path: Path) -> NDArray[np.float64]:
    """Read (N, 65) numbers, 64 pixels and the digit, without importing scikit-learn if its file is in place."""
    found = importlib.util.find_spec("sklearn")
    if found is None or found.origin is None:
        raise SourceError(f"{str(path)!r} needs scikit-learn", hint="pip install 'sisa[digits]'")
    file = Path(found.origin).parent / "datasets" / "data" / "digits.csv.gz"
    if file.is_file():
        return np.loadtxt(file, delimiter=",")
    from sklearn.datasets import load_digits

    digits = load_digits()
    return np.concatenate([digits.data, digits.target[:, None]], axis=1)
