"""A small store that is served by real processes, asked by others as fast as they can, while people are deleted.

What decides is order. Whoever got an acknowledgement writes its version on a board that all processes see; who asks
reads the board, then sends the question, and holds the answer against what he read.

Run as a program this file is one of the processes that ask: it needs the standard library only.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import mmap
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PATIENCE_S = 120.0
"""How long a test waits for what has to happen: a loaded machine is slow, a broken program is slow for ever."""
FEATURES = ("a", "b", "c")
BODY = json.dumps({"rows": [dict.fromkeys(FEATURES, 0.5)]}).encode()
SLOTS = 64


class Board:
    """Numbers that processes share: what is acknowledged, whether to stop, and answers so far of each who asks."""

    def __init__(self, path: Path) -> None:
        if not path.exists():
            path.write_bytes(bytes(8 * SLOTS))
        with path.open("r+b") as file:
            self._numbers = memoryview(mmap.mmap(file.fileno(), 8 * SLOTS)).cast("q")
        self.path = path
        self._lock = threading.Lock()

    @property
    def acknowledged(self) -> int:
        """The newest version whose quarantine was acknowledged."""
        return self._numbers[0]

    def acknowledge(self, version: int) -> None:
        """Write down an acknowledgement; to be called when it has come, and before anything else is done."""
        with self._lock:
            self._numbers[0] = max(self._numbers[0], version)

    @property
    def stopped(self) -> bool:
        """Whether those who ask shall end."""
        return bool(self._numbers[1])

    def stop(self) -> None:
        """End the asking."""
        self._numbers[1] = 1

    @property
    def answers(self) -> int:
        """How many answers were given so far."""
        return sum(self._numbers[2:SLOTS])

    def count(self, slot: int) -> None:
        """Count an answer."""
        self._numbers[2 + slot] += 1


# --- who asks -------------------------------------------------------------------------------------


@dataclass
class Heard:
    """What came back."""

    answers: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    """Answers 503, by what they say."""
    failures: list[str] = field(default_factory=list)
    """Anything else but an answer."""
    violations: list[str] = field(default_factory=list)
    """Answers that are older than what had been acknowledged before they were asked for."""
    falls: list[str] = field(default_factory=list)
    """Answers that are older than an earlier one to the same client."""
    versions: set[int] = field(default_factory=set)

    def add(self, told: dict[str, Any]) -> None:
        """Take in what another process heard."""
        self.answers += told["answers"]
        self.refused.update(told["refused"])
        self.failures += told["failures"]
        self.violations += told["violations"]
        self.falls += told["falls"]
        self.versions |= set(told["versions"])

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {**vars(self), "versions": sorted(self.versions)}


def ask(host: str, port: int, board: Board, slot: int, heard: Heard) -> None:
    """Ask again and again over one connection, until the board says stop."""
    connection = http.client.HTTPConnection(host, port, timeout=PATIENCE_S)
    newest = 0
    while not board.stopped:
        acknowledged = board.acknowledged
        try:
            connection.request("POST", "/predict", BODY, {"content-type": "application/json"})
            response = connection.getresponse()
            told = json.loads(response.read())
        except (OSError, http.client.HTTPException, ValueError) as error:
            heard.failures.append(repr(error))
            connection.close()
            continue
        if response.status == 200:
            version = told["version"]
            heard.answers += 1
            heard.versions.add(version)
            board.count(slot)
            if version < acknowledged:
                heard.violations.append(f"version {version}, asked for when {acknowledged} was acknowledged")
            if version < newest:
                heard.falls.append(f"version {version} after {newest}")
            newest = max(newest, version)
        elif response.status == 503:
            heard.refused[told["error"]["message"]] += 1
            time.sleep(0.01)
        else:
            heard.failures.append(f"{response.status}: {told}")
    connection.close()


def main(host: str, port: str, board: str, first: str, threads: str) -> None:
    """Ask from several threads and print what was heard."""
    all_heard = [Heard() for _ in range(int(threads))]
    asking = [
        threading.Thread(target=ask, args=(host, int(port), Board(Path(board)), int(first) + number, heard))
        for number, heard in enumerate(all_heard)
    ]
    for thread in asking:
        thread.start()
    for thread in asking:
        thread.join()
    together = Heard()
    for heard in all_heard:
        together.add(heard.as_dict())
    print(json.dumps(together.as_dict()))


class Crowd:
    """Processes that ask, with some threads each."""

    def __init__(self, address: str, board: Board, *, processes: int = 2, threads: int = 2) -> None:
        host, _, port = address.removeprefix("http://").rpartition(":")
        self.board = board
        self._processes = [
            subprocess.Popen(
                [sys.executable, __file__, host, port, str(board.path), str(number * threads), str(threads)],
                stdout=subprocess.PIPE,
                text=True,
            )
            for number in range(processes)
        ]

    def wait_for(self, answers: int) -> None:
        """Wait until so many answers more were given."""
        goal = self.board.answers + answers
        wait_until(lambda: self.board.answers >= goal, f"{answers} answers")

    def end(self) -> Heard:
        """Let them end, and return what they heard."""
        self.board.stop()
        heard = Heard()
        for process in self._processes:
            out, _ = process.communicate(timeout=PATIENCE_S)
            heard.add(json.loads(out))
        return heard

    def kill(self) -> None:
        """End them, whatever they do."""
        for process in self._processes:
            process.kill()
            process.wait()
            assert process.stdout is not None
            process.stdout.close()


@contextlib.contextmanager
def crowd(address: str, board: Board, **options: int) -> Iterator[Crowd]:
    """People who ask for the length of a ``with`` block."""
    made = Crowd(address, board, **options)
    try:
        yield made
    finally:
        made.kill()


def wait_until(true: Callable[[], object], what: str) -> None:
    """Wait until something is so; fail if it never is."""
    deadline_s = time.monotonic() + PATIENCE_S
    while not true():
        assert time.monotonic() < deadline_s, f"it never happened: {what}"
        time.sleep(0.01)


# --- who serves -----------------------------------------------------------------------------------


class Server:
    """``sisa serve`` as a process of its own; predictions need no token."""

    def __init__(self, store: Path, *options: object) -> None:
        self.store = store
        self.err = store.with_name(f"{store.name}-stderr.txt")
        words = ["serve", "--store", store, "--port", 0, "--open-prediction", *options]
        with self.err.open("wb") as err:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "sisa", *map(str, words)],
                stdin=subprocess.DEVNULL,
                stderr=err,
                env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            )
        self.address = ""

    def wait_ready(self) -> None:
        """Wait until it answers."""
        wait_until(lambda: self._told() or self.process.poll() is not None, "the server says where it is")
        assert self.process.poll() is None, self.err.read_text()
        self.address = str(self._told())
        wait_until(lambda: self.get("/readyz")[0] == 200, "the server is ready")

    def _told(self) -> str | None:
        found = re.search(r"^serving (http://\S+)$", self.err.read_text(), re.MULTILINE)
        return found.group(1) if found else None

    def get(self, path: str) -> tuple[int, Any]:
        """Return status and content of a page."""
        return self.send("GET", path)

    def predict(self) -> tuple[int, Any]:
        """Ask once."""
        return self.send("POST", "/predict", BODY)

    def ask(self) -> http.client.HTTPConnection:
        """Send a question over a connection of its own; nobody has read the answer yet."""
        connection = http.client.HTTPConnection(self.address.removeprefix("http://"), timeout=PATIENCE_S)
        connection.request("POST", "/predict", BODY, {"content-type": "application/json"})
        return connection

    def send(self, verb: str, path: str, body: bytes | None = None, token: str = "") -> tuple[int, Any]:
        """Send a request over a connection of its own."""
        connection = http.client.HTTPConnection(self.address.removeprefix("http://"), timeout=PATIENCE_S)
        headers = {"content-type": "application/json", **({"authorization": f"Bearer {token}"} if token else {})}
        try:
            connection.request(verb, path, body, headers)
            response = connection.getresponse()
            return response.status, json.loads(response.read())
        finally:
            connection.close()

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        """Let the process stand still for the length of a ``with`` block."""
        freeze(self.process.pid)
        try:
            yield
        finally:
            os.kill(self.process.pid, signal.SIGCONT)

    def stop(self) -> int:
        """End it in good order."""
        if self.process.poll() is None:
            os.kill(self.process.pid, signal.SIGCONT)
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(PATIENCE_S)
        finally:
            self.process.kill()
            self.process.wait()


def freeze(pid: int) -> None:
    """Stop a process, and return when none of its threads runs any more."""
    os.kill(pid, signal.SIGSTOP)
    tasks = Path(f"/proc/{pid}/task")
    wait_until(
        lambda: all((task / "stat").read_text().rpartition(")")[2].split()[0] == "T" for task in tasks.iterdir()),
        f"process {pid} stands still",
    )


@contextlib.contextmanager
def serving(store: Path, *options: object) -> Iterator[Server]:
    """A server that answers, for the length of a ``with`` block."""
    server = Server(store, *options)
    try:
        server.wait_ready()
        yield server
    finally:
        server.stop()


# --- what is served, and who is deleted -------------------------------------------------------------


def make_store(folder: Path, *, people: int, ledger: str | None = None) -> Path:
    """Train a store of six small linear models, fast to train again."""
    import numpy as np
    import pyarrow as pa
    import store_kit

    rng = np.random.default_rng(3)
    numbers = {name: rng.normal(0, 1, people) for name in FEATURES}
    table = pa.table(
        {
            "person": [name_of(number) for number in range(people)],
            **numbers,
            "label": (numbers["a"] + numbers["b"] > 0).astype(np.int64),
        }
    )
    recipe = {
        "data": {"source": "-", "record_id": "person", "label": "label", "classes": [0, 1], "features": list(FEATURES)},
        "model": {"name": "logistic"},
        "training": {"epochs": 2, "batch_size": 64, "optimizer": {"name": "sgd", "lr": 0.1}, "seed": 1},
        "sisa": {"shards": 6, "slices": 2},
        "ledger": ledger,
    }
    store = store_kit.train(folder, recipe, table)
    store.close()
    return folder / "store"


def name_of(number: int) -> str:
    """Id of a person."""
    return f"p{number}"


def trained_on(store: Path, *, people: int) -> list[str]:
    """The people whose deletion takes a stage out of service."""
    import sisa

    opened = sisa.open_store(store)
    router = opened.opened.router
    found = [name for name in map(name_of, range(people)) if router.route_one(name)[1] != 0]
    opened.close()
    return found


@dataclass(frozen=True)
class Acknowledged:
    """A deletion that nobody answers in spite of any more."""

    person: str
    version: int


class Deleter:
    """Deletes people one by one, through the library or over HTTP; for one thread."""

    def __init__(self, store: Path, board: Board, *, server: Server | None = None) -> None:
        import sisa

        self.store = sisa.open_store(store)
        self._board = board
        self._server = server
        self._token = ""
        if server is not None:
            self._token = self.store.opened.ledger.tokens.create(["delete"])[0]
        self.done: list[Acknowledged] = []
        self.seconds: list[float] = []

    def delete(self, person: str) -> None:
        """Delete a person, and write the acknowledgement on the board."""
        started_s = time.monotonic()
        version = self._by_library(person) if self._server is None else self._over_http(self._server, person)
        self._board.acknowledge(version)
        self.seconds.append(time.monotonic() - started_s)
        self.done.append(Acknowledged(person, version))
        self._check_live()

    def _by_library(self, person: str) -> int:
        from sisa.deletion.accept import accept

        accepted = accept(self.store.opened, subjects=[person])
        assert accepted is not None
        assert accepted.request.version_quarantine is not None
        return accepted.request.version_quarantine

    def _over_http(self, server: Server, person: str) -> int:
        body = json.dumps({"subjects": [person]}).encode()
        status, told = server.send("POST", "/deletions", body, self._token)
        assert status == 202, told
        return int(told["version_quarantine"])

    def _check_live(self) -> None:
        """No member of the live version is one that a deletion has tainted."""
        ledger = self.store.opened.ledger
        with ledger.database.snapshot():
            members = {(member.key, member.platform) for member in ledger.versions.live().members if member.stage > 0}
            assert not members & {(row.key, row.platform) for row in ledger.stages.tainted()}

    def close(self) -> None:
        """Close the store."""
        self.store.close()

    def repair(self) -> None:
        """Retrain what was taken out of service, in this process."""
        self.store.repair(executor="inline")


def check_members(store: Path, deletions: Sequence[Acknowledged]) -> None:
    """No version between a quarantine and its repair has a member that saw the person."""
    import sisa

    opened = sisa.open_store(store).opened
    versions = {number: opened.ledger.versions.get(number) for number, _, _ in opened.ledger.versions.all()}
    repaired = {r.version_quarantine: r.version_after for r in opened.ledger.requests.all()}
    names = {r.version_quarantine: r.id for r in opened.ledger.requests.all()}
    events = opened.ledger.events()
    accepted = {e["request"]: e["number"] for e in events if e["kind"] == "request_accepted"}
    published = {e["version"]: e["number"] for e in events if e["kind"] == "version_published"}
    trained = [(e["shard"], e["stage"], e["number"]) for e in events if e["kind"] == "stage_trained"]

    def is_new(shard: int, stage: int, deletion: Acknowledged, number: int) -> bool:
        """Whether a stage that a version serves was trained between the acceptance and the version."""
        begin, end = accepted[names[deletion.version]], published[number]
        return any((shard, stage) == (k, r) and begin < at < end for k, r, at in trained)

    for deletion in deletions:
        shard, slice_ = opened.router.route_one(deletion.person)
        after = repaired[deletion.version]
        for number in range(deletion.version, len(versions) + 1 if after is None else after):
            (member,) = [member for member in versions[number].members if member.shard == shard]
            # What was retrained is served even while another deletion keeps the repair from its end.
            fresh = all(is_new(shard, stage, deletion, number) for stage in range(slice_, member.stage + 1))
            assert fresh, f"{deletion} is served from stage {member.stage} in version {number}"
    opened.ledger.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
