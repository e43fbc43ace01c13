"""Large slices lie in several files: the split decides no bit, an erasure rewrites its people's files alone, and none is lost unseen."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import crash_kit as kit
import numpy as np
import pyarrow as pa
import pyarrow.parquet as papq
import pytest
from postgres_kit import Server
from records_tools import KEY, everything, people, resolved, saved, stored
from s3_kit import S3Server
from s3_kit import everything as all_objects

import sisa
from sisa.errors import DamagedError
from sisa.records import parts
from sisa.records.batches import read_batches
from sisa.records.names import RECORD, SUBJECT
from sisa.records.partition import present_contents, present_ids, read_partition
from sisa.records.parts import complete, file_name, files_for, parse_name
from sisa.records.strays import stray_files, stray_keys
from sisa.routing import shard_keys
from sisa.store.store import Store

TABLE = kit.people(40, seed=3)
OWNERS = dict(zip(TABLE["record"].to_pylist(), TABLE["person"].to_pylist(), strict=True))


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What is decided at ingest holds ever after: only a process that ingests sees this."""
    monkeypatch.setattr(parts, "MOST_ROWS", 3)
    yield
    kit.Child.kill_all()


# --- names ------------------------------------------------------------------------------------------


def test_names_tell_number_and_count() -> None:
    for of in (2, 4, 65_536):
        assert parse_name(file_name(of - 1, of)) == (of - 1, of)
    wrong = ["part-00000.parquet", "part-00002-of-00002.parquet", "part-00000-of-00001.parquet", "part-1-of-2.parquet"]
    assert [parse_name(name) for name in wrong] == [None] * 4
    assert [files_for(rows, most=3) for rows in (0, 1, 3, 4, 6, 7, 12, 13, 10**9)] == [1, 1, 1, 2, 2, 4, 4, 8, 65_536]


def test_a_set_of_files_is_whole_or_says_what_is_missing() -> None:
    names = [file_name(number, 4) for number in range(4)]
    assert complete([*reversed(names), "other"]) == (names, "")
    assert complete(["part-00000.parquet"]) == ([], "")
    assert complete(names[:3]) == ([], "file 3 of 4 is missing")
    assert complete([*names, file_name(0, 2)])[1] == "there are files of 2 and of 4"


# --- the split decides nothing ------------------------------------------------------------------------


@pytest.mark.parametrize(("most", "budget_bytes"), [(1, 4_000), (7, 1), (7, 10**9), (20, 4_000)])
def test_rows_and_memberships_do_not_depend_on_the_split(
    most: int, budget_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = resolved(saved(tmp_path, people()))
    monkeypatch.setattr(parts, "MOST_ROWS", 65_536)
    single, counts = stored(tmp_path / "single", recipe)
    monkeypatch.setattr(parts, "MOST_ROWS", most)
    monkeypatch.setattr("sisa.records.spool.FINE", 5)
    monkeypatch.setattr("sisa.records.formats.LEAST_ROWS", 13)
    monkeypatch.setattr("sisa.records.formats.BATCH_BYTES", 1)
    monkeypatch.setitem(sisa.records.write.write.__kwdefaults__, "budget_bytes", budget_bytes)
    layout, found = stored(tmp_path / "several", recipe)
    assert [(c.membership, c.records, c.subjects) for c in found] == [
        (c.membership, c.records, c.subjects) for c in counts
    ]
    several = {(c.shard, c.slice): len(c.files) for c in found if c.files}
    assert several
    assert stray_files(layout, 3, 2, several=several) == [] == stray_keys(layout, 3, 2, several=several)
    assert stray_files(layout, 3, 2)
    for place, rows in everything(layout, recipe).items():
        expected = everything(single, recipe)[place]
        assert same(rows.table, expected.table)
        assert sorted(present_ids(layout, *place)[0].to_pylist()) == sorted(rows.table[RECORD].to_pylist())
        assert len(present_contents(layout, *place)[1]) == len(rows.table)
        got: list[pa.Table] = []
        read = read_batches(layout, recipe, shard_keys(KEY, place[0]), place[1], got.append)
        assert read.membership == expected.membership
        if got:
            assert same(pa.concat_tables(got).take(pa.array(read.order_N)), expected.table)
        owners = [
            set(papq.read_table(path, partitioning=None)[SUBJECT].to_pylist()) for path in files_at(layout, place)
        ]
        assert sum(map(len, owners)) == len(set().union(*owners))


def same(one: pa.Table, other: pa.Table) -> bool:
    """Arrow's own comparison takes NaN for different from itself."""
    return bool(one.schema.types == other.schema.types) and repr(one.to_pydict()) == repr(other.to_pydict())


def files_at(layout: Any, place: tuple[int, int]) -> list[Path]:
    return sorted(layout.partition(*place).glob("*.parquet"))


# --- a store with several files ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with kit.fast_folder() as folder:
        yield folder


@pytest.fixture(scope="module")
def template(folder: Path) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts, "MOST_ROWS", 3)
        kit.trained(recipe(folder), folder / "template").close()
    return folder / "template"


