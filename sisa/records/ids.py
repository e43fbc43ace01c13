"""Reading the ids of a deletion request from a file."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pyarrow as pa

from sisa.errors import SourceError, UserError
from sisa.records.encode import nearest
from sisa.records.source import open_source
from sisa.routing.ids import canonical_ids

_HEADS = (b"PAR1", b"ARRO", b"\xff\xff\xff\xff")


def read_ids(
    path: str | Path, *, subject_column: str, record_column: str
) -> tuple[Literal["subject", "record"], list[str]]:
    """Read ids: one on each line of a text file, or the id column of a table.

    A table's subjects are meant if it has their column, else its records. Lines are subjects.

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
        with path.open("rb") as stream:
            head = stream.read(4)
        if not head.startswith(_HEADS) and path.suffix.lower() != ".csv":
            return "subject", _unique([line.strip() for line in path.read_text(encoding="utf-8-sig").split("\n")], path)
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is neither a table nor UTF-8 text"
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
