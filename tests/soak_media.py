"""Where a soaked store lies, a folder or a versioned bucket, and what is kept there: read past the code under test."""

from __future__ import annotations

import contextlib
import io
import os
import re
import secrets
import signal
import struct
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any
from unittest import mock

import botocore.client
import crash_kit as kit
import obstore
import pyarrow as pa
import pyarrow.parquet as papq
from moto.s3 import models
from s3_kit import Environ, S3Server, kept

from sisa.storage import objects

PREFIX = "runs/one/"
PART_BYTES = 700
"""So small that every partition is uploaded, and read, in parts."""
LEFTOVERS = ("tmp-*", "snapshot-*", "scratch", "incoming", "corrections/*", "stop-*/*")
"""Names of what doesn't stay in a store at rest."""
_STAGE = re.compile(r"checkpoints/shard-(\d+)/(?:stage|snapshot)-(\d+)-([0-9a-f]{64})")


def doomed(step: int) -> str:
    """The name under which this process asks a bucket, so that it is killed within an upload."""
    return f"within-{step}-{os.getpid()}"


_DOOMED = re.compile(r"Credential=within-(\d+)-(\d+)/")


@dataclass(frozen=True)
class Place:
    """What a process has to know of where a store lies."""

    uri: str
    beside: Path
    """What lies on this host: all of a store in a folder; of one in a bucket its ledger's folder, or the spool."""
    steps: int
    """About as many durable steps, or calls to the bucket, as a deletion with its repair takes."""
    moment_s: float
    """About as long as it takes."""
    uploads: bool = False
    """Whether a slice of rows is on its way in parts."""

    @contextlib.contextmanager
    def watched(self, hook: Callable[[str], None]) -> Iterator[None]:
        """Call ``hook`` with a name before each durable step, and before each call to a bucket."""
        with kit.before_durable_operations(self.beside, hook):
            if self.uri.startswith("s3://"):
                with _before_calls(hook):
                    yield
            else:
                yield


