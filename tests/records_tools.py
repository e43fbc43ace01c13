"""Tables, recipes and stores that the tests of the records share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as papq

from sisa.layout import Layout
from sisa.recipe import Recipe, parse_recipe
from sisa.records import ingest
from sisa.records.partition import PartitionRows, read_partition
from sisa.records.schema import resolve
from sisa.records.source import open_source
from sisa.records.write import PartitionCount
from sisa.routing import shard_keys

KEY = bytes(range(32))
SHARDS, SLICES = 3, 2


def people(count: int = 200, seed: int = 0) -> pa.Table:
    """A mixed table: every kind of feature, missing values, several rows of some people."""
    rng = np.random.default_rng(seed)
    vectors = pa.array(rng.normal(size=count * 3).astype(np.float32))
    pixels = pa.array(rng.integers(0, 256, count * 4).astype(np.uint8))
    return pa.table(
        {
            "rid": pa.array(np.arange(count) * 3),
            "owner": pa.array([f"p{i}" for i in rng.integers(0, count // 2, count)]),
            "age": pa.array(rng.integers(1, 99, count), pa.int32(), mask=rng.random(count) < 0.1),
            "pay": pa.array(np.round(rng.normal(size=count), 3), mask=rng.random(count) < 0.1),
            "city": pa.array(rng.choice(["Köln", "Bonn", "Ulm"], count), mask=rng.random(count) < 0.1),
            "vector": pa.FixedSizeListArray.from_arrays(vectors, 3),
            "pixels": pa.FixedSizeListArray.from_arrays(pixels, 4),
            "label": pa.array(rng.choice(["no", "yes"], count)),
        }
    )


def written(source: str | Path, **data: Any) -> Recipe:
    """A recipe as somebody writes it."""
    defaults: dict[str, Any] = {
        "source": str(source),
        "record_id": "rid",
        "subject_id": "owner",
        "label": "label",
        "classes": ["no", "yes"],
        "features": "*",
        "holdout": {"fraction": 0.2},
    }
    merged = {name: value for name, value in {**defaults, **data}.items() if value is not None}
    return parse_recipe(
        {
            "data": merged,
            "model": {"name": "logistic"},
            "training": {"epochs": 9, "batch_size": 8, "optimizer": {"name": "sgd", "lr": 0.1}},
            "sisa": {"shards": SHARDS, "slices": SLICES},
        }
    )


def resolved(source: str | Path, **data: Any) -> Recipe:
    """A recipe with its columns spelled out."""
    recipe = written(source, **data)
    return resolve(recipe, open_source(recipe.data.source))


def saved(folder: Path, table: pa.Table, name: str = "people.parquet") -> Path:
    """A table in a Parquet file."""
    folder.mkdir(parents=True, exist_ok=True)
    papq.write_table(table, folder / name)
    return folder / name


def stored(folder: Path, recipe: Recipe, **settings: Any) -> tuple[Layout, list[PartitionCount]]:
    """A store with the records of the recipe's source."""
    layout = Layout(folder)
    folder.mkdir(parents=True, exist_ok=True)
    return layout, ingest.write(recipe, layout, routing_key=KEY, **settings)


def everything(layout: Layout, recipe: Recipe) -> dict[tuple[int, int], PartitionRows]:
    """All partitions, read and verified."""
    return {
        (shard, slice_): read_partition(layout, recipe, shard_keys(KEY, shard), shard, slice_)
        for shard in range(recipe.sisa.shards)
        for slice_ in range(recipe.sisa.slices + 1)
    }


def memberships(counts: list[PartitionCount]) -> dict[tuple[int, int], str]:
    """Membership by place."""
    return {(count.shard, count.slice): count.membership for count in counts}
