"""Faults at the boundary between a store and its medium, at a call of one's choice: a disk's calls, a bucket's requests."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock
from urllib.parse import parse_qs
from xml.etree import ElementTree as ET

import crash_kit
from moto.s3 import models
from s3_kit import Environ, S3Server

from sisa.storage import objects

NEVER = 10**9


# --- counting ---------------------------------------------------------------------------------------


class Counted:
    """Counts the calls that a kind of fault can strike, and strikes one (or, if it lasts, that and all after it).

    Which one is given by its number, or by a part of what it does: then it is the first of those.
    """

    def __init__(self, at: int | str = NEVER, *, lasting: bool = False) -> None:
        self.at = at
        self.lasting = lasting
        self.calls = 0
        self.struck: list[str] = []
        """What was struck."""

    def strikes(self, what: str) -> bool:
        """Count one call; say whether it is struck."""
        number, self.calls = self.calls, self.calls + 1
        meant = self.at in what if isinstance(self.at, str) else self.at == number
        struck = self.lasting if self.struck else meant
        if struck:
            self.struck.append(what)
        return struck


# --- a folder's calls -------------------------------------------------------------------------------

WRITING = frozenset({"replace", "rename", "link", "mkdir", "unlink", "rmdir", "fsync", "create"})
GROWING = frozenset({"mkdir", "link", "fsync", "create"})
"""What a full disk refuses."""
READING = frozenset({"read", "listdir", "scandir"})


class FolderFault:
    """What goes wrong with one call of a disk.

    before   an error, and nothing happened
    after    it happened, and then an error
    torn     of a new file half is there, then an error
    full     from here on there is no room
    stale    a listing lacks what was made last, and has what was removed last
    """

    def __init__(self, kind: str, root: Path, counted: Counted) -> None:
        self.kind, self.counted = kind, counted
        self._base = os.path.realpath(root)
        self._last: tuple[str, bool] | None = None
        """The path that changed last, and whether it was made."""
        self._quiet = False

    @property
    def _kinds(self) -> frozenset[str]:
        return {
            "before": WRITING | READING,
            "after": WRITING,
            "torn": frozenset({"fsync"}),
            "full": GROWING,
            "stale": frozenset({"listdir", "scandir"}),
        }[self.kind]

    @contextlib.contextmanager
    def here(self) -> Iterator[Counted]:
        """Have it go wrong below the root, in this process."""
        with contextlib.ExitStack() as patches:
            for name in sorted((WRITING | READING) - {"create", "read"}):
                patches.enter_context(mock.patch.object(os, name, self._wrapped(name, getattr(os, name))))
            for module in (os, io):
                patches.enter_context(mock.patch.object(module, "open", self._opening(module.open)))
            yield self.counted

    def _wrapped(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(path: Any = ".", *arguments: Any, **options: Any) -> Any:
            where = self._where(path, options)
            if self._quiet or not where.startswith(self._base) or self._passes(where):
                return real(path, *arguments, **options)
            return self._done(name, where, lambda: real(path, *arguments, **options))

        return call

    def _opening(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(path: Any, mode: Any = "r", *arguments: Any, **options: Any) -> Any:
            if isinstance(path, int) or self._quiet:
                return real(path, mode, *arguments, **options)
            where = self._where(path, options)
            if not where.startswith(self._base) or self._passes(where) or Path(where).is_dir():
                return real(path, mode, *arguments, **options)
            writes = bool(mode & os.O_CREAT) if isinstance(mode, int) else mode[0] in "wax"
            return self._done("create" if writes else "read", where, lambda: real(path, mode, *arguments, **options))

        return call

    def _where(self, path: Any, options: dict[str, Any]) -> str:
        try:
            return crash_kit._absolute(path, options)
        except (OSError, TypeError):
            return ""

    def _passes(self, where: str) -> bool:
        return "/locks" in where or "ledger.db" in where

    def _done(self, name: str, where: str, real: Callable[[], Any]) -> Any:
        short = f"{name} {where.removeprefix(self._base)} in {crash_kit._caller()}"
        struck = name in self._kinds and self.counted.strikes(short)
        if struck and self.kind == "torn" and Path(where).is_file():
            os.truncate(where, Path(where).stat().st_size // 2)
        if struck and self.kind in {"before", "torn", "full"}:
            number = errno.ENOSPC if self.kind == "full" else errno.EIO
            raise OSError(number, os.strerror(number), where)
        if name in {"replace", "rename", "mkdir", "unlink", "rmdir", "create"}:
            self._last = where, name not in {"unlink", "rmdir"}
        found = real()
        if struck and self.kind == "after":
            if name == "create":
                found.close() if hasattr(found, "close") else os.close(found)
            raise OSError(errno.EIO, os.strerror(errno.EIO), where)
        return self._aged(name, where, found) if struck and self.kind == "stale" else found

    def _aged(self, name: str, where: str, found: Any) -> Any:
        """A listing as it was before the last change; what was removed can't be listed with its kind."""
        lost, made = self._last or ("", False)
        here = str(Path(lost).parent) == where
        hidden = Path(lost).name if made and here else None
        if name == "listdir":
            back = [Path(lost).name] if here and not made else []
            return [entry for entry in found if entry != hidden] + back
        return _Listing([entry for entry in found if entry.name != hidden])


