"""Holding a source against the store: what is new, what changed, what is missing.

Only counts come out. Records are matched by 128-bit hashes under keys that live for one comparison; contents
by the keyed digests that the partitions store (their pages' checksums are verified; that the digests
fit the rows is for whoever trains on them). Memory grows by 39 bytes a record.

A source is compared with the whole store: a row that a generation brought is the same wherever a source has it.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from sisa.errors import SourceError
from sisa.layout import HOLDOUT_SLICE, Layout, all_slices
from sisa.records.arrivals import Arrivals, Intake, Progress, arrivals
from sisa.records.digest import content_digests
from sisa.records.names import RECORD
from sisa.records.partition import present_contents
from sisa.routing.keys import shard_keys
from sisa.routing.siphash import siphash_text

Superseded = Callable[[pa.StringArray, NDArray[np.uint8]], NDArray[np.bool_]]
"""Marks, of N record ids and what their rows say, those that a correction superseded."""


@dataclass(frozen=True)
class Comparison:
    """How a source differs from a store; counts of records."""

    new: int
    """In the source only; deleted people's aren't counted."""
    changed: int
    """In both, with another content, owner or place."""
    missing: int
    """In the store only; rows of generations aren't counted, which came from sources of their own."""
    same: int
    """In both, the same."""
    superseded: int = 0
    """In both, but the source says what a correction superseded: the store has the last word."""
    whole: dict[int, int] = field(default_factory=dict)
    """Generations of which the source has every row that is left of it, as it is in the store; and how many those are."""

    @property
    def clean(self) -> bool:
        """Whether the source brings nothing that the store hasn't got."""
        return not self.new and not self.changed


def compare(
    intake: Intake,
    layout: Layout,
    routing_key: bytes,
    *,
    generations: int = 0,
    superseded: Superseded | None = None,
    on_progress: Progress | None = None,
) -> Comparison:
    """Compare the sources with the partitions on disk.

    Args:
        intake: What to read; its recipe and router are the store's.
        layout: The store.
        routing_key: Its routing key.
        generations: How many it has.
        superseded: Marks the rows that say what a correction superseded.
        on_progress: Told how many more records were compared.

    Raises:
        SourceError: A record of the source can't be used, or occurs twice.
        DamagedError: A partition is unreadable.
    """
    held = _Held(layout, shards=intake.router.shards, slices=intake.router.slices, generations=generations)
    seen_M = np.zeros(len(held.ids_M), np.bool_)
    same_M = np.zeros(len(held.ids_M), np.bool_)
    keys = [shard_keys(routing_key, shard) for shard in range(intake.router.shards)]
    new = changed = same = old = 0
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
        same_M[position_N[equal_N]] = True
        new += int((~found_N).sum())
        same += int(equal_N.sum())
        other_N = found_N & ~equal_N
        if superseded is not None and other_N.any():
            old_N = other_N & superseded(arrived.batch.column(RECORD), contents_N16)
            old += int(old_N.sum())
            other_N &= ~old_N
        changed += int(other_N.sum())
        if on_progress is not None:
            on_progress(arrived.read)
    missing = int((~seen_M & (held.generation_M == 0)).sum())
    whole = {}
    for generation in range(1, generations + 1):
        of_M = held.generation_M == generation
        if of_M.any() and same_M[of_M].all():
            whole[generation] = int(of_M.sum())
    return Comparison(new=new, changed=changed, missing=missing, same=same, superseded=old, whole=whole)


class _Held:
    """The M records of the store: hashed ids in ascending order, content digests, places and generations."""

    def __init__(self, layout: Layout, *, shards: int, slices: int, generations: int) -> None:
        self._keys = (secrets.token_bytes(16), secrets.token_bytes(16))
        self._slices = slices
        ids = [np.empty(0, "S16")]
        contents = [np.empty((0, 16), np.uint8)]
        places = [np.empty(0, np.int32)]
        born = [np.empty(0, np.int16)]
        for shard in range(shards):
            for slice_ in all_slices(slices=slices + generations, generations=generations):
                records, contents_N16 = present_contents(layout, shard, slice_)
                ids.append(self._hashed(records))
                contents.append(contents_N16)
                places.append(np.full(len(records), self._place(shard, slice_), np.int32))
                generation = max(slice_ - slices, -slice_, 0)
                born.append(np.full(len(records), generation, np.int16))
        ids_M = np.concatenate(ids)
        order = np.argsort(ids_M)
        self.ids_M = ids_M[order]
        self._contents_M16 = np.concatenate(contents)[order]
        self._place_M = np.concatenate(places)[order]
        self.generation_M = np.concatenate(born)[order]

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
        held_N, place_N = self._place_M[position_N], self._place(arrived.shard_N, arrived.slice_N)
        in_generation_N = (self.generation_M[position_N] > 0) & (arrived.slice_N != HOLDOUT_SLICE)
        place_N = np.where(in_generation_N, self._place(arrived.shard_N, self._slices + 1), place_N)
        equal_N &= held_N == place_N
        return found_N, equal_N, position_N

    def _hashed(self, records: pa.StringArray) -> NDArray[np.bytes_]:
        # Fixed-width byte strings: numpy sorts and compares them whole, and both sides have all 16 bytes.
        halves = np.stack([siphash_text(key, records) for key in self._keys], axis=1)
        return halves.view("S16").reshape(-1)

    def _place(self, shard: Any, slice_: Any) -> Any:
        """Number a place by what the key says of it: in generations, that is only whether a row is held out."""
        return shard * (self._slices + 2) + np.clip(slice_, HOLDOUT_SLICE, self._slices + 1)
