"""Recovery snapshots: a stage goes on from its middle to the same bits, and no snapshot outlives what it saw."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import crash_kit as kit
import numpy as np
import pytest
from training_kit import KEYS, images, numbers, recipe, stage

from sisa.checkpoints import CheckpointStore, SnapshotId, StageId
from sisa.checkpoints.snapshots import parse_snapshot
from sisa.errors import DamagedError, StoreError
from sisa.ledger.requests import Requests
from sisa.progress import Silent
from sisa.recipe import ColumnSpec
from sisa.state import StageState, full_digest
from sisa.store.launch import train as train_store
from sisa.store.store import Store
from sisa.training import stage as stage_module
from sisa.training.recovery import Provenance, Recovery
from sisa.training.stage import BATCH, EPOCH, Keeping, Stopped, train_stage

RESTLESS = {"name": "mlp", "hidden": [6], "batch_norm": True, "dropout": 0.3}
PIXELS = {"pixels": ColumnSpec(type="vector", size=192)}
IMAGE = {"height": 8, "width": 8, "channels": 3}
SCHEDULE = {"name": "torch.optim.lr_scheduler.LinearLR", "total_iters": 3}
CASES = {
    "our own gradients and momentum": {"training": {"optimizer": {"name": "sgd", "lr": 0.05, "momentum": 0.9}}},
    "dropout, statistics, adam": {"model": RESTLESS, "training": {"optimizer": {"name": "adam", "lr": 0.01}}},
    "a schedule of torch": {"model": RESTLESS, "training": {"optimizer": {"name": "sgd", "lr": 0.1}, "schedule": SCHEDULE}},
    "a falling rate": {"training": {"schedule": {"name": "exponential", "gamma": 0.5}}},
    "draws from every generator": {"model": {"factory": "training_models:drawing"}},
    "images": {"model": {"name": "cnn", "channels": [4], "hidden": [], "dropout": 0.2}, "columns": PIXELS, "image": IMAGE},
}  # fmt: skip
IDENTITY = StageId(0, 1, "ab" * 32, "0" * 12)
SAID: dict[str, Any] = {"parent_key": "", "records": 18, "seconds": 1.0, "worker": "here:1", "fingerprint": {}}


@pytest.fixture(autouse=True)
def every_step(monkeypatch):
    """Look up from the work at every step."""
    monkeypatch.setattr(stage_module, "LOOK_UP_S", 0.0)


def train_one(ours, columns, *, parent=None, amid=None, keep=None):
    return train_stage(
        recipe=ours,
        class_count=3,
        shard=0,
        stage=2,
        epochs=3,
        parent=parent or StageState(),
        columns=columns,
        keys=KEYS,
        should_stop=lambda: False,
        on_progress=lambda _: None,
        amid=amid,
        keeping=keep and Keeping(every_s=0.0, keep=keep, unfit=lambda: pytest.fail("unfit")),
    )


@pytest.mark.parametrize("case", CASES)
def test_a_stage_goes_on_from_any_step_to_the_same_bits(case, tmp_path):
    """Through the disk: what is read back is what goes on."""
    ours = recipe(**CASES[case])
    columns = images([9, 9], size=192) if "images" in case else numbers([9, 9])
    parent = stage(ours, columns.through(1))
    straight = full_digest(train_one(ours, columns, parent=parent))
    snapshots = CheckpointStore(tmp_path).snapshots
    kept: list[SnapshotId] = []

    def keep(amid, step):
        target = SnapshotId(replace(IDENTITY, stage=step + 1), step)  # a name of its own, so that all of them stay
        snapshots.write(target, amid, **SAID)
        kept.append(target)

    assert full_digest(train_one(ours, columns, parent=parent, keep=keep)) == straight
    assert [found.step for found in kept] == list(range(1, 15))  # not after the last of 3 x 5 steps
    for number, found in enumerate(kept):
        amid = snapshots.load(found)[1]
        assert (amid.scalars[EPOCH], amid.scalars[BATCH]) == (number // 5, number % 5 + 1)
        np.random.seed(number)  # noqa: NPY002 - whatever was drawn meanwhile
        assert full_digest(train_one(ours, columns, parent=parent, amid=amid)) == straight


@pytest.mark.parametrize("lost", ["rng.torch", "rng.numpy", "rng.python"])
def test_every_generator_counts(lost):
    """The test above can fail: with a generator elsewhere the bits are others."""
    ours = recipe(model={"factory": "training_models:drawing"})
    columns = numbers([18])
    kept: list[StageState] = []
    straight = full_digest(train_one(ours, columns, keep=lambda amid, _: kept.append(_copy(amid))))
    amid, later = kept[6], kept[8]
    amid.tensors[lost] = later.tensors[lost]
    if lost in amid.scalars:
        amid.scalars[lost] = later.scalars[lost]
    assert full_digest(train_one(ours, columns, amid=amid)) != straight


def _copy(state):
    return StageState({name: array.copy() for name, array in state.tensors.items()}, dict(state.scalars))


# --- on disk ----------------------------------------------------------------------------------------


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """A store of checkpoints with one snapshot."""
    monkeypatch.setattr(stage_module, "LOOK_UP_S", 0.0)
    store = CheckpointStore(tmp_path / "checkpoints")
    train_one(recipe(), numbers([18]), keep=lambda amid, step: store.snapshots.write(SnapshotId(IDENTITY, step), amid, **SAID))  # fmt: skip
    return store


def test_the_newest_snapshot_alone_stays(kept):
    (found,) = kept.snapshots.list_shard(0)
    assert found == SnapshotId(IDENTITY, 14)
    assert found.folder == f"shard-0000/snapshot-01-{IDENTITY.key}.{IDENTITY.platform}-000000000014"
    assert kept.snapshots.load(found)[0].steps == 14


def test_a_snapshot_is_no_stage_whatever_it_is_called(kept):
    (found,) = kept.snapshots.list_shard(0)
    assert kept.list_shard(0) == []
    assert not kept.exists(IDENTITY)
    os.rename(kept.root / found.folder, kept.path(IDENTITY))
    with pytest.raises(DamagedError, match="format snapshot-1, expected 1"):
        kept.load(IDENTITY)


def test_no_byte_of_a_snapshot_changes_unseen(kept):
    (found,) = kept.snapshots.list_shard(0)
    for path in sorted(path for path in (kept.root / found.folder).rglob("*") if path.is_file()):
        whole = path.read_bytes()
        for place in range(0, len(whole), max(1, len(whole) // 40)):
            path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
            if path.name != "zarr.json" or path.read_bytes().split() != whole.split():
                with pytest.raises(DamagedError):
                    kept.snapshots.load(found)
        path.write_bytes(whole)
    assert kept.snapshots.load(found)


@pytest.mark.parametrize(
    "name",
    ["snapshot-01", f"snapshot-01-{'ab' * 32}.{'0' * 12}", f"snapshot-1-{'ab' * 32}.{'0' * 12}-000000000001", f"snapshot-01-{'ab' * 32}.{'0' * 12}-1", f"stage-01-{'ab' * 32}.{'0' * 12}-000000000001"],
)  # fmt: skip
def test_what_is_not_called_as_a_snapshot_is_none(name):
    assert parse_snapshot(0, name) is None


def test_a_sweep_takes_snapshots_unless_it_is_told_otherwise(kept):
    kept.sweep(0, keep=lambda _: True, keep_snapshot=lambda found: found.stage_id == IDENTITY)
    assert kept.snapshots.list_shard(0)
    kept.sweep(0, keep=lambda _: True)
    assert not kept.snapshots.list_shard(0)
    assert kept.strays() == []


# --- whole stores -----------------------------------------------------------------------------------

TABLE = kit.people(24)


class Counting(Silent):
    """Counts record-epochs: worked off, and found to be done already; keeps what is said."""

    def __init__(self) -> None:
        self.worked, self.found_before, self.notes = 0, 0, []
        self._what = ""

    def begin(self, what: str, total: int | None) -> None:
        del total
        self._what = what

    def advance(self, amount: int) -> None:
        if self._what == "training":
            self.worked += amount

    def found(self, amount: int) -> None:
        self.found_before += amount

    def note(self, text: str) -> None:
        self.notes.append(text)


class World:
    """A recipe whose stages are long enough for many snapshots, and the store that nobody disturbed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.recipe = kit.make_recipe(folder, TABLE, epochs=6)
        self.recipe["workers"] = {"snapshot_every_s": 0.0}
        self.counted = Counting()
        store = train_store({**self.recipe, "workers": {"snapshot_every_s": None}}, store=folder / "straight", executor="inline", reporter=self.counted)  # fmt: skip
        self.people = kit.places(store, TABLE)
        self.straight = kit.end_state(store)
        self.straight["files"] -= {"recipe.yaml"}
        store.close()

    def leaver(self, shard: int, slice_: int) -> str:
        return next(person for person, place in self.people.items() if place == (shard, slice_))


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with kit.fast_folder() as folder:
        yield World(folder)


