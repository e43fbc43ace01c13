"""Additions and corrections on every medium: what left is in no version of anything, whatever happened on the way."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import crash_kit
import pyarrow as pa
import pyarrow.parquet as papq
import pytest
from life_kit import PEOPLE, InBucket, InFolder, Killed, Medium, state
from postgres_kit import Server
from s3_kit import S3Server
from tables import without

import sisa
from sisa.coordination.files import FolderLock
from sisa.deletion.accept import accept
from sisa.deletion.incoming import sweep_held
from sisa.errors import DamagedError, LostLockError, StoreError, UserError
from sisa.ledger import Target
from sisa.ledger.generations import Generations
from sisa.ledger.partitions import Partitions
from sisa.ledger.requests import Requests
from sisa.progress import Silent
from sisa.records import parts
from sisa.routing.keys import exclusion_digest
from sisa.store import grow
from sisa.store.store import Store

ADDED = crash_kit.more_people(24, generation=1)
BOTH = pa.concat_tables([PEOPLE, ADDED.select(PEOPLE.column_names)])


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    with S3Server().running() as running:
        yield running


def corrected(table: pa.Table, records: Sequence[str]) -> pa.Table:
    """The table with another x in some rows."""
    pairs = zip(table["record"].to_pylist(), table["x"].to_pylist(), strict=True)
    new = [value + 1.5 if record in records else value for record, value in pairs]
    return table.set_column(table.column_names.index("x"), "x", pa.array(new))


def said(table: pa.Table, records: Sequence[str]) -> list[str]:
    """What some rows say, as it would be read in them."""
    pairs = zip(table["record"].to_pylist(), table["x"].to_pylist(), strict=True)
    return [repr(value) for record, value in pairs if record in records]


def sweep_once() -> Callable[..., None]:
    """Sweeps when a command begins; when it would clean up, it is dead."""
    calls: list[object] = []

    def sweep(*arguments: Any) -> None:
        calls.append(arguments)
        if len(calls) > 1:
            raise Killed
        sweep_held(*arguments)

    return sweep


class Grown(Medium):
    """Inherited by each medium."""

    def place(self, record: str) -> tuple[int, int]:
        """Where the key places a row of either table; slice 0 is the holdout."""
        owners = dict(zip(BOTH["record"].to_pylist(), BOTH["person"].to_pylist(), strict=True))
        place: tuple[int, int] = self.opened().opened.router.route_one(owners[record])
        return place

    def some(self) -> list[str]:
        """Rows of the first slices, of the generation, and held out ones, of both shards."""
        found = {(self.place(record), record[0]): record for record in BOTH["record"].to_pylist()}
        return sorted(found.values())

    def leaver(self) -> str:
        """Somebody with rows in the first table and in the second, trained on."""
        there = set(PEOPLE["person"].to_pylist())
        route = self.opened().opened.router.route_one
        return next(p for p in ADDED["person"].to_pylist() if p in there and route(p)[1] == 1)

    def records_of(self, person: str) -> list[str]:
        return BOTH.filter(pa.array([p == person for p in BOTH["person"].to_pylist()]))["record"].to_pylist()

    def source(self, name: str, table: pa.Table) -> Path:
        papq.write_table(table, self.folder / f"{name}.parquet")
        return self.folder / f"{name}.parquet"

    def correction(self, records: Sequence[str]) -> Path:
        keep = pa.array([record in records for record in BOTH["record"].to_pylist()])
        return self.source("corrected", corrected(BOTH, records).filter(keep))

    def grown(self) -> Store:
        store = self.train()
        store.add(self.source("added", ADDED), executor="inline")
        return store

    def fresh(self, records: Sequence[str] = (), *gone: str) -> dict[tuple[int, int], tuple[str, str]]:
        """Trained and grown from nothing in a folder, on corrected rows and without some people."""
        first, second = (without(corrected(table, records), people=gone) for table in (PEOPLE, ADDED))
        store = self.elsewhere(first)
        store.add(self.source("fresh-added", second), executor="inline")
        found = state(store)
        store.close()
        return found

    def check_whole(self) -> None:
        """Nothing is left of what was on the way, and a sceptic finds nothing."""
        assert not [key for key in self.raw() if key.startswith(("incoming", "corrections", "beside/incoming"))]
        assert self.opened().verify(replay="all", executor="inline").problems == []

    def test_a_life_with_an_addition_a_correction_and_a_deletion(self) -> None:
        store = self.grown()
        assert state(store) == self.fresh()
        records, person = self.some(), self.leaver()
        assert len(records) > 4
        assert len({self.place(record)[1] == 0 for record in records}) == 2
        old, new = said(BOTH, records), said(corrected(BOTH, records), records)
        assert self.holding(*old), "the test must be able to fail"
        before = self.raw()
        tainted = [row.key for row in store.opened.ledger.stages.all()]
        done = store.correct(self.correction(records), executor="inline")
        assert (done.state, done.records) == ("repaired", len(records))
        assert not self.holding(*old)
        assert len(self.holding(*new)) >= 4
        seen = {before[key] for key in before if "/c." in key and any(key_ in key for key_ in tainted)}
        assert not seen & set(self.raw().values())
        assert state(store) == self.fresh(records)
        store.delete(subjects=[person], executor="inline")
        assert not self.holding(person, *self.records_of(person))
        assert state(self.opened()) == self.fresh(records, person)
        assert self.train().training.stages_trained == 0  # its source still says all of the old
        assert not self.holding(person, *old)
        self.check_whole()

    def test_the_same_life_with_slices_of_several_files(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(parts, "MOST_ROWS", 2)
        self.test_a_life_with_an_addition_a_correction_and_a_deletion()
        assert [key for key in self.raw() if "-of-" in key]

    def test_what_is_on_the_way_is_no_part_of_the_store(self) -> None:
        """Deferred, repeated, refused: the same words as in a folder."""
        store = self.train()
        source = self.source("added", ADDED)
        assert store.add(source, defer=True).stages_trained == 0
        done = store.add(source, executor="inline")
        assert (done.generation, done.repeated, done.stages_trained) == (1, True, 2)
        with pytest.raises(UserError, match="have a record id that is in the store already"):
            store.add(self.source("part", ADDED.slice(0, 3)), executor="inline")
        with pytest.raises(UserError, match="1 of 1 rows have a record id that is not in the store"):
            store.correct(self.source("none", PEOPLE.slice(0, 1).set_column(0, "record", pa.array(["r999"]))))
        self.check_whole()

    # --- killed -----------------------------------------------------------------------------------------

    def add(self) -> None:
        self.opened().add(self.source("added", ADDED), executor="inline")

    def correct(self) -> None:
        self.opened().correct(self.correction(self.chosen), executor="inline")

    def check_killed(self, command: Callable[[], None], expected: Any, *, stride: int, least: int) -> None:
        """Kill a command at writing calls in turn, repeat it, and see that it ends as if it had not been killed."""
        kills = 0
        for number in range(2, 600, stride):
            self.restore()
            try:
                with self.killed_at(number):
                    command()
                break
            except Killed:
                kills += 1
            command()
            assert state(self.opened()) == expected, number
            assert not self.holding(*self.superseded), number
            problems = self.opened().verify(executor="inline").problems
            assert problems == [], number
        assert kills >= least

    @pytest.mark.parametrize("stride", [9, pytest.param(1, marks=pytest.mark.slow)])
    def test_an_addition_killed_at_any_writing_call_ends_the_same(self, stride: int) -> None:
        self.superseded: list[str] = ["nobody"]
        self.keep(self.train())
        self.check_killed(self.add, self.fresh(), stride=stride, least=1)

    @pytest.mark.parametrize("stride", [47, pytest.param(1, marks=pytest.mark.slow)])
    def test_a_correction_killed_at_any_writing_call_ends_the_same(self, stride: int) -> None:
        store = self.grown()
        self.chosen = self.some()[:2]
        self.superseded = said(BOTH, self.chosen)
        self.keep(store)
        self.check_killed(self.correct, self.fresh(self.chosen), stride=stride, least=1)

    @pytest.mark.parametrize("verb", ["add", "correct"])
    @pytest.mark.slow
    def test_who_is_deleted_after_a_killed_command_is_nowhere(self, verb: str) -> None:
        """Neither their old rows nor their new ones, when the deletion is acknowledged as purged."""
        store = self.train() if verb == "add" else self.grown()
        person = self.leaver()
        self.chosen = self.records_of(person)
        self.keep(store)
        kills = 0
        for number in range(3, 600, 2):
            self.restore()
            try:
                with self.killed_at(number):
                    (self.add if verb == "add" else self.correct)()
                break
            except Killed:
                kills += 1
            assert self.opened().delete(subjects=[person], defer=True).state == "stages_purged"
            assert not self.holding(person, *self.records_of(person)), number
            self.opened().repair(executor="inline")
            if verb == "add":
                self.add()
            assert not self.holding(person, *self.records_of(person)), number
            assert state(self.opened()) == self.fresh([], person), number
            self.check_whole()
        assert kills

    @pytest.mark.parametrize("verb", ["add", "correct"])
    def test_who_is_deleted_after_a_command_was_killed_before_its_commit_is_nowhere(self, verb: str) -> None:
        """All of its rows lie there by then, and nobody expects them."""
        store = self.train() if verb == "add" else self.grown()
        person = self.leaver()
        self.chosen = self.records_of(person)

        def killed(*_: object, **__: object) -> None:
            raise Killed

        with (
            mock.patch.object(Generations, "publish", killed),
            mock.patch.object(Requests, "accept_correction", killed),
            mock.patch("sisa.store.grow.sweep_held", sweep_once()),
            mock.patch("sisa.store.correct.sweep_held", killed),
            pytest.raises(Killed),
        ):
            (self.add if verb == "add" else self.correct)()
        left = [key for key in self.raw() if "/slice=03/" in key or key.startswith("corrections/")]
        assert left if verb == "correct" else len(left) == 2, "the test must be able to fail"
        assert store.delete(subjects=[person], defer=True).state == "stages_purged"
        assert not self.holding(person, *self.records_of(person), *said(corrected(BOTH, self.chosen), self.chosen))
        store.repair(executor="inline")
        if verb == "add":
            self.add()
        assert state(self.opened()) == self.fresh([], person)
        self.check_whole()

    # --- races ------------------------------------------------------------------------------------------

    def test_who_is_deleted_while_rows_are_written_is_dropped_before_they_are_published(self) -> None:
        store, publish, accepted = self.train(), Generations.publish, []
        person = self.leaver()

        def overtaken(generations: Generations, *arguments: Any, **options: Any) -> bool:
            if not accepted:  # what `delete` commits; in this thread it would wait for us
                other = self.opened().opened
                key, place = other.keys.exclusion, other.router.route_one(person)
                there = [record for record in self.records_of(person) if record in PEOPLE["record"].to_pylist()]
                names = [exclusion_digest(key, "record", record) for record in there]
                target = Target("subject", exclusion_digest(key, "subject", person), (place,), tuple(names))
                accepted.append(other.ledger.requests.accept([target], reason=""))
                other.close()
            return publish(generations, *arguments, **options)

        with mock.patch.object(Generations, "publish", overtaken):
            store.add(self.source("added", ADDED), executor="inline")
        store.repair(executor="inline")
        assert not self.holding(person, *self.records_of(person))
        assert state(store) == self.fresh([], person)
        self.check_whole()

    def test_a_deletion_waits_for_rows_that_are_being_written(self) -> None:
        """It is acknowledged at once; that rows are erased it says when no unexpected one of theirs is left."""
        self.check_waiting(self.train(), lambda: None)

    def check_waiting(self, store: Store, move: Callable[[], None]) -> None:
        """Delete from another thread, on another host after ``move``, while an addition writes."""
        write = grow.write_generation
        person, waits, deleting = self.leaver(), threading.Event(), []

        class Hearing(Silent):
            def note(self, text: str) -> None:
                if "being added" in text:
                    waits.set()

        def delete() -> None:
            sisa.open_store(self.recipe()["store"]).delete(subjects=[person], defer=True, reporter=Hearing())

        def overtaken(*arguments: Any, **options: Any) -> Any:
            written = write(*arguments, **options)
            move()
            deleting.append(threading.Thread(target=delete))
            deleting[0].start()
            assert waits.wait(60)
            (request,) = store.opened.ledger.requests.all()
            assert request.state == "accepted"
            assert self.holding(*self.records_of(person))
            return written

        with mock.patch.object(grow, "write_generation", overtaken):
            store.add(self.source("added", ADDED), defer=True)
        deleting[0].join()
        assert not self.holding(person, *self.records_of(person))
        store.repair(executor="inline")
        assert state(store) == self.fresh([], person)
        self.check_whole()

    def test_a_deletion_while_a_correction_is_looked_up_is_seen(self) -> None:
        """Before the mark: it has swept already. After it: it waits. In neither case does a new row outlive it."""
        store = self.grown()
        person, real, deleted = self.leaver(), Requests.accept_correction, []
        self.chosen = self.records_of(person)

        def overtaken(requests: Requests, *arguments: Any, **options: Any) -> Any:
            if not deleted:
                other = self.opened()
                deleted.append(accept(other.opened, subjects=[person]))
                other.close()
            return real(requests, *arguments, **options)

        with (
            mock.patch.object(Requests, "accept_correction", overtaken),
            pytest.raises(UserError, match="deleted people's"),
        ):
            store.correct(self.correction(self.chosen), executor="inline")
        assert not self.holding(person, *self.records_of(person))
        store.repair(executor="inline")
        self.check_whole()

    # --- who lost the lock ------------------------------------------------------------------------------

    @pytest.mark.parametrize("verb", ["add", "correct"])
    def test_who_lost_the_lock_publishes_nothing_and_what_is_left_is_named_and_erased(self, verb: str) -> None:
        store = self.train() if verb == "add" else self.grown()
        self.chosen = self.some()
        before, checks = state(store), [0]

        def lost(_: object) -> None:
            checks[0] += 1
            if checks[0] > 4:
                raise LostLockError("lost")

        with mock.patch.object(FolderLock, "check", lost), pytest.raises(LostLockError):
            (self.add if verb == "add" else self.correct)()
        assert state(self.opened()) == before
        left = [
            key for key in self.raw() if key.startswith(("incoming/", "corrections/", "records/shard=0000/slice=03"))
        ]
        problems = self.opened().verify(executor="inline").problems
        assert left
        assert problems
        assert all("left by a command that was killed" in p or "unfinished file" in p for p in problems), problems
        self.opened().repair(executor="inline")
        assert self.opened().verify(executor="inline").problems == []
        (self.add if verb == "add" else self.correct)()
        assert state(self.opened()) == self.fresh(self.chosen if verb == "correct" else [])
        self.check_whole()

    @pytest.mark.parametrize("key", ["records/shard=0001/slice=03/part-00000.parquet", "corrections/cor-0/records/x"])
    def test_rows_that_come_late_are_named_and_erased(self, key: str) -> None:
        """A writer that stood still for long puts its rows after everybody else has swept: there is no mark."""
        self.train()
        content = next(content for name, content in self.raw().items() if name.endswith(".parquet"))
        self.change(key, content)
        problems = self.opened().verify(executor="inline").problems
        assert problems
        assert all(problem.startswith(key.split("/x", maxsplit=1)[0].rpartition("/")[0]) for problem in problems), (
            problems
        )
        self.opened().repair(executor="inline")
        assert key not in self.raw()
        self.check_whole()
        self.change(key, content)
        self.add()
        assert state(self.opened()) == self.fresh()

    def test_rows_that_wait_and_are_lost_are_no_empty_correction(self) -> None:
        store = self.grown()
        self.chosen = self.some()[:1]

        def killed(*_: object, **__: object) -> None:
            raise Killed

        with mock.patch.object(Partitions, "prepare_erasure", killed), pytest.raises(Killed):
            self.correct()
        store.close()
        waiting = [key for key in self.raw() if key.startswith("corrections/") and key.endswith(".parquet")]
        content = self.raw()[waiting[0]]
        for broken in (None, content[:90] + bytes([content[90] ^ 1]) + content[91:]):
            self.change(waiting[0], broken)
            with pytest.raises(DamagedError, match=r"corrections/cor-.*the rows that wait .* are (lost|damaged)"):
                self.opened().repair(executor="inline")
            assert any("corrections/cor-" in problem for problem in self.opened().verify(executor="inline").problems)
        self.change(waiting[0], content)
        self.opened().repair(executor="inline")
        assert state(self.opened()) == self.fresh(self.chosen)
        self.check_whole()


class GrownInBucket(Grown, InBucket):
    """With a ledger on a server, where hosts share nothing and locks can be lost indeed."""

    def test_a_deletion_on_another_host_waits_for_rows_that_are_being_written(
        self, postgres_url: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """All that it can know of them is in the bucket."""
        monkeypatch.setenv("XDG_CACHE_HOME", str(self.folder / "one"))
        store = sisa.train(self.recipe(ledger=postgres_url), executor="inline")
        self.check_waiting(store, lambda: monkeypatch.setenv("XDG_CACHE_HOME", str(self.folder / "two")))

    def test_hosts_that_lose_their_sessions_publish_nothing_and_others_go_on(
        self, postgres: Server, postgres_url: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        asked = self.recipe(ledger=postgres_url)
        monkeypatch.setenv("XDG_CACHE_HOME", str(self.folder / "one"))
        store = sisa.train(asked, executor="inline")
        person, real = self.leaver(), grow.write_generation

        def cut_off(*arguments: Any, **options: Any) -> Any:
            written = real(*arguments, **options)
            postgres.end_sessions()
            return written

        with mock.patch.object(grow, "write_generation", cut_off), pytest.raises(StoreError):
            store.add(self.source("added", ADDED), executor="inline")
        assert self.holding(*self.records_of(person))
        assert [path for path in (self.folder / "one").rglob("*") if path.is_file()] == []
        monkeypatch.setenv("XDG_CACHE_HOME", str(self.folder / "two"))
        other = sisa.open_store(asked["store"])
        assert any("incoming/" in problem for problem in other.verify(executor="inline").problems)
        other.delete(subjects=[person], defer=True)
        assert not self.holding(person, *self.records_of(person))
        other.repair(executor="inline")
        other.add(self.source("added", ADDED), executor="inline")
        assert state(other) == self.fresh([], person)
        assert other.verify(replay="all", executor="inline").problems == []


class TestLocal(Grown, InFolder):
    pass


@pytest.mark.slow
class TestBucket(GrownInBucket):
    versioned = False


class TestVersionedBucket(GrownInBucket):
    versioned = True
