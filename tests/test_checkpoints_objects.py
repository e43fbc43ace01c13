"""Stages on every medium: kept whole, published once, damage is loud, and what is erased is gone in every version."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
import zarr
from checkpoint_kit import STAGE, make_state, same, write
from s3_kit import S3Server, everything, refuses

from sisa.checkpoints import Checkpoints, MissingStage, StageId, checkpoints_at, packing, stage
from sisa.checkpoints.objects import ObjectCheckpoints
from sisa.errors import BusyError, DamagedError, StoreError
from sisa.state import StageState, full_digest
from sisa.storage import objects

OTHERS = [StageId(shard=3, stage=1, key="00" * 32, platform="0" * 12), StageId(4, 2, "11" * 32, "1" * 12)]
ROOT = "checkpoints"


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    with S3Server().running() as running:
        yield running


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage, "chunking", partial(packing.chunking, chunk_bytes=192))


class CheckpointContract:
    """Inherited by each medium; ``raw`` reads, and ``change`` breaks, by a way that bypasses the code."""

    def fresh(self) -> Checkpoints:
        raise NotImplementedError

    def raw(self) -> dict[str, bytes]:
        """Bytes by name below the root, of every version."""
        raise NotImplementedError

    def change(self, name: str, content: bytes | None) -> None:
        """Replace or remove one."""
        raise NotImplementedError

    def chunks(self, stage_id: StageId = STAGE) -> list[str]:
        return sorted(name for name in self.raw() if name.startswith(f"{stage_id.folder}/state/c."))

    def test_a_state_comes_back_bit_for_bit(self, store: Checkpoints) -> None:
        manifest = write(store, make_state())
        assert self.fresh().exists(STAGE)
        loaded_manifest, loaded = self.fresh().load(STAGE, expect_full_digest=full_digest(make_state()))
        assert same(make_state(), loaded)
        assert loaded_manifest == manifest == self.fresh().manifest(STAGE)
        assert len(self.chunks()) > 3
        assert store.strays() == store.missing_groups() == []

    def test_an_empty_state_is_a_stage_too(self, store: Checkpoints) -> None:
        write(store, StageState())
        assert self.fresh().load(STAGE)[1].empty

    def test_the_same_names_and_chunks_on_every_medium(self, store: Checkpoints, tmp_path: Path) -> None:
        write(store, make_state())
        local = checkpoints_at(str(tmp_path / "local"), ROOT)
        write(local, make_state())
        root = tmp_path / "local" / ROOT
        there = {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}
        here = self.raw()
        assert there.keys() == here.keys()
        assert {name for name in there if there[name] != here[name]} <= {f"{STAGE.folder}/zarr.json"}  # times

    def test_stages_are_listed(self, store: Checkpoints) -> None:
        assert store.all_stages() == store.list_shard(3) == []
        for stage_id in [STAGE, *OTHERS]:
            write(store, make_state(), stage_id)
        assert self.fresh().all_stages() == sorted([STAGE, *OTHERS])
        assert self.fresh().list_shard(3) == sorted([STAGE, OTHERS[0]])

    def test_a_stage_that_is_there_stays(self, store: Checkpoints) -> None:
        first = write(store, make_state())
        before = self.raw()
        assert write(self.fresh(), make_state(), worker="another:8") == first
        assert self.raw() == before

    def test_training_that_is_not_reproducible_is_damage(self, store: Checkpoints) -> None:
        write(store, make_state())
        before = self.raw()
        with pytest.raises(DamagedError, match="not reproducible"):
            write(self.fresh(), make_state(seed=1))
        assert self.raw() == before

    def test_of_two_writers_that_find_nothing_one_publishes(
        self, store: Checkpoints, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        barrier = threading.Barrier(2)
        with monkeypatch.context() as patch:
            patch.setattr(type(store), "exists", lambda *_: barrier.wait() and False)

            def work(worker: str) -> object:
                return write(self.fresh(), make_state(), worker=worker)

            with ThreadPoolExecutor(2) as pool:
                one, other = pool.map(work, ("a:1", "b:2"))
        assert one == other
        assert same(make_state(), self.fresh().load(STAGE)[1])
        assert store.strays() == []

    def test_a_missing_or_changed_chunk_is_loud(self, store: Checkpoints) -> None:
        write(store, make_state())
        before = self.raw()
        for name in [
            self.chunks()[0],
            self.chunks()[-1],
            f"{STAGE.folder}/state/zarr.json",
            f"{STAGE.folder}/zarr.json",
        ]:
            content = before[name]
            flipped = bytes([content[0] ^ 1]) + content[1:]
            for broken in (None, b"", flipped, content[:-1]):
                self.change(name, broken)
                with pytest.raises(DamagedError) as caught:
                    self.fresh().load(STAGE)
                if name in self.chunks() or broken is None:
                    short = name.removeprefix(f"{STAGE.folder}/")
                    assert short in caught.value.message or "is missing" in caught.value.message
                self.change(name, content)
        self.fresh().load(STAGE)

    def test_chunks_of_another_stage_are_loud(self, store: Checkpoints) -> None:
        write(store, make_state())
        write(store, make_state(seed=1), OTHERS[0])
        self.change(self.chunks()[0], self.raw()[self.chunks(OTHERS[0])[0]])
        with pytest.raises(DamagedError, match="digest"):
            self.fresh().load(STAGE)

    def test_a_missing_stage_is_missing(self, store: Checkpoints) -> None:
        with pytest.raises(MissingStage):
            store.load(STAGE)
        with pytest.raises(MissingStage):
            store.manifest(STAGE)
        assert not store.exists(STAGE)

    def test_what_is_removed_is_gone(self, store: Checkpoints) -> None:
        for stage_id in [STAGE, *OTHERS]:
            write(store, make_state(), stage_id)
        store.remove(STAGE)
        store.remove(STAGE)
        assert store.all_stages() == sorted(OTHERS)
        assert not [name for name in self.raw() if name.startswith(STAGE.folder)]
        assert same(make_state(), store.load(OTHERS[0])[1])

    def test_a_sweep_keeps_what_it_is_told(self, store: Checkpoints) -> None:
        for stage_id in [STAGE, *OTHERS]:
            write(store, make_state(), stage_id)
        assert store.sweep(3, keep=lambda stage_id: stage_id != STAGE) == [STAGE]
        assert store.all_stages() == sorted(OTHERS)
        assert not [name for name in self.raw() if name.startswith(STAGE.folder)]

    def test_what_nobody_answers_for_is_astray(self, store: Checkpoints) -> None:
        write(store, make_state())
        names = ["notes.txt", "shard-0003/notes.txt", f"{STAGE.folder}/state/c.99", f"{STAGE.folder}/notes.txt"]
        for name in names:
            self.change(name, b"somebody's")
        assert [str(stray).partition(f"{ROOT}/")[2] for stray in store.strays()] == sorted(names)

    def test_damaged_groups_are_written_again(self, store: Checkpoints) -> None:
        write(store, make_state())
        self.change("zarr.json", b"{}")
        self.change("shard-0003/zarr.json", None)
        assert len(store.strays()) == len(store.missing_groups()) == 1
        store.sweep(3, keep=lambda _: True)
        assert self.fresh().strays() == self.fresh().missing_groups() == []


class TestLocal(CheckpointContract):
    @pytest.fixture
    def store(self, tmp_path: Path) -> Checkpoints:
        self.root = tmp_path / "store"
        return self.fresh()

    def fresh(self) -> Checkpoints:
        return checkpoints_at(str(self.root), ROOT)

    def raw(self) -> dict[str, bytes]:
        root = self.root / ROOT
        return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}

    def change(self, name: str, content: bytes | None) -> None:
        path = self.root / ROOT / name
        path.unlink() if content is None else path.write_bytes(content)


class TestBucket(CheckpointContract):
    versioned = False

    @pytest.fixture
    def store(self, server: S3Server) -> ObjectCheckpoints:
        self.server = server
        self.bucket = server.bucket(versioned=self.versioned)
        return self.fresh()

    def fresh(self) -> ObjectCheckpoints:
        found = checkpoints_at(f"s3://{self.bucket}/store", ROOT)
        assert isinstance(found, ObjectCheckpoints)
        return found

    def raw(self) -> dict[str, bytes]:
        found = everything(self.server, self.bucket)
        assert len({key for key, _ in found}) == len(found), "a key has more than one version, or a delete marker"
        return {key.removeprefix(f"store/{ROOT}/"): content or b"" for (key, _), content in found.items()}

    def change(self, name: str, content: bytes | None) -> None:
        where = {"Bucket": self.bucket, "Key": f"store/{ROOT}/{name}"}
        if self.versioned:  # as if it had never been another
            for key, version in everything(self.server, self.bucket, where["Key"]):
                if key == where["Key"]:
                    self.server.client.delete_object(**where, VersionId=version)
        if content is not None:
            self.server.client.put_object(**where, Body=content)
        elif not self.versioned:
            self.server.client.delete_object(**where)

    def test_zarr_reads_it_by_itself(self, store: ObjectCheckpoints) -> None:
        write(store, make_state())
        opened = zarr.open_group(zarr.storage.ObjectStore(store.storage.objects, read_only=True), path=ROOT, mode="r")
        assert STAGE.folder.split("/")[1] in opened["shard-0003"]

    def test_a_refused_request_leaves_no_stage_and_the_next_holder_no_bytes(self, store: ObjectCheckpoints) -> None:
        write(store, make_state(), OTHERS[0])
        for allowed in range(100):
            count = [0]

            def fault(environ: dict[str, str], count: list[int] = count, allowed: int = allowed) -> object:
                count[0] += environ["REQUEST_METHOD"] == "PUT"
                return ("403 Forbidden", "AccessDenied") if count[0] > allowed else None

            with self.server.failing(fault):
                try:
                    write(self.fresh(), make_state())
                    break
                except StoreError:
                    pass
            assert self.fresh().all_stages() == [OTHERS[0]]
            assert not self.fresh().exists(STAGE)
            self.fresh().sweep(3, keep=lambda _: True)
            assert not [name for name in self.raw() if name.startswith(STAGE.folder)]
            assert self.fresh().strays() == []
        assert allowed > 4
        assert same(make_state(), self.fresh().load(STAGE)[1])

    def test_a_writer_killed_at_any_request_leaves_no_stage(self, store: ObjectCheckpoints) -> None:
        code = (
            "import sys; from functools import partial; from checkpoint_kit import make_state, write\n"
            "from sisa.checkpoints import checkpoints_at, packing, stage\n"
            "import sisa.checkpoints.bucket\n"
            "stage.chunking = partial(packing.chunking, chunk_bytes=192)\n"
            "print('ready', flush=True); sys.stdin.readline()\n"
            "write(checkpoints_at(sys.argv[1], 'checkpoints'), make_state())\n"
        )
        command = [sys.executable, "-c", code, f"s3://{self.bucket}/store"]
        for killed_at in (1, 3, 6):
            environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
            child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
            assert child.stdout is not None
            assert child.stdin is not None
            assert child.stdout.readline() == b"ready\n"
            count = [0]

            def fault(
                environ: dict[str, str], count: list[int] = count, pid: int = child.pid, at: int = killed_at
            ) -> None:
                count[0] += environ["REQUEST_METHOD"] == "PUT"
                if count[0] == at:
                    os.kill(pid, signal.SIGKILL)

            with self.server.failing(fault):
                child.stdin.write(b"\n")
                child.stdin.close()
                assert child.wait() == -signal.SIGKILL
            child.stdout.close()
            assert self.fresh().all_stages() == []
            self.fresh().sweep(3, keep=lambda _: True)
            assert not [name for name in self.raw() if name.startswith(STAGE.folder)]
        write(store, make_state())
        assert same(make_state(), store.load(STAGE)[1])

    def test_an_answer_that_was_lost_is_no_other_writer(self, store: ObjectCheckpoints) -> None:
        write(store, make_state(), OTHERS[0])
        lost: set[str] = set()

        def fault(environ: dict[str, str]) -> tuple[str, str] | None:
            path = environ["PATH_INFO"]
            if environ["REQUEST_METHOD"] != "PUT" or path in lost:
                return None
            lost.add(path)
            body = environ["wsgi.input"].read(int(environ["CONTENT_LENGTH"]))
            environ["CONTENT_LENGTH"] = "0"
            self.server.client.put_object(Bucket=self.bucket, Key=path.removeprefix(f"/{self.bucket}/"), Body=body)
            return "500 Internal Server Error", "InternalError"

        with self.server.failing(fault):
            manifest = write(store, make_state())
        assert len(lost) > 4
        assert self.fresh().load(STAGE)[0] == manifest

    def test_bytes_of_a_killed_writer_with_other_bits_are_not_taken_over(self, store: ObjectCheckpoints) -> None:
        write(store, make_state(), OTHERS[0])
        self.change(f"{STAGE.folder}/state/c.1", b"another's")
        with pytest.raises(StoreError, match="another writer"):
            write(self.fresh(), make_state())
        assert self.fresh().all_stages() == [OTHERS[0]]

    def test_a_server_that_fails_is_no_damage(self, store: ObjectCheckpoints, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(objects, "RETRIES", 0)
        write(store, make_state())
        store.storage.__dict__.pop("objects", None)
        for fault, kind in (
            (refuses("GET"), StoreError),
            (refuses("GET", path="/c.", status="503 Slow Down", code="SlowDown"), BusyError),
        ):
            with self.server.failing(fault), pytest.raises(StoreError) as caught:
                self.fresh().load(STAGE)
            assert type(caught.value) is not DamagedError
            assert isinstance(caught.value, kind)
        store.storage.__dict__.pop("objects", None)


class TestVersionedBucket(TestBucket):
    versioned = True

    def test_no_version_of_what_is_erased_stays(self, store: ObjectCheckpoints) -> None:
        write(store, make_state())
        for name in list(self.raw()):
            for body in (b"older weights of somebody", b"newer"):
                self.server.client.put_object(Bucket=self.bucket, Key=f"store/{ROOT}/{name}", Body=body)
        name = f"{STAGE.folder}/state/c.0"
        self.server.client.delete_object(Bucket=self.bucket, Key=f"store/{ROOT}/{name}")
        store.remove(STAGE)
        assert not [key for key, _ in everything(self.server, self.bucket) if STAGE.folder in key]
