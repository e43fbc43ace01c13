"""Where the batches of an epoch come from: all rows preprocessed on the device, or some of them at a time.

Both give a model the same batches with the same bits. Streamed rows are fetched and preprocessed a block of batches at a
time, in the order of the epoch.

Shape suffixes: N records, D elements of a row, B batch.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from typing import Protocol, TypeAlias

import torch

from sisa.learners.columns import Array, Columns
from sisa.learners.preprocess import Preprocessor
from sisa.learners.resident import Resident
from sisa.learners.streamed import StreamedRows
from sisa.recipe import Recipe

Batches: TypeAlias = Generator[tuple[torch.Tensor, torch.Tensor], None, None]
Rows: TypeAlias = Columns | StreamedRows
BLOCK_BYTES = 1 << 22
"""Bytes of preprocessed rows of a block. Another number gives the same bits."""


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
    """A block of rows is there at a time."""

    def __init__(self, rows: StreamedRows, preprocessor: Preprocessor, *, recipe: Recipe, device: torch.device) -> None:
        self._rows = rows.known(preprocessor.vocabularies)
        self._preprocessor = preprocessor
        self._recipe = recipe
        self._device = device
        self._width = sum(preprocessor.widths)
        self._room_ND = torch.empty((0, self._width))
        self.resident = self._placed(self._room_ND)

    def epoch(self, order_N: Array, sizes: list[int], *, first: int) -> Batches:
        for start, stop, batches in _blocks(sizes, first=first, most=BLOCK_BYTES // (4 * max(1, self._width))):
            labels_N = self._fetch(order_N[start:stop])
            places_N = torch.arange(len(labels_N), device=self._device)
            yield from zip(torch.split(places_N, batches), torch.split(labels_N, batches), strict=True)

    def _fetch(self, which_N: Array) -> torch.Tensor:
        """Put a block of rows in the place of the one before it; return its labels."""
        columns = self._rows.rows(which_N)
        if len(self._room_ND) < columns.count:  # kept from block to block: fresh memory costs more than all the rest
            self._room_ND = torch.empty((columns.count, self._width))
        rows_ND = self._room_ND[: columns.count]
        if self._rows.values:
            rows_ND.zero_()  # of a category only the one that is there is written
        self._preprocessor.transform(columns, out_ND=rows_ND.numpy())
        self.resident.rows_ND = self._placed(rows_ND).rows_ND
        return torch.tensor(columns.labels_N, device=self._device)

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
