"""Records on their way from a source into the store: encoded, routed, without those who were deleted.

Scanning, writing and comparing read a source through here, so that all three see the same rows. A second
source, if the recipe names one, is held out as a whole: its rows go to slice 0 of the shard that their
subject belongs to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from sisa.layout import HOLDOUT_SLICE
from sisa.recipe import Recipe
from sisa.records.encode import canonical_pairs, encode_with, source_columns
from sisa.records.source import Source
from sisa.routing.router import Router

Excluded = Callable[[pa.StringArray, pa.StringArray], NDArray[np.bool_]]
"""Marks, of N record ids and N subject ids, the rows that must never enter the store."""

Progress = Callable[[int], None]
"""Told how many more records are done."""


@dataclass(frozen=True)
class Arrivals:
    """A batch of records that may enter, and where they go."""

    batch: pa.RecordBatch
    """N canonical records."""
    shard_N: NDArray[np.int32]
    slice_N: NDArray[np.int32]
    excluded: int
    """How many rows of the batch were left out."""
    read: int
    """How many rows of the source were read for it."""


@dataclass(frozen=True)
class Intake:
    """What is read, and by which rules."""

    recipe: Recipe
    """The resolved recipe."""
    source: Source
    router: Router
    holdout: Source | None = None
    """A second source that is held out as a whole."""
    excluded: Excluded | None = None

    @property
    def sources(self) -> Sequence[tuple[Source, bool]]:
        """The sources, and whether each is held out."""
        return [(self.source, False), *([(self.holdout, True)] if self.holdout is not None else [])]

    @property
    def rows(self) -> int | None:
        """Number of rows of all sources, None if only reading would tell."""
        counts = [source.rows for source, _ in self.sources]
        return None if None in counts else sum(count or 0 for count in counts)


def arrivals(intake: Intake) -> Iterator[Arrivals]:
    """Read the sources once.

    Raises:
        SourceError: A value isn't what the recipe says it is, or a file can't be read.
    """
    for source, held_out in intake.sources:
        for raw in source.batches(source_columns(intake.recipe)):
            yield _arrive(raw, intake, held_out=held_out)


def arriving_ids(intake: Intake) -> Iterator[pa.StringArray]:
    """Read only the ids of the records that may enter.

    Raises:
        SourceError: An id is missing or empty, or a file can't be read.
    """
    data = intake.recipe.data
    for source, _ in intake.sources:
        for raw in source.batches(list(dict.fromkeys([data.record_id, data.subject_column]))):
            records, subjects = canonical_pairs(raw, intake.recipe)
            yield records if intake.excluded is None else records.filter(pa.array(~intake.excluded(records, subjects)))


def _arrive(raw: pa.RecordBatch, intake: Intake, *, held_out: bool) -> Arrivals:
    read = raw.num_rows
    records, subjects = canonical_pairs(raw, intake.recipe)
    if intake.excluded is not None:
        # Left out before anything else is looked at: a deleted person's row can't even cause an error.
        excluded_N = intake.excluded(records, subjects)
        if excluded_N.any():
            kept = pa.array(~excluded_N)
            raw, records, subjects = raw.filter(kept), records.filter(kept), subjects.filter(kept)
    routes = intake.router.route(subjects)
    if held_out:
        routes.slice_N[:] = HOLDOUT_SLICE
    batch = encode_with(raw, intake.recipe, records, subjects)
    return Arrivals(batch, routes.shard_N, routes.slice_N, read - batch.num_rows, read)
