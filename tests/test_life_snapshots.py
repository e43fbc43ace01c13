"""Recovery snapshots on every medium: a stage goes on from one to the same bits, and none outlives what it saw."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pyarrow as pa
import pytest
from life_kit import PEOPLE, InBucket, InFolder, Killed, Medium, state
from s3_kit import S3Server, everything

import sisa
from sisa.checkpoints import SnapshotId
from sisa.checkpoints.snapshots import Snapshots
from sisa.coordination.files import FolderLock
from sisa.errors import LostLockError, StoreError
from sisa.ledger.requests import Requests
from sisa.progress import Silent
from sisa.store.store import Store
from sisa.training import stage as stage_module


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    with S3Server().running() as running:
        yield running


@pytest.fixture(autouse=True)
def every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Look up from the work at every step."""
    monkeypatch.setattr(stage_module, "LOOK_UP_S", 0.0)


class Notes(Silent):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def pieces(contents: list[bytes], *, size: int = 48) -> set[bytes]:
    """Stretches of tensors: weights and moments of somebody."""
    found = {content[at : at + size] for content in contents for at in range(0, len(content) - size, 64)}
    return {piece for piece in found if len(set(piece)) > 20}


class Amid(Medium):
    """Inherited by each medium."""

    def recipe(self, table: pa.Table = PEOPLE, **fields: Any) -> dict[str, Any]:
        asked = super().recipe(table, **{"workers": {"snapshot_every_s": 0.0}, **fields})
        asked["training"]["epochs"] = 4
        return asked

    def elsewhere(self, table: pa.Table) -> Store:
        """Trained from nothing in a folder, without a snapshot."""
        asked = InFolder.recipe(self, table)  # type: ignore[arg-type]
        asked["training"]["epochs"] = 4
        asked["workers"] = {"snapshot_every_s": None}
        fresh = f"fresh-{len(list(self.folder.iterdir()))}"
        return sisa.train({**asked, "store": str(self.folder / fresh)}, executor="inline")

    def snapshots(self) -> list[str]:
        return [key for key in self.raw() if "/snapshot-" in key]

    def killed_amid(self, *, step: int = 4) -> list[bytes]:
        """Kill a training in the middle of a stage, right after a snapshot; return its tensors."""
        real = Snapshots.write

        def write(self: Snapshots, snapshot_id: SnapshotId, *arguments: Any, **said: Any) -> None:
            real(self, snapshot_id, *arguments, **said)
            if snapshot_id.stage_id.stage == 2 and snapshot_id.step == step:
                raise Killed

        with mock.patch.object(Snapshots, "write", write), pytest.raises(Killed):
            self.train()
        return [content for key, content in self.raw().items() if "/snapshot-" in key and "/c." in key]

    def test_a_training_with_snapshots_gives_the_same_and_leaves_none(self) -> None:
        real, kept = Snapshots.write, []

        def write(self: Snapshots, snapshot_id: SnapshotId, *arguments: Any, **said: Any) -> None:
            real(self, snapshot_id, *arguments, **said)
            kept.append(snapshot_id)
            assert self.list_shard(snapshot_id.stage_id.shard) == [snapshot_id]

        with mock.patch.object(Snapshots, "write", write):
            store = self.train()
        assert len(kept) > 8
        assert self.snapshots() == []
        assert state(store) == state(self.elsewhere(PEOPLE))
        assert store.verify(replay="all", executor="inline").problems == []

    def test_killed_in_mid_stage_it_goes_on_to_the_same_bits(self) -> None:
        assert self.killed_amid()
        notes = Notes()
        store = self.train(reporter=notes)
        assert any("goes on from a recovery snapshot" in note for note in notes.notes)
        assert self.snapshots() == []
        assert state(store) == state(self.elsewhere(PEOPLE))

    def test_a_damaged_one_is_discarded(self) -> None:
        self.killed_amid()
        key = next(key for key in self.snapshots() if key.endswith("/c.0"))
        content = self.raw()[key]
        self.change(key, content[:7] + bytes([content[7] ^ 1]) + content[8:])
        notes = Notes()
        store = self.train(reporter=notes)
        assert any("is damaged: it is discarded" in note for note in notes.notes)
        assert self.snapshots() == []
        assert state(store) == state(self.elsewhere(PEOPLE))

    def test_one_that_lies_there_is_named(self) -> None:
        self.killed_amid()
        problems = self.opened().verify(replay="none", executor="inline").problems
        named = [problem for problem in problems if "a recovery snapshot of a training that was killed" in problem]
        assert [problem.partition(":")[0] for problem in named] == sorted({"/".join(k.split("/")[:3]) for k in self.snapshots()})  # fmt: skip
        self.train()
        assert self.opened().verify(executor="inline").problems == []

    def test_a_deletion_takes_those_of_its_shard_before_it_says_that_it_has_purged(self) -> None:
        wanted = pieces(self.killed_amid())
        assert wanted
        shard = int(self.snapshots()[0].split("shard-")[1][:4])
        store = self.opened()
        route = store.opened.router.route_one
        person = next(p for p in PEOPLE["person"].to_pylist() if route(p) == (shard, 1))
        real, left = Requests.advance, []

        def advance(requests: Requests, request: str, to: str, **said: Any) -> Any:
            if to == "stages_purged":
                left.extend(self.snapshots())
            return real(requests, request, to, **said)

        with mock.patch.object(Requests, "advance", advance):
            assert store.delete(subjects=[person], defer=True).state == "stages_purged"
        assert left == self.snapshots() == []
        assert not [key for key, content in self.raw().items() if any(piece in content for piece in wanted)]
        store = self.train()
        assert state(store) == state(self.elsewhere(self.without(person)))
        assert store.verify(replay="all", executor="inline").problems == []

    def test_one_that_is_written_after_the_lock_was_lost_is_taken_back(self) -> None:
        """Whoever holds the lock by then may have purged the shard, and said so."""
        real, lost = Snapshots.write, []

        def write(self: Snapshots, snapshot_id: SnapshotId, *arguments: Any, **said: Any) -> None:
            real(self, snapshot_id, *arguments, **said)
            if snapshot_id.stage_id.stage == 2 and not lost:
                lost.append(snapshot_id)

        def check(_: FolderLock) -> None:
            if lost:
                raise LostLockError("lost")

        with (
            mock.patch.object(Snapshots, "write", write),
            mock.patch.object(FolderLock, "check", check),
            contextlib.suppress(StoreError),
        ):
            self.train()
        assert lost
        assert not [key for key in self.snapshots() if lost[0].folder in key]

    def test_what_can_not_be_written_costs_the_snapshot_and_not_the_training(self) -> None:
        def refused(*_: Any, **__: Any) -> None:
            raise OSError(28, "No space left on device")

        notes = Notes()
        with mock.patch("sisa.checkpoints.snapshots.write_stage", refused):
            store = self.train(reporter=notes)
        assert len([note for note in notes.notes if "can't be written" in note]) == 4
        assert state(store) == state(self.elsewhere(PEOPLE))