def recipe(folder: Path, table: pa.Table = TABLE) -> dict[str, Any]:
    return kit.make_recipe(folder / secrets.token_hex(4), table, slices=2)


@pytest.fixture
def root(folder: Path, template: Path) -> Iterator[Path]:
    target = kit.copy_store(template, folder / secrets.token_hex(8))
    yield target
    shutil.rmtree(target)


def pair_of_one_slice(store: Store) -> tuple[tuple[int, int], list[str]]:
    """A slice, and two of its people whose rows lie in two files."""
    by_file: dict[tuple[int, int], dict[int, str]] = {}
    for person, place in sorted(kit.places(store, TABLE).items()):
        if place[1] != 0:
            by_file.setdefault(place, {}).setdefault(file_of(store, place, person), person)
    place = max(by_file, key=lambda each: len(by_file[each]))
    first, second = list(by_file[place].values())[:2]
    return place, [first, second]


def file_of(store: Store, place: tuple[int, int], person: str) -> int:
    for number, path in enumerate(files_at(store.opened.layout, place)):
        if person in papq.read_table(path, partitioning=None)[SUBJECT].to_pylist():
            return number
    raise AssertionError(person)


def bits(store: Store) -> list[tuple[int, int, str, str]]:
    rows = store.opened.ledger.stages.all()
    return sorted((row.shard, row.stage, row.key, row.full_digest) for row in rows if not row.tainted)


