"""Rounds of deletions, corrections, additions and repairs at once, with kills among them: at the end nothing is lost.

``SISA_SOAK_SEED`` gives the seed of a failed run again, ``SISA_SOAK_ROUNDS`` another number of rounds to a life.
"""

from __future__ import annotations

import os
import random
import secrets
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import closing, nullcontext
from multiprocessing import connection
from pathlib import Path
from typing import Any

import crash_kit as kit
import pyarrow as pa
import pyarrow.parquet as papq
import pytest
import soak_kit as soak
from postgres_kit import Server, running
from soak_kit import Ask, Model, Plan

from sisa.errors import NoConstituentError
from sisa.ledger import STATES
from sisa.store.store import Store

ERASED, PURGED, REPAIRED = (STATES.index(state) for state in ("rows_erased", "stages_purged", "repaired"))
PROBE = pa.table({"x": [0.5, -1.0, 2.0], "z": [0.0, 1.0, -1.0], "tag": ["none", "none", "none"]})
EXPECTED = {
    "correct": {"UserError", "SourceError"},
    "add": {"UserError", "SourceError", "BusyError"},
    "train": {"BusyError"},
    "verify": {"BusyError"},
}
"""What a command may be refused for because others are at work, or were before it."""
OUTAGE = {"LostError", "LostLockError", "BusyError", "StoreError"}
"""What any command may be told while the ledger's server is away."""
POLL_S = 0.02


@pytest.fixture(autouse=True)
def _nobody_left() -> Iterator[None]:
    yield
    kit.Child.kill_all()


