"""A soak: processes at one store that delete, correct, add, train and repair at once, and are killed as the seed says.

A life is one store from its training to its end. What is tried in each round follows from the life's seed: who asks for
what, at which durable step or after how long a process is killed or frozen, when the ledger's server is stopped. Which
process gets ahead of which is the kernel's choice: given a seed again, the same is tried, and a failure that needs a
certain order may take a few runs. Nothing that is checked depends on time.

The model knows what was asked. Whether somebody who was killed was still heard is the ledger's to say, by the reason
that each request carries; whoever was acknowledged must have been. Everything else follows: who is left, and what
their rows say.
"""

from __future__ import annotations

import hashlib
import os
import random
import re
import signal
import struct
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import crash_kit as kit
import pyarrow as pa
import pyarrow.parquet as papq
from soak_media import Medium, Place, doomed

from sisa.errors import SisaError
from sisa.progress import Silent
from sisa.training import stage as stage_module

DELETERS = 3
GENERATIONS = 2
SHARDS, SLICES = 3, 2
FROZEN_S = 0.2
PAUSES_S = (0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.004)
"""Before a durable step: so that the order of processes varies."""

# --- people -----------------------------------------------------------------------------------------

_ID = re.compile(rb"(?:rec|per|tag)-[0-9a-f]{10}")
_MARK = b"\xa5\x5a\xc3"
_NUMBER = re.compile(re.escape(_MARK) + rb".{5}", re.DOTALL)
_KEY = re.compile(rb"[0-9a-f]{64}")


@dataclass(frozen=True)
class Row:
    """One row as it should be. Its ids, tag and x are its own: wherever they are found, it was."""

    record: str
    person: str
    tag: str
    x: float
    z: float
    label: str
    generation: int


def number(rng: random.Random) -> float:
    """A number whose bytes can be told from others in any file."""
    return float(struct.unpack("<d", _MARK + struct.pack("<d", rng.gauss(0, 1))[3:])[0])


def word(value: float) -> str:
    """What is found of such a number."""
    return struct.pack("<d", value).hex()


