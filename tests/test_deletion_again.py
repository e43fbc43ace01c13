"""Deletions asked for again, in part or together; on rows that can't be read; before the first training has ended."""

from __future__ import annotations

import contextlib
import errno
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import crash_kit as kit
import pytest

from sisa.cli.main import run
from sisa.deletion import settle
from sisa.deletion.accept import accept
from sisa.errors import DamagedError, NoConstituentError, StoreError, UnknownIdsError, UserError
from sisa.opening import renew_exclusion_key
from sisa.storage.local import LocalStorage
from sisa.store.store import Store

TABLE = kit.people(12)
PROBE = TABLE.select(["x", "z"])


@dataclass(frozen=True)
class World:
    """A trained store to copy, its recipe, and who is where in it."""

    folder: Path
    recipe: dict[str, Any]
    template: Path
    people: dict[tuple[int, int], list[str]]

    def copy(self, target: Path) -> Store:
        return kit.reopened(kit.copy_store(self.template, target))


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with kit.fast_folder() as folder:
        recipe = kit.make_recipe(folder, TABLE)
        store = kit.trained(recipe, folder / "template")
        people: dict[tuple[int, int], list[str]] = {}
        for person, place in kit.places(store, TABLE).items():
            people.setdefault(place, []).append(person)
        store.close()
        yield World(folder, recipe, folder / "template", people)


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


def rows_of(store: Store, shard: int, slice_: int) -> Path:
    return root_of(store) / f"records/shard={shard:04d}/slice={slice_:02d}/part-00000.parquet"


def interrupted(*_: object) -> None:
    raise KeyboardInterrupt


def records_of(person: str) -> set[str]:
    pairs = zip(TABLE["record"].to_pylist(), TABLE["person"].to_pylist(), strict=True)
    return {record for record, owner in pairs if owner == person}


def on_disk(store: Store) -> set[str]:
    return {record for records in kit.rows_on_disk(root_of(store)).values() for record in records}


# --- asked again, together --------------------------------------------------------------------------


@pytest.mark.parametrize("newcomer", [False, True])
def test_everybody_who_is_asked_for_again_is_erased_not_only_the_first(
    world: World, folder: Path, newcomer: bool
) -> None:
    """Two deletions were killed right after they were accepted; both are asked for again in one."""
    store = world.copy(folder / "store")
    people = [world.people[0, 1][0], world.people[1, 1][0], *([world.people[1, 2][0]] if newcomer else [])]
    first, second = (accept(store.opened, subjects=[person]) for person in people[:2])
    assert first is not None
    assert second is not None
    done = store.delete(subjects=people, executor="inline")
    assert (done.state, done.repeated) == ("repaired", not newcomer)
    assert done.requests[-2:] == [first.request.id, second.request.id]
    assert done.request == done.requests[0]
    assert len(done.requests) == len(people)
    assert not on_disk(store) & {record for person in people for record in records_of(person)}
    assert {request["state"] for request in store.status()["requests"]} == {"repaired"}
    assert store.verify(replay="all", executor="inline").problems == []


def test_the_state_of_several_requests_is_that_of_the_last_one_behind(world: World, folder: Path) -> None:
    store = world.copy(folder / "store")
    done_already, waiting = world.people[0, 1][0], world.people[1, 1][0]
    first = store.delete(subjects=[done_already], executor="inline")
    second = store.delete(subjects=[waiting], defer=True)
    both = store.delete(subjects=[waiting, done_already], defer=True)
    assert (both.request, both.requests) == (first.request, [first.request, second.request])
    assert (both.state, both.version_after, both.repeated) == ("stages_purged", None, True)
    both = store.delete(subjects=[waiting, done_already], executor="inline")
    assert (both.state, both.version_after) == ("repaired", store.version)


