"""What one driver can schedule: stages a second, its memory, speed-up by a second worker, and Ray's overhead.

``stages`` runs no-op stages on real Ray workers through the real driver: planning, the loop over chains, the ledger's
entries. ``scaling`` trains 20 shards with one worker and with two, ``overhead`` stages of some seconds inline and on one
worker; both leave the start of Ray out. Where others use the machine, look at the load average first.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import os
import pstats
import secrets
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import _machine
import pyarrow.parquet as pq
import ray
from deletion import recipe
from purchase import purchase_table

import sisa
from sisa.execution import cluster
from sisa.execution.build import Plan, build
from sisa.execution.options import Execution
from sisa.layout import Layout
from sisa.ledger import Partition, StageRow
from sisa.opening import create_store
from sisa.progress import Silent
from sisa.recipe import ColumnSpec, parse_recipe
from sisa.training.chain import ChainTask, chain_keys
from sisa.training.events import StageDone, Trained

WANTED_STAGES_PER_S = 200.0
WANTED_GROWTH_MIB = 32.0
WANTED_SCALING = 1.8
WANTED_OVERHEAD = 0.05


def nothing(task: ChainTask, import_paths: list[str]) -> Iterator[list[Any]]:
    """Report each stage of a chain as trained, at once; in place of what a worker does."""
    del import_paths
    keys = chain_keys(task)
    for stage, key in enumerate(keys, start=1):
        row = StageRow(
            key=key, platform=task.platform, code=task.code, shard=task.shard, stage=stage,
            parent_key=keys[stage - 2] if stage > 1 else "", records=sum(task.records[:stage]), state_digest=key,
            full_digest=key, worker="nobody:0", seconds=0.0, created_at="2000-01-01T00:00:00.000+00:00",
        )  # fmt: skip
        yield [Trained(task.shard, sum(task.records[:stage])), StageDone(row, reused=False)]


def rss_mib() -> float:
    """Return the memory of this process."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


class Watch(Silent):
    """Notes memory and time as stages are entered."""

    def __init__(self) -> None:
        self.seen: dict[int, tuple[float, float]] = {}

    def stages(self, done: int, total: int) -> None:
        """Remember the first moment at or after each tenth."""
        tenth = 10 * done // total
        self.seen.setdefault(tenth, (time.perf_counter(), rss_mib()))


def schedule_nothing(folder: Path, *, shards: int, slices: int, workers: int, profile: bool) -> dict[str, float]:
    """Schedule no-op stages and return rate and memory."""
    columns = {"x": ColumnSpec(type="numeric")}
    asked = parse_recipe(
        {
            "data": {"source": "-", "record_id": "id", "label": "y", "classes": [0, 1], "features": ["x"]},
            "model": {"name": "logistic"},
            "training": {"epochs": slices, "batch_size": 16, "optimizer": {"name": "sgd", "lr": 0.1}},
            "sisa": {"shards": shards, "slices": slices},
        }
    ).resolved(columns)
    opened = create_store(Layout(folder / "store"), asked, bytes(32))
    empty = [Partition(k, s, 100, 100, f"{k:032d}{s:032d}") for k in range(shards) for s in range(slices + 1)]
    opened.ledger.partitions.replace_all(empty)
    plan = Plan(shards=range(shards), code="code", platform="0" * 12, checkpoints=opened.layout.checkpoints)
    watch, profiler = Watch(), cProfile.Profile()
    cluster._chain_events = nothing
    started = time.perf_counter()
    if profile:
        profiler.enable()
    done = build(opened, plan, execution=Execution(executor="ray", workers=workers), reporter=watch, what="scheduling")
    if profile:
        profiler.disable()
        pstats.Stats(profiler).sort_stats("cumulative").print_stats(30)
    seconds = time.perf_counter() - started
    entered = len(opened.ledger.stages.all())
    if entered != shards * slices or len(done.trained) != entered or done.failures:
        raise SystemExit(f"expected {shards * slices} stages, entered {entered}, failures {done.failures}")
    memory = {tenth: rss for tenth, (_, rss) in watch.seen.items()}
    return {
        "stages_per_s": entered / seconds,
        "seconds": seconds,
        "planning_s": watch.seen[0][0] - started,
        "rss_10_mib": memory.get(1, memory[min(memory)]),
        "rss_50_mib": memory.get(5, 0.0),
        "rss_100_mib": memory[max(memory)],
    }


