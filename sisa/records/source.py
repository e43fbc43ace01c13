"""Opening the table that a recipe names: Parquet, CSV, Arrow IPC, or the built-in digits.

Invariants:

* A source is read in batches of bounded size and may be read as often as needed.
* Order of files and rows, file split and encoding carry no meaning: nothing downstream may depend on them.
* CSV has no schema: every column is text, an unquoted empty field is missing, and the recipe gives types.
* Whatever goes wrong is a :class:`SourceError` that names the file and shows no value of a row.
"""

from __future__ import annotations

import contextlib
import glob
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.ipc as paipc
import pyarrow.parquet as papq

from sisa.errors import SourceError, UserError
from sisa.records.kinds import plain_array, plain_type
from sisa.routing.ids import is_text

BATCH_BYTES = 8 * 2**20
MOST_ROWS, LEAST_ROWS = 65_536, 256
CSV_BLOCK_BYTES = 2 * 2**20
BUILTIN = "builtin:"

Reader = Callable[[Path, Sequence[str]], Iterator[pa.RecordBatch]]


@dataclass(frozen=True)
class Source:
    """A table that can be read again and again."""

    uri: str
    schema: pa.Schema
    csv: bool
    """Whether columns are text that the recipe has to give types."""
    rows: int | None
    """Number of rows, None if only reading would tell."""
    _parts: tuple[tuple[Path, Reader], ...]

    def batches(self, columns: Sequence[str] | None = None) -> Iterator[pa.RecordBatch]:
        """Read the table, or some of its columns, in bounded memory.

        Args:
            columns: Names; None for all. Each batch has them in this order.

        Raises:
            SourceError: A file can't be read to its end.
        """
        names = list(self.schema.names if columns is None else columns)
        for path, reader in self._parts:
            with _explained(path):
                for batch in reader(path, names):
                    if batch.num_rows:
                        yield _unified(batch.select(names), self.schema)


def open_source(uri: str) -> Source:
    """Open a path, a glob or ``builtin:digits``.

    Raises:
        SourceError: There is no such file, it isn't a table, or the files of a glob differ in their columns.
        UserError: Another kind of address.
    """
    if uri.startswith(BUILTIN):
        return _builtin(uri)
    text = uri.removeprefix("file://")
    if "://" in text:
        raise UserError(
            f"data.source {uri!r}: expected a local path or glob, object storage is not supported yet",
            hint="Copy the table to a local or shared disk.",
        )
    parts: list[tuple[Path, Reader]] = []
    schema: pa.Schema | None = None
    counts: list[int | None] = []
    csv: set[bool] = set()
    for path in _files(text):
        with _explained(path):
            kind = _format(path)
            found, count, reader = _OPENERS[kind](path)
        _check_names(found, path)
        if schema is not None and _comparable(found) != _comparable(schema):
            raise SourceError(
                f"{str(path)!r} has other columns or types than {str(parts[0][0])!r}: {_difference(schema, found)}",
                hint="All files of a source need the same columns.",
            )
        # Files may encode the same texts in different ways; then their plain form is what is read.
        schema = found if schema is None or schema.equals(found) else _plain(schema)
        csv.add(kind == "csv")
        parts.append((path, reader))
        counts.append(count)
    if len(csv) > 1:
        raise SourceError(f"data.source {uri!r} mixes CSV and typed files", hint="Use one format for all files.")
    known = [count for count in counts if count is not None]
    rows = sum(known) if len(known) == len(counts) else None
    return Source(uri, schema, csv == {True}, rows, tuple(parts))


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


def _files(text: str) -> list[Path]:
    path = Path(text)
    if path.is_dir():
        raise SourceError(
            f"data.source {text!r} is a folder; expected a file or a glob",
            hint=f"Give for example {text.rstrip('/')}/*.parquet.",
        )
    if path.is_file():
        return [path]
    found = sorted(Path(name) for name in glob.glob(text, recursive=True) if Path(name).is_file())  # noqa: PTH207 - absolute patterns too
    if not found:
        kind = "no file matches" if glob.has_magic(text) else "there is no such file"
        raise SourceError(f"data.source {text!r}: {kind}", hint="Paths are relative to the current folder.")
    return found


