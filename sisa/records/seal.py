"""The seal of a Parquet file: a digest of all its other bytes.

Checksums of pages say nothing of the footer and of what lies around pages. The seal lies between the last row group
and the footer, where readers of Parquet don't look (offsets count from the start), so that a sealed file is one file
still, replaced in one rename. It is no secret and proves no origin: it finds damage.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import BinaryIO

SEAL_BYTES = 32
BLOCK_BYTES = 2**20
"""Bytes digested at a time."""
_ENDING_BYTES = 8
"""The footer's length in four bytes, and PAR1."""


def seal(file: Path | BinaryIO) -> None:
    """Seal a file that was just written; not durable by itself.

    Raises:
        ValueError: It isn't a Parquet file.
    """
    if isinstance(file, Path):
        with file.open("r+b") as stream:
            seal(stream)
        return
    start, tail = _footer(file)
    digest = _digest(file, start, tail)
    file.seek(start)
    file.write(digest + tail)


def check_seal(stream: BinaryIO) -> None:
    """Verify every byte of a sealed file, and go back to its start.

    Raises:
        ValueError: It isn't what was sealed.
    """
    start, tail = _footer(stream)
    if start < SEAL_BYTES:
        raise ValueError("there is no room for a seal")
    stream.seek(start - SEAL_BYTES)
    if stream.read(SEAL_BYTES) != _digest(stream, start - SEAL_BYTES, tail):
        raise ValueError("the seal is another file's")
    stream.seek(0)


def _footer(stream: BinaryIO) -> tuple[int, bytes]:
    """Return where the footer starts, and all from there to the end."""
    end = stream.seek(0, os.SEEK_END)
    stream.seek(max(0, end - _ENDING_BYTES))
    start = end - _ENDING_BYTES - int.from_bytes(stream.read(4), "little")
    if start < 0:
        raise ValueError("the footer is longer than the file")
    stream.seek(start)
    return start, stream.read()


def _digest(stream: BinaryIO, length: int, tail: bytes) -> bytes:
    """Digest the first ``length`` bytes of a file and then ``tail``."""
    digest = hashlib.blake2b(digest_size=SEAL_BYTES, person=b"sisa-partition")
    stream.seek(0)
    while length:
        block = stream.read(min(length, BLOCK_BYTES))
        if not block:
            raise ValueError("the file ends early")
        digest.update(block)
        length -= len(block)
    digest.update(tail)
    return digest.digest()
