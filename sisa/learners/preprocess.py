"""From the columns of a shard to the numbers a model sees; fitted once, frozen for the chain.

Scalers and vocabularies come from the recipe or from the shard's first non-empty slice, never from the whole
table: whoever isn't in that slice can't have moved them. Statistics are taken in canonical order, so that the
order of rows in the source can't move them either.

* numeric: (x - mean) / std in float64, then float32; a column that is constant has std 1.
* vector: the same with one mean and one std for all elements.
* categorical: one-hot of width 2 + V: missing, unknown, then the V values.
* What isn't a finite number, before or after scaling, counts as missing and is 0 after scaling.

Shape suffixes: N records, P numeric features, V vectors' number, D elements of a row.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np

from sisa.learners.columns import MISSING, Array, Categories, Columns, feature_specs
from sisa.recipe import ColumnSpec, Recipe
from sisa.state import JSON, StageState

MISSING_CODE, UNKNOWN_CODE, FIRST_CODE = 0, 1, 2
BLOCK_ELEMENTS = 1 << 15
"""Elements scaled at a time: what fits in a core's cache. Another number gives the same bits."""


@dataclass(frozen=True)
class Preprocessor:
    """Frozen scalers and vocabularies of one chain."""

    kinds: tuple[str, ...]
    """Kind of each feature, in recipe order."""
    sizes: tuple[int, ...]
    """Elements of each vector feature."""
    image_shape: tuple[int, int, int] | None
    """Height, width, channels of the one vector that is an image."""
    numeric_scale_2P: Array
    """float64: means, then standard deviations."""
    vector_scale_2V: Array
    """float64, likewise."""
    vocabularies: tuple[tuple[str, ...], ...]
    """Values of each categorical feature, in the order of their codes."""

    @classmethod
    def fit(cls, recipe: Recipe, first: Columns) -> Preprocessor:
        """Take declared scalers and vocabularies, and the others from ``first``.

        Args:
            recipe: A resolved recipe.
            first: The records of the shard's first non-empty slice, in canonical order.
        """
        specs = [spec for _, spec in feature_specs(recipe)]
        numeric = [spec for spec in specs if spec.type == "numeric"]
        vector = [spec for spec in specs if spec.type == "vector"]
        return cls.fitted(
            recipe,
            numeric=[_scale(spec, first.numeric_NP[:, index]) for index, spec in enumerate(numeric)],
            vector=[_scale(spec, values) for spec, values in zip(vector, first.vectors, strict=True)],
            categories=first.categories,
        )

    @classmethod
    def fitted(
        cls,
        recipe: Recipe,
        *,
        numeric: list[tuple[float, float]],
        vector: list[tuple[float, float]],
        categories: Sequence[Categories],
    ) -> Preprocessor:
        """Take means and standard deviations as they are, and vocabularies from what is declared or used.

        Args:
            recipe: A resolved recipe.
            numeric: Mean and standard deviation of each numeric feature.
            vector: The same of each vector.
            categories: Each categorical feature of the first slice; a code that is used twice counts once.
        """
        categorical = [spec for _, spec in feature_specs(recipe) if spec.type == "categorical"]
        return cls._of(
            recipe,
            numeric_scale_2P=_scales(numeric),
            vector_scale_2V=_scales(vector),
            vocabularies=tuple(_vocabulary(spec, column) for spec, column in zip(categorical, categories, strict=True)),
        )

    @classmethod
    def from_state(cls, recipe: Recipe, state: StageState) -> Preprocessor:
        """Take scalers and vocabularies from a stage."""
        nothing = np.zeros((2, 0))
        vocabularies = cast("list[list[str]]", state.scalars.get("preprocess.vocabularies", []))
        return cls._of(
            recipe,
            numeric_scale_2P=state.tensors.get("preprocess.numeric_scale", nothing),
            vector_scale_2V=state.tensors.get("preprocess.vector_scale", nothing),
            vocabularies=tuple(tuple(values) for values in vocabularies),
        )

    @classmethod
    def _of(
        cls,
        recipe: Recipe,
        *,
        numeric_scale_2P: Array,
        vector_scale_2V: Array,
        vocabularies: tuple[tuple[str, ...], ...],
    ) -> Preprocessor:
        specs = [spec for _, spec in feature_specs(recipe)]
        image = recipe.data.image
        return cls(
            kinds=tuple(spec.type or "" for spec in specs),
            sizes=tuple(spec.size or 1 for spec in specs if spec.type == "vector"),
            image_shape=None if image is None else (image.height, image.width, image.channels),
            numeric_scale_2P=numeric_scale_2P,
            vector_scale_2V=vector_scale_2V,
            vocabularies=vocabularies,
        )

    def to_state(self) -> StageState:
        """Return the part of a stage that :meth:`from_state` reads."""
        tensors: dict[str, Array] = {}
        if self.numeric_scale_2P.size:
            tensors["preprocess.numeric_scale"] = self.numeric_scale_2P
        if self.vector_scale_2V.size:
            tensors["preprocess.vector_scale"] = self.vector_scale_2V
        vocabularies: list[JSON] = [list(values) for values in self.vocabularies]
        return StageState(tensors, {"preprocess.vocabularies": vocabularies})

    @property
    def widths(self) -> tuple[int, ...]:
        """Elements that each feature takes in a row, in recipe order."""
        sizes, vocabularies = iter(self.sizes), iter(self.vocabularies)
        return tuple(
            1 if kind == "numeric" else next(sizes) if kind == "vector" else FIRST_CODE + len(next(vocabularies))
            for kind in self.kinds
        )

    @property
    def feature_shape(self) -> tuple[int, ...]:
        """Shape of one record as the model sees it: (D,), or (channels, height, width) of an image."""
        if self.image_shape is not None:
            height, width, channels = self.image_shape
            return (channels, height, width)
        return (sum(self.widths),)

    def transform(self, columns: Columns, *, out_ND: Array | None = None) -> Array:
        """Return the rows that the model sees: X_ND float32; those of an image row by row, channels last.

        Args:
            columns: The records.
            out_ND: Where to write the rows: zeros of the result's shape; by default a new array.
        """
        widths = self.widths
        starts = np.concatenate([[0], np.cumsum(widths)]).astype(int).tolist()
        X_ND = np.zeros((columns.count, starts[-1]), np.float32) if out_ND is None else out_ND
        for columns_X, scale_2, block_NP in self._numeric_runs(columns, starts):
            _scaled(block_NP, scale_2, out_ND=X_ND[:, columns_X])
        vectors, categories = iter(range(len(self.sizes))), iter(range(len(self.vocabularies)))
        for kind, start, width in zip(self.kinds, starts, widths, strict=False):
            out_ND = X_ND[:, start : start + width]
            if kind == "vector":
                index = next(vectors)
                _scaled(columns.vectors[index], self.vector_scale_2V[:, index : index + 1], out_ND=out_ND)
            elif kind == "categorical":
                index = next(categories)
                codes_N = _codes(columns.categories[index], self.vocabularies[index])
                out_ND[np.arange(columns.count), codes_N] = 1.0
        return X_ND

    def _numeric_runs(self, columns: Columns, starts: list[int]) -> list[tuple[slice, Array, Array]]:
        """Group numeric features that are neighbours: (where in a row, scale, values)."""
        places = [start for kind, start in zip(self.kinds, starts, strict=False) if kind == "numeric"]
        breaks = [0, *(i for i in range(1, len(places)) if places[i] != places[i - 1] + 1), len(places)]
        return [
            (
                slice(places[first], places[first] + last - first),
                self.numeric_scale_2P[:, first:last],
                columns.numeric_NP[:, first:last],
            )
            for first, last in zip(breaks, breaks[1:], strict=False)
            if last > first
        ]


