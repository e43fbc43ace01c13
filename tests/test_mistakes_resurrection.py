"""Deleted people who come back."""

from __future__ import annotations

import json

import pytest
import tables
from store_kit import again, assert_same, at, copied, digests, holding, places, scratch, served, slices, train, write

import sisa
from sisa.cli.main import run
from sisa.errors import UnknownIdsError, UserError
from sisa.store import launch
from sisa.store import store as store_module

RECIPE = tables.mixed_recipe()
TABLE = tables.mixed()
PEOPLE = list(dict.fromkeys(TABLE["person"].to_pylist()))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return train(tmp_path_factory.mktemp("trained"), RECIPE, TABLE)


@pytest.fixture
def store(trained, tmp_path):
    return copied(trained, tmp_path)


@pytest.fixture
def source(tmp_path):
    return write(TABLE, tmp_path / "source.parquet")


def gone(store, *people):
    """Nothing below the store's folder names these people or their records."""
    owned = [r for r, p in zip(TABLE["record"].to_pylist(), TABLE["person"].to_pylist(), strict=True) if p in people]
    assert owned
    traces = [*people, *(f"'{record}'" for record in owned)]
    return not list(holding(store.opened.layout.root, *traces))


def one_of(store, place):
    """Somebody whose records lie there."""
    where = places(store)
    return next(
        p
        for p, r in zip(TABLE["person"].to_pylist(), TABLE["record"].to_pylist(), strict=True)
        if where.get(str(r)) == place
    )


@pytest.mark.parametrize("same", ["slice", "shard", "store"])
def test_2_a_second_deletion_replaces_the_first(store, tmp_path, source, same):
    where = places(store)
    first = one_of(store, (0, 2))
    fits = {"slice": lambda at: at == (0, 2), "shard": lambda at: at == (0, 1), "store": lambda at: at[0] == 1}[same]
    second = next(
        p
        for p, r in zip(TABLE["person"].to_pylist(), TABLE["record"].to_pylist(), strict=True)
        if p != first and fits(where[str(r)])
    )
    requests = {store.delete(subjects=[person], executor="inline").request for person in (first, second)}
    assert len(requests) == 2
    assert gone(store, first, second)
    scratch(store, tmp_path, RECIPE, tables.without(TABLE, people=[first, second]))
    trained_again = again(store, tmp_path, RECIPE, source)
    assert (trained_again.training.stages_trained, trained_again.training.missing_from_source) == (0, 0)
    assert gone(trained_again, first, second)
    assert trained_again.verify(replay="all", executor="inline").ok


def test_2_a_deletion_repeated_names_the_first_request_and_does_nothing(store, capsys):
    root = str(store.opened.layout.root)
    first = store.delete(subjects=PEOPLE[:2], executor="inline")
    before = digests(store), store.version, served(store)
    for words in (["--subject", *PEOPLE[:2]], ["--subject", PEOPLE[1]], ["--subject", *reversed(PEOPLE[:2])]):
        assert run(["delete", "--store", root, *words, "--json"]) == 0
        said = json.loads(capsys.readouterr().out)
        assert (said["request"], said["state"], said["repeated"]) == (first.request, "repaired", True)
    assert (digests(store), store.version, served(store)) == before
    assert [request["request"] for request in store.status()["requests"]] == [first.request]


def test_2_old_and_new_ids_in_one_request_delete_the_new_ones(store, tmp_path):
    store.delete(subjects=PEOPLE[:1], executor="inline")
    done = store.delete(subjects=PEOPLE[:3], executor="inline")
    assert not done.repeated
    assert done.subjects == 2
    scratch(store, tmp_path, RECIPE, tables.without(TABLE, people=PEOPLE[:3]))


def test_2_an_unknown_id_among_known_ones_changes_nothing(store, tmp_path, trained):
    with pytest.raises(UnknownIdsError, match="nobody"):
        store.delete(subjects=[PEOPLE[0], "nobody"], executor="inline")
    assert store.status()["requests"] == []
    assert_same(store, trained)
    done = store.delete(subjects=[PEOPLE[0], "nobody"], ignore_missing=True, executor="inline")
    assert done.missing == ["nobody"]
    scratch(store, tmp_path, RECIPE, tables.without(TABLE, people=PEOPLE[:1]))


def test_2_a_person_of_whom_a_record_went_before(store, tmp_path):
    owner = max(PEOPLE, key=TABLE["person"].to_pylist().count)
    owned = [
        str(r) for r, p in zip(TABLE["record"].to_pylist(), TABLE["person"].to_pylist(), strict=True) if p == owner
    ]
    store.delete(records=owned[:1], executor="inline")
    rest = scratch(store, tmp_path, RECIPE, tables.without(TABLE, records=owned[:1]), name="first")
    assert rest.training.subjects == len(PEOPLE) - (len(owned) == 1)
    assert store.delete(subjects=[owner], executor="inline").records == len(owned) - 1
    scratch(store, tmp_path, RECIPE, tables.without(TABLE, people=[owner]), name="second")


@pytest.mark.parametrize("how", ["train", "repair", "delete"])
def test_2_a_deferred_deletion_is_not_forgotten(store, tmp_path, source, how):
    """Whatever comes next closes it; nothing that comes next undoes it."""
    done = store.delete(subjects=[PEOPLE[3]], defer=True)
    assert (done.state, done.version_after) == ("stages_purged", None)
    assert gone(store, PEOPLE[3])
    people = [PEOPLE[3]]
    if how == "train":
        again(store, tmp_path, RECIPE, source)
    elif how == "repair":
        assert store.repair(executor="inline").requests == [done.request]
    else:
        people.append(PEOPLE[8])
        store.delete(subjects=[PEOPLE[8]], executor="inline")
    assert {request["state"] for request in store.status()["requests"]} == {"repaired"}
    scratch(store, tmp_path, RECIPE, tables.without(TABLE, people=people))


