"""Corrections: what a row said is out of service at once, replaced on disk, and retrained as if it had never been there."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import crash_kit as kit
import pyarrow as pa
import pyarrow.parquet as papq
import pytest
from tables import without

from sisa.errors import DamagedError, StoreError, UserError
from sisa.ledger.requests import Requests
from sisa.records.grow import grown_recipe
from sisa.store import correct as correcting
from sisa.store.store import Store

TABLE = kit.people(12)
ADDED = kit.more_people(12, generation=1)


def corrected(table: pa.Table, records: Sequence[str], *, by: float = 1.5) -> pa.Table:
    """The table with another x in some rows."""
    names, values = table["record"].to_pylist(), table["x"].to_pylist()
    new = [value + by if name in records else value for name, value in zip(names, values, strict=True)]
    return table.set_column(table.column_names.index("x"), "x", pa.array(new))


def only(table: pa.Table, records: Sequence[str]) -> pa.Table:
    return table.filter(pa.array([name in records for name in table["record"].to_pylist()]))


@dataclass(frozen=True)
class World:
    """A store with a generation, and which records are where."""

    folder: Path
    recipe: dict[str, Any]
    template: Path
    records: dict[tuple[int, int], list[str]]

    def source(self, name: str, table: pa.Table) -> Path:
        papq.write_table(table, self.folder / f"{name}.parquet")
        return self.folder / f"{name}.parquet"

    def copy(self, target: Path) -> Store:
        return kit.reopened(kit.copy_store(self.template, target))

    def fresh(self, target: Path, records: Sequence[str], *gone: str) -> Store:
        """A store that was trained on the corrected tables, without some people."""
        first, second = (without(corrected(table, records), people=gone) for table in (TABLE, ADDED))
        store = kit.trained(kit.make_recipe(target.parent / f"{target.name}-source", first), target)
        store.add(self.source(f"{target.name}-added", second), executor="inline")
        return store

    @property
    def some(self) -> list[str]:
        """Records of the first and second slice, of the generation, and of the holdout."""
        return [self.records[0, 1][0], self.records[1, 2][0], self.records[0, 3][0], self.held_out]

    @property
    def held_out(self) -> str:
        return (self.records.get((0, 0)) or self.records[1, 0])[0]


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with kit.fast_folder() as folder:
        recipe = kit.make_recipe(folder, TABLE)
        store = kit.trained(recipe, folder / "template")
        papq.write_table(ADDED, folder / "added.parquet")
        store.add(folder / "added.parquet", executor="inline")
        records: dict[tuple[int, int], list[str]] = {}
        for table, generation in ((TABLE, 0), (ADDED, 1)):
            for record, person in zip(table["record"].to_pylist(), table["person"].to_pylist(), strict=True):
                shard, slice_ = store.opened.router.route_one(person)
                place = slice_ if not generation else 3 if slice_ else -1
                records.setdefault((shard, place), []).append(record)
        store.close()
        yield World(folder, recipe, folder / "template", records)


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


def bits(store: Store) -> dict[str, Any]:
    state = kit.end_state(store)
    return {name: state[name] for name in ("constituents", "stages", "rows", "files")}


def said(root: Path) -> dict[str, list[float]]:
    """What each record says, wherever in the store it does; read by another way."""
    found: dict[str, list[float]] = {}
    for path in root.rglob("*.parquet"):
        table = papq.read_table(path, partitioning=None)
        for record, value in zip(table["_sisa_record"].to_pylist(), table["x"].to_pylist(), strict=True):
            found.setdefault(record, []).append(value)
    return found


def source_of(world: World, records: Sequence[str], *, name: str = "corrected", by: float = 1.5) -> Path:
    both = pa.concat_tables([TABLE, ADDED.select(TABLE.column_names)])
    return world.source(name, only(corrected(both, records, by=by), records))


def test_a_corrected_store_is_the_store_that_was_trained_on_the_corrected_tables(world: World, folder: Path) -> None:
    store = world.copy(folder / "store")
    done = store.correct(source_of(world, world.some), reason="ticket", executor="inline")
    assert (done.state, done.records, done.unchanged, done.shards) == ("repaired", 4, 0, [0, 1])
    assert done.version_before < done.version_quarantine < done.version_after
    assert bits(store) == bits(world.fresh(folder / "fresh", world.some))
    assert store.verify(replay="all", executor="inline").problems == []
    (request,) = store.status()["requests"]
    assert (request["request"], request["kind"], request["reason"]) == (done.request, "correction", "ticket")


def test_from_the_acceptance_on_nothing_that_saw_the_old_content_answers(world: World, folder: Path) -> None:
    store = world.copy(folder / "store")
    done = store.correct(source_of(world, [world.records[1, 2][0]]), defer=True)
    assert (done.state, done.version_after) == ("stages_purged", None)
    assert {m.shard: m.stage for m in store.opened.ledger.versions.live().members} == {0: 3, 1: 1}
    assert {(row.shard, row.stage) for row in store.opened.ledger.stages.all()} == {(0, 1), (0, 2), (0, 3), (1, 1)}
    assert store.verify().problems == []
    assert store.repair(executor="inline").requests == [done.request]
    assert bits(store) == bits(world.fresh(folder / "fresh", [world.records[1, 2][0]]))


def test_held_out_rows_are_corrected_without_a_retraining(world: World, folder: Path) -> None:
    store = world.copy(folder / "store")
    before = store.version
    done = store.correct(source_of(world, [world.held_out]), executor="inline")
    assert (done.state, done.shards, done.stages_retrained, store.version) == ("repaired", [], 0, before)
    assert bits(store) == bits(world.fresh(folder / "fresh", [world.held_out]))


def test_nothing_to_correct_changes_nothing(world: World, folder: Path) -> None:
    store = world.copy(folder / "store")
    event = store.opened.ledger.last_event()
    done = store.correct(world.source("same", TABLE), executor="inline")
    assert (done.request, done.unchanged, done.records) == ("", len(TABLE), 0)
    assert store.opened.ledger.last_event() == event


def test_only_rows_that_differ_are_corrected(world: World, folder: Path) -> None:
    store = world.copy(folder / "store")
    record = world.records[0, 2][0]
    done = store.correct(world.source("whole", corrected(TABLE, [record])), executor="inline")
    assert (done.records, done.unchanged, done.shards) == (1, len(TABLE) - 1, [0])


FOREIGN = TABLE.slice(0, 1).set_column(1, "person", pa.array(["p99"]))
STRANGE = TABLE.slice(0, 1).set_column(0, "record", pa.array(["r999"]))
REFUSED = [
    (
        "an unknown id",
        pa.concat_tables([corrected(TABLE, ["r001"]), STRANGE]),
        "1 of 19 rows have a record id that is not",
    ),
    ("another owner", FOREIGN, "1 of 1 rows have another owner"),
    ("an id twice", pa.concat_tables([TABLE.slice(0, 1)] * 2), "occur more than once"),
    ("an unknown label", TABLE.slice(0, 1).set_column(4, "label", pa.array(["maybe"])), "label"),
    ("a missing column", TABLE.drop_columns(["z"]), "'z'"),
    ("no row", TABLE.slice(0, 0), "has no row"),
]


@pytest.mark.parametrize(("table", "message"), [case[1:] for case in REFUSED], ids=[case[0] for case in REFUSED])
def test_what_can_not_be_corrected_is_refused_and_nothing_is_changed(
    world: World, folder: Path, table: pa.Table, message: str
) -> None:
    store = world.copy(folder / "store")
    before, event = kit.end_state(store), store.opened.ledger.last_event()
    with pytest.raises(UserError) as refused:
        store.correct(world.source("refused", table), executor="inline")
    assert message in refused.value.message
    assert (kit.end_state(store), store.opened.ledger.last_event()) == (before, event)


def test_deleted_people_and_superseded_content_do_not_come_back_by_a_correction(world: World, folder: Path) -> None:
    store = world.copy(folder / "store")
    record = world.records[0, 1][0]
    store.correct(source_of(world, [record]), executor="inline")
    with pytest.raises(UserError, match="say again what a correction superseded"):
        store.correct(world.source("old", only(TABLE, [record])), executor="inline")
    store.delete(records=[record], executor="inline")
    with pytest.raises(UserError, match="1 of 1 rows are deleted people's"):
        store.correct(source_of(world, [record], by=2.0), executor="inline")


def test_an_old_source_brings_nothing_back(world: World, folder: Path) -> None:
    store = world.copy(folder / "store")
    record = world.records[0, 1][0]
    store.correct(source_of(world, [record]), executor="inline")
    before = bits(store)
    done = kit.trained(world.recipe, root_of(store))  # its source still says what was superseded
    assert (done.training.stages_trained, bits(done)) == (0, before)
    with pytest.raises(UserError, match="1 with another"):
        done.add(world.source("old", only(TABLE, [record])), executor="inline")


def test_a_later_deletion_takes_the_corrected_row_too(world: World, folder: Path) -> None:
    store = world.copy(folder / "store")
    store.correct(source_of(world, world.some), executor="inline")
    owners = dict(zip(TABLE["record"].to_pylist(), TABLE["person"].to_pylist(), strict=True))
    person = owners[world.some[0]]
    store.delete(subjects=[person], executor="inline")
    assert not {record for record, owner in owners.items() if owner == person} & said(root_of(store)).keys()
    assert bits(store) == bits(world.fresh(folder / "fresh", world.some, person))
    assert store.verify(replay="all", executor="inline").problems == []


def test_corrected_twice_the_last_one_counts(world: World, folder: Path) -> None:
    store = world.copy(folder / "store")
    record = world.records[0, 1][0]
    store.correct(source_of(world, [record], by=7.0), defer=True)
    store.correct(source_of(world, [record]), executor="inline")
    assert bits(store) == bits(world.fresh(folder / "fresh", [record]))
    assert store.verify(replay="all", executor="inline").problems == []


def test_two_corrections_at_once_are_one_after_the_other(
    world: World, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first is accepted, and not merged yet, when the second looks its row up."""
    store, record = world.copy(folder / "store"), world.records[0, 1][0]
    first, second = source_of(world, [record], name="first", by=7.0), source_of(world, [record])
    settle, asked = correcting.settle_all, []

    def settled(*arguments: Any) -> Any:
        done = settle(*arguments)
        if not asked:
            other = kit.reopened(root_of(store)).opened
            asked.append(correcting._accepted(other, grown_recipe(other.recipe, str(first)), ""))
        return done

    monkeypatch.setattr(correcting, "settle_all", settled)
    assert store.correct(second, executor="inline").state == "repaired"
    assert asked[0][0].state == "accepted"
    assert bits(store) == bits(world.fresh(folder / "fresh", [record]))
    assert store.verify(replay="all", executor="inline").problems == []


