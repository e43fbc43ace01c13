"""The training job: ingest once, then train whatever the records call for and isn't there.

Everything that can be refused is refused before the first byte is written.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from sisa.coordination import Held
from sisa.deletion.files import rows_damage
from sisa.deletion.repair import Repair, bring_up
from sisa.deletion.settle import settle_all
from sisa.errors import LostLockError, RecipeError, SisaError, UserError
from sisa.execution.options import Execution
from sisa.layout import Layout, is_held_out
from sisa.learners.check import check_model
from sisa.ledger import Partition, PartitionFile, PostgresPlace, place_of
from sisa.opening import OpenStore, check_vacant, create_store, is_store, open_store, routing_key_for
from sisa.progress import Reporter, Silent
from sisa.recipe import Recipe, difference, load_recipe, parse_recipe
from sisa.records import ingest
from sisa.records.arrivals import Excluded
from sisa.records.compare import Comparison, Superseded
from sisa.records.excluded import excluded_rows, superseded_rows
from sisa.records.partition import read_partition
from sisa.records.schema import resolve, undeclared_text
from sisa.records.source import open_source
from sisa.records.write import PartitionCount
from sisa.remote import layout_for
from sisa.routing.keys import shard_keys
from sisa.store.footing import require_same
from sisa.store.refit import calibration_rows
from sisa.store.results import Training
from sisa.store.store import Store
from sisa.training.footing import footing_here


def train(
    recipe: Recipe | str | Path | dict[str, Any],
    *,
    store: str | Path | None = None,
    executor: str = "auto",
    address: str | None = None,
    workers: int | None = None,
    upgrade: bool = False,
    reporter: Reporter | None = None,
) -> Store:
    """Train what isn't trained yet and return the store; ``store.training`` says what was done.

    Args:
        recipe: A recipe, the path of one in YAML, or plain data.
        store: Where; by default what the recipe says.
        executor: ``auto``, ``ray`` or ``inline``.
        address: A running Ray cluster.
        workers: How many chains at a time.
        upgrade: Rebuild everything if code or platform changed since the last training.
        reporter: Who wants to know how far it is.

    Raises:
        UserError: The recipe, the source or the store can't be used as asked; nothing was changed.
        StoreError: The store is damaged, or another operation holds it.
    """
    started = time.monotonic()
    asked = _recipe(recipe)
    place = store if store is not None else asked.store
    if place is None:
        raise UserError("store: missing", hint="Name it in the recipe (store: runs/name) or give --store.")
    layout = layout_for(place, asked)
    place_of(asked.ledger, layout.ledger)  # refused before anything else, since it may hold a secret
    reporter = reporter or Silent()
    execution = Execution(
        executor=executor,  # type: ignore[arg-type]
        address=address,
        workers=workers,
        resources=asked.workers,
    )
    execution.check()
    opened, missing = _ingested(asked, layout, reporter, upgrade=upgrade)
    with opened.operation_lock().held(timeout_s=0) as held:
        done = _build(opened, execution, reporter, held, upgrade=upgrade)
    result = Store(opened)
    result.training = _summary(result, result.refit(), done, started=started, missing=missing)
    return result


def _recipe(recipe: Recipe | str | Path | dict[str, Any]) -> Recipe:
    if isinstance(recipe, Recipe):
        return recipe
    if isinstance(recipe, dict):
        return parse_recipe(recipe)
    return load_recipe(recipe)


def _ingested(asked: Recipe, layout: Layout, reporter: Reporter, *, upgrade: bool) -> tuple[OpenStore, int]:
    """Return the store with its records in it, and how many of them the source hasn't any more."""
    if not is_store(layout):
        check_vacant(layout)
    resolved = resolve(asked, open_source(asked.data.source))
    key = routing_key_for(asked, layout)
    if not isinstance(resolved.sisa.aggregation, str):
        calibration_rows(resolved)  # refused now, or after all the training
    if is_store(layout):
        opened = open_store(layout)
        _same_recipe(opened, resolved)
        if not upgrade:
            require_same(opened, footing_here(opened.recipe))
        if not opened.ledger.ingested:  # an ingest that was killed: the source may be another by now
            _scan(asked, resolved, key, reporter, layout)
    else:
        check_model(resolved)
        _scan(asked, resolved, key, reporter, layout)
        opened = create_store(layout, resolved, key)
        _same_recipe(opened, resolved)
    with opened.operation_lock().held(timeout_s=0) as operation:
        if opened.ledger.ingested:
            raise_first(settle_all(opened, reporter))  # rows of accepted deletions are neither kept nor missing
            check_rows(opened)
            return opened, _compare(opened, resolved, reporter)
        with opened.ingest_lock().held() as entering:
            _ingest(opened, resolved, reporter, (operation, entering))
    return opened, 0


