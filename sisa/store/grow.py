"""Growing data: a table of new rows becomes the next generation, a new last slice of every shard.

In order: everything that can be refused is refused; the rows are written to places that nobody expects yet; one
ledger transaction makes them a generation, unless somebody was deleted meanwhile, whose rows are then dropped first;
the stages that the records now call for are trained, and a version is published.

Killed anywhere, the same command again ends the same: before the transaction there is no generation, and after it
the source is recognised as one that was added already.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence

from sisa.coordination import Held
from sisa.deletion.incoming import begin_incoming, end_incoming, next_place, sweep_held
from sisa.deletion.repair import bring_up
from sisa.deletion.settle import settle_all
from sisa.errors import SisaError, StoreError, UserError
from sisa.execution.options import Execution
from sisa.layout import is_held_out
from sisa.ledger import Partition
from sisa.opening import OpenStore
from sisa.progress import Reporter
from sisa.recipe import Recipe
from sisa.records import ingest
from sisa.records.compare import Comparison
from sisa.records.grow import Place, drop_excluded, grown_recipe, write_generation
from sisa.records.partition import present_ids
from sisa.records.scan import ScanReport
from sisa.records.write import PartitionCount
from sisa.store.footing import require_same
from sisa.store.launch import check_rows, excluder, raise_first, superseder
from sisa.store.results import Addition
from sisa.store.store import Store
from sisa.training.footing import footing_here


def add(store: Store, source: str, *, defer: bool, execution: Execution, reporter: Reporter) -> Addition:
    """Add the rows of a table as a new generation, and train on them unless that is deferred.

    Raises:
        UserError: The table can't be used, or brings nothing new; nothing was changed.
        FootingError: Code or platform is not what the store was trained with; nothing was changed.
        BusyError: Another operation holds the store.
        StoreError: The store is damaged, or a shard could not be trained; what was added stays added.
    """
    started = time.monotonic()
    opened = store.opened
    if not opened.ledger.ingested:
        raise StoreError("the store holds no records yet: its ingest has not ended", hint="Run `sisa train`.")
    execution.check()
    here = footing_here(opened.recipe)
    require_same(opened, here)
    before = store.version
    with opened.operation_lock().held(timeout_s=0) as held:
        recipe = grown_recipe(opened.recipe, source)
        raise_first(settle_all(opened, reporter))  # rows of accepted deletions are not there any more
        check_rows(opened)  # what was lost must not look like new
        found, generation = _examined(opened, recipe, reporter)
        repeated = bool(generation)
        generation = generation or _published(opened, recipe, reporter)
        trained = 0
        if not defer:
            done = bring_up(
                opened,
                shards=range(opened.shards),
                footing=here,
                execution=execution,
                reporter=reporter,
                cause="add",
                held=held,
            )
            raise_first(done.failures)
            trained = len(done.trained)
    if not defer:
        store.refit()
    slices = _slices_of(opened, generation)
    return Addition(
        generation=generation,
        slice=opened.recipe.sisa.slices + generation,
        records=sum(p.records for p in slices if not is_held_out(p.slice)),
        holdout_records=sum(p.records for p in slices if is_held_out(p.slice)),
        excluded_records=found.excluded_records,
        repeated=repeated,
        stages_trained=trained,
        version_before=before,
        version=store.version,
        metrics=None if defer else store.measure(),
        seconds=round(time.monotonic() - started, 3),
    )


def _examined(opened: OpenStore, recipe: Recipe, reporter: Reporter) -> tuple[ScanReport, int]:
    """Refuse what can't be added; return what was found, and which generation it is already (0: none).

    Raises:
        UserError: Rows can't be used, are in the store already, or none is new.
    """
    total = ingest.rows(recipe)
    reporter.begin("checking the source", total)
    try:
        found = ingest.scan(
            recipe, routing_key=opened.keys.routing, excluded=excluder(opened), on_progress=reporter.advance
        )
    finally:
        reporter.end()
    reporter.begin("comparing the source with the store", total)
    try:
        against = ingest.compare(
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
    return found, _already(recipe.data.source, found, against)


def _already(source: str, found: ScanReport, against: Comparison) -> int:
    """Return the generation that the source is, 0 if it is new.

    Raises:
        UserError: It is neither.
    """
    left_out = f"; {found.excluded_records} rows of deleted people are left out" if found.excluded_records else ""
    if not found.records:
        raise UserError(
            f"{source!r} has no row to add{left_out}; nothing was changed",
            hint="Who was deleted, or whose row was, can't be added again.",
        )
    if against.clean and not against.superseded:
        for generation, rows in against.whole.items():
            if rows == against.same:
                return generation
    changed = against.changed + against.superseded
    there = against.same + changed
    if there:
        raise UserError(
            f"{source!r}: {there} of {found.records} rows have a record id that is in the store already "
            f"({against.same} with the same content, {changed} with another){left_out}; nothing was changed",
            hint="Add only rows that are new; the content of rows that are there is changed by `sisa correct`.",
        )
    return 0


def _published(opened: OpenStore, recipe: Recipe, reporter: Reporter) -> int:
    """Write the rows and make them a generation; return its number.

    Raises:
        UserError: Everybody in the table was deleted meanwhile.
    """
    with opened.incoming_lock().held() as lock:
        sweep_held(opened, lock)  # what a killed attempt left, or one that had lost its lock
        place, mark = next_place(opened), begin_incoming(opened)
        try:
            _publish(opened, recipe, place, reporter, lock)
        except BaseException:
            with contextlib.suppress(SisaError):  # who lost the lock, or the ledger, leaves it to the next
                sweep_held(opened, lock)
            raise
        end_incoming(opened, mark)
    return place.generation


def _publish(opened: OpenStore, recipe: Recipe, place: Place, reporter: Reporter, lock: Held) -> None:
    ledger, routing_key = opened.ledger, opened.keys.routing
    newest = ledger.database.newest_request()
    reporter.begin("routing records", ingest.rows(recipe))
    try:
        counts = write_generation(
            recipe,
            opened.layout,
            place,
            routing_key=routing_key,
            excluded=excluder(opened),
            on_progress=reporter.advance,
            check=lock.check,
        )
    finally:
        reporter.end()
    with opened.ingest_lock().held():  # new deletions wait for the moment that this takes
        while not ledger.generations.publish(
            place.generation, _partitions(opened, counts), newest_request=newest, check=lock.check
        ):
            lock.check()
            newest = ledger.database.newest_request()
            counts = drop_excluded(
                recipe, opened.layout, counts, routing_key=routing_key, excluded=excluder(opened), check=lock.check
            )
            if not any(count.records for count in counts):
                raise UserError(
                    "everybody in the table was deleted meanwhile; nothing was changed",
                    hint="Who was deleted can't be added again.",
                )


def _partitions(opened: OpenStore, counts: Sequence[PartitionCount]) -> list[Partition]:
    return [
        Partition(
            c.shard, c.slice, c.records, len(present_ids(opened.layout, c.shard, c.slice)[1].unique()), c.membership
        )
        for c in counts
    ]


def _slices_of(opened: OpenStore, generation: int) -> list[Partition]:
    place = Place(generation, opened.recipe.sisa.slices)
    numbers = {place.slice_of(0), place.slice_of(1)}
    return [partition for partition in opened.ledger.partitions.all() if partition.slice in numbers]
