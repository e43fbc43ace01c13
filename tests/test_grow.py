"""Growing data: a generation is trained on top, bit for bit as if nobody who was deleted had ever been in it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import crash_kit as kit
import independent_trainer
import numpy as np
import pyarrow as pa
import pyarrow.parquet as papq
import pytest
import torch
from tables import without

from sisa.errors import BusyError, DamagedError, SourceError, StoreError, UnknownIdsError, UserError
from sisa.files import FileLock
from sisa.ledger.generations import Generations
from sisa.progress import Silent
from sisa.records import grow as growing
from sisa.store import grow
from sisa.store.store import Store

TABLE = kit.people(12)
OLD = sorted(set(TABLE["person"].to_pylist()))


def rows(owners: Sequence[str], *, first: int, seed: int) -> pa.Table:
    """New rows, one for each owner named."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, len(owners))
    return pa.table(
        {
            "record": [f"r{first + i:03d}" for i in range(len(owners))],
            "person": list(owners),
            "x": rng.normal(size=len(owners)) + labels,
            "z": rng.normal(size=len(owners)),
            "label": [["no", "yes"][i] for i in labels],
        }
    )


MAY = rows([*OLD[::2], *(f"q{i:02d}" for i in range(8)), "q00"], first=100, seed=1)
"""People who were there and people who weren't; among both, some that the key holds out."""
JUNE = rows([*OLD[2::3], "q01", "q02", "s00", "s01"], first=200, seed=2)


@dataclass(frozen=True)
class World:
    """A store with no generation, and one with two."""

    folder: Path
    recipe: dict[str, Any]
    template: Path
    grown: Path
    people: dict[tuple[int, int], list[str]]
    """Who is where by the key, whenever they came."""

    def source(self, name: str, table: pa.Table) -> Path:
        papq.write_table(table, self.folder / f"{name}.parquet")
        return self.folder / f"{name}.parquet"

    def copy(self, target: Path, *, grown: bool = True) -> Store:
        return kit.reopened(kit.copy_store(self.grown if grown else self.template, target))

    def fresh(self, target: Path, *gone: str) -> Store:
        """A store that was trained, and grew twice, without some people."""
        recipe = kit.make_recipe(target.parent / f"{target.name}-source", without(TABLE, people=gone))
        store = kit.trained(recipe, target)
        for name, table in (("may", MAY), ("june", JUNE)):
            left = without(table, people=gone)
            store.add(self.source(f"{target.name}-{name}", left), executor="inline")
        return store


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with kit.fast_folder() as folder:
        recipe = kit.make_recipe(folder, TABLE)
        store = kit.trained(recipe, folder / "template")
        people: dict[tuple[int, int], list[str]] = {}
        for person in sorted({*OLD, *MAY["person"].to_pylist(), *JUNE["person"].to_pylist()}):
            people.setdefault(store.opened.router.route_one(person), []).append(person)
        store.close()
        world = World(folder, recipe, folder / "template", folder / "grown", people)
        store = world.copy(world.grown, grown=False)
        store.add(world.source("may", MAY), executor="inline")
        store.add(world.source("june", JUNE), executor="inline")
        store.close()
        yield world


@pytest.fixture
def folder() -> Iterator[Path]:
    with kit.fast_folder() as folder:
        yield folder


@pytest.fixture(autouse=True)
def _nobody_left() -> Iterator[None]:
    yield
    kit.Child.kill_all()


def root_of(store: Store) -> Path:
    return store.opened.layout.root


def of(tables: Sequence[pa.Table], person: str) -> set[str]:
    pairs = [(r, p) for t in tables for r, p in zip(t["record"].to_pylist(), t["person"].to_pylist(), strict=True)]
    return {record for record, owner in pairs if owner == person}


def on_disk(store: Store) -> set[str]:
    return {record for records in kit.rows_on_disk(root_of(store)).values() for record in records}


def bits(store: Store) -> dict[str, Any]:
    """What has to be the same as in a store that never had the deleted."""
    state = kit.end_state(store)
    return {name: state[name] for name in ("constituents", "stages", "rows", "files")}


def digests(store: Store) -> dict[tuple[int, int], tuple[str, str]]:
    return {(r.shard, r.stage): (r.key, r.full_digest) for r in store.opened.ledger.stages.all()}


