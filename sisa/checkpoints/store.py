"""Stages on a disk: a folder each, built under a temporary name in its shard's folder, made durable, and renamed."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from sisa.checkpoints.base import Checkpoints
from sisa.checkpoints.manifest import StageId, parse_shard, parse_stage, shard_folder
from sisa.checkpoints.snapshots import FolderSnapshots, SnapshotId, Snapshots
from sisa.checkpoints.stage import EMPTY_GROUP, METADATA, FolderPlace, expected_files
from sisa.files import fsync_path, make_folder, remove, sweep_temporary, temporary_beside


class CheckpointStore(Checkpoints):
    """The stages in the folder ``root``."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.snapshots: Snapshots = FolderSnapshots(root)

    def __str__(self) -> str:
        return str(self.root)

    def place(self, stage_id: StageId) -> FolderPlace:
        """Return where a stage lies, there or not."""
        return FolderPlace(self.path(stage_id))

    def path(self, stage_id: StageId) -> Path:
        """Return the folder of a stage, there or not."""
        return self.root / stage_id.folder

    def list_shard(self, shard: int) -> list[StageId]:
        """Return the stages of a shard, sorted."""
        found = (parse_stage(shard, path.name) for path in _folders(self.root / shard_folder(shard)))
        return sorted(stage_id for stage_id in found if stage_id is not None)

    def all_stages(self) -> list[StageId]:
        """Return the stages of all shards, sorted."""
        shards = [parse_shard(path.name) for path in _folders(self.root)]
        return sorted(stage_id for shard in shards if shard is not None for stage_id in self.list_shard(shard))

    def remove(self, stage_id: StageId) -> None:
        """Erase a stage durably; nothing happens if it is gone already."""
        if self.exists(stage_id):
            remove(self.path(stage_id))

    def sweep(
        self,
        shard: int,
        *,
        keep: Callable[[StageId], bool],
        keep_snapshot: Callable[[SnapshotId], bool] = lambda _: False,
    ) -> list[StageId]:
        """Erase what was left unfinished in a shard and every stage that ``keep`` refuses; see the base class."""
        folder = self.root / shard_folder(shard)
        sweep_temporary(folder)
        for snapshot_id in self.snapshots.list_shard(shard):
            if not keep_snapshot(snapshot_id):
                self.snapshots.remove(snapshot_id)
        stages = self.list_shard(shard)
        doomed = [stage_id for stage_id in stages if not keep(stage_id)]
        for stage_id in doomed:
            self.remove(stage_id)
        if len(doomed) < len(stages):
            with contextlib.suppress(OSError):  # a full disk must not keep anything from being erased
                self._make_groups(shard)
        return doomed

    def missing_groups(self) -> list[Path]:
        """Return the metadata of groups around stages that isn't there: a reader of Zarr would find no stage."""
        shards = sorted({stage_id.shard for stage_id in self.all_stages()})
        folders = [self.root, *(self.root / shard_folder(shard) for shard in shards)] if shards else []
        return [folder / METADATA for folder in folders if not os.path.lexists(folder / METADATA)]

    def strays(self) -> list[Path]:
        """Return every path below the root that is no part of a stage or of the groups around them, sorted.

        Leftovers of a killed writer, files of others, links, metadata of those groups that was changed, and chunks
        that a stage doesn't have.
        """
        if not self.root.is_dir():
            return []
        found: list[Path] = []
        for path in self.root.iterdir():
            shard = parse_shard(path.name) if _is_folder(path) else None
            if shard is not None:
                found += self._strays_of(path, shard)
            elif not _is_group_file(path):
                found.append(path)
        return sorted(found)

    def _strays_of(self, folder: Path, shard: int) -> Iterator[Path]:
        for path in folder.iterdir():
            stage_id = parse_stage(shard, path.name) if _is_folder(path) else None
            if stage_id is not None:
                expected = expected_files(path, stage_id)
                yield from (child for child in path.rglob("*") if child not in expected or child.is_symlink())
            elif not _is_group_file(path):
                yield path

    def _make_groups(self, shard: int) -> None:
        """Make the root's and a shard's group; a group's file is written once the names above it are durable."""
        folder = self.root / shard_folder(shard)
        if _is_group_file(folder / METADATA) and _is_group_file(self.root / METADATA):
            return
        make_folder(folder)
        fsync_path(self.root)
        fsync_path(self.root.parent)
        for parent in (self.root, folder):
            if not _is_group_file(parent / METADATA):
                scratch = temporary_beside(folder / METADATA)
                scratch.write_text(json.dumps(EMPTY_GROUP, indent=2), encoding="utf-8")
                fsync_path(scratch)
                os.replace(scratch, parent / METADATA)  # atomic, and all writers write the same
                fsync_path(parent)


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def _folders(path: Path) -> list[Path]:
    return [child for child in path.iterdir() if _is_folder(child)] if path.is_dir() else []


def _is_group_file(path: Path) -> bool:
    """Say whether this is the metadata of one of the groups around the stages, unchanged."""
    if path.name != METADATA or path.is_symlink():
        return False
    try:
        return bool(json.loads(path.read_bytes()) == EMPTY_GROUP)
    except (OSError, ValueError):
        return False