# --- rows that can't be read ------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["lost", "flipped"])
def test_a_person_among_unreadable_rows_is_out_of_service_at_once_and_erased_when_the_file_is_back(
    world: World, folder: Path, how: str, capsys: pytest.CaptureFixture[str]
) -> None:
    store = world.copy(folder / "store")
    person = world.people[1, 1][0]
    rows = rows_of(store, 1, 1)
    whole = rows.read_bytes()
    if how == "lost":
        rows.unlink()
    else:
        rows.write_bytes(whole[:40] + bytes([whole[40] ^ 255]) + whole[41:])
    words = ["delete", "--store", str(root_of(store)), "--subject", person, "--json"]
    for _ in range(2):  # asked again it is the same
        assert run(words) == 3
        told = json.loads(capsys.readouterr().out)["error"]
        assert "is accepted and no prediction uses what may have seen these rows" in told["message"]
        assert "slice" in told["message"]
        assert "sisa repair" in told["hint"] or "sisa verify" in told["hint"]
    (request,) = store.status()["requests"]
    assert (request["state"], request["subjects"], request["shards"]) == ("accepted", 1, [1])
    assert store.status()["constituents"][1]["stage"] == 0
    assert not list((root_of(store) / "checkpoints" / "shard-0001").glob("stage-*"))
    with pytest.raises(DamagedError):
        store.repair(executor="inline")
    rows.write_bytes(whole)
    assert store.repair(executor="inline").requests == [request["request"]]
    assert not on_disk(store) & records_of(person)
    undisturbed = world.copy(folder / "undisturbed")
    undisturbed.delete(subjects=[person], executor="inline")
    ends = [kit.end_state(each) for each in (store, undisturbed)]
    for end in ends:
        del end["requests"]  # how many rows they had could not be told at acceptance
    assert ends[0] == ends[1]
    assert store.verify(replay="all", executor="inline").problems == []


def test_records_are_searched_wherever_rows_can_be_read(world: World, folder: Path) -> None:
    store = world.copy(folder / "store")
    here, lost = (min(records_of(world.people[place][0])) for place in [(0, 1), (1, 1)])
    rows_of(store, 1, 1).unlink()
    before = store.status()
    for records in ([lost], ["nobody's"], [here, lost]):
        with pytest.raises(DamagedError, match="slice 1 of shard 1 has 0 rows on disk"):
            store.delete(records=records, executor="inline")
    assert store.status() == before
    assert store.delete(records=[here], executor="inline").state == "repaired"
    assert here not in on_disk(store)


