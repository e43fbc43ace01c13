"""Reading a partition that may not fit in memory: batch by batch, as it lies in its file, with every check.

What :func:`sisa.records.partition.read_partition` verifies is verified here too: the seal over the whole file, the
checksums of pages, types, and the content digest of each row. Rows come as they lie; who is in the slice, and the
canonical order, are known at the end. Until then nothing may be made of them.

In memory are a batch, 32 bytes of each record for its digests, and some 40 more while they are sorted.

Shape suffixes: N records, 16 bytes of a digest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as papq
from numpy.typing import NDArray

from sisa.layout import Layout
from sisa.lineage import canonical_order, membership
from sisa.recipe import Recipe
from sisa.records.digest import DIGEST_BYTES, content_digests, id_digests
from sisa.records.names import CONTENT, RECORD
from sisa.records.partition import file_numbers_of, partition_key, several_keys
from sisa.records.parts import row_bytes
from sisa.records.rowfile import damaged, schema_problem, stored_digests
from sisa.records.seal import check_seal
from sisa.routing.keys import ShardKeys
from sisa.storage import Storage

BATCH_BYTES = 1 << 22
"""Bytes of decoded rows read at a time, roughly."""
MOST_ROWS = 1 << 14
BUFFER_BYTES = 1 << 18
"""Bytes of each column's pages that are read ahead: without it all of a row group's would be."""


@dataclass(frozen=True)
class SliceRead:
    """What is known of a slice when all of its rows were read and verified."""

    order_N: NDArray[np.int64]
    """Where the records lie in the slice's files, in canonical order."""
    membership: str
    """Digest of who is in the slice and what their records say."""


def read_batches(
    layout: Layout, recipe: Recipe, keys: ShardKeys, slice_: int, take: Callable[[pa.Table], None]
) -> SliceRead:
    """Read a slice of the keys' shard, and hand over its rows as they come.

    Args:
        layout: The store.
        recipe: Its resolved recipe.
        keys: Keys of the shard.
        slice_: 1..R.
        take: Is given canonical records, batch by batch.

    Raises:
        DamagedError: The file is unreadable, or a row isn't what was written.
    """
    ids, contents = _Digests(), _Digests()
    for part, table, count in _batches(layout, recipe, keys.shard, slice_):
        key = partition_key(layout, keys.shard, slice_, *part)
        file_numbers_of(keys, key, table, *part)
        try:
            stored_N16 = stored_digests(table[CONTENT])
            ids.add(id_digests(keys, table[RECORD]), of=count)
            contents.add(content_digests(keys, table, recipe), of=count)
        except (pa.ArrowException, ValueError, IndexError) as error:
            raise damaged(key, "its rows can't be decoded") from error
        if not np.array_equal(contents.last_N16, stored_N16):
            raise damaged(key, "the content of a row is not what was written")
        take(table.drop_columns([CONTENT]))
    return SliceRead(canonical_order(ids.all), membership(ids.all, contents.all))


def count_values(layout: Layout, recipe: Recipe, shard: int, slice_: int) -> dict[str, int]:
    """Count the values that each categorical feature has in a slice; contents are not verified.

    Raises:
        DamagedError: The file is unreadable, or its pages don't fit their checksums.
    """
    names = [name for name in recipe.data.features if recipe.data.columns[name].type == "categorical"]
    values: dict[str, set[str]] = {name: set() for name in names}
    for _, table, _ in _batches(layout, recipe, shard, slice_, columns=names):
        for name in names:
            values[name].update(table[name].unique().drop_null().to_pylist())
    return {name: len(found) for name, found in values.items()}


class _Digests:
    """Digests of a slice's records, in memory for as many as its files say they have."""

    def __init__(self) -> None:
        self._room_N16 = np.empty((0, DIGEST_BYTES), np.uint8)
        self._filled = 0
        self.last_N16 = self._room_N16

    def add(self, digests_N16: NDArray[np.uint8], *, of: int) -> None:
        """Take those of the next records; the file that they are from says that it has so many."""
        filled = self._filled + len(digests_N16)
        if filled > len(self._room_N16):
            self._room_N16.resize((max(filled, self._filled + of), DIGEST_BYTES), refcheck=False)
        self._room_N16[self._filled : filled] = digests_N16
        self._filled = filled
        self.last_N16 = digests_N16

    @property
    def all(self) -> NDArray[np.uint8]:
        """Those of all records so far; void when more are taken."""
        return self._room_N16[: self._filled]


def _batches(
    layout: Layout, recipe: Recipe, shard: int, slice_: int, columns: list[str] | None = None
) -> Iterator[tuple[tuple[int, int], pa.Table, int]]:
    """Yield batches of a slice: of which file of how many, rows, and how many the file has; none if there are no rows."""
    try:
        for table, count in _tables(layout.storage, partition_key(layout, shard, slice_), recipe, columns):
            yield (0, 1), table, count
    except FileNotFoundError:  # also if its last rows were erased this very moment
        pass
    else:
        return
    keys = several_keys(layout, shard, slice_)
    for number, key in enumerate(keys):
        try:
            for table, count in _tables(layout.storage, key, recipe, columns):
                yield (number, len(keys)), table, count
        except FileNotFoundError:
            raise damaged(key, "it is missing") from None


def _tables(
    storage: Storage, key: str, recipe: Recipe, columns: list[str] | None = None
) -> Iterator[tuple[pa.Table, int]]:
    """Yield batches of a sealed file, and how many rows it has.

    Raises:
        FileNotFoundError: There is none.
        DamagedError: It is unreadable.
    """
    try:
        with storage.opened(key) as stream:
            check_seal(stream)
            file = papq.ParquetFile(stream, page_checksum_verification=True, pre_buffer=False, buffer_size=BUFFER_BYTES)
            problem = schema_problem(file.schema_arrow, recipe)
            if problem:
                raise damaged(key, problem)
            rows = min(MOST_ROWS, max(1, BATCH_BYTES // row_bytes(recipe)))
            for batch in file.iter_batches(batch_size=rows, columns=columns, use_threads=False):
                batch.validate(full=True)
                yield pa.table(batch), file.metadata.num_rows
    except FileNotFoundError:
        raise
    except (pa.ArrowException, OSError, ValueError, KeyError, MemoryError, OverflowError) as error:
        raise damaged(key, "it is unreadable, or its bytes don't fit its checksums") from error
