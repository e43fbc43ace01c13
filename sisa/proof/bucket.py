"""Checking a store in object storage: every key is somebody's, and no version of anything else is kept.

A listing of all versions is what proves that an erasure was one: what a bucket keeps of an erased key, a reader of the
key never sees. What the bucket's owner copies elsewhere (replication, backups, access logs) no listing shows.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from sisa.checkpoints.manifest import parse_shard
from sisa.checkpoints.objects import ObjectCheckpoints
from sisa.checkpoints.snapshots import parse_snapshot
from sisa.files import TEMPORARY
from sisa.layout import CHECKPOINTS_KEY, CORRECTIONS_KEY, INCOMING_KEY, RECIPE_KEY, RECORDS_KEY, SCRATCH_KEY
from sisa.ledger import STATES
from sisa.opening import OpenStore
from sisa.records.partition import stray_keys
from sisa.remote import is_beside, open_to_all, recipe_text

LEFT = "left by a command that was killed; `sisa repair` removes it"
SNAPSHOT = (
    "a recovery snapshot of a training that was killed; `sisa repair` or `sisa train` goes on from it or removes it"
)
SNAPSHOT_PARTS = 3
"""Names in the prefix of a snapshot."""
FOLDERS = (f"{RECORDS_KEY}/", f"{CHECKPOINTS_KEY}/")
KILLED = frozenset({SCRATCH_KEY, INCOMING_KEY, CORRECTIONS_KEY})
"""Where only something at work has objects."""
NOBODYS = "nobody answers for this object"


def check_bucket(store: OpenStore) -> list[str]:
    """Return what is wrong with the objects of a store, rows and stages themselves excepted."""
    storage = store.layout.storage
    problems = [f"{key}: {fault}" for key, fault in _strays(store)]
    problems += [f"{line}; `sisa repair` erases it where it is the store's" for line in storage.hidden("")]
    problems += [
        f"{key}: missing, so that a reader of Zarr doesn't find the stages; `sisa repair` writes it"
        for key in _checkpoints(store).missing_groups()
    ]
    claim = store.ledger.fact("claim") or ""
    if storage.read(RECIPE_KEY) != recipe_text(store.recipe, claim):
        problems.append(f"{RECIPE_KEY}: it is not, to the letter, the file that `sisa train` wrote")
    return problems


def check_beside(store: OpenStore) -> list[str]:
    """Return what is wrong with the folder of the ledger and with the key files, locks and marks excepted."""
    layout = store.layout
    problems = []
    for path in sorted(layout.root.iterdir()) if layout.root.is_dir() else []:
        if path.name.startswith(TEMPORARY) or path == layout.incoming:
            problems.append(f"{path.name} beside the ledger: {LEFT}")
        elif path == layout.waiting_area:
            problems += _left_waiting(store)
        elif not is_beside(layout, path.name):
            problems.append(f"{path.name} beside the ledger: nobody answers for this")
    routing = store.recipe.routing
    for name, file in (("key_file", routing.key_file), ("exclusion_key_file", routing.exclusion_key_file)):
        fault = open_to_all(Path(file or ""))
        if fault:
            problems.append(f"routing.{name}: {fault}")
    return problems


def _left_waiting(store: OpenStore) -> Iterator[str]:
    """Tell what lies where rows wait while a stage trains; there is nothing while none does."""
    area = store.layout.waiting_area
    ours = {store.layout.waiting_rows(shard) for shard in range(store.shards)}
    for path in sorted(area.iterdir()) if area.is_dir() else [area]:
        fault = LEFT if path in ours and path.is_dir() else "nobody answers for this"
        yield f"{path.relative_to(store.layout.root)} beside the ledger: {fault}"


def _strays(store: OpenStore) -> Iterator[tuple[str, str]]:
    open_ = [r for r in store.ledger.requests.open() if r.kind == "correction" and r.state == STATES[0]]
    expected = (*FOLDERS, *(f"{store.layout.correction_key(request.id)}/{RECORDS_KEY}/" for request in open_))
    incoming = False
    for key in store.layout.storage.keys(""):
        part = key.split("/")[0]
        incoming |= part == INCOMING_KEY
        if key == RECIPE_KEY or key.startswith(expected):
            continue
        yield key, LEFT if part in KILLED else NOBODYS
    for key in stray_keys(store.layout, store.shards, store.slices, generations=store.generations):
        yield key, f"{'unfinished' if incoming else 'unknown'} file among the records"
    for key in sorted({_snapshot_of(key) or key for key in _checkpoints(store).strays()}):
        yield key, SNAPSHOT if _snapshot_of(key) else NOBODYS


def _snapshot_of(key: str) -> str:
    """Return the prefix of the recovery snapshot that an object is a part of, "" if it is of none."""
    parts = key.split("/")
    shard = parse_shard(parts[1]) if len(parts) >= SNAPSHOT_PARTS else None
    return "/".join(parts[:SNAPSHOT_PARTS]) if shard is not None and parse_snapshot(shard, parts[2]) else ""


def _checkpoints(store: OpenStore) -> ObjectCheckpoints:
    assert isinstance(store.checkpoints, ObjectCheckpoints)
    return store.checkpoints
