"""The constituents of one version as a panel: small batches are answered by all of them at once.

There are three paths. **sequential** asks one constituent after another and is the reference: its bits are those of
:meth:`sisa.learners.predict.Constituent.posteriors`. **stacked** and **vmap** evaluate constituents of one structure
together. They add up in another order, so their scores differ in the last bits (by less than 1e-6 where numbers before
the softmax are of ordinary size), but the label never does: a batch with a row in which two classes are too close to
call is answered by the reference instead. So is a batch that is too large to gain anything.

Several threads may ask a panel; those that need the process's flags wait for each other.

Shape suffixes: S constituents, B rows, C classes.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from sisa.ensemble.aggregation import Aggregator, Scores
from sisa.learners.columns import Columns
from sisa.learners.predict import BATCH_SIZE, Constituent, one_by_one
from sisa.learners.stacked_models import DenseStack, RefusedError, Stack, VmapStack, dense_key, vmap_key
from sisa.recipe import Recipe

Path = Literal["sequential", "stacked", "vmap"]

MOST_ROWS: dict[str, int] = {"stacked": 256, "vmap": 32}
"""Up to how many rows a path is taken. Measured with 20 models of 600 inputs and a hidden layer of 128, one thread of a
Xeon with 2 MiB of L2 cache, against the sequential path: stacked takes 1/17 of its time for 1 row, 1/6 for 32, 0.4 for
128, 0.6 for 256; more rows gain little, and cost twice where the reference has to be asked after all. vmap (a user's
module) takes 1/8 for 1 row, 0.3 for 32, 0.4 for 64, 0.7 for 256; where it convolves, 0.7 for 32 and more than all for
128. (Under vmap convolutions become grouped ones, which torch has no fast code for on the CPU.)"""
UNCERTAIN = 1e-5
"""Numbers before a softmax are taken to differ by less than this, times their size where that is above one, between
paths. That is 160 times the relative precision of float32; some 100 times of what is seen."""
REST_S = 0.0005
AGREE = 1e-5
"""How far a vmap's first answer may be from the reference."""


@dataclass(frozen=True)
class _Group:
    """Constituents that answer together."""

    places_s: tuple[int, ...]
    stack: Stack


