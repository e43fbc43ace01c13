"""Records of a shard whose rows wait elsewhere, and scalers fitted to them, in memory that doesn't grow with their number.

Fitting gives the very bits of :meth:`sisa.learners.preprocess.Preprocessor.fit`, which adds up whole columns: numpy adds
pairwise, cutting a column in halves until a piece is short. The same tree of halves is walked here with a piece in memory
at a time. A numpy that cuts otherwise is refused.

Shape suffixes: N records, B records of a block, W bytes of a row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from sisa.errors import DamagedError, UserError
from sisa.learners.columns import MISSING, Array, Categories, Columns, feature_specs
from sisa.learners.packed import RowFormat
from sisa.learners.preprocess import Preprocessor
from sisa.recipe import ColumnSpec, Recipe

FIT_BYTES = 1 << 22
"""Bytes of values, as float64, that are fitted at a time. Another number gives the same bits."""
SHORTEST_PIECE, LONGEST_PIECE = 128, 1 << 16
"""Numbers that are added up by one call of numpy; it cuts in halves what is longer than the shortest."""


@dataclass(frozen=True)
class StreamedRows:
    """Records in canonical order; in memory are 16 bytes of each."""

    format: RowFormat
    take: Callable[[Array], Array]
    """Fetches rows by their places: (B,) to (B, W)."""
    values: tuple[tuple[str, ...], ...]
    """The values of each categorical feature."""
    places_N: Array
    """int64: where the rows wait."""
    uids_N: Array
    """uint64 keyed hashes that decide the order within an epoch."""
    first: int
    """Records of the first slice that has any."""

    @property
    def count(self) -> int:
        """Number of records."""
        return len(self.uids_N)

    def rows(self, which_B: slice | Array) -> Columns:
        """Fetch some records.

        Raises:
            DamagedError: A row is not what was put there.
        """
        places_B = self.places_N[which_B]
        rows_BW = self.take(places_B)
        if not self.format.whole(rows_BW, places_B):
            raise DamagedError(
                "a row that waited on disk for its batch is not what was written there",
                hint="The disk or the memory of this machine is bad. Run the command again, elsewhere: the records are unhurt.",
            )
        return self.format.unpack(rows_BW, self.values)

    def fit(self, recipe: Recipe) -> Preprocessor:
        """Take declared scalers and vocabularies, and the others from the first slice that has records.

        Raises:
            DamagedError: A row is not what was put there.
            UserError: This numpy adds up in another order than the one this was written for.
        """
        specs = [spec for _, spec in feature_specs(recipe)]
        numeric = [spec for spec in specs if spec.type == "numeric"]
        vector = [spec for spec in specs if spec.type == "vector"]
        categorical = [spec for spec in specs if spec.type == "categorical"]
        sums = [_Scaling(spec, size=1) for spec in numeric]
        sums += [_Scaling(spec, size=spec.size or 1) for spec in vector]
        fitted = [(index, one) for index, one in enumerate(sums) if one.wanted]
        if fitted:
            _require_known_sums()
        used: list[set[int]] = [set() for _ in categorical]
        for step in ("look", "mean", "std"):
            for one in sums:
                one.begin(step, columns=len(numeric))
            for block in self._first_blocks() if fitted or (categorical and step == "look") else ():
                for index, one in fitted:
                    one.add(block.numeric_NP[:, index] if index < len(numeric) else block.vectors[index - len(numeric)])
                if step == "look":
                    for codes, column in zip(used, block.categories, strict=True):
                        codes.update(np.unique(column.codes_N).tolist())
            for one in sums:
                one.end(step)
        scales = [one.scale for one in sums]
        kept = [
            Categories(np.array(sorted(codes), np.int32), values)
            for codes, values in zip(used, self.values, strict=True)
        ]
        return Preprocessor.fitted(
            recipe, numeric=scales[: len(numeric)], vector=scales[len(numeric) :], categories=kept
        )

    def _first_blocks(self) -> Iterator[Columns]:
        elements = self.format.numeric + sum(self.format.sizes) + self.format.categories
        step = max(1, FIT_BYTES // (8 * max(1, elements)))
        for start in range(0, self.first, step):
            yield self.rows(slice(start, min(start + step, self.first)))

    def known(self, vocabularies: Sequence[tuple[str, ...]]) -> StreamedRows:
        """Return the same records with no more values than a vocabulary has, and one that it doesn't know."""
        return _Known(self.format, self.take, self.values, self.places_N, self.uids_N, self.first, tuple(vocabularies))


@dataclass(frozen=True)
class _Known(StreamedRows):
    """Translates codes by a table that is made once: to make one for each block would take longer than the block."""

    vocabularies: tuple[tuple[str, ...], ...]

    @cached_property
    def _tables(self) -> list[tuple[Array, tuple[str, ...]]]:
        return [_known(values, known) for values, known in zip(self.values, self.vocabularies, strict=True)]

    def rows(self, which_B: slice | Array) -> Columns:
        """Fetch some records."""
        plain = super().rows(which_B)
        columns = zip(plain.categories, self._tables, strict=True)
        categories = tuple(Categories(table[column.codes_N], values) for column, (table, values) in columns)
        return Columns(plain.numeric_NP, categories, plain.vectors, plain.labels_N, plain.uids_N, plain.slices_N)


