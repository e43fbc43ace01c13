"""Tables as Arrow IPC streams in memory: what clients send and get in bulk."""

from __future__ import annotations

import pyarrow as pa

from sisa.errors import SourceError


def read_stream(content: bytes) -> pa.Table:
    """Read a table whose bytes somebody else wrote; every offset in it is checked.

    Raises:
        SourceError: It is no whole Arrow IPC stream.
    """
    try:
        with pa.ipc.open_stream(content) as stream:
            table = stream.read_all()
        table.validate(full=True)
    except (pa.ArrowException, OSError, ValueError, MemoryError, OverflowError):
        raise SourceError(
            "the body is no whole Arrow IPC stream, or holds text that is not UTF-8",
            hint="Write it with pyarrow.ipc.new_stream.",
        ) from None
    return table


def write_stream(table: pa.Table) -> bytes:
    """Return a table as an Arrow IPC stream."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue().to_pybytes())
