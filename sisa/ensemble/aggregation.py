"""From the constituents' posteriors to the ensemble's scores (Bourtoule et al. 2021, section IV-E).

A rule is an :class:`Aggregator`. None reads training data, and none weighs constituents by the sizes of their shards:
such weights would depend on who was deleted. Two rules have parameters, which are fitted on a table that holds nobody
who can ask for deletion (:mod:`sisa.ensemble.fitting`) and belong to exactly the constituents that they were fitted
for: with any other, :func:`aggregator` gives the mean.

A tie goes to the class that was declared first.

Shapes: S constituents, B rows, C classes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

Scores = npt.NDArray[np.float64]

TRIMMED_SHARE = 0.1
"""Share of the constituents that a trimmed mean leaves out at each end."""
SMALLEST = 1e-300
"""What a posterior of 0 counts as where its logarithm is taken."""
FEW_NUMBERS = 64
"""So many sums, of rows times classes, are made faster in one call than one constituent after another."""


class Aggregator(Protocol):
    """A rule by which posteriors become scores."""

    @property
    def name(self) -> str:
        """What the recipe calls it."""
        ...

    def scores(self, posteriors_SBC: Scores) -> Scores:
        """Return scores_BC, rows summing to one."""
        ...

    def with_margins(self, posteriors_SBC: Scores) -> tuple[Scores, Scores]:
        """Return the scores and, for each row, how far every number before a softmax may move before the label can: (B,).

        Posteriors that were computed in another order of additions differ a little. Where they differ by less than
        the margin, the class with the highest score is the same. (If two numbers before a softmax move by at most d,
        the difference of two probabilities moves by at most d.)
        """
        ...


@dataclass(frozen=True)
class Mean:
    """The mean posterior.

    >>> Mean().scores(np.array([[[0.9, 0.1]], [[0.4, 0.6]]])).tolist()
    [[0.65, 0.35]]
    """

    name: str = "mean"

    def scores(self, posteriors_SBC: Scores) -> Scores:
        """Return the mean over constituents."""
        return _mean(posteriors_SBC)

    def with_margins(self, posteriors_SBC: Scores) -> tuple[Scores, Scores]:
        """Return scores, and how far the best class is ahead."""
        scores_BC = self.scores(posteriors_SBC)
        return scores_BC, _lead(scores_BC)


@dataclass(frozen=True)
class Vote:
    """Each class's share of the votes; a constituent votes for its best class.

    >>> Vote().scores(np.array([[[0.9, 0.1]], [[0.4, 0.6]]])).tolist()
    [[0.5, 0.5]]
    """

    name: str = "vote"

    def scores(self, posteriors_SBC: Scores) -> Scores:
        """Return shares of votes."""
        votes_SBC = np.zeros_like(posteriors_SBC)
        np.put_along_axis(votes_SBC, posteriors_SBC.argmax(axis=2)[:, :, None], 1.0, axis=2)
        return _mean(votes_SBC)

    def with_margins(self, posteriors_SBC: Scores) -> tuple[Scores, Scores]:
        """Return scores, and how far the least decided constituent's best class is ahead: no vote changes before."""
        return self.scores(posteriors_SBC), _lead(posteriors_SBC).min(axis=0)


@dataclass(frozen=True)
class TrimmedMean:
    """For each class the mean without its highest and lowest posteriors, renormalised.

    With three constituents or more, at least one is left out at each end.

    >>> TrimmedMean().scores(np.array([[[0.9, 0.1]], [[0.4, 0.6]], [[0.3, 0.7]]])).tolist()
    [[0.4, 0.6]]
    """

    name: str = "trimmed_mean"

    def scores(self, posteriors_SBC: Scores) -> Scores:
        """Return what is left, renormalised."""
        return _renormalised(self._trimmed(posteriors_SBC), posteriors_SBC)

    def with_margins(self, posteriors_SBC: Scores) -> tuple[Scores, Scores]:
        """Return scores, and how far the best class is ahead before rows are renormalised."""
        trimmed_BC = self._trimmed(posteriors_SBC)
        return _renormalised(trimmed_BC, posteriors_SBC), _lead(trimmed_BC)

    def _trimmed(self, posteriors_SBC: Scores) -> Scores:
        count = len(posteriors_SBC)
        cut = max(1, math.floor(TRIMMED_SHARE * count)) if count >= 3 else 0
        return _mean(np.sort(posteriors_SBC, axis=0)[cut : count - cut])