class _Listing(list[Any]):
    """What ``os.scandir`` gives, cut."""

    def __enter__(self) -> Iterator[Any]:
        return iter(self)

    def __exit__(self, *_: object) -> None:
        return

    def __next__(self) -> Any:
        if not self:
            raise StopIteration
        return self.pop(0)

    def close(self) -> None:
        return


# --- a small disk -----------------------------------------------------------------------------------


@contextlib.contextmanager
def small_disk(folder: Path, *, mib: int) -> Iterator[str]:
    """Mount a small file system of memory at ``folder``; yields why it can't be, or ""."""
    folder.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", f"size={mib}m", "tmpfs", str(folder)]
    done = subprocess.run(words, capture_output=True, text=True, check=False) if shutil.which("mount") else None
    if done is None or done.returncode:
        yield f"no tmpfs can be mounted here: {done.stderr.strip() if done else 'there is no mount'}"
        return
    try:
        yield ""
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@contextlib.contextmanager
def filled(disk: Path, counted: Counted, *, but_bytes: int) -> Iterator[Counted]:
    """Fill a disk but for some bytes, then make room again."""
    ballast = disk / "ballast"
    there = os.statvfs(disk)
    with ballast.open("wb") as stream:
        os.posix_fallocate(stream.fileno(), 0, max(1, there.f_bavail * there.f_frsize - but_bytes))
    try:
        yield counted
    finally:
        ballast.unlink()


# --- a bucket's requests ----------------------------------------------------------------------------