def fresh(folder: Path, *gone: str) -> list[tuple[int, int, str, str]]:
    """The bits of a training without some people, every slice in a single file."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts, "MOST_ROWS", 65_536)
        table = TABLE.filter(pa.array([person not in gone for person in TABLE["person"].to_pylist()]))
        store = kit.trained(recipe(folder, table), folder / secrets.token_hex(8))
    found = bits(store)
    assert not list(store.opened.layout.records.rglob("*-of-*"))
    store.close()
    return found


def state_of(path: Path) -> tuple[int, int, bytes]:
    return path.stat().st_ino, path.stat().st_mtime_ns, path.read_bytes()


def test_a_deletion_rewrites_the_persons_file_alone(root: Path, folder: Path) -> None:
    store = kit.reopened(root)
    assert bits(store) == fresh(folder)
    place, (person, other) = pair_of_one_slice(store)
    before = {path: state_of(path) for path in store.opened.layout.records.rglob("*.parquet")}
    theirs = files_at(store.opened.layout, place)[file_of(store, place, person)]
    store.delete(subjects=[person], executor="inline")
    after = {path: state_of(path) for path in store.opened.layout.records.rglob("*.parquet")}
    assert {path for path in before if before[path] != after.get(path)} == {theirs}
    assert after.keys() == before.keys()
    assert person not in set().union(*kit.owners_on_disk(root).values())
    assert bits(store) == fresh(folder, person)
    assert store.verify(replay="all", executor="inline").problems == []
    records = [record for record, owner in OWNERS.items() if owner == other]
    store.delete(records=records, executor="inline")
    assert bits(store) == fresh(folder, person, other)


def test_a_slice_that_loses_everybody_keeps_its_files(root: Path, folder: Path) -> None:
    store = kit.reopened(root)
    place, _ = pair_of_one_slice(store)
    together = [person for person, where in kit.places(store, TABLE).items() if where == place]
    files = files_at(store.opened.layout, place)
    store.delete(subjects=together, executor="inline")
    assert files_at(store.opened.layout, place) == files
    assert all(papq.read_metadata(path).num_rows == 0 for path in files)
    assert bits(store) == fresh(folder, *together)
    assert store.verify(replay="all", executor="inline").problems == []


def delete(root: Path, subjects: list[str]) -> None:
    kit.reopened(root).delete(subjects=subjects, executor="inline")


def test_killed_before_any_step_of_an_erasure_of_two_files_it_goes_on(root: Path, folder: Path) -> None:
    store = kit.reopened(root)
    _, leavers = pair_of_one_slice(store)
    store.close()
    undisturbed = kit.copy_store(root, folder / secrets.token_hex(8))
    names = kit.operations(delete, undisturbed, leavers, root=undisturbed)
    expected = kit.end_state(kit.reopened(undisturbed))
    rewriting = [
        number
        for number, name in enumerate(names)
        if "several.rewrite" in name or "COMMIT in ledger.partitions" in name
    ]
    assert len([number for number in rewriting if names[number].startswith("replace")]) == 2
    for number in rewriting:
        copy = kit.copy_store(root, folder / secrets.token_hex(8))
        kit.killed_before(delete, copy, leavers, root=copy, stop_at=number)
        again = kit.reopened(copy)
        if names[number].startswith("replace"):
            told = [line for line in again.verify().problems if "slice" in line and "unfinished" not in line]
            assert all("rows of deleted people" in line for line in told), told
        again.repair(executor="inline")
        assert kit.end_state(again) == expected, names[number]
        again.close()
    assert [row[4] for row in expected["stages"]] == [row[3] for row in sorted(fresh(folder, *leavers))]


def test_killed_between_two_files_twice_with_another_request_between(root: Path, folder: Path) -> None:
    """The second preparation must not make strangers of what the first has left."""
    store = kit.reopened(root)
    place, leavers = pair_of_one_slice(store)
    third = next(p for p, where in kit.places(store, TABLE).items() if where == place and p not in leavers)
    store.close()
    names = kit.operations(delete, kit.copy_store(root, folder / secrets.token_hex(8)), leavers, root=folder)
    second = [number for number, name in enumerate(names) if name == "replace in records.several.rewrite_file"][1]
    kit.killed_before(delete, root, leavers, root=root, stop_at=second)
    kit.killed_before(delete, root, [third], root=root, stop_at="replace in records.several.rewrite_file")
    store = kit.reopened(root)
    store.repair(executor="inline")
    assert bits(store) == fresh(folder, *leavers, third)
    assert store.verify(replay="all", executor="inline").problems == []


def test_a_correction_in_two_files_that_was_killed_is_merged_once(root: Path, folder: Path) -> None:
    store = kit.reopened(root)
    _, pair = pair_of_one_slice(store)
    store.close()
    of_pair = pa.array([person in pair for person in TABLE["person"].to_pylist()])
    rows = TABLE.filter(of_pair)
    rows = rows.set_column(2, "x", pa.array(np.arange(len(rows)) + 50.0))
    papq.write_table(rows, folder / "better.parquet")
    values = TABLE["x"].to_numpy().copy()
    values[of_pair.to_numpy(zero_copy_only=False)] = rows["x"].to_numpy()
    expected = kit.trained(recipe(folder, TABLE.set_column(2, "x", pa.array(values))), folder / secrets.token_hex(8))
    names = kit.operations(correct, kit.copy_store(root, folder / secrets.token_hex(8)), folder, root=folder)
    replaced = [number for number, name in enumerate(names) if name == "replace in records.several.rewrite_file"]
    assert len(replaced) == 2
    for number in replaced:
        copy = kit.copy_store(root, folder / secrets.token_hex(8))
        kit.killed_before(correct, copy, folder, root=copy, stop_at=number)
        again = kit.reopened(copy)
        again.repair(executor="inline")
        assert bits(again) == bits(expected)
        assert again.verify(replay="all", executor="inline").problems == []


def correct(root: Path, folder: Path) -> None:
    kit.reopened(root).correct(str(folder / "better.parquet"), executor="inline")


def test_an_added_generation_has_several_files_too(root: Path, folder: Path) -> None:
    more = kit.more_people(30, generation=1)
    papq.write_table(more, folder / "more.parquet")
    store = kit.reopened(root)
    store.add(str(folder / "more.parquet"), executor="inline")
    assert len(files_at(store.opened.layout, (0, 3))) > 1
    person = store.opened.layout and present_ids(store.opened.layout, 0, 3)[1][0].as_py()
    store.delete(subjects=[person], executor="inline")
    assert store.verify(replay="all", executor="inline").problems == []
    assert person not in set().union(*kit.owners_on_disk(root).values())


# --- damage -----------------------------------------------------------------------------------------


def test_a_missing_file_is_damage_and_never_an_empty_one(root: Path) -> None:
    store = kit.reopened(root)
    opened = store.opened
    place, (person, other) = pair_of_one_slice(store)
    path = files_at(opened.layout, place)[file_of(store, place, person)]
    content = path.read_bytes()
    path.unlink()
    keys = shard_keys(opened.keys.routing, place[0])
    for read in (
        lambda: read_partition(opened.layout, opened.recipe, keys, *place),
        lambda: present_ids(opened.layout, *place),
        lambda: present_contents(opened.layout, *place),
        lambda: read_batches(opened.layout, opened.recipe, keys, place[1], lambda _: None),
    ):
        with pytest.raises(DamagedError, match="is missing"):
            read()
    assert [line for line in store.verify().problems if "is missing" in line]
    with pytest.raises(DamagedError):
        store.delete(records=["nobody's"], executor="inline")
    for who in (person, other):  # what may have seen them is out of service; of the other's file nothing is lost
        with pytest.raises(DamagedError, match=r"is accepted and no prediction uses .* is missing"):
            store.delete(subjects=[who], defer=True)
    path.write_bytes(content)
    store.repair(executor="inline")
    assert store.verify(replay="all", executor="inline").problems == []
    assert not {person, other} & set().union(*kit.owners_on_disk(root).values())


def test_another_file_in_its_place_is_damage(root: Path) -> None:
    """Rows that moved into another file leave the slice's membership as it is: an erasure would look past them."""
    store = kit.reopened(root)
    opened = store.opened
    place, (person, other) = pair_of_one_slice(store)
    paths = [files_at(opened.layout, place)[file_of(store, place, who)] for who in (person, other)]
    os.rename(paths[0], paths[0].with_name("kept"))
    os.rename(paths[1], paths[0])
    os.rename(paths[0].with_name("kept"), paths[1])
    keys = shard_keys(opened.keys.routing, place[0])
    with pytest.raises(DamagedError, match="belong into another file"):
        read_partition(opened.layout, opened.recipe, keys, *place)
    with pytest.raises(DamagedError, match="belong into another file"):
        read_batches(opened.layout, opened.recipe, keys, place[1], lambda _: None)
    assert [line for line in store.verify().problems if "belong into another file" in line]
    assert person in set().union(*kit.owners_on_disk(root).values())


