"""The full training state of every stage, kept by lineage key. The only part that opens Zarr."""

from sisa.checkpoints.base import Checkpoints
from sisa.checkpoints.manifest import Manifest, StageId
from sisa.checkpoints.snapshots import SnapshotId, Snapshots
from sisa.checkpoints.stage import MissingStage
from sisa.checkpoints.store import CheckpointStore
from sisa.checkpoints.where import checkpoints_at

__all__ = [
    "CheckpointStore",
    "Checkpoints",
    "Manifest",
    "MissingStage",
    "SnapshotId",
    "Snapshots",
    "StageId",
    "checkpoints_at",
]
