"""From the URI of a store to its checkpoints."""

from __future__ import annotations

from pathlib import Path

from sisa.checkpoints.base import Checkpoints
from sisa.checkpoints.store import CheckpointStore
from sisa.storage import is_remote, object_storage_at


def checkpoints_at(uri: str, root: str) -> Checkpoints:
    """Return the stages below ``root`` of the store at ``uri``.

    Raises:
        UserError: The URI can't be used.
    """
    if is_remote(uri):
        from sisa.checkpoints.objects import ObjectCheckpoints

        return ObjectCheckpoints(object_storage_at(uri), root)
    return CheckpointStore(Path(uri) / root)