class Life:
    """One store, what was asked of it, and what is known of it."""

    def __init__(self, folder: Path, seed: str, rounds: int, server: Server | None = None) -> None:
        self.seed, self.rounds, self.server = seed, rounds, server
        self.folder, self.root, self.log = folder, folder / "store", folder / "log"
        self.model = Model({row.record: row for row in soak.population(seed, 20 + 3 * rounds)})
        first = [row for row in self.model.rows.values() if not row.generation]
        self.recipe = soak.made_recipe(folder, first, server.url() if server else None)
        self.story: list[str] = []
        self.acknowledged: dict[str, str] = {}
        self.unknown: list[Ask] = []
        """Commands that were told that an id is unknown."""
        self.versions = 0
        self.states: dict[str, int] = {}
        self.digests: set[str] = set()
        """Keys and digests of every stage and every slice that was seen."""
        self.trained: set[tuple[int, int, str]] = set()
        """Stages and snapshots on disk, when last looked at."""
        self.reader: Store | None = None
        store = kit.trained(self.recipe, self.root)
        self.route = store.opened.router.route_one
        store.close()
        self.look()

    # --- a round ---

    def live(self) -> None:
        """All rounds, and the end."""
        try:
            for number in range(self.rounds):
                self.round(f"{self.seed}/{number}")
            self.end()
        except (Exception, pytest.fail.Exception) as error:
            story = "\n".join(self.story[-40:])
            raise AssertionError(
                f"SISA_SOAK_SEED={self.seed} SISA_SOAK_ROUNDS={self.rounds}\n{story}\n{error!r}"
            ) from error
        finally:
            if self.reader is not None:
                self.reader.close()

    def round(self, seed: str) -> None:
        rng = random.Random(f"{seed} round")
        plans = soak.draw(self.model, seed, self.folder)
        self.story += [f"{plan.seed}: {plan}" for plan in plans]
        outage = rng.random() * soak.MOMENT_S if self.server and rng.random() < 0.2 else None
        self.run(plans, outage)
        self.look()
        if rng.random() < 0.35:
            self.settle(seed)

    def run(self, plans: list[Plan], outage_s: float | None = None) -> None:
        """Start a process for each plan, do to them what the plans say, and wait until all have ended."""
        children = [(kit.Child(soak.act, self.root, self.log, self.recipe, plan), plan) for plan in plans]
        alive = {child._ours: (child, plan) for child, plan in children}
        due = [(plan.moment_s, child.kill) for child, plan in children if plan.fate == "moment"]
        if outage_s is not None:
            due.append((outage_s, self._outage))
        doomed: set[Any] = {child for child, plan in children if plan.fate == "moment"}
        started = heard = time.monotonic()
        while alive:
            for pipe in connection.wait(list(alive), POLL_S):
                heard = time.monotonic()
                child, plan = alive[pipe]
                try:
                    kind, value = pipe.recv()
                except (EOFError, ConnectionResetError):
                    assert child in doomed, f"{plan.seed} died: {plan}"
                    self.story.append(f"  {plan.seed} is dead")
                    kind = "dead"
                if kind == "stopped":
                    self.story.append(f"  {plan.seed} {plan.fate} before {value}")
                    doomed |= {child} if plan.fate != "frozen" else set()
                    if plan.fate != "killed":
                        due.append(
                            (heard - started + soak.FROZEN_S, child.kill if plan.fate == "buried" else child.go_on)
                        )
                elif kind == "told":
                    self._told(*value, outage=outage_s is not None)
                else:
                    assert kind != "failed", f"{plan.seed}: {value}"
                    del alive[pipe]
                    child.process.join(kit.PATIENCE_S)
                    pipe.close()
            now = time.monotonic()
            assert now - heard < kit.PATIENCE_S, "nobody says anything"
            for entry in [entry for entry in due if entry[0] < now - started]:
                due.remove(entry)
                entry[1]()

    def _outage(self) -> None:
        assert self.server is not None
        how = random.Random(self.story[-1]).choice([signal.SIGINT, signal.SIGQUIT])
        self.story.append(f"  the server is stopped by {how.name}, and started")
        self.server.stop(how)
        self.server.start()
        assert self.reader is not None
        self.reader.close()
        self.reader = None

    def _told(self, name: str, kind: str, value: str, *, outage: bool) -> None:
        self.story.append(f"  {name} {kind} {value}")
        ask = self.model.asks[name]
        if kind == "acknowledged":
            self.acknowledged[name] = value
        elif kind != "ended":
            if kind == "UnknownIdsError":
                self.unknown.append(ask)
            else:
                assert kind in EXPECTED.get(ask.what, set()) or (outage and kind in OUTAGE), value

    # --- what holds after each round ---

    def look(self) -> None:
        """All that holds whatever was killed."""
        with closing(kit.reopened(self.root)) as store:
            ledger = store.opened.ledger
            requests = ledger.requests.all()
            self.model.learn(requests, store.opened.generations)
            states = {request.id: STATES.index(request.state) for request in requests}
            assert list(states)[: len(self.states)] == list(self.states), "a request is lost"
            assert all(states[request] >= state for request, state in self.states.items()), "a request moved back"
            if self.server is None:
                self._purged([request for request in requests if request.id not in self.states])
            self.states = states
            self._was_heard({request.reason: request.id for request in requests})
            numbers = [number for number, _, _ in ledger.versions.all()]
            assert numbers == list(range(1, len(numbers) + 1))
            assert len(numbers) >= self.versions
            self.versions = len(numbers)
            tainted = {row.key for row in ledger.stages.tainted()}
            assert not {member.key for member in ledger.versions.live().members} & tainted
            self.digests |= digests_of(store)
            self._answers(store)
        self._rows()
        if self.server is None:  # else a lock may be lost between a look and a rename: the next repair erases again
            self._forgotten()

    def _was_heard(self, by_name: dict[str, str]) -> None:
        """Whoever was acknowledged is in the ledger: under the name of the command, or was asked for before."""
        for name, request in self.acknowledged.items():
            ask = self.model.asks[name]
            assert request in self.states, f"{name} was acknowledged as {request}, and is lost"
            assert name in by_name or all(self._is_gone(identifier) for identifier in ask.ids), name
        for (
            ask
        ) in self.unknown:  # a person whose rows were deleted one by one, a row that was left out when others came
            assert any(self._is_gone(identifier) for identifier in ask.ids), ask

    def _is_gone(self, identifier: str) -> bool:
        """Whether no row is left of a person, or of a record."""
        return not any(identifier in {row.person, row.record} for row in self.model.survivors())

    def _answers(self, store: Store) -> None:
        """Who has just started and who has answered before say the same."""
        self.reader = self.reader or kit.reopened(self.root)
        said = []
        for user in (store, self.reader):
            try:
                said.append(user.predict_proba(PROBE).tobytes())
            except NoConstituentError:
                said.append(b"")
        assert said[0] == said[1]

    def _rows(self) -> None:
        """Nobody who is left is missing, and nobody is there who was erased."""
        found = soak.rows_of(self.root)
        missing = [row.record for row in self.model.survivors() if row.record not in found]
        assert not missing

    def _purged(self, new: list[Any]) -> None:
        """No stage, and no snapshot of one, is left that was there before a deletion of what it saw.

        Whether it was entered or not: a killed training leaves stages that the ledger doesn't know.
        """
        before, self.trained = self.trained, soak.stages_of(self.root)
        for request in new:
            if STATES.index(request.state) >= PURGED:
                for shard, slice_ in request.places:
                    seen = {name for name in before if name[0] == shard and name[1] >= slice_ > 0}
                    assert not seen & self.trained, (request, seen & self.trained)

    def _forgotten(self) -> None:
        """No byte of the store says who was deleted, or what was corrected."""
        purged = {request for request, state in self.states.items() if state >= PURGED}
        forbidden = self.model.forgotten(purged)
        for path, content in soak.contents(self.root):
            assert not soak.words_in(content) & forbidden, (path, soak.words_in(content) & forbidden)

    # --- at rest ---

    def settle(self, seed: str) -> None:
        """Somebody who isn't disturbed repairs."""
        ask = Ask(f"{seed}.repair", "repair")
        self.model.asks[ask.name] = ask
        self.story.append(f"{ask.name}: a repair")
        self.run([Plan((ask,), ask.name)])
        self.look()
        assert set(self.states.values()) <= {REPAIRED}
        with closing(kit.reopened(self.root)) as store:
            assert store.verify(executor="inline").problems == []
        self._forgotten()
        self._right_rows()
        left = [
            path
            for name in ("tmp-*", "snapshot-*", "scratch", "incoming", "corrections/*", "stop-*/*")
            for path in self.root.rglob(name)
        ]
        assert not left

    def _right_rows(self) -> None:
        """Everybody who is left is there once, says what they should, and lies where the key puts them."""
        found = soak.rows_of(self.root)
        expected = {row.record: row for row in self.model.survivors()}
        assert found.keys() == expected.keys()
        for record, (where, said) in found.items():
            row = expected[record]
            assert (said.person, said.tag, said.x, said.z, said.label) == (row.person, row.tag, row.x, row.z, row.label)
            assert where == self._place(row)

    def _place(self, row: soak.Row) -> str:
        shard, slice_ = self.route(row.person)
        if slice_:
            return f"shard={shard:04d}/slice={soak.SLICES + row.generation if row.generation else slice_:02d}"
        return f"holdout/{f'generation={row.generation:02d}/' if row.generation else ''}shard={shard:04d}"

    def end(self) -> None:
        """Nothing was lost, nobody is left who was deleted, and the weights are those of the others alone."""
        self.settle(f"{self.seed}/end")
        with closing(kit.reopened(self.root)) as store:
            found = store.verify(replay="all", executor="inline")
            assert (found.problems, found.stages_replayed) == ([], store.opened.shards * store.opened.slices)
            state = kit.end_state(store)
            left = digests_of(store)
        assert {request[0] for request in state["requests"]} == {"repaired"}
        fresh = self._fresh()
        for part in ("constituents", "stages", "rows"):
            assert state[part] == fresh[part], part
        purged = self.digests - left
        forbidden = self.model.forgotten(set(self.states))
        assert forbidden
        assert purged
        for path, content in [*soak.contents(self.root), (self.log, self.log.read_bytes()), *self._server()]:
            assert not soak.words_in(content) & forbidden, path
            assert "pg_wal" in path.parts or not soak.keys_in(content) & purged, path

    def _fresh(self) -> dict[str, Any]:
        """A store that was trained on those who are left, and on nobody else."""
        parts: list[list[soak.Row]] = [[] for _ in range(self.model.generations + 1)]
        for row in self.model.survivors():
            parts[row.generation].append(row)
        recipe = soak.made_recipe(self.folder / "fresh", parts[0])
        with closing(kit.trained(recipe, self.folder / "fresh" / "store")) as store:
            for generation, rows in enumerate(parts[1:], start=1):
                source = self.folder / "fresh" / f"{generation}.parquet"
                papq.write_table(soak.table(rows), source)
                store.add(source, executor="inline")
            return kit.end_state(store)

    def _server(self) -> Iterator[tuple[Path, bytes]]:
        """What the ledger's server keeps: a dump, its data as files, and its log."""
        if self.server is None:
            return
        dump = [str(self.server.programs / "pg_dump"), "-d", self.server.dsn.removesuffix("postgres") + "sisa"]
        yield Path("dump"), subprocess.run(dump, check=True, capture_output=True).stdout
        self.server.ask("CHECKPOINT")
        yield Path("log"), (self.server.folder / "log").read_bytes()
        yield from soak.contents(self.server.data)


