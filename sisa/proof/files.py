"""Checking the store's folder: every file is somebody's, nothing leads out of it, and secrets are secret.

Erasure takes what it knows by name. A file that nobody answers for stays, whatever is in it; and what a
symbolic link points to stays where it is.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path

from sisa.checkpoints import CheckpointStore
from sisa.checkpoints.manifest import parse_shard, shard_folder
from sisa.checkpoints.snapshots import parse_snapshot
from sisa.files import TEMPORARY
from sisa.ledger import STATES
from sisa.ledger.sqlite import SqliteDatabase
from sisa.opening import PARTS, OpenStore
from sisa.proof.bucket import SNAPSHOT, check_beside, check_bucket
from sisa.proof.journal import is_ignored_journal
from sisa.recipe import dump_recipe
from sisa.records.partition import stray_files

REPLAY = re.compile(r"[0-9a-f]{16}")
"""The name of a folder in which a replay retrains."""
ELSEWHERE = frozenset({"ledger.db", "ledger.db-journal", "locks"})
"""What a store has none of whose ledger lies on a server."""
HOLDER = re.compile(rb"(process \d{1,20})?")
"""All that a lock file says: who took it last."""


def check_files(store: OpenStore) -> list[str]:
    """Return what is wrong with the files of a store, rows and stages themselves excepted."""
    if store.layout.remote:
        return _check_remote(store)
    links = _links(store.layout.root)
    problems = [f"{_short(store, path)}: a symbolic link: what it points to is never erased" for path in links]
    for path in sorted(set(_strays(store)).difference(links)):
        if not os.path.lexists(path):
            continue  # a deletion took its mark away meanwhile
        kind = "folder and what is in it" if path.is_dir() else "file"
        fault = _left_behind(store, path) or f"nobody answers for this {kind}"
        problems.append(f"{_short(store, path)}: {fault}")
    for path in stray_files(store.layout, store.shards, store.slices, generations=store.generations):
        if path not in links:
            unfinished = path.name.startswith(TEMPORARY) or store.layout.incoming.exists()
            kind = "unfinished" if unfinished else "unknown"
            problems.append(f"{_short(store, path)}: {kind} file among the records")
    problems += [
        f"{_short(store, path)}: missing, so that a reader of Zarr doesn't find the stages; `sisa repair` writes it"
        for path in _checkpoints(store).missing_groups()
    ]
    return problems + _stale_marks(store) + _open_secrets(store) + _added_text(store)


def _check_remote(store: OpenStore) -> list[str]:
    """The same for a store in object storage, whose locks and ledger lie on a disk."""
    links = _links(store.layout.root)
    problems = [f"{_short(store, path)}: a symbolic link: what it points to is never erased" for path in links]
    strays = sorted({*_stray_locks(store), *_stray_journal(store)}.difference(links))
    problems += [f"{_short(store, path)}: nobody answers for this" for path in strays if os.path.lexists(path)]
    return problems + check_beside(store) + check_bucket(store) + _stale_marks(store)


def _checkpoints(store: OpenStore) -> CheckpointStore:
    assert isinstance(store.checkpoints, CheckpointStore)
    return store.checkpoints


def _left_behind(store: OpenStore, path: Path) -> str:
    """Say who removes what a killed command may have left under this name; nothing if it is a stranger's.

    No command that makes such things runs beside this one, deletions excepted. They may hold rows or weights.
    """
    layout, checkpoints = store.layout, _checkpoints(store).root
    if path == layout.incoming or path.parent == layout.corrections:
        left = path.is_dir()
    elif path.parent == layout.scratch:
        left = path.is_dir() and bool(REPLAY.fullmatch(path.name) or path in _waiting(store))
    else:
        swept = {layout.root, *(checkpoints / shard_folder(shard) for shard in range(store.shards))}
        left = path.parent in swept and path.name.startswith(TEMPORARY)
        shard = parse_shard(path.parent.name)
        if shard is not None and path.parent.parent == checkpoints and parse_snapshot(shard, path.name):
            return SNAPSHOT
    goes_on = "sisa repair" if store.ledger.ingested else "sisa train"
    return f"left by a command that was killed; `{goes_on}` removes it" if left else ""


def _waiting(store: OpenStore) -> set[Path]:
    """Where rows wait while a stage trains: folders that are there for a moment only."""
    return {store.layout.waiting_rows(shard) for shard in range(store.shards)}


def _links(root: Path) -> list[Path]:
    """Return every symbolic link below the root, which may be one itself."""
    found = []
    for folder, folders, files in os.walk(root):
        found += [path for path in (Path(folder, name) for name in [*folders, *files]) if path.is_symlink()]
    return sorted(found)


def _strays(store: OpenStore) -> Iterator[Path]:
    layout = store.layout
    here = PARTS if isinstance(store.place, Path) else PARTS - ELSEWHERE
    yield from (path for path in layout.root.iterdir() if path.name not in here)
    yield from (path for path in layout.keys.iterdir() if path not in {layout.routing_key, layout.exclusion_key})
    yield from _stray_locks(store)
    if os.path.lexists(layout.incoming):
        yield layout.incoming
    if layout.corrections.is_dir():
        waiting = {r.id for r in store.ledger.requests.open() if r.kind == "correction" and r.state == STATES[0]}
        yield from (path for path in layout.corrections.iterdir() if path.name not in waiting)
    elif os.path.lexists(layout.corrections):
        yield layout.corrections
    for unused in (layout.root / "audit", layout.scratch):
        yield from unused.iterdir() if unused.is_dir() else [unused] if unused.exists() else []
    yield from _checkpoints(store).strays()
    yield from _stray_journal(store)


def _stray_locks(store: OpenStore) -> Iterator[Path]:
    """Return what is neither a lock, which says at most who took it, nor an empty stop mark of a request."""
    layout, shards = store.layout, range(store.shards)
    if not layout.locks.is_dir():
        return
    locks = {layout.lock(name) for name in ("create", "incoming", "ingest", "operation")}
    locks |= {lock for shard in shards for lock in (layout.shard_lock(shard), layout.rows_lock(shard))}
    marks = {layout.stop_marks(shard) for shard in shards}
    for path in layout.locks.iterdir():
        if path in marks and path.is_dir():
            yield from (mark for mark in path.iterdir() if not _is_mark(store, mark))
        elif path not in locks or not path.is_file() or not HOLDER.fullmatch(_beginning(path)):
            yield path


def _is_mark(store: OpenStore, path: Path) -> bool:
    if not path.is_file() or _beginning(path):
        return False
    return path.name in {request.id for request in store.ledger.requests.all()}


def _beginning(path: Path) -> bytes:
    with path.open("rb") as stream:
        return stream.read(64)


def _stray_journal(store: OpenStore) -> list[Path]:
    """Look what lies under the name of SQLite's journal while nobody can be writing to the ledger."""
    path = store.layout.ledger.with_name(f"{store.layout.ledger_name}-journal")
    if path.is_dir():
        return [path]
    if (
        not isinstance(database := store.ledger.database, SqliteDatabase)
        or not path.is_file()
        or not path.stat().st_size
    ):
        return []
    with database.transaction():
        size = database.rows("PRAGMA page_size")[0][0]
        is_ours = not path.is_file() or is_ignored_journal(path.read_bytes(), page_bytes=size)
    return [] if is_ours else [path]


