"""Rows that wait on a local disk while a store lies elsewhere: the same bits, no name, and gone when they have to be."""

from __future__ import annotations

import contextlib
import os
import signal
import struct
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pyarrow as pa
import pytest
import yaml
from cli_kit import command, surroundings
from life_kit import PEOPLE, PERSON, RECORDS, InBucket, InFolder, Medium, state
from s3_kit import S3Server
from test_streaming import SLOW

import sisa
from sisa.errors import StoreError
from sisa.ledger.requests import Requests
from sisa.training.waiting import WaitingRows


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    with S3Server().running() as running:
        yield running


def wait_until(true: Callable[[], object], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def nameless_bytes(pid: int) -> bytes:
    """What is in the files of waiting rows that a process has open; by their names nobody finds them."""
    found = []
    with contextlib.suppress(OSError):  # the process has ended
        for link in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                if "rows-0000" in str(link.readlink()):
                    found.append(link.read_bytes())
    return b"".join(found)


class Streamed(Medium):
    """Inherited by each medium."""

    def recipe(self, table: pa.Table = PEOPLE, **fields: Any) -> dict[str, Any]:
        return super().recipe(table, **{"workers": {"rows_in_memory": "never", "snapshot_every_s": None}, **fields})

    def area(self) -> Path:
        """The folder in which rows wait."""
        return self.opened().opened.layout.waiting_area

    def test_the_same_bits_before_and_after_a_deletion(self) -> None:
        real, made = WaitingRows.__init__, []

        def init(rows: WaitingRows, *arguments: Any, **options: Any) -> None:
            made.append(rows)
            real(rows, *arguments, **options)

        with mock.patch.object(WaitingRows, "__init__", init):
            store = self.train()
        assert made, "the test must be able to fail"
        assert state(store) == state(self.elsewhere(PEOPLE))
        store.delete(subjects=[PERSON], executor="inline")
        assert state(store) == state(self.elsewhere(self.without(PERSON)))
        assert not self.holding(PERSON, *RECORDS)
        assert store.verify(replay="all", executor="inline").problems == []
        assert list(self.area().glob("*")) == []


class StreamedBesideBucket(Streamed, InBucket):
    """What only a store in object storage has: its rows wait beside it."""

    @contextlib.contextmanager
    def running(self) -> Iterator[int]:
        """A training in another process that streams and takes its time."""
        (self.folder / "slow_model.py").write_text(SLOW)
        asked = self.recipe(model={"factory": "slow_model:build"}, sisa={"shards": 1, "slices": 2})
        asked["training"]["epochs"] = 400
        (self.folder / "recipe.yaml").write_text(yaml.safe_dump(asked))
        with subprocess.Popen(
            [*command(), "train", "recipe.yaml", "--executor", "inline"],
            cwd=self.folder, env=surroundings(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        ) as process:  # fmt: skip
            try:
                wait_until(lambda: nameless_bytes(process.pid))
                yield process.pid
            finally:
                process.kill()

    def test_rows_are_let_go_before_they_count_as_erased_and_a_kill_leaves_none(self) -> None:
        with self.running() as pid:
            assert list(self.area().rglob("*")) == []  # nobody finds them while it runs, either
            store = self.opened()
            route = store.opened.router.route_one
            people = zip(PEOPLE["person"].to_pylist(), PEOPLE["x"].to_pylist(), strict=True)
            person, value = next(pair for pair in people if route(pair[0]) == (0, 1))
            needle = struct.pack("<d", value)
            wait_until(lambda: needle in nameless_bytes(pid))
            held: dict[str, bool] = {}
            real = Requests.advance

            def advance(requests: Requests, request: str, to: str, **more: Any) -> Any:
                held[to] = needle in nameless_bytes(pid)
                return real(requests, request, to, **more)

            with mock.patch.object(Requests, "advance", advance):
                store.delete(subjects=[person], defer=True)
            assert held == {"rows_erased": False, "stages_purged": False}
            wait_until(lambda: nameless_bytes(pid))  # it trains on, without the row
            assert needle not in nameless_bytes(pid)
            os.kill(pid, signal.SIGKILL)
            wait_until(lambda: not nameless_bytes(pid))
            assert list(self.area().rglob("*")) == []
        assert not self.holding(person)

    def test_what_was_left_is_told_and_goes_with_a_deletion_or_a_repair(self) -> None:
        store = self.train()
        person = next(p for p in PEOPLE["person"].to_pylist() if store.opened.router.route_one(p) == (1, 2))
        acts: list[Callable[[], object]] = [
            lambda: store.delete(subjects=[person], defer=True),
            lambda: store.repair(executor="inline"),
        ]
        for act in acts:
            left = self.area() / "rows-0001" / "0123456789abcdef"
            left.parent.mkdir(parents=True)
            left.write_bytes(b"the rows of somebody")
            problems = [p for p in store.verify(executor="inline").problems if p.startswith("scratch")]
            assert problems == [
                "scratch/rows-0001 beside the ledger: left by a command that was killed; `sisa repair` removes it"
            ]
            act()
            assert not left.exists()
        (self.area() / "rows-0007").mkdir()
        problems = store.verify(executor="inline").problems
        assert problems == ["scratch/rows-0007 beside the ledger: nobody answers for this"]

    def test_with_a_ledger_on_a_server_each_host_has_its_own_and_leaves_nothing(
        self, postgres_url: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for host in ("one", "two"):
            monkeypatch.setenv("XDG_CACHE_HOME", str(self.folder / host))
            asked = self.recipe(ledger=postgres_url)
            store = sisa.train(asked, executor="inline") if host == "one" else sisa.open_store(asked["store"])
            if host == "two":
                store.delete(subjects=[PERSON], executor="inline")
                assert state(store) == state(self.elsewhere(self.without(PERSON)))
            assert [path for path in (self.folder / host).rglob("*") if path.is_file()] == []
            store.close()

    def test_a_worker_finds_its_own_hosts_area(self, postgres_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """The driver's paths mean nothing on another host."""
        monkeypatch.setenv("XDG_CACHE_HOME", str(self.folder / "driver"))
        layout = sisa.train(self.recipe(ledger=postgres_url), executor="inline").opened.layout
        monkeypatch.setenv("XDG_CACHE_HOME", str(self.folder / "worker"))
        assert (self.folder / "worker") in layout.here().waiting_rows(3).parents
        assert layout.here().uri == layout.uri

    def test_a_host_that_can_not_do_without_names_is_refused(
        self, postgres_url: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """What a killed process left there, a deletion from another host could not reach."""
        monkeypatch.setenv("XDG_CACHE_HOME", str(self.folder / "host"))
        real = os.open

        def opened(path: Any, flags: int, *arguments: Any, **options: Any) -> int:
            if flags & os.O_TMPFILE == os.O_TMPFILE:
                raise OSError(95, "Operation not supported")
            return real(path, flags, *arguments, **options)

        monkeypatch.setattr(os, "open", opened)
        with pytest.raises(StoreError, match="no files without a name"):
            sisa.train(self.recipe(ledger=postgres_url), executor="inline")
        assert [path for path in (self.folder / "host").rglob("*") if path.is_file()] == []


class TestLocal(Streamed, InFolder):
    pass


@pytest.mark.slow
class TestBucket(StreamedBesideBucket):
    versioned = False


class TestVersionedBucket(StreamedBesideBucket):
    versioned = True
