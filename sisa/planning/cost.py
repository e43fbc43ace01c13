"""What trainings and deletions cost, in record-epochs (one record passed through the model once).

The formulas are those of a SISA ensemble with uniform routing: Bourtoule et al. 2021, sections IV and V,
with the sums worked out for cumulative slices.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

SECONDS_PER_STEP = 2e-4
"""Fixed cost of one optimiser step of a small model on one core: order of magnitude, for choosing an executor."""
FLOPS_PER_SECOND = 1e10
"""What one core sustains: order of magnitude, for choosing an executor."""


def chain_record_epochs(slice_records: Sequence[int], budget: Sequence[int], *, first_stage: int = 1) -> int:
    """Return the record-epochs of stages ``first_stage``..R of one shard.

    Args:
        slice_records: Number of records in slices 1..R.
        budget: Epochs of stages 1..R.
        first_stage: Where the (re)training starts.

    >>> chain_record_epochs([10, 10], [2, 2])
    60
    >>> chain_record_epochs([10, 10], [2, 2], first_stage=2)
    40
    """
    stages = stage_record_epochs(slice_records, budget)
    return sum(cost for stage, cost in stages.items() if stage >= first_stage)


def stage_record_epochs(slice_records: Sequence[int], budget: Sequence[int]) -> dict[int, int]:
    """Return the record-epochs of each stage of one shard.

    >>> stage_record_epochs([10, 10], [2, 2])
    {1: 20, 2: 40}
    """
    costs, seen = {}, 0
    for stage, (records, epochs) in enumerate(zip(slice_records, budget, strict=True), start=1):
        seen += records
        costs[stage] = epochs * seen
    return costs


def expected_fraction(*, shards: int, slices: int, deletions: int) -> float:
    """Return the expected share of a full training that a batch of uniform deletions retrains.

    Stage i of a shard is retrained if any deletion falls into its first i slices:
    2/(R(R+1)) * sum over i of i * (1 - (1 - i/(SR))^K).

    >>> round(expected_fraction(shards=20, slices=50, deletions=8), 3)
    0.236
    >>> expected_fraction(shards=4, slices=1, deletions=1)
    0.25
    """
    weights = sum(stage * (1.0 - (1.0 - stage / (shards * slices)) ** deletions) for stage in range(1, slices + 1))
    return 2.0 * weights / (slices * (slices + 1))


def predicted_seconds(*, record_epochs: int, batch_size: int, products: int) -> float:
    """Guess how long a training takes on one core; good enough to choose where it runs."""
    steps = math.ceil(record_epochs / max(batch_size, 1))
    return steps * SECONDS_PER_STEP + 6.0 * products * record_epochs / FLOPS_PER_SECOND
