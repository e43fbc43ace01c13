"""The forgetting contract, held against a perfect in-memory model, while every command that changes a store may crash.

The model is a dictionary of surviving rows, and how often each was corrected. What each lineage key saw is computed by an oracle from the rows alone,
so that a stage's name says whether it may be there. After each step the contract holds; when nothing is pending, the
store equals one trained from nothing on the survivors, bit for bit.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import crash_kit as kit
import numpy as np
import pyarrow as pa
import pyarrow.parquet as papq
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from sisa.errors import NoConstituentError, UserError
from sisa.layout import Layout
from sisa.ledger import STATES
from sisa.lineage import membership, stage_key
from sisa.opening import is_store
from sisa.records.digest import content_digests
from sisa.records.partition import read_partition
from sisa.routing.keys import exclusion_digest, shard_keys
from sisa.store.store import Store

ERASED, PURGED = STATES.index("rows_erased"), STATES.index("stages_purged")
PROBE = pa.table({"x": np.linspace(-2, 2, 7), "z": np.linspace(1, -1, 7)})


@dataclass(frozen=True)
class Shape:
    """What kind of store an example is about."""

    people: int
    shards: int
    slices: int
    optimizer: str


GENERATIONS = 2
WORDINGS = 3
"""What a row may say: at first, and after each of its corrections."""
Said = tuple[str, int]
"""A record, and the how-manieth of its wordings."""
SHAPES = [Shape(8, 2, 2, "sgd"), Shape(10, 2, 3, "adam"), Shape(14, 3, 2, "sgd")]


@dataclass
class World:
    """A table, its recipe, a trained store to copy, and what training on fewer rows gives."""

    folder: Path
    shape: Shape
    recipe: dict[str, Any] = field(init=False)
    tables: list[pa.Table] = field(init=False)
    """The first ingest, and what is added later, in this order."""
    known: dict[tuple[frozenset[Said], int], dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.tables = [kit.people(self.shape.people, seed=self.shape.people)]
        for generation in range(1, GENERATIONS + 1):
            self.tables.append(kit.more_people(self.shape.people, generation=generation))
        momentum = {"momentum": 0.9} if self.shape.optimizer == "sgd" else {}
        self.recipe = kit.make_recipe(
            self.folder,
            self.tables[0],
            shards=self.shape.shards,
            slices=self.shape.slices,
            optimizer={"name": self.shape.optimizer, "lr": 0.1, **momentum},
        )

    @cached_property
    def owners(self) -> dict[str, str]:
        """Record -> person, for all rows there ever were."""
        return {r: p for g in range(GENERATIONS + 1) for r, p in self.brought(g).items()}

    @cached_property
    def values(self) -> dict[str, float]:
        """Record -> x, as it is at first."""
        return {r: x for t in self.tables for r, x in zip(t["record"].to_pylist(), t["x"].to_pylist(), strict=True)}

    def brought(self, generation: int) -> dict[str, str]:
        """Record -> person, for the rows of one generation."""
        table = self.tables[generation]
        return dict(zip(table["record"].to_pylist(), table["person"].to_pylist(), strict=True))

    def source(self, generation: int) -> Path:
        path = self.folder / f"generation-{generation}.parquet"
        papq.write_table(self.tables[generation], path)
        return path

    def said(self, rows: Iterable[Said], generation: int | None = None) -> pa.Table:
        """Rows as a table; only those of one generation, if one is given."""
        wording = dict(rows)
        names = self.tables[0].column_names
        table = pa.concat_tables(
            [t.select(names) for t in (self.tables if generation is None else [self.tables[generation]])]
        )
        table = table.filter(pa.array([record in wording for record in table["record"].to_pylist()], pa.bool_()))
        return reworded(table, [wording[record] for record in table["record"].to_pylist()])

    def correction(self, rows: Iterable[Said], *, name: str = "corrected") -> Path:
        path = self.folder / f"{name}.parquet"
        papq.write_table(self.said(rows), path)
        return path

    @cached_property
    def template(self) -> Path:
        kit.trained(self.recipe, self.folder / "template").close()
        return self.folder / "template"

    @cached_property
    def steps(self) -> list[str]:
        """Names of the durable operations of every command that changes a store."""
        names: list[str] = []
        root = self.folder / "counted"
        source = self.source(1)
        with kit.before_durable_operations(root, names.append):
            store = kit.trained(self.recipe, root)
            store.add(source, executor="inline")
            some = ((record, 1) for record in sorted(self.brought(0))[:6])
            store.correct(self.correction(some, name="counted"), executor="inline")
            for person in sorted({*self.brought(0).values()})[:4]:
                store.delete(subjects=[person], executor="inline")
            store.close()
        return sorted(set(names))

    @cached_property
    def places(self) -> dict[str, tuple[int, int]]:
        """(shard, slice) of each record."""
        store = kit.reopened(self.template)
        route = store.opened.router.route_one
        found: dict[str, tuple[int, int]] = {}
        for generation in range(GENERATIONS + 1):
            for record, person in self.brought(generation).items():
                shard, slice_ = route(person)
                if generation:
                    slice_ = self.shape.slices + generation if slice_ else -generation
                found[record] = (shard, slice_)
        store.close()
        return found

    @cached_property
    def digests(self) -> dict[Said, tuple[bytes, bytes]]:
        """Keyed digests of each record's id and content, for each of its wordings."""
        root = kit.copy_store(self.template, self.folder / "grown")
        with contextlib.closing(kit.reopened(root)) as grown:
            for generation in range(1, GENERATIONS + 1):
                grown.add(self.source(generation), executor="inline")
        store = kit.reopened(root).opened
        found: dict[Said, tuple[bytes, bytes]] = {}
        for shard, slice_ in set(self.places.values()):
            keys = shard_keys(store.keys.routing, shard)
            rows = read_partition(store.layout, store.recipe, keys, shard, slice_)
            records = rows.table["_sisa_record"].to_pylist()
            for wording in range(WORDINGS):
                table = reworded(rows.table, [wording] * len(records))
                contents_N16 = content_digests(keys, table, store.recipe)
                for record, one, other in zip(records, rows.id_digests_N16, contents_N16, strict=True):
                    found[record, wording] = (one.tobytes(), other.tobytes())
        self.footing = (store.recipe_digest, *(store.ledger.footing() or ("", "")))
        store.ledger.close()
        return found

    def seen_by_keys(self, survivors: frozenset[Said], generations: int) -> dict[str, frozenset[Said]]:
        """The keys that these rows call for, and the rows that each saw."""
        digests = self.digests
        recipe_digest, code, _ = self.footing
        keys: dict[str, frozenset[Said]] = {}
        for shard in range(self.shape.shards):
            parent, seen = "", frozenset[Said]()
            for stage in range(1, self.shape.slices + generations + 1):
                there = sorted(row for row in survivors if self.places[row[0]] == (shard, stage))
                seen |= frozenset(there)
                columns = [
                    np.array([list(digests[row][side]) for row in there], np.uint8).reshape(-1, 16) for side in (0, 1)
                ]
                parent = stage_key(
                    recipe_digest=recipe_digest,
                    code_version=code,
                    shard=shard,
                    stage=stage,
                    parent_key=parent,
                    membership=membership(*columns),
                )
                keys[parent] = seen
        return keys

    def scratch(self, survivors: frozenset[Said], generations: int) -> dict[str, Any]:
        """What a store that was trained on these rows alone is."""
        if (survivors, generations) not in self.known:
            left = [self.said(survivors, generation) for generation in range(GENERATIONS + 1)]
            folder = self.folder / "scratch"
            recipe = kit.make_recipe(folder, left[0], shards=1, slices=1)
            recipe = {**self.recipe, "data": {**self.recipe["data"], "source": recipe["data"]["source"]}}
            store = kit.trained(recipe, folder / "store")
            for generation in range(1, generations + 1):
                papq.write_table(left[generation], folder / "added.parquet")
                store.add(folder / "added.parquet", executor="inline")
            self.known[survivors, generations] = {**kit.end_state(store), "answers": answers(store)}
            store.close()
            shutil.rmtree(folder)
        return self.known[survivors, generations]