def _format(path: Path) -> str:
    with path.open("rb") as stream:
        head = stream.read(8)
    if head[:4] == b"PAR1":
        return "parquet"
    if head[:6] == b"ARROW1":
        return "ipc file"
    if head[:4] == b"\xff\xff\xff\xff":
        return "ipc stream"
    if path.suffix.lower() == ".csv":
        return "csv"
    raise SourceError(
        f"data.source {str(path)!r} is no table that can be read; expected Parquet, Arrow IPC, or CSV (named *.csv)",
        hint="Convert the file to Parquet.",
    )


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turn what a reader raises into a :class:`SourceError` that names the file."""
    try:
        yield
    except (pa.ArrowException, OSError, ValueError, KeyError) as error:
        # A reader's own words may quote a row.
        raise SourceError(
            f"data.source {str(path)!r} can't be read: it is damaged or not in the format that it seems "
            f"to be ({type(error).__name__})",
            hint="Write the file again, or leave it out.",
        ) from error


def _check_names(schema: pa.Schema, path: Path) -> None:
    twice = sorted({name for name in schema.names if schema.names.count(name) > 1})
    if twice:
        raise SourceError(
            f"{str(path)!r} has more than one column named {', '.join(map(repr, twice))}",
            hint="Column names must be unique.",
        )


def _comparable(schema: pa.Schema) -> dict[str, str]:
    types = {field.name: plain_type(field.type) for field in schema}
    return {name: "text" if is_text(type_) else str(type_) for name, type_ in types.items()}


def _plain(schema: pa.Schema) -> pa.Schema:
    types = [pa.string() if is_text(plain_type(field.type)) else plain_type(field.type) for field in schema]
    return pa.schema(list(zip(schema.names, types, strict=True)))


def _unified(batch: pa.RecordBatch, schema: pa.Schema) -> pa.RecordBatch:
    """Give a batch the types of the source, where its file encodes them in another way."""
    arrays = [
        array if array.type == schema.field(name).type else plain_array(array).cast(schema.field(name).type)
        for name, array in zip(batch.schema.names, batch.columns, strict=True)
    ]
    return pa.record_batch(arrays, names=batch.schema.names)


def _difference(one: pa.Schema, other: pa.Schema) -> str:
    left, right = _comparable(one), _comparable(other)
    names = sorted(name for name in left.keys() | right.keys() if left.get(name) != right.get(name))
    name = names[0]
    return f"column {name!r} is {right.get(name, 'absent')} here, {left.get(name, 'absent')} there"


def _open_parquet(path: Path) -> tuple[pa.Schema, int | None, Reader]:
    with papq.ParquetFile(path) as file:
        return file.schema_arrow, file.metadata.num_rows, _read_parquet


def _read_parquet(path: Path, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    # A buffer for each column instead of whole row groups, which may be as large as the file.
    with papq.ParquetFile(path, buffer_size=2**20, pre_buffer=False, page_checksum_verification=True) as file:
        size = batch_rows(pa.schema([file.schema_arrow.field(name) for name in columns]))
        yield from file.iter_batches(batch_size=size, columns=list(columns), use_threads=False)


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
    batch.validate(full=True)  # IPC has no checksums: at least no offset may point outside
    chosen = batch.select(list(columns))
    size = batch_rows(chosen.schema)
    for start in range(0, chosen.num_rows, size):
        yield chosen.slice(start, size)


def _open_csv(path: Path) -> tuple[pa.Schema, int | None, Reader]:
    with _csv_reader(path, None) as reader:
        names = reader.schema.names
    return pa.schema([(name, pa.string()) for name in names]), None, _read_csv


def _read_csv(path: Path, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    with _csv_reader(path, columns) as reader:
        yield from reader


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
            column_types=dict.fromkeys(columns, pa.string()),
            include_columns=list(columns),
            null_values=[""],
            strings_can_be_null=True,
            quoted_strings_can_be_null=False,
        )
    try:
        with pacsv.open_csv(
            path,
            read_options=pacsv.ReadOptions(use_threads=False, block_size=CSV_BLOCK_BYTES),
            parse_options=pacsv.ParseOptions(newlines_in_values=True, invalid_row_handler=refuse),
            convert_options=convert,
        ) as reader:
            yield reader
    except pa.ArrowInvalid as error:
        if not invalid:
            raise
        expected, actual = invalid[0]
        raise SourceError(
            f"data.source {str(path)!r}: a row has {actual} fields where the header has {expected}",
            hint="Quote fields that contain a comma.",
        ) from error


_OPENERS: dict[str, Callable[[Path], tuple[pa.Schema, int | None, Reader]]] = {
    "parquet": _open_parquet,
    "ipc file": _open_ipc_file,
    "ipc stream": _open_ipc_stream,
    "csv": _open_csv,
}


def _builtin(uri: str) -> Source:
    if uri != "builtin:digits":
        raise SourceError(f"data.source {uri!r}: no such built-in table", hint="The built-in table is builtin:digits.")
    schema = pa.schema([("record_id", pa.int64()), ("pixels", pa.list_(pa.uint8(), 64)), ("digit", pa.int64())])
    return Source(uri, schema, csv=False, rows=1797, _parts=((Path(uri), _read_digits),))


def _read_digits(path: Path, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """Scikit-learn's handwritten digits (UCI, Alpaydin and Kaynak 1998): 1,797 images of 8 x 8, values 0..16."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise SourceError(f"data.source {str(path)!r} needs scikit-learn", hint="pip install 'sisa[digits]'") from error
    digits = load_digits()
    pixels = pa.array(digits.data.astype("uint8").reshape(-1))
    table = {
        "record_id": pa.array(range(len(digits.target)), pa.int64()),
        "pixels": pa.FixedSizeListArray.from_arrays(pixels, 64),
        "digit": pa.array(digits.target, pa.int64()),
    }
    yield pa.record_batch([table[name] for name in columns], names=list(columns))