def test_an_older_file_that_comes_back_is_erased_again(root: Path, folder: Path) -> None:
    store = kit.reopened(root)
    place, (person, _) = pair_of_one_slice(store)
    path = files_at(store.opened.layout, place)[file_of(store, place, person)]
    content = path.read_bytes()
    store.delete(subjects=[person], executor="inline")
    path.write_bytes(content)
    assert [line for line in store.verify().problems if "rows of deleted people" in line]
    store.repair(executor="inline")
    assert store.verify(replay="all", executor="inline").problems == []
    assert bits(store) == fresh(folder, person)


@pytest.mark.parametrize(
    ("statement", "message"),
    [
        ("UPDATE partition_files SET records = records + 1", "that the ledger expects"),
        ("UPDATE partition_files SET membership = 'x'", "others than the ledger expects"),
        ("UPDATE partition_files SET next_records = 1, next_membership = 'x'", "an erasure is prepared"),
        ("DELETE FROM partition_files", "but a single file in the ledger"),
        ("INSERT INTO partition_files VALUES (9, 1, 0, 1, 'x', NULL, NULL)", "files of no slice"),
    ],
)
def test_what_the_ledger_says_of_files_is_held_against_the_disk(root: Path, statement: str, message: str) -> None:
    store = kit.reopened(root)
    with store.opened.ledger.database.transaction():
        store.opened.ledger.database.rows(statement)
    assert [line for line in store.verify().problems if message in line]


