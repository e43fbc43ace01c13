"""A whole store whose ledger, locks and marks lie on a PostgreSQL server."""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from subprocess import DEVNULL
from typing import Any

import crash_kit as kit
import psycopg
import pyarrow as pa
import pyarrow.parquet as papq
import pytest
from postgres_kit import WORKER, Server, running
from race_kit import wait_until

import sisa.opening
from sisa.checkpoints import CheckpointStore
from sisa.cli.main import run
from sisa.deletion import settle as settling
from sisa.deletion.incoming import sweep_incoming
from sisa.errors import DamagedError, LostError, LostLockError, RecipeError, StoreError, UserError
from sisa.execution import build as building
from sisa.ledger import REVISION, PostgresPlace, place_of
from sisa.ledger import session as sessions
from sisa.ledger.generations import Generations
from sisa.ledger.requests import Requests
from sisa.progress import Silent
from sisa.records import write as writing
from sisa.store.store import Store
from sisa.training import chain

TABLE = kit.people(12)


@pytest.fixture
def recipe(tmp_path: Path, postgres_url: str) -> dict[str, Any]:
    return {**kit.make_recipe(tmp_path, TABLE), "ledger": postgres_url}


@pytest.fixture
def store(recipe: dict[str, Any], tmp_path: Path) -> Iterator[Store]:
    made = kit.trained(recipe, tmp_path / "store")
    yield made
    made.close()


@pytest.fixture(autouse=True)
def _nobody_left() -> Iterator[None]:
    yield
    kit.Child.kill_all()


@pytest.fixture
def people(store: Store) -> dict[tuple[int, int], list[str]]:
    found: dict[tuple[int, int], list[str]] = {}
    for person, place in kit.places(store, TABLE).items():
        found.setdefault(place, []).append(person)
    return found


def digests(store: Store) -> list[tuple[object, ...]]:
    """What has been trained, to the bit."""
    return sorted((r.shard, r.stage, r.key, r.full_digest) for r in store.opened.ledger.stages.all() if not r.tainted)


def assert_whole(store: Store, replay: Any = "all") -> None:
    found = store.verify(replay=replay, executor="inline")
    assert (found.problems, found.ok) == ([], True)


def schemas(postgres: Server) -> list[str]:
    return [row[0] for row in postgres.ask("SELECT nspname FROM pg_namespace WHERE nspname LIKE 'sisa%' ORDER BY 1")]


# --- one store, either engine -----------------------------------------------------------------------


def test_the_engine_changes_nothing_that_was_trained_or_forgotten(
    store: Store, recipe: dict[str, Any], tmp_path: Path, people: dict[tuple[int, int], list[str]]
) -> None:
    embedded = kit.trained({**recipe, "ledger": None}, tmp_path / "embedded")
    assert digests(store) == digests(embedded)
    assert_whole(store)
    gone = people[1, 2][0]
    done = [each.delete(subjects=[gone], executor="inline") for each in (store, embedded)]
    assert [each.state for each in done] == ["repaired", "repaired"]
    assert digests(store) == digests(embedded)
    assert_whole(store)
    again = store.delete(subjects=[gone], executor="inline")
    assert (again.repeated, again.request) == (True, done[0].request)
    embedded.close()


def test_a_purge_leaves_no_key_and_no_digest_in_the_servers_files(
    postgres: Server, postgres_url: str, tmp_path: Path
) -> None:
    """With them, the other rows and the routing key a guess about who was deleted could be tested."""
    table = kit.people(60)
    recipe = {**kit.make_recipe(tmp_path, table), "ledger": postgres_url}
    (tmp_path / "routing.key").write_text(secrets.token_hex(32))  # so that no other store on the server has the same
    store = kit.trained(recipe, tmp_path / "store")
    person = next(person for person, place in kit.places(store, table).items() if place == (1, 2))
    ledger = store.opened.ledger
    (purged,) = [row for row in ledger.stages.all(1) if row.stage == 2]
    traces = [purged.key, purged.state_digest, purged.full_digest, ledger.partitions.get(1, 2).membership]

    def left() -> list[str]:
        postgres.ask("CHECKPOINT")
        files = [path.read_bytes() for path in (postgres.data / "base").rglob("*") if path.is_file()]
        return [trace for trace in traces if any(trace.encode() in content for content in files)]

    assert left() == traces
    store.delete(subjects=[person], executor="inline", defer=True)
    assert left() == []
    store.close()


