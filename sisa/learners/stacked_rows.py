"""The rows of one batch as several constituents see them, scaled for all of them at once.

Each has scalers and vocabularies of its own. Numbers are scaled by the same operations, in the same order, as
:meth:`sisa.learners.preprocess.Preprocessor.transform` does it, so they have the same bits. Where vocabularies differ
in size, a feature takes as many places as the largest needs; nobody's row uses the places that are not its own.

Shape suffixes: S constituents (1 where all see the same), B rows, P neighbouring numeric features, D elements of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

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
        self._numeric_scale_S2P = np.stack([p.numeric_scale_2P for p in own])
        self._vector_scale_S2V = np.stack([p.vector_scale_2V for p in own])
        self._pixels = [_pixel_table(self._vector_scale_S2V[:, :, v]) for v in range(self._vector_scale_S2V.shape[2])]
        self._codes = [_codes_of(vocabularies) for vocabularies in zip(*(p.vocabularies for p in own), strict=True)]
        self._every_S1 = np.arange(len(own))[:, None]
        self._runs = _runs([start for kind, start in zip(self._kinds, self._starts, strict=True) if kind == "numeric"])
        self.places = [self._places(p) for p in preprocessors]
        """For each constituent, where each element of its own row lies in the common one."""

    @property
    def width(self) -> int:
        """Elements of the common row."""
        return self._width

    def rows(self, columns: Columns) -> torch.Tensor:
        """Return X_SBD, float32; the pixels of an image channels last, as they come."""
        make = torch.zeros if "categorical" in self._kinds else torch.empty
        X_SBD = make((len(self._every_S1), columns.count, self._width), dtype=torch.float32, device="cpu")
        out_SBD = X_SBD.numpy()
        with np.errstate(over="ignore", invalid="ignore"):
            self._numbers(columns, out_SBD)
            self._vectors(columns, out_SBD)
        self._categories(columns, out_SBD)
        return X_SBD

    def _numbers(self, columns: Columns, out_SBD: Array) -> None:
        for start, first, last in self._runs:
            values_BP = np.ascontiguousarray(columns.numeric_NP[:, first:last])
            scale_S2P = self._numeric_scale_S2P[:, :, first:last]
            _scale_into(values_BP, scale_S2P, out_SBD=out_SBD[:, :, start : start + last - first])

    def _vectors(self, columns: Columns, out_SBD: Array) -> None:
        places = [start for kind, start in zip(self._kinds, self._starts, strict=True) if kind == "vector"]
        for index, (start, values) in enumerate(zip(places, columns.vectors, strict=True)):
            part_SBD = out_SBD[:, :, start : start + values.shape[1]]
            if values.dtype == np.uint8:
                for table, part_BD in zip(self._pixels[index], part_SBD, strict=True):
                    part_BD[:] = table.take(values, mode="clip")
            else:
                _scale_into(values, self._vector_scale_S2V[:, :, index : index + 1], out_SBD=part_SBD)

    def _categories(self, columns: Columns, out_SBD: Array) -> None:
        places = [start for kind, start in zip(self._kinds, self._starts, strict=True) if kind == "categorical"]
        rows_B = np.arange(columns.count)
        for start, column, known in zip(places, columns.categories, self._codes, strict=True):
            codes_SB = _codes(column, known, count=len(self._every_S1))
            out_SBD[self._every_S1, rows_B, start + codes_SB] = 1.0

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


def _scale_into(values_BP: Array, scale_S2P: Array, *, out_SBD: Array) -> None:
    """Write (x - mean) / std, computed in float64, for every constituent; 0 where that isn't a finite number."""
    step = min(len(scale_S2P), max(1, BLOCK_ELEMENTS // max(1, values_BP.size)))
    shape_BP = np.broadcast_shapes(values_BP.shape, scale_S2P.shape[2:])
    block_SBP = np.empty((step, *shape_BP))
    for start in range(0, len(scale_S2P), step):
        scale_s2P = scale_S2P[start : start + step]
        block_sBP = np.subtract(values_BP, scale_s2P[:, :1], out=block_SBP[: len(scale_s2P)], dtype=np.float64)
        block_sBP /= scale_s2P[:, 1:]
        out_SBD[start : start + step] = block_sBP
    if not _surely_finite(values_BP, scale_S2P):
        out_SBD[~np.isfinite(out_SBD)] = 0.0


def _surely_finite(values_BP: Array, scale_S2P: Array) -> bool:
    """Say whether no scaled value can be beyond float32, without looking at each of them."""
    if not values_BP.size:
        return True
    largest = max(abs(float(values_BP.max())), abs(float(values_BP.min())))  # not a number if one isn't
    return largest + float(np.abs(scale_S2P[:, 0]).max()) < FAR_FROM_OVERFLOW * float(scale_S2P[:, 1].min())


def _pixel_table(scale_S2: Array) -> Array:
    """What each uint8 value becomes, float32: (S, 256)."""
    with np.errstate(over="ignore"):
        table_SU = np.asarray((np.arange(256, dtype=np.float64) - scale_S2[:, :1]) / scale_S2[:, 1:], np.float32)
    table_SU[~np.isfinite(table_SU)] = 0.0
    return table_SU


def _codes_of(vocabularies: Sequence[Sequence[str]]) -> dict[str, Array]:
    """Map each value of one feature to its code with every constituent: (S,)."""
    found: dict[str, Array] = {}
    for index, values in enumerate(vocabularies):
        for code, value in enumerate(values, FIRST_CODE):
            found.setdefault(value, np.full(len(vocabularies), UNKNOWN_CODE))[index] = code
    return found


def _codes(column: Categories, known: dict[str, Array], *, count: int) -> Array:
    unknown_S, missing_S = np.full(count, UNKNOWN_CODE), np.full(count, MISSING_CODE)
    table_VS = np.stack([*(known.get(value, unknown_S) for value in column.values), missing_S])
    codes_SB: Array = table_VS[column.codes_N].T  # the code of a missing value, -1, picks the last
    return codes_SB
