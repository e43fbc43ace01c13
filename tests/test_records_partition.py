"""Partitions: damage is loud, rows leave durably, nothing unexpected hides among the files."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as papq
import pytest
from records_tools import KEY, SHARDS, SLICES, everything, memberships, people, resolved, saved, stored

from sisa import files, lineage
from sisa.errors import DamagedError
from sisa.layout import Layout
from sisa.recipe import Recipe
from sisa.records.digest import content_digests, id_digests
from sisa.records.excluded import excluded_rows
from sisa.records.names import CONTENT, LABEL, RECORD, SUBJECT
from sisa.records.partition import (
    partition_file,
    present_contents,
    present_ids,
    read_partition,
    rewrite_partition,
)
from sisa.records.seal import seal
from sisa.records.strays import stray_files
from sisa.routing import exclusion_digest, shard_keys

Store = tuple[Layout, Recipe, dict[tuple[int, int], str]]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    recipe = resolved(saved(tmp_path, people()))
    layout, counts = stored(tmp_path / "store", recipe)
    return layout, recipe, memberships(counts)


def read(store: Store, shard: int = 1, slice_: int = 1) -> Any:
    return read_partition(store[0], store[1], shard_keys(KEY, shard), shard, slice_)


def test_a_partition_reads_back_in_canonical_order(store: Store) -> None:
    rows = read(store)
    assert rows.membership == store[2][1, 1]
    assert rows.table.schema.names == [RECORD, SUBJECT, "age", "city", "pay", "pixels", "vector", LABEL]
    assert [row.tobytes() for row in rows.id_digests_N16] == sorted(row.tobytes() for row in rows.id_digests_N16)
    assert np.array_equal(id_digests(shard_keys(KEY, 1), rows.table[RECORD]), rows.id_digests_N16)
    assert np.array_equal(content_digests(shard_keys(KEY, 1), rows.table, store[1]), rows.content_digests_N16)
    assert all(column.num_chunks == 1 for column in rows.table.columns)


def test_a_partition_holds_no_column_that_the_recipe_does_not_name(tmp_path: Path) -> None:
    recipe = resolved(saved(tmp_path, people()), features=["age"])
    layout, _ = stored(tmp_path / "store", recipe)
    schema = papq.read_schema(partition_file(layout, 1, 1))
    assert schema.names == [RECORD, SUBJECT, "age", LABEL, CONTENT]


def test_values_are_not_repeated_in_the_footer(store: Store) -> None:
    metadata = papq.ParquetFile(partition_file(store[0], 1, 1)).metadata
    for group in range(metadata.num_row_groups):
        for column in range(metadata.num_columns):
            assert metadata.row_group(group).column(column).statistics is None


def test_a_missing_folder_is_an_empty_slice(store: Store) -> None:
    layout, recipe, _ = store
    files.remove(layout.partition(1, 1))
    rows = read(store)
    nobody = np.empty((0, 16), np.uint8)
    assert rows.table.num_rows == 0
    assert rows.membership == lineage.membership(nobody, nobody)
    assert rows.table.schema.names[2:-1] == recipe.data.features
    assert all(column.num_chunks == 1 for column in rows.table.columns)
    assert [len(ids) for ids in present_ids(layout, 1, 1)] == [0, 0]


def test_no_flipped_bit_is_read_as_another_value(store: Store) -> None:
    """Every byte of the file in turn, a random bit of it: damage is an error, or changes nothing."""
    path = partition_file(store[0], 1, 1)
    whole = path.read_bytes()
    expected = read(store)
    rng = np.random.default_rng(11)
    silent = loud = 0
    for position in [*range(0, len(whole), 17), *range(len(whole) - 200, len(whole))]:
        damaged = bytearray(whole)
        damaged[position] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        try:
            rows = read(store)
        except DamagedError:
            loud += 1
            continue
        silent += 1  # a bit of the footer that means nothing to a reader
        assert rows.membership == expected.membership
        assert str(rows.table.to_pylist()) == str(expected.table.to_pylist())
    assert loud > silent


@pytest.mark.parametrize("length", [0, 3, 4, 100, -1, -8])
def test_a_truncated_file_is_damage(store: Store, length: int) -> None:
    path = partition_file(store[0], 1, 1)
    path.write_bytes(path.read_bytes()[:length])
    for reader in (read, lambda s: present_ids(s[0], 1, 1), lambda s: present_contents(s[0], 1, 1)):
        with pytest.raises(DamagedError, match=r"part-00000\.parquet") as caught:
            reader(store)
        assert caught.value.exit_code == 3


def rewritten(path: Path, change: Callable[[pa.Table], pa.Table]) -> None:
    """Write another table in the file's place, its checksums in order: what checksums can't see."""
    papq.write_table(change(papq.read_table(path, partitioning=None)), path, write_page_checksum=True)
    seal(path)


def replaced(table: pa.Table, name: str, array: pa.Array) -> pa.Table:
    return table.set_column(table.schema.get_field_index(name), name, array)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: replaced(t, "age", pa.array(t["age"].to_numpy() + 1)), "content of a row is not what was written"),
        (lambda t: replaced(t, LABEL, pa.array(1 - t[LABEL].to_numpy())), "content of a row"),
        (lambda t: replaced(t, SUBJECT, pa.array(["x"] * len(t))), "content of a row"),
        (lambda t: replaced(t, "city", pa.nulls(len(t), pa.string())), "content of a row"),
        (lambda t: replaced(t, CONTENT, pa.nulls(len(t), pa.binary(16))), "can't be decoded"),
        (lambda t: replaced(t, "age", pa.array(range(len(t)))), "column 'age' is of type int64"),
        (lambda t: t.drop_columns(["age"]), "columns are not those of the recipe"),
    ],
)
def test_rows_that_changed_under_valid_checksums_are_damage(
    store: Store, change: Callable[[pa.Table], pa.Table], message: str
) -> None:
    rewritten(partition_file(store[0], 1, 1), change)
    with pytest.raises(DamagedError, match=message) as caught:
        read(store)
    assert "shard=0001" in caught.value.message


def test_lost_or_renamed_rows_change_the_membership(store: Store) -> None:
    path = partition_file(store[0], 1, 1)
    rewritten(path, lambda t: t.slice(1))
    assert read(store).membership != store[2][1, 1]
    rewritten(path, lambda t: replaced(t, RECORD, pa.array([f"r{i}" for i in range(len(t))])))
    assert read(store).membership != store[2][1, 1]


def test_order_in_the_file_means_nothing(store: Store) -> None:
    rewritten(partition_file(store[0], 1, 1), lambda t: t.take(pa.array(np.arange(len(t))[::-1])))
    assert read(store).membership == store[2][1, 1]


def test_present_ids_are_those_of_the_rows(store: Store) -> None:
    rows = read(store)
    records, subjects = present_ids(store[0], 1, 1)
    assert sorted(records.to_pylist()) == sorted(rows.table[RECORD].to_pylist())
    assert set(subjects.to_pylist()) == set(rows.table[SUBJECT].to_pylist())
    named, digests = present_contents(store[0], 1, 1)
    assert dict(zip(named.to_pylist(), map(bytes, digests), strict=True)) == dict(
        zip(rows.table[RECORD].to_pylist(), map(bytes, rows.content_digests_N16), strict=True)
    )


def positions(count: int) -> Iterator[list[int]]:
    yield from ([0], [count - 1], [1, count // 2], list(range(0, count, 2)))


def test_rows_leave_wherever_they_are(store: Store) -> None:
    """The first, the last and others: names of reference bugs about tail records."""
    layout = store[0]
    path = partition_file(layout, 1, 1)
    whole = path.read_bytes()
    for gone in positions(read(store).table.num_rows):
        path.write_bytes(whole)
        rows = read(store)
        keep_N = np.ones(rows.table.num_rows, np.bool_)
        keep_N[gone] = False
        rewrite_partition(layout, 1, 1, keep_N, rows)
        left = read(store)
        assert left.membership == lineage.membership(rows.id_digests_N16[keep_N], rows.content_digests_N16[keep_N])
        assert left.table[RECORD].to_pylist() == rows.table.filter(pa.array(keep_N))[RECORD].to_pylist()
        content = path.read_bytes()
        for record in rows.table.filter(pa.array(~keep_N))[RECORD].to_pylist():
            assert record not in present_ids(layout, 1, 1)[0].to_pylist()
        assert len(content) < len(whole)
        assert stray_files(layout, SHARDS, SLICES) == []


def test_the_last_row_takes_the_file_along(store: Store) -> None:
    layout = store[0]
    rows = read(store)
    rewrite_partition(layout, 1, 1, np.zeros(rows.table.num_rows, np.bool_), rows)
    assert not layout.partition(1, 1).exists()
    assert read(store).table.num_rows == 0
    rewrite_partition(layout, 1, 1, np.zeros(0, np.bool_), read(store))


def test_a_decision_for_each_row(store: Store) -> None:
    with pytest.raises(ValueError, match="rows, but"):
        rewrite_partition(store[0], 1, 1, np.ones(3, np.bool_), read(store))


@pytest.mark.parametrize("killed_at", ["fsync_path", "replace"])
def test_killed_while_rewriting_the_old_rows_are_whole(
    store: Store, killed_at: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = store[0]
    rows = read(store)
    keep_N = np.arange(rows.table.num_rows) > 0

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(files, "fsync_path", killed) if killed_at == "fsync_path" else patch.setattr(
            os, "replace", killed
        )
        with pytest.raises(KeyboardInterrupt):
            rewrite_partition(layout, 1, 1, keep_N, rows)
    assert read(store).membership == rows.membership


def test_strays_are_listed(store: Store) -> None:
    layout = store[0]
    assert stray_files(layout, SHARDS, SLICES) == []
    strays = [
        layout.partition(1, 1) / "tmp-0123",
        layout.partition(1, 1) / "part-00001.parquet",
        layout.records / "notes.txt",
        layout.records / "shard=0009",
        layout.records / "holdout" / "shard=0000" / "copy.parquet",
    ]
    for path in strays:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir() if path.name == "shard=0009" else path.write_bytes(b"")
    assert stray_files(layout, SHARDS, SLICES) == sorted(strays)
    # What lay right for more slices is astray for fewer.
    assert layout.partition(1, 2) in stray_files(layout, SHARDS, 1)


def test_all_rows_are_somewhere_once(store: Store) -> None:
    found = [record for rows in everything(store[0], store[1]).values() for record in rows.table[RECORD].to_pylist()]
    assert sorted(found, key=int) == [str(i * 3) for i in range(200)]


def test_excluded_rows_are_marked_by_either_digest() -> None:
    records, subjects = pa.array(["1", "2", "3", "4"]), pa.chunked_array([["a", "b"], ["a", "4"]])
    exclusions = {("subject", exclusion_digest(KEY, "subject", "a")), ("record", exclusion_digest(KEY, "record", "4"))}
    assert excluded_rows(records, subjects, exclusions, KEY).tolist() == [True, False, True, True]
    assert excluded_rows(records, subjects, set(), KEY).tolist() == [False] * 4
    assert not excluded_rows(records, subjects, exclusions, bytes(32)).any()
    crossed = {("record", exclusion_digest(KEY, "subject", "a"))}
    assert not excluded_rows(records, subjects, crossed, KEY).any()


class _TooManyToWalk(set[tuple[str, bytes]]):
    """Pairs among which one may look up, and nothing else."""

    def __iter__(self) -> Iterator[tuple[str, bytes]]:
        raise AssertionError("somebody walks over all exclusions")


def test_exclusions_that_outnumber_the_rows_are_not_walked() -> None:
    """They may be millions, and partitions thousands."""
    records, subjects = pa.array(["1", "2"]), pa.chunked_array([["a", "b"]])
    exclusions = _TooManyToWalk(("subject", exclusion_digest(KEY, "subject", name)) for name in "axyz")
    exclusions.add(("record", exclusion_digest(KEY, "record", "2")))
    assert excluded_rows(records, subjects, exclusions, KEY).tolist() == [True, True]
