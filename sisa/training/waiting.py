"""Rows of a shard on disk while its stages train, in a file without a name.

They are people's rows. The file never has a name where the file system allows that, and elsewhere loses it at once: the
kernel frees it when the process ends, however it ends, and no search finds it meanwhile. It lies in a private folder of
the store's scratch area, which goes at once too. What may be left (a folder of a process that was killed that very moment;
on NFS a file that the client renamed) is swept by the next holder of the shard's lock, and by a deletion before the rows
of its people count as erased.

A store in object storage has that area beside its ledger, where a deletion sweeps it as in a folder. With a ledger on a server
there is one on each host, which a deletion from another can't reach: so nothing may ever have a name there, and a file system
that can't do that is refused.

In memory are 16 bytes of each record, its place and its order id, and the values of categories.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import secrets
import stat
from pathlib import Path
from typing import BinaryIO

import numpy as np

from sisa.errors import DamagedError, StoreError
from sisa.files import remove, require_nameless
from sisa.layout import Layout
from sisa.learners.columns import Array, Columns
from sisa.learners.packed import Dictionary, RowFormat, TooNarrowError
from sisa.learners.streamed import StreamedRows
from sisa.recipe import Recipe

TRIES = 100
"""How often the folder is made again when somebody removes it between that and the opening of the file."""


def sweep_waiting(layout: Layout, shard: int) -> None:
    """Remove what rows of a shard may have left; hold the shard's lock."""
    if os.path.lexists(layout.waiting_rows(shard)):
        remove(layout.waiting_rows(shard))


class WaitingRows:
    """Rows of one format, appended slice by slice."""

    def __init__(self, layout: Layout, recipe: Recipe, shard: int, *, wide: frozenset[int] = frozenset()) -> None:
        self._recipe = recipe
        self.format = RowFormat.of(recipe, wide=wide)
        self._dictionaries = [Dictionary() for _ in range(self.format.categories)]
        self._file = nameless_file(layout.waiting_rows(shard), never_named=not layout.shared)
        self._rows = 0
        self._mapped: mmap.mmap | None = None
        self._uids: list[Array] = []
        self._places_N = np.empty(0, np.int64)
        self._uids_N = np.empty(0, np.uint64)
        self._first = 0

    def close(self) -> None:
        """Let the rows go: nothing of them is left."""
        self._unmap()
        self._file.close()

    def append(self, columns: Columns) -> None:
        """Put the next rows of a slice down, as they come.

        Raises:
            TooNarrowError: A vector has to be wide from the first row on.
            StoreError: The disk is full.
        """
        if not self._rows:
            wide = {i for i, vector_ND in enumerate(columns.vectors) if vector_ND.dtype != np.uint8}
            self.format = RowFormat.of(self._recipe, wide=self.format.wide | wide)
        rows_NW = self.format.pack(columns, self._dictionaries, first=self._rows)
        try:  # written, not stored into a mapping: a full disk is an error and no signal
            self._file.write(rows_NW.reshape(-1).data)
        except OSError as error:
            raise StoreError(
                f"rows that wait for their batches can't be written: {error.strerror or error}",
                hint="Make room in the store's scratch folder, or set workers.rows_in_memory: always.",
            ) from error
        self._rows += columns.count
        self._uids.append(columns.uids_N)

    def end_slice(self, order_N: Array) -> None:
        """Say in which order the rows since the last slice are taken."""
        if not len(order_N):
            return
        start = self._rows - len(order_N)
        uids_N = np.concatenate(self._uids)
        self._uids = []
        self._first = self._first or len(order_N)
        self._places_N = np.concatenate([self._places_N, start + order_N])
        self._uids_N = np.concatenate([self._uids_N, uids_N[order_N]])

    def rows(self) -> StreamedRows:
        """Return all rows, as long as this is open and nothing is appended."""
        self._file.flush()
        self._unmap()
        if self._rows:
            self._mapped = mmap.mmap(self._file.fileno(), self._rows * self.format.width, prot=mmap.PROT_READ)
            self._mapped.madvise(mmap.MADV_RANDOM)
        values = tuple(dictionary.values for dictionary in self._dictionaries)
        return StreamedRows(self.format, self._take, values, self._places_N, self._uids_N, self._first)

    def _take(self, places_B: Array) -> Array:
        if self._mapped is None:
            return np.empty((0, self.format.width), np.uint8)
        rows_NW = np.frombuffer(self._mapped, np.uint8).reshape(-1, self.format.width)
        return rows_NW.take(places_B, axis=0)

    def _unmap(self) -> None:
        if self._mapped is not None:
            with contextlib.suppress(BufferError):  # a batch is being fetched: the mapping goes with it
                self._mapped.close()
            self._mapped = None


def nameless_file(folder: Path, *, never_named: bool = False) -> BinaryIO:
    """Open a new private file that is gone when it is closed.

    Args:
        folder: Where; it is made, and goes at once.
        never_named: Refuse a file system on which the file would have a name for a moment.

    Raises:
        StoreError: It can't be made.
        DamagedError: Something other than a folder has its place.
    """
    for _ in range(TRIES):
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            folder.mkdir(mode=0o700, exist_ok=True)
            if never_named:
                require_nameless(folder)
            descriptor = _opened(folder, never_named=never_named)
        except FileNotFoundError:  # a deletion sweeps the scratch area of the whole store
            continue
        except FileExistsError as error:
            raise DamagedError(f"{folder.name}: expected a folder", hint="Remove what lies there.") from error
        except OSError as error:
            raise StoreError(
                f"no file for rows that wait for their batches can be made: {error.strerror or error}",
                hint="Make room or give permission in the store's scratch folder, or set workers.rows_in_memory: always.",
            ) from error
        with contextlib.suppress(OSError):  # NFS keeps a name until the file is closed
            folder.rmdir()
        return os.fdopen(descriptor, "w+b")
    raise StoreError("the folder for rows that wait for their batches is removed again and again")


def _opened(folder: Path, *, never_named: bool) -> int:
    if not stat.S_ISDIR(folder.lstat().st_mode):
        raise FileExistsError(folder)
    if never_named:
        return os.open(folder, os.O_TMPFILE | os.O_EXCL | os.O_RDWR, 0o600)
    with contextlib.suppress(OSError):  # not every file system has files that never had a name
        return os.open(folder, os.O_TMPFILE | os.O_EXCL | os.O_RDWR, 0o600)
    path = folder / secrets.token_hex(8)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    path.unlink()
    return descriptor


__all__ = ["TooNarrowError", "WaitingRows", "nameless_file", "sweep_waiting"]
