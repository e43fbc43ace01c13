"""Real tables: one model, the SISA ensemble, one shard alone, and what a deletion costs.

Rows of the printed Markdown table: accuracy on the same held-out people of (a) one model trained on all of
them, (b) the ensemble, (c) its constituents one by one, mean: what a model on a 1/S share reaches; and the
mean cost of deleting one person, over every slice of every shard, as a share of a full training.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import _machine
import numpy as np
from deletion import delete_one

import sisa
from sisa.checkpoints import StageId
from sisa.layout import HOLDOUT_SLICE
from sisa.learners.columns import columns_from_table
from sisa.learners.predict import Constituent
from sisa.planning.cost import expected_fraction
from sisa.planning.epochs import epoch_budget
from sisa.records.partition import read_partition
from sisa.routing.keys import shard_keys
from sisa.store.store import Store

HEADINGS = (
    "table",
    "records",
    "S x R",
    "one model",
    "ensemble",
    "one shard",
    "after deletions",
    "one deletion, record-epochs",
    "formula",
    "one deletion, seconds",
    "stages of a full training, seconds",
)
CONFIGS = Path(__file__).resolve().parent.parent / "configs"


def constituent_accuracies(store: Store) -> list[float]:
    """Accuracy of each constituent alone, on the whole holdout."""
    opened = store.opened
    tables = [
        read_partition(opened.layout, opened.recipe, shard_keys(opened.keys.routing, shard), shard, HOLDOUT_SLICE).table
        for shard in range(opened.shards)
    ]
    held_out = [columns_from_table(table, opened.recipe) for table in tables if table.num_rows]
    accuracies = []
    for member in opened.ledger.versions.live().members:
        identity = StageId(member.shard, member.stage, member.key, member.platform)
        voter = Constituent.from_state(opened.recipe, len(opened.classes), opened.checkpoints.load(identity)[1])
        hits = np.concatenate([voter.posteriors(c).argmax(axis=1) == c.labels_N for c in held_out])
        accuracies.append(float(hits.mean()))
    return accuracies


def measure(name: str, *, executor: str) -> dict[str, Any]:
    """Run one config."""
    config = CONFIGS / f"{name}.yaml"
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        store = sisa.train(sisa.load_recipe(config), store=Path(folder, "sisa"), executor=executor)
        full_s = time.perf_counter() - started
        key = store.opened.layout.routing_key
        alone = [f"routing.key_file={key}", "sisa.shards=1", "sisa.slices=1"]
        one = sisa.train(sisa.load_recipe(config, overrides=alone), store=Path(folder, "one"), executor="inline")
        rows = store.opened.ledger.stages.all()
        budget = epoch_budget(epochs=store.opened.recipe.training.epochs, slices=store.opened.slices)
        full = sum(budget[row.stage - 1] * row.records for row in rows)
        stage_s = sum(row.seconds for row in rows)
        shards = constituent_accuracies(store)
        before = store.measure()
        costs = [
            delete_one(store, shard, slice_)
            for shard in range(store.opened.shards)
            for slice_ in range(1, store.opened.slices + 1)
        ]
        after = store.measure()
        single = one.measure()
    if before is None or after is None or single is None:
        raise SystemExit(f"{name}: the config has no holdout")
    opened = store.opened
    return {
        "table": name,
        "records": sum(row.records for row in rows if row.stage == opened.slices),
        "held_out": before.records,
        "shards": opened.shards,
        "slices": opened.slices,
        "one_model": single.accuracy,
        "ensemble": before.accuracy,
        "one_shard": statistics.mean(shards),
        "after_deletions": after.accuracy,
        "deletions": len(costs),
        "deletion_share_record_epochs": statistics.mean(c for c, _ in costs) / full,
        "formula_share": expected_fraction(shards=opened.shards, slices=opened.slices, deletions=1),
        "deletion_seconds": statistics.mean(s for _, s in costs),
        "training_stage_seconds": stage_s,
        "training_seconds": full_s,
    }


def main() -> None:
    """Print a Markdown table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("configs", nargs="*", default=["digits", "adult", "location30", "mnist10k"])
    parser.add_argument("--executor", choices=["auto", "ray", "inline"], default="inline")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    found = []
    for name in arguments.configs:
        source = sisa.load_recipe(CONFIGS / f"{name}.yaml").data.source
        if not source.startswith("builtin:") and not Path(source).exists():
            print(f"{name}: left out, {source} is not there", file=sys.stderr)
            continue
        found.append(measure(name, executor=arguments.executor))
    if arguments.json:
        print(json.dumps({"machine": _machine.describe(), "tables": found}))
        return
    print(_machine.one_line())
    print("\n| " + " | ".join(HEADINGS) + " |")
    print("|" + "---|" * len(HEADINGS))
    for f in found:
        print(
            f"| {f['table']} | {f['records']:,} | {f['shards']} x {f['slices']} | {f['one_model']:.3f} | "
            f"{f['ensemble']:.3f} | {f['one_shard']:.3f} | {f['after_deletions']:.3f} ({f['deletions']}) | "
            f"{f['deletion_share_record_epochs']:.1%} | {f['formula_share']:.1%} | {f['deletion_seconds']:.2f} | "
            f"{f['training_stage_seconds']:.1f} |"
        )


if __name__ == "__main__":
    sys.exit(main())