# --- what an addition does --------------------------------------------------------------------------


def test_a_generation_is_the_next_slice_of_each_shard_and_older_stages_keep_keys_and_bits(
    world: World, folder: Path
) -> None:
    before = world.copy(folder / "before", grown=False)
    store = world.copy(folder / "store")
    old, new = digests(before), digests(store)
    assert {place: new[place] for place in old} == old
    assert sorted(new.keys() - old.keys()) == [(0, 3), (0, 4), (1, 3), (1, 4)]
    assert [(m.shard, m.stage) for m in store.opened.ledger.versions.live().members] == [(0, 4), (1, 4)]
    found = kit.rows_on_disk(root_of(store))
    for generation, table in ((1, MAY), (2, JUNE)):
        for record, person in zip(table["record"].to_pylist(), table["person"].to_pylist(), strict=True):
            shard, slice_ = store.opened.router.route_one(person)
            place = (
                f"shard={shard:04d}/slice={2 + generation:02d}"
                if slice_
                else f"holdout/generation={generation:02d}/shard={shard:04d}"
            )
            assert record in found[f"records/{place}/part-00000.parquet"]
    assert world.people[0, 0] + world.people[1, 0]  # the tables have held-out people


def test_what_is_added_is_counted_measured_and_published(world: World, folder: Path) -> None:
    store = world.copy(folder / "store", grown=False)
    held_out = {p for (_, slice_), people in world.people.items() if slice_ == 0 for p in people}
    done = store.add(world.source("counted", MAY), executor="inline")
    count = sum(person in held_out for person in MAY["person"].to_pylist())
    assert (done.generation, done.slice, done.repeated) == (1, 3, False)
    assert (done.records, done.holdout_records) == (len(MAY) - count, count)
    assert (done.stages_trained, done.version_before, done.version) == (2, 1, 2)
    assert done.metrics.records == count + store.status()["holdout_records"] - count
    told = store.status()
    assert (told["slices"], told["generations"], told["state"]) == (3, 1, "ready")
    assert told["records"] + told["holdout_records"] == len(TABLE) + len(MAY)


def test_a_grown_store_without_the_deleted_is_the_store_that_never_had_them(world: World, folder: Path) -> None:
    """Somebody of each generation, somebody in several, and somebody who is held out in several."""
    held_out = next(p for p in [*world.people[0, 0], *world.people[1, 0]] if of([MAY, JUNE], p) and of([TABLE], p))
    everywhere = next(p for p in OLD if of([MAY], p) and of([TABLE], p) and p != held_out)
    gone = [held_out, everywhere, "q03", "s00", "q01", OLD[1]]
    store = world.copy(folder / "store")
    done = store.delete(subjects=gone, executor="inline")
    assert done.records == sum(len(of([TABLE, MAY, JUNE], person)) for person in gone)
    assert bits(store) == bits(world.fresh(folder / "fresh", *gone))
    assert store.verify(replay="all", executor="inline").problems == []


def test_grown_after_a_deletion_or_deleted_after_growing_is_the_same(world: World, folder: Path) -> None:
    gone = ["q02", OLD[0]]
    store = world.copy(folder / "store", grown=False)
    store.delete(subjects=[OLD[0]], executor="inline")
    done = store.add(world.source("may", MAY), executor="inline")
    assert done.excluded_records == len(of([MAY], OLD[0])) > 0
    store.add(world.source("june", JUNE), executor="inline")
    store.delete(subjects=["q02"], executor="inline")
    assert bits(store) == bits(world.fresh(folder / "fresh", *gone))


def test_a_deletion_starts_at_the_earliest_slice_that_has_rows_of_the_person(world: World, folder: Path) -> None:
    store = world.copy(folder / "store")
    person = next(p for p in world.people[0, 2] + world.people[1, 2] if of([TABLE], p) and of([MAY, JUNE], p))
    late = next(
        p for p in JUNE["person"].to_pylist() if not of([TABLE, MAY], p) and store.opened.router.route_one(p)[1]
    )
    first = store.opened.ledger.requests
    for who, slices in ((late, [4]), (person, [2, *(g + 2 for g, t in ((1, MAY), (2, JUNE)) if of([t], person))])):
        store.delete(subjects=[who], defer=True)
        request = first.all()[-1]
        assert sorted(slice_ for _, slice_ in request.places) == slices
        (shard,) = request.shards
        served = {m.shard: m.stage for m in store.opened.ledger.versions.live().members}
        assert served[shard] <= slices[0] - 1
        assert not of([TABLE, MAY, JUNE], who) & on_disk(store)