class Medium(ABC):
    """One store's. Names are keys: of a folder paths below it, and of a bucket what follows the store's prefix."""

    place: Place
    killed: Collection[int] = ()

    @abstractmethod
    def recipe(self, recipe: dict[str, Any]) -> dict[str, Any]:
        """Make a recipe one for a store here."""

    @abstractmethod
    def files(self, *, hidden: bool) -> Iterator[tuple[str, bytes]]:
        """All that is kept: name and bytes; what no reader of the store sees is asked for."""

    @abstractmethod
    def hidden(self) -> set[tuple[str, str]]:
        """What is kept and no reader sees: the folder that it is of, and its own name."""

    def log(self) -> bytes:
        """What the medium itself writes down of those who ask it."""
        return b""

    def names(self) -> set[str]:
        """Of all that is kept, and of the folders around it."""
        names = {name for name, _ in self.files(hidden=True)}
        return names | {str(folder) for name in names for folder in PurePosixPath(name).parents}

    def contents(self) -> Iterator[tuple[str, bytes]]:
        """All that is kept, in every version: its name, then its name and bytes, and what is packed in it."""
        for name, content in self.files(hidden=True):
            yield name, name.encode() + b"\n" + content + _unpacked(content)

    def stages(self) -> set[tuple[int, int, str]]:
        """(shard, stage, key) of each stage and each snapshot of one that lies here, finished or not."""
        return {(int(m[1]), int(m[2]), m[3]) for name in self.names() if (m := _STAGE.match(name))}

    def rows(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Each row in the records, and in which partition."""
        for name, content in self.files(hidden=False):
            if name.startswith("records/") and name.endswith(".parquet"):
                for row in papq.read_table(io.BytesIO(content)).to_pylist():
                    yield str(PurePosixPath(name).parent.relative_to("records")), row

    def leftovers(self) -> list[str]:
        """What doesn't stay in a store at rest."""
        found = [name for name in self.names() if any(PurePosixPath(name).match(p) for p in LEFTOVERS)]
        return [*found, *(f"{name} ({what})" for name, what in self.hidden())]


def _unpacked(content: bytes) -> bytes:
    if content[:4] != b"PAR1" or content[-4:] != b"PAR1":
        return b""
    try:
        columns = papq.read_table(io.BytesIO(content)).to_pydict()
    except (OSError, pa.ArrowInvalid):  # some parts of an upload, without those between them
        return b""
    texts = [str(value) for name in ("_sisa_record", "_sisa_subject", "tag") for value in columns[name]]
    return " ".join(texts).encode() + struct.pack(f"<{len(columns['x'])}d", *columns["x"])


# --- a folder ---------------------------------------------------------------------------------------


class Folder(Medium):
    """On a disk."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.place = Place(str(root), root, 160, 0.8)

    def recipe(self, recipe: dict[str, Any]) -> dict[str, Any]:
        return recipe

    def files(self, *, hidden: bool) -> Iterator[tuple[str, bytes]]:
        for path in sorted(path for path in self.root.rglob("*") if path.is_file()):
            if hidden or not path.name.startswith("tmp-"):
                yield path.relative_to(self.root).as_posix(), path.read_bytes()

    def hidden(self) -> set[tuple[str, str]]:
        return set()

    def names(self) -> set[str]:
        return {path.relative_to(self.root).as_posix() for path in self.root.rglob("*")}


# --- a versioned bucket -----------------------------------------------------------------------------


class Bucket(Medium):
    """In a bucket that keeps versions; the ledger lies beside it, or on a server."""

    def __init__(self, folder: Path, server: S3Server) -> None:
        self.folder, self.server = folder, server
        self.killed: set[int] = set()
        """Processes that were killed within an upload."""
        self._parts: Counter[int] = Counter()
        server.faults.append(self._kills)
        self.bucket = server.bucket(versioned=True)
        self.place = Place(f"s3://{self.bucket}/{PREFIX.strip('/')}", folder / "beside", 150, 1.5, uploads=True)

    def recipe(self, recipe: dict[str, Any]) -> dict[str, Any]:
        keys = {"key_file": "00" * 32, "exclusion_key_file": secrets.token_hex(32)}
        for name, key in keys.items():
            (self.folder / name).write_text(key)
            (self.folder / name).chmod(0o600)
        ledger = recipe["ledger"] or str(self.place.beside / "ledger.db")
        return {**recipe, "ledger": ledger, "routing": {name: str(self.folder / name) for name in keys}}

    def files(self, *, hidden: bool) -> Iterator[tuple[str, bytes]]:
        for each in kept(self.bucket):
            if hidden or each.kind == "visible":
                yield each.key.removeprefix(PREFIX), each.content
        for path in sorted(path for path in self.place.beside.rglob("*") if path.is_file()):
            yield f"beside/{path.relative_to(self.place.beside).as_posix()}", path.read_bytes()

    def hidden(self) -> set[tuple[str, str]]:
        unseen = [each for each in kept(self.bucket) if each.kind != "visible"]
        return {
            (each.key.removeprefix(PREFIX).rpartition("/")[0], f"{each.kind} {each.id} of {each.key}")
            for each in unseen
        }

    def _kills(self, environ: Environ) -> tuple[str, str] | None:
        """Kill who asked for it before the server has taken a part of its upload, or has made an object of the parts."""
        found = _DOOMED.search(environ.get("HTTP_AUTHORIZATION", ""))
        if not found or "uploadId=" not in environ["QUERY_STRING"] or environ["REQUEST_METHOD"] not in {"PUT", "POST"}:
            return None
        step, process = int(found[1]), int(found[2])
        self._parts[process] += 1
        if self._parts[process] <= step:
            return None
        self.killed.add(process)
        with contextlib.suppress(ProcessLookupError, FileNotFoundError):
            os.kill(process, signal.SIGKILL)
            while not _is_dead(Path("/proc") / str(process)):
                time.sleep(0.001)  # else it may hear the answer, and clean up after itself
        return "400 Bad Request", "InvalidRequest"

    def log(self) -> bytes:
        return "\n".join(self.server.requests).encode()


def _is_dead(process: Path) -> bool:
    """Whether of a process there is nothing left but its number."""
    threads = list((process / "task").iterdir())
    return len(threads) == 1 and (process / "stat").read_text().rpartition(")")[2].split()[0] == "Z"


@contextlib.contextmanager
def small_parts() -> Iterator[None]:
    """Have the server in this process take parts of any size."""
    with mock.patch.object(models, "S3_UPLOAD_PART_MIN_SIZE", 1):
        yield


@contextlib.contextmanager
def _before_calls(hook: Callable[[str], None]) -> Iterator[None]:
    """Call ``hook`` before each call of this process to a bucket, whichever library makes it."""

    def wrapped(name: str) -> Callable[..., Any]:
        real = getattr(obstore, name)

        def call(store: Any, *arguments: Any, **options: Any) -> Any:
            hook(f"{name.removesuffix('_async')} in {kit._caller()}")
            return real(store, *arguments, **options)

        return call

    ask = botocore.client.BaseClient._make_api_call

    def asked(client: Any, operation: str, parameters: Any) -> Any:
        hook(f"{operation} in {kit._caller()}")
        return ask(client, operation, parameters)

    with contextlib.ExitStack() as patches:
        for name in ("put", "put_async", "get", "get_async", "get_range_async", "head", "head_async", "list"):
            patches.enter_context(mock.patch.object(obstore, name, wrapped(name)))
        patches.enter_context(mock.patch.object(botocore.client.BaseClient, "_make_api_call", asked))
        patches.enter_context(mock.patch.object(objects, "PART_BYTES", PART_BYTES))
        yield