def test_an_older_file_is_no_content_to_be_corrected(world: World, folder: Path) -> None:
    store, record = world.copy(folder / "store"), world.records[0, 1][0]
    rows = root_of(store) / "records/shard=0000/slice=01/part-00000.parquet"
    old = rows.read_bytes()
    store.correct(source_of(world, [record], by=7.0), executor="inline")
    new = rows.read_bytes()
    rows.write_bytes(old)
    before = store.opened.ledger.requests.all()
    with pytest.raises(DamagedError):
        store.correct(source_of(world, [record]), executor="inline")
    assert store.opened.ledger.requests.all() == before
    rows.write_bytes(new)
    assert store.correct(source_of(world, [record]), executor="inline").state == "repaired"
    assert bits(store) == bits(world.fresh(folder / "fresh", [record]))


def test_rows_that_can_not_be_searched_refuse_a_correction(world: World, folder: Path) -> None:
    store = world.copy(folder / "store")
    (root_of(store) / "records/shard=0000/slice=01/part-00000.parquet").unlink()
    with pytest.raises(DamagedError):
        store.correct(source_of(world, [world.records[0, 1][0]]), executor="inline")
    assert store.opened.ledger.requests.all() == []


def test_a_correction_before_the_ingest_has_ended_is_refused(world: World, folder: Path) -> None:
    root = folder / "store"
    kit.killed_before(kit.trained, world.recipe, root, root=root, stop_at="COMMIT in ledger.partitions.replace_all")
    with pytest.raises(StoreError, match="ingest has not ended"):
        kit.reopened(root).correct(world.source("same", TABLE))


