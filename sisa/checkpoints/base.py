"""What every kind of checkpoints does: keep a stage once, verify it on each load.

Invariants:
- Who finds a stage finds all of it. It is never changed afterwards.
- What is read is checked: each chunk's CRC32C, the manifest's digest, and the digest of the whole state. A missing
  chunk is an error with its name, never zeros.
- What is unfinished lies in shard folders alone. Whoever holds a shard's lock may sweep it; this part takes no lock.
- Nothing holds code: bytes of tensors, and JSON.

What voids this: writing below the root by other means, and a medium that says "durable" when it isn't.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from datetime import UTC, datetime

from sisa.checkpoints.manifest import Manifest, StageId
from sisa.checkpoints.snapshots import SnapshotId, Snapshots
from sisa.checkpoints.stage import Place, damage, read_content, read_stage, storable, write_stage
from sisa.errors import DamagedError, StoreError
from sisa.state import JSON, StageState, full_digest


class Checkpoints(ABC):
    """The stages below one root: a store's checkpoints, or those of a replay."""

    snapshots: Snapshots | None = None
    """Recovery snapshots; None where none are kept."""

    @abstractmethod
    def place(self, stage_id: StageId) -> Place:
        """Return where a stage lies, there or not."""

    @abstractmethod
    def list_shard(self, shard: int) -> list[StageId]:
        """Return the stages of a shard, sorted."""

    @abstractmethod
    def all_stages(self) -> list[StageId]:
        """Return the stages of all shards, sorted."""

    @abstractmethod
    def remove(self, stage_id: StageId) -> None:
        """Erase a stage durably; nothing happens if it is gone already."""

    @abstractmethod
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

    @abstractmethod
    def _make_groups(self, shard: int) -> None:
        """Make the root's and a shard's group."""

    @abstractmethod
    def __str__(self) -> str:
        """Say where they lie."""

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
            self._make_groups(stage_id.shard)
            published, whole = write_stage(self.place(stage_id), state, describe=describe)
        except OSError as error:
            raise StoreError(
                f"{stage_id} can't be written below {self}: {error.strerror or error}",
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
        manifest, state = read_stage(self.place(stage_id), stage_id)
        if expect_full_digest not in (None, manifest.full_digest):
            reason = f"expected the state {expect_full_digest}, found {manifest.full_digest}"
            raise damage(self.place(stage_id), stage_id, reason)
        return manifest, state

    def manifest(self, stage_id: StageId) -> Manifest:
        """Read and verify what is known about a stage, not its tensors; doesn't import Zarr.

        Raises:
            MissingStage: It isn't there.
            DamagedError: Its manifest is missing or changed.
        """
        return read_content(self.place(stage_id), stage_id)[1]

    def exists(self, stage_id: StageId) -> bool:
        """Say whether the stage is there; whether it is whole, :meth:`load` finds out."""
        return self.place(stage_id).exists()

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
