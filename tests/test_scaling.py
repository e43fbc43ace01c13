"""What a deletion reads doesn't grow with the store: bytes, rows and record-epochs are counted, never time."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import crash_kit as kit
import numpy as np
import pyarrow as pa
import pytest

from sisa.records import partition, parts, several
from sisa.records.rowfile import read_table
from sisa.storage.local import LocalStorage
from sisa.store.store import Store

PEOPLE_OF_A_SHARD = 150
SLICES = 3


class Counted(io.FileIO):
    """A file that adds up which bytes were asked for."""

    total = 0

    def readinto(self, buffer: Any) -> int:
        count = super().readinto(buffer) or 0
        Counted.total += count
        return count

    def readall(self) -> bytes:
        content = super().readall()
        Counted.total += len(content)
        return content


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> type[Counted]:
    """Counts what is read of partitions."""

    @contextlib.contextmanager
    def opened(self: LocalStorage, key: str) -> Iterator[Any]:
        with io.BufferedReader(Counted(self.path(key), "rb")) as stream:
            yield stream

    monkeypatch.setattr(LocalStorage, "opened", opened)
    Counted.total = 0
    return Counted


@pytest.fixture
def folder() -> Iterator[Path]:
    with kit.fast_folder() as folder:
        yield folder


def table(count: int) -> pa.Table:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, count)
    return pa.table(
        {
            "record": [f"r{i:06d}" for i in range(count)],
            "person": [f"p{i:06d}" for i in range(count)],
            "x": rng.normal(size=count) + labels,
            "z": rng.normal(size=count),
            "label": [["no", "yes"][i] for i in labels],
        }
    )


def store_of(folder: Path, *, people: int, shards: int) -> Store:
    recipe = kit.make_recipe(folder / f"of-{shards}-{people}", table(people), shards=shards, slices=SLICES, holdout=0.0)
    return kit.trained(recipe, folder / f"store-{shards}-{people}")


def someone(store: Store, *, slice_: int) -> str:
    return next(p for p in (f"p{i:06d}" for i in range(10**6)) if store.opened.router.route_one(p) == (0, slice_))


def cost(store: Store, person: str, counted: type[Counted], *, defer: bool) -> tuple[int, int]:
    """Bytes of partitions that were read, and records of the stages that were trained."""
    before = {row.key for row in store.opened.ledger.stages.all()}
    counted.total = 0
    store.delete(subjects=[person], defer=defer, executor="inline")
    return counted.total, sum(row.records for row in store.opened.ledger.stages.all() if row.key not in before)


def test_ten_times_the_shards_cost_a_deletion_nothing(folder: Path, counted: type[Counted]) -> None:
    """Shards of one size. Who looks into another shard, or trains one, fails here; sizes of shards differ by chance."""
    found = {}
    for shards in (2, 20):
        store = store_of(folder, people=shards * PEOPLE_OF_A_SHARD, shards=shards)
        size = sum(p.records for p in store.opened.ledger.partitions.all(0))
        deferred, _ = cost(store, someone(store, slice_=2), counted, defer=True)
        repaired, records = cost(store, someone(store, slice_=3), counted, defer=False)
        found[shards] = np.array([deferred, repaired, records]) / size
        assert found[shards].all()
    assert (found[20] <= 1.2 * found[2]).all(), found


def test_of_a_large_slice_a_deletion_reads_the_persons_file_alone(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the other files only ids and digests are read, once, for the membership."""
    monkeypatch.setattr(parts, "MOST_ROWS", 40)
    store = store_of(folder, people=1_500, shards=1)
    assert len(list(store.opened.layout.partition(0, 2).glob("*.parquet"))) == 16
    person = someone(store, slice_=2)
    read: dict[str, list[str]] = {"all": [], "ids": [], "ids and digests": []}

    def reading(storage: Any, key: str, columns: list[str] | None = None) -> Any:
        kind = "all" if columns is None else "ids" if len(columns) == 2 else "ids and digests"
        found = read_table(storage, key, columns)
        if found is not None:
            read[kind].append(key)
        return found

    for module in (partition, several):
        monkeypatch.setattr(module, "read_table", reading)
    store.delete(subjects=[person], defer=True)
    assert len(read["all"]) == 1
    assert read["ids"] == read["all"]
    assert len(set(read["ids and digests"])) == len(read["ids and digests"]) == 16
    assert all("slice=02" in key for keys in read.values() for key in keys)
