"""Many short rows of bytes, put in order on disk where memory wouldn't hold them.

Rows are kept in buckets by their first bits. What fits the budget stays in memory; beyond it the waiting rows are sorted by
bucket and appended to a file without a name: nobody finds it, and the kernel frees it when the process ends, however it
ends. A bucket is gathered again from its places in all of these runs, so that what is in memory at a time is the budget
and the 1,024th part of the rows.

Shape suffixes: N rows, W bytes of each, B buckets.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Final

import numpy as np
from numpy.typing import NDArray

from sisa.errors import StoreError

BUDGET_BYTES: Final = 16 * 2**20
"""Rows that wait in memory before they are appended to the file."""
BUCKET_BITS: Final = 10
BUCKETS: Final = 1 << BUCKET_BITS

Bytes = NDArray[np.uint8]


class Spill:
    """Rows of one width, in any order; void if their first bits aren't spread evenly, as those of a keyed hash are."""

    def __init__(self, *, width: int, folder: Path | None = None, budget_bytes: int = BUDGET_BYTES) -> None:
        """Begin without rows.

        Args:
            width: W, at least 2.
            folder: On whose file system rows lie that memory has no room for; by default where temporary files do.
            budget_bytes: How many bytes of rows may wait in memory.
        """
        self._width = width
        self._folder = folder
        self._budget_rows = max(1, budget_bytes // width)
        self._waiting: list[Bytes] = []
        self._waiting_rows = 0
        self._file: BinaryIO | None = None
        self._runs: list[tuple[int, NDArray[np.int64]]] = []
        self.count = 0
        """Rows so far."""

    def close(self) -> None:
        """Let the rows go."""
        self._waiting, self._waiting_rows = [], 0
        if self._file is not None:
            self._file.close()
            self._file = None

    def add(self, rows_NW: Bytes) -> None:
        """Take rows in.

        Raises:
            StoreError: The disk is full.
        """
        for start in range(0, len(rows_NW), self._budget_rows):
            part = rows_NW[start : start + self._budget_rows]
            if self._waiting_rows + len(part) > self._budget_rows:
                self._flush()
            self._waiting.append(part)
            self._waiting_rows += len(part)
        self.count += len(rows_NW)

    def buckets(self) -> Iterator[Bytes]:
        """Yield all rows: those of a bucket together, buckets in ascending order of their first bits."""
        if not self._runs:
            if self._waiting:
                yield np.concatenate(self._waiting)
            return
        self._flush()
        for bucket in range(BUCKETS):
            parts = [self._read(offset, starts_B, bucket) for offset, starts_B in self._runs]
            yield np.concatenate(parts)

    def _flush(self) -> None:
        if not self._waiting_rows:
            return
        rows_NW = np.concatenate(self._waiting)
        bucket_N = _buckets(rows_NW)
        order = np.argsort(bucket_N, kind="stable")
        starts_B = np.concatenate([[0], np.cumsum(np.bincount(bucket_N, minlength=BUCKETS))]) * self._width
        try:
            if self._file is None:
                self._file = tempfile.TemporaryFile(dir=self._folder, buffering=0)  # noqa: SIM115 - closed by close
            offset = self._file.seek(0, os.SEEK_END)
            content = memoryview(np.ascontiguousarray(rows_NW[order]).reshape(-1).data)
            while content:
                content = content[self._file.write(content) :]
        except OSError as error:
            raise StoreError(
                f"digests that are put in order can't be written: {error.strerror or error}",
                hint="Make room on the file system that the store's folder is on: it takes some 50 bytes a record.",
            ) from error
        self._runs.append((offset, starts_B.astype(np.int64)))
        self._waiting, self._waiting_rows = [], 0

    def _read(self, offset: int, starts_B: NDArray[np.int64], bucket: int) -> Bytes:
        assert self._file is not None
        start, end = int(starts_B[bucket]), int(starts_B[bucket + 1])
        content = os.pread(self._file.fileno(), end - start, offset + start)
        return np.frombuffer(content, np.uint8).reshape(-1, self._width)


def as_rows(hashes_N: NDArray[np.uint64]) -> Bytes:
    """Return 64-bit hashes as rows of 8 bytes that sort as the numbers do."""
    return hashes_N.astype(">u8").view(np.uint8).reshape(-1, 8)


def as_hashes(rows_N8: Bytes) -> NDArray[np.uint64]:
    """Return the hashes of :func:`as_rows`."""
    return np.ascontiguousarray(rows_N8).view(">u8").reshape(-1).astype(np.uint64)


def _buckets(rows_NW: Bytes) -> NDArray[np.uint16]:
    first = rows_NW[:, 0].astype(np.uint16) << 8 | rows_NW[:, 1]
    bucket_N: NDArray[np.uint16] = np.right_shift(first, np.uint16(16 - BUCKET_BITS))
    return bucket_N