def test_verify_finds_a_row_that_says_again_what_was_superseded(world: World, folder: Path) -> None:
    store = world.copy(folder / "store")
    store.correct(source_of(world, [world.records[0, 1][0]]), executor="inline")
    name = "records/shard=0000/slice=01/part-00000.parquet"
    shutil.copy(world.template / name, root_of(store) / name)
    problems = store.verify().problems
    assert any("1 rows that say what a correction superseded" in problem for problem in problems)
    with pytest.raises(StoreError):  # the corrected row is lost: nothing can make it again
        store.repair(executor="inline")


def test_verify_finds_an_edited_kind(world: World, folder: Path) -> None:
    store = world.copy(folder / "store")
    store.correct(source_of(world, [world.held_out]), executor="inline")
    with store.opened.ledger.database.transaction():
        store.opened.ledger.database.rows("UPDATE requests SET kind = 'deletion'")
    assert any("another kind than was noted" in problem for problem in store.verify().problems)


# --- killed -----------------------------------------------------------------------------------------


def correct(root: Path, source: Path) -> None:
    kit.reopened(root).correct(source, executor="inline")


@pytest.fixture(scope="module")
def undisturbed(world: World) -> tuple[list[str], dict[str, Any]]:
    root = root_of(world.copy(world.folder / "undisturbed"))
    names = kit.operations(correct, root, source_of(world, world.some), root=root)
    return names, kit.end_state(kit.reopened(root))


