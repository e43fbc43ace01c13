"""Rows streamed from disk against rows in memory: samples per second, and peak memory, with the same bits.

Purchase-shaped work in one shard without slices, read from its partition as a chain reads it. Each measurement is a process of
its own; throughput is that of the epochs alone, taken in turn, the best of several. Memory is anonymous memory (``RssAnon``)
above what the process has after its imports. Pages of the mapped file belong to the page cache, which the kernel takes
back when it needs it. Reading, and what is done before the first batch, are given apart. Processor time tells more where others use the machine.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import _machine
import numpy as np
import pyarrow as pa
from purchase import FEATURES, purchase
from training import KEYS, MODELS, make_recipe

from sisa.layout import Layout
from sisa.lineage import membership
from sisa.records.digest import content_digests, id_digests
from sisa.records.names import LABEL, RECORD, SUBJECT
from sisa.records.partition import partition_file
from sisa.records.rowfile import with_contents, write_rows
from sisa.state import StageState, full_digest
from sisa.training.rows import ShardRows
from sisa.training.stage import train_stage

WAYS = {"resident": "always", "streamed": "never"}
PIECE = 50_000


def make_partition(root: Path, *, records: int) -> str:
    """Write one slice with so many records; return its membership."""
    recipe, digests = make_recipe(MODELS["built-in mlp"], batch_size=16), []

    def pieces() -> Iterator[pa.Table]:
        for start in range(0, records, PIECE):
            X_ND, labels_N = purchase(records=min(PIECE, records - start), seed=start)
            ids = pa.array([f"{start + row}" for row in range(len(labels_N))])
            vectors = pa.FixedSizeListArray.from_arrays(pa.array(X_ND.reshape(-1)), FEATURES)
            columns = {RECORD: ids, SUBJECT: ids, "bought": vectors, LABEL: pa.array(labels_N, pa.int32())}
            table = pa.table(columns)
            digests.append((id_digests(KEYS, table[RECORD]), content_digests(KEYS, table, recipe)))
            yield with_contents(table, digests[-1][1])

    path = partition_file(Layout(root), 0, 1)
    path.parent.mkdir(parents=True)
    write_rows(path, pieces())
    return membership(np.concatenate([ids for ids, _ in digests]), np.concatenate([said for _, said in digests]))


def anonymous_bytes() -> int:
    """Return this process's anonymous memory."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return 0


@contextlib.contextmanager
def peak() -> Iterator[list[int]]:
    """Watch anonymous memory, fifty times a second; the most that was seen is put into the list."""
    before, seen, ended = anonymous_bytes(), [0], threading.Event()

    def watch() -> None:
        while not ended.wait(0.02):
            seen[0] = max(seen[0], anonymous_bytes() - before)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield seen
    finally:
        ended.set()
        thread.join()


def measure(asked: dict[str, Any]) -> dict[str, Any]:
    """Train one stage in this process, and tell how long its parts took and how much memory was needed."""
    recipe = make_recipe(MODELS["built-in mlp"], batch_size=asked["batch_size"])
    said = (asked["membership"],)
    task: Any = SimpleNamespace(
        shard=0,
        recipe=recipe,
        keys=KEYS,
        memberships=said,
        records=(asked["records"],),
        rows_in_memory=WAYS[asked["way"]],
    )
    epochs: list[tuple[float, float]] = []
    done = [0]

    def progress(count: int) -> None:
        done[0] += count if epochs else 0
        epochs.append((time.perf_counter(), time.process_time()))

    arguments: dict[str, Any] = {"recipe": recipe, "class_count": 2, "shard": 0, "stage": 1, "parent": StageState()}
    with peak() as seen, contextlib.closing(ShardRows(task, Layout(Path(asked["root"])))) as rows:
        started = time.perf_counter()
        columns = rows.through(1, StageState())
        read = time.perf_counter()
        state = train_stage(
            **arguments,
            epochs=asked["epochs"],
            columns=columns,
            keys=KEYS,
            should_stop=lambda: False,
            on_progress=progress,
        )
    trained, worked = (end - start for start, end in zip(epochs[0], epochs[-1], strict=True))
    return {
        "samples_per_s": round(done[0] / trained),
        "samples_per_cpu_s": round(done[0] / worked),
        "read_s": round(read - started, 2),
        "until_first_batch_s": round(epochs[0][0] - read, 2),
        "peak_mib": round(seen[0] / 2**20, 1),
        "digest": full_digest(state),
    }


def in_process(**asked: Any) -> dict[str, Any]:
    """Run :func:`measure` in a new process."""
    command = [sys.executable, __file__, "--measure", json.dumps(asked)]
    found: dict[str, Any] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return found


def compare(
    root: Path, membership_: str, *, records: int, batch_size: int, epochs: int, repeats: int
) -> dict[str, Any]:
    """Measure both ways in turn."""
    asked = {
        "root": str(root),
        "membership": membership_,
        "records": records,
        "batch_size": batch_size,
        "epochs": epochs,
    }
    runs: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    for _ in range(repeats):
        for way in WAYS:
            runs[way].append(in_process(way=way, **asked))
    best = {way: max(run["samples_per_s"] for run in found) for way, found in runs.items()}
    cheapest = {way: max(run["samples_per_cpu_s"] for run in found) for way, found in runs.items()}
    return {
        "records": records,
        "batch_size": batch_size,
        **{f"{way}_samples_per_s": rate for way, rate in best.items()},
        "ratio": round(best["streamed"] / best["resident"], 3),
        "ratio_of_processor_time": round(cheapest["streamed"] / cheapest["resident"], 3),
        **{
            f"{way}_{name}": found[-1][name]
            for way, found in runs.items()
            for name in ("peak_mib", "read_s", "until_first_batch_s")
        },
        "same_bits": len({run["digest"] for found in runs.values() for run in found}) == 1,
    }


def main() -> None:
    """Measure, print a table, and with --json one object."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--records", type=int, nargs="+", default=[200_000, 800_000])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(json.loads(arguments.measure))))
        return
    results = []
    for number, records in enumerate(arguments.records):
        with tempfile.TemporaryDirectory() as folder:
            said = make_partition(Path(folder), records=records)
            for batch_size in (16, 256) if number == 0 else (256,):
                repeats = arguments.repeats if number == 0 else 1
                results.append(
                    compare(Path(folder), said, records=records, batch_size=batch_size, epochs=1, repeats=repeats)
                )
    if arguments.json:
        print(json.dumps({"machine": _machine.describe(), "results": results}))
        return
    print(_machine.one_line())
    for result in results:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
