"""Rows on their way into partitions, sorted in runs on disk.

A run is written when what waits fills a budget. In it the rows of a partition lie together, in the order of the first bits of
their subjects' hashes, cut into batches of about FINE rows; so the rows of one file of a partition are a few whole
batches of each run, however many files it gets: that is known only when all rows have come.
"""

from __future__ import annotations

import contextlib
import tempfile
import threading
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.ipc as paipc
from numpy.typing import NDArray

from sisa.records.arrivals import Arrivals
from sisa.records.names import SUBJECT
from sisa.records.parts import first_bits, numbers_of, subject_hashes
from sisa.routing.keys import ShardKeys, shard_keys

FINE = 2048
"""Rows of a partition that a run keeps together, about."""


@dataclass(frozen=True)
class _Piece:
    """The rows of one partition in one run."""

    run: int
    first: int
    """Number of its first batch in the run."""
    bits: int
    """It has 2 to the power of this many batches, told apart by the first bits of subjects' hashes."""
    rows: int


class Spool:
    """Rows on their way, sorted by partition in runs on disk: files without a name, in an existing folder."""

    def __init__(self, folder: Path, *, slices: int, budget_bytes: int, routing_key: bytes) -> None:
        self.folder = folder
        """Where runs lie."""
        self._slices = slices
        self._budget_bytes = budget_bytes
        self._keys = lru_cache(maxsize=None)(lambda shard: shard_keys(routing_key, shard))
        self._waiting: list[Arrivals] = []
        self._waiting_bytes = 0
        self._runs: list[paipc.RecordBatchFileReader] = []
        self._pieces: defaultdict[int, list[_Piece]] = defaultdict(list)
        self._open = contextlib.ExitStack()
        self._reading = threading.Lock()

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
        """Spool what waits as one run."""
        if not self._waiting:
            return
        code_N = np.concatenate([self._code(a.shard_N, a.slice_N) for a in self._waiting])
        table = pa.Table.from_batches([a.batch for a in self._waiting])
        self._waiting, self._waiting_bytes = [], 0
        order = np.argsort(code_N, kind="stable")
        code_N = code_N[order]
        starts = np.flatnonzero(np.diff(code_N, prepend=-1)).tolist()
        places = list(zip(code_N[starts].tolist(), starts, [*starts[1:], len(code_N)], strict=True))
        cuts = {code: self._refine(table, order, code, start, end) for code, start, end in places}
        table = table.take(pa.array(order)).combine_chunks()
        written = 0
        # Without a name: when this process ends, however it ends, nobody's rows are left.
        with tempfile.TemporaryFile(dir=self.folder) as file:
            with paipc.new_file(file, table.schema) as writer:
                for code, start, end in places:
                    counts = cuts[code]
                    bits = len(counts).bit_length() - 1
                    self._pieces[code].append(_Piece(len(self._runs), written, bits, end - start))
                    for at, count in zip(np.cumsum([start, *counts]).tolist(), counts, strict=False):
                        writer.write_batch(_batch(table.slice(at, count)))
                    written += len(counts)
            file.flush()
            stream = self._open.enter_context(pa.OSFile(f"/proc/self/fd/{file.fileno()}"))
        self._runs.append(self._open.enter_context(paipc.open_file(stream)))

    def _refine(self, table: pa.Table, order: NDArray[np.int64], code: int, start: int, end: int) -> list[int]:
        """Put the rows of one partition, in ``order``, in the order of their hashes; return how many a batch gets."""
        bits = max(0, (-(-(end - start) // FINE) - 1).bit_length())
        if not bits:
            return [end - start]
        subjects = table[SUBJECT].take(pa.array(order[start:end]))
        hash_N = subject_hashes(self._keys(code // (self._slices + 1)), pa.concat_arrays(subjects.chunks))
        number_N = first_bits(hash_N, bits)
        order[start:end] = order[start:end][np.argsort(number_N, kind="stable")]
        counts: list[int] = np.bincount(number_N, minlength=1 << bits).tolist()
        return counts

    def rows(self, shard: int, slice_: int) -> int:
        """Return how many rows a partition has."""
        return sum(piece.rows for piece in self._pieces.get(self._key(shard, slice_), ()))

    def batches(self, keys: ShardKeys, slice_: int, number: int, of: int) -> Iterator[pa.RecordBatch]:
        """Read the rows of one of a partition's files, a few at a time; many may read."""
        file_bits = of.bit_length() - 1
        for piece in self._pieces.get(self._key(keys.shard, slice_), ()):
            finer = piece.bits - file_bits
            first, count = (number << finer, 1 << finer) if finer >= 0 else (number >> -finer, 1)
            for index in range(first, first + count):
                with self._reading:
                    batch = self._runs[piece.run].get_batch(piece.first + index)
                if finer < 0:
                    batch = batch.filter(pa.array(numbers_of(keys, batch.column(SUBJECT), of) == number))
                if batch.num_rows:
                    yield batch

    def _key(self, shard: int, slice_: int) -> int:
        return shard * (self._slices + 1) + slice_

    def _code(self, shard_N: NDArray[np.int32], slice_N: NDArray[np.int32]) -> NDArray[np.int64]:
        return shard_N.astype(np.int64) * (self._slices + 1) + slice_N


def _batch(table: pa.Table) -> pa.RecordBatch:
    batches = table.to_batches()
    return batches[0] if batches else pa.RecordBatch.from_pylist([], schema=table.schema)
