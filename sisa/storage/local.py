"""A folder on a disk: written beside, made durable, renamed, the folder made durable too."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from sisa.files import (
    TEMPORARY,
    fsync_path,
    link_durably,
    make_folder,
    remove,
    replacing,
    sweep_temporary,
)
from sisa.storage.medium import checked


class LocalStorage:
    """Content in files below ``root``; a folder lives as long as something is in it."""

    def __init__(self, root: Path) -> None:
        self.root = root

    @property
    def uri(self) -> str:
        """The folder's path."""
        return str(self.root)

    def path(self, key: str) -> Path:
        """Return the file of a key."""
        return self.root / checked(key)

    def folder(self, prefix: str) -> Path:
        """Return the folder of a prefix."""
        return self.path(prefix) if prefix else self.root

    def exists(self, key: str) -> bool:
        """Say whether a file lies at ``key``."""
        return self.path(key).is_file()

    def read(self, key: str) -> bytes:
        """Return the content of ``key``.

        Raises:
            FileNotFoundError: There is none.
        """
        return self.path(key).read_bytes()

    @contextlib.contextmanager
    def opened(self, key: str) -> Iterator[BinaryIO]:
        """Yield the file at ``key``; one that is replaced meanwhile stays what it was for who has it open.

        Raises:
            FileNotFoundError: There is none.
        """
        with self.path(key).open("rb") as stream:
            yield stream

    def put(self, key: str, content: bytes | memoryview) -> None:
        """Replace the file at ``key``."""
        path = self.path(key)
        make_folder(path.parent)
        with replacing(path) as scratch:
            scratch.write_bytes(content)

    def put_file(self, key: str, path: Path) -> None:
        """Replace the file at ``key`` by a copy of another."""
        target = self.path(key)
        make_folder(target.parent)
        with replacing(target) as scratch:
            shutil.copyfile(path, scratch)

    @contextlib.contextmanager
    def writing(self, key: str) -> Iterator[BinaryIO]:
        """Yield a file that replaces the one at ``key`` in the end."""
        path = self.path(key)
        make_folder(path.parent)
        with replacing(path) as scratch, scratch.open("w+b") as stream:
            yield stream

    def put_new(self, key: str, content: bytes | memoryview) -> bool:
        """Make the file at ``key`` if there is none; return whether it was made."""
        path = self.path(key)
        make_folder(path.parent)
        return link_durably(path, content)

    def keys(self, prefix: str) -> list[str]:
        """Return the keys below ``prefix``, sorted, but for unfinished ones."""
        found: list[str] = []
        for folder, folders, names in os.walk(self.folder(prefix)):
            folders[:] = [name for name in folders if not name.startswith(TEMPORARY)]
            found += [self._key(Path(folder, name)) for name in names if not name.startswith(TEMPORARY)]
        return sorted(found)

    def there(self, prefix: str) -> list[str]:
        """Return every file and folder below ``prefix``, sorted."""
        found: list[str] = []
        for folder, folders, names in os.walk(self.folder(prefix)):
            found += [self._key(Path(folder, name)) for name in [*folders, *names]]
        return sorted(found)

    def remove(self, key: str) -> None:
        """Remove the file at ``key``, and its folder if nothing else is in it."""
        path = self.path(key)
        remove(path)
        if path.parent != self.root:
            with contextlib.suppress(OSError):  # something else lies there
                path.parent.rmdir()
                fsync_path(path.parent.parent)

    def remove_all(self, prefix: str) -> None:
        """Remove the folder ``prefix`` and what is in it."""
        path = self.folder(prefix)
        if os.path.lexists(path):
            remove(path)

    def sweep_beside(self, prefix: str) -> None:
        """Remove what is called unfinished in the folder around ``prefix``: a removal renames first."""
        sweep_temporary(self.path(prefix).parent)

    def sweep(self, prefix: str) -> None:
        """Remove what is called unfinished directly in the folder ``prefix``, or beside what may be a file."""
        sweep_temporary(self.folder(prefix))

    def hidden(self, prefix: str) -> list[str]:
        """Say what is called unfinished below ``prefix``."""
        found: list[str] = []
        for folder, folders, names in os.walk(self.folder(prefix)):
            found += [self._key(Path(folder, name)) for name in [*folders, *names] if name.startswith(TEMPORARY)]
            folders[:] = [name for name in folders if not name.startswith(TEMPORARY)]
        return [f"{key}: unfinished" for key in sorted(found)]

    def _key(self, path: Path) -> str:
        return path.relative_to(self.root).as_posix()
