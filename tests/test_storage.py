"""What every medium promises, inherited by each; and what object storage has to be for a store to lie there."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from unittest import mock

import pytest
from s3_kit import S3Server, everything, ignores_conditions, refuses, uploads

from sisa.errors import BusyError, StoreError, UserError
from sisa.storage import Storage, objects, parse_address, storage_at, versions
from sisa.storage.local import LocalStorage
from sisa.storage.objects import ObjectStorage
from sisa.storage.probe import probe
from sisa.storage.versions import Version


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    with S3Server().running() as running:
        yield running


class StorageContract:
    """Inherited by each medium; ``raw`` reads what lies there by a way that bypasses the code."""

    def raw(self) -> dict[str, bytes]:
        raise NotImplementedError

    def half_done(self, key: str) -> None:
        """Leave what a killed writer of ``key`` would."""
        raise NotImplementedError

    def test_what_was_put_comes_back(self, storage: Storage) -> None:
        for content in (b"", b"one", bytes(range(256)) * 400):
            storage.put("records/shard=0001/slice=02/part-00000.parquet", content)
            assert storage.read("records/shard=0001/slice=02/part-00000.parquet") == content
        with storage.opened("records/shard=0001/slice=02/part-00000.parquet") as stream:
            assert stream.seek(300) == 300
            assert stream.read(2) == bytes([300 % 256, 301 % 256])
        assert self.raw() == {"records/shard=0001/slice=02/part-00000.parquet": content}

    def test_a_file_is_put_whole(self, storage: Storage, tmp_path: Path) -> None:
        content = bytes(range(251)) * 150_000  # more than two parts
        (tmp_path / "source").write_bytes(content)
        storage.put_file("a/b", tmp_path / "source")
        assert storage.read("a/b") == content
        assert self.raw() == {"a/b": content}

    def test_what_is_written_piece_by_piece_is_put_whole_or_not_at_all(self, storage: Storage) -> None:
        storage.put("a/b", b"before")
        with storage.writing("a/b") as stream:
            stream.write(b"0123456789")
            stream.seek(3)
            stream.write(b"xyz")
            stream.seek(0)
            assert stream.read(4) == b"012x"
            assert storage.read("a/b") == b"before"
        assert self.raw() == {"a/b": b"012xyz6789"}
        with contextlib.suppress(ZeroDivisionError), storage.writing("a/b") as stream:
            stream.write(b"%d" % (1 // len(stream.read())))
        assert self.raw() == {"a/b": b"012xyz6789"}
        with storage.writing("c/d/e") as stream:
            stream.write(b"new")
        assert storage.read("c/d/e") == b"new"

    def test_all_that_lies_there_is_told_unfinished_or_not(self, storage: Storage) -> None:
        for key in ("a/b/c", "a/d", "ab/c"):
            storage.put(key, b"")
        self.half_done("a/b/e")
        found = [key for key in storage.there("a") if key != "a/b"]  # a folder, where there are folders
        assert len(found) == 3
        assert {"a/b/c", "a/d"} < set(found)
        assert storage.there("nothing") == []

    def test_what_a_killed_removal_left_is_swept(self, storage: Storage) -> None:
        for key in ("a/b/c", "a/b/d", "a/e/f"):
            storage.put(key, b"")
        with self.killed_removing(), contextlib.suppress(KeyboardInterrupt):
            storage.remove_all("a/b")
        storage.remove_all("a/b")
        storage.sweep_beside("a/b")
        storage.sweep_beside("nothing/at/all")
        assert self.raw() == {"a/e/f": b""}

    def killed_removing(self) -> AbstractContextManager[object]:
        """A process that is killed half-way in a removal."""
        raise NotImplementedError

    def test_what_is_missing_is_a_missing_file(self, storage: Storage) -> None:
        storage.put("a/b", b"")
        for key in ("a", "b", "a/c", "a/b/c"):
            assert not storage.exists(key)
        with pytest.raises(FileNotFoundError):
            storage.read("a/c")
        with pytest.raises(FileNotFoundError), storage.opened("a/c"):
            pass

    @pytest.mark.parametrize("key", ["", "/a", "a/", "a//b", "../a", "a/../b", ".", "a\\b"])
    def test_a_key_leads_nowhere_else(self, storage: Storage, key: str) -> None:
        for use in (storage.read, storage.exists, storage.remove, lambda key: storage.put(key, b"")):
            with pytest.raises(StoreError):
                use(key)
        assert self.raw() == {}

    def test_of_many_that_make_one_key_one_does(self, storage: Storage) -> None:
        storage.put("a/other", b"")
        made: list[int] = []
        start = threading.Barrier(8)

        def make(number: int) -> None:
            start.wait()
            if storage.put_new("a/b", b"%d" % number):
                made.append(number)

        threads = [threading.Thread(target=make, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(made) == 1
        assert storage.read("a/b") == b"%d" % made[0]
        assert not storage.put_new("a/b", b"later")
        assert storage.read("a/b") == b"%d" % made[0]

    def test_keys_are_listed_by_whole_names(self, storage: Storage) -> None:
        keys = ["a/b/c", "a/b/d", "a/bb/c", "ab/c", "z"]
        for key in keys:
            storage.put(key, key.encode())
        assert storage.keys("") == sorted(keys)
        assert storage.keys("a") == ["a/b/c", "a/b/d", "a/bb/c"]
        assert storage.keys("a/b") == ["a/b/c", "a/b/d"]
        assert storage.keys("a/b/c") == storage.keys("nothing") == []

    def test_removing_one_leaves_the_others(self, storage: Storage) -> None:
        for key in ("a/b", "a/bc", "a/c/d", "e/f"):
            storage.put(key, b"old")
            storage.put(key, b"new")
        storage.remove("a/b")
        storage.remove("a/b")
        storage.remove_all("a/c")
        storage.remove_all("a/c")
        storage.remove_all("nothing")
        assert storage.keys("") == ["a/bc", "e/f"]
        assert self.raw() == {"a/bc": b"new", "e/f": b"new"}
        storage.remove_all("a")
        storage.remove_all("e")
        assert storage.keys("") == []
        assert self.raw() == {}

    def test_nothing_hides_after_what_was_done_here(self, storage: Storage) -> None:
        for content in (b"one", b"two"):
            storage.put("a/b", content)
        storage.put_new("a/c", b"three")
        storage.remove("a/c")
        assert storage.hidden("") == []

    def test_what_a_killed_writer_left_is_told_and_swept(self, storage: Storage) -> None:
        storage.put("a/b", b"whole")
        self.half_done("a/c")
        assert storage.keys("") == ["a/b"]
        assert len(storage.hidden("")) == len(storage.hidden("a")) == 1
        assert storage.hidden("z") == []
        storage.sweep("a")
        assert storage.hidden("") == []
        assert self.raw() == {"a/b": b"whole"}


class TestLocal(StorageContract):
    @pytest.fixture
    def storage(self, tmp_path: Path) -> Storage:
        self.root = tmp_path / "root"
        return storage_at(str(self.root))

    def raw(self) -> dict[str, bytes]:
        return {p.relative_to(self.root).as_posix(): p.read_bytes() for p in self.root.rglob("*") if p.is_file()}

    def killed_removing(self) -> AbstractContextManager[object]:
        return mock.patch("sisa.files._remove_tree", side_effect=KeyboardInterrupt)

    def half_done(self, key: str) -> None:
        (self.root / key).with_name("tmp-0123").write_bytes(b"half")

    def test_it_is_a_folder(self, storage: Storage) -> None:
        assert isinstance(storage, LocalStorage)
        assert storage.uri == str(self.root)


class TestBucket(StorageContract):
    versioned = False

    @pytest.fixture
    def storage(self, server: S3Server) -> Storage:
        self.server = server
        self.bucket = server.bucket(versioned=self.versioned)
        server.client.put_object(Bucket=self.bucket, Key="stores/onesided/x", Body=b"another's")
        return storage_at(f"s3://{self.bucket}/stores/one")

    def raw(self) -> dict[str, bytes]:
        found = everything(self.server, self.bucket)
        assert found.pop(next(key for key in found if key[0] == "stores/onesided/x")) == b"another's"
        assert uploads(self.server, self.bucket) == []
        assert None not in found.values()
        assert len({key for key, _ in found}) == len(found), "a key has more than one version"
        return {key.removeprefix("stores/one/"): content or b"" for (key, _), content in found.items()}

    def killed_removing(self) -> AbstractContextManager[object]:
        return mock.patch.object(versions.Versions, "erase", side_effect=KeyboardInterrupt)

    def half_done(self, key: str) -> None:
        client, where = self.server.client, {"Bucket": self.bucket, "Key": f"stores/one/{key}"}
        upload = client.create_multipart_upload(**where)["UploadId"]
        client.upload_part(**where, UploadId=upload, PartNumber=1, Body=b"half")

    def test_the_bucket_is_good_enough(self, storage: ObjectStorage) -> None:
        probe(storage)
        assert self.raw() == {}


class TestVersionedBucket(TestBucket):
    versioned = True

    def test_what_others_did_is_told_and_swept(self, storage: Storage) -> None:
        client = self.server.client
        storage.put("a/b", b"new")
        for content in (b"person-17", b"new"):
            client.put_object(Bucket=self.bucket, Key="stores/one/a/b", Body=content)
        client.put_object(Bucket=self.bucket, Key="stores/one/a/gone", Body=b"person-17")
        client.delete_object(Bucket=self.bucket, Key="stores/one/a/gone")
        assert [line.partition(":")[0] for line in storage.hidden("")] == ["a/b", "a/gone", "a/gone"]
        assert storage.keys("") == ["a/b"]
        storage.sweep("a")
        assert self.raw() == {"a/b": b"new"}

    def test_what_was_replaced_goes_even_if_the_first_listing_is_older(self, storage: ObjectStorage) -> None:
        storage.put("a/b", b"one")
        before = storage.versions.all("")
        listings = [before, before]
        real = storage.versions.all

        def listed(prefix: str) -> list[Version]:
            return listings.pop() if listings else real(prefix)

        with mock.patch.object(storage.versions, "all", listed):
            storage.put("a/b", b"two")
        assert self.raw() == {"a/b": b"two"}

    def test_what_is_never_listed_is_no_success(self, storage: ObjectStorage, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(versions, "WAIT_S", 0)
        monkeypatch.setattr(storage.versions, "all", lambda _: [])
        with pytest.raises(StoreError, match="not listed"):
            storage.put("a/b", b"one")

    def test_of_many_that_replace_one_key_one_stays(self, storage: ObjectStorage) -> None:
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda number: storage.put("a/b", b"%d" % number), range(24)))
        assert list(self.raw()) == ["a/b"]

    def test_more_than_one_page_of_versions_goes(self, storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("sisa.storage.versions.BATCH", 3)
        for number in range(8):
            self.server.client.put_object(Bucket=self.bucket, Key="stores/one/a/b", Body=b"%d" % number)
        storage.remove_all("a")
        assert self.raw() == {}


@pytest.mark.parametrize(
    ("uri", "told"),
    [
        ("s3://", "name of a bucket"),
        ("s3:///prefix", "name of a bucket"),
        ("s3://B/prefix", "name of a bucket"),
        ("s3://user:secret@bucket/prefix", "name of a bucket"),
        ("s3://bucket/../other", "can't be part"),
        ("s3://bucket/a/./b", "can't be part"),
        ("s3://bucket/a//b", "can't be part"),
        ("s3://bucket/a?versionId=3", "can't be part"),
        ("s3://bucket/a#b", "can't be part"),
        ("s3://bucket/a b", "can't be part"),
        ("s3://bucket/%2e%2e", "can't be part"),
    ],
)
def test_a_mistake_in_the_uri_is_the_users(uri: str, told: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_address(uri)
    assert told in caught.value.message


def test_an_address_is_what_it_says() -> None:
    assert parse_address("s3://bucket").uri == "s3://bucket"
    assert parse_address("s3://bucket/").key("a/b") == "a/b"
    assert parse_address("s3://my.bucket-1/runs/adult=2/").uri == "s3://my.bucket-1/runs/adult=2"
    assert parse_address("s3://bucket/runs").key("a/b") == "runs/a/b"
    assert parse_address("s3://bucket/runs").below("") == "runs/"
    assert parse_address("s3://bucket").below("") == ""


REFUSALS = {
    "preconditions ignored": (ignores_conditions, "If-None-Match"),
    "versions can't be listed": (refuses("GET", query="versions"), "list the versions"),
    "versions can't be erased": (refuses("POST", query="delete"), "can't erase"),
    "uploads can't be listed": (refuses("GET", query="uploads"), "unfinished uploads"),
    "nothing can be written": (refuses("PUT"), "access denied"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_a_bucket_that_can_not_keep_the_promise_is_refused(server: S3Server, name: str) -> None:
    fault, told = REFUSALS[name]
    storage = ObjectStorage(parse_address(f"s3://{server.bucket(versioned=True)}/store"))
    with server.failing(fault), pytest.raises(UserError) as caught:
        probe(storage)
    assert "can't be used" in caught.value.message
    assert told in caught.value.message
    assert caught.value.hint


def test_object_lock_is_refused(server: S3Server) -> None:
    storage = ObjectStorage(parse_address(f"s3://{server.bucket(lock=True)}/store"))
    with pytest.raises(UserError, match="object lock"):
        probe(storage)


@pytest.mark.usefixtures("server")
def test_a_missing_bucket_is_told() -> None:
    storage = ObjectStorage(parse_address("s3://there-is-none/store"))
    for use in (lambda: storage.keys(""), lambda: storage.put("a", b""), lambda: storage.remove("a")):
        with pytest.raises(StoreError, match="no such bucket"):
            use()


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objects, "RETRIES", 1)
    monkeypatch.setattr(objects, "REQUEST_S", 1)
    monkeypatch.setattr(objects, "PATIENCE_S", 2)


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize(
    ("status", "code", "kind", "told"),
    [
        ("503 Slow Down", "SlowDown", BusyError, "fewer requests"),
        ("403 Forbidden", "AccessDenied", StoreError, "access denied"),
        ("403 Forbidden", "ExpiredToken", StoreError, "access denied"),
        ("500 Internal Server Error", "InternalError", StoreError, "object storage"),
    ],
)
def test_what_the_server_says_becomes_an_error_with_a_way_out(
    server: S3Server, status: str, code: str, kind: type[StoreError], told: str
) -> None:
    storage = ObjectStorage(parse_address(f"s3://{server.bucket()}/store"))
    storage.put("a/b", b"")
    uses = [
        lambda: storage.read("a/b"),
        lambda: storage.exists("a/b"),
        lambda: storage.put("a/b", b""),
        lambda: storage.put_new("a/c", b""),
        lambda: storage.keys(""),
        lambda: storage.remove("a/b"),
        lambda: storage.hidden(""),
    ]

    def fault(_: object) -> tuple[str, str]:
        return status, code

    with server.failing(fault):
        for use in uses:
            with pytest.raises(StoreError) as caught:
                use()
            assert isinstance(caught.value, kind)
            assert told in caught.value.message
            assert caught.value.hint
            assert "tests" not in caught.value.message + caught.value.hint, "a credential"


@pytest.mark.usefixtures("impatient")
def test_a_server_that_never_answers_is_given_up(server: S3Server) -> None:
    storage = ObjectStorage(parse_address(f"s3://{server.bucket()}/store"))
    over = threading.Event()

    def fault(_: object) -> tuple[str, str]:
        over.wait(60)
        return "500 Internal Server Error", "InternalError"

    started = time.monotonic()
    with server.failing(fault):
        for use in (lambda: storage.read("a/b"), lambda: storage.hidden("")):
            with pytest.raises(BusyError, match="no answer in time"):
                use()
        over.set()
    assert time.monotonic() - started < 50


@pytest.mark.usefixtures("impatient", "server")
def test_a_server_that_is_not_there_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    storage = ObjectStorage(parse_address("s3://bucket/store"))
    for use in (lambda: storage.read("a/b"), lambda: storage.hidden("")):
        with pytest.raises(StoreError, match="can't be reached"):
            use()


def test_an_object_that_is_replaced_while_it_is_read_is_one_of_both(
    server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(objects, "PART_BYTES", 1000)
    storage = ObjectStorage(parse_address(f"s3://{server.bucket()}/store"))
    server.client.put_object(Bucket=storage.address.bucket, Key="store/a", Body=b"1" * 2500)
    replaced: list[bool] = []

    def fault(environ: dict[str, str]) -> None:
        if "bytes=1000-" in environ.get("HTTP_RANGE", "") and not replaced:
            replaced.append(True)
            server.client.put_object(Bucket=storage.address.bucket, Key="store/a", Body=b"2" * 3500)

    with server.failing(fault):
        assert storage.read("a") == b"2" * 3500
    assert replaced


@pytest.mark.usefixtures("server")
def test_without_credentials_nothing_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")
    with pytest.raises(StoreError, match="no credentials"):
        ObjectStorage(parse_address("s3://bucket/store")).read("a")
