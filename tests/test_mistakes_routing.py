"""Survivors who change places because others went."""

from __future__ import annotations

import pytest
import tables
from store_kit import again, copied, holding, places, scratch, train, write

RECIPE = tables.mixed_recipe()
TABLE = tables.mixed()
PEOPLE = list(dict.fromkeys(TABLE["person"].to_pylist()))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return train(tmp_path_factory.mktemp("trained"), RECIPE, TABLE)


@pytest.fixture
def store(trained, tmp_path):
    return copied(trained, tmp_path)


def test_5_survivors_change_shard_or_slice_because_positions_shift(store, tmp_path):
    before = places(store)
    victims = PEOPLE[::3]
    store.delete(subjects=victims, executor="inline")
    after = places(store)
    assert after == {record: at for record, at in before.items() if record in after}
    fresh = scratch(store, tmp_path, RECIPE, tables.without(TABLE, people=victims))
    assert places(fresh) == after


def test_5_a_record_lies_where_its_key_puts_it_whoever_else_there_is(trained, tmp_path):
    """Each person alone in a store of their own lies in the same shard and slice as among all."""
    where = places(trained)
    recipe = tables.mixed_recipe(training={"epochs": 2})
    for person in PEOPLE[:4]:
        others = [other for other in PEOPLE if other != person]
        alone = train(tmp_path, recipe, tables.without(TABLE, people=others), name=person)
        assert places(alone).items() <= where.items()


def test_5_a_holdout_is_chosen_by_subject_and_stays(tmp_path):
    recipe = tables.mixed_recipe(data={"holdout": {"fraction": 0.3}})
    store = train(tmp_path, recipe, TABLE)
    before = places(store)
    owners = dict(zip(map(str, TABLE["record"].to_pylist()), TABLE["person"].to_pylist(), strict=True))
    held_out = {owners[record] for record, (_, slice_) in before.items() if slice_ == 0}
    others = {owners[record] for record, (_, slice_) in before.items() if slice_ != 0}
    assert held_out
    assert not held_out & others
    version = store.version
    done = store.delete(subjects=[min(held_out)], executor="inline")
    assert (done.shards, done.stages_retrained, done.version_after) == ([], 0, version)
    assert done.version_quarantine is None
    store.delete(subjects=[min(others)], executor="inline")
    gone_people = [min(held_out), min(others)]
    fresh = scratch(store, tmp_path, recipe, tables.without(TABLE, people=gone_people))
    assert fresh.training.holdout_records == sum(slice_ == 0 for _, slice_ in places(store).values())
    assert not list(holding(store.opened.layout.root, *gone_people))
    assert again(store, tmp_path, recipe, tmp_path / "store.parquet").training.stages_trained == 0
    assert not list(holding(store.opened.layout.root, *gone_people))


def test_5_a_second_source_is_held_out_and_forgets_like_the_first(tmp_path):
    """Somebody has rows in both: they all go, and neither source brings them back."""
    second = tables.mixed(30, seed=12)
    second = second.set_column(0, "record", tables.pa.array([r + 10_000 for r in second["record"].to_pylist()]))
    path = write(second, tmp_path / "second.parquet")
    recipe = tables.mixed_recipe(data={"holdout": {"source": str(path)}})
    store = train(tmp_path, recipe, TABLE)
    assert store.training.holdout_records == second.num_rows
    both = next(p for p in PEOPLE if p in second["person"].to_pylist())
    only_held_out = next(p for p in second["person"].to_pylist() if p not in PEOPLE)
    first = store.delete(subjects=[both], executor="inline")
    assert first.records == sum(t["person"].to_pylist().count(both) for t in (TABLE, second))
    assert store.delete(subjects=[only_held_out], executor="inline").stages_retrained == 0
    record = str(second["record"][0].as_py()) if second["person"][0].as_py() not in {both, only_held_out} else None
    assert record is None or store.delete(records=[record], executor="inline").shards == []
    assert again(store, tmp_path, recipe, tmp_path / "store.parquet").training.stages_trained == 0
    for person in (both, only_held_out):
        assert not list(holding(store.opened.layout.root, person))
    rest = tables.without(second, people=[both, only_held_out], records=[record])
    write(rest, path)
    scratch(store, tmp_path, recipe, tables.without(TABLE, people=[both]))
    assert store.verify(replay="all", executor="inline").ok
