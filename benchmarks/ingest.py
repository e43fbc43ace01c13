"""Ingest of a large Parquet table: both passes, the comparison of a second run, and the peak of memory.

python benchmarks/ingest.py [--rows N] [--shards S] [--slices R] [--json]
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as papq
from _machine import describe, one_line

from sisa.layout import Layout
from sisa.recipe import Recipe, parse_recipe
from sisa.records import ingest
from sisa.records.schema import resolve
from sisa.records.source import open_source

KEY = bytes(range(32))
BATCH = 500_000
LIMIT_GIB = 2.0


def make_table(path: Path, *, rows: int) -> None:
    """Write a table of people: six numbers, three categories, two classes, some values missing."""
    rng = np.random.default_rng(7)
    writer: papq.ParquetWriter | None = None
    for start in range(0, rows, BATCH):
        count = min(BATCH, rows - start)
        columns: dict[str, pa.Array] = {"person_id": pa.array(np.arange(start, start + count))}
        for i in range(6):
            columns[f"x{i}"] = pa.array(rng.normal(size=count), mask=rng.random(count) < 0.02)
        for i in range(3):
            columns[f"c{i}"] = pa.array(rng.integers(0, 20, count).astype(str), mask=rng.random(count) < 0.02)
        columns["label"] = pa.array(rng.integers(0, 2, count))
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
            "features": "*",
            "holdout": {"fraction": 0.1},
        },
        "model": {"name": "logistic"},
        "training": {"epochs": 100, "batch_size": 16, "optimizer": {"name": "sgd", "lr": 0.1}},
        "sisa": {"shards": shards, "slices": slices},
    }
    return resolve(parse_recipe(content), open_source(str(path)))


def measure(path: Path, store: Path, *, shards: int, slices: int) -> dict[str, float]:
    """Scan, write and compare; return seconds and the peak of this process."""
    asked = recipe(path, shards=shards, slices=slices)
    layout = Layout(store)
    measured: dict[str, float] = {"start_gib": _peak_gib()}
    started = time.perf_counter()
    report = ingest.scan(asked, routing_key=KEY)
    measured["scan_s"] = time.perf_counter() - started
    measured["scan_peak_gib"] = _peak_gib()
    started = time.perf_counter()
    counts = ingest.write(asked, layout, routing_key=KEY)
    measured["write_s"] = time.perf_counter() - started
    measured["peak_gib"] = _peak_gib()
    started = time.perf_counter()
    found = ingest.compare(asked, layout, routing_key=KEY)
    measured["compare_s"] = time.perf_counter() - started
    measured["compare_peak_gib"] = _peak_gib()
    if sum(count.records for count in counts) != report.records or not found.clean or found.missing:
        raise SystemExit("the store does not hold what the source has")
    files = list(layout.records.rglob("*.parquet"))
    return {**measured, "records": report.records, "files": len(files), "bytes": sum(f.stat().st_size for f in files)}


def _peak_gib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main() -> None:
    """Measure in a process of its own, so that making the table doesn't count, and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=10_000_000, help="rows of the table")
    parser.add_argument("--shards", type=int, default=20)
    parser.add_argument("--slices", type=int, default=10)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--measure", metavar="FOLDER", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        folder = Path(options.measure)
        print(json.dumps(measure(folder / "t.parquet", folder / "store", shards=options.shards, slices=options.slices)))
        return
    with tempfile.TemporaryDirectory() as name:
        make_table(Path(name, "t.parquet"), rows=options.rows)
        source_bytes = Path(name, "t.parquet").stat().st_size
        command = [sys.executable, __file__, "--measure", name]
        command += ["--shards", str(options.shards), "--slices", str(options.slices)]
        measured = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    measured["source_bytes"] = source_bytes
    if options.json:
        print(json.dumps({"benchmark": "ingest", **measured, "limit_gib": LIMIT_GIB, "machine": describe()}))
        return
    rate = options.rows / (measured["scan_s"] + measured["write_s"]) / 1e3
    print(f"Ingest of {options.rows:,} rows into {options.shards} shards x {options.slices} slices\n")
    print(f"  scan {measured['scan_s']:.1f} s, write {measured['write_s']:.1f} s ({rate:.0f} k rows/s together)")
    print(f"  comparison of a second run {measured['compare_s']:.1f} s")
    print(
        f"  source {source_bytes / 2**20:.0f} MiB, {measured['files']} partitions {measured['bytes'] / 2**20:.0f} MiB"
    )
    print(
        f"  peak of memory {measured['peak_gib']:.2f} GiB (compare: {measured['compare_peak_gib']:.2f}; limit {LIMIT_GIB})"
    )
    print(f"  {one_line()}")


if __name__ == "__main__":
    main()
