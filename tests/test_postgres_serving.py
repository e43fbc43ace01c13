"""Servers whose leases come from a PostgreSQL server: it goes away, comes back, and is another one."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import race_kit as kit
from postgres_kit import OPERATOR, Server

import sisa
from sisa.deletion.accept import accept
from sisa.errors import LostError

PEOPLE = 300
SHORT = ("--no-repair", "--lease", 0.4, "--max-seconds", 1)


@pytest.fixture
def store(tmp_path: Path, postgres_url: str) -> Path:
    return kit.make_store(tmp_path, people=PEOPLE, ledger=postgres_url)


@pytest.fixture
def people(store: Path) -> Iterator[str]:
    return iter(kit.trained_on(store, people=PEOPLE))


@pytest.fixture
def board(tmp_path: Path) -> kit.Board:
    return kit.Board(tmp_path / "board")


def refuses(server: kit.Server) -> bool:
    """Whether it answers 503 to a question and to a load balancer, and lives."""
    status, told = server.predict()
    if status == 200:
        return False
    ready, _ = server.get("/readyz")
    assert (status, ready, server.get("/livez")[0]) == (503, 503, 200)
    assert "lease" in told["error"]["message"]
    return True


def check_deletion(server: kit.Server, store: Path, person: str) -> None:
    """After a deletion that another process accepts, the server answers, and from nothing older."""
    opened = sisa.open_store(store)
    accepted = accept(opened.opened, subjects=[person])
    opened.close()
    assert accepted is not None
    assert accepted.request.version_quarantine is not None
    status, told = server.predict()
    assert status == 503 or told["version"] >= accepted.request.version_quarantine
    kit.wait_until(lambda: server.predict()[0] == 200, "it answers")
    assert server.predict()[1]["version"] >= accepted.request.version_quarantine


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGQUIT])
def test_a_server_that_cannot_reach_its_ledger_stops_and_comes_back(
    store: Path, people: Iterator[str], postgres: Server, how: signal.Signals
) -> None:
    with kit.serving(store, *SHORT) as server:
        postgres.stop(how)
        try:
            kit.wait_until(lambda: refuses(server), "it refuses")
        finally:
            postgres.start()
        kit.wait_until(lambda: server.predict()[0] == 200, "it answers again")
        check_deletion(server, store, next(people))


def test_a_server_whose_sessions_were_ended_comes_back_and_minds_what_happened(
    store: Path, people: Iterator[str], postgres: Server
) -> None:
    with kit.serving(store, *SHORT) as server:
        for _ in range(2):
            postgres.end_sessions()
            check_deletion(server, store, next(people))


def test_a_server_follows_a_ledger_that_was_restored_in_the_others_place(
    store: Path, people: Iterator[str], postgres: Server
) -> None:
    """Its number goes on from another history: what was loaded from the first is nobody's."""
    opened = sisa.open_store(store)
    schema = opened.opened.place.schema  # type: ignore[union-attr]
    before = opened.opened.ledger.database.identity()
    with kit.serving(store, *SHORT) as server:
        postgres.ask(f"ALTER SCHEMA {schema} RENAME TO aside")
        kit.wait_until(lambda: refuses(server), "it refuses")
        postgres.ask(f"CREATE SCHEMA restored AUTHORIZATION {OPERATOR}")
        for (table,) in postgres.ask("SELECT tablename FROM pg_tables WHERE schemaname = 'aside'"):
            postgres.ask(f"CREATE TABLE restored.{table} (LIKE aside.{table} INCLUDING ALL)")
            postgres.ask(f"INSERT INTO restored.{table} SELECT * FROM aside.{table}")
            postgres.ask(f"ALTER TABLE restored.{table} OWNER TO {OPERATOR}")
        postgres.ask(f"ALTER SCHEMA restored RENAME TO {schema}")
        check_deletion(server, store, next(people))
    assert opened.opened.ledger.database.identity() != before
    opened.close()
    postgres.ask("DROP SCHEMA aside CASCADE")


def test_nobody_hears_from_the_deleted_while_sessions_are_ended(
    store: Path, board: kit.Board, people: Iterator[str], postgres: Server
) -> None:
    """Deletions, questions without a pause, and a network that keeps breaking."""
    ended, done = threading.Event(), 0

    def disturb() -> None:
        while not ended.wait(0.7):
            postgres.end_sessions()

    with kit.serving(store, "--no-repair") as server, kit.crowd(server.address, board) as crowd:
        disturbing = threading.Thread(target=disturb)
        disturbing.start()
        try:
            while done < 6:
                person = next(people)
                version = None
                while version is None:  # a deletion whose connection broke is asked for again
                    try:
                        opened = sisa.open_store(store)
                        accepted = accept(opened.opened, subjects=[person])
                        opened.close()
                    except LostError:
                        continue
                    assert accepted is not None
                    version = accepted.request.version_quarantine
                board.acknowledge(version)
                done += 1
                if done < 4:  # later there may be nobody left to answer
                    crowd.wait_for(100)
        finally:
            ended.set()
            disturbing.join()
        heard = crowd.end()
    assert (heard.violations, heard.falls, heard.failures) == ([], [], [])
    opened = sisa.open_store(store)
    assert len(opened.opened.ledger.requests.all()) == done
    opened.close()
