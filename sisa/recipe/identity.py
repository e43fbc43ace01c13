"""What of a recipe determines training, and the digest of exactly that.

Left out on purpose: the store's place, where sources lie, where the routing key lies, what a worker gets, and how
answers are aggregated. The routing key itself enters the lineage through the keyed digests of the records.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

from sisa.recipe.schema import Recipe


def training_identity(recipe: Recipe) -> dict[str, Any]:
    """Return the part of a resolved recipe that determines training, as plain data."""
    content = recipe.model_dump(mode="json")
    data = content["data"]
    del data["source"]
    data["holdout"] = {"fraction": recipe.data.holdout.fraction, "second": recipe.data.holdout.source is not None}
    data["subject_id"] = recipe.data.subject_column
    data["classes"] = recipe.data.class_names
    devices = recipe.workers.devices_per_shard
    return {
        "data": data,
        "model": content["model"],
        "training": content["training"],
        "shards": recipe.sisa.shards,
        "slices": recipe.sisa.slices,
        **(
            {"devices_per_shard": devices} if devices > 1 else {}
        ),  # one process is what there was before there were many
    }


def recipe_digest(recipe: Recipe) -> str:
    """SHA-256 (hex) of the canonical JSON of :func:`training_identity`."""
    text = json.dumps(training_identity(recipe), sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def difference(stored: Recipe, asked: Recipe) -> list[str]:
    """Name each field in which two resolved recipes differ, with both values; empty if none does."""
    left = _flat({**training_identity(stored), **_aggregation(stored)})
    right = _flat({**training_identity(asked), **_aggregation(asked)})
    return [
        f"{_named(path)}: the store has {_value(left, path)}, asked for {_value(right, path)}"
        for path in sorted(left.keys() | right.keys())
        if left.get(path) != right.get(path)
    ]


def _aggregation(recipe: Recipe) -> dict[str, object]:
    wanted = recipe.sisa.aggregation
    table = {} if isinstance(wanted, str) else {"aggregation.table": wanted.table}
    return {"aggregation": recipe.sisa.aggregation_name, **table}


def _value(fields: dict[str, object], path: str) -> str:
    value = fields.get(path)
    return "nothing" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)


def _named(path: str) -> str:
    if path == "devices_per_shard":
        return f"workers.{path}"
    return f"sisa.{path}" if path in {"shards", "slices", "aggregation", "aggregation.table"} else path


def _flat(value: object, path: str = "") -> dict[str, object]:
    if isinstance(value, dict):
        flat: dict[str, object] = {}
        for name, child in value.items():
            flat.update(_flat(child, f"{path}.{name}" if path else str(name)))
        return flat
    return {path: value}
