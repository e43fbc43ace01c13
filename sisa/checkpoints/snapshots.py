"""Recovery snapshots: the full state of a training in the middle of a stage, so that a machine may be lost.

Invariants:
- A snapshot lies in its shard's folder under a name of its own, which holds its stage's lineage key and platform and
  its step: what other rows, another recipe, other code or another platform call for has another name.
- It is written and verified as a stage is, by the same writer, and in a format of its own: renamed, it is no stage. In
  object storage it is there when its metadata is, which is put last.
- At most the newest two of a stage exist, the second for the moment in which one replaces the other.
- It goes when its stage is published, and with every deletion that touches its shard, whatever stage it is of.

The caller holds the shard's lock.
"""

from __future__ import annotations

import contextlib
import re
from abc import ABC, abstractmethod
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from sisa.checkpoints.manifest import Manifest, StageId, parse_stage, shard_folder
from sisa.checkpoints.stage import SNAPSHOT_FORMAT, FolderPlace, Place, read_stage, snapshot_state, write_stage
from sisa.errors import SisaError, StoreError
from sisa.files import make_folder, remove
from sisa.state import JSON, StageState

_NAME: Final = re.compile(r"snapshot-(.+)-(\d{12,})")


@dataclass(frozen=True, order=True)
class SnapshotId:
    """The name of one snapshot; sorts by stage, then by step."""

    stage_id: StageId
    step: int
    """Steps of the optimiser within the stage that lie behind it."""

    @property
    def folder(self) -> str:
        """Its path below the root, ``shard-0003/snapshot-02-<key>.<platform>-<step>``."""
        parent, _, name = self.stage_id.folder.partition("/")
        return f"{parent}/snapshot-{name.removeprefix('stage-')}-{self.step:012d}"


class Snapshots(ABC):
    """The snapshots below the root of a checkpoint store."""

    @abstractmethod
    def place(self, snapshot_id: SnapshotId) -> Place:
        """Return where a snapshot lies, there or not."""

    @abstractmethod
    def list_shard(self, shard: int) -> list[SnapshotId]:
        """Return the snapshots of a shard of which anything is there, sorted."""

    @abstractmethod
    def remove(self, snapshot_id: SnapshotId) -> None:
        """Erase a snapshot durably; nothing happens if it is gone already."""

    @abstractmethod
    def _prepare(self, shard: int) -> None:
        """Make what has to be there before a snapshot of a shard is written."""

    def write(
        self,
        snapshot_id: SnapshotId,
        state: StageState,
        *,
        parent_key: str,
        records: int,
        seconds: float,
        worker: str,
        fingerprint: dict[str, JSON],
    ) -> None:
        """Keep a snapshot durably; when it lies there, older ones of its stage are removed.

        Args:
            snapshot_id: Its name.
            state: All of it, with its position.
            parent_key: Lineage key of the stage before, empty for the first.
            records: Records of slices 1..r.
            seconds: How long the stage has been trained so far.
            worker: ``host:pid`` of the process that trains it.
            fingerprint: The platform that it is trained on.

        Raises:
            StoreError: The state holds what can't be kept, or it can't be written; nothing of it is left.
            BusyError: Object storage doesn't answer.
        """

        def describe(served: str, whole: str, size_bytes: int) -> Manifest:
            return Manifest(
                stage_id=snapshot_id.stage_id,
                parent_key=parent_key,
                records=records,
                state_digest=served,
                full_digest=whole,
                bytes=size_bytes,
                created_at=datetime.now(UTC).isoformat(timespec="milliseconds"),
                seconds=round(seconds, 6),
                worker=worker,
                fingerprint=fingerprint,
                steps=snapshot_id.step,
            )

        try:
            self._prepare(snapshot_id.stage_id.shard)
            write_stage(self.place(snapshot_id), snapshot_state(state), describe=describe, form=SNAPSHOT_FORMAT)
            self.discard(snapshot_id.stage_id, but=snapshot_id)
        except OSError as error:
            raise StoreError(
                f"a recovery snapshot of {snapshot_id.stage_id} can't be written: {error.strerror or error}",
                hint="Make room or give permission; the training goes on without it.",
            ) from error
        except SisaError:
            with contextlib.suppress(SisaError):  # then the next holder of the shard's lock sweeps it
                self.remove(snapshot_id)
            raise

    def load(self, snapshot_id: SnapshotId) -> tuple[Manifest, StageState]:
        """Read a snapshot and verify all of it.

        Raises:
            DamagedError: Bytes are missing or changed, or it is another stage's.
        """
        return read_stage(self.place(snapshot_id), snapshot_id.stage_id, form=SNAPSHOT_FORMAT)

    def whole(self, snapshot_id: SnapshotId) -> bool:
        """Say whether a snapshot was written to its end."""
        return self.place(snapshot_id).exists()

    def discard(self, stage_id: StageId, *, but: SnapshotId | None = None) -> None:
        """Erase the snapshots of a stage, unfinished ones too."""
        for snapshot_id in self.of_stage(stage_id):
            if snapshot_id != but:
                self.remove(snapshot_id)

    def of_stage(self, stage_id: StageId) -> list[SnapshotId]:
        """Return the snapshots of a stage of which anything is there, oldest first."""
        return [found for found in self.list_shard(stage_id.shard) if found.stage_id == stage_id]


class FolderSnapshots(Snapshots):
    """Those in a folder: there as a whole or not at all."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def place(self, snapshot_id: SnapshotId) -> FolderPlace:
        """Return the folder of a snapshot."""
        return FolderPlace(self.root / snapshot_id.folder)

    def list_shard(self, shard: int) -> list[SnapshotId]:
        """Return the snapshots of a shard, sorted."""
        folder = self.root / shard_folder(shard)
        names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
        return sorted(found for name in names if (found := parse_snapshot(shard, name)) is not None)

    def remove(self, snapshot_id: SnapshotId) -> None:
        """Erase a snapshot durably; nothing happens if it is gone already."""
        remove(self.root / snapshot_id.folder)

    def _prepare(self, shard: int) -> None:
        make_folder(self.root / shard_folder(shard))


def parse_snapshot(shard: int, name: str) -> SnapshotId | None:
    """Return the snapshot of ``shard`` whose folder is called ``name``, or None."""
    match = _NAME.fullmatch(name)
    stage_id = parse_stage(shard, f"stage-{match[1]}") if match is not None else None
    if match is None or stage_id is None:
        return None
    found = SnapshotId(stage_id, int(match[2]))
    return found if found.folder == f"{shard_folder(shard)}/{name}" else None