def _same_recipe(opened: OpenStore, resolved: Recipe) -> None:
    differences = difference(opened.recipe, resolved) + _other_ledger(opened, resolved)
    if differences:
        raise RecipeError(
            differences,
            source=f"the store {opened.layout.uri!r} was trained under another recipe; this one",
            hint="Train into another store, or go back to the stored recipe (recipe.yaml in the store).",
        )


def _other_ledger(opened: OpenStore, resolved: Recipe) -> list[str]:
    """Name the database in which the store remembers, if another is asked for: a store doesn't change it by itself."""
    here, asked = opened.place, place_of(resolved.ledger, opened.layout.ledger)
    shown = [repr(place.url) if isinstance(place, PostgresPlace) else "nothing" for place in (here, asked)]
    return [f"ledger: the store has {shown[0]}, asked for {shown[1]}"] if shown[0] != shown[1] else []


def excluder(opened: OpenStore) -> Excluded:
    """Mark deleted people's rows, as known when the first rows arrive.

    A comparison has read the partitions by then: whoever was erased from them before is known as deleted.
    """
    known: list[Collection[tuple[str, bytes]]] = []

    def excluded(records: pa.StringArray, subjects: pa.StringArray) -> NDArray[np.bool_]:
        if not known:
            known.append(opened.ledger.requests.exclusions().keys())
        return excluded_rows(records, subjects, known[0], opened.keys.exclusion)

    return excluded


def superseder(opened: OpenStore) -> Superseded:
    """Mark rows that say what a correction superseded."""

    def superseded(records: pa.StringArray, contents_N16: NDArray[np.uint8]) -> NDArray[np.bool_]:
        exclusions = opened.ledger.requests.exclusions().keys()
        return superseded_rows(records, contents_N16, exclusions, opened.keys.exclusion)

    return superseded


def room_of(layout: Layout) -> Path:
    """Return a folder that is there, on the file system that the store's folder is on or will be on."""
    return next(folder for folder in (layout.root, *layout.root.absolute().parents) if folder.is_dir())


def _scan(asked: Recipe, resolved: Recipe, key: bytes, reporter: Reporter, layout: Layout) -> None:
    reporter.begin("checking the source", ingest.rows(resolved))
    try:
        found = ingest.scan(
            resolved,
            routing_key=key,
            undeclared_text=undeclared_text(asked, resolved),
            scratch=room_of(layout),
            on_progress=reporter.advance,
        )
    finally:
        reporter.end()
    if not found.records:
        reporter.note("data.source has no records: every shard stays out of the vote, and nothing can be predicted")


def _ingest(opened: OpenStore, resolved: Recipe, reporter: Reporter, locks: Collection[Held]) -> None:
    def check() -> None:
        for lock in locks:
            lock.check()
        if opened.ledger.ingested:
            raise LostLockError(
                "another process ingested the store meanwhile",
                hint="Run the command again: it goes on from there.",
            )

    reporter.begin("routing records", ingest.rows(resolved))
    try:
        counts = ingest.write(
            resolved,
            opened.layout,
            routing_key=opened.keys.routing,
            excluded=excluder(opened),
            on_progress=reporter.advance,
            check=check,
        )
    finally:
        reporter.end()
    check()
    opened.ledger.partitions.replace_all(expected_of(counts))


