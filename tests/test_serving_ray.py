"""Several replicas behind Ray Serve: the ledger is where they meet, and one that stands still is waited out."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
import race_kit as kit

from sisa.cli.main import run

PEOPLE = 300
REPLICAS = 3


def descendants(pid: int) -> list[int]:
    """Every process below one."""
    found = []
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, children.read_text().split()):
            found += [child, *descendants(child)]
    return found


def replicas_of(server: kit.Server) -> list[int]:
    """The processes that answer."""
    return sorted(
        pid
        for pid in descendants(server.process.pid)
        if Path(f"/proc/{pid}/cmdline").read_text().startswith("ray::ServeReplica")
    )


@pytest.mark.ray
@pytest.mark.slow
def test_nobody_hears_from_the_deleted_even_if_a_replica_stands_still(tmp_path: Path) -> None:
    store = kit.make_store(tmp_path, people=PEOPLE)
    people = iter(kit.trained_on(store, people=PEOPLE))
    board = kit.Board(tmp_path / "board")
    with (
        kit.serving(store, "--replicas", REPLICAS, "--lease", 1) as server,
        kit.crowd(server.address, board) as crowd,
    ):
        crowd.wait_for(100)
        deleter, caller = kit.Deleter(store, board), kit.Deleter(store, board, server=server)
        replicas = deleter.store.opened.ledger.replicas
        processes = replicas_of(server)
        assert len(processes) == REPLICAS
        kit.wait_until(lambda: len(replicas.all()) == REPLICAS, "each has registered")
        for _ in range(5):
            for one in (deleter, caller):
                one.delete(next(people))
                crowd.wait_for(20)
        for pid in processes:
            kit.wait_until(lambda: len(replicas.all()) == REPLICAS, "all are back")
            kit.freeze(pid)
            try:
                deleter.delete(next(people))
                assert len(replicas.all()) == REPLICAS - 1  # the one was struck off, the others had confirmed
                waiting = [server.ask() for _ in range(12)]
            finally:
                os.kill(pid, signal.SIGCONT)
            for connection in waiting:
                response = connection.getresponse()
                told = json.loads(response.read())
                assert response.status == 503 or told["version"] >= board.acknowledged
                connection.close()
        kit.wait_until(lambda: not deleter.store.opened.ledger.requests.open(), "somebody has repaired")
        last = deleter.store.version
        kit.wait_until(lambda: server.predict()[1].get("version") == last, "the repaired version answers")
        heard = crowd.end()
        assert server.stop() == 0
        kit.wait_until(lambda: not replicas.all(), "all have left")
        for one in (deleter, caller):
            one.close()
    assert (heard.violations, heard.failures) == ([], [])
    assert heard.answers > 300
    kit.check_members(store, [*deleter.done, *caller.done])


def test_an_address_that_is_none_is_noticed_at_the_start(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["serve", "--store", str(tmp_path), "--address", "nowhere"]) == 2
    assert "expected host:port or auto" in capsys.readouterr().err


def test_without_a_store_nothing_is_started(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["serve", "--store", str(tmp_path), "--replicas", "2"]) == 2
    assert "no store there" in capsys.readouterr().err