def test_a_repair_over_damaged_rows_does_what_it_can_and_says_so(
    world: World, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = world.copy(folder / "store")
    request = store.delete(subjects=[world.people[0, 1][0]], defer=True).request
    rows_of(store, 1, 1).unlink()
    assert run(["repair", "--store", str(root_of(store)), "--executor", "inline", "--json"]) == 3
    assert "shard 1, slice 1" in json.loads(capsys.readouterr().out)["error"]["message"]
    assert store.request(request).state == "repaired"
    shutil.copy(world.template / rows_of(store, 1, 1).relative_to(root_of(store)), rows_of(store, 1, 1))
    assert store.repair(executor="inline").requests == []
    assert store.verify(replay="all", executor="inline").problems == []


# --- before the first training has ended ------------------------------------------------------------


def half_trained(world: World, root: Path) -> Store:
    """A store whose first training was killed when one shard was done."""
    kit.killed_before(kit.trained, world.recipe, root, root=root, stop_at="COMMIT in deletion.repair._publish")
    store = kit.reopened(root)
    last = max((row for row in store.opened.ledger.stages.all() if row.shard == 1), key=lambda row: row.stage)
    store.opened.ledger.stages.forget(last)
    return store


@pytest.mark.parametrize("verb", ["train", "repair"])
def test_half_a_first_training_serves_nobody_after_a_deletion(world: World, folder: Path, verb: str) -> None:
    store = half_trained(world, folder / "store")
    done = store.delete(subjects=[world.people[0, 1][0]], executor="inline")
    assert (done.state, done.version_before, done.version_quarantine, done.version_after) == (
        "stages_purged", 0, None, None,
    )  # fmt: skip
    assert "has not ended" in done.note
    assert (store.version, store.status()["state"]) == (0, "training")
    with pytest.raises(NoConstituentError, match="no trained ensemble yet"):
        store.predict_proba(PROBE)
    if verb == "train":
        kit.trained(world.recipe, root_of(store)).close()
    else:
        store.repair(executor="inline")
    assert (store.version, store.status()["state"]) == (1, "ready")
    assert store.request(done.request).state == "repaired"
    undisturbed = world.copy(folder / "undisturbed")
    undisturbed.delete(subjects=[world.people[0, 1][0]], executor="inline")
    assert store.status()["constituents"] == undisturbed.status()["constituents"]
    assert store.verify(replay="all", executor="inline").problems == []


# --- ledgers that nobody should meet ----------------------------------------------------------------


def test_a_killed_upgrade_and_one_back_end(world: World, folder: Path) -> None:
    """The upgrade took the old stages out of service and was killed before it removed them."""
    store = world.copy(folder / "store")
    store.opened.ledger.stages.retire_others(code="newer", platform="newer")
    assert len(store.opened.ledger.stages.tainted()) == 4
    repaired = store.repair(executor="inline")
    assert repaired.stages_retrained == 4
    assert kit.end_state(store) == kit.end_state(world.copy(folder / "undisturbed"))


def test_a_dirty_slice_without_a_request_is_read_again(world: World, folder: Path) -> None:
    store = world.copy(folder / "store")
    store.opened.ledger.database.rows("UPDATE partitions SET dirty = 1 WHERE shard = 1 AND slice = 1")
    assert kit.trained(world.recipe, root_of(store)).training.stages_trained == 0
    assert not any(partition.dirty for partition in store.opened.ledger.partitions.all())
    assert store.verify(replay="all", executor="inline").problems == []


def test_a_shard_that_nothing_can_settle_ends_the_command(
    world: World, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = world.copy(folder / "store")
    store.opened.ledger.database.rows("UPDATE partitions SET dirty = 1 WHERE shard = 1 AND slice = 1")
    monkeypatch.setattr(settle, "erase_partition", lambda *_: None)
    with pytest.raises(DamagedError, match=r"shards \[1\] can't be built"):
        kit.trained(world.recipe, root_of(store))


def test_a_store_that_lost_its_recipe_and_its_ledger_is_not_made_anew(world: World, folder: Path) -> None:
    store = world.copy(folder / "store")
    store.delete(subjects=[world.people[1, 1][0]], executor="inline")
    root = root_of(store)
    store.close()
    (root / "recipe.yaml").unlink()
    (root / "ledger.db").write_bytes(b"no ledger")
    rows = kit.rows_on_disk(root)
    with pytest.raises(DamagedError, match=r"recipe\.yaml of the store is missing"):
        kit.trained(world.recipe, root)
    assert kit.rows_on_disk(root) == rows
    assert (root / "ledger.db").read_bytes() == b"no ledger"


def test_a_subject_whose_rows_went_one_by_one_is_unknown(world: World, folder: Path) -> None:
    store = world.copy(folder / "store")
    person = world.people[1, 1][0]
    store.delete(records=records_of(person), executor="inline")
    with pytest.raises(UnknownIdsError):
        store.delete(subjects=[person], executor="inline")


@pytest.mark.parametrize("ids", [[1.0], [True], [b"p01"], [None], [["p01"]]])
@pytest.mark.parametrize("kind", ["subjects", "records"])
def test_what_is_no_id_deletes_nobody(world: World, folder: Path, kind: str, ids: list[Any]) -> None:
    store = world.copy(folder / "store")
    before = store.status()
    with pytest.raises(UserError, match=kind):
        store.delete(**{kind: ids}, executor="inline")
    assert store.status() == before


@pytest.mark.parametrize("more", [[], ["--ignore-missing"]])
def test_everybody_of_a_lost_slice_is_accepted_unseen_not_only_the_first(
    world: World, folder: Path, more: list[str]
) -> None:
    store = world.copy(folder / "store")
    rows = rows_of(store, 1, 1)
    whole = rows.read_bytes()
    rows.unlink()
    one, two = world.people[1, 1][:2]
    words = ["delete", "--store", str(root_of(store)), "--json", *more]
    assert [run([*words, "--subject", person]) for person in (one, two)] == [3, 3]
    assert run([*words, "--record", min(records_of(world.people[1, 1][2]))]) == 3
    assert len(store.status()["requests"]) == 2
    rows.write_bytes(whole)
    assert len(store.repair(executor="inline").requests) == 2
    assert not on_disk(store) & (records_of(one) | records_of(two))
    assert store.verify(replay="all", executor="inline").problems == []


class FailsOnce:
    """A disk that can't read one file, once."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
        self.failed = False
        opened = LocalStorage.opened

        @contextlib.contextmanager
        def failing(storage: LocalStorage, key: str) -> Iterator[BinaryIO]:
            if storage.path(key) == path and not self.failed:
                self.failed = True
                raise OSError(errno.EIO, "Input/output error")
            with opened(storage, key) as stream:
                yield stream

        monkeypatch.setattr(LocalStorage, "opened", failing)


@pytest.mark.parametrize("killed", [False, True])
def test_whom_a_failing_disk_hid_when_it_was_asked_for_is_counted_when_the_rows_go(
    world: World, folder: Path, monkeypatch: pytest.MonkeyPatch, killed: bool
) -> None:
    store = world.copy(folder / "store")
    person = world.people[1, 1][0]
    disk = FailsOnce(monkeypatch, rows_of(store, 1, 1))
    if killed:  # before the file is replaced: what was found is found again, and counted once
        with monkeypatch.context() as patch:
            patch.setattr(settle, "rewrite_partition", interrupted)
            with pytest.raises(KeyboardInterrupt):
                store.delete(subjects=[person], executor="inline")
        store.repair(executor="inline")
    else:
        store.delete(subjects=[person], executor="inline")
    assert disk.failed
    (request,) = store.status()["requests"]
    assert (request["state"], request["subjects"], request["records"]) == ("repaired", 1, len(records_of(person)))
    assert store.verify(replay="all", executor="inline").problems == []
    seen = world.copy(folder / "seen")
    seen.delete(subjects=[person], executor="inline")
    assert {*store.opened.ledger.requests.exclusions()} == {*seen.opened.ledger.requests.exclusions()}
    assert kit.end_state(store)["constituents"] == kit.end_state(seen)["constituents"]


def test_others_hear_of_a_record_that_was_found_later(world: World, folder: Path) -> None:
    store = world.copy(folder / "store")
    store.delete(subjects=[world.people[1, 1][0]], executor="inline", defer=True)
    other = kit.reopened(root_of(store))
    before = {*other.opened.ledger.requests.exclusions()}
    (request,) = store.opened.ledger.requests.all()
    store.opened.ledger.requests.found({b"16 bytes of one.": request.id})
    assert {*other.opened.ledger.requests.exclusions()} - before == {("record", b"16 bytes of one.")}


@pytest.mark.parametrize("due", ["readable", "unseen"])
def test_a_backup_from_before_a_deletion_under_another_one_is_healed(world: World, folder: Path, due: str) -> None:
    store = world.copy(folder / "store")
    early, late = world.people[1, 1][:2]
    rows = rows_of(store, 1, 1)
    old = rows.read_bytes()
    store.delete(subjects=[early], executor="inline")
    rows.write_bytes(old if due == "readable" else b"torn")
    if due == "unseen":
        with pytest.raises(DamagedError):
            store.delete(subjects=[late], executor="inline")
        rows.write_bytes(old)
        store.repair(executor="inline")
    else:
        store.delete(subjects=[late], executor="inline")
    assert not on_disk(store) & (records_of(early) | records_of(late))
    undisturbed = world.copy(folder / "undisturbed")
    for person in (early, late):
        undisturbed.delete(subjects=[person], executor="inline")
    assert kit.end_state(store)["rows"] == kit.end_state(undisturbed)["rows"]
    assert kit.end_state(store)["constituents"] == kit.end_state(undisturbed)["constituents"]
    assert store.verify(replay="all", executor="inline").problems == []


def test_damage_of_one_shard_keeps_no_other_out_of_service(world: World, folder: Path) -> None:
    store = world.copy(folder / "store")
    rows = rows_of(store, 1, 1)
    whole = rows.read_bytes()
    rows.write_bytes(b"torn")
    both = [world.people[0, 1][0], world.people[1, 1][0]]
    with pytest.raises(DamagedError, match="not all of them could be erased"):
        store.delete(subjects=both, executor="inline")
    with pytest.raises(DamagedError):
        store.repair(executor="inline")
    assert [c["stage"] for c in store.status()["constituents"]] == [2, 0]
    assert store.delete(subjects=[world.people[0, 2][0]], executor="inline").state == "repaired"
    rows.write_bytes(whole)
    store.repair(executor="inline")
    assert not on_disk(store) & {record for person in both for record in records_of(person)}
    assert store.verify(replay="all", executor="inline").problems == []


def test_a_deletion_that_is_done_says_so_if_its_slice_is_damaged_later(world: World, folder: Path) -> None:
    store = world.copy(folder / "store")
    person = world.people[1, 1][0]
    store.delete(subjects=[person], executor="inline")
    rows_of(store, 1, 1).write_bytes(b"torn")
    with pytest.raises(DamagedError, match="was carried out; but now nobody can tell"):
        store.delete(subjects=[person], executor="inline")


def test_the_memory_of_deletions_is_not_destroyed_while_one_is_due(world: World, folder: Path) -> None:
    store = world.copy(folder / "store")
    accept(store.opened, subjects=[world.people[1, 1][0]])
    key = store.opened.layout.exclusion_key.read_bytes()
    with pytest.raises(StoreError, match="are not erased yet"):
        renew_exclusion_key(store.opened.layout)
    assert store.opened.layout.exclusion_key.read_bytes() == key
    store.repair(executor="inline")
    renew_exclusion_key(store.opened.layout)
    with pytest.raises(StoreError, match="the exclusion key was replaced"):
        store.delete(subjects=[world.people[0, 1][0]], executor="inline")
    fresh = kit.reopened(root_of(store))
    assert fresh.delete(subjects=[world.people[0, 1][0]], executor="inline").state == "repaired"
