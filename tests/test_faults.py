"""A fault at each call to the medium in turn: done rightly or refused; run again without it, the same end to the bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pytest
from fault_kit import Counted, FolderFault, RequestFault, filled, small_disk
from fault_worlds import PEOPLE, BucketWorld, FolderWorld, World, person_in_the_middle, records_of
from s3_kit import S3Server

REFUSED = (2, 3)
"""Exit codes of our errors; what nobody expected is another."""
FOLDER = ("before", "after", "torn", "full", "stale")
BUCKET = ("before", "after", "lost", "cut", "slow", "dead", "parts", "stale")

Fault = Callable[[str, Counted], AbstractContextManager[Counted]]


@dataclass
class Scene:
    """A store, whom to delete from it, and how both commands end when nothing goes wrong."""

    world: World
    person: str
    ends: dict[str, dict[str, Any]]
    """How the store is after each command, when nothing goes wrong."""
    fault: Fault

    def begin(self, verb: str) -> None:
        self.world.begin_anew() if verb == "train" else self.world.restore()

    def run(self, verb: str) -> tuple[int, dict[str, Any]]:
        if verb in {"train", "add"}:
            return self.world.train() if verb == "train" else self.world.add()
        return self.world.delete(self.person) if verb == "delete" else self.world.correct(records_of(self.person))

    @property
    def superseded(self) -> list[str]:
        """What the corrected rows said."""
        theirs = PEOPLE.filter(pa.array([p == self.person for p in PEOPLE["person"].to_pylist()]))
        return [repr(value) for value in theirs["x"].to_pylist()]

    def check_erased(self, verb: str) -> None:
        """Nothing of what a command takes out of the store is in any of its bytes."""
        if verb == "delete":
            assert self.world.holding(self.person, *records_of(self.person)) == []
        if verb == "correct":
            assert self.world.holding(*self.superseded) == []

    def calls(self, verb: str, kind: str) -> int:
        """How many calls such a fault can strike in a run of the command."""
        self.begin(verb)
        with self.fault(kind, Counted()) as counted:
            assert self.run(verb)[0] == 0
        return counted.calls

    def check(self, verb: str, kind: str, where: int | str) -> str:
        """Strike one call, given by its number or its name; return what was struck, and what the command said."""
        self.begin(verb)
        with self.fault(kind, Counted(where, lasting=kind in {"dead", "full", "parts"})) as counted:
            code, answer = self.run(verb)
        told = f"{kind} {where}: {counted.struck[:1]} -> {code} {answer.get('error', answer.get('state', ''))}"
        assert counted.struck or not counted.calls, f"{kind} {where}: of {counted.calls} calls none was struck"
        try:
            self.check_answer(verb, code, answer)
            self.check_resumed(verb)
        except Exception as error:
            raise AssertionError(f"{told}: {type(error).__name__} {error}") from error
        return told

    def check_answer(self, verb: str, code: int, answer: dict[str, Any]) -> None:
        """A success is one; a refusal is one of our errors and says what to do."""
        if code in REFUSED:
            assert answer["error"]["message"]
            assert answer["error"]["hint"]
            return
        assert code == 0
        if verb in {"train", "add"} or answer["state"] == "repaired":
            assert differences(self.world.state(), self.ends[verb]) == []
        else:
            assert answer["state"] in {"stages_purged", "repairing"}
        self.check_erased(verb)

    def check_resumed(self, verb: str) -> None:
        """The same command again, and what a repair still finds to do."""
        code, answer = self.run(verb)
        assert code == 0, answer
        assert self.world.repair()[0] == 0
        assert differences(self.world.state(), self.ends[verb]) == []
        assert self.world.problems() == []
        self.check_erased(verb)


def differences(found: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    """What is not the same, in a few words."""
    told = []
    for part, value in expected.items():
        if found[part] == value:
            continue
        if part == "keys":
            told.append(f"keys: {sorted(set(found[part]) ^ set(value))}")
        elif part == "bits":
            told.append(f"bits: {[key for key in value if found[part].get(key) != value[key]]}")
        else:
            told.append(f"{part}: {found[part]} instead of {value}")
    return told


def scene_of(world: World, fault: Fault) -> Scene:
    assert world.train()[0] == 0
    store = world.opened()
    person = person_in_the_middle(store)
    store.close()
    world.keep()
    scene = Scene(world, person, {"train": world.state()}, fault)
    for verb in ("delete", "add", "correct"):
        scene.begin(verb)
        code, answer = scene.run(verb)
        assert (code, answer.get("state", "repaired")) == (0, "repaired")
        scene.ends[verb] = world.state()
    return scene


@pytest.fixture(scope="module")
def folder_scene(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    world = FolderWorld(tmp_path_factory.mktemp("folder"))
    return scene_of(world, lambda kind, counted: FolderFault(kind, world.root, counted).here())


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    with S3Server().running() as running:
        yield running


@pytest.fixture(scope="module")
def bucket_scene(tmp_path_factory: pytest.TempPathFactory, server: S3Server) -> Scene:
    world = BucketWorld(tmp_path_factory.mktemp("bucket"), server, versioned=True)
    return scene_of(world, lambda kind, counted: RequestFault(kind, server, world.bucket, counted).here())


def strike_all(scene: Scene, verb: str, kind: str) -> None:
    """Strike every call in turn, and say which went wrong."""
    calls = scene.calls(verb, kind)
    assert calls
    failed = []
    for number in range(calls):
        try:
            scene.check(verb, kind, number)
        except AssertionError as error:
            failed.append(str(error))
    assert not failed, "\n".join(failed)


@pytest.mark.parametrize(
    ("verb", "kind", "where"),
    [
        ("delete", "before", "replace /records"),  # the rows with the person are still there
        ("delete", "after", "replace /records"),  # they are gone, and we don't know it
        ("delete", "torn", "fsync /records"),
        ("delete", "before", "rename /checkpoints"),  # the first stage that saw them
        ("delete", "after", "rename /checkpoints"),
        ("delete", "before", "unlink /checkpoints"),  # half of it is removed
        ("delete", "torn", "/state/c.0"),
        ("delete", "full", "/records"),
        ("delete", "stale", "/checkpoints"),
        ("train", "before", "fsync /tmp-records"),
        ("train", "after", "rename /tmp-records"),
        ("train", "after", "rename /checkpoints"),
        ("train", "torn", "/state/c.0"),
        ("train", "full", "mkdir /checkpoints"),
        ("train", "stale", "/checkpoints"),
        ("add", "after", "replace /records"),
        ("add", "torn", "fsync /records"),
        ("correct", "before", "replace /corrections"),
        ("correct", "after", "replace /records"),
    ],
)
def test_a_fault_of_a_disk_is_refused_or_harmless(folder_scene: Scene, verb: str, kind: str, where: str) -> None:
    folder_scene.check(verb, kind, where)


@pytest.mark.slow
@pytest.mark.parametrize("kind", FOLDER)
@pytest.mark.parametrize("verb", ["train", "delete", "add", "correct"])
def test_a_fault_at_any_call_of_a_disk_is_refused_or_harmless(folder_scene: Scene, verb: str, kind: str) -> None:
    strike_all(folder_scene, verb, kind)


@pytest.mark.parametrize(
    ("verb", "kind", "where"),
    [
        ("delete", "before", "part-00000.parquet?"),
        ("delete", "after", "PUT"),  # the rows without the person are there, and we don't know it
        ("delete", "lost", "PUT"),
        ("delete", "cut", "?delete"),
        ("delete", "slow", "PUT"),
        ("delete", "dead", "?delete"),  # the rows were replaced, their older version wasn't erased
        ("delete", "parts", "partNumber=2"),
        ("delete", "stale", "part-00000.parquet"),  # it should tell which version was replaced
        ("train", "after", "/records/"),
        ("train", "lost", "/state/c.0"),
        ("train", "parts", "partNumber=2"),
        ("train", "stale", "zarr.json"),
        ("add", "after", "PUT"),  # the mark is there, and we don't know it
        ("add", "lost", "/slice=03/"),
        ("add", "dead", "/slice=03/"),  # what it wrote stays, and its mark
        ("add", "stale", "slice%3D03"),
        ("correct", "after", "/corrections/"),
        ("correct", "dead", "/corrections/"),
        ("correct", "parts", "partNumber=2"),
        ("correct", "stale", "corrections%2F"),
    ],
)
def test_a_fault_of_a_bucket_is_refused_or_harmless(bucket_scene: Scene, verb: str, kind: str, where: str) -> None:
    bucket_scene.check(verb, kind, where)


@pytest.mark.slow
@pytest.mark.parametrize("kind", BUCKET)
@pytest.mark.parametrize("verb", ["train", "delete", "add", "correct"])
def test_a_fault_at_any_request_to_a_bucket_is_refused_or_harmless(bucket_scene: Scene, verb: str, kind: str) -> None:
    strike_all(bucket_scene, verb, kind)


# --- a disk that is full indeed ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def small_scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    """A store on a disk of 4 MiB, which a fault fills but for so many pages."""
    folder = tmp_path_factory.mktemp("small")
    disk = folder / "disk"
    with small_disk(disk, mib=4) as why_not:
        if why_not:
            pytest.skip(why_not)
        world = FolderWorld(folder, store=disk / "store")
        yield scene_of(world, lambda pages, counted: filled(disk, counted, but_bytes=int(pages) * 4096))


@pytest.mark.parametrize("pages", [0, 5, 12, 24, *(pytest.param(n, marks=pytest.mark.slow) for n in range(1, 120))])
@pytest.mark.parametrize("verb", ["train", "delete"])
def test_a_full_disk_is_refused_and_room_heals_it(small_scene: Scene, verb: str, pages: int) -> None:
    told = small_scene.check(verb, str(pages), 0)
    assert pages or "-> 3" in told or "-> 2" in told, "the test must be able to fail"
