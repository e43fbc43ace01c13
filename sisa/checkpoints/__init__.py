"""The full training state of every stage, kept by lineage key. The only part that opens Zarr."""

from sisa.checkpoints.manifest import Manifest, StageId
from sisa.checkpoints.snapshots import SnapshotId, Snapshots
from sisa.checkpoints.stage import MissingStage
from sisa.checkpoints.store import CheckpointStore

__all__ = ["CheckpointStore", "Manifest", "MissingStage", "SnapshotId", "Snapshots", "StageId"]