def test_a_record_of_a_generation_is_deleted_alone(world: World, folder: Path) -> None:
    store = world.copy(folder / "store")
    record, person = MAY["record"][0].as_py(), MAY["person"][0].as_py()
    store.delete(records=[record], executor="inline")
    assert on_disk(store) == {*of([TABLE, MAY, JUNE], person)} - {record} | (
        on_disk(store) - of([TABLE, MAY, JUNE], person)
    )
    assert record not in on_disk(store)
    assert store.verify(replay="all", executor="inline").problems == []


def test_an_empty_slice_of_a_generation_is_a_stage_with_a_key(world: World, folder: Path) -> None:
    store = world.copy(folder / "store", grown=False)
    person = next(p for p in world.people[0, 1] if p.startswith("p"))
    done = store.add(world.source("one", rows([person], first=300, seed=3)), executor="inline")
    assert (done.records, done.stages_trained) == (1, 2)
    assert (1, 3) in digests(store)
    assert store.opened.ledger.partitions.get(1, 3).records == 0
    assert store.verify(replay="all", executor="inline").problems == []


def test_a_shard_that_had_no_record_begins_with_the_generation(folder: Path) -> None:
    """Its scalers are fitted on the first slice that has records, wherever that is."""
    recipe = kit.make_recipe(folder / "full", TABLE)
    probe = kit.trained(recipe, folder / "probe")
    there = [p for p, (shard, _) in kit.places(probe, TABLE).items() if shard == 0]
    others = [p for p in OLD if p not in there]
    store = kit.trained(kit.make_recipe(folder / "half", without(TABLE, people=others)), folder / "store")
    assert [m.stage for m in store.opened.ledger.versions.live().members] == [2, 0]
    papq.write_table(without(TABLE, people=there), folder / "other.parquet")
    store.add(folder / "other.parquet", executor="inline")
    assert [m.stage for m in store.opened.ledger.versions.live().members] == [3, 3]
    assert store.verify(replay="all", executor="inline").problems == []


