"""Locks by ``flock`` and marks as empty files, in the store's folder: for the processes of one machine."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator

from sisa.coordination.protocol import Coordination
from sisa.files import FileLock, make_folder, touch_durably
from sisa.layout import Layout

MARKS = re.compile(r"stop-(\d{4,})")


class FileCoordination(Coordination):
    """The locks and marks in a folder of the store."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self.marks = FileMarks(layout)

    def lock(self, name: str) -> FolderLock:
        """Return the lock of a name."""
        return FolderLock(FileLock(self._layout.lock(name)))

    def close(self) -> None:
        """Nothing is open."""


class FolderLock:
    """A file's lock. The kernel keeps it as long as the holder lives: it can't be lost."""

    def __init__(self, lock: FileLock) -> None:
        self._lock = lock

    @contextlib.contextmanager
    def held(self, *, timeout_s: float | None = None, poll: Callable[[], None] | None = None) -> Iterator[FolderLock]:
        """Hold it for the length of a ``with`` block."""
        with self._lock.held(timeout_s=timeout_s, poll=poll):
            yield self

    def check(self) -> None:
        """It is held."""


class FileMarks:
    """Empty files, named after requests, in one folder for each shard."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout

    def place(self, shard: int, request: str) -> None:
        """Put a mark, durably."""
        folder = self._layout.stop_marks(shard)
        make_folder(folder)
        touch_durably(folder / request)

    def remove(self, shard: int, request: str) -> None:
        """Take a mark away."""
        (self._layout.stop_marks(shard) / request).unlink(missing_ok=True)

    def any(self, shard: int) -> bool:
        """Whatever lies in the folder stops a training: better one too many."""
        folder = self._layout.stop_marks(shard)
        return folder.is_dir() and any(folder.iterdir())

    def all(self) -> list[tuple[int, str]]:
        """Return every mark."""
        folders = [(MARKS.fullmatch(path.name), path) for path in self._layout.locks.glob("stop-*") if path.is_dir()]
        return sorted((int(form[1]), mark.name) for form, path in folders if form for mark in path.iterdir())
