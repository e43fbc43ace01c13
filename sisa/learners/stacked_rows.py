"""The rows of one batch as several constituents see them, scaled for all of them at once.

Each has scalers and vocabularies of its own. Numbers are scaled by the same operations, in the same order, as
:meth:`sisa.learners.preprocess.Preprocessor.transform` does it, so they have the same bits. Where vocabularies differ
in size, a feature takes as many places as the largest needs; nobody's row uses the places that are not its own.

Shape suffixes: S constituents (1 where all see the same), B rows, P neighbouring numeric features, D elements of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, pairwise

import numpy as np
import torch

from sisa.learners.columns import Array, Categories, Columns
from sisa.learners.preprocess import FIRST_CODE, MISSING_CODE, UNKNOWN_CODE, Preprocessor

BLOCK_ELEMENTS = 1 << 16
"""Elements scaled at a time, for one constituent or for several."""
FAR_FROM_OVERFLOW = 1e38
"""Below the largest number of float32."""


def structure(preprocessor: Preprocessor) -> tuple[object, ...]:
    """Return what two preprocessors must have in common for their rows to be stacked."""
    return preprocessor.kinds, preprocessor.sizes, preprocessor.image_shape


class RowStack:
    """The scalers and vocabularies of constituents whose rows have one :func:`structure`."""

    def __init__(self, preprocessors: Sequence[Preprocessor]) -> None:
        first = preprocessors[0]
        self.shared = all(same_rows(first, other) for other in preprocessors[1:])
        """Whether every constituent sees the same rows."""
        own = preprocessors[:1] if self.shared else preprocessors
        self._widths = tuple(max(widths) for widths in zip(*(p.widths for p in own), strict=True))
        ends = np.concatenate([[0], np.cumsum(self._widths)]).astype(int).tolist()
        self._starts: list[int] = ends[:-1]
        self._width: int = ends[-1]
        self._kinds = first.kinds
        self._image_shape = first.image_shape
        numeric_S2P, vector_S2V = (
            np.stack([p.numeric_scale_2P for p in own]),
            np.stack([p.vector_scale_2V for p in own]),
        )
        self._vocabularies = [_Vocabulary.of(texts) for texts in zip(*(p.vocabularies for p in own), strict=True)]
        self._every_S1 = np.arange(len(own))[:, None]
        self._runs = [
            (start, first, last, _Scale.of(numeric_S2P[:, :, first:last]))
            for start, first, last in _runs(self._starts_of("numeric"))
        ]
        self._vector_scales = [_Scale.of(vector_S2V[:, :, v : v + 1]) for v in range(vector_S2V.shape[2])]
        self._pixels = [_pixel_table(scale.scale_S2P[:, :, 0]) for scale in self._vector_scales]
        self._starts_of_vectors, self._starts_of_categories = self._starts_of("vector"), self._starts_of("categorical")
        self.places = [self._places(p) for p in preprocessors]
        """For each constituent, where each element of its own row lies in the common one."""

    @property
    def width(self) -> int:
        """Elements of the common row."""
        return self._width

    def rows(self, columns: Columns) -> torch.Tensor:
        """Return X_SBD, float32; the pixels of an image channels last, as they come."""
        make = np.zeros if "categorical" in self._kinds else np.empty
        out_SBD: Array = make((len(self._every_S1), columns.count, self._width), np.float32)
        with np.errstate(over="ignore", invalid="ignore"):
            self._numbers(columns, out_SBD)
            self._vectors(columns, out_SBD)
        self._categories(columns, out_SBD)
        return torch.from_numpy(out_SBD)

    def _numbers(self, columns: Columns, out_SBD: Array) -> None:
        for start, first, last, scale in self._runs:
            values_BP = np.ascontiguousarray(columns.numeric_NP[:, first:last])
            scale.write(values_BP, out_SBD[:, :, start : start + last - first])

    def _vectors(self, columns: Columns, out_SBD: Array) -> None:
        for index, (start, values) in enumerate(zip(self._starts_of_vectors, columns.vectors, strict=True)):
            part_SBD = out_SBD[:, :, start : start + values.shape[1]]
            if values.dtype == np.uint8:
                for table, part_BD in zip(self._pixels[index], part_SBD, strict=True):
                    part_BD[:] = table.take(values, mode="clip")
            else:
                self._vector_scales[index].write(values, part_SBD)

    def _categories(self, columns: Columns, out_SBD: Array) -> None:
        rows_B = np.arange(columns.count)
        for start, column, vocabulary in zip(
            self._starts_of_categories, columns.categories, self._vocabularies, strict=True
        ):
            out_SBD[self._every_S1, rows_B, start + vocabulary.codes(column)] = 1.0

    def _starts_of(self, wanted: str) -> list[int]:
        return [start for kind, start in zip(self._kinds, self._starts, strict=True) if kind == wanted]

    def _places(self, preprocessor: Preprocessor) -> Array:
        parts = [np.arange(s, s + w) for s, w in zip(self._starts, preprocessor.widths, strict=True)]
        return np.concatenate(parts) if parts else np.zeros(0, np.int64)


def same_rows(one: Preprocessor, other: Preprocessor) -> bool:
    """Say whether two preprocessors of one structure make the same rows of the same records."""
    return one is other or (
        np.array_equal(one.numeric_scale_2P, other.numeric_scale_2P)
        and np.array_equal(one.vector_scale_2V, other.vector_scale_2V)
        and one.vocabularies == other.vocabularies
    )


def _runs(starts: list[int]) -> list[tuple[int, int, int]]:
    """Group numeric features that are neighbours: (where in a row, first, one past the last)."""
    breaks = [0, *(i for i in range(1, len(starts)) if starts[i] != starts[i - 1] + 1), len(starts)]
    return [(starts[first], first, last) for first, last in pairwise(breaks) if last > first]


@dataclass(frozen=True)
class _Scale:
    """Means and standard deviations of a few elements with each constituent."""

    scale_S2P: Array
    largest_mean: float
    smallest_std: float

    @classmethod
    def of(cls, scale_S2P: Array) -> _Scale:
        means, stds = scale_S2P[:, 0], scale_S2P[:, 1]
        return cls(scale_S2P, float(np.abs(means).max(initial=0.0)), float(stds.min(initial=np.inf)))

    def write(self, values_BP: Array, out_SBP: Array) -> None:
        """Write (x - mean) / std, computed in float64, for every constituent; 0 where that isn't a finite number."""
        scale_S2P = self.scale_S2P
        step = min(len(scale_S2P), max(1, BLOCK_ELEMENTS // max(1, values_BP.size)))
        block_SBP = np.empty((step, len(values_BP), out_SBP.shape[2]))
        for start in range(0, len(scale_S2P), step):
            scale_s2P = scale_S2P[start : start + step]
            block_sBP = np.subtract(values_BP, scale_s2P[:, :1], out=block_SBP[: len(scale_s2P)], dtype=np.float64)
            block_sBP /= scale_s2P[:, 1:]
            out_SBP[start : start + step] = block_sBP
        if not self._surely_finite(values_BP):
            out_SBP[~np.isfinite(out_SBP)] = 0.0

    def _surely_finite(self, values_BP: Array) -> bool:
        """Say whether no scaled value can be beyond float32, without looking at each of them."""
        if not values_BP.size:
            return True
        largest = max(abs(float(values_BP.max())), abs(float(values_BP.min())))  # not a number if one isn't
        return largest + self.largest_mean < FAR_FROM_OVERFLOW * self.smallest_std


def _pixel_table(scale_S2: Array) -> Array:
    """What each uint8 value becomes, float32: (S, 256)."""
    with np.errstate(over="ignore"):
        table_SU = np.asarray((np.arange(256, dtype=np.float64) - scale_S2[:, :1]) / scale_S2[:, 1:], np.float32)
    table_SU[~np.isfinite(table_SU)] = 0.0
    return table_SU


@dataclass(frozen=True)
class _Vocabulary:
    """The values of one categorical feature, and their codes with each constituent."""

    lines: dict[str, int]
    """Where in the table a value stands."""
    codes_VS: Array
    """The last two lines are those of unknown values and of missing ones."""

    @classmethod
    def of(cls, vocabularies: Sequence[Sequence[str]]) -> _Vocabulary:
        lines = {value: line for line, value in enumerate(dict.fromkeys(chain(*vocabularies)))}
        codes_VS = np.full((len(lines) + 2, len(vocabularies)), UNKNOWN_CODE)
        codes_VS[-1] = MISSING_CODE
        for index, values in enumerate(vocabularies):
            for code, value in enumerate(values, FIRST_CODE):
                codes_VS[lines[value], index] = code
        return cls(lines, codes_VS)

    def codes(self, column: Categories) -> Array:
        """Return codes_SB."""
        unknown = len(self.lines)
        lines = [self.lines.get(value, unknown) for value in column.values]
        lines_V = np.array([*lines, unknown + 1])  # the code of a missing value, -1, picks the last
        codes_SB: Array = self.codes_VS[lines_V[column.codes_N]].T
        return codes_SB
