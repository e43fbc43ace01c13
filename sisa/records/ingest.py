"""Bringing the source that a recipe names into a store: check all of it, then write all of it.

``scan`` refuses what can't be used and writes nothing; ``write`` puts every record into its partition, all
or nothing; ``compare`` holds a source against a store that has been written.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from sisa.layout import Layout
from sisa.recipe import Recipe
from sisa.records import compare as comparing
from sisa.records import scan as scanning
from sisa.records import write as writing
from sisa.records.arrivals import Excluded, Intake, Progress
from sisa.records.compare import Comparison, Superseded
from sisa.records.scan import ScanReport
from sisa.records.schema import check_fits
from sisa.records.source import open_source
from sisa.records.write import PartitionCount
from sisa.routing.router import Router


def rows(recipe: Recipe) -> int | None:
    """Return how many rows the sources have, None if only reading would tell.

    Raises:
        SourceError: A source can't be opened.
    """
    return _intake(recipe, routing_key=bytes(32), excluded=None).rows


def scan(
    recipe: Recipe,
    *,
    routing_key: bytes,
    excluded: Excluded | None = None,
    undeclared_text: Sequence[str] = (),
    scratch: Path | None = None,
    on_progress: Progress | None = None,
) -> ScanReport:
    """Read the sources once and check every record; nothing is written.

    Args:
        recipe: A resolved recipe.
        routing_key: The key that will route the records.
        excluded: Marks the rows of deleted people, which are left out.
        undeclared_text: Features that are categories only because they are text (see
            :func:`sisa.records.schema.undeclared_text`); prose among them is refused.
        scratch: An existing folder on whose file system hashes of ids may wait, in a file without a name.
        on_progress: Told how many more records were read.

    Raises:
        SourceError: A record, or a source, can't be used.
        RecipeError: A second source lacks columns of the recipe.
        StoreError: There is no room for hashes.
    """
    intake = _intake(recipe, routing_key=routing_key, excluded=excluded)
    return scanning.scan(intake, undeclared_text=undeclared_text, scratch=scratch, on_progress=on_progress)


def write(
    recipe: Recipe,
    layout: Layout,
    *,
    routing_key: bytes,
    excluded: Excluded | None = None,
    on_progress: Progress | None = None,
    check: Callable[[], None] = lambda: None,
) -> list[PartitionCount]:
    """Write every record to its partition and replace whatever lies under the store's records.

    Scan before. Void if called after the store's ingest was closed: it would bring back what changed since.

    Args:
        recipe: A resolved recipe.
        layout: The store.
        routing_key: Its routing key.
        excluded: Marks the rows of deleted people, which are never written.
        on_progress: Told how many more records are done; their sum is the number of rows.
        check: Called before what lies there is replaced, and again and again while it is; raises if it may not be.

    Returns:
        One entry for each slice 0..R of each shard, rows or not, ordered by shard and slice.

    Raises:
        SourceError: The sources changed since they were scanned; the store's records are as they were.
    """
    intake = _intake(recipe, routing_key=routing_key, excluded=excluded)
    return writing.write(intake, layout, routing_key, on_progress=on_progress, check=check)


def compare(
    recipe: Recipe,
    layout: Layout,
    *,
    routing_key: bytes,
    generations: int = 0,
    excluded: Excluded | None = None,
    superseded: Superseded | None = None,
    on_progress: Progress | None = None,
) -> Comparison:
    """Count what is new, changed or missing in the sources, against the partitions on disk.

    Args:
        recipe: The store's resolved recipe, with the sources to compare.
        layout: The store.
        routing_key: Its routing key.
        generations: How many were added to it.
        excluded: Marks the rows of deleted people, which count as nothing.
        superseded: Marks the rows that say what a correction superseded.
        on_progress: Told how many more records were compared.

    Raises:
        SourceError: A record, or a source, can't be used.
        DamagedError: A partition is unreadable.
    """
    intake = _intake(recipe, routing_key=routing_key, excluded=excluded)
    return comparing.compare(
        intake, layout, routing_key, generations=generations, superseded=superseded, on_progress=on_progress
    )


def _intake(recipe: Recipe, *, routing_key: bytes, excluded: Excluded | None) -> Intake:
    second = recipe.data.holdout.source
    holdout = open_source(second, name="data.holdout.source") if second is not None else None
    if holdout is not None:
        check_fits(recipe, holdout)
    router = Router(
        routing_key,
        shards=recipe.sisa.shards,
        slices=recipe.sisa.slices,
        holdout_fraction=recipe.data.holdout.fraction,
    )
    return Intake(recipe, open_source(recipe.data.source), router, holdout, excluded)
