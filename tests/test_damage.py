"""Full disks, leftovers of every kind, restored backups, strangers' files: told, healed or harmless, never silent."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import crash_kit as kit
import pyarrow.parquet as papq
import pytest

from sisa.cli.main import run
from sisa.errors import BusyError, DamagedError, StoreError
from sisa.files import FileLock
from sisa.ledger import STATES

TABLE = kit.people(12)
PROBE = TABLE.select(["x", "z"])


@dataclass(frozen=True)
class World:
    """A trained store to copy, its recipe, and who is where in it."""

    folder: Path
    recipe: dict[str, Any]
    template: Path
    people: dict[tuple[int, int], list[str]]

    def copy(self, target: Path) -> Path:
        return kit.copy_store(self.template, target)


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


@pytest.fixture
def folder() -> Iterator[Path]:
    with kit.fast_folder() as folder:
        yield folder


@pytest.fixture(autouse=True)
def _nobody_left() -> Iterator[None]:
    yield
    kit.Child.kill_all()


def delete(root: Path, *subjects: str) -> None:
    store = kit.reopened(root)
    store.delete(subjects=list(subjects), executor="inline")
    store.close()


def problems(root: Path, **options: Any) -> list[str]:
    store = kit.reopened(root)
    found = store.verify(executor="inline", **options).problems
    store.close()
    return found


def repair(root: Path) -> None:
    store = kit.reopened(root)
    store.repair(executor="inline")
    store.close()


# --- full disks -------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(folder: Path) -> Iterator[Path]:
    """A file system of two megabytes."""
    disk = folder / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "sisa-test", str(disk)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("no permission to mount a small file system; the tests with a limit on files stand in")
    try:
        yield disk
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def fill(disk: Path, *, but: int) -> Path:
    """Use up all of a disk but some bytes."""
    filler = disk / "filler"
    filler.write_bytes(b"")
    free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
    filler.write_bytes(bytes(max(0, free - but)))
    return filler


def test_a_deletion_on_a_full_disk_is_told_and_goes_on(
    world: World, small_disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    person = world.people[1, 1][0]
    other = world.copy(world.folder / "undisturbed")
    delete(other, person)
    expected = kit.end_state(kit.reopened(other))
    root = world.copy(small_disk / "store")
    states: list[str] = []
    for room in range(0, 200_000, 12_288):
        filler = fill(small_disk, but=room)
        code = run(["delete", "--store", str(root), "--subject", person, "--executor", "inline", "--json"])
        answer = json.loads(capsys.readouterr().out)
        filler.unlink()
        assert code in {0, 3}
        assert code == 0 or "room" in answer["error"]["hint"] or "space" in answer["error"]["hint"], answer
        requests = kit.reopened(root).opened.ledger.requests.all()
        states.append(requests[0].state if requests else "")
        if code == 0:
            break
    assert states[0] == ""  # nothing was accepted that could not be remembered
    assert states[-1] == "repaired"
    assert kit.end_state(kit.reopened(root)) == expected
    assert problems(root, replay="all") == []


@pytest.mark.parametrize("room", [0, 40_000, 120_000])
def test_a_training_on_a_full_disk_is_told_and_goes_on(
    world: World, small_disk: Path, room: int, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = small_disk.parent / "recipe.json"  # JSON is YAML
    recipe.write_text(json.dumps(world.recipe))
    filler = fill(small_disk, but=room)
    words = ["train", str(recipe), "--store", str(small_disk / "store"), "--executor", "inline", "--json"]
    assert run(words) == 3
    assert "error" in json.loads(capsys.readouterr().out)
    filler.unlink()
    assert run(words) == 0
    assert kit.end_state(kit.reopened(small_disk / "store")) == kit.end_state(kit.reopened(world.template))
    assert problems(small_disk / "store", replay="all") == []


def test_a_prediction_on_a_full_disk_leaves_no_half_of_a_table(
    world: World, small_disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fill(small_disk, but=0)
    output = small_disk / "answers.parquet"
    words = ["predict", "--store", str(world.template), str(world.folder / "probe.parquet"), "--output", str(output)]
    assert run([*words, "--json"]) in {2, 3}
    assert "error" in json.loads(capsys.readouterr().out)
    assert [path.name for path in small_disk.iterdir()] == ["filler"]


def limited(limit_bytes: int, function: Callable[..., Any], *arguments: Any) -> str:
    """Run it where no file may grow beyond a size; return the exit code and the error it would end with."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, limit_bytes))
    try:
        function(*arguments)
    except (StoreError, OSError) as error:
        return type(error).__name__
    return ""


