"""Writing, publishing and removing files so that a crash leaves the old state or the new one.

The order is always: write beside the target, fsync the file, rename, fsync the folder. Removal renames
first, so that a half-removed folder never carries the name of a whole one. Names that start with
``TEMPORARY`` are nobody's: whoever holds the lock of a folder may sweep them.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
import shutil
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

from sisa.errors import BusyError, DamagedError, StoreError

TEMPORARY = "tmp-"
"""Prefix of files and folders that are not (or no longer) part of the store."""
NO_NAMELESS = frozenset({errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL})
"""What a file system says that has no files without a name."""


def temporary_beside(path: Path) -> Path:
    """Return an unused name in the folder of ``path`` that marks something unfinished."""
    return path.with_name(f"{TEMPORARY}{secrets.token_hex(8)}")


def fsync_path(path: Path) -> None:
    """Make the bytes (or, for a folder, the names) at ``path`` durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_durably(path: Path, content: bytes | memoryview, *, mode: int = 0o644) -> None:
    """Replace the file at ``path`` by ``content``, whole or not at all."""
    scratch = temporary_beside(path)
    try:
        _write_new(scratch, content, mode)
        os.replace(scratch, path)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise
    fsync_path(path.parent)


def link_durably(path: Path, content: bytes | memoryview) -> bool:
    """Make a file at ``path`` with all of ``content``, unless something is there; return whether it was made."""
    scratch = temporary_beside(path)
    try:
        _write_new(scratch, content, 0o644)
        os.link(scratch, path)  # unlike a rename it doesn't replace
    except FileExistsError:
        return False
    finally:
        scratch.unlink(missing_ok=True)
    fsync_path(path.parent)
    return True


def _write_new(path: Path, content: bytes | memoryview, mode: int) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    with os.fdopen(descriptor, "wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())


@contextlib.contextmanager
def replacing(path: Path, *, naming: AbstractContextManager[object] | None = None) -> Iterator[Path]:
    """Yield a scratch path to write to; on success it durably replaces ``path``, else it is removed.

    Args:
        path: What is replaced.
        naming: Entered when the scratch file is durable, and left when it has its name: what it raises on the way in
            keeps the old file in place.
    """
    scratch = temporary_beside(path)
    try:
        yield scratch
        fsync_path(scratch)
        with naming or contextlib.nullcontext():
            os.replace(scratch, path)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise
    fsync_path(path.parent)


def make_folder(path: Path) -> None:
    """Create ``path`` and its missing parents, each of them durable."""
    missing = [folder for folder in [path, *path.parents] if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in reversed(missing):
        fsync_path(folder.parent)


def publish_folder(scratch: Path, target: Path) -> None:
    """Make everything under ``scratch`` durable, then give it the name ``target``.

    Raises:
        FileExistsError: ``target`` is there already; ``scratch`` is left as it was.
    """
    for folder, _, names in os.walk(scratch, topdown=False):
        for name in names:
            fsync_path(Path(folder, name))
        fsync_path(Path(folder))
    if target.exists():
        raise FileExistsError(target)
    os.rename(scratch, target)
    fsync_path(target.parent)


def remove(path: Path) -> None:
    """Remove a file or a folder; nothing happens if it is gone already.

    A folder is renamed first: if we are killed half-way, what is left has a temporary name.
    """
    if path.is_dir() and not path.is_symlink():
        doomed = path if path.name.startswith(TEMPORARY) else temporary_beside(path)
        if doomed is not path:
            try:
                os.rename(path, doomed)
            except FileNotFoundError:
                return  # somebody else removed it meanwhile
            fsync_path(path.parent)
        _remove_tree(doomed)
    else:
        path.unlink(missing_ok=True)
    if path.parent.exists():
        fsync_path(path.parent)


def _remove_tree(folder: Path) -> None:
    while os.path.lexists(folder):
        with contextlib.suppress(FileNotFoundError):  # somebody else removes it too: what is gone is gone
            shutil.rmtree(folder)


def touch_durably(path: Path) -> None:
    """Make an empty file, durably; nothing happens if it is there."""
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT, 0o644))
    fsync_path(path.parent)