@pytest.mark.parametrize("how", ["train", "repair", "delete the same", "delete another"])
def test_2_a_deletion_that_was_killed_after_its_acceptance(store, tmp_path, source, monkeypatch, how):
    """Accepted and nothing more: rows and weights are still there, but no command may bring them back into service."""

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(store_module, "settle", killed)
    with pytest.raises(KeyboardInterrupt):
        store.delete(subjects=[PEOPLE[5]], executor="inline")
    monkeypatch.undo()
    assert store.status()["requests"][0]["state"] == "accepted"
    assert not gone(store, PEOPLE[5])
    assert not store.verify(executor="inline").ok
    people = [PEOPLE[5]]
    if how == "train":
        trained = again(store, tmp_path, RECIPE, source).training
        assert trained.missing_from_source == 0
    elif how == "repair":
        store.repair(executor="inline")
    elif how == "delete the same":
        assert store.delete(subjects=people, executor="inline").repeated
    else:
        people.append(PEOPLE[9])
        store.delete(subjects=PEOPLE[9:10], executor="inline")
    assert gone(store, *people)
    scratch(store, tmp_path, RECIPE, tables.without(TABLE, people=people))
    assert store.verify(replay="all", executor="inline").ok


def test_2_a_source_that_changes_what_it_says_of_deleted_people(store, tmp_path):
    """Their rows are left out before anything is looked at: other values, a class that isn't one, an id twice."""
    victim = one_of(store, (0, 1))
    store.delete(subjects=[victim], executor="inline")
    before = digests(store)
    row = TABLE["person"].to_pylist().index(victim)
    changed = tables.with_value(TABLE, row=row, column="income", value="no class at all")
    changed = tables.with_value(changed, row=row, column="age", value=44.25)
    twice = tables.pa.concat_tables([changed, changed.slice(row, 1)])
    done = again(store, tmp_path, RECIPE, write(twice, tmp_path / "twice.parquet")).training
    assert (done.stages_trained, done.missing_from_source) == (0, 0)
    assert digests(store) == before
    assert gone(store, victim)


@pytest.mark.parametrize("asked", ["subjects", "records"])
def test_2_a_deleted_record_comes_back_under_another_owner(store, tmp_path, asked):
    """Once as the record that was deleted, now said to be somebody else's: still excluded."""
    record = slices(store)[1, 2][0]
    row = [str(r) for r in TABLE["record"].to_pylist()].index(record)
    store.delete(**{asked: [record if asked == "records" else TABLE["person"][row].as_py()]}, executor="inline")
    moved = tables.with_value(TABLE, row=row, column="person", value=one_of(store, (0, 1)))
    done = again(store, tmp_path, RECIPE, write(moved, tmp_path / "moved.parquet")).training
    assert done.stages_trained == 0
    assert record not in places(store)


def test_2_new_records_of_a_deleted_person_stay_out(store, tmp_path):
    victim = one_of(store, (1, 1))
    store.delete(subjects=[victim], executor="inline")
    more = TABLE.slice(TABLE["person"].to_pylist().index(victim), 1)
    more = tables.with_value(more, row=0, column="record", value=5_000)
    source = write(tables.pa.concat_tables([TABLE, more]), tmp_path / "more.parquet")
    assert again(store, tmp_path, RECIPE, source).training.stages_trained == 0
    assert "5000" not in places(store)


def test_2_new_and_changed_rows_of_others_are_refused_with_their_counts(store, tmp_path):
    store.delete(subjects=[PEOPLE[0]], executor="inline")
    rest = tables.without(TABLE, people=PEOPLE[:1])
    new = tables.with_value(rest.slice(0, 1), row=0, column="record", value=5_000)
    changed = tables.with_value(rest, row=3, column="hours", value=10_000)
    source = write(tables.pa.concat_tables([changed, new]), tmp_path / "other.parquet")
    before = digests(store)
    with pytest.raises(UserError, match="1 new and 1 changed"):
        again(store, tmp_path, RECIPE, source)
    assert digests(store) == before


def test_2_a_key_file_that_is_another_is_refused(store, tmp_path, source):
    asked = at(tmp_path, RECIPE, source)
    (tmp_path / "other.key").write_text("ef" * 32)
    with pytest.raises(UserError, match="not the key"):
        sisa.train({**asked, "routing": {"key_file": str(tmp_path / "other.key")}}, store=store.opened.layout.root)


def test_2_an_ingest_that_was_killed_checks_its_source_again(tmp_path, monkeypatch):
    """Between the two attempts the source may have become one that is refused."""

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(launch, "_ingest", killed)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, RECIPE, TABLE)
    monkeypatch.undo()
    with pytest.raises(UserError, match="occur more than once"):
        train(tmp_path, RECIPE, tables.pa.concat_tables([TABLE, TABLE.slice(4, 1)]))
    store = train(tmp_path, RECIPE, TABLE)
    assert store.training.records == TABLE.num_rows
    scratch(store, tmp_path, RECIPE, TABLE)


def test_2_a_replay_while_a_repair_is_due_finds_nothing_wrong(store, tmp_path):
    victim = one_of(store, (0, 2))
    store.delete(subjects=[victim], defer=True)
    found = store.verify(replay="all", executor="inline")
    assert (found.ok, found.problems, found.stages_replayed) == (True, [], 6)
    assert len(found.open_requests) == 1
    assert [member[:2] for member in served(store)] == [(0, 1), (1, 3)]
    store.repair(executor="inline")
    scratch(store, tmp_path, RECIPE, tables.without(TABLE, people=[victim]))