class RequestFault:
    """What goes wrong with one request to a bucket.

    before   refused, and nothing happened
    after    it happened, and the answer says that it was refused
    lost     it happened, and the answer says that the server failed, so that it is sent again
    cut      it happened, and the answer breaks off
    slow     it happened, and the answer comes after the client has given up
    parts    as dead, and what is put goes in parts: some of them stay
    dead     from here on everything is refused
    stale    a listing as it was before the last change
    """

    def __init__(self, kind: str, server: S3Server, bucket: str, counted: Counted) -> None:
        self.kind, self.server, self.bucket, self.counted = kind, server, bucket, counted
        self._lock = threading.Lock()
        self._before: dict[str, bytes] = {}
        """Listings as they were before the last change, by kind."""

    @contextlib.contextmanager
    def here(self) -> Iterator[Counted]:
        """Have it go wrong on the server."""
        app = self.server._app
        with contextlib.ExitStack() as patches:
            if self.kind == "parts":
                patches.enter_context(mock.patch.object(objects, "PART_BYTES", 500))
                patches.enter_context(mock.patch.object(models, "S3_UPLOAD_PART_MIN_SIZE", 1))
            if self.kind == "slow":
                patches.enter_context(mock.patch.object(objects, "REQUEST_S", 1))
            patches.enter_context(mock.patch.object(self.server, "_app", lambda e, s: self._answer(app, e, s)))
            yield self.counted

    def _answer(self, app: Any, environ: Environ, start_response: Any) -> Iterable[bytes]:
        what = f"{environ['REQUEST_METHOD']} {environ['PATH_INFO']}?{environ.get('QUERY_STRING', '')}"
        listing = _listing(environ)
        writes = environ["REQUEST_METHOD"] in {"PUT", "POST", "DELETE"}
        with self._lock:
            counts = {"stale": bool(listing), "before": True, "dead": True, "parts": True}.get(self.kind, writes)
            struck = counts and self.counted.strikes(what)
            if struck and self.kind in {"before", "dead", "parts"}:
                environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
                return _refusal(start_response, "400 Bad Request")
            if self.kind == "stale" and writes:
                self._before = {kind: self._listed(app, environ, kind) for kind in ("list-type=2", "versions")}
            status, headers, body = _answered(app, environ)
            if struck and self.kind == "stale" and listing in self._before:
                body = _below(self._before[listing], parse_qs(environ["QUERY_STRING"]).get("prefix", [""])[0])
                headers = [(name, value) for name, value in headers if name.lower() != "content-length"]
        if struck and self.kind in {"after", "lost"}:
            return _refusal(start_response, "400 Bad Request" if self.kind == "after" else "500 Internal Server Error")
        if struck and self.kind == "slow":
            time.sleep(1.2)  # longer than the client waits; what the answer is then, nobody hears
        if struck and self.kind == "cut":
            headers = [(n, v) for n, v in headers if n.lower() != "content-length"]
            headers.append(("Content-Length", str(len(body) + 10)))
        start_response(status, headers)
        return [body]

    def _listed(self, app: Any, environ: Environ, kind: str) -> bytes:
        asked = {**environ, "REQUEST_METHOD": "GET", "PATH_INFO": f"/{self.bucket}", "QUERY_STRING": f"{kind}&prefix="}
        asked |= {"CONTENT_LENGTH": "0", "wsgi.input": io.BytesIO(), "RAW_URI": f"/{self.bucket}?{kind}&prefix="}
        asked["REQUEST_URI"] = asked["RAW_URI"]
        return _answered(app, asked)[2]


def _answered(app: Any, environ: Environ) -> tuple[str, list[tuple[str, str]], bytes]:
    said: list[Any] = []
    body = b"".join(app(environ, lambda status, headers, *_: said.append((status, list(headers)))))
    status, headers = said[-1]
    return status, headers, body


def _refusal(start_response: Any, status: str) -> list[bytes]:
    start_response(status, [("Content-Type", "application/xml")])
    return [b"<Error><Code>InvalidRequest</Code><Message>no</Message></Error>"]


def _listing(environ: Environ) -> str:
    query = environ.get("QUERY_STRING", "")
    if environ["REQUEST_METHOD"] != "GET":
        return ""
    return "list-type=2" if "list-type=2" in query else "versions" if "versions" in query else ""


def _below(listing: bytes, prefix: str) -> bytes:
    """The part of a listing of a whole bucket that is below a prefix."""
    root = ET.fromstring(listing)
    space = root.tag.partition("}")[0] + "}" if "}" in root.tag else ""
    for child in list(root):
        key = child.find(f"{space}Key")
        if key is not None and not (key.text or "").startswith(prefix):
            root.remove(child)
    count = root.find(f"{space}KeyCount")
    if count is not None:
        count.text = str(len(root.findall(f"{space}Contents")))
    ET.register_namespace("", space.strip("{}"))
    return ET.tostring(root)