@pytest.fixture(autouse=True)
def _nobody_left() -> Iterator[None]:
    yield
    kit.Child.kill_all()


def train(asked: dict[str, Any], root: Path, reporter: Any = None) -> Store:
    stage_module.LOOK_UP_S = 0.0
    return train_store(asked, store=root, executor="inline", reporter=reporter)


def train_in_child(asked: dict[str, Any], root: Path) -> None:
    train(asked, root)


def repair_in_child(root: Path) -> None:
    stage_module.LOOK_UP_S = 0.0
    kit.reopened(root).repair(executor="inline")


def snapshots_of(root: Path) -> list[Path]:
    return sorted(root.glob("checkpoints/shard-*/snapshot-*"))


def killed_amid(world: World, name: str, *, shard: int, stage_number: int, after: int = 3) -> Path:
    """A store whose training was killed by SIGKILL in the middle of a stage, some snapshots after its begin."""
    root = world.folder / name
    names = kit.operations(train_in_child, world.recipe, world.folder / f"{name}-whole", root=world.folder / f"{name}-whole")  # fmt: skip
    shutil.rmtree(world.folder / f"{name}-whole")
    order = [row for row in _stage_order(names) if row[0] == "snapshot"]
    # A snapshot is renamed into place, then its older one is removed; stages come in between, shard by shard.
    wanted = [number for what, place, number in order if place == _place(world, shard, stage_number)]
    assert len(wanted) > after
    kit.killed_before(train_in_child, world.recipe, root, root=root, stop_at=wanted[after] + 1)
    return root