@dataclass(frozen=True)
class Median:
    """For each class the median posterior, renormalised.

    >>> Median().scores(np.array([[[0.9, 0.1]], [[0.4, 0.6]], [[0.3, 0.7]]])).tolist()
    [[0.4, 0.6]]
    """

    name: str = "median"

    def scores(self, posteriors_SBC: Scores) -> Scores:
        """Return medians, renormalised."""
        return _renormalised(np.median(posteriors_SBC, axis=0), posteriors_SBC)

    def with_margins(self, posteriors_SBC: Scores) -> tuple[Scores, Scores]:
        """Return scores, and how far the best class is ahead before rows are renormalised."""
        median_BC = np.median(posteriors_SBC, axis=0)
        return _renormalised(median_BC, posteriors_SBC), _lead(median_BC)


@dataclass(frozen=True)
class Calibrated:
    """The mean of posteriors that each have a temperature of their own (Guo et al. 2017, section 4.2)."""

    temperatures: tuple[float, ...]
    name: str = "calibrated"

    def scores(self, posteriors_SBC: Scores) -> Scores:
        """Return the mean of the calibrated posteriors."""
        return _mean(calibrated(posteriors_SBC, np.array(self.temperatures)))

    def with_margins(self, posteriors_SBC: Scores) -> tuple[Scores, Scores]:
        """Return scores, and how far the best class is ahead; a temperature below one makes small differences larger."""
        scores_BC = self.scores(posteriors_SBC)
        return scores_BC, _lead(scores_BC) * min(1.0, *self.temperatures)


@dataclass(frozen=True)
class Weighted:
    """A mean with weights, none negative, that sum to one."""

    weights: tuple[float, ...]
    name: str = "weighted"

    def scores(self, posteriors_SBC: Scores) -> Scores:
        """Return the weighted mean."""
        return np.tensordot(np.array(self.weights), posteriors_SBC, axes=1)

    def with_margins(self, posteriors_SBC: Scores) -> tuple[Scores, Scores]:
        """Return scores, and how far the best class is ahead."""
        scores_BC = self.scores(posteriors_SBC)
        return scores_BC, _lead(scores_BC)


PLAIN: dict[str, Callable[[], Aggregator]] = {
    "mean": Mean,
    "vote": Vote,
    "trimmed_mean": TrimmedMean,
    "median": Median,
}
"""Rules without parameters."""
WITH_PARAMETERS: dict[str, Callable[[tuple[float, ...]], Aggregator]] = {
    "calibrated": Calibrated,
    "weighted": Weighted,
}
"""Rules with one parameter for each constituent."""


