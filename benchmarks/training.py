"""Samples per second of a stage, against the loop that everybody writes, with the same bits.

The plain loop has its rows resident as tensors, gathers each batch, and calls ``torch.optim.SGD``; it doesn't pay for
preprocessing or for the keyed order. Ours is ``train_stage`` as a chain calls it, all of that included. Both run in
turn, several times, and the best of each counts: figures drift, ratios less.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from typing import Any

import _machine
import numpy as np
import torch
from purchase import FEATURES, RECORDS_PER_SHARD, purchase

from sisa.learners.columns import Columns
from sisa.learners.flags import derived_seed
from sisa.learners.models import build_model
from sisa.learners.preprocess import Preprocessor
from sisa.recipe import ColumnSpec, Recipe, parse_recipe
from sisa.routing.keys import shard_keys
from sisa.state import StageState
from sisa.training.order import batch_sizes, epoch_order
from sisa.training.stage import train_stage

KEYS = shard_keys(bytes(32), 0)
TARGETS = {
    ("built-in mlp", 16): 1.2,
    ("built-in mlp", 256): 0.95,
    ("user's module", 16): 1.1,
    ("user's module", 256): 0.95,
}


def build(feature_shape: tuple[int, ...], class_count: int) -> torch.nn.Module:
    """The same model, as a user would bring it."""
    return torch.nn.Sequential(
        torch.nn.Linear(feature_shape[0], 128), torch.nn.Tanh(), torch.nn.Linear(128, class_count)
    )


MODELS: dict[str, dict[str, Any]] = {
    "built-in mlp": {"name": "mlp", "hidden": [128], "activation": "tanh"},
    "user's module": {"factory": "training:build"},
}


def make_recipe(model: dict[str, Any], *, batch_size: int) -> Recipe:
    """The paper's recipe for Purchase, for one shard without slices."""
    content = {
        "data": {"source": "-", "record_id": "person_id", "label": "class", "classes": [0, 1], "features": ["bought"]},
        "model": model,
        "training": {"epochs": 1, "batch_size": batch_size, "optimizer": {"name": "sgd", "lr": 0.001}, "seed": 1},
        "sisa": {"shards": 1, "slices": 1},
    }
    return parse_recipe(content).resolved({"bought": ColumnSpec(type="vector", size=FEATURES)})


def make_columns(*, records: int) -> Columns:
    """One slice of Purchase-shaped records."""
    X_ND, labels_N = purchase(records=records)
    uids_N = np.random.default_rng(1).integers(0, 2**63, records).astype(np.uint64)
    return Columns(np.zeros((records, 0)), (), (X_ND,), labels_N, uids_N, np.ones(records, np.int32))


def ours(recipe: Recipe, columns: Columns, *, epochs: int) -> tuple[float, bytes]:
    """Return seconds and the bytes of the weights."""
    started = time.perf_counter()
    state = train_stage(
        recipe=recipe,
        class_count=2,
        shard=0,
        stage=1,
        epochs=epochs,
        parent=StageState(),
        columns=columns,
        keys=KEYS,
        should_stop=lambda: False,
        on_progress=lambda _: None,
    )
    seconds = time.perf_counter() - started
    return seconds, b"".join(a.tobytes() for n, a in state.tensors.items() if n.startswith("model."))


def plain(recipe: Recipe, columns: Columns, *, epochs: int) -> tuple[float, bytes]:
    """Return seconds of the loop alone and the bytes of the weights."""
    torch.set_num_threads(recipe.training.threads)
    preprocessor = Preprocessor.fit(recipe, columns)
    X, y = torch.tensor(preprocessor.transform(columns)), torch.tensor(columns.labels_N)
    orders = [
        torch.tensor(epoch_order(KEYS.order, columns.uids_N, seed=recipe.training.seed, stage=1, epoch=epoch))
        for epoch in range(epochs)
    ]
    sizes = batch_sizes(records=columns.count, batch_size=recipe.training.batch_size)
    torch.manual_seed(derived_seed("sisa-init", recipe.training.seed, 0))
    model = build_model(recipe, preprocessor.feature_shape, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=recipe.training.optimizer.lr)
    started = time.perf_counter()
    for order in orders:
        for rows in torch.split(order, sizes):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(X[rows]), y[rows]).backward()
            optimizer.step()
    seconds = time.perf_counter() - started
    return seconds, b"".join(parameter.detach().numpy().tobytes() for parameter in model.parameters())


def compare(name: str, *, batch_size: int, records: int, epochs: int, repeats: int) -> dict[str, Any]:
    """Run both in turn and return the figures."""
    recipe, columns = make_recipe(MODELS[name], batch_size=batch_size), make_columns(records=records)
    runs: dict[Callable[..., tuple[float, bytes]], list[tuple[float, bytes]]] = {plain: [], ours: []}
    for function in [plain, ours]:  # the first run warms up
        function(recipe, columns, epochs=1)
    for _ in range(repeats):
        for function, results in runs.items():
            results.append(function(recipe, columns, epochs=epochs))
    best = {function: min(seconds for seconds, _ in results) for function, results in runs.items()}
    weights = {content for results in runs.values() for _, content in results}
    return {
        "model": name,
        "batch_size": batch_size,
        "plain_samples_per_s": round(records * epochs / best[plain]),
        "ours_samples_per_s": round(records * epochs / best[ours]),
        "ratio": round(best[plain] / best[ours], 3),
        "target": TARGETS[name, batch_size],
        "same_bits": len(weights) == 1,
    }


def main() -> None:
    """Measure, print a table, and with --json one object."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--records", type=int, default=RECORDS_PER_SHARD)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    results = [
        compare(name, batch_size=size, records=arguments.records, epochs=arguments.epochs, repeats=arguments.repeats)
        for name, size in TARGETS
    ]
    if arguments.json:
        print(json.dumps({"machine": _machine.describe(), "records": arguments.records, "results": results}))
        return
    print(f"{arguments.records} records of {FEATURES} features, mlp {FEATURES}-128-tanh-2, SGD, one thread")
    print(f"{_machine.one_line()}\n")
    print(f"{'model':<14} {'batch':>5} {'plain/s':>9} {'ours/s':>9} {'ratio':>6} {'target':>6}  same bits")
    for row in results:
        print(
            f"{row['model']:<14} {row['batch_size']:>5} {row['plain_samples_per_s']:>9} {row['ours_samples_per_s']:>9} "
            f"{row['ratio']:>6.2f} {row['target']:>6.2f}  {'yes' if row['same_bits'] else 'NO'}"
        )


if __name__ == "__main__":
    sys.modules["training"] = sys.modules["__main__"]  # where the factory is found
    main()