def _place(world: World, shard: int, stage_number: int) -> int:
    """Which of all stages it is, in the order in which one process trains them."""
    sizes = {s: sum(c["records"] for c in world.straight["constituents"] if c["shard"] == s) for s in (0, 1)}
    first = max(sizes, key=lambda s: (sizes[s], -s))
    return (0 if shard == first else 2) + stage_number - 1


def _stage_order(names: list[str]) -> Iterator[tuple[str, int, int]]:
    """(what, which stage, number of the operation) of each rename into place."""
    entered = 0
    for number, name in enumerate(names):
        if name == "rename in checkpoints.stage.publish":
            yield "snapshot", entered, number
        if name == "COMMIT in ledger.stages.enter_all":
            entered += 1


def same_as_straight(store: Store, world: World) -> None:
    found = kit.end_state(store)
    found["files"] -= {"recipe.yaml"}
    assert found == world.straight
    assert not snapshots_of(store.opened.layout.root)
    assert not list(store.opened.layout.root.rglob("tmp-*"))


def test_a_training_with_snapshots_gives_the_same_and_leaves_none(world):
    counted = Counting()
    store = train(world.recipe, world.folder / "kept", counted)
    same_as_straight(store, world)
    assert (counted.worked, counted.found_before) == (world.counted.worked, 0)
    assert store.verify(replay="all", executor="inline").problems == []


