"""Real servers, asked without pause by other processes while people are deleted: nobody hears from a deleted person."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import race_kit as kit

import sisa
from sisa.deletion.accept import accept

PEOPLE = 600


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return kit.make_store(tmp_path_factory.mktemp("template"), people=PEOPLE)


@pytest.fixture
def store(template: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(template, tmp_path / "store"))


@pytest.fixture
def board(tmp_path: Path) -> kit.Board:
    return kit.Board(tmp_path / "board")


@pytest.fixture
def people(template: Path) -> Iterator[str]:
    return iter(kit.trained_on(template, people=PEOPLE))


def in_threads(*works: Callable[[], None]) -> None:
    """Run each in a thread of its own; raise what went wrong."""
    errors: list[BaseException] = []

    def run(work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:  # noqa: BLE001 - raised below
            errors.append(error)

    threads = [threading.Thread(target=run, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


@pytest.mark.parametrize(("answers", "deletions"), [(3_000, 16), pytest.param(100_000, 200, marks=pytest.mark.slow)])
def test_nobody_hears_from_the_deleted(
    store: Path, board: kit.Board, people: Iterator[str], answers: int, deletions: int
) -> None:
    """Deletions from two sides at once, and repairs; each question is held against what was acknowledged before it."""
    done: list[kit.Acknowledged] = []
    ended = threading.Event()

    def delete(server: kit.Server | None, crowd: kit.Crowd, names: list[str]) -> None:
        deleter = kit.Deleter(store, board, server=server)
        try:
            for name in names:
                deleter.delete(name)
                crowd.wait_for(answers // deletions)
        finally:
            ended.set()
        done.extend(deleter.done)
        deleter.close()

    def repair() -> None:
        repairer = kit.Deleter(store, board)
        while not ended.is_set():
            repairer.repair()
        repairer.close()

    with kit.serving(store, "--no-repair") as server, kit.crowd(server.address, board) as crowd:
        crowd.wait_for(100)
        names = [next(people) for _ in range(deletions)]
        in_threads(lambda: delete(None, crowd, names[::2]), lambda: delete(server, crowd, names[1::2]), repair)
        crowd.wait_for(max(0, answers - board.answers))
        heard = crowd.end()
    assert (heard.violations, heard.falls, heard.failures) == ([], [], [])
    assert all("no clean constituent" in reason for reason in heard.refused)
    assert heard.answers >= answers
    assert len(done) == deletions
    assert max(heard.versions) >= board.acknowledged
    kit.check_members(store, done)


@pytest.mark.parametrize("swaps", [5, pytest.param(50, marks=pytest.mark.slow)])
def test_a_new_version_costs_nobody_an_answer(store: Path, board: kit.Board, people: Iterator[str], swaps: int) -> None:
    with kit.serving(store, "--no-repair") as server, kit.crowd(server.address, board) as crowd:
        deleter = kit.Deleter(store, board)
        while deleter.store.version < 1 + swaps:
            deleter.delete(next(people))
            crowd.wait_for(50)
            deleter.repair()
            crowd.wait_for(50)
        last = deleter.store.version
        kit.wait_until(lambda: server.predict()[1]["version"] == last, "the last version answers")
        heard = crowd.end()
        deleter.close()
    assert (heard.failures, heard.refused, heard.violations, heard.falls) == ([], {}, [], [])
    assert len(heard.versions) >= swaps // 2  # each quarantine at least: it was waited for


@pytest.mark.parametrize("rounds", [2, pytest.param(25, marks=pytest.mark.slow)])
def test_a_server_that_was_frozen_answers_from_nothing_old(
    store: Path, board: kit.Board, people: Iterator[str], rounds: int
) -> None:
    """It is frozen in the middle of its work, and its lease is waited out; questions wait for it when it goes on."""
    with (
        kit.serving(store, "--no-repair", "--lease", 0.4) as server,
        kit.crowd(server.address, board, processes=1, threads=3) as crowd,
    ):
        deleter = kit.Deleter(store, board)
        for _ in range(rounds):
            crowd.wait_for(40)
            with server.frozen():
                deleter.delete(next(people))
                assert deleter.store.opened.ledger.replicas.all() == []  # it was struck off, not asked
                waiting = [server.ask() for _ in range(8)]
            for connection in waiting:
                response = connection.getresponse()
                told = json.loads(response.read())
                assert response.status == 503 or told["version"] >= board.acknowledged
                connection.close()
            deleter.repair()  # else there would soon be nobody left to answer
            kit.wait_until(lambda: server.predict()[0] == 200, "it answers again")
        heard = crowd.end()
        deleter.close()
    assert (heard.violations, heard.falls, heard.failures) == ([], [], [])


SHORT = ("--no-repair", "--lease", 0.4, "--max-seconds", 1)


def _refuses(server: kit.Server, reason: str) -> bool:
    """Whether it answers 503, with its reason, to a question and to a load balancer."""
    status, told = server.predict()
    if status == 200:
        return False
    ready, state = server.get("/readyz")
    assert (status, ready) == (503, 503)
    assert reason in told["error"]["message"]
    assert reason in state["reason"]
    assert server.get("/livez")[0] == 200
    return True


def test_a_server_without_its_ledger_stops_and_recovers(store: Path, people: Iterator[str]) -> None:
    ledger, away = store / "ledger.db", store / "ledger.away"
    with kit.serving(store, *SHORT) as server:
        os.rename(ledger, away)
        kit.wait_until(lambda: _refuses(server, "(ledger.db) can't be found"), "it refuses")
        os.rename(away, ledger)
        kit.wait_until(lambda: server.predict()[0] == 200, "it answers again")
        assert server.get("/readyz")[0] == 200
        _check_deletion(server, store, next(people))


def test_a_server_whose_ledger_is_locked_stops_and_recovers(store: Path, people: Iterator[str]) -> None:
    with kit.serving(store, *SHORT) as server:
        other = sqlite3.connect(store / "ledger.db", isolation_level=None)
        other.execute("BEGIN EXCLUSIVE")
        kit.wait_until(lambda: _refuses(server, "lease has run out"), "it refuses")
        kit.wait_until(lambda: _refuses(server, "locked by another process"), "it says why")
        other.execute("ROLLBACK")
        other.close()
        kit.wait_until(lambda: server.predict()[0] == 200, "it answers again")
        assert server.get("/readyz")[0] == 200
        _check_deletion(server, store, next(people))


def test_a_server_follows_a_ledger_that_takes_the_others_place(store: Path, people: Iterator[str]) -> None:
    """Deletions are written to the file that the path names; what a server has open is nobody's any more."""
    ledger, copy = store / "ledger.db", store / "copy.db"
    with kit.serving(store, *SHORT) as server:
        for _ in range(2):
            shutil.copy(ledger, copy)
            os.replace(copy, ledger)
            _check_deletion(server, store, next(people))


def test_a_server_that_ends_is_waited_for_by_nobody(store: Path, people: Iterator[str]) -> None:
    with kit.serving(store, "--no-repair", "--lease", 60) as server:
        opened = sisa.open_store(store).opened
        assert len(opened.ledger.replicas.all()) == 1
        assert server.stop() == 0
    assert opened.ledger.replicas.all() == []
    accepted = accept(opened, subjects=[next(people)])
    assert accepted is not None
    opened.ledger.close()


def _check_deletion(server: kit.Server, store: Path, person: str) -> None:
    """After a deletion that another process accepts, the server answers, and from nothing older."""
    opened = sisa.open_store(store).opened
    accepted = accept(opened, subjects=[person])
    opened.ledger.close()
    assert accepted is not None
    assert accepted.request.version_quarantine is not None
    status, told = server.predict()
    assert status == 503 or told["version"] >= accepted.request.version_quarantine
    kit.wait_until(lambda: server.predict()[0] == 200, "it answers")
    assert server.predict()[1]["version"] == accepted.request.version_quarantine
