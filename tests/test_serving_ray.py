"""Several replicas behind Ray Serve: the ledger is where they meet, and one that stands still is waited out."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from subprocess import DEVNULL, PIPE

import pytest
import race_kit as kit
import serving_kit

from sisa.cli.main import run

binary_store = serving_kit.binary_store

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


CLUSTER = """
import sys
import ray
from sisa.execution.cluster import connected

with connected(None, cores=4):
    print(ray.get_runtime_context().gcs_address, flush=True)
    sys.stdin.readline()
    print(len(ray.util.list_named_actors(all_namespaces=True)), ray.available_resources()["CPU"], flush=True)
"""


@contextmanager
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """A Ray cluster of another process, which goes on when those who use it end."""
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "5e" * 32)
    process = subprocess.Popen([sys.executable, "-c", CLUSTER], stdin=PIPE, stdout=PIPE, stderr=DEVNULL, text=True)
    try:
        assert process.stdout is not None
        yield process.stdout.readline().strip(), process
    finally:
        process.communicate(timeout=kit.PATIENCE_S)


@pytest.mark.ray
@pytest.mark.slow
def test_a_running_cluster_answers_over_https_and_retrains(
    binary_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options, trust = serving_kit.certificate(tmp_path)
    with cluster(monkeypatch) as (address, process):
        with serving_kit.serving(
            binary_store, tmp_path, "--address", address, "--replicas", "2", *options, verify=trust
        ) as server:
            assert server.address.startswith("https://")
            asking = server.client(verify=trust)
            rows = [{"x": [0] * 12}]
            before = asking.post("/predict", json={"rows": rows}).json()["version"]
            subject = serving_kit.trained_subject(server.store)
            told = asking.post("/deletions", json={"subjects": [subject]}).json()
            assert told["version_quarantine"] == before + 1

            def repaired() -> bool:
                return bool(asking.get(f"/deletions/{told['request']}").json()["state"] == "repaired")

            serving_kit.wait_for(repaired, what=lambda: "the cluster has retrained")
            evidence = asking.get(f"/deletions/{told['request']}").json()["evidence"]
            assert evidence["stages_retrained"]
            # Another server there would take this one's place.
            assert "Ray Serve runs on this cluster already" in refused(server.store, "--address", address)
            assert server.stop() == 0
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write("\n")
        process.stdin.flush()
        actors, cores = process.stdout.readline().split()
        assert float(cores) == 4.0, f"{actors} actors are left on the cluster"


def refused(store: Path, *options: str) -> str:
    """Start a server that must not start, and return what it says."""
    command = [sys.executable, "-m", "sisa", "serve", "--store", str(store), "--port", "0", *options]
    done = subprocess.run(command, stderr=PIPE, text=True, timeout=kit.PATIENCE_S, check=False)
    assert done.returncode == 2, done.stderr
    return done.stderr


@pytest.mark.ray
@pytest.mark.slow
def test_a_cluster_without_a_core_for_each_replica_is_refused(
    binary_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with cluster(monkeypatch) as (address, _):
        assert "6 processes need a CPU each" in refused(binary_store, "--address", address, "--replicas", "6")


def test_replicas_with_a_certificate_that_is_none_are_refused(binary_store: Path, tmp_path: Path) -> None:
    for name in ("cert.pem", "key.pem"):
        (tmp_path / name).write_text("nothing")
    options = ("--tls-certificate", str(tmp_path / "cert.pem"), "--tls-key", str(tmp_path / "key.pem"))
    assert "can't be used together" in refused(binary_store, "--replicas", "1", *options)


def test_an_address_where_nobody_is_starts_nothing(binary_store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["serve", "--store", str(binary_store), "--address", "127.0.0.1:1"]) == 2
    assert "127.0.0.1:1" in capsys.readouterr().err


def test_without_a_store_nothing_is_started(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["serve", "--store", str(tmp_path), "--replicas", "2"]) == 2
    assert "no store there" in capsys.readouterr().err
