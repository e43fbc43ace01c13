"""Telling SQLite's own journal from another file under its name.

Between transactions the journal is empty. Killed before its commit, a writer leaves one that SQLite ignores: its
first bytes are zeros until it counts. Old pages of the ledger follow, each with its number and a checksum
(https://www.sqlite.org/fileformat.html, section 3). A journal that counts is rolled back by whoever opens the ledger.
"""

from __future__ import annotations

import struct

_UNCOUNTED = bytes(12)
"""Magic and number of records, as long as the journal doesn't count."""
_HEADER = struct.Struct(">12sIIII")
"""These, a nonce, the ledger's pages, and the bytes of a sector and of a page; zeros fill its sector."""
_STEP = 200
"""The checksum adds up one byte in so many."""


def is_ignored_journal(content: bytes, *, page_bytes: int) -> bool:
    """Say whether ``content`` is what a killed writer leaves of a journal; its last page may be cut off.

    Args:
        content: Of the journal's file.
        page_bytes: Size of the ledger's pages.
    """
    if len(content) < _HEADER.size:
        return not content
    magic, nonce, pages, sector_bytes, told_bytes = _HEADER.unpack_from(content)
    padding = content[_HEADER.size : sector_bytes]
    if magic != _UNCOUNTED or told_bytes != page_bytes or not 512 <= sector_bytes <= 65536 or any(padding):
        return False
    record_bytes = 4 + page_bytes + 4
    return all(
        _is_page(content[start : start + record_bytes], nonce=nonce, pages=pages)
        for start in range(sector_bytes, len(content) - record_bytes + 1, record_bytes)
    )


def _is_page(record: bytes, *, nonce: int, pages: int) -> bool:
    number = int.from_bytes(record[:4], "big")
    page, checksum = record[4:-4], int.from_bytes(record[-4:], "big")
    expected = nonce + sum(page[at] for at in range(len(page) - _STEP, 0, -_STEP))
    return 1 <= number <= pages and checksum == expected & 0xFFFFFFFF
