"""The second pass over a source: rows into partitions, in bounded memory, all or nothing.

In order: batches are collected until they fill a budget; each fill is sorted by partition and spooled as one
run, a record batch for each partition; then each partition is put together from its pieces of all runs
and written as one file. Everything happens in a folder of its own on a local disk, which takes the records'
place in one durable rename at the end. Killed at any instant this leaves the old records or the new ones, and
perhaps ``tmp-records``, which the next attempt removes. To object storage the files are uploaded at the end instead:
killed meanwhile it leaves some of them, which the next attempt removes.

One file is open for writing at a time, whatever the number of partitions. Memory holds the budget about
three times, one partition's piece of a run, and 32 bytes a record of the partition being written.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.ipc as paipc
from numpy.typing import NDArray

from sisa.files import make_folder, publish_folder, remove, sweep_temporary
from sisa.layout import HOLDOUT_SLICE, RECORDS_KEY, Layout
from sisa.lineage import membership
from sisa.recipe import Recipe
from sisa.records.arrivals import Arrivals, Intake, Progress, arrivals
from sisa.records.digest import DIGEST_BYTES, Digests, content_digests, id_digests
from sisa.records.names import RECORD
from sisa.records.partition import partition_file, with_contents, write_rows
from sisa.routing.keys import ShardKeys, shard_keys

BUDGET_BYTES = 192 * 2**20
"""Rows collected before they are sorted and spooled."""
UPLOADS = 8
"""Files on their way to object storage at a time."""
PIECE_ROWS = 262_144
"""Rows of a piece that are digested and written at a time."""


@dataclass(frozen=True)
class PartitionCount:
    """What was written for one slice (0: the holdout's part) of one shard."""

    shard: int
    slice: int
    records: int
    membership: str


def write(
    intake: Intake,
    layout: Layout,
    routing_key: bytes,
    *,
    on_progress: Progress | None = None,
    budget_bytes: int = BUDGET_BYTES,
) -> list[PartitionCount]:
    """Write every record to its partition, and replace whatever lies under the store's records.

    Scan the same sources before: this trusts them. Call it only while the store's ingest is open.

    Args:
        intake: What to read.
        layout: The store.
        routing_key: Its routing key, from which the shards' digest keys derive.
        on_progress: Told how many more records are done: half of them when read, half when written.
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
        with contextlib.closing(Spool(scratch.root, slices=intake.router.slices, budget_bytes=budget_bytes)) as spool:
            for arrived in arrivals(intake):
                spool.add(arrived)
                told.read(arrived.read)
            spool.flush()
            counts = [
                _write_partition(spool, scratch, intake.recipe, keys, slice_=slice_, told=told)
                for keys in (shard_keys(routing_key, shard) for shard in range(intake.router.shards))
                for slice_ in range(HOLDOUT_SLICE, intake.router.slices + 1)
            ]
        _publish(scratch, layout)
        told.end()
    finally:
        remove(scratch.root)
    return counts


def _publish(scratch: Layout, layout: Layout) -> None:
    """Put the new records in the place of the old."""
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

    with ThreadPoolExecutor(UPLOADS) as pool:
        for _ in pool.map(upload, sorted(scratch.records.rglob("*.parquet"))):
            pass


def _write_partition(
    spool: Spool, scratch: Layout, recipe: Recipe, keys: ShardKeys, *, slice_: int, told: Told
) -> PartitionCount:
    path = partition_file(scratch, keys.shard, slice_)

    def write_to(pieces: Iterator[pa.Table]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_rows(path, pieces)

    return gather(spool, recipe, keys, slice_=slice_, write_to=write_to, told=told)


def gather(
    spool: Spool,
    recipe: Recipe,
    keys: ShardKeys,
    *,
    slice_: int,
    write_to: Callable[[Iterator[pa.Table]], None],
    told: Told,
) -> PartitionCount:
    """Put one partition together from its pieces; without rows nothing is written."""
    ids = [np.empty((0, DIGEST_BYTES), np.uint8)]
    contents = [np.empty((0, DIGEST_BYTES), np.uint8)]

    def pieces() -> Iterator[pa.Table]:
        for piece in spool.pieces(keys.shard, slice_):
            ids.append(id_digests(keys, piece.column(RECORD)))
            contents.append(content_digests(keys, piece, recipe))
            yield with_contents(pa.table(piece), contents[-1])
            told.written(piece.num_rows)

    if spool.holds(keys.shard, slice_):
        write_to(pieces())
    ids_N16: Digests = np.concatenate(ids)
    return PartitionCount(keys.shard, slice_, len(ids_N16), membership(ids_N16, np.concatenate(contents)))


class Told:
    """Adds up progress: half a record for reading it, half for writing it."""

    def __init__(self, on_progress: Progress | None) -> None:
        self._on_progress = on_progress
        self._rows = 0
        self._halves = 0
        self._said = 0

    def read(self, count: int) -> None:
        """Say that ``count`` more rows were read."""
        self._rows += count
        self.written(count)

    def written(self, count: int) -> None:
        """Say that ``count`` more rows were written."""
        self._halves += count
        self._say(self._halves // 2)

    def end(self) -> None:
        """Say that rows which were left out are done too."""
        self._say(self._rows)

    def _say(self, done: int) -> None:
        if self._on_progress is not None and done > self._said:
            self._on_progress(done - self._said)
            self._said = done


class Spool:
    """Rows on their way, sorted by partition in runs on disk: files without a name, in an existing folder."""

    def __init__(self, folder: Path, *, slices: int, budget_bytes: int) -> None:
        self._folder = folder
        self._slices = slices
        self._budget_bytes = budget_bytes
        self._waiting: list[Arrivals] = []
        self._waiting_bytes = 0
        self._runs: list[paipc.RecordBatchFileReader] = []
        self._places: defaultdict[int, list[tuple[int, int]]] = defaultdict(list)
        self._open = contextlib.ExitStack()

    def close(self) -> None:
        """Close the runs."""
        self._open.close()

    def add(self, arrived: Arrivals) -> None:
        """Take rows in, and spool what waits if it fills the budget."""
        if self._waiting and self._waiting[0].batch.schema != arrived.batch.schema:
            self.flush()  # a second source may keep its vectors in another type
        self._waiting.append(arrived)
        self._waiting_bytes += arrived.batch.nbytes
        if self._waiting_bytes >= self._budget_bytes:
            self.flush()

    def flush(self) -> None:
        """Spool what waits as one run: one record batch for each partition."""
        if not self._waiting:
            return
        code_N = np.concatenate([self._code(a.shard_N, a.slice_N) for a in self._waiting])
        table = pa.Table.from_batches([a.batch for a in self._waiting])
        self._waiting, self._waiting_bytes = [], 0
        order = np.argsort(code_N, kind="stable")
        table = table.take(pa.array(order)).combine_chunks()
        code_N = code_N[order]
        starts = np.flatnonzero(np.diff(code_N, prepend=-1))
        # Without a name: when this process ends, however it ends, nobody's rows are left.
        file = tempfile.TemporaryFile(dir=self._folder)  # noqa: SIM115 - closed by close
        self._open.push(file)
        with paipc.new_file(file, table.schema) as writer:
            for index, (start, end) in enumerate(zip(starts, [*starts[1:], len(code_N)], strict=True)):
                self._places[int(code_N[start])].append((len(self._runs), index))
                writer.write_batch(table.slice(start, end - start).to_batches()[0])
        file.flush()
        stream = self._open.enter_context(pa.OSFile(f"/proc/self/fd/{file.fileno()}"))
        self._runs.append(self._open.enter_context(paipc.open_file(stream)))

    def holds(self, shard: int, slice_: int) -> bool:
        """Tell whether a partition has rows."""
        return self._key(shard, slice_) in self._places

    def pieces(self, shard: int, slice_: int) -> Iterator[pa.RecordBatch]:
        """Read the rows of a partition, piece by piece."""
        for run, index in self._places[self._key(shard, slice_)]:
            batch = self._runs[run].get_batch(index)
            for start in range(0, batch.num_rows, PIECE_ROWS):
                yield batch.slice(start, PIECE_ROWS)

    def _key(self, shard: int, slice_: int) -> int:
        return shard * (self._slices + 1) + slice_

    def _code(self, shard_N: NDArray[np.int32], slice_N: NDArray[np.int32]) -> NDArray[np.int64]:
        return shard_N.astype(np.int64) * (self._slices + 1) + slice_N