def test_the_store_holds_no_ledger_no_locks_and_no_secret(store: Store, postgres: Server) -> None:
    root = store.opened.layout.root
    assert {path.name for path in root.iterdir()} == {"recipe.yaml", "records", "checkpoints", "keys"}
    text = (root / "recipe.yaml").read_text()
    (schema,) = [name for name in schemas(postgres) if name in text]
    assert f"/sisa#{schema}" in text
    assert not [path for path in root.rglob("*") if path.is_file() and postgres.secret.encode() in path.read_bytes()]


def test_two_stores_share_a_database_and_nothing_else(store: Store, recipe: dict[str, Any], tmp_path: Path) -> None:
    other = kit.trained(recipe, tmp_path / "other")
    assert other.opened.place != store.opened.place
    with other.opened.operation_lock().held(timeout_s=0), store.opened.operation_lock().held(timeout_s=0):
        assert other.opened.ledger.versions.live_number() == store.opened.ledger.versions.live_number() == 1
    other.close()


def test_a_stray_ledger_file_and_a_strangers_table_are_problems(store: Store, postgres: Server) -> None:
    (store.opened.layout.root / "ledger.db").write_bytes(b"")
    schema = store.opened.place.schema  # type: ignore[union-attr]
    postgres.ask(f"CREATE TABLE {schema}.notes (x text)")
    postgres.ask(f"INSERT INTO {schema}.marks VALUES (0, 'del-nobody')")
    found = store.verify(executor="inline").problems
    assert any("ledger.db: nobody answers" in problem for problem in found)
    assert any("notes is not what" in problem for problem in found)
    assert any("marks has lines of a request that there is not" in problem for problem in found)


# --- where it lies ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("postgresql://me:hunter2@db/sisa", "holds a password"),
        ("postgresql://me@db/sisa?password=hunter2", "holds a password"),
        ("postgresql://db/sisa?sslpassword=hunter2", "holds a password"),
        ("postgresql://db/sisa?options=-csynchronous_commit%3Doff", "the parameter 'options'"),
        ("postgresql://db:port/sisa", "can't be read"),
        ("postgresql://db/sisa#public", "not the name of a store's schema"),
        ("mysql://me:hunter2@db/sisa", "begins with postgresql://"),
    ],
)
def test_what_a_url_may_not_say_is_refused_before_anything_is_made(
    recipe: dict[str, Any], tmp_path: Path, url: str, message: str
) -> None:
    with pytest.raises(UserError, match=message) as refused:
        kit.train({**recipe, "ledger": url}, store=tmp_path / "new", executor="inline")
    assert "hunter2" not in refused.value.message + refused.value.hint
    assert refused.value.exit_code == 2
    assert not (tmp_path / "new").exists()


def test_without_a_driver_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(UserError, match="psycopg is not installed") as refused:
        place_of("postgresql://db/sisa", Path("unused"))
    assert "sisa[postgres]" in refused.value.hint


def test_what_is_shown_of_a_place_has_no_parameters() -> None:
    place = place_of("postgres://me@db:5433/sisa?sslmode=require&service=x", Path("unused"))
    assert place.shown == "postgresql://me@db:5433/sisa"  # type: ignore[union-attr]
    assert place_of("postgresql:///sisa?host=/run/pg", Path()).url == "postgresql:///sisa?host=%2Frun%2Fpg"  # type: ignore[union-attr]


def test_another_ledger_than_the_stores_is_a_difference(store: Store, recipe: dict[str, Any]) -> None:
    for other in (None, "postgresql://elsewhere/sisa"):
        with pytest.raises(RecipeError, match="ledger: the store has 'postgresql://operator"):
            kit.train({**recipe, "ledger": other}, store=store.opened.layout.root, executor="inline")


def test_a_database_that_moved_is_followed_and_a_strangers_is_refused(
    store: Store, recipe: dict[str, Any], tmp_path: Path
) -> None:
    """Its URL may be edited: the ledger itself says whose it is."""
    frozen = store.opened.layout.recipe
    text = frozen.read_text()
    frozen.write_text(text.replace("127.0.0.1", "localhost"))
    kit.reopened(store.opened.layout.root).close()
    other = kit.trained({**recipe, "sisa": {"shards": 1, "slices": 1}}, tmp_path / "other")
    frozen.write_text(text.replace(store.opened.place.text, other.opened.place.text))  # type: ignore[union-attr]
    with pytest.raises(DamagedError, match=r"recipe\.yaml of the store was edited"):
        kit.reopened(store.opened.layout.root)
    other.close()


