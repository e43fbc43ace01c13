"""Whole stores in temporary folders: train them, copy them, and hold one against another by what lies on disk."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as papq

import sisa
from sisa.store.store import Store

KEY = bytes(range(100, 132))
"""The routing key of every store here: the same people go to the same places."""


def at(folder: Path, recipe: dict[str, Any], source: object) -> dict[str, Any]:
    """The recipe with this source and with the key that all stores share."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "routing.key").write_text(KEY.hex())
    whole = copy.deepcopy(recipe)
    whole["data"]["source"] = str(source)
    return {**whole, "routing": {"key_file": str(folder / "routing.key")}}


def write(table: pa.Table, path: Path, **options: Any) -> Path:
    """Write a table as Parquet."""
    path.parent.mkdir(parents=True, exist_ok=True)
    papq.write_table(table, path, **options)
    return path


def train(folder: Path, recipe: dict[str, Any], table: pa.Table, *, name: str = "store", **options: Any) -> Store:
    """Write the table and train a store ``folder/name`` from it, in this process."""
    source = write(table, folder / f"{name}.parquet")
    return sisa.train(at(folder, recipe, source), store=folder / name, **{"executor": "inline", **options})


def again(store: Store, folder: Path, recipe: dict[str, Any], source: Path) -> Store:
    """Train a store once more, from a source that lies elsewhere."""
    return sisa.train(at(folder, recipe, source), store=store.opened.layout.root, executor="inline")


def copied(store: Store, folder: Path, *, name: str = "copy") -> Store:
    """A copy of a store, to break or to delete from: nothing in a store says where it lies."""
    shutil.copytree(store.opened.layout.root, folder / name)
    return sisa.open_store(folder / name)


def scratch(store: Store, folder: Path, recipe: dict[str, Any], table: pa.Table, *, name: str = "scratch") -> Store:
    """Train from nothing on ``table`` and make sure that ``store`` is the same, bit for bit; return the fresh one."""
    fresh = train(folder, recipe, table, name=name)
    assert fresh.training.stages_reused == 0
    assert_same(store, fresh)
    return fresh


def assert_same(one: Store, other: Store) -> None:
    """Two stores hold the same rows in the same places, the same stages with the same bits, and serve the same."""
    assert places(one) == places(other)
    assert digests(one) == digests(other)
    assert chunks(one) == chunks(other)
    assert served(one) == served(other)
    assert one.status()["constituents"] == other.status()["constituents"]


def digests(store: Store) -> dict[tuple[int, int], tuple[str, int, str, str]]:
    """Key, records and digests of each stage, as the ledger has them."""
    rows = store.opened.ledger.stages.all()
    assert not any(row.tainted for row in rows)
    return {(row.shard, row.stage): (row.key, row.records, row.state_digest, row.full_digest) for row in rows}


def state_digests(store: Store) -> dict[tuple[int, int], str]:
    """The digest of what each stage answers with."""
    return {place: row[2] for place, row in digests(store).items()}


def served(store: Store) -> list[tuple[int, int, str]]:
    """(shard, stage, key) of the live version's members."""
    return [(member.shard, member.stage, member.key) for member in store.opened.ledger.versions.live().members]


def chunks(store: Store) -> dict[str, bytes]:
    """The bytes of every stage's tensors, by a path that holds its key; read as files."""
    root = store.opened.layout.checkpoints
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("c.*"))}


def stage_folder(store: Store, shard: int, stage: int) -> Path:
    """Where a stage lies."""
    (folder,) = store.opened.layout.checkpoints.glob(f"shard-{shard:04d}/stage-{stage:02d}-*")
    return folder


def partition(store: Store, shard: int, slice_: int) -> Path:
    """Where the rows of a slice lie, if it has any."""
    return store.opened.layout.root / f"records/shard={shard:04d}/slice={slice_:02d}/part-00000.parquet"


def places(store: Store) -> dict[str, tuple[int, int]]:
    """(shard, slice) of each record, by the folder that holds it."""
    found: dict[str, tuple[int, int]] = {}
    for path in store.opened.layout.records.rglob("*.parquet"):
        shard, slice_ = (int(name.partition("=")[2] or 0) for name in (path.parent.parent.name, path.parent.name))
        place = (slice_, 0) if path.parent.parent.name == "holdout" else (shard, slice_)
        records = papq.read_table(path, partitioning=None)["_sisa_record"].to_pylist()
        assert not found.keys() & set(records)
        found |= dict.fromkeys(records, place)
    return found


def slices(store: Store) -> dict[tuple[int, int], list[str]]:
    """Records of each slice that has any, sorted."""
    found: dict[tuple[int, int], list[str]] = {}
    for record, place in sorted(places(store).items()):
        found.setdefault(place, []).append(record)
    return found


def files(folder: Path) -> dict[str, tuple[int, int, bytes]]:
    """Inode, time of change and bytes of every file below a folder."""
    return {
        str(path.relative_to(folder)): (path.stat().st_ino, path.stat().st_mtime_ns, path.read_bytes())
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def holding(root: Path, *texts: str) -> Iterator[Path]:
    """Files below a folder whose bytes, as they are or unpacked from Parquet, contain one of the texts."""
    for path in sorted(path for path in root.rglob("*") if path.is_file() and not path.is_symlink()):
        content = path.read_bytes()
        if path.suffix == ".parquet":
            content += repr(papq.read_table(path, partitioning=None).to_pydict()).encode()
        if any(text.encode() in content for text in texts):
            yield path
