"""The rows of one shard for its stages: read and checked once each, held in memory or left on disk.

Which of the two decides no bit, so it is decided here, from sizes and from what the machine has.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from sisa.errors import StaleError
from sisa.layout import Layout
from sisa.learners.columns import Columns, columns_from_table, feature_specs
from sisa.learners.feed import Rows
from sisa.learners.preprocess import FIRST_CODE, Preprocessor
from sisa.recipe import Recipe
from sisa.records.batches import count_values, read_batches
from sisa.records.partition import read_partition
from sisa.routing.keys import ShardKeys
from sisa.state import StageState
from sisa.training.waiting import TooNarrowError, WaitingRows

if TYPE_CHECKING:
    from sisa.training.chain import ChainTask

PROCESS, GROUPS = Path("/proc"), Path("/sys/fs/cgroup")


def read_slice(layout: Layout, recipe: Recipe, keys: ShardKeys, slice_: int) -> tuple[Columns, str]:
    """Return the rows of a slice in canonical order (by keyed id digest), and their membership digest.

    Raises:
        DamagedError: The partition's bytes are not what they were when it was written.
    """
    rows = read_partition(layout, recipe, keys, keys.shard, slice_)
    slices_N = np.full(rows.table.num_rows, slice_, np.int32)
    return columns_from_table(rows.table, recipe, keys=keys, slices_N=slices_N), rows.membership


class ShardRows:
    """What a chain has read of its shard."""

    def __init__(self, task: ChainTask, layout: Layout) -> None:
        self._task = task
        self._layout = layout
        self._parts: list[Columns] = []
        self._waiting: WaitingRows | None = None
        self._slices = 0
        self._wide: frozenset[int] = frozenset()

    def close(self) -> None:
        """Let rows on disk go."""
        if self._waiting is not None:
            self._waiting.close()
            self._waiting = None

    def through(self, stage: int, parent: StageState) -> Rows:
        """Return the rows of slices 1..``stage``, which are made sure to be the expected ones.

        Raises:
            StaleError: The rows are not those that the task was planned with.
            DamagedError: A partition is damaged.
            StoreError: There is no room on disk.
        """
        if self._waiting is None and not self._streams(stage, parent):
            return self._resident(stage)
        self._parts = []
        while True:
            try:
                return self._streamed(stage)
            except TooNarrowError:  # once or twice at most: from now on all vectors are as wide as they can be
                self.close()
                self._wide = frozenset(range(len(self._task.recipe.data.features)))

    def _resident(self, stage: int) -> Columns:
        for slice_ in range(len(self._parts) + 1, stage + 1):
            columns, membership = read_slice(self._layout, self._task.recipe, self._task.keys, slice_)
            self._expect(slice_, membership)
            self._parts.append(columns)
        return Columns.concatenate(self._parts[:stage])

    def _streamed(self, stage: int) -> Rows:
        task = self._task
        if self._waiting is None:
            self._waiting, self._slices = WaitingRows(self._layout, task.recipe, task.shard, wide=self._wide), 0
        waiting = self._waiting

        def take(table: pa.Table) -> None:
            waiting.append(columns_from_table(table, task.recipe, keys=task.keys))

        for slice_ in range(self._slices + 1, stage + 1):
            read = read_batches(self._layout, task.recipe, task.keys, slice_, take)
            self._expect(slice_, read.membership)
            waiting.end_slice(read.order_N)
            self._slices = slice_
        return waiting.rows()

    def _expect(self, slice_: int, membership: str) -> None:
        if membership != self._task.memberships[slice_ - 1]:
            raise StaleError(
                f"the rows of slice {slice_} of shard {self._task.shard} are not those that the ledger expects",
                hint="Restore the partition from a copy: rows can't be retrained.",
            )

    def _streams(self, stage: int, parent: StageState) -> bool:
        task = self._task
        if task.rows_in_memory != "auto":
            return task.rows_in_memory == "never"
        records = sum(task.records[:stage])
        half = (task.memory_bytes or available_bytes()) // 2
        if 4 * records * least_width(task.recipe) > half:
            return True
        return 4 * records * self._width(stage, parent) > half

    def _width(self, stage: int, parent: StageState) -> int:
        """Numbers of a preprocessed row; where a vocabulary isn't known, its values are counted."""
        recipe = self._task.recipe
        if not parent.empty:
            return sum(Preprocessor.from_state(recipe, parent).widths)
        open_ = [name for name, spec in feature_specs(recipe) if spec.type == "categorical" and spec.values is None]
        first = next((slice_ for slice_ in range(1, stage + 1) if self._task.records[slice_ - 1]), None)
        if not open_ or first is None:
            return least_width(recipe)
        counts = count_values(self._layout, recipe, self._task.shard, first)
        return least_width(recipe) + sum(counts[name] for name in open_)


def least_width(recipe: Recipe) -> int:
    """Return how many numbers a preprocessed row has at least: values that aren't declared are not counted."""
    return sum(
        FIRST_CODE + len(spec.values or ()) if spec.type == "categorical" else spec.size or 1
        for _, spec in feature_specs(recipe)
    )


def available_bytes(process: Path = PROCESS, groups: Path = GROUPS) -> int:
    """Return how much memory this machine, or the container that we are in, has left; a guess where nobody says."""
    fields = dict(line.split(":", 1) for line in _text(process / "meminfo").splitlines() if ":" in line)
    given = [int(fields["MemAvailable"].split()[0]) * 1024] if "MemAvailable" in fields else []
    limit, used = _text(groups / "memory.max").strip(), _text(groups / "memory.current").strip()
    if limit.isdigit() and used.isdigit():
        given.append(max(0, int(limit) - int(used)))
    return min(given, default=4 * 2**30)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""