# --- making it --------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", ["before the ledger", "before the recipe"])
def test_a_creation_that_was_cut_off_is_made_again_and_leaves_nothing(
    recipe: dict[str, Any], tmp_path: Path, postgres: Server, monkeypatch: pytest.MonkeyPatch, stop: str
) -> None:
    before = schemas(postgres)

    def cut(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(sisa.opening, "frozen_recipe" if stop == "before the ledger" else "dump_recipe", cut)
        if stop == "before the recipe":
            real = sisa.opening.write_durably
            patch.undo()
            patch.setattr(
                sisa.opening, "write_durably",
                lambda path, *rest, **more: cut() if path.name == "recipe.yaml" else real(path, *rest, **more),
            )  # fmt: skip
        with pytest.raises(KeyboardInterrupt):
            kit.train(recipe, store=tmp_path / "new", executor="inline")
    assert len(schemas(postgres)) == len(before) + (stop == "before the recipe")
    made = kit.trained(recipe, tmp_path / "new")
    assert len(schemas(postgres)) == len(before) + 1
    assert_whole(made, replay="none")
    made.close()


def test_a_store_that_lost_its_recipe_is_not_made_anew(store: Store, recipe: dict[str, Any]) -> None:
    root = store.opened.layout.root
    (root / "recipe.yaml").unlink()
    for path in (root / "records").rglob("*.parquet"):
        path.unlink()
    with pytest.raises(DamagedError, match=r"whose recipe\.yaml is missing"):
        kit.train(recipe, store=root, executor="inline")


# --- locks that are lost ----------------------------------------------------------------------------


def end_lock_sessions(postgres: Server, store: Store, name: str) -> int:
    """Have the server end whoever holds a lock, as it does with a host that is gone."""
    from sisa.coordination.postgres import lock_number

    number = lock_number(f"{store.opened.place.schema}/{name}")  # type: ignore[union-attr]
    return len(
        postgres.ask(
            "SELECT pg_terminate_backend(pid) FROM pg_locks WHERE locktype = 'advisory' AND granted"
            " AND (classid::bigint << 32) | objid::bigint = %s::bigint", number,
        )
    )  # fmt: skip


@pytest.mark.parametrize("moment", ["while it trains", "before it is written", "before it is told"])
def test_a_stage_whose_lock_was_lost_is_not_told_and_does_not_stay(
    store: Store,
    postgres: Server,
    people: dict[tuple[int, int], list[str]],
    monkeypatch: pytest.MonkeyPatch,
    moment: str,
) -> None:
    store.delete(subjects=[people[1, 1][0]], defer=True)
    expected = store.opened.ledger.stages.all()
    real_train, real_write, lost = chain.train_stage, CheckpointStore.write, []

    def lose() -> None:
        if not lost:
            lost.append(end_lock_sessions(postgres, store, "shard-0001"))

    def train_stage(**arguments: Any) -> Any:
        if moment == "while it trains":
            lose()
            return real_train(**arguments)
        state = real_train(**arguments)
        if moment == "before it is written":
            lose()
        return state

    def write(self: Any, *arguments: Any, **more: Any) -> Any:
        manifest = real_write(self, *arguments, **more)
        if moment == "before it is told":
            lose()
        return manifest

    with monkeypatch.context() as patch:
        patch.setattr(chain, "train_stage", train_stage)
        patch.setattr(CheckpointStore, "write", write)
        with pytest.raises(LostLockError, match="shard-0001 was lost"):
            store.repair(executor="inline")
    assert lost == [1]
    assert [row for row in store.opened.ledger.stages.all() if row.shard == 1] == [r for r in expected if r.shard == 1]
    assert store.opened.checkpoints.list_shard(1) == []  # what was written is swept under the lock
    store.repair(executor="inline")
    assert_whole(store)


def test_a_driver_that_lost_the_operation_publishes_nothing(
    store: Store, postgres: Server, people: dict[tuple[int, int], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    store.delete(subjects=[people[0, 1][0]], defer=True)
    version, real = store.version, chain.train_stage

    def train_stage(**arguments: Any) -> Any:
        end_lock_sessions(postgres, store, "operation")
        return real(**arguments)

    with monkeypatch.context() as patch:
        patch.setattr(chain, "train_stage", train_stage)
        with pytest.raises(LostLockError, match="operation was lost"):
            store.repair(executor="inline")
    assert store.version == version
    store.repair(executor="inline")
    assert_whole(store)


def test_an_ingest_that_was_overtaken_replaces_nothing(
    recipe: dict[str, Any], tmp_path: Path, postgres: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its host was away for so long that another one ingested, trained and deleted."""
    root, real = tmp_path / "store", writing._write_partitions
    gone: list[str] = []

    def write_partitions(*arguments: Any) -> Any:
        counts = real(*arguments)
        monkeypatch.setattr(writing, "_write_partitions", real)
        slow = kit.reopened(root)
        for name in ("operation", "ingest"):
            assert end_lock_sessions(postgres, slow, name) == 1
        other = kit.trained(recipe, root)
        gone.append(next(iter(kit.places(other, TABLE))))
        other.delete(subjects=gone, executor="inline")
        return counts

    monkeypatch.setattr(writing, "_write_partitions", write_partitions)
    with pytest.raises(LostLockError, match="was lost"):
        kit.trained(recipe, root)
    store = kit.reopened(root)
    assert gone[0] not in set().union(*kit.owners_on_disk(root).values())
    assert_whole(store)


def correction_of(table: pa.Table, folder: Path) -> Path:
    changed = table.slice(0, 3)
    values = pa.array([value + 3.0 for value in changed["x"].to_pylist()])
    papq.write_table(changed.set_column(changed.schema.get_field_index("x"), "x", values), folder / "corrected.parquet")
    return folder / "corrected.parquet"


def addition(folder: Path) -> Path:
    more = kit.people(9).slice(0, 18)
    names = [f"new-{name}" for name in more["record"].to_pylist()]
    people = [f"new-{name}" for name in more["person"].to_pylist()]
    more = more.set_column(more.schema.get_field_index("record"), "record", pa.array(names))
    papq.write_table(
        more.set_column(more.schema.get_field_index("person"), "person", pa.array(people)), folder / "more.parquet"
    )
    return folder / "more.parquet"


@pytest.mark.parametrize("what", ["correction", "addition"])
def test_rows_whose_lock_was_lost_before_they_were_accepted_are_not_accepted(
    store: Store, postgres: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """Another host holds the lock by then, and has swept them: the ledger must not expect them."""
    owner, name = (Requests, "accept_correction") if what == "correction" else (Generations, "publish")
    real, other = getattr(owner, name), kit.reopened(store.opened.layout.root)

    def late(self: Any, *arguments: Any, **options: Any) -> Any:
        assert end_lock_sessions(postgres, store, "incoming") == 1
        sweep_incoming(other.opened, Silent())
        return real(self, *arguments, **options)

    def do(to: Store) -> Any:
        if what == "correction":
            return to.correct(correction_of(TABLE, tmp_path), executor="inline").state
        return to.add(addition(tmp_path), executor="inline").generation

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, late)
        with pytest.raises(LostLockError):
            do(store)
    assert_whole(other, replay="none")
    assert do(other) == ("repaired" if what == "correction" else 1)
    assert_whole(other)
    other.close()


def test_what_is_being_committed_when_its_command_is_killed_is_not_swept(
    store: Store, postgres: Server, tmp_path: Path
) -> None:
    """A commit that waits for its standby is seen by nobody yet, and takes effect all the same."""
    source, root = correction_of(TABLE, tmp_path), store.opened.layout.root
    postgres.ask("ALTER SYSTEM SET synchronous_standby_names = 'nobody'")
    postgres.ask("SELECT pg_reload_conf()")
    try:
        command = [sys.executable, "-m", "sisa", "correct", "--store", str(root), "--source", str(source)]
        killed = subprocess.Popen([*command, "--executor", "inline"], stdout=DEVNULL, stderr=DEVNULL)
        syncing = "SELECT 1 FROM pg_stat_activity WHERE wait_event = 'SyncRep'"
        wait_until(lambda: bool(postgres.ask(syncing)) or killed.poll() is not None, "it commits")
        assert killed.poll() is None
        killed.kill()
        killed.wait()
    finally:
        later = threading.Timer(1.0, lambda: _without_standby(postgres))
        later.start()
    again = kit.reopened(root)
    assert again.correct(source, executor="inline").state == "repaired"
    later.join()
    assert_whole(again)
    assert again.status()["records"] + again.status()["holdout_records"] == len(TABLE)
    again.close()


def _without_standby(postgres: Server) -> None:
    postgres.ask("ALTER SYSTEM RESET synchronous_standby_names")
    postgres.ask("SELECT pg_reload_conf()")


def test_rows_that_a_zombie_put_back_are_erased_by_the_next_repair(
    store: Store, postgres: Server, people: dict[tuple[int, int], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It lost its lock between its last look and its rename: the older file takes the place of the newer one."""
    first, second = people[0, 2][:2]
    real = settling.rewrite_partition
    other = kit.reopened(store.opened.layout.root)

    def frozen(layout: Any, shard: int, slice_: int, keep_N: Any, rows: Any) -> None:
        end_lock_sessions(postgres, store, f"rows-{shard:04d}")
        monkeypatch.setattr(settling, "rewrite_partition", real)
        other.delete(subjects=[second], defer=True)
        real(layout, shard, slice_, keep_N, rows)  # the zombie goes on, and knows nothing of the second

    monkeypatch.setattr(settling, "rewrite_partition", frozen)
    with pytest.raises(LostLockError):
        store.delete(subjects=[first], defer=True)
    on_disk = {owner for rows in kit.owners_on_disk(store.opened.layout.root).values() for owner in rows}
    assert second in on_disk  # that is the hole: nobody reads this file as whole, and it is told
    assert not store.verify(executor="inline").ok
    store.repair(executor="inline")
    on_disk = {owner for rows in kit.owners_on_disk(store.opened.layout.root).values() for owner in rows}
    assert not {first, second} & on_disk
    assert_whole(store)
    other.close()


def hold(root: Path, name: str) -> None:
    opened = kit.reopened(root).opened
    with opened.coordination.lock(name).held(timeout_s=0):
        kit.to_parent.send(("told", os.getpid()))
        kit.to_parent.recv()


def test_a_holder_that_is_killed_lets_go(store: Store) -> None:
    child = kit.Child(hold, store.opened.layout.root, "operation")
    _, pid = child.hear()
    with pytest.raises(StoreError, match=f":{pid}, operation"), store.opened.operation_lock().held(timeout_s=0):
        pass
    os.kill(pid, signal.SIGKILL)
    with store.opened.operation_lock().held(timeout_s=kit.PATIENCE_S) as held:
        held.check()


# --- many who delete --------------------------------------------------------------------------------


def delete(root: Path, subjects: list[str]) -> list[str]:
    """Ask for each of these people by a request of their own, and once more for all."""
    store = kit.reopened(root)
    asked = [store.delete(subjects=[each], defer=True).request for each in subjects]
    again = store.delete(subjects=subjects, defer=True)
    assert again.repeated
    assert set(again.requests) == set(asked)
    return asked


def test_many_processes_delete_the_same_people_while_repairs_run(
    store: Store, people: dict[tuple[int, int], list[str]]
) -> None:
    root = store.opened.layout.root
    names = [person for _, there in sorted(people.items()) for person in there[:2]]
    lists = [names[:5], names[2:], names[::-1]]
    children = [kit.Child(delete, root, subjects) for subjects in lists]
    numbers, ended = [store.version], threading.Event()

    def repair() -> None:
        repairing = kit.reopened(root)
        while not ended.is_set():
            repairing.repair(executor="inline")
            numbers.append(repairing.version)
        repairing.close()

    thread = threading.Thread(target=repair)
    thread.start()
    told = [child.hear() for child in children]
    ended.set()
    thread.join(kit.PATIENCE_S)
    assert [kind for kind, _ in told] == ["done"] * 3, told
    request_of: dict[str, str] = {}
    for subjects, (_, asked) in zip(lists, told, strict=True):
        for person, request in zip(subjects, asked, strict=True):
            assert request_of.setdefault(person, request) == request
    assert len({*request_of.values()}) == len(names) == len(store.opened.ledger.requests.all())
    assert numbers == sorted(numbers)
    store.repair(executor="inline")
    assert {request.state for request in store.opened.ledger.requests.all()} == {"repaired"}
    assert [number for number, _, _ in store.opened.ledger.versions.all()] == list(range(1, store.version + 1))
    assert_whole(store)


# --- a server that goes away ------------------------------------------------------------------------


def test_a_connection_lost_while_committing_is_no_success_and_repeating_is_the_same_request(
    store: Store, postgres: Server, people: dict[tuple[int, int], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worst of it: the commit took effect, and its answer was lost."""
    person, real = people[0, 1][0], psycopg.Connection.execute

    def execute(self: Any, query: Any, *rest: Any, **more: Any) -> Any:
        done = real(self, query, *rest, **more)
        if query == "COMMIT":
            monkeypatch.setattr(psycopg.Connection, "execute", real)
            postgres.end_sessions()
            return real(self, "SELECT 1")
        return done

    monkeypatch.setattr(psycopg.Connection, "execute", execute)
    with pytest.raises(LostError, match="nobody knows whether it took effect"):
        store.delete(subjects=[person], defer=True)
    store.close()
    again = kit.reopened(store.opened.layout.root)
    (request,) = again.opened.ledger.requests.all()
    answered = again.delete(subjects=[person], executor="inline")
    assert (answered.request, answered.repeated, answered.state) == (request.id, True, "repaired")
    assert_whole(again)
    again.close()


def test_a_session_that_ended_within_a_snapshot_is_lost_to_whoever_writes_next(store: Store, postgres: Server) -> None:
    database = store.opened.ledger.database
    with database.snapshot():
        postgres.end_sessions()  # noticed by nobody until the snapshot is let go
    with pytest.raises(LostError), database.transaction():
        pytest.fail("nothing can be written")
    with pytest.raises(LostError), database.snapshot():
        pytest.fail("nothing can be read")


def test_a_commit_that_gave_up_on_its_standby_is_no_success(store: Store, postgres: Server) -> None:
    """Whoever cancels the wait gets a warning and a success: the change is on the server's own disk, and on no other."""
    ended, cancelled = threading.Event(), []

    def cancel() -> None:
        while not ended.wait(0.05):
            waiting = "SELECT pg_cancel_backend(pid) FROM pg_stat_activity WHERE wait_event = 'SyncRep'"
            cancelled.extend(postgres.ask(waiting))

    def remember_often() -> None:
        while len(cancelled) < 3:  # the server's processes learn of its settings one by one
            store.opened.ledger.remember(code="x")

    canceller = threading.Thread(target=cancel)
    postgres.ask("ALTER SYSTEM SET synchronous_standby_names = 'nobody'")
    postgres.ask("SELECT pg_reload_conf()")
    canceller.start()
    try:
        with pytest.raises(StoreError, match="without its synchronous standby"):
            remember_often()
    finally:
        postgres.ask("ALTER SYSTEM RESET synchronous_standby_names")
        postgres.ask("SELECT pg_reload_conf()")
        ended.set()
        canceller.join()


def test_a_server_that_takes_no_writes_says_so_and_nothing_was_accepted(
    store: Store, postgres: Server, people: dict[tuple[int, int], list[str]]
) -> None:
    postgres.ask("ALTER DATABASE sisa SET default_transaction_read_only = on")
    try:
        cut_off = kit.reopened(store.opened.layout.root)
        with pytest.raises(StoreError, match="read-only"):
            cut_off.delete(subjects=[people[0, 1][0]], defer=True)
        assert cut_off.opened.ledger.requests.all() == []
        cut_off.close()
    finally:
        with psycopg.connect(postgres.dsn, autocommit=True) as elsewhere:
            elsewhere.execute("ALTER DATABASE sisa RESET default_transaction_read_only")


def test_a_server_that_is_frozen_is_given_up_on(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its machine answers for it, so that no keepalive fails."""
    monkeypatch.setattr(sessions, "GRACE_S", 0.1)
    store.opened.ledger.database.be_patient(0.2)
    pid = store.opened.ledger.database.rows("SELECT pg_backend_pid()")[0][0]
    os.kill(pid, signal.SIGSTOP)
    try:
        with pytest.raises(LostError, match="the connection was lost"):
            store.opened.ledger.events()
    finally:
        os.kill(pid, signal.SIGCONT)
    assert store.opened.ledger.database.stale()


def test_nobody_is_let_in_without_the_secret_and_it_is_not_repeated(
    store: Store, postgres: Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PGPASSWORD", "not-the-secret")
    assert run(["status", "--store", str(store.opened.layout.root)]) == 3
    told = capsys.readouterr().err
    assert f"postgresql://operator@127.0.0.1:{postgres.port}/sisa can't be reached" in told
    assert "not-the-secret" not in told


def test_a_server_that_may_lose_commits_is_refused(store: Store, postgres: Server) -> None:
    postgres.ask("ALTER SYSTEM SET fsync = off")
    postgres.ask("SELECT pg_reload_conf()")
    try:
        with pytest.raises(StoreError, match="fsync or full_page_writes off"):
            kit.reopened(store.opened.layout.root)
    finally:
        postgres.ask("ALTER SYSTEM RESET fsync")
        postgres.ask("SELECT pg_reload_conf()")


# --- migrating --------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["sqlite", "postgres"])
def test_migrating_a_store_of_this_release_changes_nothing(
    recipe: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], engine: str
) -> None:
    store = kit.trained({**recipe, "ledger": recipe["ledger"] if engine == "postgres" else None}, tmp_path / "store")
    events = store.opened.ledger.last_event()
    assert run(["migrate", "--store", str(tmp_path / "store"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"schema": REVISION}
    with store.opened.operation_lock().held():
        assert run(["migrate", "--store", str(tmp_path / "store")]) == 3
    assert run(["migrate", "--store", str(tmp_path / "nowhere")]) == 2
    assert store.opened.ledger.last_event() == events
    store.close()


# --- accounts and servers ---------------------------------------------------------------------------


def test_a_worker_trains_with_no_more_than_a_lock_and_the_marks(
    store: Store, postgres: Server, people: dict[tuple[int, int], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The account of its machine is told by the machine; it can read nothing of anybody's history."""
    store.delete(subjects=[people[1, 1][0]], defer=True)
    schema = store.opened.place.schema  # type: ignore[union-attr]
    postgres.ask(f"GRANT USAGE ON SCHEMA {schema} TO {WORKER}")
    postgres.ask(f"GRANT SELECT ON {schema}.marks TO {WORKER}")
    monkeypatch.setenv("PGUSER", WORKER)
    url = postgres.url().replace("operator@", "")
    with contextlib.closing(sessions.Session(PostgresPlace(url, schema))) as session:
        assert session.run("SELECT current_user")[0][0] == WORKER
        with pytest.raises(StoreError, match="doesn't let this account"):
            session.run("SELECT * FROM exclusions")
    real = building.run_inline

    def as_worker(tasks: list[chain.ChainTask], *rest: Any) -> None:
        real([replace(task, ledger=f"{url}#{schema}") for task in tasks], *rest)

    with monkeypatch.context() as patch:
        patch.setattr(building, "run_inline", as_worker)
        assert store.repair(executor="inline").stages_retrained == 2
    assert_whole(store)


def test_an_acknowledged_deletion_survives_the_primary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A synchronous standby takes over; who was connected to the old one is told, and comes back by the URL."""
    with running(synchronous_standby_names="*", synchronous_commit="local") as primary:
        monkeypatch.setenv("PGPASSWORD", primary.secret)
        with running(standby_of=primary) as standby:
            recipe = kit.make_recipe(tmp_path, TABLE)
            hosts = f"postgresql://operator@/sisa?host=127.0.0.1,127.0.0.1&port={primary.port},{standby.port}"
            store = kit.trained({**recipe, "ledger": f"{hosts}&target_session_attrs=read-write"}, tmp_path / "store")
            person = next(name for name, (_, slice_) in kit.places(store, TABLE).items() if slice_ == 1)
            accepted = store.delete(subjects=[person], defer=True)
            frozen = store.opened.layout.recipe
            text = frozen.read_text()
            frozen.write_text(re.sub(r"postgresql://[^#]*", standby.url(), text))
            with pytest.raises(StoreError, match="is a standby"):
                kit.reopened(tmp_path / "store")
            frozen.write_text(text)
            primary.stop(signal.SIGQUIT)
            standby.ask("SELECT pg_promote()", database="postgres")
            standby.ask("ALTER SYSTEM SET synchronous_standby_names = ''", database="postgres")
            standby.ask("SELECT pg_reload_conf()", database="postgres")
            with pytest.raises(LostError):
                store.delete(subjects=[person], defer=True)
            store.close()
            again = kit.reopened(tmp_path / "store")
            answered = again.delete(subjects=[person], executor="inline")
            assert (answered.request, answered.repeated) == (accepted.request, True)
            assert_whole(again)
            again.close()