def check_killed(world: World, folder: Path, expected: dict[str, Any], number: int) -> None:
    root = root_of(world.copy(folder / f"killed-{number}"))
    source = source_of(world, world.some)
    kit.killed_before(correct, root, source, root=root, stop_at=number)
    store = kit.reopened(root)
    accepted = store.opened.ledger.requests.all()
    for member in store.opened.ledger.versions.live().members:
        row = store.opened.ledger.stages.get(member.key, member.platform)
        assert row is None or not row.tainted
    store.correct(source, executor="inline")
    assert [r.id for r in store.opened.ledger.requests.all()][: len(accepted)] == [r.id for r in accepted]
    assert kit.end_state(store) == expected
    assert store.verify(replay="all", executor="inline").problems == []
    assert all(len(values) == 1 for values in said(root).values())
    assert not [path for path in root.rglob("*") if path.name.startswith("tmp-")]
    store.close()
    shutil.rmtree(root)


def test_a_correction_killed_at_every_kind_of_step_ends_the_same(
    world: World, folder: Path, undisturbed: tuple[list[str], dict[str, Any]]
) -> None:
    names, expected = undisturbed
    assert "COMMIT in ledger.requests.accept_correction" in names
    for number in kit.sampled(names, most=8):
        check_killed(world, folder, expected, number)


@pytest.mark.slow
def test_a_correction_killed_at_any_step_ends_the_same(
    world: World, folder: Path, undisturbed: tuple[list[str], dict[str, Any]]
) -> None:
    names, expected = undisturbed
    for number in range(len(names)):
        check_killed(world, folder, expected, number)


WHERE = [
    "COMMIT in ledger.requests.accept_correction",
    "replace in records.partition.rewrite_partition",
    "COMMIT in ledger.partitions.prepare_erasure",
    "COMMIT in ledger.partitions.finish_erasure",
    "COMMIT in ledger.requests.advance",
]


@pytest.mark.parametrize("where", WHERE)
def test_a_person_deleted_after_a_killed_correction_leaves_neither_the_old_row_nor_the_new(
    world: World, folder: Path, where: str
) -> None:
    record = world.records[0, 1][0]
    owners = dict(zip(TABLE["record"].to_pylist(), TABLE["person"].to_pylist(), strict=True))
    root = root_of(world.copy(folder / "store"))
    kit.killed_before(correct, root, source_of(world, [record]), root=root, stop_at=where)
    store = kit.reopened(root)
    store.delete(subjects=[owners[record]], defer=True)
    assert record not in said(root)
    store.repair(executor="inline")
    assert bits(store) == bits(world.fresh(folder / "fresh", [record], owners[record]))
    assert store.verify(replay="all", executor="inline").problems == []