def test_an_independent_trainer_gives_the_same_weights(folder: Path) -> None:
    """The generation's slice after the slices of the first table, in a loop that shares no code with the package."""
    recipe = kit.make_recipe(folder, TABLE, holdout=0.0)
    recipe["training"]["epochs"] = 4
    store = kit.trained(recipe, folder / "store")
    papq.write_table(MAY, folder / "may.parquet")
    store.add(folder / "may.parquet", executor="inline")
    store.delete(subjects=["q03", OLD[0]], executor="inline")
    left = [without(table, people=["q03", OLD[0]]) for table in (TABLE, MAY)]
    sources = [folder / "left.parquet", folder / "left-may.parquet"]
    for table, path in zip(left, sources, strict=True):
        papq.write_table(table, path)

    def build(width: int) -> Any:
        module = torch.nn.Linear(width, 2)
        return module, torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)

    rows_of = store.opened.ledger.stages.all
    for shard in range(2):
        stages = independent_trainer.train_shard(sources[0], recipe, bytes(32), shard, build=build, added=sources[1:])
        for row, expected in zip(rows_of(shard), stages, strict=True):
            from sisa.checkpoints import StageId

            identity = StageId(shard, row.stage, row.key, row.platform)
            state = store.opened.checkpoints.load(identity)[1]
            ours = {n.rpartition(".")[2]: t for n, t in state.tensors.items() if n.startswith("model.")}
            theirs = {n.rpartition(".")[2]: t for n, t in expected.items()}
            assert ours.keys() == theirs.keys()
            assert all(np.array_equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("schedule", [{"name": "cosine"}, {"name": "exponential", "gamma": 0.9}, None])
def test_what_a_generation_learns_depends_on_no_schedule_that_has_ended(
    folder: Path, schedule: dict[str, Any] | None
) -> None:
    store = kit.trained(kit.make_recipe(folder, TABLE, schedule=schedule), folder / "store")
    papq.write_table(MAY, folder / "may.parquet")
    store.add(folder / "may.parquet", executor="inline")
    states = {(row.shard, row.stage): row.state_digest for row in store.opened.ledger.stages.all()}
    assert all(states[shard, 3] != states[shard, 2] for shard in range(2))
    assert store.verify(replay="all", executor="inline").problems == []


# --- what is refused --------------------------------------------------------------------------------

CHANGED = MAY.set_column(2, "x", pa.array(np.asarray(MAY["x"]) + 1))
NEW = rows(["q70", "q71"], first=400, seed=5)

REFUSED = [
    ("a row of the first table", pa.concat_tables([NEW, TABLE.slice(0, 1)]), "1 of 3 rows", "sisa correct"),
    ("a changed row of it", pa.concat_tables([NEW, CHANGED.slice(0, 1)]), "1 with another", "sisa correct"),
    ("rows of a generation", MAY.slice(0, 3), "3 of 3 rows", "sisa correct"),
    ("a generation and a new row", pa.concat_tables([MAY, NEW]), f"{len(MAY)} of {len(MAY) + 2} rows", "sisa correct"),
    ("an id that occurs twice", pa.concat_tables([NEW, NEW.slice(0, 1)]), "occur more than once", "own id"),
    ("an unknown label", NEW.set_column(4, "label", pa.array(["no", "maybe"])), "label", ""),
    ("a missing column", NEW.drop_columns(["z"]), "'z'", ""),
    ("a column of another type", NEW.set_column(2, "x", pa.array(["a", "b"])), "'x'", ""),
    ("a missing id", NEW.set_column(0, "record", pa.array(["r400", None])), "record", ""),
    ("no row", NEW.slice(0, 0), "no row to add", "added again"),
]


@pytest.mark.parametrize(
    ("table", "message", "hint"), [case[1:] for case in REFUSED], ids=[case[0] for case in REFUSED]
)
def test_what_can_not_be_added_is_refused_and_nothing_is_changed(
    world: World, folder: Path, table: pa.Table, message: str, hint: str
) -> None:
    store = world.copy(folder / "store")
    before, event = kit.end_state(store), store.opened.ledger.last_event()
    with pytest.raises(UserError) as refused:
        store.add(world.source("refused", table), executor="inline")
    assert message in str(refused.value.message)
    assert hint in refused.value.hint
    assert (kit.end_state(store), store.opened.ledger.last_event()) == (before, event)


def test_a_table_that_is_not_there_is_named_by_the_option(world: World, folder: Path) -> None:
    with pytest.raises(SourceError, match="--source"):
        world.copy(folder / "store").add(folder / "nowhere.parquet")


def test_only_rows_of_deleted_people_are_nothing_to_add(world: World, folder: Path) -> None:
    store = world.copy(folder / "store")
    store.delete(subjects=["q00", OLD[0]], executor="inline")
    table = rows(["q00", OLD[0]], first=500, seed=6)
    with pytest.raises(UserError, match="2 rows of deleted people are left out"):
        store.add(world.source("deleted", table), executor="inline")
    assert store.opened.generations == 2


def test_rows_that_were_lost_are_not_taken_for_new(world: World, folder: Path) -> None:
    store = world.copy(folder / "store")
    (root_of(store) / "records/shard=0000/slice=03/part-00000.parquet").unlink()
    with pytest.raises(DamagedError, match="shard 0, slice 3"):
        store.add(world.source("may", MAY), executor="inline")


def test_another_operation_or_another_addition_is_refused(world: World, folder: Path) -> None:
    store = world.copy(folder / "store")
    with FileLock(store.opened.layout.lock("operation")).held(), pytest.raises(BusyError):
        store.add(world.source("new", NEW), executor="inline")
    assert store.opened.generations == 2


def test_a_source_that_grew_trains_again_and_one_with_new_rows_points_to_add(world: World, folder: Path) -> None:
    """The recipe's source may hold the generations' rows, or not: what is there is compared with the whole store."""
    root = root_of(world.copy(folder / "store"))
    assert kit.trained(world.recipe, root).training.missing_from_source == 0
    for tables, problem in (
        ([TABLE, MAY], ""),
        ([TABLE, MAY, JUNE], ""),
        ([TABLE, NEW], "2 new and 0"),
        ([TABLE, CHANGED], f"{len(MAY)} changed"),
    ):
        recipe = kit.make_recipe(folder / "more", pa.concat_tables(tables))
        if problem:
            with pytest.raises(UserError, match=problem) as refused:
                kit.trained(recipe, root)
            assert "sisa add" in refused.value.hint
        else:
            done = kit.trained(recipe, root).training
            assert (done.stages_trained, done.slices) == (0, 4)


def test_an_upgrade_rebuilds_every_generation(world: World, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = world.copy(folder / "store")
    monkeypatch.setattr("sisa.training.platform.SEMANTICS", 99)
    recipe = world.recipe
    with pytest.raises(UserError, match="bit for bit"):
        store.add(world.source("new", NEW), executor="inline")
    from sisa.store.launch import train

    done = train(recipe, store=root_of(store), executor="inline", upgrade=True)
    assert done.training.stages_trained == 8
    assert done.verify(replay="all", executor="inline").problems == []


# --- deferred, repeated, resumed --------------------------------------------------------------------


def test_the_same_table_again_is_recognised_and_trains_what_is_missing(world: World, folder: Path) -> None:
    store = world.copy(folder / "store", grown=False)
    source = world.source("may", MAY)
    done = store.add(source, defer=True, executor="inline")
    assert (done.stages_trained, done.version, store.status()["state"]) == (0, 1, "training due")
    assert any("not trained" in problem for problem in store.verify().problems)
    done = store.add(source, executor="inline")
    assert (done.generation, done.repeated, done.stages_trained) == (1, True, 2)
    store.delete(subjects=["q03"], executor="inline")
    done = store.add(source, executor="inline")
    assert (done.generation, done.repeated, done.stages_trained, done.excluded_records) == (1, True, 0, 1)
    assert store.opened.generations == 1


def test_as_many_rows_of_another_table_are_not_taken_for_a_generation(world: World, folder: Path) -> None:
    """All rows are there, as many as the generation brought: but not those."""
    store = world.copy(folder / "store")
    mixed = pa.concat_tables([MAY.slice(1), JUNE.slice(0, 1)])
    assert len(mixed) == len(MAY)
    with pytest.raises(UserError, match=f"{len(MAY)} of {len(MAY)} rows have a record id that is in the store already"):
        store.add(world.source("mixed", mixed), executor="inline")


@pytest.mark.parametrize("how", ["train", "repair"])
def test_a_deferred_generation_is_trained_by_whatever_trains(world: World, folder: Path, how: str) -> None:
    store = world.copy(folder / "store", grown=False)
    store.add(world.source("may", MAY), defer=True)
    if how == "train":
        assert kit.trained(world.recipe, root_of(store)).training.stages_trained == 2
    else:
        assert store.repair(executor="inline").stages_retrained == 2
    assert store.status()["state"] == "ready"
    assert store.verify(replay="all", executor="inline").problems == []


def add(root: Path, source: Path) -> None:
    kit.reopened(root).add(source, executor="inline")


@pytest.fixture(scope="module")
def undisturbed(world: World) -> tuple[list[str], dict[str, Any]]:
    root = root_of(world.copy(world.folder / "undisturbed", grown=False))
    names = kit.operations(add, root, world.source("may", MAY), root=root)
    return names, bits(kit.reopened(root))


def check_killed(world: World, folder: Path, expected: dict[str, Any], number: int) -> None:
    root = root_of(world.copy(folder / f"killed-{number}", grown=False))
    kit.killed_before(add, root, world.source("may", MAY), root=root, stop_at=number)
    store = kit.reopened(root)
    whole = store.opened.generations
    counted = sum(partition.records for partition in store.opened.ledger.partitions.all())
    assert counted == len(TABLE) + whole * len(MAY)
    store.add(world.source("may", MAY), executor="inline")
    assert bits(store) == expected
    assert store.verify(replay="all", executor="inline").problems == []
    assert not store.opened.layout.incoming.exists()
    assert not [path for path in root.rglob("*") if path.name.startswith("tmp-")]
    store.close()
    shutil.rmtree(root)


def test_an_addition_killed_at_every_kind_of_step_ends_the_same(
    world: World, folder: Path, undisturbed: tuple[list[str], dict[str, Any]]
) -> None:
    names, expected = undisturbed
    assert "COMMIT in ledger.generations.publish" in names
    for number in kit.sampled(names, most=12):
        check_killed(world, folder, expected, number)


@pytest.mark.slow
def test_an_addition_killed_at_any_step_ends_the_same(
    world: World, folder: Path, undisturbed: tuple[list[str], dict[str, Any]]
) -> None:
    names, expected = undisturbed
    for number in range(len(names)):
        check_killed(world, folder, expected, number)


@pytest.mark.parametrize(
    "where",
    ["COMMIT in ledger.generations.publish", "replace in records.grow.write_to", "COMMIT in ledger.stages.enter_all"],
)
def test_a_deletion_after_a_killed_addition_leaves_no_row_of_the_person(world: World, folder: Path, where: str) -> None:
    """Rows that never became part of the store are on disk by then."""
    root = root_of(world.copy(folder / "store", grown=False))
    kit.killed_before(add, root, world.source("may", MAY), root=root, stop_at=where)
    store = kit.reopened(root)
    person = next(p for p in OLD if of([MAY], p))
    store.delete(subjects=[person], executor="inline")
    left = [
        r
        for path in root.rglob("*.parquet")
        for r in papq.read_table(path, partitioning=None)["_sisa_record"].to_pylist()
    ]
    assert not of([TABLE, MAY], person) & set(left)
    assert not [problem for problem in store.verify().problems if "not trained" not in problem]
    store.add(world.source("may", MAY), executor="inline")
    assert not of([TABLE, MAY], person) & on_disk(store)
    assert store.verify(replay="all", executor="inline").problems == []


def test_verify_tells_what_a_killed_addition_left(world: World, folder: Path) -> None:
    root = root_of(world.copy(folder / "store", grown=False))
    kit.killed_before(add, root, world.source("may", MAY), root=root, stop_at="COMMIT in ledger.generations.publish")
    problems = kit.reopened(root).verify().problems
    assert "incoming: left by a command that was killed; `sisa repair` removes it" in problems
    assert any("unfinished file among the records" in problem for problem in problems)
    kit.reopened(root).repair(executor="inline")
    assert kit.reopened(root).verify().problems == []


# --- races ------------------------------------------------------------------------------------------


def test_a_person_who_is_deleted_while_rows_are_written_is_dropped_before_they_are_published(
    world: World, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    person = next(p for p in OLD if of([MAY], p))
    store = world.copy(folder / "store", grown=False)
    other = kit.reopened(root_of(store))
    publish, accepted = Generations.publish, []

    def overtaken(self: Generations, *arguments: Any, **options: Any) -> bool:
        if not accepted:
            accepted.append(True)
            from sisa.ledger import Target
            from sisa.routing.keys import exclusion_digest

            # what `delete` commits; it would wait for us before it says that rows are erased
            key = other.opened.keys.exclusion
            names = [exclusion_digest(key, "record", r) for r in sorted(of([TABLE], person))]
            place = other.opened.router.route_one(person)
            target = Target("subject", exclusion_digest(key, "subject", person), (place,), tuple(names))
            other.opened.ledger.requests.accept([target], reason="")
        return publish(self, *arguments, **options)

    monkeypatch.setattr(Generations, "publish", overtaken)
    done = store.add(world.source("may", MAY), executor="inline")
    assert done.records + done.holdout_records == len(MAY) - len(of([MAY], person))
    store.repair(executor="inline")
    assert not of([TABLE, MAY], person) & on_disk(store)
    assert store.verify(replay="all", executor="inline").problems == []


def test_a_person_whose_rows_come_while_they_are_looked_up_is_looked_up_again(
    world: World, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sisa.deletion import accept as accepting

    person = next(p for p in OLD if of([MAY], p))
    store = world.copy(folder / "store", grown=False)
    other = kit.reopened(root_of(store))
    resolve, added = accepting._resolve, []

    def overtaken(*arguments: Any) -> Any:
        found = resolve(*arguments)
        if not added:
            added.append(other.add(world.source("may", MAY), defer=True))
        return found

    monkeypatch.setattr(accepting, "_resolve", overtaken)
    done = store.delete(subjects=[person], executor="inline")
    assert done.records == len(of([TABLE, MAY], person))
    assert not of([TABLE, MAY], person) & on_disk(store)
    store.repair(executor="inline")
    assert store.verify(replay="all", executor="inline").problems == []


def test_a_deletion_waits_for_rows_that_are_being_written_before_it_says_that_they_are_erased(
    world: World, folder: Path, undisturbed: tuple[list[str], dict[str, Any]]
) -> None:
    root = root_of(world.copy(folder / "store", grown=False))
    person = next(p for p in OLD if of([MAY], p))
    stop_at = undisturbed[0].index("replace in records.grow.write_to")
    child = kit.Child(add, root, world.source("may", MAY), root=root, stop_at=stop_at)
    assert child.hear()[0] == "stopped"
    deletion = kit.Child(_delete, root, person)
    assert deletion.hear() == ("told", "waiting for rows that are being added: deleted people's are left out of them")
    store = kit.reopened(root)
    (request,) = store.opened.ledger.requests.all()
    assert (request.state, request.version_quarantine) == ("accepted", 2)  # acknowledged: only the erasure waits
    child.go_on()
    child.result()
    assert deletion.result() == "repaired"
    assert not of([TABLE, MAY], person) & on_disk(store)
    store.repair(executor="inline")
    assert store.verify(replay="all", executor="inline").problems == []


class _Notes(Silent):
    """Passes notes on to the parent."""

    def note(self, text: str) -> None:
        if "being added" in text:
            kit.to_parent.send(("told", text))


def _delete(root: Path, person: str) -> str:
    return kit.reopened(root).delete(subjects=[person], executor="inline", reporter=_Notes()).state


def test_an_addition_before_the_ingest_has_ended_is_refused(world: World, folder: Path) -> None:
    root = folder / "store"
    kit.killed_before(kit.trained, world.recipe, root, root=root, stop_at="COMMIT in ledger.partitions.replace_all")
    with pytest.raises(StoreError, match="ingest has not ended"):
        kit.reopened(root).add(world.source("may", MAY))


def test_nobody_is_known_before_their_generation_is(world: World, folder: Path) -> None:
    store = world.copy(folder / "store", grown=False)
    with pytest.raises(UnknownIdsError):
        store.delete(subjects=["q03"])
    store.add(world.source("may", MAY), defer=True)
    assert store.delete(subjects=["q03"], defer=True).records == 1


# --- what a sceptic finds ---------------------------------------------------------------------------


TAMPERED = [
    ("UPDATE generations SET records = records + 1 WHERE number = 1", "the generations are not those"),
    ("DELETE FROM generations WHERE number = 1", "generations are missing"),
    ("INSERT INTO generations VALUES (3, '', 0)", "the generations are not those"),
    ("DELETE FROM partitions WHERE slice = -1 AND shard = 0", "no line says what it holds"),
]


@pytest.mark.parametrize(("statement", "problem"), TAMPERED)
def test_verify_finds_an_edited_generation(world: World, folder: Path, statement: str, problem: str) -> None:
    store = world.copy(folder / "store")
    with store.opened.ledger.database.transaction():
        store.opened.ledger.database.rows(statement)
    assert any(problem in found for found in store.verify().problems)


def test_verify_finds_rows_of_a_generation_that_were_moved(world: World, folder: Path) -> None:
    store = world.copy(folder / "store")
    place = root_of(store) / "records/shard=0000/slice=03/part-00000.parquet"
    shutil.copy(root_of(store) / "records/shard=0000/slice=04/part-00000.parquet", place)
    assert any("slice 3" in problem for problem in store.verify().problems)


def test_a_generation_needs_no_more_memory_than_its_budget_says(
    world: World, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many runs of a few rows give the same files as one."""
    write = growing.write_generation
    monkeypatch.setattr(grow, "write_generation", lambda *a, **o: write(*a, **o, budget_bytes=1))
    store = world.copy(folder / "store", grown=False)
    store.add(world.source("may", MAY), executor="inline")
    store.add(world.source("june", JUNE), executor="inline")
    assert digests(store) == digests(world.copy(folder / "other"))
