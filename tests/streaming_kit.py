"""A shard on disk and a process that trains on it and tells how much memory that took.

Run as ``python streaming_kit.py FOLDER RECORDS always|never``; prints the anonymous memory (``RssAnon``) that a stage
needed at most beyond what the process had before, and the digest of its state. Pages of a mapped file are not counted: the
kernel takes them back when it needs them.
"""

from __future__ import annotations

import contextlib
import json
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa

from sisa.layout import Layout
from sisa.lineage import membership
from sisa.recipe import ColumnSpec, Recipe, parse_recipe
from sisa.records.digest import content_digests, id_digests
from sisa.records.partition import partition_file
from sisa.records.rowfile import with_contents, write_rows
from sisa.routing.keys import shard_keys
from sisa.state import StageState, full_digest

KEYS = shard_keys(bytes(range(32)), 0)
WIDTH, NUMBERS, PIECE = 800, 20, 5_000


def recipe() -> Recipe:
    """A vector of bytes, numbers and a category; scalers and vocabulary are fitted."""
    columns = {f"n{i}": ColumnSpec(type="numeric") for i in range(NUMBERS)}
    columns |= {"c": ColumnSpec(type="categorical"), "v": ColumnSpec(type="vector", size=WIDTH)}
    content = {
        "data": {"source": "-", "record_id": "id", "label": "y", "classes": [0, 1], "features": list(columns)},
        "model": {"name": "mlp", "hidden": [4]},
        "training": {"epochs": 1, "batch_size": 256, "optimizer": {"name": "sgd", "lr": 0.01}, "seed": 1},
        "sisa": {"shards": 1, "slices": 1},
    }
    return parse_recipe(content).resolved(columns)


def write_slice(root: Path, *, records: int) -> None:
    """Write the rows of the one slice, in one row group."""
    rng = np.random.default_rng(records)
    ids = pa.array([f"{row:07d}" for row in range(records)])
    vectors = rng.integers(0, 256, records * WIDTH, dtype=np.uint8)
    table = pa.table(
        {
            "_sisa_record": ids,
            "_sisa_subject": ids,
            **{f"n{i}": rng.normal(size=records) for i in range(NUMBERS)},
            "c": pa.array(rng.choice(["one", "two", "three"], records)),
            "v": pa.FixedSizeListArray.from_arrays(pa.array(vectors), WIDTH),
            "_sisa_label": pa.array(rng.integers(0, 2, records), pa.int32()),
        }
    )
    ids_N16, contents_N16 = id_digests(KEYS, table["_sisa_record"]), content_digests(KEYS, table, recipe())
    path = partition_file(Layout(root), 0, 1)
    path.parent.mkdir(parents=True)
    write_rows(path, [with_contents(table, contents_N16)])
    (root / "membership").write_text(membership(ids_N16, contents_N16))


def anonymous_bytes() -> int:
    """This process's anonymous memory."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("RssAnon:"))


def main(root: Path, records: int, choice: str) -> None:
    """Train one stage and tell."""
    from sisa.training.rows import ShardRows
    from sisa.training.stage import train_stage

    said = (root / "membership").read_text()
    task = SimpleNamespace(
        shard=0, recipe=recipe(), keys=KEYS, memberships=(said,), records=(records,), rows_in_memory=choice
    )
    before, most, ended = anonymous_bytes(), [0], threading.Event()

    def watch() -> None:
        while not ended.wait(0.002):
            most[0] = max(most[0], anonymous_bytes() - before)

    thread = threading.Thread(target=watch)
    thread.start()
    with contextlib.closing(ShardRows(task, Layout(root))) as rows:  # type: ignore[arg-type]
        state = train_stage(
            recipe=task.recipe, class_count=2, shard=0, stage=1, epochs=1, parent=StageState(),
            columns=rows.through(1, StageState()), keys=KEYS, should_stop=lambda: False, on_progress=lambda _: None,
        )  # fmt: skip
    ended.set()
    thread.join()
    print(json.dumps({"bytes": most[0], "digest": full_digest(state)}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
