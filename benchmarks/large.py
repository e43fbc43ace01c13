"""Large tables: memory of an ingest, bytes that a deletion reads, and what a deletion costs as the store grows.

python benchmarks/large.py [--rows N ...] [--delete-from N] [--grow S ...] [--json]

Bytes are those that the process asked the kernel for (/proc/self/io): files of the store, of the ledger, and whatever
else. Each measurement follows a first deletion, which loads what a process loads once.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as papq
from _machine import describe, one_line

import sisa
from sisa.layout import Layout
from sisa.ledger.sqlite import SqliteDatabase
from sisa.planning.epochs import epoch_budget
from sisa.progress import Silent
from sisa.recipe import Recipe, parse_recipe
from sisa.records import ingest
from sisa.records.schema import resolve
from sisa.records.source import open_source
from sisa.store.launch import _ingested
from sisa.store.store import Store

KEY = bytes(range(32))
BATCH = 500_000
ASKED = 6
"""Deletions that are measured."""
WANTED_SHARE = 0.01
WANTED_GROWTH = 1.2


def make_table(path: Path, *, rows: int) -> None:
    """Write a table of people: two numbers, two classes."""
    rng = np.random.default_rng(7)
    writer: papq.ParquetWriter | None = None
    for start in range(0, rows, BATCH):
        count = min(BATCH, rows - start)
        columns = {"person_id": np.arange(start, start + count), "label": rng.integers(0, 2, count)}
        columns |= {f"x{i}": rng.normal(size=count) for i in range(2)}
        table = pa.table(columns)
        writer = writer or papq.ParquetWriter(path, table.schema)
        writer.write_table(table)
    if writer is not None:
        writer.close()


def recipe(path: Path, *, shards: int, slices: int) -> Recipe:
    """Return a resolved recipe for the table."""
    content = {
        "data": {
            "source": str(path),
            "record_id": "person_id",
            "label": "label",
            "classes": [0, 1],
            "features": ["x0", "x1"],
            "holdout": {"fraction": 0.05},
        },
        "model": {"name": "logistic"},
        "training": {"epochs": slices, "batch_size": 256, "optimizer": {"name": "sgd", "lr": 0.1}},
        "sisa": {"shards": shards, "slices": slices},
    }
    return resolve(parse_recipe(content), open_source(str(path)))


def ingest_peak(folder: Path, *, shards: int, slices: int) -> dict[str, float]:
    """Check and write the table; return seconds and the peak of this process beyond what it began with."""
    asked = recipe(folder / "t.parquet", shards=shards, slices=slices)
    began = _peak_bytes()
    started = time.perf_counter()
    report = ingest.scan(asked, routing_key=KEY, scratch=folder)
    scanned, after_scan = _peak_bytes(), time.perf_counter()
    ingest.write(asked, Layout(folder / "store"), routing_key=KEY)
    return {
        "rows": report.records,
        "began_bytes": began,
        "scan_peak_bytes": scanned,
        "peak_bytes": _peak_bytes(),
        "scan_s": after_scan - started,
        "write_s": time.perf_counter() - after_scan,
    }


def delete_one(folder: Path, *, shards: int, slices: int) -> dict[str, float]:
    """Ingest the table and delete single people from it; return the bytes read for one, and those of all rows."""
    layout = Layout(folder / "store")
    asked = recipe(folder / "t.parquet", shards=shards, slices=slices)
    opened, _ = _ingested(asked.model_copy(update={"store": str(layout.root)}), layout, Silent(), upgrade=False)
    rows_bytes = sum(path.stat().st_size for path in layout.records.rglob("*.parquet"))
    records = sum(partition.records for partition in opened.ledger.partitions.all())
    opened.close()
    store = sisa.open_store(str(layout.root))
    people = _people(store, slice_=slices // 2 + 1, count=ASKED + 1)
    costs = [_cost(store, person, defer=True) for person in people][1:]
    return {
        "rows": records,
        "rows_bytes": rows_bytes,
        "files": len(list(layout.records.rglob("*.parquet"))),
        "read_bytes": statistics.median(cost["read_bytes"] for cost in costs),
        "seconds": statistics.median(cost["seconds"] for cost in costs),
    }


def grow(folder: Path, *, shards: int, slices: int) -> dict[str, float]:
    """Train on the table, delete single people and repair at once; return what one costs."""
    asked = recipe(folder / "t.parquet", shards=shards, slices=slices)
    store = sisa.train(asked, store=folder / "store", executor="inline")
    people = _people(store, slice_=slices // 2 + 1, count=ASKED + 1)
    costs = [_cost(store, person, defer=False) for person in people][1:]
    return {name: statistics.median(cost[name] for cost in costs) for name in costs[0]}


def _people(store: Store, *, slice_: int, count: int) -> list[str]:
    """Return people of one slice number, each of another shard if there are so many."""
    found: dict[int, str] = {}
    more: list[str] = []
    for number in range(100_000):
        shard, place = store.opened.router.route_one(str(number))
        if place == slice_:
            found.setdefault(shard, str(number)) == str(number) or more.append(str(number))
        if len(found) + len(more) >= 10 * count:
            break
    return [*found.values(), *more][:count]


def _cost(store: Store, person: str, *, defer: bool) -> dict[str, float]:
    started, before = time.perf_counter(), _read_bytes()
    seen = {row.key for row in store.opened.ledger.stages.all()}
    with _ledger_rows(store) as touched:
        store.delete(subjects=[person], defer=defer, executor="inline")
    read = _read_bytes() - before
    made = [row for row in store.opened.ledger.stages.all() if row.key not in seen]
    sisa_, training = store.opened.recipe.sisa, store.opened.recipe.training
    budget = epoch_budget(epochs=training.epochs, slices=sisa_.slices, generations=0)
    return {
        "read_bytes": read,
        "seconds": time.perf_counter() - started,
        "record_epochs": sum(budget[row.stage - 1] * row.records for row in made),
        "ledger_rows_written": touched["written"],
        "ledger_rows_read": touched["read"],
    }


@contextlib.contextmanager
def _ledger_rows(store: Store) -> Iterator[dict[str, int]]:
    """Count the rows that the ledger changes and those that it returns."""
    touched = {"written": 0, "read": 0}
    database: Any = store.opened.ledger.database
    plain, changes = SqliteDatabase.rows, database._connection.total_changes

    def counting(self: SqliteDatabase, statement: str, parameters: Any = ()) -> Any:
        found = plain(self, statement, parameters)
        touched["read"] += len(found)
        return found

    SqliteDatabase.rows = counting  # type: ignore[method-assign]
    try:
        yield touched
    finally:
        SqliteDatabase.rows = plain  # type: ignore[method-assign]
        touched["written"] = database._connection.total_changes - changes


def _read_bytes() -> int:
    lines = Path("/proc/self/io").read_text(encoding="ascii").splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("rchar")))


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def apart(what: str, *, rows: int, shards: int, slices: int) -> dict[str, float]:
    """Measure in a process of its own, in a folder that is removed."""
    with tempfile.TemporaryDirectory() as name:
        make_table(Path(name, "t.parquet"), rows=rows)
        command = [sys.executable, __file__, "--measure", what, name, str(shards), str(slices)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    measured: dict[str, float] = json.loads(done.stdout)
    return measured


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, nargs="*", default=[3_000_000, 10_000_000, 30_000_000], help="ingest these")
    parser.add_argument("--delete-from", type=int, default=10_000_000, help="rows to delete one person from")
    parser.add_argument("--shards", type=int, default=20)
    parser.add_argument("--slices", type=int, default=10)
    parser.add_argument("--grow", type=int, nargs="*", default=[2, 20], help="numbers of shards of a growing store")
    parser.add_argument("--shard-rows", type=int, default=20_000, help="rows of a shard of the growing store")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--measure", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        what, name, shards, slices = options.measure
        print(json.dumps(MEASURES[what](Path(name), shards=int(shards), slices=int(slices))))
        return
    shape = {"shards": options.shards, "slices": options.slices}
    ingests = [apart("ingest", rows=rows, **shape) for rows in options.rows]
    deletions = [
        {"shards": shards, "slices": slices} | apart("delete", rows=options.delete_from, shards=shards, slices=slices)
        for shards, slices in ((options.shards, options.slices), (4, 2))
        if options.delete_from
    ]
    grown = [apart("grow", rows=shards * options.shard_rows, shards=shards, slices=4) for shards in options.grow]
    if options.json:
        found = {"ingest": ingests, "deletion": deletions, "grow": dict(zip(options.grow, grown, strict=True))}
        print(json.dumps({"benchmark": "large", **found, "machine": describe()}))
        return
    _print(ingests, deletions, options.grow, grown)


def _print(
    ingests: list[dict[str, float]],
    deletions: list[dict[str, float]],
    shards: list[int],
    grown: list[dict[str, float]],
) -> None:
    for one in ingests:
        print(
            f"ingest of {one['rows']:,} rows: peak {one['peak_bytes'] / 2**20:.0f} MiB "
            f"(check {one['scan_peak_bytes'] / 2**20:.0f}, before {one['began_bytes'] / 2**20:.0f}); "
            f"check {one['scan_s']:.0f} s, write {one['write_s']:.0f} s"
        )
    for less, more in zip(ingests, ingests[1:], strict=False):
        slope = (more["peak_bytes"] - less["peak_bytes"]) / (more["rows"] - less["rows"])
        print(f"  from {less['rows']:,} to {more['rows']:,} rows: {slope:.2f} bytes of memory a row")
    for one in deletions:
        print(
            f"deletion of 1 of {one['rows']:,} people, {one['shards']:.0f} x {one['slices']:.0f}, {one['files']:.0f} files: "
            f"{one['read_bytes'] / 2**20:.2f} MiB read, {100 * one['read_bytes'] / one['rows_bytes']:.2f} % of the rows' "
            f"{one['rows_bytes'] / 2**20:.0f} MiB (wanted: under {100 * WANTED_SHARE:.0f} %); {one['seconds']:.2f} s"
        )
    for count, one in zip(shards, grown, strict=True):
        print(f"deletion with repair, {count} shards: " + ", ".join(f"{name} {one[name]:,.2f}" for name in one))
    if len(grown) > 1:
        ratios = {name: grown[-1][name] / max(grown[0][name], 1e-9) for name in grown[0]}
        print(
            f"  {shards[-1]} shards against {shards[0]} (wanted: up to {WANTED_GROWTH}x): "
            + ", ".join(f"{name} {ratio:.2f}x" for name, ratio in ratios.items())
        )
    print(one_line())


MEASURES = {"ingest": ingest_peak, "delete": delete_one, "grow": grow}

if __name__ == "__main__":
    main()
