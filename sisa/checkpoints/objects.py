"""Stages in object storage: a prefix each, which is a stage if and only if its metadata is there."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sisa.checkpoints.base import Checkpoints
from sisa.checkpoints.manifest import StageId, parse_shard, parse_stage, shard_folder
from sisa.checkpoints.snapshots import SnapshotId, Snapshots, parse_snapshot
from sisa.checkpoints.stage import EMPTY_GROUP, METADATA, chunk_names
from sisa.state import JSON

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from sisa.checkpoints.group import GroupPlace
    from sisa.storage.objects import ObjectStorage

_GROUP = json.dumps(EMPTY_GROUP, indent=2).encode()
_ARRAY = "state"


@dataclass(frozen=True)
class ObjectPlace:
    """A stage below a prefix of its own."""

    storage: ObjectStorage
    prefix: str

    def __str__(self) -> str:
        return f"{self.storage.uri}/{self.prefix}"

    @property
    def key(self) -> str:
        """The object that makes it a stage."""
        return f"{self.prefix}/{METADATA}"

    def exists(self) -> bool:
        """Say whether the stage is there."""
        return self.storage.exists(self.key)

    def metadata(self) -> bytes:
        """Return the group's metadata.

        Raises:
            FileNotFoundError: It is missing.
        """
        return self.storage.read(self.key)

    def group(self) -> GroupPlace:
        """Return where Zarr reads the group."""
        from sisa.checkpoints import bucket

        return bucket.group_to_read(self.storage, self.prefix)

    def publish(
        self,
        row: npt.NDArray[np.uint8],
        *,
        chunk_bytes: int,
        attributes: Callable[[Mapping[str, JSON]], Mapping[str, JSON]],
    ) -> bool:
        """Put the chunks, then what makes them a stage.

        Raises:
            StoreError: They can't be put.
        """
        from sisa.checkpoints import bucket

        return bucket.publish(self.storage, self.prefix, row, chunk_bytes=chunk_bytes, attributes=attributes)


class ObjectSnapshots(Snapshots):
    """Those below a prefix of object storage: whole if their metadata is there."""

    def __init__(self, storage: ObjectStorage, root: str) -> None:
        self._storage = storage
        self._root = root

    def place(self, snapshot_id: SnapshotId) -> ObjectPlace:
        """Return the prefix of a snapshot."""
        return ObjectPlace(self._storage, f"{self._root}/{snapshot_id.folder}")

    def list_shard(self, shard: int) -> list[SnapshotId]:
        """Return the snapshots of a shard of which anything is there, whole or not, sorted."""
        below = f"{self._root}/{shard_folder(shard)}"
        names = {key.removeprefix(f"{below}/").partition("/")[0] for key in self._storage.keys(below)}
        return sorted(found for name in names if (found := parse_snapshot(shard, name)) is not None)

    def remove(self, snapshot_id: SnapshotId) -> None:
        """Erase a snapshot in every version, what makes it one first: a half-removed one is none."""
        place = self.place(snapshot_id)
        self._storage.remove(place.key)
        self._storage.remove_all(place.prefix)

    def _prepare(self, shard: int) -> None:
        """Nothing: a prefix needs not be made."""


class ObjectCheckpoints(Checkpoints):
    """The stages below the prefix ``root`` of object storage."""

    def __init__(self, storage: ObjectStorage, root: str) -> None:
        self.storage = storage
        self.root = root
        self.snapshots: Snapshots = ObjectSnapshots(storage, root)
        self._made: set[str] = set()
        """Groups that this object has seen."""

    def __str__(self) -> str:
        return f"{self.storage.uri}/{self.root}"

    def place(self, stage_id: StageId) -> ObjectPlace:
        """Return where a stage lies, there or not."""
        return ObjectPlace(self.storage, f"{self.root}/{stage_id.folder}")

    def list_shard(self, shard: int) -> list[StageId]:
        """Return the stages of a shard, sorted."""
        return sorted(self._stages(self.storage.keys(f"{self.root}/{shard_folder(shard)}")))

    def all_stages(self) -> list[StageId]:
        """Return the stages of all shards, sorted."""
        return sorted(self._stages(self.storage.keys(self.root)))

    def remove(self, stage_id: StageId) -> None:
        """Erase a stage in every version, what makes it one first: a half-removed stage is none."""
        place = self.place(stage_id)
        self.storage.remove(place.key)
        self.storage.remove_all(place.prefix)

    def sweep(
        self,
        shard: int,
        *,
        keep: Callable[[StageId], bool],
        keep_snapshot: Callable[[SnapshotId], bool] = lambda _: False,
    ) -> list[StageId]:
        """Erase what was left unfinished in a shard and every stage that ``keep`` refuses; see the base class."""
        folder = f"{self.root}/{shard_folder(shard)}"
        self.storage.sweep(folder)
        for snapshot_id in self.snapshots.list_shard(shard):
            if not self.snapshots.whole(snapshot_id) or not keep_snapshot(snapshot_id):
                self.snapshots.remove(snapshot_id)
        keys = self.storage.keys(folder)
        stages = self._stages(keys)
        doomed = sorted(stage_id for stage_id in stages if not keep(stage_id))
        for stage_id in doomed:
            self.remove(stage_id)
        for stage_id in self._begun(keys) - stages:
            self.storage.remove_all(self.place(stage_id).prefix)
        if len(doomed) < len(stages):
            self._made.clear()
            self._make_groups(shard)
        return doomed

    def missing_groups(self) -> list[str]:
        """Return the keys of groups around stages that aren't there: a reader of Zarr would find no stage."""
        keys = self.storage.keys(self.root)
        shards = {stage_id.shard for stage_id in self._stages(keys)}
        wanted = {f"{self.root}/{METADATA}"} if shards else set()
        wanted |= {f"{self.root}/{shard_folder(shard)}/{METADATA}" for shard in shards}
        return sorted(wanted.difference(keys))

    def strays(self) -> list[str]:
        """Return every key that is no part of a stage or of the groups around them, sorted."""
        keys = self.storage.keys(self.root)
        expected = {key for key in keys if self._is_group(key)}
        for stage_id in self._stages(keys):
            place = self.place(stage_id)
            names = chunk_names(place, stage_id)
            if names is None:  # a read reports it; until it is healed every chunk may be the stage's
                expected |= {key for key in keys if key.startswith(f"{place.prefix}/{_ARRAY}/c.")}
            expected |= {f"{place.prefix}/{name}" for name in (METADATA, f"{_ARRAY}/{METADATA}", *(names or []))}
        return [key for key in keys if key not in expected]

    def _stages(self, keys: list[str]) -> set[StageId]:
        """Return the stages whose metadata is among the keys."""
        there = set(keys)
        return {stage_id for stage_id in self._begun(keys) if self.place(stage_id).key in there}

    def _begun(self, keys: list[str]) -> set[StageId]:
        """Return the stages of which anything is among the keys."""
        found = set()
        for key in keys:
            shard_name, _, rest = key.removeprefix(f"{self.root}/").partition("/")
            shard = parse_shard(shard_name)
            stage_id = parse_stage(shard, rest.partition("/")[0]) if shard is not None and "/" in rest else None
            if stage_id is not None:
                found.add(stage_id)
        return found

    def _is_group(self, key: str) -> bool:
        folder = key.removeprefix(f"{self.root}/").removesuffix(METADATA).removesuffix("/")
        if not key.endswith(f"/{METADATA}") or (folder and parse_shard(folder) is None):
            return False
        try:
            return bool(json.loads(self.storage.read(key)) == EMPTY_GROUP)
        except (FileNotFoundError, ValueError):
            return False

    def _make_groups(self, shard: int) -> None:
        """Make the root's and a shard's group, unless they are there."""
        for key in (f"{self.root}/{METADATA}", f"{self.root}/{shard_folder(shard)}/{METADATA}"):
            if key not in self._made and not self._is_group(key):
                self.storage.put(key, _GROUP)
            self._made.add(key)
