"""A real SIGKILL before each durable operation of a deletion, a training and a repair: run again, the same end."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import crash_kit as kit
import pytest

from sisa.errors import NoConstituentError

TABLE = kit.people(12)


@dataclass(frozen=True)
class World:
    """A trained store to copy, its recipe, and who is where in it."""

    folder: Path
    recipe: dict[str, Any]
    template: Path
    people: dict[tuple[int, int], list[str]]

    def copy(self, name: str) -> Path:
        return kit.copy_store(self.template, self.folder / name)


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


@pytest.fixture(autouse=True)
def _nobody_left() -> Iterator[None]:
    yield
    kit.Child.kill_all()


def check_all(points: Sequence[int], names: Sequence[str], run: Callable[[int], None]) -> None:
    """Run every point and say which failed."""
    failed: list[str] = []
    for number in points:
        try:
            run(number)
        except Exception as error:  # noqa: BLE001 - collected
            failed.append(f"killed before operation {number} ({names[number]}): {error!r}")
    assert not failed, "\n".join(failed)


# --- a deletion -------------------------------------------------------------------------------------


def delete(root: Path, subjects: list[str]) -> None:
    kit.reopened(root).delete(subjects=subjects, executor="inline")


def leavers(world: World) -> list[str]:
    """Someone early, someone late, everybody of a slice, and someone of the holdout."""
    return [world.people[1, 1][0], *world.people[0, 2], world.people[1, 2][0], world.people[1, 0][0]]


def check_killed_deletion(world: World, name: str, subjects: list[str], expected: dict[str, Any], number: int) -> None:
    root = world.copy(f"{name}-{number}")
    kit.killed_before(delete, root, subjects, root=root, stop_at=number)
    store = kit.reopened(root)
    accepted = store.opened.ledger.requests.all()
    check_serves_clean_stages(store, accepted=bool(accepted))
    if accepted:
        store.repair(executor="inline")
        # asked again, it is answered with the same request
        assert store.delete(subjects=subjects, executor="inline").request == accepted[0].id
    else:
        assert kit.end_state(store)["rows"] == kit.rows_on_disk(world.template)
        store.delete(subjects=subjects, executor="inline")
    check_end(store, expected)


def check_serves_clean_stages(store: Any, *, accepted: bool) -> None:
    ledger = store.opened.ledger
    assert not accepted or ledger.versions.last_quarantine() > 0
    for member in ledger.versions.live().members:
        if member.stage:
            assert not ledger.stages.get(member.key, member.platform).tainted
    try:
        store.predict_proba(TABLE.select(["x", "z"]))
    except NoConstituentError:
        assert accepted


def check_end(store: Any, expected: dict[str, Any]) -> None:
    assert kit.end_state(store) == expected
    found = store.verify(replay="all", executor="inline")
    assert found.problems == []
    assert found.stages_replayed == store.opened.shards * store.opened.slices
    root = store.opened.layout.root
    assert not [path for path in root.rglob("*") if path.name.startswith("tmp-")]
    assert not list((root / "locks").glob("stop-*/*"))
    assert not store.opened.layout.scratch.exists()
    store.close()


@pytest.fixture(scope="module")
def undisturbed_deletion(world: World) -> tuple[list[str], dict[str, Any]]:
    root = world.copy("undisturbed")
    names = kit.operations(delete, root, leavers(world), root=root)
    state = kit.end_state(kit.reopened(root))
    assert state["requests"][0][0] == "repaired"
    return names, state


def test_a_deletion_killed_at_every_kind_of_step_ends_the_same(
    world: World, undisturbed_deletion: tuple[list[str], dict[str, Any]]
) -> None:
    names, expected = undisturbed_deletion
    for state_change in ("requests.accept", "requests.advance", "partitions.prepare_erasure", "repair._publish"):
        assert any(name.endswith(state_change) for name in names)
    points = [number for number, name in enumerate(names) if "requests." in name]  # each move of the journal
    points = sorted({*points, *kit.sampled(names, most=28)})
    check_all(points, names, lambda n: check_killed_deletion(world, "default", leavers(world), expected, n))


@pytest.mark.slow
def test_a_deletion_killed_at_any_step_ends_the_same(
    world: World, undisturbed_deletion: tuple[list[str], dict[str, Any]]
) -> None:
    names, expected = undisturbed_deletion
    check_all(range(len(names)), names, lambda n: check_killed_deletion(world, "every", leavers(world), expected, n))


def test_two_deletions_of_one_slice_killed_one_after_the_other(world: World) -> None:
    """The first dies after it replaced the rows' file, the second before it does."""
    first, second = world.people[1, 1][:2]
    root = world.copy("twice")
    for person, where in [
        (first, "COMMIT in ledger.partitions.finish_erasure"),
        (second, "replace in records.partition.rewrite_partition"),
    ]:
        kit.killed_before(delete, root, [person], root=root, stop_at=where)
    other = world.copy("undisturbed-twice")
    for person in (first, second):
        delete(other, [person])
    store = kit.reopened(root)
    store.repair(executor="inline")
    check_end(store, kit.end_state(kit.reopened(other)))


