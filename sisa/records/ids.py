"""Reading the ids of a deletion request from a file."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pyarrow as pa

from sisa.errors import SourceError, UserError
from sisa.records.encode import nearest
from sisa.records.formats import is_table
from sisa.records.source import open_source
from sisa.routing.ids import canonical_ids


def read_ids(
    path: str | Path, *, subject_column: str, record_column: str
) -> tuple[Literal["subject", "record"], list[str]]:
    """Read ids: one on each line of a text file, or the id column of a table.

    A table's subjects are meant if it has their column, else its records. Lines are subjects. A line is an id
    as it stands: spaces belong to ids, so "a " must not delete "a". Lines without anything are skipped.

    Args:
        path: A text file, or Parquet, Arrow IPC or CSV (named ``*.csv``).
        subject_column: Name of the subjects' column.
        record_column: Name of the records' column.

    Returns:
        What the ids name, and each id once, in canonical form and in the file's order.

    Raises:
        UserError: The file can't be read, holds no id, or has neither column.
    """
    path = Path(path)
    try:
        if not is_table(path):
            # As bytes: reading as text would turn a lone carriage return, which may belong to an id, into an end of line.
            lines = path.read_bytes().decode("utf-8-sig").split("\n")
            return "subject", _unique([line.removesuffix("\r") for line in lines], path)
    except (OSError, UnicodeDecodeError) as error:
        other = "it is neither a table nor UTF-8 text" if isinstance(error, UnicodeDecodeError) else "it is no file"
        reason = getattr(error, "strerror", None) or other
        raise UserError(f"--from {str(path)!r} can't be read: {reason}", hint="Give one id per line.") from error
    source = open_source(str(path), name="--from")
    column = next((name for name in (subject_column, record_column) if name in source.schema.names), None)
    if column is None:
        names = source.schema.names
        raise SourceError(
            f"--from {str(path)!r} has no column {subject_column!r}{nearest(subject_column, names)}; "
            f"it has {', '.join(map(repr, names))}",
            hint="Name the id column as the recipe does.",
        )
    ids: list[str] = []
    try:
        for batch in source.batches([column]):
            ids += canonical_ids(batch.column(0), column=column).to_pylist()
    except SourceError as error:
        where = "" if error.message.startswith("--from") else f"--from {str(path)!r}: "
        raise SourceError(f"{where}{error.message}", hint="Mend the file, or leave these rows out.") from error
    return ("subject" if column == subject_column else "record"), _unique(ids, path)


def _unique(ids: list[str], path: Path) -> list[str]:
    given = [id_ for id_ in ids if id_]
    if not given:
        raise UserError(f"--from {str(path)!r} holds no id", hint="Give one id per line.")
    canonical = canonical_ids(pa.array(given, pa.string()), column=str(path)).to_pylist()
    return list(dict.fromkeys(canonical))
