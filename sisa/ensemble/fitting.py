"""Parameters of the rules that have some: one temperature, or one weight, for each constituent.

Both minimise the negative log likelihood of the labels of a table that is declared to hold nobody who can ask for
deletion. Both problems are convex and both methods deterministic, so that the same posteriors give the same
parameters. Parameters depend on the constituents: whoever purges one of these must forget the parameters too.

Shapes: S constituents, B rows, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from sisa.ensemble.aggregation import SMALLEST, Fitted, Scores

LEAST_TEMPERATURE, MOST_TEMPERATURE = 0.05, 20.0
"""Where the search ends: on rows that a constituent has all right, the best temperature would be 0."""
HALVINGS = 60
MOST_STEPS = 20_000
ENOUGH = 1e-6
"""A fit ends when its loss is at most this many nats per row above the best one's."""
SMALLEST_POSTERIOR = 1e-12
"""What less counts as in a fit of weights, so that a row which everybody has wrong has a loss."""

Labels = npt.NDArray[np.int64]


def fit(name: str, posteriors_SBC: Scores, labels_B: Labels, members: Sequence[str]) -> Fitted:
    """Fit the parameters of a rule.

    Args:
        name: ``calibrated`` or ``weighted``.
        posteriors_SBC: What each constituent says of each row, by the path that answers one by one.
        labels_B: Class of each row.
        members: What names the constituents, in the same order.

    Raises:
        ValueError: There are no rows, labels that are no classes, or no such rule.
    """
    if name not in FITS:
        raise ValueError(f"expected one of {', '.join(FITS)}, got {name!r}")
    return Fitted(name, tuple(FITS[name](posteriors_SBC, labels_B).tolist()), tuple(members))


def fit_temperatures(posteriors_SBC: Scores, labels_B: Labels) -> Scores:
    """Return each constituent's temperature (S,), the one at which its own log loss is least.

    The loss is convex in 1/T (a log-sum-exp less a linear term), so its slope is bisected.

    Raises:
        ValueError: There are no rows, or labels that are no classes.
    """
    _check(posteriors_SBC, labels_B)
    logs_SBC = np.log(np.maximum(posteriors_SBC, SMALLEST))
    truth_S = _of_labels(logs_SBC, labels_B).mean(axis=1)
    low_S = np.full(len(logs_SBC), 1 / MOST_TEMPERATURE)
    high_S = np.full(len(logs_SBC), 1 / LEAST_TEMPERATURE)
    for _ in range(HALVINGS):
        middle_S = np.sqrt(low_S * high_S)
        rising_S = _expected(logs_SBC, middle_S) > truth_S
        high_S = np.where(rising_S, middle_S, high_S)
        low_S = np.where(rising_S, low_S, middle_S)
    temperatures_S: Scores = 1 / np.sqrt(low_S * high_S)
    return np.clip(temperatures_S, LEAST_TEMPERATURE, MOST_TEMPERATURE)


def _expected(logs_SBC: Scores, sharpness_S: Scores) -> Scores:
    """Return the mean log posterior under the posteriors of sharpness 1/T; it grows with the sharpness."""
    scaled_SBC = logs_SBC * sharpness_S[:, None, None]
    scaled_SBC -= scaled_SBC.max(axis=2, keepdims=True)
    np.exp(scaled_SBC, out=scaled_SBC)
    scaled_SBC /= scaled_SBC.sum(axis=2, keepdims=True)
    expected_S: Scores = (scaled_SBC * logs_SBC).sum(axis=2).mean(axis=1)
    return expected_S


def fit_weights(posteriors_SBC: Scores, labels_B: Labels) -> Scores:
    """Return weights (S,), none negative, summing to one, at which the log loss of the weighted mean is least.

    Expectation maximisation of mixture weights: each step lowers the loss, starting from equal weights. With g_s the
    mean of p_s over the mixture's p, the loss is at most log(max g) above the least one (Cover 1984), which is when
    to stop.

    Raises:
        ValueError: There are no rows, or labels that are no classes.
    """
    _check(posteriors_SBC, labels_B)
    truth_SB = np.maximum(_of_labels(posteriors_SBC, labels_B), SMALLEST_POSTERIOR)
    weights_S = np.full(len(truth_SB), 1 / len(truth_SB))
    for _ in range(MOST_STEPS):
        gain_S = (truth_SB / (weights_S @ truth_SB)).mean(axis=1)
        if np.log(gain_S.max()) <= ENOUGH:
            break
        weights_S *= gain_S
        weights_S /= weights_S.sum()
    return weights_S


FITS: dict[str, Callable[[Scores, Labels], Scores]] = {"calibrated": fit_temperatures, "weighted": fit_weights}


def _of_labels(values_SBC: Scores, labels_B: Labels) -> Scores:
    chosen_SB: Scores = values_SBC[:, np.arange(len(labels_B)), labels_B]
    return chosen_SB


def _check(posteriors_SBC: Scores, labels_B: Labels) -> None:
    constituents, rows, classes = posteriors_SBC.shape
    if not constituents or not rows:
        raise ValueError("expected at least one constituent and one row to fit on")
    if labels_B.shape != (rows,):
        raise ValueError(f"expected {rows} labels, got an array of shape {labels_B.shape}")
    if labels_B.min() < 0 or labels_B.max() >= classes:
        raise ValueError(f"labels: expected classes 0..{classes - 1}, got {labels_B.min()}..{labels_B.max()}")
    if not np.isfinite(posteriors_SBC).all():
        raise ValueError("posteriors: expected finite numbers")