@pytest.mark.parametrize("limit_bytes", [0, 1_000, 3_000])
def test_a_deletion_that_may_not_write_goes_on_when_it_may(world: World, folder: Path, limit_bytes: int) -> None:
    person = world.people[1, 1][0]
    root = world.copy(folder / "store")
    assert kit.Child(limited, limit_bytes, delete, root, person).result() in {"StoreError", "OSError"}
    if kit.reopened(root).opened.ledger.requests.all():
        repair(root)
    else:
        delete(root, person)
    assert [r.state for r in kit.reopened(root).opened.ledger.requests.all()] == ["repaired"]
    assert problems(root, replay="all") == []


def test_a_lock_is_not_lost_to_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    for _ in range(2):  # if the first were never let go, the second would wait for ever
        with FileLock(tmp_path / "some.lock").held(timeout_s=0), pytest.raises(BusyError):
            FileLock(tmp_path / "some.lock").acquire(timeout_s=0)


def test_a_lock_whose_wait_is_broken_off_is_not_kept(tmp_path: Path) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    descriptors = Path("/proc/self/fd")
    before = len(list(descriptors.iterdir()))
    with FileLock(tmp_path / "some.lock").held(), pytest.raises(KeyboardInterrupt):
        FileLock(tmp_path / "some.lock").acquire(poll=interrupt)
    assert len(list(descriptors.iterdir())) == before


# --- leftovers --------------------------------------------------------------------------------------


def put_file(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"rows and weights")


def put_folder(path: Path) -> None:
    put_file(path / "inside" / "c.0")


SWEPT = [
    ("tmp-0123456789abcdef", put_file),  # a recipe that was being written
    ("tmp-0123456789abcdef", put_folder),  # a replay that was being removed
    ("tmp-records", put_folder),  # an ingest
    ("scratch/0123", put_folder),  # a replay
    ("checkpoints/shard-0001/tmp-0123456789abcdef", put_folder),  # a stage that was being written, or removed
    ("checkpoints/shard-0001/tmp-0123456789abcdef", put_file),  # a group's metadata
    ("locks/stop-0001/del-0123456789abcdef", put_file),  # a deletion's stop mark
    ("locks/stop-0001/tmp-0123456789abcdef", put_file),
    (f"checkpoints/shard-0001/stage-01-{'ab' * 32}.PLATFORM", put_folder),  # a stage that nobody entered
]
TOLD = [
    ("records/shard=0001/slice=01/tmp-0123456789abcdef", put_file),
    ("records/somebody.parquet", put_file),
    ("records/shard=0001/slice=01/part-00001.parquet", put_file),
    ("checkpoints/shard-0001/unknown", put_file),
    ("checkpoints/tmp-0123456789abcdef", put_folder),
    ("keys/tmp-0123456789abcdef", put_file),
    ("locks/tmp-0123456789abcdef", put_file),
    ("notes.txt", put_file),
    ("backup", put_folder),
]


