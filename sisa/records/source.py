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
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from sisa.errors import SourceError, UserError
from sisa.records.formats import DIGITS, OPENERS, Reader, format_of, read_digits
from sisa.records.kinds import plain_array, plain_type
from sisa.routing.ids import is_text

BUILTIN = "builtin:"


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
    _name: str = "data.source"
    """What the caller calls it, for messages."""

    def batches(self, columns: Sequence[str] | None = None) -> Iterator[pa.RecordBatch]:
        """Read the table, or some of its columns, in bounded memory.

        Args:
            columns: Names; None for all. Each batch has them in this order.

        Raises:
            SourceError: A file can't be read to its end.
        """
        names = list(self.schema.names if columns is None else columns)
        for path, reader in self._parts:
            with _explained(path, self._name):
                for batch in reader(path, names):
                    if batch.num_rows:
                        yield _unified(batch.select(names), self.schema)


def open_source(uri: str, *, name: str = "data.source") -> Source:
    """Open a path, a glob or ``builtin:digits``.

    Args:
        uri: What to open.
        name: Where the caller was given it (a field, an option), for messages.

    Raises:
        SourceError: There is no such file, it isn't a table, or the files of a glob differ in their columns.
        UserError: Another kind of address.
    """
    if uri.startswith(BUILTIN):
        return _builtin(uri, name)
    text = uri.removeprefix("file://")
    if "://" in text:
        raise UserError(
            f"{name} {uri!r}: expected a local path or glob, object storage is not supported yet",
            hint="Copy the table to a local or shared disk.",
        )
    parts: list[tuple[Path, Reader]] = []
    schema: pa.Schema | None = None
    counts: list[int | None] = []
    csv: set[bool] = set()
    for path in _files(text, name):
        with _explained(path, name):
            kind = format_of(path)
            found, count, reader = OPENERS[kind](path)
            _check_names(found, path)
        csv.add(kind == "csv")
        if len(csv) > 1:
            raise SourceError(f"{name} {uri!r} mixes CSV and typed files", hint="Use one format for all files.")
        if schema is not None and _comparable(found) != _comparable(schema):
            raise SourceError(
                f"{str(path)!r} has other columns or types than {str(parts[0][0])!r}: {_difference(schema, found)}",
                hint="All files of a source need the same columns.",
            )
        # Files may encode the same texts in different ways; then their plain form is what is read.
        schema = found if schema is None or schema.equals(found) else _plain(schema)
        parts.append((path, reader))
        counts.append(count)
    known = [count for count in counts if count is not None]
    rows = sum(known) if len(known) == len(counts) else None
    return Source(uri, schema, csv == {True}, rows, tuple(parts), name)


def _files(text: str, name: str) -> list[Path]:
    path = Path(text)
    if path.is_dir():
        raise SourceError(
            f"{name} {text!r} is a folder; expected a file or a glob",
            hint=f"Give for example {text.rstrip('/')}/*.parquet.",
        )
    if path.is_file():
        return [path]
    found = sorted(Path(file) for file in glob.glob(text, recursive=True) if Path(file).is_file())  # noqa: PTH207 - absolute patterns too
    if not found:
        kind = "no file matches" if glob.has_magic(text) else "there is no such file"
        raise SourceError(f"{name} {text!r}: {kind}", hint="Paths are relative to the current folder.")
    return found


@contextlib.contextmanager
def _explained(path: Path, name: str) -> Iterator[None]:
    """Turn what a reader raises into a :class:`SourceError` that names the file."""
    try:
        yield
    except SourceError as error:
        raise SourceError(f"{name} {error.message}", hint=error.hint) from error
    except (pa.ArrowException, OSError, ValueError, KeyError) as error:
        # A reader's own words may quote a row.
        raise SourceError(
            f"{name} {str(path)!r} can't be read: it is damaged or not in the format that it seems "
            f"to be ({type(error).__name__})",
            hint="Write the file again, or leave it out.",
        ) from error


def _check_names(schema: pa.Schema, path: Path) -> None:
    twice = sorted(name for name, count in Counter(schema.names).items() if count > 1)
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


def _builtin(uri: str, name: str) -> Source:
    if uri != "builtin:digits":
        raise SourceError(f"{name} {uri!r}: no such built-in table", hint="The built-in table is builtin:digits.")
    return Source(uri, DIGITS, csv=False, rows=1797, _parts=((Path(uri), read_digits),), _name=name)
