"""What deleting one person costs, against the paper's arithmetic and against the bare training loop.

One person is deleted from every slice of every shard, one request each. Record-epochs are counted from
the stages that were retrained; the formula is that of a uniformly drawn request (Bourtoule et al. 2021):
e * ((R+1)(2R+1)D/(6R) - (R+1)/2) with e = 2e'/(R+1) and D records in a shard. Wall time of a deletion,
less what one that retrains nothing takes, is held against the seconds that its record-epochs take in a
plain torch loop with the same batches.
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
import pyarrow.parquet as pq
import torch
from purchase import FEATURES, purchase, purchase_table

import sisa
from sisa.planning.epochs import epoch_budget
from sisa.recipe import Recipe, parse_recipe
from sisa.records.partition import present_ids
from sisa.store.store import Store
from sisa.training.order import batch_sizes

MOST_OFF = 0.10
MOST_TIMES_BARE = 1.3


def recipe(source: Path, *, shards: int, slices: int, epochs: int, batch_size: int) -> Recipe:
    """Purchase-shaped work, with some rows held out so that a request can cost nothing."""
    return parse_recipe(
        {
            "data": {
                "source": str(source),
                "record_id": "person_id",
                "label": "class",
                "classes": [0, 1],
                "features": ["bought"],
                "columns": {"bought": {"mean": 0, "std": 1}},
                "holdout": {"fraction": 0.02},
            },
            "model": {"name": "mlp", "hidden": [128], "activation": "tanh"},
            "training": {"epochs": epochs, "batch_size": batch_size, "optimizer": {"name": "sgd", "lr": 0.001}},
            "sisa": {"shards": shards, "slices": slices},
        }
    )


def bare_seconds_per_record_epoch(*, records: int, batch_size: int) -> float:
    """Time the loop that everybody writes: resident tensors, gather per batch, torch.optim.SGD."""
    torch.set_num_threads(1)
    X_ND, labels_N = purchase(records=records)
    features, labels = torch.from_numpy(X_ND.astype("float32")), torch.from_numpy(labels_N)
    model = torch.nn.Sequential(torch.nn.Linear(FEATURES, 128), torch.nn.Tanh(), torch.nn.Linear(128, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.001)
    sizes = batch_sizes(records=records, batch_size=batch_size)
    times = []
    for _ in range(4):
        started, start = time.perf_counter(), 0
        order = torch.randperm(records)
        for size in sizes:
            rows = order[start : start + size]
            start += size
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(features[rows]), labels[rows]).backward()
            optimizer.step()
        times.append((time.perf_counter() - started) / records)
    return min(times)


def delete_one(store: Store, shard: int, slice_: int) -> tuple[int, float]:
    """Delete the first person of a slice; return the record-epochs that it cost and the seconds."""
    person = present_ids(store.opened.layout, shard, slice_)[1][0].as_py()
    started = time.perf_counter()
    store.delete(subjects=[person], executor="inline")
    seconds = time.perf_counter() - started
    budget = epoch_budget(epochs=store.opened.recipe.training.epochs, slices=store.opened.slices)
    rows = [row for row in store.opened.ledger.stages.all(shard) if slice_ and row.stage >= slice_]
    return sum(budget[row.stage - 1] * row.records for row in rows), seconds


def formula(*, slices: int, epochs: int, shard_records: float) -> float:
    """Expected record-epochs of one uniformly drawn request."""
    e, r, d = 2 * epochs / (slices + 1), slices, shard_records
    return e * ((r + 1) * (2 * r + 1) * d / (6 * r) - (r + 1) / 2)


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Train once, then delete somebody from each slice of each shard."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "people.parquet")
        pq.write_table(purchase_table(records=arguments.records), source)
        asked = recipe(
            source,
            shards=arguments.shards,
            slices=arguments.slices,
            epochs=arguments.epochs,
            batch_size=arguments.batch_size,
        )
        started = time.perf_counter()
        store = sisa.train(asked, store=Path(folder, "store"), executor="inline")
        full_s = time.perf_counter() - started
        rows = store.opened.ledger.stages.all()
        budget = epoch_budget(epochs=arguments.epochs, slices=arguments.slices)
        full = sum(budget[row.stage - 1] * row.records for row in rows)
        stages_s = sum(row.seconds for row in rows)
        shard_records = sum(row.records for row in rows if row.stage == arguments.slices) / arguments.shards
        fixed_s = statistics.median(delete_one(store, shard, 0)[1] for shard in range(arguments.shards))
        bare = bare_seconds_per_record_epoch(records=int(shard_records), batch_size=arguments.batch_size)
        costs = [
            delete_one(store, shard, slice_)
            for shard in range(arguments.shards)
            for slice_ in range(1, arguments.slices + 1)
        ]
    expected = formula(slices=arguments.slices, epochs=arguments.epochs, shard_records=shard_records)
    mean, mean_s = statistics.mean(c for c, _ in costs), statistics.mean(s for _, s in costs)
    return {
        "records": arguments.records,
        "shards": arguments.shards,
        "slices": arguments.slices,
        "epochs": arguments.epochs,
        "batch_size": arguments.batch_size,
        "deletions": len(costs),
        "full_record_epochs": full,
        "mean_record_epochs": mean,
        "formula_record_epochs": expected,
        "over_formula": mean / expected,
        "share_of_full_record_epochs": mean / full,
        "share_of_full_seconds": mean_s / full_s,
        "orchestration_share_of_training": 1 - stages_s / full_s,
        "fixed_seconds": fixed_s,
        "mean_seconds": mean_s,
        "times_bare_loop": (mean_s - fixed_s) / (mean * bare),
    }


def main() -> int:
    """Print a table, or JSON; exit code 1 if a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--records", type=int, default=20_000)
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--slices", type=int, default=4)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    found = measure(arguments)
    ok = abs(found["over_formula"] - 1) <= MOST_OFF and found["times_bare_loop"] <= MOST_TIMES_BARE
    if arguments.json:
        print(json.dumps({"machine": _machine.describe(), "ok": ok, **found}))
        return 0 if ok else 1
    print(_machine.one_line())
    for name, value in found.items():
        print(f"{name:>34}  {value:,.4g}" if isinstance(value, float) else f"{name:>34}  {value:,}")
    print(f"record-epochs over the formula: {found['over_formula']:.3f} (within {MOST_OFF:.0%} wanted)")
    print(f"wall over the bare loop: {found['times_bare_loop']:.2f} (at most {MOST_TIMES_BARE} wanted)")
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