class AmidInBucket(Amid, InBucket):
    """What only a bucket has."""

    @pytest.mark.parametrize("allowed", [0, 1, 2])
    def test_one_that_was_half_written_is_none_and_goes(self, allowed: int) -> None:
        """Refused at any of its puts, and what would clean up is refused too."""
        amid, puts = [False], [0]

        def fault(environ: dict[str, Any]) -> tuple[str, str] | None:
            method = environ["REQUEST_METHOD"]
            if "snapshot-02" not in environ["PATH_INFO"] and not (amid[0] and puts[0] > allowed):
                return None
            amid[0] = True
            puts[0] += method == "PUT"
            return ("403 Forbidden", "AccessDenied") if puts[0] > allowed or method == "POST" else None

        with self.server.failing(fault), contextlib.suppress(StoreError):  # nothing can be written from then on
            self.train()
        assert amid[0]
        left = self.snapshots()
        assert bool(left) == (allowed > 0)
        assert not [key for key in left if key.endswith("/zarr.json") and "/state/" not in key] or allowed == 2
        notes = Notes()
        store = self.train(reporter=notes)
        assert self.snapshots() == []
        assert state(store) == state(self.elsewhere(PEOPLE))
        assert store.verify(executor="inline").problems == []

    def test_no_version_of_one_stays(self) -> None:
        """Versions that others made, and delete markers, go with the purge too."""
        self.killed_amid()
        key = next(key for key in self.snapshots() if key.endswith("/c.0"))
        for content in (b"somebody's", self.raw()[key]):
            self.server.client.put_object(Bucket=self.bucket, Key=f"runs/one/{key}", Body=content)
        shard = int(key.split("shard-")[1][:4])
        store = self.opened()
        person = next(p for p in PEOPLE["person"].to_pylist() if store.opened.router.route_one(p) == (shard, 1))
        self.server.client.delete_object(Bucket=self.bucket, Key=f"runs/one/{key}")
        store.delete(subjects=[person], defer=True)
        assert not [found for found, _ in everything(self.server, self.bucket) if "snapshot-" in found]


class TestLocal(Amid, InFolder):
    pass


@pytest.mark.slow
class TestBucket(AmidInBucket):
    versioned = False


class TestVersionedBucket(AmidInBucket):
    versioned = True
