"""Several processes at one store. Real ones; who goes first is decided by gates and stopped processes, never by time."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import crash_kit as kit
import pyarrow as pa
import pyarrow.parquet as papq
import pytest

from sisa.deletion.settle import purge_shard, settle
from sisa.errors import BusyError, NoConstituentError
from sisa.execution import build as building
from sisa.ledger import STATES
from sisa.progress import Silent
from sisa.store.predict import predict_table
from sisa.training.chain import run_chain

TABLE = kit.people(12)
PROBE = TABLE.select(["x", "z"])
PURGED = STATES.index("stages_purged")
GRACE_S = 0.3
"""How long another process may run before one that is stopped goes on: it changes what is tried, not what is right."""


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
        papq.write_table(PROBE, folder / "probe.parquet")
        yield World(folder, recipe, folder / "template", people)


@pytest.fixture(autouse=True)
def _nobody_left() -> Iterator[None]:
    yield
    kit.Child.kill_all()


# --- what the processes do --------------------------------------------------------------------------


class Gate(Silent):
    """A reporter that waits at the first progress of one piece of work until the parent says a word."""

    def __init__(self, *pieces: str) -> None:
        self._pieces = set(pieces)
        self._what = ""

    def begin(self, what: str, total: int | None) -> None:
        del total
        self._what = what

    def advance(self, amount: int) -> None:
        del amount
        if self._what in self._pieces:
            self._pieces.remove(self._what)
            kit.to_parent.send(("told", self._what))
            kit.to_parent.recv()

    def end(self) -> None:
        self._what = ""


def delete(root: Path, subjects: list[str], defer: bool = False) -> dict[str, Any]:
    return kit.reopened(root).delete(subjects=subjects, defer=defer, executor="inline").as_dict()


def repair(root: Path, *gates: str) -> dict[str, Any]:
    return kit.reopened(root).repair(executor="inline", reporter=Gate(*gates)).as_dict()


def train(recipe: dict[str, Any], root: Path, *gates: str) -> int:
    store = kit.train(recipe, store=root, executor="inline", reporter=Gate(*gates))
    return store.training.stages_trained


def verify(root: Path, replay: Any, *gates: str) -> list[str] | str:
    try:
        return kit.reopened(root).verify(replay=replay, executor="inline", reporter=Gate(*gates)).problems
    except BusyError:
        return "busy"


def check_end(world: World, root: Path, subjects: list[str]) -> None:
    """The store is one from which these people were deleted, undisturbed."""
    store = kit.reopened(root)
    found = store.verify(replay="all", executor="inline")
    assert found.problems == []
    assert {request.state for request in store.opened.ledger.requests.all()} == {"repaired"}
    state = kit.end_state(store)
    store.close()
    name = "undisturbed-" + "-".join(sorted(subjects))
    if not (world.folder / name).exists():
        delete(world.copy(name), subjects)
    expected = kit.end_state(kit.reopened(world.folder / name))
    for part in ("constituents", "stages", "rows", "files"):
        assert state[part] == expected[part], part


def interleaved(first: Callable[[int], kit.Child], second: Callable[[], kit.Child], *, at: int) -> tuple[Any, Any]:
    """Stop one process before an operation, let the other run as far as it gets, then let both end."""
    one = first(at)
    kind, value = one.hear()
    other = second()
    if kind == "done":
        return value, other.result()
    assert kind == "stopped", value
    other.process.join(GRACE_S)
    one.go_on()
    return one.result(), other.result()


def points(world: World, subjects: list[str], *, most: int) -> range:
    """Operations of a deletion at which to stop it."""
    root = world.copy(f"counted-{uuid.uuid4()}")
    count = len(kit.operations(delete, root, subjects, root=root))
    return range(0, count, max(1, count // most))


# --- deletions against each other -------------------------------------------------------------------


def check_two_deletions(world: World, *, most: int) -> None:
    one, two = world.people[1, 1][:2]
    for number in points(world, [one], most=most):
        root = world.copy(f"two-{most}-{number}")
        interleaved(
            lambda at, root=root: kit.Child(delete, root, [one], root=root, stop_at=at),
            lambda root=root: kit.Child(delete, root, [two]),
            at=number,
        )
        assert len(kit.reopened(root).opened.ledger.requests.all()) == 2
        check_end(world, root, [one, two])


def test_two_deletions_from_one_slice_at_once(world: World) -> None:
    check_two_deletions(world, most=9)


@pytest.mark.slow
def test_two_deletions_from_one_slice_at_every_point(world: World) -> None:
    check_two_deletions(world, most=1000)


def check_same_subject(world: World, *, most: int) -> None:
    person = world.people[1, 1][0]
    for number in points(world, [person], most=most):
        root = world.copy(f"same-{most}-{number}")
        _, other = interleaved(
            lambda at, root=root: kit.Child(delete, root, [person], root=root, stop_at=at),
            lambda root=root: kit.Child(delete, root, [person]),
            at=number,
        )
        (request,) = kit.reopened(root).opened.ledger.requests.all()
        assert other["request"] == request.id
        check_end(world, root, [person])


def test_the_same_subject_from_two_processes_is_one_request(world: World) -> None:
    check_same_subject(world, most=7)


@pytest.mark.slow
def test_the_same_subject_at_every_point(world: World) -> None:
    check_same_subject(world, most=1000)


def test_many_deletions_at_once(world: World) -> None:
    root = world.copy("many")
    everybody = [person for place, people in sorted(world.people.items()) for person in people[:2]]
    children = [kit.Child(delete, root, [person]) for person in everybody]
    assert all(child.result()["state"] == "repaired" for child in children)
    assert len(kit.reopened(root).opened.ledger.requests.all()) == len(everybody)
    check_end(world, root, everybody)


# --- deletions against trainings and repairs --------------------------------------------------------


def check_accepted_at_once(root: Path, child: kit.Child, holder: kit.Child, *, requests: int) -> None:
    """Somebody holds the shard and waits for our word: the deletion gets through all the same."""
    ledger = kit.reopened(root).opened.ledger
    # Its rows leave their file at once; they count as erased when a running training has let go of them, too.
    while len(ledger.requests.all()) < requests or any(
        ledger.partitions.get(*place).dirty for place in ledger.requests.all()[-1].places
    ):
        assert not child.heard(), child.hear()
    assert not holder.heard()
    request = ledger.requests.all()[-1]
    version = ledger.versions.live()
    assert version.number >= (request.version_quarantine or 0)
    for member in version.members:
        if member.shard in request.shards:
            assert member.stage < min(slice_ for _, slice_ in request.places)
    ledger.close()


def saw(root: Path, keys: set[str]) -> list[Path]:
    """Stages on disk, finished or not, that have one of these keys."""
    return [path for path in root.rglob("stage-*") if any(key in path.name for key in keys)]


@pytest.mark.parametrize("gate", ["routing records", "training"])
def test_a_deletion_during_the_first_training(world: World, gate: str) -> None:
    root = world.folder / f"during-{gate.replace(' ', '-')}"
    person = world.people[1, 1][0]
    trainer = kit.Child(train, world.recipe, root, gate)
    assert trainer.hear() == ("told", gate)
    child = kit.Child(delete, root, [person])
    if gate == "training":
        check_accepted_at_once(root, child, trainer, requests=1)
    trainer.tell("go on")
    trainer.result()
    assert child.result()["state"] == "repaired"
    check_end(world, root, [person])


def test_a_deletion_during_a_training_leaves_no_tainted_bytes(world: World) -> None:
    root = world.folder / "tainted-bytes"
    person = world.people[1, 1][0]
    tainted = {key for (shard, _), key in keys_of(world.template).items() if shard == 1}
    trainer = kit.Child(train, world.recipe, root, "training")
    trainer.hear()
    child = kit.Child(delete, root, [person], True)
    check_accepted_at_once(root, child, trainer, requests=1)
    trainer.tell("go on")
    assert STATES.index(child.result()["state"]) >= PURGED
    assert saw(root, tainted) == []
    trainer.result()
    assert saw(root, tainted) == []
    kit.reopened(root).repair(executor="inline")
    check_end(world, root, [person])


def keys_of(root: Path) -> dict[tuple[int, int], str]:
    store = kit.reopened(root)
    keys = {(row.shard, row.stage): row.key for row in store.opened.ledger.stages.all()}
    store.close()
    return keys


def test_a_deletion_during_a_repair_of_its_shard(world: World) -> None:
    root = world.copy("during-repair")
    one, two = world.people[1, 1][:2]
    delete(root, [one], True)
    repairer = kit.Child(repair, root, "retraining")
    assert repairer.hear() == ("told", "retraining")
    child = kit.Child(delete, root, [two])
    check_accepted_at_once(root, child, repairer, requests=2)
    repairer.tell("go on")
    repairer.result()
    assert child.result()["state"] == "repaired"
    check_end(world, root, [one, two])


def test_who_goes_on_deleting_keeps_no_repair_from_service(world: World) -> None:
    """During each round of a repair somebody else asks to be deleted: what is repaired goes live all the same."""
    root = world.copy("no-end")
    other = kit.reopened(root)
    leavers = [world.people[0, 1][0], world.people[1, 1][0], world.people[0, 2][0], world.people[1, 2][0]]
    seen: list[tuple[list[str], int]] = []

    class Deleter(Gate):
        def begin(self, what: str, total: int | None) -> None:
            super().begin(what, total)
            ledger = other.opened.ledger
            if what == "retraining":
                live = ledger.versions.live()
                seen.append(([r.state for r in ledger.requests.all()], sum(m.stage == 2 for m in live.members)))
                if len(seen) < len(leavers):
                    other.delete(subjects=[leavers[len(seen)]], defer=True)

    other.delete(subjects=leavers[:1], defer=True)
    store = kit.reopened(root)
    done = store.repair(executor="inline", reporter=Deleter())
    assert [states[:-1] for states, _ in seen] == [["repaired"] * number for number in range(len(leavers))]
    assert [serving for _, serving in seen] == [1] * len(leavers)
    assert done.requests == [request.id for request in store.opened.ledger.requests.all()]
    other.close()
    store.close()
    check_end(world, root, leavers)


def check_deletion_against_repair(world: World, *, most: int) -> None:
    one, two = world.people[1, 1][:2]
    for number in points(world, [two], most=most):
        root = world.copy(f"against-repair-{most}-{number}")
        delete(root, [one], True)
        interleaved(
            lambda at, root=root: kit.Child(delete, root, [two], root=root, stop_at=at),
            lambda root=root: kit.Child(repair, root),
            at=number,
        )
        check_end(world, root, [one, two])


def test_a_repair_during_a_deletion(world: World) -> None:
    check_deletion_against_repair(world, most=7)


@pytest.mark.slow
def test_a_repair_at_every_point_of_a_deletion(world: World) -> None:
    check_deletion_against_repair(world, most=1000)


def test_a_retraining_from_the_full_source_during_a_deletion(world: World) -> None:
    """The source holds whom the store is just forgetting: that makes nobody new."""
    person = world.people[1, 1][0]
    for number in points(world, [person], most=7):
        root = world.copy(f"full-source-{number}")
        interleaved(
            lambda at, root=root: kit.Child(delete, root, [person], root=root, stop_at=at),
            lambda root=root: kit.Child(try_training, world.recipe, root),
            at=number,
        )
        check_end(world, root, [person])


def try_training(recipe: dict[str, Any], root: Path) -> str:
    try:
        train(recipe, root)
    except BusyError:
        return "busy"
    return "trained"


def test_a_settling_that_comes_late_takes_nothing_away_from_the_repair(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a cluster a chain lets its shard go before its last stages are entered: no purge may come in between."""
    root = world.copy("late")
    person = world.people[1, 1][0]
    store = kit.reopened(root)
    other = kit.reopened(root).opened
    store.delete(subjects=[person], defer=True)
    request = replace(other.ledger.requests.all()[0], state="accepted")  # as it was when another process looked

    def run_late(tasks: Any, receiver: Any) -> None:
        for task in tasks:
            events: list[Any] = []
            run_chain(task, events.append)
            settle(other, request, Gate())
            purge_shard(other, task.shard, first_stage=1, reporter=Gate(), request=request)
            receiver.events(events)

    monkeypatch.setattr(building, "run_inline", run_late)
    store.repair(executor="inline")
    monkeypatch.undo()
    check_end(world, root, [person])


