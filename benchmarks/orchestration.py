"""How much of a training is not training: everything but the stages' own computing and the start of Ray.

Trains Purchase-shaped shards for minutes. The share is 1 - (seconds in which stages trained) / (wall time
x workers): ingest, routing, reading rows, checkpoints, the ledger, worker start-up and idle workers count.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import _machine
import pyarrow.parquet as pq
import ray
from deletion import recipe
from purchase import purchase_table

import sisa

MOST = 0.05
LONG_S = 120.0


def main() -> int:
    """Print the share for one executor; exit code 1 if a long training misses the target."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--records", type=int, default=60_000)
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--slices", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=500)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--executor", choices=["ray", "inline"], default="ray")
    parser.add_argument("--json", action="store_true")
    a = parser.parse_args()
    workers = a.workers if a.executor == "ray" else 1
    if a.executor == "ray":
        ray.init(num_cpus=workers, include_dashboard=False, log_to_driver=False)
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "people.parquet")
        pq.write_table(purchase_table(records=a.records), source)
        asked = recipe(source, shards=a.shards, slices=a.slices, epochs=a.epochs, batch_size=16)
        started = time.perf_counter()
        store = sisa.train(asked, store=Path(folder, "store"), executor=a.executor, workers=workers)
        wall = time.perf_counter() - started
        stages = sum(row.seconds for row in store.opened.ledger.stages.all())
    if a.executor == "ray":
        ray.shutdown()
    share = 1 - stages / (wall * workers)
    found = {
        "executor": a.executor,
        "workers": workers,
        "wall_s": wall,
        "stage_s": stages,
        "orchestration_share": share,
    }
    ok = wall < LONG_S or share <= MOST
    if a.json:
        print(json.dumps({"machine": _machine.describe(), "ok": ok, **found}))
    else:
        print(_machine.one_line())
        print(
            f"{a.executor}, {workers} workers: {wall:.1f} s of wall, {stages:.1f} s of stages, {share:.1%} orchestration"
        )
        print(f"at most {MOST:.0%} wanted of a training over {LONG_S:.0f} s: {'ok' if ok else 'MISSED'}")
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
