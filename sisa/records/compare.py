"""Holding a source against the store: what is new, what changed, what is missing.

Only counts come out. Records are matched by 128-bit hashes under keys that live for one comparison; contents
by the keyed digests that the partitions store (their pages' checksums are verified; that the digests
fit the rows is for whoever trains on them). Memory grows by 37 bytes a record.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from sisa.errors import SourceError
from sisa.layout import HOLDOUT_SLICE, Layout
from sisa.records.arrivals import Arrivals, Intake, Progress, arrivals
from sisa.records.digest import content_digests
from sisa.records.names import RECORD
from sisa.records.partition import present_contents
from sisa.routing.keys import shard_keys
from sisa.routing.siphash import siphash_text


@dataclass(frozen=True)
class Comparison:
    """How a source differs from a store; counts of records."""

    new: int
    """In the source only; deleted people's aren't counted."""
    changed: int
    """In both, with another content, owner or place."""
    missing: int
    """In the store only."""
    same: int
    """In both, the same."""

    @property
    def clean(self) -> bool:
        """Whether the source brings nothing that the store hasn't got."""
        return not self.new and not self.changed


def compare(intake: Intake, layout: Layout, routing_key: bytes, *, on_progress: Progress | None = None) -> Comparison:
    """Compare the sources with the partitions on disk.

    Args:
        intake: What to read; its recipe and router are the store's.
        layout: The store.
        routing_key: Its routing key.
        on_progress: Told how many more records were compared.

    Raises:
        SourceError: A record of the source can't be used, or occurs twice.
        DamagedError: A partition is unreadable.
    """
    held = _Held(layout, shards=intake.router.shards, slices=intake.router.slices)
    seen_M = np.zeros(len(held.ids_M), np.bool_)
    keys = [shard_keys(routing_key, shard) for shard in range(intake.router.shards)]
    new = changed = same = 0
    for arrived in arrivals(intake):
        contents_N16 = np.empty((arrived.batch.num_rows, 16), np.uint8)
        for shard in np.unique(arrived.shard_N):
            rows = np.flatnonzero(arrived.shard_N == shard)
            contents_N16[rows] = content_digests(keys[shard], arrived.batch.take(pa.array(rows)), intake.recipe)
        found_N, equal_N, position_N = held.look_up(arrived, contents_N16)
        positions = position_N[found_N]
        if seen_M[positions].any() or len(np.unique(positions)) < len(positions):
            raise SourceError(
                f"{intake.recipe.data.record_id!r} must not repeat, but a record id occurs more than once",
                hint="Give each row its own id; name the person in data.subject_id.",
            )
        seen_M[positions] = True
        new += int((~found_N).sum())
        same += int(equal_N.sum())
        changed += int(found_N.sum() - equal_N.sum())
        if on_progress is not None:
            on_progress(arrived.read)
    return Comparison(new=new, changed=changed, missing=int((~seen_M).sum()), same=same)


class _Held:
    """The M records of the store: hashed ids in ascending order, content digests and places."""

    def __init__(self, layout: Layout, *, shards: int, slices: int) -> None:
        self._keys = (secrets.token_bytes(16), secrets.token_bytes(16))
        self._slices = slices
        ids = [np.empty(0, "S16")]
        contents = [np.empty((0, 16), np.uint8)]
        places = [np.empty(0, np.int32)]
        for shard in range(shards):
            for slice_ in range(HOLDOUT_SLICE, slices + 1):
                records, contents_N16 = present_contents(layout, shard, slice_)
                ids.append(self._hashed(records))
                contents.append(contents_N16)
                places.append(np.full(len(records), self._place(shard, slice_), np.int32))
        ids_M = np.concatenate(ids)
        order = np.argsort(ids_M)
        self.ids_M = ids_M[order]
        self._contents_M16 = np.concatenate(contents)[order]
        self._place_M = np.concatenate(places)[order]

    def look_up(
        self, arrived: Arrivals, contents_N16: NDArray[np.uint8]
    ) -> tuple[NDArray[np.bool_], NDArray[np.bool_], NDArray[np.int64]]:
        """Tell which of N records are held, which are the same there, and at which position."""
        ids_N = self._hashed(arrived.batch.column(RECORD))
        position_N = np.searchsorted(self.ids_M, ids_N)
        if not len(self.ids_M):
            nowhere = np.zeros(len(ids_N), np.bool_)
            return nowhere, nowhere, position_N
        position_N = np.minimum(position_N, len(self.ids_M) - 1)
        found_N = self.ids_M[position_N] == ids_N
        equal_N = found_N & (self._contents_M16[position_N] == contents_N16).all(axis=1)
        equal_N &= self._place_M[position_N] == self._place(arrived.shard_N, arrived.slice_N)
        return found_N, equal_N, position_N

    def _hashed(self, records: pa.StringArray) -> NDArray[np.bytes_]:
        # Fixed-width byte strings: numpy sorts and compares them whole, and both sides have all 16 bytes.
        halves = np.stack([siphash_text(key, records) for key in self._keys], axis=1)
        return halves.view("S16").reshape(-1)

    def _place(self, shard: Any, slice_: Any) -> Any:
        return shard * (self._slices + 1) + slice_