def _known(values: tuple[str, ...], vocabulary: tuple[str, ...]) -> tuple[Array, tuple[str, ...]]:
    codes = {value: code for code, value in enumerate(vocabulary)}
    unknown = [value for value in values if value not in codes][:1]
    return np.array([*(codes.get(value, len(codes)) for value in values), MISSING], np.int32), (*vocabulary, *unknown)


class _Scaling:
    """Mean and standard deviation of one feature, in three passes over its values."""

    def __init__(self, spec: ColumnSpec, *, size: int) -> None:
        declared = spec.mean is not None and spec.std is not None
        self.wanted = not declared
        self.scale = (spec.mean or 0.0, spec.std or 1.0) if declared else (0.0, 1.0)
        self._size = size
        self._count = 0
        self._least, self._most, self._first = np.inf, -np.inf, 0.0
        self._mean: float | None = None
        self._sum: PairwiseSum | None = None

    def begin(self, step: str, *, columns: int) -> None:
        """Begin a pass."""
        looked = step != "look" and self.wanted and self._count > 0 and self._least != self._most
        if looked:
            piece = LONGEST_PIECE if self._size > 1 else (1 << 21) // max(1, columns)
            self._sum = PairwiseSum(self._count, piece=max(SHORTEST_PIECE, min(LONGEST_PIECE, piece)))

    def add(self, values: Array) -> None:
        """Take the values of some records, in canonical order."""
        present = np.array(values, np.float64, order="C").reshape(-1)
        if values.dtype != np.uint8:
            finite = np.isfinite(present)
            present = present if finite.all() else present[finite]
        if not present.size:
            return
        with np.errstate(over="ignore", invalid="ignore"):
            if self._sum is None:
                self._first = self._first if self._count else float(present[0])
                self._count += present.size
                self._least, self._most = min(self._least, present.min()), max(self._most, present.max())
            elif self._mean is None:
                self._sum.add(present)
            else:
                present -= self._mean
                self._sum.add(np.square(present, out=present))

    def end(self, step: str) -> None:
        """End a pass."""
        if step == "look" and self.wanted and self._count and self._least == self._most:
            self.scale = (self._first, 1.0)
        if self._sum is None:
            return
        with np.errstate(over="ignore", invalid="ignore"):
            mean = float(self._sum.total() / self._count)
            if step == "mean":
                self._mean = mean
                return
            std = float(np.sqrt(np.float64(mean)))
        assert self._mean is not None
        fits = np.isfinite(self._mean) and np.isfinite(std) and std > 0
        self.scale = (self._mean, std) if fits else (0.0, 1.0)


class PairwiseSum:
    """The sum of numbers that come in pieces, bit for bit what numpy gives for them in one array."""

    def __init__(self, count: int, *, piece: int) -> None:
        """Expect numbers.

        Args:
            count: How many.
            piece: How many are in memory, at least 128.
        """
        self._leaves = _leaves(count, piece)
        self._waiting = np.empty(min(count, piece))
        self._filled = 0
        self._size, self._depth = next(self._leaves)
        self._sums: list[tuple[int, np.float64]] = []

    def add(self, numbers: Array) -> None:
        """Take the next ones."""
        start = 0
        while start < len(numbers):
            part = numbers[start : start + self._size - self._filled]
            self._waiting[self._filled : self._filled + len(part)] = part
            self._filled += len(part)
            start += len(part)
            if self._filled == self._size:
                self._push(np.add.reduce(self._waiting[: self._size]))

    def _push(self, total: np.float64) -> None:
        depth = self._depth
        while self._sums and self._sums[-1][0] == depth:  # the left half of which this is the right one
            total = self._sums.pop()[1] + total
            depth -= 1
        self._sums.append((depth, total))
        self._filled = 0
        self._size, self._depth = next(self._leaves, (0, 0))

    def total(self) -> np.float64:
        """Return the sum; all numbers were given."""
        if [depth for depth, _ in self._sums] != [0]:
            raise ValueError("numbers are missing")
        return self._sums[0][1]


def _leaves(count: int, piece: int, depth: int = 0) -> Iterator[tuple[int, int]]:
    """Yield size and depth of each piece, left to right, as numpy's pairwise summation cuts (``pairwise_sum``)."""
    if count <= piece:
        yield count, depth
        return
    left = count // 2
    left -= left % 8
    yield from _leaves(left, piece, depth + 1)
    yield from _leaves(count - left, piece, depth + 1)


def _require_known_sums() -> None:
    numbers = np.random.default_rng(0).normal(size=10_007)
    pieces = PairwiseSum(len(numbers), piece=SHORTEST_PIECE)
    pieces.add(numbers)
    if pieces.total() != np.add.reduce(numbers):
        raise UserError(
            "workers.rows_in_memory: this version of numpy adds up in another order than scalers are fitted in here, "
            "so that streamed rows would give other bits",
            hint="Set workers.rows_in_memory: always, or declare mean and std of the features.",
        )
