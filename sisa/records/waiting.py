"""Corrected rows that wait to be merged into their slice: nobody else has them, so lost ones are never taken for none."""

from __future__ import annotations

from sisa.errors import DamagedError
from sisa.layout import Layout
from sisa.recipe import Recipe
from sisa.records.partition import PartitionRows, read_partition
from sisa.routing.keys import ShardKeys

LOST = (
    "Restore the folder corrections from a copy, then run `sisa repair`: until then what the rows said before is out of "
    "service, and what they should say is nowhere else."
)


def read_waiting(
    layout: Layout, recipe: Recipe, keys: ShardKeys, *, request: str, slice_: int, records: int, membership: str
) -> PartitionRows:
    """Read the rows that wait for one slice of a shard because of one correction.

    Args:
        layout: The store.
        recipe: Its resolved recipe.
        keys: Of the shard.
        request: The correction.
        slice_: The slice.
        records: How many rows were accepted.
        membership: Digest of these.

    Raises:
        DamagedError: They are lost or damaged.
    """
    place = f"corrections/{request}: the rows that wait for slice {slice_} of shard {keys.shard}"
    try:
        rows = read_partition(layout.correction(request), recipe, keys, keys.shard, slice_)
    except DamagedError as error:
        raise DamagedError(f"{place} are damaged: {error.message}", hint=LOST) from error
    if rows.membership != membership:
        raise DamagedError(
            f"{place} are lost: {rows.table.num_rows} are there, not the {records} that were accepted", hint=LOST
        )
    return rows