# --- one at a time ----------------------------------------------------------------------------------


def test_a_training_while_another_runs_is_refused(world: World) -> None:
    root = world.folder / "busy"
    trainer = kit.Child(train, world.recipe, root, "training")
    trainer.hear()
    with pytest.raises(BusyError, match=f"process {trainer.process.pid}") as refused:
        kit.trained(world.recipe, root)
    assert refused.value.exit_code == 3
    with pytest.raises(BusyError):
        kit.reopened(root).verify()
    trainer.tell("go on")
    assert trainer.result() == 4
    assert kit.trained(world.recipe, root).training.stages_trained == 0


def check_two_first_trainings(world: World, *, most: int) -> None:
    """Both make the store; neither knows the other's key."""
    recipe = {**world.recipe, "routing": {"key_file": None}}
    root = world.folder / f"counted-{uuid.uuid4()}"
    count = len(kit.operations(train, recipe, root, root=root))
    for number in range(0, count, max(1, count // most)):
        root = world.folder / f"both-{most}-{number}"
        interleaved(
            lambda at, root=root: kit.Child(try_training, recipe, root, root=root, stop_at=at),
            lambda root=root: kit.Child(try_training, recipe, root),
            at=number,
        )
        kit.trained(recipe, root).close()  # each may have found the other at work
        store = kit.reopened(root)
        assert store.verify(replay="all", executor="inline").problems == []
        present = [record for records in kit.rows_on_disk(root).values() for record in records]
        assert sorted(present) == TABLE["record"].to_pylist()
        store.close()


def test_two_first_trainings_at_once(world: World) -> None:
    check_two_first_trainings(world, most=5)


@pytest.mark.slow
def test_two_first_trainings_at_every_point(world: World) -> None:
    check_two_first_trainings(world, most=1000)


# --- predictions ------------------------------------------------------------------------------------


def predict_until_told(root: Path, probe: Path, output: Path, floor: Any, done: Any) -> int:
    """Predict again and again; every answer comes from a version as new as the last acknowledged quarantine."""
    store = kit.reopened(root)
    rounds = 0
    while not done.is_set():
        acknowledged = floor.value
        try:
            answer = predict_table(store, str(probe), output)
            versions = papq.read_table(output)["version"].to_pylist()
            assert answer.version == min(versions)
            assert min(versions) >= acknowledged
            store.predict_proba(PROBE)
        except NoConstituentError:
            pass
        rounds += 1
        store.status()
    return rounds


def test_predictions_while_people_are_deleted(world: World) -> None:
    root = world.copy("predicting")
    floor, done = kit.PROCESSES.Value("i", 0), kit.PROCESSES.Event()
    predictors = [
        kit.Child(
            predict_until_told, root, world.folder / "probe.parquet", root.parent / f"out-{i}.parquet", floor, done
        )
        for i in range(2)
    ]
    leavers = [people[0] for place, people in sorted(world.people.items())]
    leavers += [people[-1] for place, people in sorted(world.people.items()) if place[1] == 2]
    for person in leavers:
        answer = kit.Child(delete, root, [person]).result()
        floor.value = max(floor.value, answer["version_quarantine"] or 0)
    done.set()
    assert all(child.result() > 0 for child in predictors)
    check_end(world, root, leavers)


def test_a_prediction_that_a_deletion_overtakes_is_computed_again(world: World) -> None:
    root = world.copy("overtaken")
    gated = kit.Child(predict_slowly, root, world.folder / "probe.parquet", root.parent / "slow.parquet")
    assert gated.hear() == ("told", "predicting")
    answer = delete(root, [world.people[1, 1][0]], True)
    gated.tell("go on")
    assert gated.result() >= answer["version_quarantine"]
    versions = papq.read_table(root.parent / "slow.parquet")["version"].to_pylist()
    assert min(versions) >= answer["version_quarantine"]


def predict_slowly(root: Path, probe: Path, output: Path) -> int:
    return predict_table(kit.reopened(root), str(probe), output, reporter=Gate("predicting")).version


# --- verifications ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("replay", "gate"), [("none", "verifying"), ("all", "replaying")])
def test_a_deletion_during_a_verification(world: World, replay: str, gate: str) -> None:
    root = world.copy(f"verified-{replay}")
    person = world.people[0, 1][0]  # of the shard that a replay begins with
    verifier = kit.Child(verify, root, replay, gate)
    assert verifier.hear() == ("told", gate)
    child = kit.Child(delete, root, [person])
    check_accepted_until_purge(root, child)
    verifier.tell("go on")
    assert verifier.result() in ([], "busy")
    assert child.result()["state"] == "repaired"
    assert not (root / "scratch").exists()
    check_end(world, root, [person])


def check_accepted_until_purge(root: Path, child: kit.Child) -> None:
    ledger = kit.reopened(root).opened.ledger
    while not (found := ledger.requests.all()) or STATES.index(found[0].state) < STATES.index("rows_erased"):
        assert not child.heard(), child.hear()
    ledger.close()


@pytest.mark.slow
def test_a_verification_at_every_point_of_a_deletion(world: World) -> None:
    person = world.people[0, 1][0]
    for number in points(world, [person], most=1000):
        root = world.copy(f"verify-at-{number}")
        _, found = interleaved(
            lambda at, root=root: kit.Child(delete, root, [person], root=root, stop_at=at),
            lambda root=root: kit.Child(verify, root, "all"),
            at=number,
        )
        assert found == "busy" or all("request del-" in problem or "shard" in problem for problem in found)
        check_end(world, root, [person])


def test_reading_the_rows_of_a_slice_that_is_just_emptied(world: World) -> None:
    """Nobody is left in it: that is no damage."""
    root = world.copy("emptied")
    everybody = world.people[0, 2]
    child = kit.Child(delete, root, everybody, root=root, stop_at="unlink in records.partition.rewrite_partition")
    assert child.hear()[0] == "stopped"
    store = kit.reopened(root)
    store.status()
    child.go_on()
    while not child.heard():
        store.status()
    child.result()
    check_end(world, root, everybody)


def test_rows_that_vanish_between_two_looks_are_no_damage(tmp_path: Path) -> None:
    from sisa.layout import Layout
    from sisa.records.partition import present_ids

    records, subjects = present_ids(Layout(tmp_path), 0, 1)
    assert records == subjects == pa.array([], pa.string())
