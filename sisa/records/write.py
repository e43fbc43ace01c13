"""The second pass over a source: rows into partitions, in bounded memory, all or nothing.

In order: batches are collected until they fill a budget; each fill is sorted by partition and spooled as one
run (:mod:`sisa.records.spool`); then each partition is put together from its pieces of all runs and written, as one
file or, if it is large, as several (:mod:`sisa.records.parts`). Everything happens in a folder of its own on a local disk, which takes the records'
place in one durable rename at the end. Killed at any instant this leaves the old records or the new ones, and
perhaps ``tmp-records``, which the next attempt removes. To object storage the files are uploaded at the end instead:
killed meanwhile it leaves some of them, which the next attempt removes.

Partitions are put together by as many threads as there are processors, four at most; each has one file open. Memory holds
the budget about three times and each writer's rows of one file; it doesn't grow with the records.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from sisa.files import make_folder, publish_folder, remove, sweep_temporary
from sisa.layout import HOLDOUT_SLICE, RECORDS_KEY, Layout
from sisa.lineage import canonical_order, membership_in_order
from sisa.recipe import Recipe
from sisa.records.arrivals import Intake, Progress, arrivals
from sisa.records.digest import DIGEST_BYTES, content_digests, id_digests
from sisa.records.names import RECORD, SUBJECT
from sisa.records.partition import PartitionRows
from sisa.records.parts import file_name, files_for, rows_of_a_file
from sisa.records.rowfile import joined, no_rows, with_contents, write_rows
from sisa.records.spill import Spill
from sisa.records.spool import Spool
from sisa.routing.keys import ShardKeys, shard_keys

BUDGET_BYTES = 192 * 2**20
"""Rows collected before they are sorted and spooled."""
WRITERS = 4
"""Partitions that are put together at a time, at most."""
UPLOADS = 8
"""Files on their way to object storage at a time."""


@dataclass(frozen=True)
class PartitionCount:
    """What was written for one slice (0: the holdout's part) of one shard."""

    shard: int
    slice: int
    records: int
    membership: str
    subjects: int = 0
    files: tuple[tuple[int, str], ...] = ()
    """Number of records and membership of each file, if there are several."""


def write(
    intake: Intake,
    layout: Layout,
    routing_key: bytes,
    *,
    on_progress: Progress | None = None,
    check: Callable[[], None] = lambda: None,
    budget_bytes: int = BUDGET_BYTES,
) -> list[PartitionCount]:
    """Write every record to its partition, and replace whatever lies under the store's records.

    Scan the same sources before: this trusts them. Call it only while the store's ingest is open.

    Args:
        intake: What to read.
        layout: The store.
        routing_key: Its routing key, from which the shards' digest keys derive.
        on_progress: Told how many more records are done: half of them when read, half when written.
        check: Called before what lies there is replaced, and again and again while it is; raises if it may not be.
        budget_bytes: Memory for rows that wait to be sorted.

    Returns:
        One entry for each slice 0..R of each shard, rows or not, ordered by shard and slice.

    Raises:
        SourceError: The sources changed since they were scanned; the store's records are as they were.
    """
    sweep_temporary(layout.root)  # of killed attempts: they hold people's rows
    scratch = Layout(layout.spool)
    make_folder(scratch.records)
    told = Told(on_progress)
    try:
        with contextlib.closing(_spool(scratch, intake, routing_key, budget_bytes)) as spool:
            for arrived in arrivals(intake):
                spool.add(arrived)
                told.read(arrived.read)
            spool.flush()
            counts = _write_partitions(spool, scratch, intake, routing_key, told)
        _publish(scratch, layout, check)
        told.end()
    finally:
        remove(scratch.root)
    return counts


def _write_partitions(
    spool: Spool, scratch: Layout, intake: Intake, routing_key: bytes, told: Told
) -> list[PartitionCount]:
    """Write every partition; one that fails, or an interruption, ends the others at their next rows."""
    places = [
        (keys, slice_)
        for keys in (shard_keys(routing_key, shard) for shard in range(intake.router.shards))
        for slice_ in range(HOLDOUT_SLICE, intake.router.slices + 1)
    ]

    def write_one(place: tuple[ShardKeys, int]) -> PartitionCount:
        return _write_partition(spool, scratch, intake.recipe, place[0], slice_=place[1], told=told)

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    with ThreadPoolExecutor(min(WRITERS, cores)) as pool:
        futures = [pool.submit(write_one, place) for place in places]
        try:
            return [future.result() for future in futures]
        except BaseException:
            told.stop()
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def _publish(scratch: Layout, layout: Layout, check: Callable[[], None]) -> None:
    """Put the new records in the place of the old."""
    check()
    if not layout.remote:
        if layout.records.exists():
            remove(layout.records)
        publish_folder(scratch.records, layout.records)
        return
    storage = layout.storage
    storage.remove_all(RECORDS_KEY)  # killed from here on it leaves some: the ingest is open still, and begins again

    def upload(path: Path) -> None:
        storage.put_file(path.relative_to(scratch.root).as_posix(), path)
        path.unlink()

    paths = sorted(scratch.records.rglob("*.parquet"))
    with ThreadPoolExecutor(UPLOADS) as pool:
        for start in range(0, len(paths), UPLOADS):
            check()
            list(pool.map(upload, paths[start : start + UPLOADS]))


def _write_partition(
    spool: Spool, scratch: Layout, recipe: Recipe, keys: ShardKeys, *, slice_: int, told: Told
) -> PartitionCount:
    folder = scratch.partition(keys.shard, slice_)

    def write_to(name: str, tables: Iterator[pa.Table]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        write_rows(folder / name, tables)

    return gather(spool, recipe, keys, slice_=slice_, write_to=write_to, told=told)


def _spool(scratch: Layout, intake: Intake, routing_key: bytes, budget_bytes: int) -> Spool:
    return Spool(scratch.root, slices=intake.router.slices, budget_bytes=budget_bytes, routing_key=routing_key)


def gather(
    spool: Spool,
    recipe: Recipe,
    keys: ShardKeys,
    *,
    slice_: int,
    write_to: Callable[[str, Iterator[pa.Table]], None],
    told: Told,
) -> PartitionCount:
    """Put one partition together from its pieces, file by file; without rows nothing is written.

    Args:
        spool: What has come.
        recipe: The recipe.
        keys: Of the shard.
        slice_: The slice, as the spool knows it.
        write_to: Writes tables to a file of this name.
        told: Who wants to know.
    """
    most = rows_of_a_file(recipe)
    rows = spool.rows(keys.shard, slice_)
    of = files_for(rows, most=most)
    files, subjects = [], 0
    with contextlib.closing(_pairs(spool)) as whole:
        for number in range(of if rows else 0):
            with contextlib.closing(_pairs(spool)) as part:
                file = _FileRows(recipe, keys, told, (whole, part))
                tables = grouped(spool.batches(keys, slice_, number, of), rows=most)
                write_to(file_name(number, of), _or_none(map(file.table, tables), recipe))
                files.append((part.count, _membership(part)))
            subjects += file.subjects
        return PartitionCount(
            keys.shard, slice_, whole.count, _membership(whole), subjects, tuple(files) if of > 1 else ()
        )


def counted(shard: int, slice_: int, rows: PartitionRows) -> PartitionCount:
    """Count what was read of a slice."""
    subjects = len(rows.table[SUBJECT].unique())
    return PartitionCount(shard, slice_, len(rows.table), rows.membership, subjects, rows.by_file())


def _pairs(spool: Spool) -> Spill:
    return Spill(width=2 * DIGEST_BYTES, folder=spool.folder)


def _membership(pairs: Spill) -> str:
    ordered = (bucket[canonical_order(bucket[:, :DIGEST_BYTES])] for bucket in pairs.buckets())
    return membership_in_order(pairs.count, ordered)


class _FileRows:
    """Takes what goes into one file through, with digests, and counts."""

    def __init__(self, recipe: Recipe, keys: ShardKeys, told: Told, pairs: Sequence[Spill]) -> None:
        self._recipe, self._keys, self._told, self._pairs = recipe, keys, told, pairs
        self._subjects = pa.array([], pa.string())

    @property
    def subjects(self) -> int:
        """How many owners there were: all of a person's rows in a slice are in one file."""
        return len(self._subjects)

    def table(self, rows: pa.Table) -> pa.Table:
        """Return rows with the digests of their contents."""
        contents_N16 = content_digests(self._keys, rows, self._recipe)
        pairs_N32 = np.concatenate([id_digests(self._keys, rows[RECORD]), contents_N16], axis=1)
        for pairs in self._pairs:
            pairs.add(pairs_N32)
        self._subjects = pa.concat_arrays([self._subjects, rows[SUBJECT].unique()]).unique()
        self._told.written(rows.num_rows)
        return with_contents(rows, contents_N16)


def grouped(batches: Iterator[pa.RecordBatch], *, rows: int) -> Iterator[pa.Table]:
    """Put small batches together to tables of about so many rows, and cut large ones."""
    waiting: list[pa.Table] = []
    for batch in batches:
        for start in range(0, batch.num_rows, rows):
            waiting.append(pa.table(batch.slice(start, rows)))
            if sum(table.num_rows for table in waiting) >= rows:
                yield joined(waiting).combine_chunks()
                waiting = []
    if waiting:
        yield joined(waiting).combine_chunks()


def _or_none(tables: Iterator[pa.Table], recipe: Recipe) -> Iterator[pa.Table]:
    """Yield a table without rows if there are none: one of several files is there even then."""
    table = None
    for table in tables:
        yield table
    if table is None:
        yield with_contents(no_rows(recipe), np.empty((0, DIGEST_BYTES), np.uint8))


class StoppedError(Exception):
    """Another writer failed, or somebody interrupted: this one's rows are not wanted any more."""


class Told:
    """Adds up progress, from any thread: half a record for reading it, half for writing it."""

    def __init__(self, on_progress: Progress | None) -> None:
        self._lock = threading.Lock()
        self._stopped = False
        self._on_progress = on_progress
        self._rows = 0
        self._halves = 0
        self._said = 0

    def read(self, count: int) -> None:
        """Say that ``count`` more rows were read."""
        self._rows += count
        self.written(count)

    def written(self, count: int) -> None:
        """Say that ``count`` more rows were written.

        Raises:
            StoppedError: No more are wanted.
        """
        if self._stopped:
            raise StoppedError
        with self._lock:
            self._halves += count
            self._say(self._halves // 2)

    def stop(self) -> None:
        """End who tells of rows the next time."""
        self._stopped = True

    def end(self) -> None:
        """Say that rows which were left out are done too."""
        self._say(self._rows)

    def _say(self, done: int) -> None:
        if self._on_progress is not None and done > self._said:
            self._on_progress(done - self._said)
            self._said = done
