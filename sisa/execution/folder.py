"""The folder in which a Ray of our own works: private, and removed afterwards.

A driver that is killed can't remove its folder. It holds a lock in there as long as it lives, so the next driver knows
whose folders are nobody's, and sweeps them. The lock's file goes last, and folders without one are left alone.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

from sisa.errors import BusyError
from sisa.files import FileLock

PREFIX = "sisa-ray-"
LOCK = "driver.lock"


@contextlib.contextmanager
def working_folder() -> Iterator[Path]:
    """Yield a new folder for the length of a ``with`` block; what dead drivers left beside it is removed first."""
    place = _short_temporary_folder()
    sweep(place)
    folder, lock = _claimed(place)
    try:
        yield folder
    finally:
        _remove(folder)
        lock.release()


def sweep(place: Path) -> None:
    """Remove the folders in ``place`` that belong to this user, and whose driver is dead."""
    for folder in place.glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError, BusyError):  # a driver lives there, or somebody else removes it too
            found = folder.lstat()
            if stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and (folder / LOCK).is_file():
                with FileLock(folder / LOCK).held(timeout_s=0):
                    _remove(folder)


def _claimed(place: Path) -> tuple[Path, FileLock]:
    """Make a folder and hold its lock."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=place))
        lock = FileLock(folder / LOCK)
        with contextlib.suppress(BusyError):  # somebody swept it before it was ours
            lock.acquire(timeout_s=0)
            if lock.path.exists():
                return folder, lock
            lock.release()


def _remove(folder: Path) -> None:
    """Remove what can be removed; if something stays, so does the lock's file, and the next sweep tries again."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        elif path.name != LOCK:
            path.unlink(missing_ok=True)
    if [path.name for path in folder.iterdir()] == [LOCK]:
        (folder / LOCK).unlink()
        folder.rmdir()


def _short_temporary_folder() -> Path:
    """Ray's sockets lie under its folder, and a socket's path has at most 107 characters."""
    folder = tempfile.gettempdir()
    return Path(folder if len(folder) <= 20 else "/tmp")  # noqa: S108 - mkdtemp makes it private
