"""Rows of a new generation into partitions of their own; nobody expects them before the ledger does.

A generation is slice R+g of each shard, and -g for its held-out rows: what is there already isn't touched. The files
are written durably to the places that they keep. Until the ledger has the generation they mean nothing, and what a
killed attempt left of them is swept by whoever finds the mark below ``incoming``, which is made first and removed last.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import pyarrow as pa

from sisa.files import make_folder, require_nameless
from sisa.layout import HOLDOUT_SLICE, Layout, held_out_of
from sisa.recipe import Recipe
from sisa.records.arrivals import Excluded, Intake, Progress, arrivals
from sisa.records.names import RECORD, SUBJECT
from sisa.records.partition import partition_key, read_partition, rewrite_partition, write_rows
from sisa.records.schema import check_fits
from sisa.records.source import open_source
from sisa.records.write import BUDGET_BYTES, PartitionCount, Spool, Told, gather
from sisa.routing.keys import shard_keys
from sisa.routing.router import Router

HELD_OUT, TRAINED = 0, 1
"""Places of a generation within one shard, while its rows are sorted."""
PLACE_PARTS = 3
"""Names in the prefix of a slice, and in that of all held-out rows of a generation."""


@dataclass(frozen=True)
class Place:
    """Which slices a generation fills."""

    generation: int
    slices: int
    """The recipe's R."""

    def slice_of(self, kind: int) -> int:
        """Return the slice number of its trained or of its held-out rows."""
        return self.slices + self.generation if kind == TRAINED else held_out_of(self.generation)


def grown_recipe(recipe: Recipe, source: str) -> Recipe:
    """Return a store's recipe with a generation's table as its only source.

    Raises:
        SourceError: The table can't be opened.
        RecipeError: It lacks columns of the recipe, or has them in another type.
    """
    holdout = recipe.data.holdout.model_copy(update={"source": None})
    grown = recipe.model_copy(update={"data": recipe.data.model_copy(update={"source": source, "holdout": holdout})})
    check_fits(grown, open_source(source, name="--source"))
    return grown


def write_generation(
    recipe: Recipe,
    layout: Layout,
    place: Place,
    *,
    routing_key: bytes,
    excluded: Excluded,
    on_progress: Progress | None = None,
    check: Callable[[], None] = lambda: None,
    budget_bytes: int = BUDGET_BYTES,
) -> list[PartitionCount]:
    """Write the rows of a generation to where they will lie; hold the lock of what is incoming, and set its mark.

    Scan the source and compare it with the store before: this trusts it.

    Args:
        recipe: What :func:`grown_recipe` gave.
        layout: The store.
        place: Where the generation goes.
        routing_key: The store's.
        excluded: Marks the rows of deleted people, which are never written.
        on_progress: Told how many more rows are done.
        check: Called before each file gets its name; raises if the lock is lost.
        budget_bytes: Memory for rows that wait to be sorted.

    Returns:
        One entry for each new slice of each shard, rows or not.

    Raises:
        SourceError: The source changed since it was scanned.
        StoreError: Rows can't wait on this host.
    """
    router = Router(
        routing_key,
        shards=recipe.sisa.shards,
        slices=recipe.sisa.slices,
        holdout_fraction=recipe.data.holdout.fraction,
    )
    intake = Intake(recipe, open_source(recipe.data.source, name="--source"), router, None, excluded)
    told = Told(on_progress)
    make_folder(layout.incoming)
    if not layout.shared:
        require_nameless(layout.incoming)
    with contextlib.closing(Spool(layout.incoming, slices=TRAINED, budget_bytes=budget_bytes)) as spool:
        for arrived in arrivals(intake):
            spool.add(replace(arrived, slice_N=(arrived.slice_N != HOLDOUT_SLICE).astype(arrived.slice_N.dtype)))
            told.read(arrived.read)
        spool.flush()
        counts = []
        for keys in (shard_keys(routing_key, shard) for shard in range(router.shards)):
            for kind in (HELD_OUT, TRAINED):
                slice_ = place.slice_of(kind)
                write_to = _writer(layout, keys.shard, slice_, check)
                count = gather(spool, recipe, keys, slice_=kind, write_to=write_to, told=told)
                counts.append(replace(count, slice=slice_))
    told.end()
    return counts


def _writer(layout: Layout, shard: int, slice_: int, check: Callable[[], None]) -> Callable[[Iterator[pa.Table]], None]:
    def write_to(pieces: Iterator[pa.Table]) -> None:
        with layout.storage.writing(partition_key(layout, shard, slice_)) as stream:
            write_rows(stream, pieces)
            check()  # else these may be a place of somebody else's rows by now

    return write_to


def drop_excluded(
    recipe: Recipe,
    layout: Layout,
    counts: list[PartitionCount],
    *,
    routing_key: bytes,
    excluded: Excluded,
    check: Callable[[], None] = lambda: None,
) -> list[PartitionCount]:
    """Rewrite what was written without people who were deleted since; return what is left.

    Raises:
        DamagedError: A file isn't what was written.
    """
    left = []
    for count in counts:
        keys = shard_keys(routing_key, count.shard)
        rows = read_partition(layout, recipe, keys, count.shard, count.slice)
        keep_N = ~excluded(rows.table[RECORD], rows.table[SUBJECT])
        if not keep_N.all():
            check()
            rewrite_partition(layout, count.shard, count.slice, keep_N, rows)
            rows = read_partition(layout, recipe, keys, count.shard, count.slice)
        left.append(PartitionCount(count.shard, count.slice, len(rows.table), rows.membership))
    return left


def sweep_generation(layout: Layout, place: Place, *, shards: int, there: Iterable[str]) -> None:
    """Remove what a killed attempt left of a generation; hold the lock of what is incoming.

    Void for a generation that the ledger has: these would be its rows.

    Args:
        layout: The store.
        place: Where the generation would go.
        shards: Number of shards.
        there: All that lies among the records, in any form.
    """
    held_out = layout.partition_key(0, place.slice_of(HELD_OUT)).rpartition("/")[0]
    prefixes = [held_out, *(layout.partition_key(shard, place.slice_of(TRAINED)) for shard in range(shards))]
    found = {"/".join(key.split("/")[:PLACE_PARTS]) for key in there}
    for prefix in prefixes:
        if prefix in found:
            layout.storage.remove_all(prefix)
        layout.storage.sweep_beside(prefix)  # half-removed by somebody who was killed