def expected_of(counts: Iterable[PartitionCount]) -> list[Partition]:
    """Return what the ledger is to expect of slices that were written."""
    return [
        Partition(
            c.shard, c.slice, c.records, c.subjects, c.membership, files=tuple(PartitionFile(*file) for file in c.files)
        )
        for c in counts
    ]


def check_rows(opened: OpenStore) -> None:
    """Make sure that the store holds the rows that it should: what was lost must not look like new in the source.

    Raises:
        DamagedError: It doesn't.
    """
    for shard in range(opened.shards):
        keys = shard_keys(opened.keys.routing, shard)
        with opened.coordination.rows(shard).held():
            for expected in opened.ledger.partitions.all(shard):
                rows = read_partition(opened.layout, opened.recipe, keys, shard, expected.slice)
                if rows.membership not in {expected.membership, expected.next_membership}:
                    raise rows_damage(opened, shard, expected.slice)


def compared(opened: OpenStore, recipe: Recipe, reporter: Reporter) -> Comparison:
    """Hold the recipe's source against the store."""
    reporter.begin("comparing the source with the store", ingest.rows(recipe))
    try:
        return ingest.compare(
            recipe,
            opened.layout,
            routing_key=opened.keys.routing,
            generations=opened.generations,
            excluded=excluder(opened),
            superseded=superseder(opened),
            on_progress=reporter.advance,
        )
    finally:
        reporter.end()


def _compare(opened: OpenStore, resolved: Recipe, reporter: Reporter) -> int:
    """Hold the source against the store; return how many stored rows it hasn't any more."""
    found = compared(opened, resolved, reporter)
    if not found.clean:
        raise UserError(
            f"data.source has {found.new} new and {found.changed} changed records against the store; "
            "training neither adds nor corrects; nothing was changed",
            hint="Put the new ones into a table of their own, for `sisa add`, changed ones for `sisa correct`; "
            "or train from the source as it was, or into another store.",
        )
    if found.superseded:
        reporter.note(
            f"{found.superseded} records of the source say what a correction superseded; the store keeps what it has"
        )
    if found.missing:
        reporter.note(
            f"{found.missing} records of the store are missing from the source; they are kept: "
            "only `sisa delete` deletes"
        )
    return found.missing


def _build(opened: OpenStore, execution: Execution, reporter: Reporter, held: Held, *, upgrade: bool) -> Repair:
    here = footing_here(opened.recipe)
    standing = opened.ledger.footing()
    moves = upgrade and standing not in {None, (here.code, here.platform)}
    if not moves:
        require_same(opened, here)
    done = bring_up(
        opened,
        shards=range(opened.shards),
        footing=here,
        execution=execution,
        reporter=reporter,
        cause="upgrade" if moves else "train",
        read_reused=True,
        held=held,
    )
    raise_first(done.failures)
    return done


def raise_first(failures: dict[int, SisaError]) -> None:
    """Raise the first shard's error, saying how many others failed.

    Raises:
        SisaError: There was one.
    """
    if not failures:
        return
    error = failures[min(failures)]
    if len(failures) > 1:
        error.message = f"{error.message} (and {len(failures) - 1} other shards failed too)"
        error.args = (error.message,)
    raise error


def _summary(store: Store, version: int, done: Repair, *, started: float, missing: int) -> Training:
    opened = store.opened
    partitions = opened.ledger.partitions.all()
    return Training(
        store=opened.layout.uri,
        version=version,
        records=sum(p.records for p in partitions if not is_held_out(p.slice)),
        subjects=sum(p.subjects for p in partitions if not is_held_out(p.slice)),
        holdout_records=sum(p.records for p in partitions if is_held_out(p.slice)),
        shards=opened.shards,
        slices=opened.slices,
        stages_trained=len(done.trained),
        stages_reused=done.reused,
        metrics=store.measure(),
        seconds=round(time.monotonic() - started, 3),
        missing_from_source=missing,
    )
