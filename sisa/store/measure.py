"""Accuracy of the live ensemble on the holdout."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from sisa.ensemble.live import Answer
from sisa.errors import NoConstituentError, NoScoreError
from sisa.layout import is_held_out
from sisa.learners.columns import Columns, columns_from_table
from sisa.opening import OpenStore
from sisa.records.partition import read_partition
from sisa.routing.keys import shard_keys
from sisa.store.results import Metrics

SMALLEST = 1e-12
"""Probabilities below this count as this: a log loss stays finite."""


@dataclass(frozen=True)
class Measured:
    """What was measured, and of which version."""

    version: int
    """0 if not all rows were answered by one."""
    metrics: Metrics


def measure(store: OpenStore, answer: Callable[[Columns], Answer]) -> Measured | None:
    """Measure on the holdout; None without a holdout, or if nobody can answer (no clean constituent, no numbers).

    Args:
        store: The store.
        answer: Answers a batch of rows from the live version.

    Raises:
        DamagedError: Rows of the holdout or a stage are damaged.
    """
    correct, loss, count, voters = 0, 0.0, 0, 0
    versions: set[int] = set()
    for columns in _holdout(store):
        try:
            given = answer(columns)
        except (NoConstituentError, NoScoreError):
            return None
        rows_B = np.arange(columns.count)
        correct += int((given.scores_BC.argmax(axis=1) == columns.labels_N).sum())
        loss -= float(np.log(np.clip(given.scores_BC[rows_B, columns.labels_N], SMALLEST, None)).sum())
        count, voters = count + columns.count, given.voters
        versions.add(given.version)
    if not count:
        return None
    return Measured(versions.pop() if len(versions) == 1 else 0, Metrics(correct / count, loss / count, count, voters))


def _holdout(store: OpenStore) -> Iterable[Columns]:
    for partition in store.ledger.partitions.all():
        if is_held_out(partition.slice) and partition.records:
            keys = shard_keys(store.keys.routing, partition.shard)
            rows = read_partition(store.layout, store.recipe, keys, partition.shard, partition.slice)
            if rows.table.num_rows:
                yield columns_from_table(rows.table, store.recipe)
