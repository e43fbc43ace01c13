"""What a store asks of the medium that it lies on.

Content is kept under keys: texts such as ``records/shard=0003/slice=02/part-00000.parquet``, made of numbers and
digests, never of ids. Invariants, on every medium:

- Who reads a key reads all of one content that was put there, never a part of it.
- When a writing call has returned, what it wrote is durable; and what it replaced or removed is gone, in every form in
  which the medium keeps such things (older versions, delete markers, parts of unfinished uploads).
- A medium that doesn't answer, or refuses, is a ``StoreError`` or a ``BusyError`` within bounded time; content that
  isn't there is a ``FileNotFoundError``, and nothing else is.

What voids this: copies that the medium makes by itself, such as replication to another bucket, snapshots, backups.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import BinaryIO, Protocol

from sisa.errors import StoreError

UNFINISHED = "tmp-"
"""What is called so isn't (or is no longer) part of a store."""


class Storage(Protocol):
    """Content by key, below one root."""

    @property
    def uri(self) -> str:
        """The root, as a user writes it."""
        ...

    def exists(self, key: str) -> bool:
        """Say whether something lies at ``key``."""
        ...

    def read(self, key: str) -> bytes:
        """Return the content of ``key``.

        Raises:
            FileNotFoundError: There is none.
        """
        ...

    def opened(self, key: str) -> AbstractContextManager[BinaryIO]:
        """Yield the content of ``key`` as a stream that can seek; it stays what it was while it is open.

        Raises:
            FileNotFoundError: There is none.
        """
        ...

    def put(self, key: str, content: bytes | memoryview) -> None:
        """Replace whatever lies at ``key``, whole or not at all; what lay there is gone."""
        ...

    def put_file(self, key: str, path: Path) -> None:
        """Replace whatever lies at ``key`` by the content of a file, which is read in pieces."""
        ...

    def writing(self, key: str) -> AbstractContextManager[BinaryIO]:
        """Yield a stream that can seek; what was written to it replaces whatever lies at ``key`` at the end.

        An error on the way leaves what lies there.
        """
        ...

    def put_new(self, key: str, content: bytes | memoryview) -> bool:
        """Put ``content`` at ``key`` if nothing lies there; return whether it did. Of many at once, one does."""
        ...

    def keys(self, prefix: str) -> list[str]:
        """Return the keys below ``prefix`` ("" for all), sorted, but for those that are called unfinished."""
        ...

    def there(self, prefix: str) -> list[str]:
        """Return what lies below ``prefix`` in any form, sorted: keys, unfinished and hidden ones too; and folders."""
        ...

    def remove(self, key: str) -> None:
        """Erase what lies at ``key``; nothing happens if nothing does."""
        ...

    def remove_all(self, prefix: str) -> None:
        """Erase everything below ``prefix``, unfinished or not; nothing happens if nothing is there."""
        ...

    def sweep_beside(self, prefix: str) -> None:
        """Erase what a killed :meth:`remove_all` of ``prefix`` may have left.

        Nothing else may be unfinished in the folder that ``prefix`` lies in.
        """
        ...

    def sweep(self, prefix: str) -> None:
        """Erase what was left unfinished, or isn't visible any more, at or below ``prefix``.

        Hold the lock of what lies there: another's unfinished writing would go too.
        """
        ...

    def hidden(self, prefix: str) -> list[str]:
        """Say what lies at or below ``prefix`` that :meth:`keys` doesn't show: a line each, with its key."""
        ...


def checked(key: str) -> str:
    """Return ``key``.

    Raises:
        StoreError: It isn't one: an empty part, or one that leads out of its folder.
    """
    parts = key.split("/")
    if not all(parts) or not {".", ".."}.isdisjoint(parts) or "\\" in key:
        raise StoreError(f"expected a key made of names, got {key!r}")
    return key
