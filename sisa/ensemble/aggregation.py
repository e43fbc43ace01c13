"""From the constituents' posteriors to the ensemble's scores (Bourtoule et al. 2021, section IV-E).

Every constituent has one voice, whatever the size of its shard: weights by size would depend on who was
deleted. Neither rule reads training data.

Shapes: S constituents, B rows, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt

Scores = npt.NDArray[np.float64]


def aggregate(posteriors_SBC: Sequence[Scores], rule: Literal["mean", "vote"]) -> Scores:
    """Return scores_BC, rows summing to one: the mean posterior, or each class's share of the votes.

    A tie in the vote goes to the class that was declared first.

    >>> aggregate([np.array([[0.9, 0.1]]), np.array([[0.4, 0.6]])], "mean").tolist()
    [[0.65, 0.35]]
    >>> aggregate([np.array([[0.9, 0.1]]), np.array([[0.4, 0.6]])], "vote").tolist()
    [[0.5, 0.5]]
    """
    total_BC = np.zeros_like(posteriors_SBC[0])
    for posterior_BC in posteriors_SBC:
        total_BC += posterior_BC if rule == "mean" else _votes(posterior_BC)
    return total_BC / len(posteriors_SBC)


def _votes(posterior_BC: Scores) -> Scores:
    votes_BC = np.zeros_like(posterior_BC)
    votes_BC[np.arange(len(posterior_BC)), posterior_BC.argmax(axis=1)] = 1.0
    return votes_BC
