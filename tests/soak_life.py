"""One store's life: rounds of commands at once, with kills among them, and what has to hold after each and at the end."""

from __future__ import annotations

import random
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import closing
from multiprocessing import connection
from pathlib import Path
from typing import Any

import crash_kit as kit
import pyarrow as pa
import pyarrow.parquet as papq
import pytest
import soak_kit as soak
from postgres_kit import Server
from soak_kit import Ask, Model, Plan
from soak_media import Folder, Medium

from sisa.errors import NoConstituentError
from sisa.layout import Layout
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


class Life:
    """One store, what was asked of it, and what is known of it."""

    def __init__(self, folder: Path, seed: str, rounds: int, medium: Medium, server: Server | None = None) -> None:
        self.seed, self.rounds, self.medium, self.server = seed, rounds, medium, server
        self.folder, self.uri, self.log = folder, medium.place.uri, folder / "log"
        self.model = Model({row.record: row for row in soak.population(seed, 20 + 3 * rounds)})
        first = [row for row in self.model.rows.values() if not row.generation]
        self.recipe = medium.recipe(soak.made_recipe(folder, first, server.url() if server else None))
        self.story: list[str] = []
        self.acknowledged: dict[str, str] = {}
        self.unknown: list[Ask] = []
        """Commands that were told, since last looked at, that an id is unknown."""
        self.versions = 0
        self.states: dict[str, int] = {}
        self.digests: set[str] = set()
        """Keys and digests of every stage and every slice that was seen."""
        self.trained: set[tuple[int, int, str]] = set()
        """Stages and snapshots that lay there, when last looked at."""
        self.hidden: set[tuple[str, str]] = set()
        """And what lay there without being seen."""
        self.calm = True
        """Whether no lock was lost since the last repair: the ledger's server wasn't stopped."""
        self.reader: Store | None = None
        store = kit.trained(self.recipe, self.uri)
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
        plans = soak.draw(self.model, seed, self.folder, self.medium.place)
        self.story += [f"{plan.seed}: {plan}" for plan in plans]
        outage = rng.random() * self.medium.place.moment_s if self.server and rng.random() < 0.2 else None
        self.calm &= outage is None
        self.run(plans, outage)
        self.look()
        if rng.random() < 0.35:
            self.settle(seed)

    def run(self, plans: list[Plan], outage_s: float | None = None) -> None:
        """Start a process for each plan, do to them what the plans say, and wait until all have ended."""
        children = [(kit.Child(soak.act, self.medium.place, self.log, self.recipe, plan), plan) for plan in plans]
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
                    assert child in doomed or child.process.pid in self.medium.killed, f"{plan.seed} died: {plan}"
                    self.story.append(f"  {plan.seed} is dead")
                    kind = "dead"
                if kind == "stopped":
                    self.story.append(f"  {plan.seed} {plan.fate} before {value}")
                    doomed |= {child} if plan.fate != "frozen" else set()
                    if plan.fate in {"frozen", "buried"}:
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
        with closing(kit.reopened(self.uri)) as store:
            ledger = store.opened.ledger
            requests = ledger.requests.all()
            before = self.model.generations
            self.model.learn(requests, store.opened.generations)
            states = {request.id: STATES.index(request.state) for request in requests}
            assert list(states)[: len(self.states)] == list(self.states), "a request is lost"
            assert all(states[request] >= state for request, state in self.states.items()), "a request moved back"
            self._purged([request for request in requests if request.id not in self.states], store.opened.layout)
            self.states = states
            self._was_heard({request.reason: request.id for request in requests}, generations=before)
            numbers = [number for number, _, _ in ledger.versions.all()]
            assert numbers == list(range(1, len(numbers) + 1))
            assert len(numbers) >= self.versions
            self.versions = len(numbers)
            tainted = {row.key for row in ledger.stages.tainted()}
            assert not {member.key for member in ledger.versions.live().members} & tainted
            self.digests |= digests_of(store)
            self._answers(store)
        self._rows()
        if self.calm:  # else a lock may be lost between a look and a rename: the next repair erases again
            self._forgotten()

    def _was_heard(self, by_name: dict[str, str], *, generations: int) -> None:
        """Whoever was acknowledged is in the ledger: under the name of the command, or was asked for before."""
        for name, request in self.acknowledged.items():
            ask = self.model.asks[name]
            assert request in self.states, f"{name} was acknowledged as {request}, and is lost"
            assert name in by_name or all(self._is_gone(identifier) for identifier in ask.ids), name
        for ask in self.unknown:
            # A person whose rows were deleted one by one (more may have come meanwhile), or a row that was left out when
            # others came.
            assert any(self._is_gone(identifier, generations=generations) for identifier in ask.ids), ask
        self.unknown = []

    def _is_gone(self, identifier: str, *, generations: int = soak.GENERATIONS) -> bool:
        """Whether no row is left of a person, or of a record, of those that came with some generations."""
        left = [row for row in self.model.survivors() if row.generation <= generations]
        return not any(identifier in {row.person, row.record} for row in left)

    def _answers(self, store: Store) -> None:
        """Who has just started and who has answered before say the same."""
        self.reader = self.reader or kit.reopened(self.uri)
        said = []
        for user in (store, self.reader):
            try:
                said.append(user.predict_proba(PROBE).tobytes())
            except NoConstituentError:
                said.append(b"")
        assert said[0] == said[1]

    def _rows(self) -> None:
        """Nobody who is left is missing, and nobody is there who was erased."""
        found = soak.rows_of(self.medium)
        missing = [row.record for row in self.model.survivors() if row.record not in found]
        assert not missing

    def _purged(self, new: list[Any], layout: Layout) -> None:
        """No stage, and no snapshot of one, is left that was there before a deletion of what it saw.

        Whether it was entered or not: a killed training leaves stages that the ledger doesn't know. So it is with older
        versions of rows, and with what was uploaded of them.
        """
        before, self.trained = self.trained, self.medium.stages()
        unseen, self.hidden = self.hidden, self.medium.hidden()
        for request in new if self.calm else ():
            if STATES.index(request.state) >= PURGED:
                for shard, slice_ in request.places:
                    seen = {name for name in before if name[0] == shard and name[1] >= slice_ > 0}
                    assert not seen & self.trained, (request, seen & self.trained)
                    rows = {each for each in unseen if each[0] == layout.partition_key(shard, slice_)}
                    assert not rows & self.hidden, (request, rows & self.hidden)

    def _forgotten(self) -> None:
        """No byte of the store says who was deleted, or what was corrected."""
        purged = {request for request, state in self.states.items() if state >= PURGED}
        forbidden = self.model.forgotten(purged)
        for name, content in self.medium.contents():
            assert not soak.words_in(content) & forbidden, (name, soak.words_in(content) & forbidden)

    # --- at rest ---

    def settle(self, seed: str) -> None:
        """Somebody who isn't disturbed repairs."""
        ask = Ask(f"{seed}.repair", "repair")
        self.model.asks[ask.name] = ask
        self.story.append(f"{ask.name}: a repair")
        self.run([Plan((ask,), ask.name)])
        self.calm = True
        self.look()
        assert set(self.states.values()) <= {REPAIRED}
        with closing(kit.reopened(self.uri)) as store:
            assert store.verify(executor="inline").problems == []
        self._forgotten()
        self._right_rows()
        assert self.medium.leftovers() == []

    def _right_rows(self) -> None:
        """Everybody who is left is there once, says what they should, and lies where the key puts them."""
        found = soak.rows_of(self.medium)
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
        with closing(kit.reopened(self.uri)) as store:
            found = store.verify(replay="all", executor="inline")
            assert (found.problems, found.stages_replayed) == ([], store.opened.shards * store.opened.slices)
            state = kit.end_state(store)
            left = digests_of(store)
        assert {request[0] for request in state["requests"]} == {"repaired"}
        fresh, rows = self._fresh()
        for part in ("constituents", "stages"):
            assert state[part] == fresh[part], part
        assert {record: where for record, (where, _) in soak.rows_of(self.medium).items()} == rows
        purged = self.digests - left
        forbidden = self.model.forgotten(set(self.states))
        assert forbidden
        assert purged
        assert not soak.words_in(self.medium.log())
        for name, content in [*self.medium.contents(), ("the log", self.log.read_bytes()), *self._server()]:
            assert not soak.words_in(content) & forbidden, name
            assert "pg_wal" in name or not soak.keys_in(content) & purged, name

    def _fresh(self) -> tuple[dict[str, Any], dict[str, str]]:
        """A store in a folder that was trained on those who are left, and on nobody else; and where their rows lie."""
        parts: list[list[soak.Row]] = [[] for _ in range(self.model.generations + 1)]
        for row in self.model.survivors():
            parts[row.generation].append(row)
        recipe = soak.made_recipe(self.folder / "fresh", parts[0])
        folder = self.folder / "fresh" / "store"
        with closing(kit.trained(recipe, folder)) as store:
            for generation, rows in enumerate(parts[1:], start=1):
                source = self.folder / "fresh" / f"{generation}.parquet"
                papq.write_table(soak.table(rows), source)
                store.add(source, executor="inline")
            where = {record: where for record, (where, _) in soak.rows_of(Folder(folder)).items()}
            return kit.end_state(store), where

    def _server(self) -> Iterator[tuple[str, bytes]]:
        """What the ledger's server keeps: a dump, its data as files, and its log."""
        if self.server is None:
            return
        dump = [str(self.server.programs / "pg_dump"), "-d", self.server.dsn.removesuffix("postgres") + "sisa"]
        yield "the dump", subprocess.run(dump, check=True, capture_output=True).stdout
        self.server.ask("CHECKPOINT")
        yield "the server's log", (self.server.folder / "log").read_bytes()
        for path in sorted(path for path in self.server.data.rglob("*") if path.is_file()):
            yield str(path.relative_to(self.server.data)), path.read_bytes()


def digests_of(store: Store) -> set[str]:
    """Whatever could be held against a guess about somebody: names and digests of stages, and of the rows of slices."""
    ledger = store.opened.ledger
    stages = {digest for row in ledger.stages.all() for digest in (row.key, row.state_digest, row.full_digest)}
    slices = {digest for row in ledger.partitions.all() for digest in (row.membership, row.next_membership)}
    return (stages | slices) - {"", None}
