"""Where the batches of an epoch come from: all rows preprocessed on the device, or some of them at a time.

Both give a model the same batches with the same bits. Streamed rows are fetched and preprocessed a block of batches at a
time, in the order of the epoch; while the model is trained on one block, a thread makes the next one ready.

Shape suffixes: N records, D elements of a row, B batch.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol, TypeAlias

import torch

from sisa.learners.columns import Array, Columns
from sisa.learners.preprocess import Preprocessor
from sisa.learners.resident import Resident
from sisa.learners.streamed import StreamedRows
from sisa.recipe import Recipe

Batches: TypeAlias = Generator[tuple[torch.Tensor, torch.Tensor], None, None]
Rows: TypeAlias = Columns | StreamedRows
_Block: TypeAlias = tuple[torch.Tensor, torch.Tensor]
"""Preprocessed rows and their labels."""
BLOCK_BYTES = 1 << 22
"""Bytes of preprocessed rows of a block; two are there at a time. Another number gives the same bits."""


class Feed(Protocol):
    """The rows that a stage is trained on."""

    resident: Resident
    """What batches are cut from; its rows change from block to block."""

    def epoch(self, order_N: Array, sizes: list[int], *, first: int) -> Batches:
        """Yield indices into ``resident`` and labels of each batch, from batch ``first`` on.

        Args:
            order_N: The order in which the epoch takes records.
            sizes: Records of each batch.
            first: How many batches lie behind.
        """


def feed_of(rows: Rows, preprocessor: Preprocessor, *, recipe: Recipe, device: torch.device) -> Feed:
    """Choose the way for the rows."""
    if isinstance(rows, Columns):
        return _Whole(rows, preprocessor, recipe=recipe, device=device)
    return _Streamed(rows, preprocessor, recipe=recipe, device=device)


class _Whole:
    """All rows are there."""

    def __init__(self, columns: Columns, preprocessor: Preprocessor, *, recipe: Recipe, device: torch.device) -> None:
        self.resident = Resident.of(columns, preprocessor, recipe=recipe, device=device)
        self._labels_N = torch.tensor(columns.labels_N, device=device)

    def epoch(self, order_N: Array, sizes: list[int], *, first: int) -> Batches:
        order = torch.tensor(order_N, device=self._labels_N.device)
        labels = self._labels_N.index_select(0, order)
        yield from zip(torch.split(order, sizes)[first:], torch.split(labels, sizes)[first:], strict=True)


class _Streamed:
    """A block of rows is there, and another one on its way."""

    def __init__(self, rows: StreamedRows, preprocessor: Preprocessor, *, recipe: Recipe, device: torch.device) -> None:
        self._rows = rows.known(preprocessor.vocabularies)
        self._preprocessor = preprocessor
        self._recipe = recipe
        self._device = device
        self._width = sum(preprocessor.widths)
        self._rooms = deque([torch.empty((0, self._width))] * 2)
        self.resident = self._placed(torch.zeros((0, self._width)))

    def epoch(self, order_N: Array, sizes: list[int], *, first: int) -> Batches:
        coming: deque[tuple[Future[_Block], list[int]]] = deque()
        with ThreadPoolExecutor(1, "sisa-rows") as ahead:
            for start, stop, batches in _blocks(sizes, first=first, most=BLOCK_BYTES // (4 * max(1, self._width))):
                coming.append((ahead.submit(self._fetch, order_N[start:stop]), batches))
                if len(coming) > 1:
                    yield from self._cut(*coming.popleft())
            while coming:
                yield from self._cut(*coming.popleft())

    def _cut(self, block: Future[_Block], batches: list[int]) -> Batches:
        self.resident.rows_ND, labels_N = block.result()
        places_N = torch.arange(len(labels_N), device=self._device)
        yield from zip(torch.split(places_N, batches), torch.split(labels_N, batches), strict=True)

    def _fetch(self, which_N: Array) -> _Block:
        columns = self._rows.rows(which_N)
        # Two blocks are there at a time, in memory that is kept: fresh memory costs more than what is done with it.
        if len(self._rooms[-1]) < columns.count:
            self._rooms[-1] = torch.empty((columns.count, self._width))
        self._rooms.rotate()
        rows_ND = self._rooms[0][: columns.count]
        if self._rows.values:
            rows_ND.zero_()  # of a category only the one that is there is written
        self._preprocessor.transform(columns, out_ND=rows_ND.numpy())
        return self._placed(rows_ND).rows_ND, torch.tensor(columns.labels_N, device=self._device)

    def _placed(self, rows_ND: torch.Tensor) -> Resident:
        shape = self._preprocessor.feature_shape
        return Resident.place(rows_ND, recipe=self._recipe, feature_shape=shape, device=self._device)


def _blocks(sizes: list[int], *, first: int, most: int) -> Iterator[tuple[int, int, list[int]]]:
    """Yield start and stop in the epoch's order, and sizes of batches, of each block: whole batches, at least one."""
    start = stop = sum(sizes[:first])
    batches: list[int] = []
    for size in sizes[first:]:
        if batches and stop + size - start > most:
            yield start, stop, batches
            start, batches = stop, []
        batches.append(size)
        stop += size
    if batches:
        yield start, stop, batches