def test_verify_tells_what_a_killed_correction_left(world: World, folder: Path) -> None:
    root = root_of(world.copy(folder / "store"))
    source = source_of(world, [world.records[0, 1][0]])
    kit.killed_before(correct, root, source, root=root, stop_at="COMMIT in ledger.requests.accept_correction")
    problems = kit.reopened(root).verify().problems
    assert len([p for p in problems if "left by a command that was killed; `sisa repair` removes it" in p]) == 2
    kit.reopened(root).repair(executor="inline")
    assert kit.reopened(root).verify().problems == []


def test_a_deletion_that_comes_while_rows_are_looked_up_is_seen(
    world: World, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the correction would bring the person's row back."""
    record = world.records[0, 1][0]
    store = world.copy(folder / "store")
    other = kit.reopened(root_of(store))
    accept, deleted = Requests.accept_correction, []

    def overtaken(self: Requests, *arguments: Any, **options: Any) -> Any:
        if not deleted:
            from sisa.deletion.accept import accept as accept_deletion

            deleted.append(accept_deletion(other.opened, records=[record]))
        return accept(self, *arguments, **options)

    monkeypatch.setattr(Requests, "accept_correction", overtaken)
    with pytest.raises(UserError, match="deleted people's"):
        store.correct(source_of(world, [record]), executor="inline")
    assert record not in said(root_of(store))
    store.repair(executor="inline")
    assert store.verify(replay="all", executor="inline").problems == []


def test_rows_that_wait_are_removed_when_they_are_merged(world: World, folder: Path) -> None:
    store = world.copy(folder / "store")
    store.correct(source_of(world, world.some), defer=True)
    assert all(len(values) == 1 for values in said(root_of(store)).values())
    assert list(store.opened.layout.corrections.iterdir()) == []


@pytest.mark.parametrize("how", ["lost", "changed"])
def test_rows_that_wait_and_are_lost_are_no_empty_correction(world: World, folder: Path, how: str) -> None:
    """Nobody else has them: a repair that took them for none would lose the records, and say that all is done."""
    record = world.records[0, 1][0]
    root = root_of(world.copy(folder / "store"))
    kit.killed_before(
        correct, root, source_of(world, [record]), root=root, stop_at="COMMIT in ledger.partitions.prepare_erasure"
    )
    (waiting,) = (root / "corrections").rglob("*.parquet")
    content = waiting.read_bytes()
    changed = bytearray(content)
    changed[len(content) // 2] ^= 1
    waiting.unlink()
    if how == "changed":
        waiting.write_bytes(changed)
    store = kit.reopened(root)
    with pytest.raises(DamagedError, match=r"corrections/cor-.*the rows that wait .* are (lost|damaged)"):
        store.repair(executor="inline")
    assert any("corrections/cor-" in problem for problem in store.verify(executor="inline").problems)
    waiting.write_bytes(content)
    store.repair(executor="inline")
    assert len(said(root)[record]) == 1
    assert store.verify(replay="all", executor="inline").problems == []


def test_a_correction_waits_for_replicas_as_a_deletion_does(world: World, folder: Path) -> None:
    store = world.copy(folder / "store")
    store.opened.ledger.replicas.register("dead", lease_s=0.2)
    store.correct(source_of(world, [world.records[0, 1][0]]), defer=True)
    assert store.opened.ledger.replicas.all() == []  # its lease was waited out


def test_a_reason_is_one_line_of_text(world: World, folder: Path) -> None:
    store = world.copy(folder / "store")
    with pytest.raises(UserError, match="one line of text"):
        store.correct(source_of(world, [world.records[0, 1][0]]), reason="a\x1b[2J", defer=True)
    assert store.status()["requests"] == []
