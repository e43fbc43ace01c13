"""Small seeded tables of people's records, and recipes that fit them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa

JOBS = ("baker", "caf\u00e9 owner", "smith", "weaver", None)
CLASSES = ["low", "mid", "high"]


def mixed(people: int = 24, *, seed: int = 1) -> pa.Table:
    """Numbers, categories and vectors with missing values; a person owns one to three records."""
    rng = np.random.default_rng(seed)
    owners = np.repeat(np.arange(people), rng.integers(1, 4, people))
    rng.shuffle(owners)
    count = len(owners)
    absent = rng.random((3, count)) < 0.15
    codes = rng.normal(0, 2, (count, 3)).astype(np.float32)
    codes[rng.random((count, 3)) < 0.1] = np.nan
    code = pa.FixedSizeListArray.from_arrays(pa.array(codes.reshape(-1), from_pandas=True), 3, mask=pa.array(absent[2]))
    return pa.table(
        {
            "record": pa.array(rng.permutation(900)[:count] + 100, pa.int64()),
            "person": pa.array([f"p\u00e9rson-{owner:03d}" for owner in owners]),
            "age": pa.array(rng.normal(40, 12, count), mask=absent[0]),
            "hours": pa.array(rng.integers(1, 60, count), pa.int64(), mask=absent[1]),
            "job": pa.array([JOBS[i] for i in rng.integers(0, len(JOBS), count)], pa.string()),
            "grade": pa.array(rng.integers(0, 3, count), pa.int64()),
            "code": code,
            "secret": pa.array([f"never-copied-{i}" for i in range(count)]),
            "income": pa.array([CLASSES[i] for i in rng.integers(0, 2, count)]),
        }
    )


def mixed_recipe(**changes: Any) -> dict[str, Any]:
    """A recipe for :func:`mixed`; ``changes`` replace sections' fields: ``training={"epochs": 2}``."""
    recipe = {
        "data": {
            "source": "-",
            "record_id": "record",
            "subject_id": "person",
            "label": "income",
            "classes": CLASSES,
            "features": ["age", "job", "hours", "code", "grade"],
            "columns": {"grade": {"type": "categorical"}},
        },
        "model": {"name": "mlp", "hidden": [6], "activation": "tanh"},
        "training": {"epochs": 4, "batch_size": 4, "optimizer": {"name": "sgd", "lr": 0.1, "momentum": 0.9}, "seed": 7},
        "sisa": {"shards": 2, "slices": 3},
    }
    return _changed(recipe, changes)


def binary(people: int = 40, *, width: int = 12, seed: int = 2) -> pa.Table:
    """A vector of bits for each person, and a class that follows from it."""
    rng = np.random.default_rng(seed)
    bits = rng.integers(0, 2, (people, width)).astype(np.uint8)
    return pa.table(
        {
            "record": pa.array(range(people), pa.int64()),
            "x": pa.FixedSizeListArray.from_arrays(pa.array(bits.reshape(-1)), width),
            "label": pa.array((bits[:, :3].sum(1) > 1).astype(np.int64)),
        }
    )


def binary_recipe(**changes: Any) -> dict[str, Any]:
    """A recipe for :func:`binary`, with everything that a stage has to keep: moments, statistics, dropout, a schedule."""
    recipe = {
        "data": {"source": "-", "record_id": "record", "label": "label", "classes": [0, 1], "features": ["x"]},
        "model": {"name": "mlp", "hidden": [6], "activation": "tanh", "dropout": 0.3, "batch_norm": True},
        "training": {
            "epochs": 4,
            "batch_size": 4,
            "optimizer": {"name": "adam", "lr": 0.01},
            "schedule": {"name": "exponential", "gamma": 0.8},
            "seed": 3,
        },
        "sisa": {"shards": 2, "slices": 3},
    }
    return _changed(recipe, changes)


def images(people: int = 18, *, side: int = 6, channels: int = 2, seed: int = 3) -> pa.Table:
    """Small images, channels last, of ten kinds."""
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (people, side * side * channels)).astype(np.uint8)
    return pa.table(
        {
            "record": pa.array([f"image {i}" for i in range(people)]),
            "pixels": pa.FixedSizeListArray.from_arrays(pa.array(pixels.reshape(-1)), pixels.shape[1]),
            "kind": pa.array(rng.integers(0, 10, people), pa.int64()),
        }
    )


def images_recipe(**changes: Any) -> dict[str, Any]:
    """A recipe for :func:`images`."""
    recipe = {
        "data": {
            "source": "-",
            "record_id": "record",
            "label": "kind",
            "classes": list(range(10)),
            "features": ["pixels"],
            "image": {"height": 6, "width": 6, "channels": 2},
        },
        "model": {"name": "cnn", "channels": [3, 4], "hidden": [5]},
        "training": {"epochs": 3, "batch_size": 5, "optimizer": {"name": "sgd", "lr": 0.05}, "seed": 5},
        "sisa": {"shards": 2, "slices": 2},
    }
    return _changed(recipe, changes)


def with_value(table: pa.Table, *, row: int, column: str, value: object) -> pa.Table:
    """The table with one value changed."""
    values = table[column].to_pylist()
    values[row] = value
    index = table.column_names.index(column)
    return table.set_column(index, column, pa.array(values, table.schema.field(column).type))


def without(table: pa.Table, *, records: object = (), people: object = ()) -> pa.Table:
    """The table without some records, or without everything that some people own."""
    gone, owners = {str(record) for record in records}, {str(person) for person in people}
    names = [str(record) for record in table["record"].to_pylist()]
    whose = table["person"].to_pylist() if "person" in table.column_names else names
    keep = [str(n) not in gone and str(w) not in owners for n, w in zip(names, whose, strict=True)]
    return table.filter(pa.array(keep, pa.bool_()))


def _changed(recipe: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    return {**recipe, **{section: {**recipe.get(section, {}), **fields} for section, fields in changes.items()}}
