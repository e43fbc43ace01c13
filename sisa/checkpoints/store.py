"""Stages on disk: written once, whole or not at all, verified each time they are read.

Invariants:
- A stage is a folder of a few files, a Zarr group. It is built under a temporary name in its shard's folder, made
  durable, and renamed: who finds it finds all of it. It is never changed afterwards.
- What is read is checked: each chunk's CRC32C, the manifest's digest, and the digest of the whole state. A missing
  chunk is an error with its name, never zeros.
- Temporary names lie in shard folders alone. Whoever holds a shard's lock may sweep them; this module takes no lock.
- No file holds code: bytes of tensors, and JSON.

What voids this: writing below the root by other means, and a disk that says "durable" when it isn't.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

from sisa.checkpoints.manifest import Manifest, StageId, parse_shard, parse_stage, shard_folder
from sisa.checkpoints.snapshots import SnapshotId, Snapshots
from sisa.checkpoints.stage import (
    EMPTY_GROUP,
    METADATA,
    damage,
    expected_files,
    read_content,
    read_stage,
    storable,
    write_stage,
)
from sisa.errors import DamagedError, StoreError
from sisa.files import fsync_path, make_folder, remove, sweep_temporary, temporary_beside
from sisa.state import JSON, StageState, full_digest


class CheckpointStore:
    """The stages below one root: a store's checkpoints, or those of a replay."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.snapshots = Snapshots(root)

    def path(self, stage_id: StageId) -> Path:
        """Return the folder of a stage, there or not."""
        return self.root / stage_id.folder

    def write(
        self,
        stage_id: StageId,
        state: StageState,
        *,
        parent_key: str,
        records: int,
        seconds: float,
        worker: str,
        fingerprint: dict[str, JSON],
        epochs: int | None = None,
        steps: int | None = None,
    ) -> Manifest:
        """Keep a stage durably, and return its manifest.

        If the stage is there already, with the same state, it stays as it is and its manifest is returned: two
        workers may train the same stage.

        Args:
            stage_id: Its name.
            state: All of it; the empty one too.
            parent_key: Lineage key of the stage before, empty for the first.
            records: Records of slices 1..r.
            seconds: How long its training took.
            worker: ``host:pid`` of the process that trained it.
            fingerprint: The platform that it was trained on.
            epochs: Passes over these records in this stage; None if not told.
            steps: Steps of the optimiser in this stage; None if not told.

        Raises:
            DamagedError: The stage is there already, with another state, or damaged.
            StoreError: The state holds what can't be kept, or the files can't be written (a full disk, no permission).
        """

        def describe(served: str, whole: str, size_bytes: int) -> Manifest:
            return Manifest(
                stage_id=stage_id,
                parent_key=parent_key,
                records=records,
                state_digest=served,
                full_digest=whole,
                bytes=size_bytes,
                created_at=datetime.now(UTC).isoformat(timespec="milliseconds"),
                seconds=round(seconds, 6),
                worker=worker,
                fingerprint=fingerprint,
                epochs=epochs,
                steps=steps,
            )

        state = storable(state)
        try:
            if self.exists(stage_id):
                return self._agreed(stage_id, full_digest(state))
            self._make_groups(self.path(stage_id).parent)
            published, whole = write_stage(self.path(stage_id), state, describe=describe)
        except OSError as error:
            raise StoreError(
                f"{stage_id} can't be written below {self.root}: {error.strerror or error}",
                hint="Make room or give permission, then run the command again: nothing half-written is used.",
            ) from error
        return self.manifest(stage_id) if published else self._agreed(stage_id, whole)

    def load(self, stage_id: StageId, *, expect_full_digest: str | None = None) -> tuple[Manifest, StageState]:
        """Read a stage and verify all of it; the tensors are writable views of one fresh row of bytes.

        Args:
            stage_id: The stage.
            expect_full_digest: What the ledger says; None trusts the manifest alone.

        Raises:
            MissingStage: It isn't there.
            DamagedError: Bytes are missing or changed, or it is another state than expected.
        """
        manifest, state = read_stage(self.path(stage_id), stage_id)
        if expect_full_digest not in (None, manifest.full_digest):
            reason = f"expected the state {expect_full_digest}, found {manifest.full_digest}"
            raise damage(self.path(stage_id), stage_id, reason)
        return manifest, state

    def manifest(self, stage_id: StageId) -> Manifest:
        """Read and verify what is known about a stage, not its tensors; doesn't import Zarr.

        Raises:
            MissingStage: It isn't there.
            DamagedError: Its manifest is missing or changed.
        """
        return read_content(self.path(stage_id), stage_id)[1]

    def exists(self, stage_id: StageId) -> bool:
        """Say whether the stage is there; whether it is whole, :meth:`load` finds out."""
        return os.path.lexists(self.path(stage_id))

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
        """Erase what was left unfinished in a shard and every stage that ``keep`` refuses; return those stages.

        So goes every recovery snapshot, but for those that ``keep_snapshot`` wants. Groups around the stages that stay are written again if they are lost or changed. The caller holds the
        shard's lock: another's unfinished stage would go too.
        """
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
                self._make_groups(folder)
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

    def _agreed(self, stage_id: StageId, whole: str) -> Manifest:
        """Return the manifest of the stage that is there, which must hold the state with this digest."""
        there, _ = self.load(stage_id)
        if there.full_digest != whole:
            raise DamagedError(
                f"{stage_id} is not reproducible: {there.full_digest} is stored, the same training now gave {whole}",
                hint="Something other than the records got into training: an unpinned random choice in the model's "
                "code, or a worker on another platform. Nothing was replaced.",
            )
        return there

    def _make_groups(self, folder: Path) -> None:
        """Make the root's and a shard's group; a group's file is written once the names above it are durable."""
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