def reworded(table: pa.Table, wordings: list[int]) -> pa.Table:
    """Rows with what they say after so many corrections each."""
    values = [x + 0.75 * wording for x, wording in zip(table["x"].to_pylist(), wordings, strict=True)]
    return table.set_column(table.column_names.index("x"), "x", pa.array(values, pa.float64()))


def answers(store: Store) -> bytes:
    """What the ensemble says about the probe, to the last bit; empty if nobody can answer."""
    try:
        return store.predict_proba(PROBE).tobytes()
    except NoConstituentError:
        return b""


WORLDS: dict[Shape, World] = {}


@pytest.fixture(scope="module", autouse=True)
def _worlds() -> Iterator[None]:
    with kit.fast_folder() as folder:
        for number, shape in enumerate(SHAPES):
            WORLDS[shape] = World(folder / str(number), shape)
        yield
        WORLDS.clear()


COUNTED = 80
crashes = st.none() | st.integers(0, 2 * COUNTED)
"""How many durable operations pass before the process dies; above ``COUNTED``, at the first of which kind it does."""


class Contract(RuleBasedStateMachine):
    """Commands in any order, each of which may die at any durable operation."""

    def __init__(self) -> None:
        super().__init__()
        self._exit = contextlib.ExitStack()
        self.root = self._exit.enter_context(kit.fast_folder()) / "store"
        self.world: World | None = None
        self.rows: dict[str, str] = {}
        """The perfect model: record -> person."""
        self.wordings: dict[str, int] = {}
        """How often each record was corrected."""
        self.gone: dict[str, set[Said]] = {}
        """Rows that each request took away: records in all of their wordings, or one wording of a record."""
        self.corrections: set[str] = set()
        """Requests that are none to delete."""
        self.seen: dict[str, frozenset[Said]] = {}
        """Rows that each lineage key saw."""
        self.people_gone: set[str] = set()
        """People whose deletion was accepted, and records that were deleted alone."""
        self.generations = 0
        self.trained_through = 0
        """How many generations there were when the newest training or repair ended."""
        self.built = False
        """The first training has ended."""
        self.swept = True
        """A training or a repair has ended since something died."""
        self.reader: Store | None = None
        """Another process, which has the ensemble loaded."""

    def teardown(self) -> None:
        if self.reader is not None:
            self.reader.close()
        self._exit.close()

    @initialize(shape=st.sampled_from(SHAPES), trained=st.booleans())
    def begin(self, shape: Shape, trained: bool) -> None:
        self.world = WORLDS[shape]
        self.rows = self.world.brought(0)
        self._expect()
        if trained:
            kit.copy_store(self.world.template, self.root)
            self.built = True

    # --- the commands ---

    @rule(crash=crashes)
    def train(self, crash: int | None) -> None:
        """The first training, and re-ingestion: the source still holds everybody who was deleted."""

        def command() -> None:
            store = kit.trained(self.world.recipe, self.root)
            kept = sum(self.world.places[record][1] > 0 for record in self.rows)
            assert store.training.records == kept
            store.close()

        self._built(self._run(command, crash))

    @precondition(lambda self: self._ingested())
    @rule(again=st.booleans(), crash=crashes)
    def add(self, again: bool, crash: int | None) -> None:
        """The next generation, or the newest one again; the source may hold people who were deleted."""
        generation = max(1, self.generations if again else min(self.generations + 1, GENERATIONS))
        source = self.world.source(generation)
        new = {record: person for record, person in self.world.brought(generation).items() if not self._is_gone(record)}
        old = any(self.wordings.get(record) for record in new)  # the table says what was corrected since

        def command() -> None:
            store = kit.reopened(self.root)
            try:
                done = store.add(source, executor="inline")
                assert (done.generation, done.repeated) == (generation, generation <= before)
                assert done.records + done.holdout_records == len(new)
                assert not old
            except UserError:
                assert old or not new
            finally:
                store.close()

        before = self.generations
        ended = self._run(command, crash)
        store = kit.reopened(self.root)
        self.generations = store.opened.generations
        store.close()
        assert self.generations == max(before, generation) or not ended or not new
        if self.generations > before:
            self.rows |= new
        self._expect()
        if new and not (old and ended):
            self._built(ended)

    @precondition(lambda self: self._ingested())
    @rule(data=st.data(), kind=st.sampled_from(["subjects", "records"]), defer=st.booleans(), crash=crashes)
    def delete(self, data: st.DataObject, kind: str, defer: bool, crash: int | None) -> None:
        """One or several people or records; some may be gone already."""
        everybody = sorted({*self.world.owners.values()} if kind == "subjects" else self.world.owners)
        ids = data.draw(st.lists(st.sampled_from(everybody), min_size=1, max_size=3, unique=True), label=kind)
        here = {record for record, person in self.rows.items() if (person if kind == "subjects" else record) in ids}

        def command() -> None:
            store = kit.reopened(self.root)
            try:
                done = store.delete(**{kind: ids}, defer=defer, ignore_missing=True, executor="inline")
                assert STATES.index(done.state) >= PURGED
                assert defer or done.state == "repaired" or not store.version  # the first training was killed
                assert bool(done.request) or not here
            finally:
                store.close()

        ended = self._run(command, crash)
        self._accepted(kind, [i for i in ids if self._is_here(kind, i)], here)
        assert not ended or not here & self.rows.keys()

    @precondition(lambda self: self._ingested() and self.rows)
    @rule(data=st.data(), defer=st.booleans(), crash=crashes)
    def correct(self, data: st.DataObject, defer: bool, crash: int | None) -> None:
        """One or several rows; who was corrected often enough stays as they are."""
        here = sorted(self.rows)
        records = data.draw(st.lists(st.sampled_from(here), min_size=1, max_size=3, unique=True), label="records")
        new = {record: min(self.wordings.get(record, 0) + 1, WORDINGS - 1) for record in records}
        source = self.world.correction(new.items())
        changed = {record for record in records if new[record] != self.wordings.get(record, 0)}

        def command() -> None:
            store = kit.reopened(self.root)
            try:
                done = store.correct(source, defer=defer, executor="inline")
                assert (done.records, done.unchanged) == (len(changed), len(new) - len(changed)) or not changed
                assert defer or done.state == "repaired" or not store.version
            finally:
                store.close()

        ended = self._run(command, crash)
        store = kit.reopened(self.root)
        fresh = [request for request in store.opened.ledger.requests.all() if request.id not in self.gone]
        store.close()
        assert [request.records for request in fresh] in ([len(changed)], [])
        assert fresh or not ended or not changed
        for request in fresh:
            self.gone[request.id] = {(record, self.wordings.get(record, 0)) for record in changed}
            self.corrections.add(request.id)
            self.wordings |= new
        self._expect()

    @precondition(lambda self: self._ingested())
    @rule(crash=crashes)
    def repair(self, crash: int | None) -> None:
        def command() -> None:
            store = kit.reopened(self.root)
            store.repair(executor="inline")
            store.close()

        self._built(self._run(command, crash))

    @precondition(lambda self: self._ingested())
    @rule(crash=st.integers(0, 60))
    def replay(self, crash: int) -> None:
        """A verification that may die and leave behind what it retrained."""

        def command() -> None:
            store = kit.reopened(self.root)
            store.verify(replay="all", executor="inline")
            store.close()

        self._run(command, crash)

    # --- what always holds ---

    @invariant()
    def holds(self) -> None:
        if self.world is None or not is_store(Layout(self.root)):
            return
        store = kit.reopened(self.root)
        try:
            if store.opened.ledger.ingested:
                states = {r.id: STATES.index(r.state) for r in store.opened.ledger.requests.all()}
                assert states.keys() == self.gone.keys()
                self._serves_clean_stages(store)
                self._holds_the_right_rows(store, states)
                self._holds_no_tainted_bytes(store, states)
                if self.built and self.swept and all(state >= PURGED for state in states.values()):
                    assert store.verify().problems == []
                trained = self.built and self.trained_through == self.generations
                if trained and all(state == len(STATES) - 1 for state in states.values()):
                    self._equals_scratch(store, states)
        finally:
            store.close()

    def _serves_clean_stages(self, store: Store) -> None:
        ledger = store.opened.ledger
        version = ledger.versions.live()
        assert version.number >= ledger.versions.last_quarantine()
        for member in version.members:
            if member.stage:
                assert not self.seen[member.key] & self._deleted()
        self.reader = self.reader or kit.reopened(self.root)
        for user in (store, self.reader):  # one has just started, one holds what was live some commands ago
            said = answers(user)
            serving = {m.key for m in version.members if m.stage}
            assert bool(said) == bool(serving)
            if said:
                assert {member.key for member in user.ensemble._loaded} == serving
        assert answers(store) == answers(self.reader)

    def _holds_the_right_rows(self, store: Store, states: dict[str, int]) -> None:
        found = self._of_the_store(kit.rows_on_disk(self.root), states)
        present = [record for records in found.values() for record in records]
        assert len(present) == len(set(present))
        deletions = self.gone.keys() - self.corrections
        waiting = {record for request in deletions if states[request] < ERASED for record, _ in self.gone[request]}
        assert self.rows.keys() <= set(present) <= self.rows.keys() | waiting
        rewritten = all(state >= ERASED for state in states.values())
        if rewritten and not store.opened.layout.incoming.exists():
            assert not list((self.root / "records").rglob("tmp-*"))
        self._says_what_it_should(states)
        for name, records in found.items():
            for record in records:
                shard, slice_ = self.world.places[record]
                holdout = f"generation={-slice_:02d}/" if slice_ < 0 else ""
                assert name.startswith(
                    f"records/shard={shard:04d}/slice={slice_:02d}/"
                    if slice_ > 0
                    else f"records/holdout/{holdout}shard={shard:04d}/"
                )

    def _says_what_it_should(self, states: dict[str, int]) -> None:
        """No row says what was corrected, wherever in the store it lies; nor does one of the deleted wait to be merged."""
        erased = {row for request, rows in self.gone.items() if states[request] >= ERASED for row in rows}
        for path in self.root.rglob("*.parquet"):
            table = papq.read_table(path, partitioning=None)
            for record, x in zip(table["_sisa_record"].to_pylist(), table["x"].to_pylist(), strict=True):
                (wording,) = [w for w in range(WORDINGS) if self.world.values[record] + 0.75 * w == x]
                assert (record, wording) not in erased, path

    def _of_the_store(self, found: dict[str, list[str]], states: dict[str, int]) -> dict[str, list[str]]:
        """Without what a killed addition left; that holds nobody who was said to be erased since."""
        next_ = self.generations + 1
        left = (f"/slice={self.world.shape.slices + next_:02d}/", f"/generation={next_:02d}/")
        strange = {
            record for name, records in found.items() if any(part in name for part in left) for record in records
        }
        if all(state >= ERASED for state in states.values()):
            assert not {record for record in strange if self._is_gone(record)}
        return {name: records for name, records in found.items() if not any(part in name for part in left)}

    def _holds_no_tainted_bytes(self, store: Store, states: dict[str, int]) -> None:
        """Wherever a stage's files lie (checkpoints, scratch, temporary folders): its key says what it saw."""
        purged = {row for request, rows in self.gone.items() if states[request] >= PURGED for row in rows}
        for path in self.root.rglob("zarr.json"):
            sealed = json.loads(path.read_bytes() or b"{}").get("attributes", {}).get("sisa")
            if sealed is not None:
                assert not self.seen[sealed["manifest"]["key"]] & purged, path
        for row in store.opened.ledger.stages.all():
            assert not self.seen[row.key] & (purged if row.tainted else self._deleted())

    def _equals_scratch(self, store: Store, states: dict[str, int]) -> None:
        if any(not self.rows.keys() & self.world.brought(g).keys() for g in range(1, self.generations + 1)):
            return  # nothing is left of a generation: an addition of nothing can't be asked for
        expected = self.world.scratch(self._said(), self.generations)
        found = kit.end_state(store)
        found["rows"] = self._of_the_store(found["rows"], states)
        for part in ("constituents", "stages", "rows"):
            assert found[part] == expected[part], part
        assert answers(store) == expected["answers"]
        assert {request[0] for request in found["requests"]} <= {"repaired"}

    # --- how commands run ---

    def _run(self, command: Callable[[], None], crash: int | None) -> bool:
        """Run a command, or let it die; say whether it ended."""
        if crash is None:
            command()
            return True
        steps = self.world.steps
        stop_at = crash if crash < COUNTED else steps[crash % len(steps)]
        try:
            with kit.before_durable_operations(self.root, kit.Countdown(stop_at)):
                command()
        except kit.Crash:
            self.swept = False
            return False
        return True

    def _built(self, ended: bool) -> None:
        self.built |= ended
        self.swept |= ended
        if ended:
            self.trained_through = self.generations

    def _ingested(self) -> bool:
        if self.world is None or not is_store(Layout(self.root)):
            return False
        store = kit.reopened(self.root)
        ingested = store.opened.ledger.ingested
        store.close()
        return ingested

    def _is_here(self, kind: str, identifier: str) -> bool:
        return identifier in (self.rows.values() if kind == "subjects" else self.rows)

    def _accepted(self, kind: str, ids: list[str], records: set[str]) -> None:
        """Find out whether the request was accepted: for all of its ids, or for none."""
        store = kit.reopened(self.root)
        requests, key = store.opened.ledger.requests, store.opened.keys.exclusion
        names = {("subject" if kind == "subjects" else "record", i) for i in ids} | {("record", r) for r in records}
        excluded = requests.excluded_by((k, exclusion_digest(key, k, i)) for k, i in names)
        fresh = [request.id for request in requests.all() if request.id not in self.gone]
        store.close()
        assert len(fresh) <= 1
        if ids:
            assert len(excluded) in {0, len(names)}
            assert bool(excluded) == bool(fresh)
        for request in fresh:
            self.gone[request] = wordings_of(records)
            self.people_gone |= set(ids)
            for record in records:
                del self.rows[record]
        self._expect()

    def _expect(self) -> None:
        """Remember what the keys that may be trained from now on see."""
        self.seen |= self.world.seen_by_keys(self._said(), self.generations)

    def _said(self) -> frozenset[Said]:
        return frozenset((record, self.wordings.get(record, 0)) for record in self.rows)

    def _is_gone(self, record: str) -> bool:
        """Whether a record must not enter, or not again."""
        return bool(self.people_gone & {record, self.world.owners[record]})

    def _deleted(self) -> set[Said]:
        """Rows that must not count any more: of deleted people, and what was corrected."""
        brought = {record for g in range(self.generations + 1) for record in self.world.brought(g)}
        return wordings_of(brought) - self._said()


def wordings_of(records: Iterable[str]) -> set[Said]:
    return {(record, wording) for record in records for wording in range(WORDINGS)}


COMMON = {
    "deadline": None,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
}


class TestContract(Contract.TestCase):
    settings = settings(max_examples=40, stateful_step_count=8, **COMMON)


@pytest.mark.slow
class TestContractAtLength(Contract.TestCase):
    settings = settings(max_examples=80, stateful_step_count=20, **COMMON)