def digests_of(store: Store) -> set[str]:
    """Whatever could be held against a guess about somebody: names and digests of stages, and of the rows of slices."""
    ledger = store.opened.ledger
    stages = {digest for row in ledger.stages.all() for digest in (row.key, row.state_digest, row.full_digest)}
    slices = {digest for row in ledger.partitions.all() for digest in (row.membership, row.next_membership)}
    return (stages | slices) - {"", None}


# --- the lives --------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["sqlite", "postgres"])
def test_whoever_is_there_is_found(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The search can fail: before anybody is deleted, it finds them wherever they are."""
    with kit.fast_folder() as folder, running() if engine == "postgres" else nullcontext() as server:
        if server is not None:
            monkeypatch.setenv("PGPASSWORD", server.secret)
        life = Life(folder, "there", 1, server)
        found: dict[str, set[str]] = {path.name: set() for path in life.root.iterdir()}
        for path, content in soak.contents(life.root):
            found[path.relative_to(life.root).parts[0]] |= soak.words_in(content) | soak.keys_in(content)
        everybody = {
            word for row in life.model.present() for word in (row.record, row.person, row.tag, soak.word(row.x))
        }
        assert everybody <= found["records"]
        assert any(word.startswith("tag-") for word in found["checkpoints"])  # of the first slices, in the vocabulary
        assert not everybody & set().union(
            *(words for name, words in found.items() if name not in {"records", "checkpoints"})
        )
        served = [set(soak.keys_in(content)) for path, content in life._server() if "pg_wal" not in path.parts]
        assert life.digests <= (set().union(*served) if server else found["ledger.db"])
        assert not server or life.digests <= served[0]  # the dump


def rounds_of(usual: int) -> int:
    return int(os.environ.get("SISA_SOAK_ROUNDS", usual))


def seed_of(number: int) -> str:
    """As it was given; in CI always the same, elsewhere another one each time."""
    given = os.environ.get("SISA_SOAK_SEED")
    return given or (f"ci-{number}" if os.environ.get("CI") else secrets.token_hex(4))


def live(engine: str, number: int, rounds: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with kit.fast_folder() as folder, running() if engine == "postgres" else nullcontext() as server:
        if server is not None:
            monkeypatch.setenv("PGPASSWORD", server.secret)
        Life(folder, seed_of(number), rounds_of(rounds), server).live()


@pytest.mark.parametrize(("engine", "rounds"), [("sqlite", 14), ("postgres", 6)])
def test_a_short_life(engine: str, rounds: int, monkeypatch: pytest.MonkeyPatch) -> None:
    live(engine, 0, rounds, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(10))
def test_a_long_life(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    live("postgres" if number % 2 else "sqlite", number, 50, monkeypatch)
