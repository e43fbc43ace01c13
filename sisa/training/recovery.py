"""Recovery snapshots of one chain: kept on a schedule while a stage trains, gone on from by whoever trains it next.

A snapshot can never continue under other rows, another recipe, other code or another platform: it is looked up by the
lineage key and the platform of the stage that is to be trained, which cover all of that. A damaged one is no loss but
of time: it is discarded, and the stage starts from the one before.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from sisa.checkpoints import SnapshotId, Snapshots, StageId
from sisa.errors import DamagedError, LostLockError, StoreError
from sisa.state import JSON, StageState
from sisa.training.events import Kept, Report, Resumed, Said
from sisa.training.stage import Keeping, Stopped, position


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """What a snapshot says of the training that it is in the middle of."""

    parent_key: str
    records: int
    worker: str
    fingerprint: dict[str, JSON]


@dataclass
class Recovery:
    """The snapshots of one stage while it trains."""

    snapshots: Snapshots | None
    """None where none are kept."""
    stage_id: StageId
    report: Report
    seconds_before: float = 0.0
    """For how long the stage was trained before it went on here."""

    def find(self, *, records: int, batch_size: int) -> StageState | None:
        """Return the newest state of the stage that is whole, or None; damaged ones are discarded, with a word."""
        if self.snapshots is None:
            return None
        for snapshot_id in reversed(self.snapshots.of_stage(self.stage_id)):
            if not self.snapshots.whole(snapshot_id):
                continue  # whoever wrote it was killed; it goes with the stage
            try:
                manifest, amid = self.snapshots.load(snapshot_id)
            except DamagedError:
                self.report(Said(f"a recovery snapshot of {self.stage_id} is damaged: it is discarded"))
                self.snapshots.remove(snapshot_id)
                continue
            epoch, batch = position(amid)
            self.seconds_before = manifest.seconds
            behind = epoch * records + min(batch * batch_size, records)
            self.report(Said(f"{self.stage_id} goes on from a recovery snapshot, in its epoch {epoch + 1}"))
            self.report(Resumed(self.stage_id.shard, self.stage_id.stage, behind))
            return amid
        return None

    def keeping(self, every_s: float | None, said: Provenance, *, stopped: Callable[[], bool]) -> Keeping | None:
        """Return how the stage's state is kept while it trains; None if it isn't."""
        snapshots = self.snapshots
        if every_s is None or snapshots is None:
            return None
        started = time.monotonic()
        failed: list[bool] = []

        def keep(amid: StageState, step: int) -> None:
            if stopped():  # its rows may be about to be erased: nothing of them reaches the disk any more
                raise Stopped(f"{self.stage_id} was stopped while it trained")
            snapshot_id = SnapshotId(self.stage_id, step)
            try:
                snapshots.write(
                    snapshot_id,
                    amid,
                    parent_key=said.parent_key,
                    records=said.records,
                    seconds=self.seconds_before + time.monotonic() - started,
                    worker=said.worker,
                    fingerprint=said.fingerprint,
                )
            except StoreError as error:  # a full disk, a server that doesn't answer: the training is not worse off than without snapshots
                if not failed:
                    self.report(Said(f"{error.message}; the training goes on without it"))
                failed.append(True)
            else:
                _check_still_ours(snapshots, snapshot_id, stopped)
                self.report(Kept(self.stage_id.shard, self.stage_id.stage))

        def unfit() -> None:
            if not failed:
                self.report(
                    Said(f"{self.stage_id}: the model keeps more than its state, so no recovery snapshot is kept")
                )
            failed.append(True)

        return Keeping(every_s=every_s, keep=keep, unfit=unfit)

    def discard(self) -> None:
        """Remove what is there of the stage: it lies in the store as a whole."""
        if self.snapshots is not None:
            self.snapshots.discard(self.stage_id)


def _check_still_ours(snapshots: Snapshots, snapshot_id: SnapshotId, stopped: Callable[[], bool]) -> None:
    """Take a snapshot back that was written after the lock was lost: whoever holds it by now may have purged the shard.

    Raises:
        LostLockError: It was.
    """
    try:
        stopped()
    except LostLockError:
        snapshots.remove(snapshot_id)
        raise