@pytest.mark.parametrize(("shard", "stage_number"), [(0, 1), (0, 2), (1, 2)])
def test_killed_in_mid_stage_the_work_before_the_snapshot_is_not_repeated(world, shard, stage_number):
    root = killed_amid(world, f"killed-{shard}-{stage_number}", shard=shard, stage_number=stage_number)
    assert snapshots_of(root)
    counted = Counting()
    store = train(world.recipe, root, counted)
    same_as_straight(store, world)
    assert any(
        f"stage {stage_number} of shard {shard} goes on from a recovery snapshot" in note for note in counted.notes
    )
    assert counted.found_before > 0
    if stage_number == 1:  # killed in the very first stage: all of the work is planned again, and some of it found
        assert counted.worked + counted.found_before == world.counted.worked
    assert counted.worked < world.counted.worked
    events = [e for e in store.opened.ledger.events() if e["kind"] == "stage_trained"]
    assert sorted((e["shard"], e["stage"]) for e in events) == [(0, 1), (0, 2), (1, 1), (1, 2)]
    assert store.verify(replay="all", executor="inline").problems == []


@pytest.mark.parametrize("most", [5, pytest.param(10_000, marks=pytest.mark.slow)])
def test_killed_at_steps_around_snapshots_ends_the_same(world, most):
    names = kit.operations(train_in_child, world.recipe, world.folder / f"p{most}", root=world.folder / f"p{most}")
    around = [n for n, name in enumerate(names) if name.split(" in ")[1].startswith(("checkpoints", "ledger.stages"))]
    for number in around[3 :: max(1, len(around) // most)]:
        root = world.folder / f"point-{number}"
        kit.killed_before(train_in_child, world.recipe, root, root=root, stop_at=number)
        same_as_straight(train(world.recipe, root), world)
        shutil.rmtree(root)


def test_a_damaged_snapshot_is_discarded_with_a_word_and_the_stage_starts_from_its_parent(world):
    root = killed_amid(world, "damaged", shard=0, stage_number=2)
    for chunk in root.glob("checkpoints/shard-*/snapshot-*/state/c.0"):
        content = bytearray(chunk.read_bytes())
        content[7] ^= 1
        chunk.write_bytes(bytes(content))
    counted = Counting()
    store = train(world.recipe, root, counted)
    assert "a recovery snapshot of stage 2 of shard 0 is damaged: it is discarded" in counted.notes
    assert not any("goes on" in note for note in counted.notes)
    same_as_straight(store, world)


def test_verify_lists_a_snapshot_that_lies_there(world):
    root = killed_amid(world, "listed", shard=0, stage_number=2)
    store = kit.reopened(root)
    problems = store.verify(replay="none", executor="inline").problems
    (named,) = {path.relative_to(root) for path in snapshots_of(root)[-1:]}
    assert any(p.startswith(f"{named}: a recovery snapshot of a training that was killed") for p in problems)
    store.repair(executor="inline")
    assert store.verify(replay="none", executor="inline").problems == []
    same_as_straight(store, world)


# --- and deletions ----------------------------------------------------------------------------------


def pieces(folders: list[Path], *, size: int = 48) -> set[bytes]:
    """Stretches of the tensors that lie in snapshots: weights and moments of somebody."""
    found: set[bytes] = set()
    for folder in folders:
        content = (folder / "state" / "c.0").read_bytes()
        found |= {content[at : at + size] for at in range(0, len(content) - size, 64) if len(set(content[at : at + size])) > 20}  # fmt: skip
    return found


def holding(root: Path, wanted: set[bytes]) -> list[str]:
    """Files that hold any of them."""
    files = [path for path in root.rglob("*") if path.is_file()]
    return [str(path.relative_to(root)) for path in files if any(piece in path.read_bytes() for piece in wanted)]


@pytest.mark.parametrize("slice_", [1, 2])
def test_a_deletion_takes_the_snapshots_of_its_shard_that_a_killed_worker_left(world, slice_):
    root = killed_amid(world, f"tainted-{slice_}", shard=0, stage_number=2)
    left = snapshots_of(root)
    # Scalers of the first slice are in every stage and every snapshot: where that slice stays, they stay too.
    wanted = pieces(left) - (pieces(list(root.glob("checkpoints/shard-0000/stage-01-*"))) if slice_ == 2 else set())
    assert wanted
    assert len(holding(root, wanted)) >= 1
    saved = kit.copy_store(root, world.folder / f"saved-{slice_}")
    store = kit.reopened(root)
    person = world.leaver(0, slice_)
    done = store.delete(subjects=[person], defer=True)
    assert done.state == "stages_purged"
    assert not snapshots_of(root)
    assert holding(root, wanted) == []
    check_repaired_like_new(world, store, root, [person], saved)


def check_repaired_like_new(world: World, store: Store, root: Path, leavers: list[str], saved: Path) -> None:
    """Even if a snapshot from before the deletion comes back, with a backup, no stage goes on from it."""
    for folder in snapshots_of(saved):
        shutil.copytree(folder, root / folder.relative_to(saved))
    assert snapshots_of(root)
    store.close()
    counted = Counting()
    store = train(world.recipe, root, counted)
    assert not any("goes on from" in note for note in counted.notes)
    assert not snapshots_of(root)
    fresh = world.folder / f"fresh-{root.name}"
    new = train(world.recipe, fresh)
    new.delete(subjects=leavers, executor="inline")
    assert kit.end_state(store)["stages"] == kit.end_state(new)["stages"]
    assert store.verify(replay="all", executor="inline").problems == []


@pytest.mark.parametrize("where", ["checkpoints.store.sweep", "checkpoints.snapshots.remove"])
def test_a_deletion_that_is_killed_while_it_takes_snapshots_goes_on(world, where):
    root = killed_amid(world, f"twice-{where}", shard=0, stage_number=2)
    wanted = pieces(snapshots_of(root))
    person = world.leaver(0, 1)
    names = kit.operations(delete_in_child, kit.copy_store(root, world.folder / f"c-{where}"), person, root=world.folder / f"c-{where}")  # fmt: skip
    number = next(n for n, name in enumerate(names) if name.endswith("checkpoints.snapshots.remove"))
    kit.killed_before(delete_in_child, root, person, root=root, stop_at=number + (where != "checkpoints.store.sweep"))
    store = kit.reopened(root)
    assert store.opened.ledger.requests.all()[0].state == "rows_erased"
    store.repair(executor="inline")
    assert holding(root, wanted) == []
    assert store.verify(replay="all", executor="inline").problems == []


def delete_in_child(root: Path, person: str) -> None:
    kit.reopened(root).delete(subjects=[person], defer=True)


def delete_watched(root: Path, person: str, names: list[str]) -> list[str]:
    """Delete, and return which of these snapshots were there when the request became ``stages_purged``."""
    seen: list[str] = []
    real = Requests.advance

    def advance(self: Requests, request: str, state: str, **said: Any) -> Any:
        if state == "stages_purged":
            seen.extend(path.name for path in snapshots_of(root) if path.name in names)
        return real(self, request, state, **said)

    with mock.patch.object(Requests, "advance", advance):
        kit.reopened(root).delete(subjects=[person], defer=True)
    return seen


def test_a_deletion_in_mid_stage_leaves_no_snapshot(world, monkeypatch):
    """The stop mark is seen before the next snapshot would be kept; what was kept before goes with the purge."""
    root = world.folder / "amid"
    from sisa.checkpoints.snapshots import Snapshots

    real, wanted, states = Snapshots.write, set(), []

    def write(self, snapshot_id, state, **said):
        real(self, snapshot_id, state, **said)
        if not states and snapshot_id.stage_id.stage == 2 and snapshot_id.step == 5:
            wanted.update(pieces(snapshots_of(root)))
            shard = snapshot_id.stage_id.shard
            names = [path.name for path in snapshots_of(root)]
            other = kit.Child(delete_watched, root, world.leaver(shard, 1), names)
            while not list((root / "locks").glob(f"stop-{shard:04d}/*")):  # accepted, and the training is told
                assert not other.heard()
            states.append(other)

    monkeypatch.setattr(Snapshots, "write", write)
    store = train(world.recipe, root)
    assert states
    assert states[0].result() == []
    assert wanted
    assert holding(root, wanted) == []
    assert not snapshots_of(root)
    assert store.verify(replay="all", executor="inline").problems == []


# --- when it can't be kept, or shan't ---------------------------------------------------------------


def test_a_full_disk_costs_the_snapshot_and_not_the_training(world, monkeypatch):
    from sisa.checkpoints import snapshots as module

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "write_stage", full)
    counted = Counting()
    store = train(world.recipe, world.folder / "full", counted)
    same_as_straight(store, world)
    said = [note for note in counted.notes if "can't be written: No space left on device" in note]
    assert len(said) == 4  # once a stage


def test_a_snapshot_that_holds_what_cant_be_kept_is_refused(tmp_path):
    with pytest.raises(StoreError, match="expected a tensor called"):
        CheckpointStore(tmp_path).snapshots.write(SnapshotId(IDENTITY, 1), StageState({"x": np.zeros(1)}), **SAID)


def test_none_are_kept_where_none_are_wanted_and_never_in_a_replay(world, monkeypatch):
    from sisa.checkpoints.snapshots import Snapshots

    def unwanted(*_, **__):
        raise AssertionError("kept")

    monkeypatch.setattr(Snapshots, "write", unwanted)
    store = train({**world.recipe, "workers": {"snapshot_every_s": None}}, world.folder / "none")
    same_as_straight(store, world)
    monkeypatch.undo()
    monkeypatch.setattr(stage_module, "LOOK_UP_S", 0.0)
    store = train(world.recipe, world.folder / "wanted")
    monkeypatch.setattr(Snapshots, "write", unwanted)
    assert store.opened.recipe.workers.snapshot_every_s == 0.0
    found = store.verify(replay="all", executor="inline")
    assert (found.problems, found.stages_replayed) == ([], 4)


def test_a_stop_that_comes_after_the_look_up_keeps_no_snapshot(tmp_path):
    """To find out whether the state says all takes a while; and a lock may be lost that very moment."""
    snapshots = CheckpointStore(tmp_path).snapshots
    said = Provenance(parent_key="", records=18, worker="here:1", fingerprint={})
    keeping = Recovery(snapshots, IDENTITY, lambda _: None).keeping(0.0, said, stopped=lambda: True)
    with pytest.raises(Stopped):
        keeping.keep(StageState(), 1)
    assert snapshots.list_shard(0) == []


COUNTING = """
import torch

class Counting(torch.nn.Module):
    def __init__(self, features, classes):
        super().__init__()
        self.linear = torch.nn.Linear(features, classes)
        self.calls = 0

    def forward(self, rows):
        print("a row:", rows[:1])
        self.calls += self.training
        return self.linear(rows) * (2.0 if self.calls > 40 else 1.0)

def make(feature_shape, classes):
    return Counting(feature_shape[0], classes)
"""


def test_a_model_that_counts_on_its_own_has_no_snapshots(tmp_path, monkeypatch, capfd):
    """Its count is in no state: what went on from the middle would count from nothing, to other bits."""
    (tmp_path / "counting_model.py").write_text(COUNTING)
    monkeypatch.syspath_prepend(str(tmp_path))
    asked = kit.make_recipe(tmp_path, TABLE, epochs=60)
    asked["model"] = {"factory": "counting_model:make"}
    asked["workers"] = {"snapshot_every_s": 0}
    counted = Counting()
    store = train(asked, tmp_path / "store", counted)
    said = [note for note in counted.notes if "the model keeps more than its state" in note]
    assert 1 <= len(said) <= 4
    assert snapshots_of(tmp_path / "store") == []
    assert store.verify(replay="all", executor="inline").problems == []
    assert "a row:" not in capfd.readouterr().out  # nor is what it prints anywhere
