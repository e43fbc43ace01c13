"""Accuracy of the live ensemble on the holdout."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from sisa.ensemble.live import LiveEnsemble
from sisa.errors import NoConstituentError
from sisa.layout import is_held_out
from sisa.learners.columns import Columns, columns_from_table
from sisa.opening import OpenStore
from sisa.records.partition import read_partition
from sisa.routing.keys import shard_keys
from sisa.store.results import Metrics

SMALLEST = 1e-12
"""Probabilities below this count as this: a log loss stays finite."""


def measure(store: OpenStore, ensemble: LiveEnsemble) -> Metrics | None:
    """Measure on the holdout; None without a holdout, or if no clean constituent is left.

    Raises:
        DamagedError: Rows of the holdout or a stage are damaged.
    """
    correct, loss, count, voters = 0, 0.0, 0, 0
    for columns in _holdout(store):
        try:
            answer = ensemble.answer(columns)
        except NoConstituentError:
            return None
        rows_B = np.arange(columns.count)
        correct += int((answer.scores_BC.argmax(axis=1) == columns.labels_N).sum())
        loss -= float(np.log(np.clip(answer.scores_BC[rows_B, columns.labels_N], SMALLEST, None)).sum())
        count, voters = count + columns.count, answer.voters
    return Metrics(correct / count, loss / count, count, voters) if count else None


def _holdout(store: OpenStore) -> Iterable[Columns]:
    for partition in store.ledger.partitions.all():
        if is_held_out(partition.slice) and partition.records:
            keys = shard_keys(store.keys.routing, partition.shard)
            rows = read_partition(store.layout, store.recipe, keys, partition.shard, partition.slice)
            if rows.table.num_rows:
                yield columns_from_table(rows.table, store.recipe)