def _stale_marks(store: OpenStore) -> list[str]:
    """Return stop marks of requests that need none any more; a killed deletion may leave one."""
    marks = store.coordination.marks.all()
    closed = {request.id for request in store.ledger.requests.all() if not request.open}
    paths = [store.layout.stop_marks(shard) / request for shard, request in marks if request in closed]
    return [
        f"{_short(store, path)}: stops training for a deletion that has ended; `sisa repair` removes it"
        for path in paths
        if not path.exists() or _is_mark(store, path)  # what isn't empty is told elsewhere
    ]


def _open_secrets(store: OpenStore) -> list[str]:
    problems = []
    for path in (store.layout.routing_key, store.layout.exclusion_key):
        mode = stat.S_IMODE(path.stat().st_mode)
        if mode & 0o077:
            problems.append(f"{_short(store, path)}: mode is {mode:04o}, expected 0600: others can read the secret")
    return problems


def _added_text(store: OpenStore) -> list[str]:
    """The recipe's digest doesn't cover comments: they could hold anything."""
    if store.layout.recipe.read_bytes() == dump_recipe(store.recipe).encode():
        return []
    return [f"{_short(store, store.layout.recipe)}: it is not, to the letter, the file that `sisa train` wrote"]


def _short(store: OpenStore, path: Path) -> str:
    return str(path.relative_to(store.layout.root))