@dataclass(frozen=True)
class Fitted:
    """Parameters of a rule, and the constituents that they belong to."""

    name: str
    parameters: tuple[float, ...]
    """One for each member, in the same order: temperatures, or weights."""
    members: tuple[str, ...]
    """What names the stages that the rule was fitted for: see :func:`sisa.ensemble.live.member_names`."""

    def __post_init__(self) -> None:
        if self.name not in WITH_PARAMETERS:
            raise ValueError(f"name: expected one of {', '.join(WITH_PARAMETERS)}, got {self.name!r}")
        if not self.members or len(self.parameters) != len(self.members):
            raise ValueError(f"expected a parameter for each of {len(self.members)} members, got {self.parameters}")
        if not all(math.isfinite(number) for number in self.parameters):
            raise ValueError(f"parameters: expected finite numbers, got {self.parameters}")
        if self.name == "calibrated" and min(self.parameters) <= 0:
            raise ValueError(f"parameters: expected temperatures above 0, got {self.parameters}")
        if self.name == "weighted" and (min(self.parameters) < 0 or abs(sum(self.parameters) - 1) > 1e-9):
            raise ValueError(f"parameters: expected weights that sum to one, got {self.parameters}")

    def to_json(self) -> str:
        """Return the text that :meth:`from_json` reads; numbers come back with the same bits."""
        return json.dumps({"name": self.name, "parameters": self.parameters, "members": self.members})

    @classmethod
    def from_json(cls, text: str) -> Fitted:
        """Read what :meth:`to_json` wrote.

        Raises:
            ValueError: The text is another.
        """
        content = json.loads(text)
        if not isinstance(content, dict) or content.keys() != {"name", "parameters", "members"}:
            raise ValueError("expected a name, parameters and members")
        numbers = tuple(float(number) for number in content["parameters"])
        return cls(str(content["name"]), numbers, tuple(str(member) for member in content["members"]))


def aggregator(rule: str, *, members: Sequence[str] = (), fitted: Fitted | None = None) -> Aggregator:
    """Return the rule that these constituents are to be aggregated by.

    Args:
        rule: What the recipe asks for.
        members: What names the constituents, in the order of their posteriors.
        fitted: Parameters, if any were fitted.

    Returns:
        The rule; the mean instead of a rule whose parameters were never fitted, or for other constituents.

    >>> fitted = Fitted("weighted", (0.25, 0.75), ("a", "b"))
    >>> aggregator("weighted", members=["a", "b"], fitted=fitted).name
    'weighted'
    >>> aggregator("weighted", members=["a", "c"], fitted=fitted).name
    'mean'
    """
    if rule in PLAIN:
        return PLAIN[rule]()
    if rule not in WITH_PARAMETERS:
        raise ValueError(f"expected one of {', '.join([*PLAIN, *WITH_PARAMETERS])}, got {rule!r}")
    if fitted is None or fitted.name != rule or fitted.members != tuple(members):
        return Mean()
    return WITH_PARAMETERS[rule](fitted.parameters)


def calibrated(posteriors_SBC: Scores, temperatures_S: Scores) -> Scores:
    """Return softmax(log p / T), with each constituent's own temperature T."""
    scaled_SBC = np.log(np.maximum(posteriors_SBC, SMALLEST)) / temperatures_S[:, None, None]
    scaled_SBC -= scaled_SBC.max(axis=2, keepdims=True)
    np.exp(scaled_SBC, out=scaled_SBC)
    scaled_SBC /= scaled_SBC.sum(axis=2, keepdims=True)
    return scaled_SBC


def _mean(values_SBC: Scores) -> Scores:
    # One after another, as sum doesn't promise: the order of additions is a part of the answer's bits.
    if values_SBC[0].size <= FEW_NUMBERS:
        total_BC = np.add.accumulate(values_SBC, axis=0)[-1] + 0.0
    else:
        total_BC = np.zeros_like(values_SBC[0])
        for values_BC in values_SBC:
            total_BC += values_BC
    mean_BC: Scores = total_BC / len(values_SBC)
    return mean_BC


def _lead(values_BC: Scores) -> Scores:
    """Return by how much the largest value of the last axis exceeds the second largest."""
    largest = np.partition(values_BC, -2, axis=-1)
    lead: Scores = largest[..., -1] - largest[..., -2]
    return lead


def _renormalised(values_BC: Scores, posteriors_SBC: Scores) -> Scores:
    """Make rows sum to one; a row of zeros (everybody is sure of another class) becomes the mean."""
    total_B1 = values_BC.sum(axis=1, keepdims=True)
    empty_B = total_B1[:, 0] <= 0
    if empty_B.any():
        values_BC = np.where(empty_B[:, None], _mean(posteriors_SBC), values_BC)
        total_B1 = np.where(empty_B[:, None], 1.0, total_B1)
    renormalised_BC: Scores = values_BC / total_B1
    return renormalised_BC