class Panel:
    """Constituents, loaded once, that answer together where that is faster and by one another where it isn't."""

    def __init__(self, recipe: Recipe, constituents: Sequence[Constituent]) -> None:
        """Take constituents as they are; what stacking needs is made when a small batch first asks for it.

        Args:
            recipe: A resolved recipe.
            constituents: At least one, in the order of their shards.
        """
        self._recipe = recipe
        self.constituents = tuple(constituents)
        self._groups: list[_Group] | None = None
        self._proved: set[tuple[int, ...]] = set()

    def holds(self, constituents: Sequence[Constituent]) -> bool:
        """Say whether these are the panel's constituents, in its order."""
        return len(constituents) == len(self.constituents) and all(
            one is other for one, other in zip(constituents, self.constituents, strict=True)
        )

    def prepare(self) -> None:
        """Make what stacking needs now, so that the first small batch doesn't wait for it."""
        self._stacks()

    def posteriors(self, columns: Columns) -> Scores:
        """Return the reference posteriors (S, B, C): each constituent's own, one after another.

        Many rows are cut as a constituent cuts them, so the bits are the same; between the cuts others get a turn.
        """
        parts = [
            one_by_one(self._recipe, self.constituents, columns.rows(slice(start, start + BATCH_SIZE)))
            for start in _with_turns(range(0, max(1, columns.count), BATCH_SIZE))
        ]
        return np.concatenate(parts, axis=1) if len(parts) != 1 else parts[0]

    def scores(self, columns: Columns, rule: Aggregator) -> tuple[Scores, Path]:
        """Return the ensemble's scores (B, C) and the path that computed them."""
        proposed = self._proposed(columns)
        if proposed is not None:
            posteriors_SBC, drift_B, path = proposed
            scores_BC, margins_B = rule.with_margins(posteriors_SBC)
            if bool((margins_B > drift_B).all()):  # not so where something isn't a number
                return scores_BC, path
        return rule.scores(self.posteriors(columns)), "sequential"

    def _proposed(self, columns: Columns) -> tuple[Scores, Scores, Path] | None:
        """Return posteriors (S, B, C), by how much they may be off (B,), and their path; None if it isn't worth it."""
        if not 0 < columns.count <= max(MOST_ROWS.values()) or len(self.constituents) < 2:
            return None
        answered: list[tuple[_Group, Scores, Scores]] = []
        for group in self._stacks():
            if columns.count <= MOST_ROWS[group.stack.path]:
                answer = self._asked(group, columns)
                if answer is not None:
                    answered.append((group, *answer))
        if not answered:
            return None
        return self._assembled(answered, columns)

    def _assembled(
        self, answered: list[tuple[_Group, Scores, Scores]], columns: Columns
    ) -> tuple[Scores, Scores, Path]:
        """Put the groups' answers in the order of the constituents; who is in no group answers alone."""
        largest, posteriors, drift_B = max(answered, key=lambda answer: len(answer[0].places_s))
        path: Path = "stacked" if largest.stack.path == "stacked" else "vmap"
        if len(largest.places_s) == len(self.constituents):
            return posteriors, drift_B, path
        posteriors_SBC = np.empty((len(self.constituents), *posteriors.shape[1:]))
        alone = set(range(len(self.constituents)))
        for group, posteriors_sBC, drift in answered:
            posteriors_SBC[list(group.places_s)] = posteriors_sBC
            drift_B = np.maximum(drift_B, drift)
            alone -= set(group.places_s)
        if alone:
            rest = sorted(alone)
            posteriors_SBC[rest] = one_by_one(self._recipe, [self.constituents[place] for place in rest], columns)
        return posteriors_SBC, drift_B, path

    def _asked(self, group: _Group, columns: Columns) -> tuple[Scores, Scores] | None:
        """Return a group's posteriors (s, B, C) and how far they may be off (B,); None if it can't answer, ever."""
        try:
            logits_CSB = _classes_first(group.stack.logits(columns).cpu().numpy())
            posteriors_SBC = _softmax(logits_CSB).transpose(1, 2, 0)
            if group.stack.path == "vmap" and group.places_s not in self._proved:
                self._prove(group, columns, posteriors_SBC)
        except RefusedError:
            self._groups = [other for other in self._stacks() if other is not group]
            return None
        size_B = np.abs(logits_CSB).max(axis=(0, 1))
        return posteriors_SBC, UNCERTAIN * np.maximum(1.0, size_B)

    def _prove(self, group: _Group, columns: Columns, posteriors_SBC: Scores) -> None:
        """Hold the first answer of modules that nobody here knows against the reference, and its time too.

        Raises:
            RefusedError: It is another, or takes longer.
        """
        own = [self.constituents[place] for place in group.places_s]
        started = time.perf_counter()
        group.stack.logits(columns)  # once more: the first call also loads parts of torch
        between = time.perf_counter()
        expected_SBC = one_by_one(self._recipe, own, columns)
        if slower_together(between - started, time.perf_counter() - between):
            raise RefusedError("the modules are slower together than one by one")
        if expected_SBC.shape != posteriors_SBC.shape or not bool((abs(expected_SBC - posteriors_SBC) < AGREE).all()):
            raise RefusedError("the modules answer otherwise than each alone")
        self._proved.add(group.places_s)

    def _stacks(self) -> list[_Group]:
        if self._groups is None:
            dense = _grouped((i, dense_key(c)) for i, c in enumerate(self.constituents))
            known = {place for places in dense for place in places}
            others = _grouped((i, vmap_key(c)) for i, c in enumerate(self.constituents) if i not in known)
            groups = [self._group(places, DenseStack) for places in dense]
            groups += [self._group(places, VmapStack) for places in others]
            self._groups = [group for group in groups if group is not None]
        return self._groups

    def _group(self, places_s: tuple[int, ...], kind: type[DenseStack | VmapStack]) -> _Group | None:
        try:
            return _Group(places_s, kind(self._recipe, [self.constituents[place] for place in places_s]))
        except RefusedError:
            return None


def _with_turns(starts: range) -> Iterator[int]:
    """Yield each, with a rest before all but the first: a lock that is taken again at once is taken by nobody else."""
    for start in starts:
        if start != starts.start:
            time.sleep(REST_S)
        yield start


def slower_together(together_s: float, alone_s: float) -> bool:
    """Say whether a vmap is to be given up for its time."""
    return together_s > alone_s


def _classes_first(logits_SBC: npt.NDArray[np.float32]) -> Scores:
    """Return double precision, in an order in which few classes don't make for short loops."""
    logits_CSB: Scores = logits_SBC.transpose(2, 0, 1).astype(np.float64, order="C")
    return logits_CSB


def _softmax(logits_CSB: Scores) -> Scores:
    """Return probabilities. Not by torch, which wakes a second thread for a handful of numbers."""
    with np.errstate(invalid="ignore"):
        powers_CSB: Scores = np.exp(logits_CSB - logits_CSB.max(axis=0))
    powers_CSB /= powers_CSB.sum(axis=0)
    return powers_CSB


def _grouped(keys: Iterable[tuple[int, tuple[object, ...] | None]]) -> list[tuple[int, ...]]:
    """Return the places of constituents that have a key in common, two or more at a time."""
    groups: dict[tuple[object, ...], list[int]] = {}
    for place, key in keys:
        if key is not None:
            groups.setdefault(key, []).append(place)
    return [tuple(places) for places in groups.values() if len(places) > 1]
