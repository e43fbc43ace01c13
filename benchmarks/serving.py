"""How long an answer takes.

**Evaluation**, in this process: twenty constituents asked one by one (``Constituent.posteriors``, the mean of what they
say) against the panel that a store answers with, on the same rows, preprocessing included. Both run in turn, several
times, and the best of each counts: figures drift, ratios less. Models are trained, so that scores lie as apart as they
do in use; labels must be the same and scores within 1e-6.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import _machine
import numpy as np
from purchase import FEATURES, purchase

from sisa.ensemble.aggregation import Mean
from sisa.ensemble.stacked import Panel
from sisa.learners.columns import Columns
from sisa.learners.predict import Constituent
from sisa.recipe import ColumnSpec, Recipe, parse_recipe
from sisa.routing.keys import shard_keys
from sisa.state import StageState
from sisa.training.stage import train_stage

SHARDS = 20
TARGETS = {1: 3.0, 32: 1.4, 1024: 1.0, 4096: 1.0}
"""Least ratio for each batch size."""
SCALERS: dict[str, dict[str, float]] = {"fitted on each shard": {}, "declared": {"mean": 0.0, "std": 1.0}}


def make_recipe(**scale: float) -> Recipe:
    """An mlp 600-128-tanh-2 on numeric columns."""
    columns = {f"bought_{i:03d}": ColumnSpec(type="numeric", **scale) for i in range(FEATURES)}
    content = {
        "data": {"source": "-", "record_id": "id", "label": "class", "classes": [0, 1], "features": list(columns)},
        "model": {"name": "mlp", "hidden": [128], "activation": "tanh"},
        "training": {"epochs": 1, "batch_size": 16, "optimizer": {"name": "sgd", "lr": 0.01}, "seed": 1},
        "sisa": {"shards": SHARDS, "slices": 1},
    }
    return parse_recipe(content).resolved(columns)


def make_columns(*, records: int, seed: int) -> Columns:
    """Made-up purchases as numeric columns."""
    X_ND, labels_N = purchase(records=records, seed=seed)
    numeric_NP = np.asarray(X_ND.T, np.float64).T  # column by column in memory, as tables are read
    uids_N = np.random.default_rng(seed).integers(0, 2**63, records).astype(np.uint64)
    return Columns(numeric_NP, (), (), labels_N, uids_N, np.ones(records, np.int32))


def train_constituents(recipe: Recipe, *, records: int) -> list[Constituent]:
    """Train one model for each shard."""
    constituents = []
    for shard in range(SHARDS):
        state = train_stage(
            recipe=recipe,
            class_count=2,
            shard=shard,
            stage=1,
            epochs=3,
            parent=StageState(),
            columns=make_columns(records=records, seed=100 + shard),
            keys=shard_keys(bytes(32), shard),
            should_stop=lambda: False,
            on_progress=lambda _: None,
        )
        constituents.append(Constituent.from_state(recipe, 2, state))
    return constituents


def in_turn(functions: list[Callable[[], object]], *, rounds: int, at_least_s: float = 0.02) -> list[float]:
    """Return the best seconds per call of each; short calls are made many at a time."""
    best, calls = [float("inf")] * len(functions), []
    for function in functions:
        function()  # the first run warms up
        started = time.perf_counter()
        function()
        calls.append(max(1, int(at_least_s / (time.perf_counter() - started))))
    for _ in range(rounds):
        for index, (function, count) in enumerate(zip(functions, calls, strict=True)):
            started = time.perf_counter()
            for _ in range(count):
                function()
            best[index] = min(best[index], (time.perf_counter() - started) / count)
    return best


def evaluation(name: str, *, records: int, rounds: int) -> list[dict[str, Any]]:
    """Compare a panel with its constituents asked one by one."""
    recipe = make_recipe(**SCALERS[name])
    constituents = train_constituents(recipe, records=records)
    panel, rule, rows = Panel(recipe, constituents), Mean(), []
    for size, target in TARGETS.items():
        columns = make_columns(records=size, seed=7)

        def alone(columns: Columns = columns) -> np.ndarray[Any, Any]:
            return rule.scores(np.stack([one.posteriors(columns) for one in constituents]))

        expected_BC, (scores_BC, path) = alone(), panel.scores(columns, rule)
        alone_s, together_s = in_turn([alone, lambda columns=columns: panel.scores(columns, rule)], rounds=rounds)
        rows.append(
            {
                "scalers": name,
                "batch": size,
                "path": path,
                "alone_ms": round(alone_s * 1e3, 3),
                "panel_ms": round(together_s * 1e3, 3),
                "ratio": round(alone_s / together_s, 2),
                "target": target,
                "same_labels": bool((expected_BC.argmax(axis=1) == scores_BC.argmax(axis=1)).all()),
                "largest_difference": float(np.abs(expected_BC - scores_BC).max()),
            }
        )
    return rows


def print_evaluation(rows: list[dict[str, Any]]) -> None:
    """Print the table of :func:`evaluation`."""
    print(f"Evaluation: {SHARDS} x mlp {FEATURES}-128-tanh-2, one thread, rows preprocessed\n")
    print(
        f"{'scalers':<21} {'batch':>5} {'path':<10} {'alone':>9} {'panel':>9} {'ratio':>6} {'target':>6}  labels  scores"
    )
    for row in rows:
        print(
            f"{row['scalers']:<21} {row['batch']:>5} {row['path']:<10} {row['alone_ms']:>6.2f} ms {row['panel_ms']:>6.2f} ms "
            f"{row['ratio']:>6.2f} {row['target']:>6.2f}  {'same' if row['same_labels'] else 'OTHER':<6}  "
            f"{row['largest_difference']:.0e}"
        )


def main() -> None:
    """Measure, print tables, and with --json one object."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--records", type=int, default=2000, help="records that each constituent is trained on")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    evaluated = [
        row for name in SCALERS for row in evaluation(name, records=arguments.records, rounds=arguments.rounds)
    ]
    if arguments.json:
        print(json.dumps({"benchmark": "serving", "machine": _machine.describe(), "evaluation": evaluated}))
        return
    print_evaluation(evaluated)
    print(f"\n{_machine.one_line()}")


if __name__ == "__main__":
    main()