@pytest.mark.parametrize(("name", "put"), SWEPT)
def test_what_a_killed_command_left_is_told_and_then_swept(
    world: World, folder: Path, name: str, put: Callable[[Path], None]
) -> None:
    root = world.copy(folder / "store")
    platform = next((root / "checkpoints" / "shard-0001").glob("stage-01-*")).suffix
    path = root / name.replace(".PLATFORM", platform)
    put(path)
    assert any(name.split(".PLATFORM", maxsplit=1)[0] in problem for problem in problems(root))
    repair(root)
    assert not path.exists()
    assert problems(root, replay="all") == []
    assert kit.files_of(root) == kit.files_of(world.template)


@pytest.mark.parametrize(("name", "put"), TOLD)
def test_a_strangers_file_is_told_and_left_alone(
    world: World, folder: Path, name: str, put: Callable[[Path], None]
) -> None:
    root = world.copy(folder / "store")
    put(root / name)
    delete(root, world.people[0, 1][0])
    repair(root)
    assert kit.trained(world.recipe, root).training.stages_trained == 0
    (problem,) = problems(root)
    assert name in problem
    assert (root / name).exists()


@pytest.mark.parametrize("name", ["records/shard=0001/slice=01/tmp-0123456789abcdef", "scratch/0123", "tmp-0123"])
def test_leftovers_that_may_hold_a_persons_rows_go_with_the_person(world: World, folder: Path, name: str) -> None:
    root = world.copy(folder / "store")
    put_folder(root / name)
    store = kit.reopened(root)
    store.delete(subjects=[world.people[1, 1][0]], defer=True)
    assert not (root / name).exists()
    assert store.verify().problems == []


def test_a_stop_mark_of_a_killed_deletion_stops_nobody(world: World, folder: Path) -> None:
    """The deletion was killed after its last step and before it took its mark away."""
    person = world.people[1, 1][0]
    root = world.copy(folder / "store")
    kit.killed_before(delete, root, person, root=root, stop_at="unlink in coordination.files.remove")
    assert [mark.parent.name for mark in root.glob("locks/stop-*/*")] == ["stop-0001"]
    assert kit.trained(world.recipe, root).training.stages_trained > 0
    assert not list(root.glob("locks/stop-*/*"))
    assert problems(root, replay="all") == []


# --- backups ----------------------------------------------------------------------------------------


def test_a_restored_stage_of_the_time_before_is_told_never_used_and_swept(world: World, folder: Path) -> None:
    root = world.copy(folder / "store")
    delete(root, world.people[1, 1][0])
    store = kit.reopened(root)
    before = store.predict_proba(PROBE).tobytes()
    for old in (world.template / "checkpoints" / "shard-0001").glob("stage-*"):
        shutil.copytree(old, root / "checkpoints" / "shard-0001" / old.name)
    found = problems(root)
    assert len(found) == 2
    assert all("orphan" in problem for problem in found)
    assert kit.reopened(root).predict_proba(PROBE).tobytes() == before
    assert kit.trained(world.recipe, root).training.stages_trained == 0
    repair(root)
    assert problems(root, replay="all") == []
    assert kit.reopened(root).predict_proba(PROBE).tobytes() == before


def test_restored_rows_of_the_time_before_are_told_never_trained_on_and_erased_again(
    world: World, folder: Path
) -> None:
    person = world.people[1, 1][0]
    root = world.copy(folder / "store")
    delete(root, person)
    clean = kit.end_state(kit.reopened(root))
    for slice_ in ("slice=01", "slice=02"):
        name = f"records/shard=0001/{slice_}/part-00000.parquet"
        shutil.copy(world.template / name, root / name)
    assert any("rows of deleted people" in problem for problem in problems(root))
    with pytest.raises(DamagedError):
        kit.trained(world.recipe, root)
    shutil.rmtree(next((root / "checkpoints" / "shard-0001").glob("stage-01-*")))  # even if it has to train from them
    repair(root)
    assert kit.end_state(kit.reopened(root)) == clean
    assert problems(root, replay="all") == []