def sweep_temporary(folder: Path) -> list[Path]:
    """Remove everything directly in ``folder`` whose name marks it as unfinished; return what went."""
    if not folder.is_dir():
        return []
    doomed = sorted(path for path in folder.iterdir() if path.name.startswith(TEMPORARY))
    for path in doomed:
        remove(path)
    return doomed


def require_nameless(folder: Path) -> None:
    """Make sure that files in an existing folder need no name: then nothing of them outlives their process.

    Raises:
        StoreError: The file system can't do that.
        FileNotFoundError: The folder is gone.
    """
    try:
        os.close(os.open(folder, os.O_TMPFILE | os.O_EXCL | os.O_RDWR, 0o600))
    except FileNotFoundError:
        raise
    except OSError as error:
        if error.errno not in NO_NAMELESS:
            raise StoreError(
                f"rows can't wait in the cache folder of this host: {error.strerror}",
                hint="Make room or give permission there, or point XDG_CACHE_HOME elsewhere.",
            ) from error
        raise StoreError(
            f"rows can't wait on this host: the file system of its cache folder has no files without a name "
            f"({error.strerror}), and what a killed process left in others no deletion from another host could reach",
            hint="Point XDG_CACHE_HOME to a local disk that has them, such as ext4 or xfs; or keep rows in memory.",
        ) from error


class FileLock:
    """An advisory lock (``flock``) that the kernel releases when its holder dies.

    The file stays: unlinking a lock file lets two holders in. It names its last holder's process, so
    that somebody who has to wait can be told for whom.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor: int | None = None

    def acquire(self, *, timeout_s: float | None = None, poll: Callable[[], None] | None = None) -> None:
        """Take the lock; ``timeout_s`` of None waits for ever, 0 doesn't wait.

        ``poll`` is called between tries, some 20 times a second.

        Raises:
            BusyError: Someone else still held it when the time was up.
            DamagedError: Something other than a plain file has the lock's name.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = self._opened()
        try:
            self._take(descriptor, timeout_s, poll)
        except BaseException:
            os.close(descriptor)
            raise
        with contextlib.suppress(OSError):  # a full disk: who holds a lock is for messages only
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"process {os.getpid()}".encode(), 0)
        self._descriptor = descriptor

    def _opened(self) -> int:
        """Open the lock's file itself: what a link points to is nobody's to write to."""
        try:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        except OSError as error:
            if os.path.lexists(self.path) and not stat.S_ISREG(self.path.lstat().st_mode):
                raise self._strange() from error
            raise
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            return descriptor
        os.close(descriptor)
        raise self._strange()

    def _strange(self) -> DamagedError:
        return DamagedError(
            f"{self.path.parent.name}/{self.path.name}: expected the file of a lock, found a symbolic link, a folder or "
            "a device; nothing was written to it",
            hint="Remove it, then run the command again: a lock's file is made when it is missing.",
        )

    def _take(self, descriptor: int, timeout_s: float | None, poll: Callable[[], None] | None) -> None:
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if deadline is not None and time.monotonic() >= deadline:
                    raise BusyError(
                        f"another operation holds the store ({self.holder()}, {self.path.name})",
                        hint="Wait until it ends, then run the command again.",
                    ) from None
            if poll is not None:
                poll()
            time.sleep(0.05)

    def release(self) -> None:
        """Let the lock go."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def holder(self) -> str:
        """Say who took the lock last, for a message."""
        try:
            return self.path.read_text() or "unknown holder"
        except OSError:
            return "unknown holder"

    @contextlib.contextmanager
    def held(self, *, timeout_s: float | None = None, poll: Callable[[], None] | None = None) -> Iterator[FileLock]:
        """Hold the lock for the length of a ``with`` block."""
        self.acquire(timeout_s=timeout_s, poll=poll)
        try:
            yield self
        finally:
            self.release()