def _scale(spec: ColumnSpec, values: Array) -> tuple[float, float]:
    """Return mean and population standard deviation: declared, or of the finite values."""
    if spec.mean is not None and spec.std is not None:
        return spec.mean, spec.std
    present = np.array(values, np.float64, order="C").reshape(-1)  # a copy, which is worked on below
    if values.dtype != np.uint8:
        finite = np.isfinite(present)
        present = present if finite.all() else present[finite]
    if not present.size:
        return 0.0, 1.0
    if present.min() == present.max():
        return float(present[0]), 1.0
    with np.errstate(over="ignore", invalid="ignore"):
        mean = float(present.mean())
        present -= mean  # what present.std() does, without its temporary arrays
        std = float(np.sqrt(np.square(present, out=present).mean()))
    # Values near the end of float64's range overflow a sum: such a column is left as it is.
    return (mean, std) if np.isfinite(mean) and np.isfinite(std) and std > 0 else (0.0, 1.0)


def _scales(scales: list[tuple[float, float]]) -> Array:
    return np.array(scales, np.float64).reshape(-1, 2).T.copy()


def _vocabulary(spec: ColumnSpec, column: Categories) -> tuple[str, ...]:
    if spec.values is not None:
        return tuple(dict.fromkeys(unicodedata.normalize("NFC", value) for value in spec.values))
    used = np.unique(column.codes_N)
    return tuple(sorted(column.values[code] for code in used.tolist() if code != MISSING))


def _codes(column: Categories, vocabulary: tuple[str, ...]) -> Array:
    known = {value: code for code, value in enumerate(vocabulary, FIRST_CODE)}
    table = np.array([*(known.get(value, UNKNOWN_CODE) for value in column.values), MISSING_CODE], np.int64)
    return table[column.codes_N]  # the code of a missing value, -1, picks the last


def _scaled(values_ND: Array, scale_2D: Array, *, out_ND: Array) -> None:
    """Write (x - mean) / std as float32, 0 where that isn't a finite number."""
    mean_D, std_D = scale_2D
    step = max(1, BLOCK_ELEMENTS // max(1, values_ND.shape[1]))
    if values_ND.dtype == np.uint8:
        with np.errstate(over="ignore"):
            table = ((np.arange(256, dtype=np.float64) - mean_D) / std_D).astype(np.float32)
        table[~np.isfinite(table)] = 0.0
        for start in range(0, len(values_ND), step):
            out_ND[start : start + step] = table.take(values_ND[start : start + step], mode="clip")
        return
    for start in range(0, len(values_ND), step):
        with np.errstate(over="ignore", invalid="ignore"):
            block = np.subtract(values_ND[start : start + step], mean_D, dtype=np.float64)
            block /= std_D
            part = out_ND[start : start + step]
            part[:] = block
        finite = np.isfinite(part)
        if not finite.all():
            part[~finite] = 0.0
