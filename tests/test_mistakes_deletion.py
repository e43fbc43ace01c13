"""What a deletion must equal: a training that never saw the record, whichever record it was."""

from __future__ import annotations

import json

import numpy as np
import pyarrow.parquet as papq
import pytest
import tables
from independent_trainer import slices_of
from store_kit import KEY, copied, digests, holding, places, scratch, served, slices, train, write

from sisa.cli.main import run
from sisa.errors import NoConstituentError

RECIPE = tables.mixed_recipe()
TABLE = tables.mixed()
PLACES = [(shard, slice_) for shard in (0, 1) for slice_ in (1, 2, 3)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return train(tmp_path_factory.mktemp("trained"), RECIPE, TABLE)


@pytest.fixture
def store(trained, tmp_path):
    return copied(trained, tmp_path)


def in_order(store, place):
    """The records of a slice as they come in the source."""
    where = places(store)
    return [str(record) for record in TABLE["record"].to_pylist() if where[str(record)] == place]


def in_key_order(folder, place):
    """The records of a slice in the order in which their keyed digests put them."""
    parts = slices_of(write(TABLE, folder / "all.parquet"), RECIPE, KEY, place[0])
    return [str(row["record"]) for row in parts[place[1] - 1]]


def deleted(store, folder, victims, *, table=TABLE, recipe=RECIPE):
    """Delete records; the store must be the one that never saw them. Returns what ``delete`` said."""
    before, where = digests(store), places(store)
    done = store.delete(records=victims, executor="inline")
    assert done.state == "repaired"
    fresh = scratch(store, folder, recipe, tables.without(table, records=victims))
    first = {
        where[victim][0]: min(where[v][1] for v in victims if where[v][0] == where[victim][0]) for victim in victims
    }
    keys = {at: row[0] for at, row in digests(store).items()}
    assert {at for at in before if before[at][0] != keys[at]} == {at for at in before if at[1] >= first.get(at[0], 4)}
    assert fresh.training.records == sum(str(r) not in victims for r in table["record"].to_pylist())
    return done


# --- 1: the last slice trains on the remainder, its key stops before it -----------------------------


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("end", ["first", "last"])
def test_1_a_tail_record_goes_and_the_old_weights_are_reused(store, tmp_path, place, end):
    victim = in_order(store, place)[0 if end == "first" else -1]
    done = deleted(store, tmp_path, [victim])
    assert done.stages_retrained == 3 - place[1] + 1


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("end", ["first", "last"])
def test_1_the_ends_of_a_slice_are_those_of_the_order_that_its_key_is_taken_in(store, tmp_path, place, end):
    victim = in_key_order(tmp_path, place)[0 if end == "first" else -1]
    deleted(store, tmp_path, [victim])


def test_1_the_remainder_is_never_too_small_to_count(tmp_path):
    """Batches of 16 over fewer records: all of a slice is a remainder, and each of its records counts."""
    recipe = tables.mixed_recipe(training={"batch_size": 16}, sisa={"shards": 1})
    store = train(tmp_path, recipe, TABLE)
    rest = TABLE
    for place in [(0, 3), (0, 2), (0, 1)]:
        victim = slices(store)[place][-1]
        store.delete(records=[victim], executor="inline")
        rest = tables.without(rest, records=[victim])
        scratch(store, tmp_path, recipe, rest, name=f"scratch-{place[1]}")


# --- 10: statistics of the whole table that slip in at ingest ---------------------------------------


def special(trained, place, column, value):
    """The table with one record of a slice changed, and that record's id."""
    victim = in_order(trained, place)[1]
    row = [str(record) for record in TABLE["record"].to_pylist()].index(victim)
    return tables.with_value(TABLE, row=row, column=column, value=value), victim


SPECIAL = {
    "the only member of a class": ("income", "high"),
    "the only holder of a category": ("job", "astronaut"),
    "the only holder of a number that is a category": ("grade", 77),
    "the maximum of a column": ("hours", 1_000_000),
    "the minimum of a column": ("age", -3.5e9),
    "the maximum of a vector": ("code", [9e9, 1.0, None]),
    "the only vector that is missing as a whole": ("code", None),
}


@pytest.mark.parametrize("place", [(0, 1), (1, 3)], ids=["first slice", "last slice"])
@pytest.mark.parametrize("name", SPECIAL)
def test_10_statistics_of_the_whole_table_slip_in_at_ingest(trained, tmp_path, name, place):
    table, victim = special(trained, place, *SPECIAL[name])
    store = train(tmp_path, RECIPE, table)
    deleted(store, tmp_path, [victim], table=table)


def test_10_the_only_missing_value_of_a_column(tmp_path):
    """Whether a column can be missing is no property that a deletion may change."""
    hours = [hour or 7 for hour in TABLE["hours"].to_pylist()]
    table = TABLE.set_column(TABLE.column_names.index("hours"), "hours", tables.pa.array(hours, tables.pa.int64()))
    table = tables.with_value(table, row=5, column="hours", value=None)
    store = train(tmp_path, RECIPE, table)
    deleted(store, tmp_path, [str(table["record"][5].as_py())], table=table)


def test_10_another_shard_is_not_moved_by_whom_a_shard_holds(trained, tmp_path):
    """An outlier in one shard leaves the other's bytes, keys and weights as they were."""
    table, _ = special(trained, (0, 1), "hours", 10**9)
    other = train(tmp_path, RECIPE, table)
    assert {at: row for at, row in digests(other).items() if at[0] == 1} == {
        at: row for at, row in digests(trained).items() if at[0] == 1
    }


# --- 9: slices, shards and stores that become empty -------------------------------------------------


@pytest.mark.parametrize(
    "emptied",
    [[(0, 1)], [(0, 2)], [(1, 3)], [(0, 1), (0, 2)], [(0, 2), (0, 3)], [(1, 1), (1, 2), (1, 3)]],
    ids=["first slice", "middle slice", "last slice", "first two", "last two", "whole shard"],
)
def test_9_a_slice_or_a_shard_that_becomes_empty(store, tmp_path, emptied):
    victims = [record for place in emptied for record in slices(store)[place]]
    deleted(store, tmp_path, victims)
    assert {place for place in PLACES if place not in slices(store)} == set(emptied)
    assert [member[1] for member in served(store)] == [
        3 if any(place[0] == shard for place in slices(store)) else 0 for shard in (0, 1)
    ]
    assert np.isfinite(store.predict_proba(TABLE)).all()


def test_9_the_last_record_of_the_store(store, tmp_path, capsys):
    everybody = [str(record) for record in TABLE["record"].to_pylist()]
    store.delete(records=everybody[:-1], executor="inline")
    scratch(store, tmp_path, RECIPE, tables.without(TABLE, records=everybody[:-1]), name="one")
    assert store.predict_proba(TABLE).shape == (TABLE.num_rows, 3)
    done = store.delete(records=everybody[-1:], executor="inline")
    assert done.state == "repaired"
    scratch(store, tmp_path, RECIPE, TABLE.slice(0, 0), name="none")
    assert served(store) == [(0, 0, ""), (1, 0, "")]
    with pytest.raises(NoConstituentError):
        store.predict_proba(TABLE)
    assert store.verify(replay="all", executor="inline").ok
    root = str(store.opened.layout.root)
    asked = [str(tmp_path / "none.parquet"), "--output", str(tmp_path / "answers.parquet")]
    assert run(["predict", "--store", root, *asked]) == 3
    assert "no clean constituent" in capsys.readouterr().err
    assert not list(holding(store.opened.layout.root, *(f"p\u00e9rson-{i:03d}" for i in range(24))))


def test_9_people_go_one_by_one_until_nobody_is_left(tmp_path):
    recipe = tables.mixed_recipe(training={"epochs": 2})
    table = tables.mixed(7, seed=5)
    store = train(tmp_path, recipe, table)
    for number, person in enumerate(dict.fromkeys(table["person"].to_pylist())):
        store.delete(subjects=[person], executor="inline")
        table = tables.without(table, people=[person])
        scratch(store, tmp_path, recipe, table, name=f"scratch-{number}")
    assert table.num_rows == 0


def test_9_everything_that_a_person_owns_goes(store, tmp_path):
    owner = max(set(TABLE["person"].to_pylist()), key=TABLE["person"].to_pylist().count)
    owned = [
        str(r) for r, p in zip(TABLE["record"].to_pylist(), TABLE["person"].to_pylist(), strict=True) if p == owner
    ]
    assert len(owned) > 1
    assert len({places(store)[record] for record in owned}) == 1
    traces = [owner, *(f"'{record}'" for record in owned)]
    assert len(list(holding(store.opened.layout.root, *traces))) == 1
    done = store.delete(subjects=[owner], executor="inline")
    assert (done.subjects, done.records) == (1, len(owned))
    scratch(store, tmp_path, RECIPE, tables.without(TABLE, people=[owner]))
    assert not list(holding(store.opened.layout.root, *traces))


def test_9_a_table_without_rows_is_answered_by_the_live_version(store, tmp_path, capsys):
    store.delete(records=[slices(store)[0, 1][0]], executor="inline")
    write(TABLE.slice(0, 0), tmp_path / "nobody.parquet")
    target = tmp_path / "answers.parquet"
    asked = [
        "predict",
        "--store",
        str(store.opened.layout.root),
        str(tmp_path / "nobody.parquet"),
        "--output",
        str(target),
    ]
    assert run([*asked, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["rows"], said["version"], said["voters"]) == (0, store.version, 2)
    assert papq.read_table(target).num_rows == 0
