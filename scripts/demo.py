"""The whole story on one small table: train on Ray, delete people, retrain what has to be, prove it.

Usage: python scripts/demo.py [--store FOLDER]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

import sisa
from sisa.cli.reporting import reporter
from sisa.records.source import open_source

CONFIG = Path(__file__).resolve().parent.parent / "configs" / "digits.yaml"
LEAVERS = ["17", "431", "1203"]
console = Console(highlight=False)


def main() -> int:
    """Run the demo; exit code 1 if the proof fails."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--store", type=Path, help="where to keep the store (default: a temporary folder)")
    folder = parser.parse_args().store
    if folder is not None and folder.exists():
        console.print(f"{folder} exists already: choose another folder, or remove it")
        return 2
    with tempfile.TemporaryDirectory(prefix="sisa-demo-") as scratch:
        ok = _story(folder or Path(scratch, "store"), Path(scratch))
    return 0 if ok else 1


def _story(place: Path, scratch: Path) -> bool:
    _title("1. Train: 4 isolated models, 3 slices each, on Ray workers")
    started = time.monotonic()
    store = sisa.train(sisa.load_recipe(CONFIG), store=place, executor="ray", reporter=reporter())
    training = store.training
    if training is None or training.metrics is None:
        return False
    full_s = _stage_seconds(store, range(store.opened.shards), first=1)
    before = training.metrics.accuracy
    console.print(
        f"{training.records:,} records of {training.subjects:,} people, {training.holdout_records} more held out; "
        f"{training.stages_trained} stages in {time.monotonic() - started:.1f} s"
    )
    _map(store, before={})

    _title(f"2. Delete {len(LEAVERS)} people, erase now and retrain later")
    keys = {(row.shard, row.stage): row.key for row in store.opened.ledger.stages.all()}
    deleted = store.delete(subjects=LEAVERS, reason="demo", defer=True, reporter=reporter())
    quarantined = store.measure()
    where = store.request(deleted.request).places
    for shard in deleted.shards:
        first = min(slice_ for k, slice_ in where if k == shard and slice_)
        console.print(
            f"shard {shard}: rows erased from slice {', '.join(str(s) for k, s in where if k == shard and s)}; "
            f"stages {first}..{store.opened.slices} purged"
        )
    held_out = sum(1 for _, slice_ in where if slice_ == 0)
    if held_out:
        console.print(f"held-out rows erased in {held_out} places: no model had seen them")
    console.print(
        f"out of service {1000 * deleted.seconds_to_quarantine:.0f} ms after the request: version "
        f"{deleted.version_before} -> {deleted.version_quarantine}"
    )

    _title("3. Repair: retrain only what had seen them")
    repaired = store.repair(executor="ray", reporter=reporter())
    after = store.measure()
    retrained_s = sum(
        _stage_seconds(store, [shard], first=min(s for k, s in where if k == shard and s)) for shard in deleted.shards
    )
    total = store.opened.shards * store.opened.slices
    console.print(
        f"{repaired.stages_retrained} of {total} stages retrained, the other {total - repaired.stages_retrained} kept"
    )
    _map(store, before=keys)
    _summary(before, quarantined, after, retrained_s, full_s)

    _title("4. Proof: train from scratch without them, and compare bit for bit")
    equal = _proof(store, scratch)
    checked = store.verify(replay="all", executor="ray", reporter=reporter())
    console.print(
        f"sisa verify --replay all: {checked.stages_checked} stages checked, {checked.stages_replayed} retrained from "
        f"nothing in {len(checked.workers)} worker processes: {'ok' if checked.ok else 'FAILED'}"
    )
    for problem in checked.problems:
        console.print(f"  {problem}")
    ok = equal and checked.ok
    console.print("\nThe ensemble has forgotten them: exactly, not approximately." if ok else "\nTHE PROOF FAILED.")
    return ok


def _proof(store: Any, scratch: Path) -> bool:
    """Train a second store on a table that never held the leavers, under the same routing key."""
    source = pa.Table.from_batches(list(open_source("builtin:digits").batches()))
    keep = [str(identifier) not in LEAVERS for identifier in source["record_id"].to_pylist()]
    path = scratch / "without.parquet"
    pq.write_table(source.filter(pa.array(keep)), path)
    recipe = sisa.load_recipe(
        CONFIG, overrides=[f"data.source={path}", f"routing.key_file={store.opened.layout.routing_key}"]
    )
    fresh = sisa.train(recipe, store=scratch / "scratch", executor="ray", reporter=reporter())
    table = Table(box=None, pad_edge=False)
    for heading in ("shard", "after the deletion", "trained without them", "equal"):
        table.add_column(heading)
    equal = True
    for ours, theirs in zip(store.status()["constituents"], fresh.status()["constituents"], strict=True):
        same = (
            bool(ours["state_digest"])
            and ours["state_digest"] == theirs["state_digest"]
            and ours["key"] == theirs["key"]
        )
        equal &= same
        table.add_row(
            str(ours["shard"]), ours["state_digest"][:24], theirs["state_digest"][:24], "yes" if same else "NO"
        )
    console.print(table)
    return equal


def _summary(before: float, quarantined: Any, after: Any, retrained_s: float, full_s: float) -> None:
    table = Table(box=None, pad_edge=False)
    for heading in ("accuracy on the holdout", "before", "in quarantine", "after"):
        table.add_column(heading)
    quarantine = f"{quarantined.accuracy:.3f} ({quarantined.voters} voters)" if quarantined else "nobody left"
    table.add_row("", f"{before:.3f}", quarantine, f"{after.accuracy:.3f}")
    console.print(table)
    console.print(
        f"retraining took {retrained_s:.2f} s of computing, everything takes {full_s:.2f} s: "
        f"{100 * retrained_s / full_s:.0f} % of it"
    )


def _stage_seconds(store: Any, shards: Any, *, first: int) -> float:
    rows = store.opened.ledger.stages.all()
    return sum(row.seconds for row in rows if row.shard in set(shards) and row.stage >= first)


def _map(store: Any, *, before: dict[tuple[int, int], str]) -> None:
    """Show shards x slices: which stages are as they were, which were trained now."""
    table = Table(box=None, pad_edge=False)
    for heading in (
        "",
        *(f"slices 1..{stage}" if stage > 1 else "slice 1" for stage in range(1, store.opened.slices + 1)),
    ):
        table.add_column(heading)
    for shard in range(store.opened.shards):
        cells = []
        for row in store.opened.ledger.stages.all(shard):
            new = before and before.get((shard, row.stage)) != row.key
            cells.append(
                f"[bold]retrained {row.key[:6]}[/]" if new else f"{'kept' if before else 'trained'} {row.key[:6]}"
            )
        table.add_row(f"shard {shard}", *cells)
    console.print(table)


def _title(text: str) -> None:
    console.print(f"\n[bold]{text}[/]")


if __name__ == "__main__":
    sys.exit(main())
