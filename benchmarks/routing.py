"""Routing speed on one core: ids a second, from a column as a table has it to shard and slice.

python benchmarks/routing.py [--ids N] [--json]
"""

from __future__ import annotations

import argparse
import json
import os
import time
import uuid

import numpy as np
import pyarrow as pa
from _machine import describe, one_line

from sisa.routing import Router, canonical_ids

KEY = bytes(range(32))
TRIES = 5


def columns(count: int) -> dict[str, pa.Array]:
    """Make id columns of several kinds."""
    numbers = np.random.default_rng(0).permutation(count)
    few = min(count, 500_000)
    uuids = [str(uuid.UUID(int=int(i) * 0x9E3779B97F4A7C15F39CC0605CEDC834 % 2**128)) for i in range(few)]
    return {
        "int64": pa.array(numbers),
        "text, 15 characters": pa.array([f"person-{i:08d}" for i in numbers]),
        "text, 1 to 8 characters": pa.array(numbers).cast(pa.string()),
        "uuid as text": pa.array(uuids),
    }


def measure(ids: pa.Array, holdout_fraction: float) -> float:
    """Return the best of some runs, in ids a second."""
    router = Router(KEY, shards=20, slices=10, holdout_fraction=holdout_fraction)
    seconds = []
    for _ in range(TRIES):
        started = time.process_time()
        router.route(canonical_ids(ids, column="id"))
        seconds.append(time.process_time() - started)
    return len(ids) / min(seconds)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--ids", type=int, default=2_000_000, help="how many ids")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    machine, words = describe(), one_line()
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    rates = {name: measure(ids, holdout_fraction=0.2) for name, ids in columns(options.ids).items()}
    if options.json:
        print(json.dumps({"benchmark": "routing", "ids_per_second": rates, "target": 5e6, "machine": machine}))
        return
    print("Routing, one core (canonical text, keyed hash, shard, slice, holdout)\n")
    for name, rate in rates.items():
        print(f"  {name:<26} {rate / 1e6:6.1f} M ids/s")
    print(f"\n  target: 5 M ids/s\n  {words}")


if __name__ == "__main__":
    main()