def train_seconds(
    folder: Path, name: str, *, records: int, shards: int, epochs: int, **options: Any
) -> tuple[float, float]:
    """Return how long a training takes, and for how long stages trained in it, summed."""
    source = folder / f"people-{records}.parquet"
    if not source.exists():
        pq.write_table(purchase_table(records=records), source)
    asked = recipe(source, shards=shards, slices=1, epochs=epochs, batch_size=16)
    started = time.perf_counter()
    store = sisa.train(asked, store=folder / name, **options)
    wall = time.perf_counter() - started
    return wall, sum(row.seconds for row in store.opened.ledger.stages.all())


def scaling(folder: Path) -> dict[str, float]:
    """Train 20 shards with one worker and with two; and say how many stages trained at a time, whatever each took."""
    size = {"records": 20_000, "shards": 20, "epochs": 40, "executor": "ray"}
    train_seconds(folder, "warm", records=2_000, shards=2, epochs=1, executor="ray", workers=2)
    one, _ = train_seconds(folder, "one", workers=1, **size)
    two, busy = train_seconds(folder, "two", workers=2, **size)
    return {"one_worker_s": one, "two_workers_s": two, "scaling": one / two, "stages_at_a_time": busy / two}


def overhead(folder: Path) -> dict[str, float]:
    """Train stages of some seconds inline and on one worker; what isn't training is compared, as a share of the whole."""
    size = {"records": 16_000, "shards": 2, "epochs": 60}
    train_seconds(folder, "warm2", records=2_000, shards=2, epochs=1, executor="ray", workers=1)
    inline, inline_stages = train_seconds(folder, "inline", executor="inline", **size)
    on_ray, ray_stages = train_seconds(folder, "ray", executor="ray", workers=1, **size)
    return {
        "inline_s": inline,
        "ray_s": on_ray,
        "walls": on_ray / inline - 1,
        "overhead": ((on_ray - ray_stages) - (inline - inline_stages)) / inline,
    }


def main() -> int:
    """Print what was measured; exit code 1 if a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("what", nargs="*", choices=["stages", "scaling", "overhead"], default=["stages", "scaling", "overhead"])  # fmt: skip
    parser.add_argument("--shards", type=int, default=1_000)
    parser.add_argument("--slices", type=int, default=10)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--profile", action="store_true", help="print where the driver's time goes")
    parser.add_argument("--json", action="store_true")
    a = parser.parse_args()
    found: dict[str, float] = {"load_before": os.getloadavg()[0]}
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    ray.init(num_cpus=a.workers, include_dashboard=False, log_to_driver=False)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if "scaling" in a.what:
            found |= scaling(folder)
        if "overhead" in a.what:
            found |= overhead(folder)
        if "stages" in a.what:
            found |= schedule_nothing(folder, shards=a.shards, slices=a.slices, workers=a.workers, profile=a.profile)
    ray.shutdown()
    found["load_after"] = os.getloadavg()[0]
    missed = [
        name
        for name, bad in (
            ("stages_per_s", found.get("stages_per_s", WANTED_STAGES_PER_S) < WANTED_STAGES_PER_S),
            ("memory", found.get("rss_100_mib", 0.0) - found.get("rss_10_mib", 0.0) > WANTED_GROWTH_MIB),
            ("scaling", found.get("scaling", WANTED_SCALING) < WANTED_SCALING),
            ("overhead", found.get("overhead", 0.0) > WANTED_OVERHEAD),
        )
        if bad
    ]
    if a.json:
        print(json.dumps({"machine": _machine.describe(), "missed": missed, **found}))
    else:
        print(_machine.one_line())
        for key, value in found.items():
            print(f"{key:>16} {value:10.2f}")
        print(f"missed: {', '.join(missed) or 'nothing'}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
