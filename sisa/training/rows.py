"""Reading one slice of a shard in the order that training starts from."""

from __future__ import annotations

import numpy as np

from sisa.layout import Layout
from sisa.learners.columns import Columns, columns_from_table
from sisa.recipe import Recipe
from sisa.records.partition import read_partition
from sisa.routing.keys import ShardKeys


def read_slice(layout: Layout, recipe: Recipe, keys: ShardKeys, slice_: int) -> tuple[Columns, str]:
    """Return the rows of a slice in canonical order (by keyed id digest), and their membership digest.

    Raises:
        DamagedError: The partition's bytes are not what they were when it was written.
    """
    rows = read_partition(layout, recipe, keys, keys.shard, slice_)
    slices_N = np.full(rows.table.num_rows, slice_, np.int32)
    return columns_from_table(rows.table, recipe, keys=keys, slices_N=slices_N), rows.membership