# --- a training -------------------------------------------------------------------------------------


def train(recipe: dict[str, Any], root: Path) -> None:
    kit.trained(recipe, root)


def check_killed_training(world: World, name: str, expected: dict[str, Any], number: int) -> None:
    root = world.folder / f"{name}-{number}"
    kit.killed_before(train, world.recipe, root, root=root, stop_at=number)
    store = kit.trained(world.recipe, root)
    assert store.training.records == sum(c["records"] for c in expected["constituents"])
    check_end(store, expected)
    assert kit.trained(world.recipe, root).training.stages_trained == 0


@pytest.fixture(scope="module")
def undisturbed_training(world: World) -> tuple[list[str], dict[str, Any]]:
    root = world.folder / "first"
    names = kit.operations(train, world.recipe, root, root=root)
    return names, kit.end_state(kit.reopened(root))


def test_a_training_killed_at_every_kind_of_step_ends_the_same(
    world: World, undisturbed_training: tuple[list[str], dict[str, Any]]
) -> None:
    names, expected = undisturbed_training
    points = kit.sampled(names, most=24)
    check_all(points, names, lambda n: check_killed_training(world, "train", expected, n))


@pytest.mark.slow
def test_a_training_killed_at_any_step_ends_the_same(
    world: World, undisturbed_training: tuple[list[str], dict[str, Any]]
) -> None:
    names, expected = undisturbed_training
    check_all(range(len(names)), names, lambda n: check_killed_training(world, "every-train", expected, n))


def test_a_stage_that_was_written_and_never_entered_goes_with_the_person(world: World) -> None:
    """The training died between the stage's rename and its line in the ledger."""
    root = world.folder / "unentered"
    kit.killed_before(train, world.recipe, root, root=root, stop_at="COMMIT in ledger.stages.enter_all")
    (stage,) = root.glob("checkpoints/shard-*/stage-01-*")
    store = kit.reopened(root)
    assert store.opened.ledger.stages.all() == []
    person = world.people[int(stage.parent.name.removeprefix("shard-")), 1][0]
    store.delete(subjects=[person], defer=True)
    assert not stage.exists()
    store.repair(executor="inline")
    assert store.verify(replay="all", executor="inline").problems == []
    store.close()


# --- a repair ---------------------------------------------------------------------------------------


def repair(root: Path) -> None:
    kit.reopened(root).repair(executor="inline")


@pytest.fixture(scope="module")
def repairable(world: World) -> tuple[Path, list[str], dict[str, Any]]:
    """A store with two deferred deletions and a damaged stage, and how a repair of it ends."""
    root = world.copy("repairable")
    store = kit.reopened(root)
    store.delete(subjects=world.people[1, 1][:1], defer=True)
    store.delete(subjects=world.people[1, 2][:2], defer=True)
    store.close()
    chunk = next((root / "checkpoints" / "shard-0000").glob("stage-01-*/state/c.0"))
    content = bytearray(chunk.read_bytes())
    content[0] ^= 1
    chunk.write_bytes(bytes(content))
    whole = kit.copy_store(root, world.folder / "repaired")
    names = kit.operations(repair, whole, root=whole)
    return root, names, kit.end_state(kit.reopened(whole))


def check_killed_repair(world: World, broken: Path, name: str, expected: dict[str, Any], number: int) -> None:
    root = kit.copy_store(broken, world.folder / f"{name}-{number}")
    kit.killed_before(repair, root, root=root, stop_at=number)
    store = kit.reopened(root)
    store.repair(executor="inline")
    check_end(store, expected)


def test_a_repair_killed_at_every_kind_of_step_ends_the_same(
    world: World, repairable: tuple[Path, list[str], dict[str, Any]]
) -> None:
    broken, names, expected = repairable
    points = kit.sampled(names, most=16)
    check_all(points, names, lambda n: check_killed_repair(world, broken, "repair", expected, n))


@pytest.mark.slow
def test_a_repair_killed_at_any_step_ends_the_same(
    world: World, repairable: tuple[Path, list[str], dict[str, Any]]
) -> None:
    broken, names, expected = repairable
    check_all(range(len(names)), names, lambda n: check_killed_repair(world, broken, "every-repair", expected, n))