def test_rows_that_nobody_deleted_and_nobody_ingested_stay_damage(world: World, folder: Path) -> None:
    root = world.copy(folder / "store")
    name = "records/shard=0001/{}/part-00000.parquet"
    shutil.copy(root / name.format("slice=02"), root / name.format("slice=01"))
    shutil.rmtree(next((root / "checkpoints" / "shard-0001").glob("stage-01-*")))
    with pytest.raises(DamagedError, match="are not those that the ledger expects"):
        repair(root)
    shutil.copy(world.template / name.format("slice=01"), root / name.format("slice=01"))
    repair(root)
    assert kit.end_state(kit.reopened(root)) == kit.end_state(kit.reopened(world.template))


def test_damaged_rows_of_a_leaver_keep_neither_their_weights_nor_other_people(world: World, folder: Path) -> None:
    """Their erasure was killed before it began, and then the file was hit."""
    early, other = world.people[1, 1][0], world.people[0, 1][0]
    root = world.copy(folder / "store")
    kit.killed_before(delete, root, early, root=root, stop_at="COMMIT in ledger.partitions.prepare_erasure")
    rows = root / "records/shard=0001/slice=01/part-00000.parquet"
    whole = rows.read_bytes()
    rows.write_bytes(whole[:40] + bytes([whole[40] ^ 255]) + whole[41:])
    store = kit.reopened(root)
    assert store.delete(subjects=[other], executor="inline").state == "repaired"
    with pytest.raises(DamagedError, match="shard 1"):
        store.repair(executor="inline")
    with pytest.raises(DamagedError):
        kit.trained(world.recipe, root)
    assert [member.stage for member in store.opened.ledger.versions.live().members] == [2, 0]
    assert not list((root / "checkpoints" / "shard-0001").glob("stage-*"))
    assert any("state accepted" in problem for problem in problems(root))
    rows.write_bytes(whole)
    repair(root)
    undisturbed = world.copy(folder / "undisturbed")
    for person in (early, other):
        delete(undisturbed, person)
    assert kit.end_state(kit.reopened(root)) == kit.end_state(kit.reopened(undisturbed))
    assert problems(root, replay="all") == []


# --- the ledger -------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.0, 0.001, 0.05, 0.5, 0.95])
def test_a_truncated_ledger_is_damage_whatever_is_asked(
    world: World, folder: Path, share: float, capsys: pytest.CaptureFixture[str]
) -> None:
    root = world.copy(folder / "store")
    (folder / "recipe.json").write_text(json.dumps(world.recipe))
    size = (root / "ledger.db").stat().st_size
    os.truncate(root / "ledger.db", int(size * share))
    before = kit.rows_on_disk(root)
    for words in (
        ["status"],
        ["verify"],
        ["repair", "--executor", "inline"],
        ["delete", "--subject", world.people[1, 1][0]],
        ["predict", str(world.folder / "probe.parquet"), "--output", str(folder / "answers.parquet")],
        ["train", str(folder / "recipe.json")],
    ):
        code = run([*words, "--store", str(root), "--json"])
        answer = json.loads(capsys.readouterr().out)
        assert code == 3 or (words[0] == "verify" and code == 1), (words, answer)
        assert code == 1 or "ledger" in answer["error"]["message"], (words, answer)
    assert kit.rows_on_disk(root) == before
    assert not (folder / "answers.parquet").exists()


def test_a_killed_commit_is_rolled_back_by_whoever_comes_next(world: World, folder: Path) -> None:
    """The journal of a commit that was begun lies beside the ledger."""
    root = world.copy(folder / "store")
    child = kit.Child(delete, root, world.people[1, 1][0], root=root, stop_at="COMMIT in ledger.requests.accept")
    assert child.hear()[0] == "stopped"
    child.kill()
    assert (root / "ledger.db-journal").exists()
    store = kit.reopened(root)
    assert store.opened.ledger.requests.all() == []
    assert store.verify().problems == []
    assert STATES[-1] == store.delete(subjects=[world.people[1, 1][0]], executor="inline").state