def population(seed: str, people: int) -> list[Row]:
    """Rows of the first ingest and of what is added later; half of those who come later were there before."""
    rng = random.Random(f"{seed} people")

    def name(kind: str, what: object) -> str:
        return f"{kind}-{hashlib.sha256(f'{seed} {kind} {what}'.encode()).hexdigest()[:10]}"

    rows: list[Row] = []
    for generation in range(GENERATIONS + 1):
        owners = [i if i % 2 or not generation else 1000 * generation + i for i in range(people)]
        if generation:
            owners = owners[: people // 3]
        for owner in [*owners, *rng.sample(owners, len(owners) // 3)]:
            record, person, tag = name("rec", len(rows)), name("per", owner), name("tag", owner)
            label = rng.choice(["no", "yes"])
            rows.append(Row(record, person, tag, number(rng), rng.gauss(0, 1), label, generation))
    return rows


def table(rows: list[Row]) -> pa.Table:
    """Rows as a source holds them."""
    names = ("record", "person", "tag", "x", "z", "label")
    return pa.table({name: [getattr(row, name) for row in rows] for name in names})


def made_recipe(folder: Path, rows: list[Row], ledger: str | None = None) -> dict[str, Any]:
    """Write the rows of a first ingest, and return a recipe for them."""
    recipe = kit.make_recipe(folder, table(rows), shards=SHARDS, slices=SLICES, batch_size=8)
    recipe["data"]["features"] = ["x", "z", "tag"]
    return {**recipe, "ledger": ledger, "workers": {"snapshot_every_s": 0.0}}


# --- what is searched -------------------------------------------------------------------------------


def words_in(content: bytes) -> set[str]:
    """Ids, tags and numbers of people in some bytes."""
    ids = {found.decode() for found in _ID.findall(content)}
    return ids | {found.hex() for found in _NUMBER.findall(content)}


def keys_in(content: bytes) -> set[str]:
    """Digests and lineage keys in some bytes."""
    return {found.decode() for found in _KEY.findall(content)}


def rows_of(medium: Medium) -> dict[str, tuple[str, Row]]:
    """What each row in the records says, and in which partition; read by another way."""
    found: dict[str, tuple[str, Row]] = {}
    for where, row in medium.rows():
        assert row["_sisa_record"] not in found, where
        said = Row(
            row["_sisa_record"], row["_sisa_subject"], row["tag"], row["x"], row["z"],
            ["no", "yes"][int(row["_sisa_label"])], 0,
        )  # fmt: skip
        found[said.record] = (where, said)
    return found


# --- what processes do ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ask:
    """One command. Its name is the reason that its request carries."""

    name: str
    what: str
    ids: tuple[str, ...] = ()
    kind: str = "subjects"
    defer: bool = False
    source: str = ""
    rows: tuple[tuple[str, float], ...] = ()
    """Of a correction: the new x of each record."""


@dataclass(frozen=True)
class Plan:
    """What one process does, and what happens to it."""

    asks: tuple[Ask, ...]
    seed: str = ""
    fate: str = ""
    """Empty, or ``killed``, ``frozen`` or ``buried`` (frozen, then killed) at a step, or killed at a ``moment``, or
    ``within`` an upload: then a step is a part of one, and what follows the last."""
    step: int = 0
    moment_s: float = 0.0
    restless: bool = False
    """Keep a recovery snapshot after every step of a training."""

    def __str__(self) -> str:
        asks = ", then ".join(f"{ask.what} {' '.join(ask.ids)}{' (defer)' * ask.defer}" for ask in self.asks)
        at = f"after {self.moment_s:.2f} s" if self.fate == "moment" else f"at step {self.step}"
        return f"{asks}{f' [{self.fate} {at}]' if self.fate else ''}"


class Trap:
    """Before each durable step, and each call to a bucket: now and then a pause, and once the process is killed, or stops."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._passed = 0
        self._rng = random.Random(plan.seed)

    def __call__(self, name: str) -> None:
        if self._plan.fate in {"killed", "frozen", "buried"} and self._passed == self._plan.step:
            kit.to_parent.send(("stopped", name))
            os.kill(os.getpid(), signal.SIGKILL if self._plan.fate == "killed" else signal.SIGSTOP)
        self._passed += 1
        time.sleep(self._rng.choice(PAUSES_S))


class Notes(Silent):
    """Writes notes into the log, and tells the parent of an acknowledgement."""

    def __init__(self, ask: Ask) -> None:
        self._ask = ask

    def note(self, text: str) -> None:
        print(self._ask.name, text, file=sys.stderr, flush=True)
        if found := re.match(r"(?:accepted as|asked for before, as) ([a-z]+-[0-9a-f]+)", text):
            kit.to_parent.send(("told", (self._ask.name, "acknowledged", found[1])))


def act(place: Place, log: Path, recipe: dict[str, Any], plan: Plan) -> None:
    """Carry out a plan in a process of its own; what it says on stdout and stderr goes to the log."""
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    stage_module.LOOK_UP_S = 0.0 if plan.restless else stage_module.LOOK_UP_S
    if plan.fate == "within":
        os.environ["AWS_ACCESS_KEY_ID"] = doomed(plan.step)
    with place.watched(Trap(plan)):
        for ask in plan.asks:
            try:
                said = ("ended", _asked(place.uri, recipe, ask))
            except SisaError as error:
                print(ask.name, error.without_ids, file=sys.stderr, flush=True)
                said = (type(error).__name__, error.message)
            kit.to_parent.send(("told", (ask.name, *said)))


def _asked(uri: str, recipe: dict[str, Any], ask: Ask) -> str:
    reporter = Notes(ask)
    if ask.what == "train":
        kit.train(recipe, store=uri, executor="inline", reporter=reporter).close()
        return ""
    store = kit.reopened(uri)
    common: dict[str, Any] = {"executor": "inline", "reporter": reporter}
    try:
        if ask.what == "delete":
            ids: dict[str, Any] = {ask.kind: ask.ids}
            done = store.delete(**ids, reason=ask.name, defer=ask.defer, **common)
            return f"{done.request} {done.state}"
        if ask.what == "correct":
            return store.correct(ask.source, reason=ask.name, defer=ask.defer, **common).state
        if ask.what == "add":
            return str(store.add(ask.source, defer=ask.defer, **common).generation)
        if ask.what == "verify":
            return str(len(store.verify(replay=1, **common).problems))
        return " ".join(store.repair(**common).requests)
    finally:
        store.close()


# --- the model --------------------------------------------------------------------------------------


@dataclass
class Model:
    """Who is left and what their rows say, by what was asked and what the ledger says it accepted."""

    rows: dict[str, Row]
    asks: dict[str, Ask] = field(default_factory=dict)
    generations: int = 0
    people_gone: dict[str, set[str]] = field(default_factory=dict)
    """Whom requests took away, and which did."""
    records_gone: dict[str, set[str]] = field(default_factory=dict)
    superseded: dict[str, str] = field(default_factory=dict)
    """What rows said once, and the correction that changed it."""

    def learn(self, requests: list[Any], generations: int) -> None:
        """Take over what the ledger says: its requests in their order, and how many generations there are."""
        assert generations >= self.generations
        self.generations = generations
        self.people_gone, self.records_gone, self.superseded = {}, {}, {}
        self._now = dict(self.rows)
        for request in requests:
            ask = self.asks[request.reason]
            assert request.kind == ("correction" if ask.what == "correct" else "deletion")
            for identifier in ask.ids:
                gone = self.people_gone if ask.kind == "subjects" else self.records_gone
                gone.setdefault(identifier, set()).add(request.id)
            for record, x in ask.rows:
                row = self._now[record]
                if row.x != x:
                    self.superseded[word(row.x)] = request.id
                    self._now[record] = replace(row, x=x)

    def present(self) -> list[Row]:
        """Every row that was ever in the store, as it is now, deleted or not."""
        now = getattr(self, "_now", self.rows)
        return [row for row in now.values() if row.generation <= self.generations]

    def survivors(self) -> list[Row]:
        """Every row that is left, as it should be."""
        return [row for row in self.present() if not self.gone(row)]

    def gone(self, row: Row) -> bool:
        return row.person in self.people_gone or row.record in self.records_gone

    def forgotten(self, purged: set[str]) -> set[str]:
        """Every word that no byte may say, given the requests that count as purged.

        What was asked for twice counts when each request that names it does.
        """
        words = {old for old, request in self.superseded.items() if request in purged}
        for row in self._now.values():
            naming = self.people_gone.get(row.person, set()) | self.records_gone.get(row.record, set())
            if naming and naming <= purged:
                words |= {row.record, word(row.x), word(self.rows[row.record].x)}
            if self.people_gone.get(row.person, set()) and self.people_gone[row.person] <= purged:
                words |= {row.person, row.tag}
        return words


def draw(model: Model, seed: str, folder: Path, place: Place) -> list[Plan]:
    """What the processes of one round do: three delete, and one may do something else."""
    rng = random.Random(seed)
    everyone = sorted({row.person for row in model.rows.values()})
    rng.shuffle(everyone)
    spared = {row.person for g in range(GENERATIONS + 1) for row in _of(model, g)[:3]}  # so that nothing is ever empty
    known = {row.person for row in model.present()}
    pool = [person for person in everyone if person in known - spared]
    left = [person for person in pool if person not in model.people_gone]
    arriving = [person for person in left if person in _lately_written(model)]  # a killed command may have left them
    hot = [*arriving[:2], *(left or pool)[:3]]
    plans = []
    for process in range(DELETERS + (rng.random() < 0.6)):
        name = f"{seed}.{process}"
        asks = [_deletion(model, rng, name, hot, pool)] if process < DELETERS else []
        if not asks or rng.random() < 0.25:
            asks.append(_anything(model, rng, f"{name}b", folder))
        deletes = process < DELETERS
        fate = rng.choices(
            ["", "killed", "frozen", "buried", "moment"], [9, 5, 1, 1, 3] if deletes else [5, 7, 1, 1, 1]
        )[0]
        step = int(place.steps * rng.random() ** (1.5 if deletes else 2.5))
        moment_s, restless = rng.random() * place.moment_s, rng.random() < 0.3
        if place.uploads and fate in {"killed", "moment"} and rng.random() < 0.4:
            fate, step = "within", rng.randrange(8)
        plans.append(Plan(tuple(asks), name, fate, step, moment_s, restless))
    for plan in plans:
        model.asks |= {ask.name: ask for ask in plan.asks}
    return plans


def _lately_written(model: Model) -> set[str]:
    """Whose rows the newest corrections and additions wrote, or meant to."""
    asks = [ask for ask in model.asks.values() if ask.what in {"correct", "add"}][-2:]
    corrected = {model.rows[record].person for ask in asks for record, _ in ask.rows}
    return corrected | {row.person for ask in asks if ask.what == "add" for row in _of(model, int(ask.ids[0]))}


def _of(model: Model, generation: int) -> list[Row]:
    return [row for row in model.rows.values() if row.generation == generation]


def _deletion(model: Model, rng: random.Random, name: str, hot: list[str], pool: list[str]) -> Ask:
    """Somebody whom others ask for too, or anybody; people whole, or single rows of theirs."""
    people = [rng.choice(hot if rng.random() < 0.6 else pool) for _ in range(rng.choice([1, 1, 1, 2, 3]))]
    defer = rng.random() < 0.3
    if rng.random() < 0.25:
        records = [rng.choice([r.record for r in model.present() if r.person == person]) for person in people]
        return Ask(name, "delete", tuple(dict.fromkeys(records)), "records", defer)
    return Ask(name, "delete", tuple(dict.fromkeys(people)), defer=defer)


def _anything(model: Model, rng: random.Random, name: str, folder: Path) -> Ask:
    what = rng.choices(["repair", "correct", "train", "add", "verify"], [4, 4, 2, 2, 1])[0]
    defer = rng.random() < 0.4
    if what == "add":
        generation = rng.choice([max(1, model.generations), min(GENERATIONS, model.generations + 1)])
        source = folder / f"generation-{generation}.parquet"
        papq.write_table(table(_of(model, generation)), source)
        return Ask(name, what, (str(generation),), defer=defer, source=str(source))
    if what == "correct":
        earlier = [ask for ask in model.asks.values() if ask.what == "correct"]
        if earlier and rng.random() < 0.25:
            return replace(rng.choice(earlier), name=name)
        some = rng.sample(model.survivors(), 2)
        source = folder / f"{name.replace('/', '-')}.parquet"
        new = [replace(row, x=number(rng)) for row in some]
        papq.write_table(table(new), source)
        return Ask(name, what, defer=defer, source=str(source), rows=tuple((row.record, row.x) for row in new))
    return Ask(name, what)
