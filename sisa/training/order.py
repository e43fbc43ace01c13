"""The order of records in an epoch, and the batches cut from it. Pure.

The order is a keyed permutation of the survivors: each record's place follows from its own keyed id, the recipe's seed,
the stage and the epoch, so that a record that is gone leaves no hole and moves no two others. Batches are cut from
that order alone.

Shape suffixes: N records, B of them at a time, W words.
"""

from __future__ import annotations

import numpy as np

from sisa.learners.columns import Array
from sisa.routing.siphash import BLOCK, siphash_words


def epoch_order(order_key: bytes, uids_N: Array, *, seed: int, stage: int, epoch: int) -> Array:
    """Return the records' positions in the order in which an epoch takes them.

    Args:
        order_key: 16 bytes, derived for the shard.
        uids_N: Keyed ids, in canonical order; records with equal hashes keep that order.
        seed: The recipe's.
        stage: 1..R.
        epoch: 0.. within the stage.
    """
    hashes_N = np.empty(len(uids_N), np.uint64)
    for start in range(0, len(uids_N), BLOCK):  # words of all records at a time would take 32 bytes of each
        part = uids_N[start : start + BLOCK]
        words_BW = np.empty((len(part), 4), np.uint64)
        words_BW[:, 0] = part
        words_BW[:, 1:] = np.array([seed, stage, epoch], np.uint64)
        hashes_N[start : start + BLOCK] = siphash_words(order_key, words_BW)
    return np.argsort(hashes_N, kind="stable")


def batch_sizes(*, records: int, batch_size: int) -> list[int]:
    """Return the sizes of the batches of an epoch; a last batch of one record joins the one before it.

    >>> batch_sizes(records=10, batch_size=4)
    [4, 4, 2]
    >>> batch_sizes(records=9, batch_size=4)
    [4, 5]
    >>> batch_sizes(records=1, batch_size=4)
    [1]
    """
    sizes = [batch_size] * (records // batch_size)
    rest = records % batch_size
    if rest == 1 and sizes and batch_size > 1:
        sizes[-1] += 1
    elif rest:
        sizes.append(rest)
    return sizes


def batch_count(*, records: int, batch_size: int) -> int:
    """Return how many batches an epoch has; counted, since a list would be as long as the ledger wants it.

    >>> [batch_count(records=records, batch_size=4) for records in (0, 1, 4, 5, 6, 10**18)]
    [0, 1, 1, 1, 2, 250000000000000000]
    """
    full, rest = divmod(max(records, 0), batch_size)
    joins = rest == 1 and full > 0 and batch_size > 1  # a last batch of one record joins the one before it
    return full + (rest > 0 and not joins)