def test_whose_file_could_not_be_read_when_they_left_is_counted_when_it_is(root: Path, folder: Path) -> None:
    store = kit.reopened(root)
    place, (person, _) = pair_of_one_slice(store)
    theirs = files_at(store.opened.layout, place)[file_of(store, place, person)]
    kept = theirs.read_bytes()
    theirs.write_bytes(b"torn")
    with pytest.raises(DamagedError):
        store.delete(subjects=[person], executor="inline")
    assert [request["records"] for request in store.status()["requests"]] == [0]
    theirs.write_bytes(kept)
    store.repair(executor="inline")
    records = [record for record, owner in OWNERS.items() if owner == person]
    assert [request["records"] for request in store.status()["requests"]] == [len(records)]
    assert bits(store) == fresh(folder, person)
    assert store.verify(replay="all", executor="inline").problems == []


# --- in object storage ---------------------------------------------------------------------------------


def test_in_a_bucket_the_same(folder: Path) -> None:
    with S3Server().running() as server:
        bucket = server.bucket(versioned=True)
        keys = {}
        for field, content in (("key_file", "00" * 32), ("exclusion_key_file", secrets.token_hex(32))):
            path = folder / f"{field}.key"
            path.write_text(content)
            path.chmod(0o600)
            keys[field] = str(path)
        place = {"store": f"s3://{bucket}/one", "ledger": str(folder / "beside" / "ledger.db"), "routing": keys}
        store = sisa.train({**recipe(folder), **place}, executor="inline")
        assert bits(store) == fresh(folder)
        before = all_objects(server, bucket, "one/records")
        person = TABLE["person"][5].as_py()
        shard, slice_ = store.opened.router.route_one(person)
        store.delete(subjects=[person], executor="inline")
        after = all_objects(server, bucket, "one/records")
        changed = [key for key, _ in set(before) - set(after)]
        assert len(changed) == 1
        assert f"shard={shard:04d}/slice={slice_:02d}/" in changed[0]
        assert {key for key, _ in after} == {key for key, _ in before}
        assert bits(store) == fresh(folder, person)
        assert store.verify(replay="all", executor="inline").problems == []
        store.opened.layout.storage.remove(changed[0].removeprefix("one/"))
        assert [line for line in store.verify().problems if "is missing" in line]


# --- with a ledger on a server --------------------------------------------------------------------------


def tables_of(server: Server) -> bytes:
    """Every byte of its tables, read past it."""
    server.ask("CHECKPOINT")
    return b"".join(path.read_bytes() for path in server.folder.rglob("base/*/*") if path.is_file())


def test_with_a_ledger_on_a_server_the_same(folder: Path, postgres: Server, postgres_url: str) -> None:
    """And of what files held before an erasure its tables keep nothing, as of what the slice held."""
    store = kit.trained({**recipe(folder), "ledger": postgres_url}, folder / secrets.token_hex(8))
    place, leavers = pair_of_one_slice(store)
    before = store.opened.ledger.partitions.get(*place)
    digests = [before.files[file_of(store, place, person)].membership for person in leavers]
    assert all(digest.encode() in tables_of(postgres) for digest in digests)
    store.delete(subjects=leavers, executor="inline")
    assert bits(store) == fresh(folder, *leavers)
    assert store.verify(replay="all", executor="inline").problems == []
    kept = tables_of(postgres)
    assert not [digest for digest in digests if digest.encode() in kept]
