"""What ``sisa verify`` finds of a store that somebody edited, and what it must not say of one that nobody did."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import crash_kit as kit
import numpy as np
import pyarrow as pa
import pyarrow.parquet as papq
import pytest
import tables
import zarr
from store_kit import at, train, write

import sisa
from sisa.checkpoints.manifest import sealed
from sisa.cli.main import run
from sisa.errors import BusyError, DamagedError
from sisa.files import FileLock
from sisa.layout import Layout
from sisa.lineage import membership
from sisa.opening import open_store, renew_exclusion_key
from sisa.proof import rows, verify
from sisa.proof.chain import batch_count
from sisa.training.order import batch_sizes

TABLE = kit.people(12)
PROBE = TABLE.select(["x", "z"])
ROWS = "records/shard=0001/slice=01/part-00000.parquet"


@dataclass(frozen=True)
class World:
    """A store from which somebody was deleted, to copy; the recipe, and who is where in it."""

    folder: Path
    recipe: dict[str, Any]
    untouched: Path
    template: Path
    people: dict[tuple[int, int], list[str]]


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with kit.fast_folder() as folder:
        recipe = kit.make_recipe(folder, TABLE)
        store = kit.trained(recipe, folder / "untouched")
        people: dict[tuple[int, int], list[str]] = {}
        for person, place in kit.places(store, TABLE).items():
            people.setdefault(place, []).append(person)
        store.close()
        template = kit.copy_store(folder / "untouched", folder / "template")
        delete(template, people[1, 2][0])
        yield World(folder, recipe, folder / "untouched", template, people)


@pytest.fixture(autouse=True)
def _nobody_left() -> Iterator[None]:
    yield
    kit.Child.kill_all()


@pytest.fixture
def root(world: World, tmp_path: Path) -> Path:
    return kit.copy_store(world.template, tmp_path / "store")


def delete(root: Path, *subjects: str, **options: Any) -> None:
    store = kit.reopened(root)
    store.delete(subjects=list(subjects), executor="inline", **options)
    store.close()


def repair(root: Path) -> None:
    store = kit.reopened(root)
    store.repair(executor="inline")
    store.close()


def problems(root: Path, **options: Any) -> list[str]:
    store = kit.reopened(root)
    found: list[str] = store.verify(executor="inline", **options).problems
    store.close()
    return found


def edit(root: Path, *statements: str) -> None:
    """Change the ledger as somebody would who has SQLite."""
    with closing(sqlite3.connect(root / "ledger.db")) as ledger, ledger:
        for statement in statements:
            ledger.execute(statement)


def ask(root: Path, statement: str) -> list[tuple[Any, ...]]:
    with closing(sqlite3.connect(root / "ledger.db")) as ledger:
        return ledger.execute(statement).fetchall()


def stage(root: Path, shard: int, number: int) -> Path:
    (found,) = root.glob(f"checkpoints/shard-{shard:04d}/stage-{number:02d}-*")
    return found


# --- versions ---------------------------------------------------------------------------------------

LIVE = "(SELECT max(number) FROM versions)"


def of(shard: int, number: int, what: str = "key") -> str:
    """The key (or another column) of a stage, as SQL."""
    return f"(SELECT {what} FROM stages WHERE shard = {shard} AND stage = {number})"


MEMBERS: dict[str, tuple[list[str], str]] = {
    "two members swapped": (
        [f"UPDATE members SET key = CASE shard WHEN 0 THEN {of(1, 2)} ELSE {of(0, 2)} END WHERE version = {LIVE}"],
        r"shard 0 is served from a stage that is not its own stage 2",
    ),
    "one stage voting twice": (
        [f"UPDATE members SET key = {of(0, 2)} WHERE version = {LIVE}"],
        r"shard 1 is served from a stage that is not its own",
    ),
    "an older stage under the newest one's number": (
        [f"UPDATE members SET key = {of(1, 1)} WHERE version = {LIVE} AND shard = 1"],
        r"shard 1 is served from a stage that is not its own stage 2",
    ),
    "a shard left out": ([f"DELETE FROM members WHERE version = {LIVE} AND shard = 0"], "exactly one member"),
    "a shard too many": (
        [f"INSERT INTO members SELECT {LIVE}, 2, stage, key, platform FROM stages WHERE shard = 0 AND stage = 2"],
        "exactly one member",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MEMBERS)
def test_a_member_that_is_not_its_shards_own_stage(root: Path, name: str) -> None:
    statements, place = MEMBERS[name]
    before = kit.reopened(root).predict_proba(PROBE)
    edit(root, *statements)
    found = problems(root)
    assert any(re.search(place, problem) for problem in found), found
    with pytest.raises(DamagedError, match=r"would be served from stage|exactly one member") as refused:
        kit.reopened(root).predict_proba(PROBE)
    assert "repair" in refused.value.hint
    repair(root)
    assert (kit.reopened(root).predict_proba(PROBE) == before).all()


def test_a_stage_that_was_loaded_for_one_shard_does_not_answer_for_another(root: Path) -> None:
    store = kit.reopened(root)
    store.predict_proba(PROBE)
    edit(root, *MEMBERS["two members swapped"][0])
    with pytest.raises(DamagedError, match="would be served from stage 2 of shard"):
        store.predict_proba(PROBE)


def test_a_stage_of_other_rows_serves_nobody_unseen(world: World, root: Path) -> None:
    """Whole in itself, clean and of the right place, but the rows on disk don't call for it."""
    old = stage(world.untouched, 1, 2)
    shutil.copytree(old, stage(root, 1, 2).parent / old.name)
    key = old.name.removeprefix("stage-02-").partition(".")[0]
    (row,) = ask(world.untouched, f"SELECT * FROM stages WHERE key = '{key}'")
    edit(
        root,
        f"INSERT INTO stages VALUES {row!r}",
        f"UPDATE members SET key = '{key}' WHERE version = {LIVE} AND shard = 1",
    )
    assert any("served from a stage that the rows on disk don't call for" in problem for problem in problems(root))


def test_a_quarantine_serves_no_other_shards_stage(world: World, root: Path) -> None:
    """The chain of shard 1 was made to lead into shard 0, and its member to name a stage of shard 0."""
    edit(root, f"UPDATE stages SET parent_key = {of(0, 1)} WHERE shard = 1 AND stage = 2")
    delete(root, world.people[1, 2][1], defer=True)
    assert served(root) == {0: 2, 1: 0}


@pytest.mark.parametrize("loop", [of(1, 2), of(1, 1)])
def test_a_quarantine_ends_where_the_chain_is_a_circle(world: World, root: Path, loop: str) -> None:
    edit(root, f"UPDATE stages SET parent_key = {loop} WHERE shard = 1")
    delete(root, world.people[1, 1][0], defer=True)
    assert served(root) == {0: 2, 1: 0}


def test_a_quarantine_takes_a_tainted_stage_out_of_every_place(world: World, root: Path) -> None:
    edit(root, *MEMBERS["one stage voting twice"][0])  # shard 0's stage speaks for shard 1 too
    delete(root, world.people[0, 1][0], defer=True)
    assert served(root) == {0: 0, 1: 0}


def served(root: Path) -> dict[int, int]:
    return {member.shard: member.stage for member in kit.reopened(root).opened.ledger.versions.live().members}


# --- keys -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["routing", "exclusion"])
def test_another_key_under_the_name_of_the_stores(world: World, root: Path, name: str) -> None:
    path = root / "keys" / f"{name}.key"
    before = path.read_text()
    path.write_text("ab" * 32)
    with pytest.raises(DamagedError, match=rf"keys/{name}\.key is not the key that this store was made with"):
        kit.reopened(root)
    path.write_text(before.strip().upper())  # the same key, written otherwise
    assert problems(root) == []
    edit(root, f"DELETE FROM facts WHERE name = '{name}_key'")
    with pytest.raises(DamagedError, match=rf"keys/{name}\.key"):
        kit.reopened(root)
    value = dict(ask(world.template, "SELECT name, value FROM facts"))[f"{name}_key"]
    assert value not in before
    assert before.strip() not in value


def test_who_destroys_the_memory_of_deletions_says_so(world: World, root: Path) -> None:
    before = (root / "keys" / "exclusion.key").read_bytes()
    leaver = world.people[1, 2][0]
    renew_exclusion_key(Layout.at(root))
    assert (root / "keys" / "exclusion.key").read_bytes() != before
    assert problems(root, replay="all") == []
    with pytest.raises(sisa.errors.UnknownIdsError):
        kit.reopened(root).delete(subjects=[leaver])
    delete(root, world.people[0, 1][0])
    assert problems(root) == []
    (root / "keys" / "routing.key").write_text("ab" * 32)
    renew_exclusion_key(Layout.at(root))
    with pytest.raises(DamagedError, match=r"routing\.key is not the key"):
        open_store(Layout.at(root))


# --- files ------------------------------------------------------------------------------------------

STRAYS = [
    "audit/x.parquet", "audit/deep/x.parquet", "keys/old.parquet", "keys/old/x.parquet", "locks/rows.parquet",
    "locks/rows-0007.lock", "locks/stop-0000/x.parquet", "locks/stop-0009/x.parquet", "locks/deep/x.parquet",
    "locks/create.lock", "locks/shard-0000.lock", "scratch/x.parquet", "scratch", "audit", "x.parquet", "x/x.parquet",
    "ledger.db-shm", "records/x.parquet", "records/holdout/x/x.parquet", "records/shard=0001/x.parquet",
    "records/shard=0001/slice=01/deep/x.parquet", "records/shard=0009/slice=01/part-00000.parquet",
    "checkpoints/x.parquet", "checkpoints/shard-0000/x.parquet", "checkpoints/shard-0000/x/x.parquet",
]  # fmt: skip


@pytest.mark.parametrize("name", STRAYS)
def test_a_file_of_rows_that_nobody_answers_for(root: Path, name: str) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(root / ROWS, path)
    found = problems(root)
    assert found
    assert all(re.search(r"nobody answers for this|unknown file among the records", problem) for problem in found)
    assert any(path.is_relative_to(root / problem.partition(":")[0]) for problem in found), found


@pytest.mark.parametrize("content", [bytes(40) + b"rows" * 999, bytes(12) + b"rows" * 999])
def test_a_strangers_file_under_the_journals_name(root: Path, content: bytes) -> None:
    (root / "ledger.db-journal").write_bytes(content)
    assert problems(root) == ["ledger.db-journal: nobody answers for this file"]


def test_a_journal_that_sqlite_would_take_for_one_is_gone_with_the_first_look(root: Path) -> None:
    shutil.copy(root / ROWS, root / "ledger.db-journal")
    assert problems(root) == []
    assert b"PAR1" not in b"".join(path.read_bytes() for path in root.glob("ledger.db-journal"))


def test_rows_behind_the_pages_of_a_killed_writers_journal(world: World, root: Path) -> None:
    child = kit.Child(delete, root, world.people[1, 1][0], root=root, stop_at="COMMIT in ledger.requests.accept")
    assert child.hear()[0] == "stopped"
    child.kill()
    assert problems(root) == []
    with (root / "ledger.db-journal").open("ab") as journal:
        journal.write((root / ROWS).read_bytes() * 9)
    assert problems(root) == ["ledger.db-journal: nobody answers for this file"]


def test_text_that_was_added_to_the_recipe(root: Path) -> None:
    with (root / "recipe.yaml").open("a") as recipe:
        recipe.write("# somebody's row\n")
    assert any(problem.startswith("recipe.yaml:") for problem in problems(root))


def test_a_lock_is_not_written_through_a_link(world: World, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outside = root.parent / "outside"
    outside.write_text("somebody's letter")
    for name in ("ingest", "rows-0001", "shard-0001", "operation"):  # in the order in which a deletion takes them
        path = root / "locks" / f"{name}.lock"
        for target in (outside, root.parent / "nothing"):
            path.unlink(missing_ok=True)
            path.symlink_to(target)
            words = ["delete", "--subject", world.people[1, 2][1], "--executor", "inline", "--json"]
            assert run([*words, "--store", str(root)]) == 3
            assert f"locks/{name}.lock: expected the file of a lock" in json.loads(capsys.readouterr().out)["error"]["message"]  # fmt: skip
            assert outside.read_text() == "somebody's letter"
            assert not (root.parent / "nothing").exists()
        path.unlink()
    repair(root)
    assert problems(root) == []


def test_a_lock_that_is_no_plain_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for name in ("folder", "pipe"):
        with pytest.raises(DamagedError, match=f"{name}: expected the file of a lock"):
            FileLock(tmp_path / name).acquire(timeout_s=0)
    with FileLock(tmp_path / "plain").held(timeout_s=0), pytest.raises(BusyError):
        FileLock(tmp_path / "plain").acquire(timeout_s=0)


LINKS = [
    ROWS, "records/shard=0001/slice=01", "records/shard=0001", "records/holdout", "records", "checkpoints",
    "checkpoints/shard-0001", "checkpoints/shard-0001/STAGE", "checkpoints/shard-0001/STAGE/state",
    "checkpoints/shard-0001/STAGE/state/c.0", "checkpoints/zarr.json", "keys", "keys/exclusion.key", "recipe.yaml",
]  # fmt: skip


@pytest.mark.parametrize("name", LINKS)
def test_what_lies_behind_a_symbolic_link_is_never_erased(root: Path, name: str) -> None:
    path = root / name.replace("STAGE", stage(root, 1, 1).name)
    outside = root.parent / "outside"
    path.rename(outside)
    path.symlink_to(outside)
    found = problems(root)
    wanted = f"{path.relative_to(root)}: a symbolic link: what it points to is never erased"
    assert [problem for problem in found if "symbolic link" in problem] == [wanted]


def test_the_store_itself_may_be_a_link(root: Path) -> None:
    link = root.parent / "link"
    link.symlink_to(root)
    assert problems(link, replay="all") == []


@pytest.mark.parametrize("name", ["checkpoints/zarr.json", "checkpoints/shard-0001/zarr.json"])
@pytest.mark.parametrize("changed", [False, True])
def test_a_group_around_the_stages_that_is_lost_or_changed(root: Path, name: str, changed: bool) -> None:
    group = root / name
    before = group.read_bytes()
    group.unlink()
    if changed:
        group.write_text(json.dumps({**json.loads(before), "attributes": {"rows": ["somebody's"]}}))
    (problem,) = problems(root)
    assert problem.startswith(f"{name}: ")
    assert ("missing" in problem) is not changed
    repair(root)
    assert group.read_bytes() == before
    assert problems(root) == []
    walked = zarr.open_group(root / "checkpoints", mode="r", zarr_format=3)
    assert f"shard-0001/{stage(root, 1, 2).name}" in walked


# --- columns of the ledger --------------------------------------------------------------------------

HASH = "'" + "ab" * 32 + "'"
COLUMNS: dict[str, tuple[list[str], str]] = {
    "a stage's parent": ([f"UPDATE stages SET parent_key = {HASH} WHERE shard = 1 AND stage = 2"], "shard 1, stage 2: the ledger names another stage"),
    "a parent of the first stage": ([f"UPDATE stages SET parent_key = {of(0, 1)} WHERE shard = 1 AND stage = 1"], "shard 1, stage 1: the ledger names another stage"),
    "a stage's records": (["UPDATE stages SET records = records + 1 WHERE shard = 0 AND stage = 1"], r"shard 0, stage 1: the ledger says that it saw \d+ records"),
    "a stage's full digest": ([f"UPDATE stages SET full_digest = {HASH} WHERE shard = 0 AND stage = 1"], "stage 1 of shard 0 is damaged: expected the state"),
    "a stage's state digest": ([f"UPDATE stages SET state_digest = {HASH} WHERE shard = 0 AND stage = 1"], "shard 0, stage 1: state digest differs"),
    "a stage of a shard that there is not": (["UPDATE stages SET shard = 9 WHERE shard = 0 AND stage = 1"], "shard 9, stage 1: there is no such stage"),
    "a stage that there is not": (["UPDATE stages SET stage = 3 WHERE shard = 0 AND stage = 1"], "shard 0, stage 3: there is no such stage"),
    "a slice's records": (["UPDATE partitions SET records = records + 1 WHERE shard = 0 AND slice = 1"], r"shard 0, slice 1: \d+ rows of"),
    "a slice's people": (["UPDATE partitions SET subjects = 0 WHERE shard = 0 AND slice = 1"], r"shard 0, slice 1: \d+ rows of"),
    "people of a holdout": (["UPDATE partitions SET subjects = 99 WHERE shard = 0 AND slice = 0"], r"shard 0, holdout: \d+ rows of"),
    "an erasure that nobody asked for": (["UPDATE partitions SET dirty = 1 WHERE shard = 0 AND slice = 1"], "shard 0, slice 1: marked as holding rows of deleted people"),
    "an erasure that nobody asked for, prepared": ([f"UPDATE partitions SET dirty = 1, next_records = 0, next_subjects = 0, next_membership = {HASH} WHERE shard = 0 AND slice = 1"], "shard 0, slice 1: marked as holding"),
    "a prepared erasure": (["UPDATE partitions SET next_subjects = 1 WHERE shard = 0 AND slice = 1"], "shard 0, slice 1: an erasure is prepared"),
    "a number of deletions": (["UPDATE partitions SET changes = 0 WHERE shard = 1"], "shard 1, slice 2: the number of its deletions"),
    "a slice that there is not": (["INSERT INTO partitions (shard, slice, records, subjects, membership) VALUES (9, 1, 0, 0, '')"], "shard 9, slice 1: there is no such slice"),
    "a slice without a line": (["DELETE FROM partitions WHERE shard = 0 AND slice = 0"], "shard 0, holdout: no line"),
    "places of a request": (["INSERT INTO request_partitions SELECT id, 0, 1 FROM requests"], "shard 0, slice 1: the number of its deletions"),
    "no places of a request": (["DELETE FROM request_partitions"], "shard 1, slice 2: the number of its deletions"),
    "places of no request": (["UPDATE request_partitions SET request = 'del-0'"], "request_partitions has lines of a request that there is not"),
    "a place that there is not": (["INSERT INTO request_partitions SELECT id, 0, 7 FROM requests"], "shard 0, slice 7: there is no such slice"),
    "an exclusion of no request": (["UPDATE exclusions SET request = 'del-0'"], "exclusions has lines of a request that there is not"),
    "nobody excluded any more": (["DELETE FROM exclusions"], "excludes 0 records"),
    "a record that is excluded no more": (["DELETE FROM exclusions WHERE kind = 'record' AND rowid = (SELECT min(rowid) FROM exclusions WHERE kind = 'record')"], r"excludes \d+ records"),
    "a record too many that is excluded": (["INSERT INTO exclusions SELECT 'record', x'00', id FROM requests"], r"excludes \d+ records"),
    "people that are excluded no more": (["DELETE FROM exclusions WHERE kind = 'subject'"], r"excludes \d+ records and 0 subjects, it was accepted for \d+ records and 1 subjects"),
    "other people excluded": (["UPDATE exclusions SET digest = randomblob(16) WHERE kind = 'subject'"], "excludes others than it was accepted for"),
    "other records excluded": (["UPDATE exclusions SET digest = randomblob(16) WHERE kind = 'record'"], "excludes others than it was accepted for"),
    "people excluded as records": (["UPDATE exclusions SET kind = 'record' WHERE kind = 'subject'"], r"excludes \d+ records and 0 subjects"),
    "exclusions of another kind": (["UPDATE exclusions SET kind = 'person' WHERE kind = 'subject'"], "exclusions have a line of a kind that there is not"),
    "an exclusion of another kind beside them": (["INSERT INTO exclusions SELECT 'person', digest, request FROM exclusions"], "exclusions have a line of a kind that there is not"),
    "a fact that nobody asks for": (["INSERT INTO facts VALUES ('rows', 'somebody''s')"], "ledger: facts has a line that no ledger has"),
    "numbers of another table": (["INSERT INTO counters VALUES ('somebody''s', 1)"], "numbers are remembered of a table that gives none"),
    "a stage of old that there is not": (["UPDATE members SET stage = 7 WHERE version = 1 AND key IS NULL"], "version 1: shard 1 was served from a stage that there never was"),
    "a stage of old that was never purged": (["UPDATE members SET stage = 1 WHERE version = 1 AND key IS NULL"], "version 1: shard 1 was served from a stage that there never was"),
    "members of no version": (["INSERT INTO members VALUES (99, 0, 1, 'somebody''s', 'rows')"], "members has lines of a version that there is not"),
    "a request of a version that is no quarantine": (["UPDATE versions SET request = 'del-0' WHERE cause = 'train'"], "a version that is no quarantine names a request"),
    **{
        f"a request's {column}": ([f"UPDATE requests SET {column} = {column} + 1"], f"has another {column} than was noted")
        for column in ("subjects", "records", "version_before", "version_quarantine", "version_after", "stages_retrained")
    },
    "a request that nothing came after": (["UPDATE requests SET version_after = NULL"], "has another version_after than was noted"),
    "the fingerprint": (["UPDATE facts SET value = replace(value, '\"python\"', '\"pythom\"') WHERE name = 'fingerprint'"], "fingerprint"),
    "an unreadable fingerprint": (["UPDATE facts SET value = 'x' WHERE name = 'fingerprint'"], "fingerprint"),
    "the platform": (["UPDATE facts SET value = '0123456789ab' WHERE name = 'platform'"], "fingerprint"),
    "a table that no ledger has": (["CREATE TABLE copies AS SELECT * FROM stages"], "ledger: copies is not"),
    "a trigger": (["CREATE TRIGGER undo AFTER INSERT ON exclusions BEGIN DELETE FROM exclusions; END"], "ledger: undo is not"),
}  # fmt: skip


@pytest.mark.parametrize("name", COLUMNS)
def test_what_the_ledger_says_is_held_against_the_disk(root: Path, name: str) -> None:
    statements, place = COLUMNS[name]
    edit(root, *statements)
    found = problems(root)
    assert any(re.search(place, problem) for problem in found), found
    assert not any(person in problem for problem in found for person in TABLE["person"].to_pylist())


def test_an_open_deletion_hides_no_missing_stage_below_it(world: World, root: Path) -> None:
    delete(root, world.people[1, 2][1], defer=True)
    assert problems(root) == []
    shutil.rmtree(stage(root, 1, 1))
    edit(root, "DELETE FROM stages WHERE shard = 1 AND stage = 1", f"UPDATE members SET stage = 0, key = NULL, platform = NULL WHERE version = {LIVE} AND shard = 1")  # fmt: skip
    assert any("shard 1: stages [1] are not trained" in problem for problem in problems(root))


def test_an_open_deletion_hides_no_other_shard_out_of_service(world: World, root: Path) -> None:
    delete(root, world.people[1, 2][1], defer=True)
    edit(root, f"UPDATE members SET stage = 0, key = NULL, platform = NULL WHERE version = {LIVE}")
    found = [problem for problem in problems(root) if "is served from stage 0" in problem]
    assert [re.search(r"shard \d .*", problem)[0] for problem in found] == [
        "shard 0 is served from stage 0, not 2",
        "shard 1 is served from stage 0, not 1",
    ]


# --- manifests --------------------------------------------------------------------------------------

MANIFESTS: dict[str, Any] = {
    "records": 99, "parent_key": "ab" * 32, "epochs": 9, "steps": 9, "bytes": 9,
    "fingerprint": {"python": "2.7"},
}  # fmt: skip


def reseal(root: Path, changed: dict[str, Any], **beside: Any) -> None:
    """Change the manifest of stage 2 of shard 0, or what lies beside it, and compute the digest again."""
    path = stage(root, 0, 2) / "zarr.json"
    whole = json.loads(path.read_bytes())
    content = {name: value for name, value in whole["attributes"]["sisa"].items() if name != "digest"}
    content["manifest"] |= changed
    whole["attributes"]["sisa"] = sealed({**content, **beside})
    path.write_text(json.dumps(whole))


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_manifest_that_was_changed_and_sealed_again(root: Path, name: str) -> None:
    reseal(root, {name: MANIFESTS[name]})
    assert problems(root) == [f"shard 0, stage 2: its manifest was changed: {name}"]


def test_rows_beside_a_manifest(root: Path) -> None:
    reseal(root, {}, rows=["somebody's"])
    (problem,) = problems(root)
    assert "stage 2 of shard 0 is damaged" in problem
    assert "other fields" in problem


def test_a_manifest_and_the_ledger_that_agree_on_something_wrong(root: Path) -> None:
    reseal(root, {"records": 99})
    edit(root, "UPDATE stages SET records = 99 WHERE shard = 0 AND stage = 2")
    assert any("the ledger says that it saw 99 records" in problem for problem in problems(root))


@pytest.mark.parametrize(
    "changed", [{"shard": 1}, {"stage": 1}, {"platform": "0123456789ab"}, {"state_digest": "ab" * 32}]
)
def test_a_manifest_of_another_stage(root: Path, changed: dict[str, Any]) -> None:
    reseal(root, changed)
    assert any("stage 2 of shard 0 is damaged" in problem for problem in problems(root))


# --- history ----------------------------------------------------------------------------------------

HISTORY: dict[str, tuple[list[str], str]] = {
    "nothing ever happened": (["DELETE FROM events"], "events are missing"),
    "nothing ever happened, and nothing was counted": (["DELETE FROM events", "UPDATE counters SET last = 0 WHERE name = 'events'"], "0 ingests are noted"),
    "one event less": (["DELETE FROM events WHERE number = 3"], "events are missing"),
    "the newest event gone": (["DELETE FROM events WHERE number = (SELECT max(number) FROM events)"], "events are missing"),
    "fewer records ingested than are there": (["UPDATE events SET detail = '{\"records\": 1}' WHERE kind = 'ingested'"], "1 records were ingested"),
    "a second ingest": (["INSERT INTO events (at, kind, detail) SELECT at, kind, detail FROM events WHERE kind = 'ingested'"], "2 ingests are noted"),
    "an acceptance of another request": (["UPDATE events SET detail = replace(detail, 'del-', 'del-0') WHERE kind = 'request_accepted'"], "the requests are not those whose acceptance is noted"),
    "an acceptance for other shards": (["UPDATE events SET detail = json_set(detail, '$.shards', json('[0]')) WHERE kind = 'request_accepted'"], "was accepted for other shards"),
    "a request that is gone": (["DELETE FROM requests", "DELETE FROM request_partitions", "DELETE FROM exclusions"], "requests are missing"),
    "a request that never was": (["DELETE FROM requests", "DELETE FROM request_partitions", "DELETE FROM exclusions", "UPDATE counters SET last = 0 WHERE name = 'requests'", "UPDATE partitions SET changes = 0"], "the requests are not those"),
    "a request sent back": (["UPDATE requests SET state = 'stages_purged'"], "is not in the state that was noted last"),
    "a request in a state that there is not": (["UPDATE requests SET state = 'x'"], "is not in the state that was noted last"),
    "a version that is gone": (["DELETE FROM versions WHERE number = 2", "DELETE FROM members WHERE version = 2"], "versions are missing"),
    "the versions before the last deletion": (["UPDATE versions SET cause = 'train'"], "the versions are not those whose publication is noted"),
    "a quarantine of another request": (["UPDATE versions SET request = 'del-0' WHERE cause = 'quarantine'"], "the quarantine versions are not those of the requests"),
    "no quarantine for a request": (["UPDATE requests SET version_quarantine = NULL"], "the quarantine versions are not those of the requests"),
    "a stage that was never trained": (["UPDATE events SET kind = 'x' WHERE kind = 'stage_trained' AND json_extract(detail, '$.shard') = 0"], "shard 0, stage 1 was not trained or purged"),
    "no stage was ever purged": (["DELETE FROM past_stages"], "shard 1, stage 2 was not trained or purged"),
    "an event that is none": (["UPDATE events SET detail = '[' WHERE number = 3"], "an event is unreadable"),
    "an event of another form": (["UPDATE events SET detail = '7' WHERE number = 3"], "an event is unreadable"),
    "events numbered far away": (["UPDATE events SET number = 1000000000000 WHERE number = 3"], "events are missing"),
    "numbers remembered that were never given": (["UPDATE counters SET last = 1000000000000 WHERE name = 'events'"], "events are missing"),
    "numbers remembered that are none": (["DELETE FROM counters WHERE name = 'requests'"], "requests are missing"),
    "an event nested too deeply": ([f"UPDATE events SET detail = '{'[' * 100_000}' WHERE number = 3"], "an event is unreadable"),
    "an acceptance that says of nobody": (["UPDATE events SET detail = json_remove(detail, '$.excluded') WHERE kind = 'request_accepted'"], r"excludes \d+ records and 1 subjects, it was accepted for \? records"),
    "places that are lists": (["UPDATE events SET detail = '{\"shard\": []}' WHERE kind = 'stage_trained'"], "stages: can't be checked: TypeError"),
    "places that are none": (["UPDATE events SET detail = '{\"shard\": \"x\"}' WHERE kind = 'stage_trained'"], "was not trained or purged"),
}  # fmt: skip


@pytest.mark.parametrize("name", HISTORY)
def test_a_history_that_was_edited(root: Path, name: str) -> None:
    statements, fault = HISTORY[name]
    edit(root, *statements)
    found = problems(root)
    assert any(re.search(f"^history was edited: .*{fault}", problem) for problem in found), found


def test_rows_that_the_history_does_not_know(world: World, tmp_path: Path) -> None:
    """Nobody was deleted, and fewer rows are there than were ingested, all else agreeing: nobody is accused."""
    root = kit.copy_store(world.untouched, tmp_path / "store")
    edit(root, "UPDATE events SET detail = json_set(detail, '$.records', json_extract(detail, '$.records') + 1) WHERE kind = 'ingested'")  # fmt: skip
    (problem,) = problems(root)
    came, there = re.fullmatch(
        r"1 rows are missing; the ledger doesn't say of which slice "
        r"\((\d+) records were ingested, (\d+) are there, 0 are remembered as deleted\)",
        problem,
    ).groups()  # type: ignore[union-attr]
    assert int(came) == int(there) + 1


def test_rows_that_are_lost_are_told_with_their_place_and_accuse_nobody(root: Path) -> None:
    held = ask(root, "SELECT records FROM partitions WHERE shard = 1 AND slice = 1")[0][0]
    (root / ROWS).unlink()
    found = problems(root)
    (told,) = [problem for problem in found if "rows are missing" in problem]
    assert told.startswith(f"{held} rows are missing: {held} of shard 1, slice 1 (")
    assert f"shard 1, slice 1: 0 rows, not the {held} that the ledger expects" in found
    assert not [problem for problem in found if "history was edited" in problem]


def test_of_lost_rows_those_are_told_whose_place_is_known(root: Path) -> None:
    held = ask(root, "SELECT records FROM partitions WHERE shard = 1 AND slice = 1")[0][0]
    (root / ROWS).unlink()
    edit(root, "UPDATE events SET detail = json_set(detail, '$.records', json_extract(detail, '$.records') + 1) WHERE kind = 'ingested'")  # fmt: skip
    told = (
        f"{held + 1} rows are missing: {held} of shard 1, slice 1; the ledger doesn't say of which slice the others are"
    )
    assert any(problem.startswith(told) for problem in problems(root))


def test_a_slice_of_the_holdout_that_vanished_after_a_deletion(root: Path) -> None:
    """No stage has seen its rows: only their number, of which deletions explain a part, is left of them."""
    assert ask(root, "SELECT records > 0, changes FROM partitions WHERE shard = 0 AND slice = 0") == [(1, 0)]
    (root / "records/holdout/shard=0000/part-00000.parquet").unlink()
    nothing = membership(np.zeros((0, 16), np.uint8), np.zeros((0, 16), np.uint8))
    edit(root, f"UPDATE partitions SET records = 0, subjects = 0, membership = '{nothing}' WHERE shard = 0 AND slice = 0")  # fmt: skip
    (problem,) = problems(root)
    assert re.search(r"^\d+ rows are missing; the ledger doesn't say of which slice", problem)


def test_requests_that_share_records_remember_their_own(world: World, root: Path) -> None:
    """A record is excluded once, by the first request that asked for it."""
    person = world.people[0, 1][0]
    record = next(
        r for r, p in zip(*TABLE.select(["record", "person"]).to_pydict().values(), strict=True) if p == person
    )
    store = kit.reopened(root)
    store.delete(records=[record], executor="inline", defer=True)
    store.delete(subjects=[person, world.people[1, 0][0]], executor="inline")
    store.close()
    assert problems(root) == []
    edit(root, "DELETE FROM exclusions WHERE kind = 'subject' AND request = (SELECT id FROM requests WHERE number = 3)")
    assert any("and 0 subjects, it was accepted for" in problem for problem in problems(root))


# --- values that nobody wrote -----------------------------------------------------------------------

FAR = {"INTEGER": ["1000000000000", "-1"], "REAL": ["9e999"], "BLOB": ["x''"], "TEXT": ["'x'", "''", "'[[]]'"]}
TABLES = [
    "facts", "partitions", "requests", "request_partitions", "exclusions", "stages", "past_stages", "versions", "members",
    "events",
]  # fmt: skip


@pytest.mark.parametrize("table", TABLES)
def test_whatever_a_column_says_is_a_problem_and_no_crash(root: Path, table: str) -> None:
    before = (root / "ledger.db").read_bytes()
    for _, column, type_, *_ in ask(root, f"PRAGMA table_info({table})"):
        for value in FAR[type_]:
            for which in ("min", "max"):
                edit(root, f"UPDATE OR REPLACE {table} SET {column} = {value} WHERE rowid = (SELECT {which}(rowid) FROM {table})")  # fmt: skip
                with contextlib.suppress(DamagedError):  # it doesn't open
                    problems(root)
                (root / "ledger.db").write_bytes(before)


def test_a_stage_of_very_many_records_is_not_counted_one_by_one(root: Path) -> None:
    edit(root, "UPDATE stages SET records = 1000000000000")
    found = problems(root)
    assert len([problem for problem in found if "its manifest was changed: records, steps" in problem]) == 4
    for records in range(40):
        for batch_size in (1, 2, 3, 4, 7):
            batches = len(batch_sizes(records=records, batch_size=batch_size))
            assert batch_count(records=records, batch_size=batch_size) == batches


def test_a_place_far_away_stops_no_check(world: World, root: Path) -> None:
    delete(root, world.people[1, 2][1], defer=True)
    edit(root, "UPDATE request_partitions SET slice = 1000000000000")
    found = problems(root)
    assert "ledger: shard 1, slice 1000000000000: there is no such slice" in found
    assert not any("can't be checked" in problem for problem in found)


def test_what_no_check_foresaw_is_a_problem_without_values(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unforeseen(*_: Any, **__: Any) -> list[str]:
        raise ValueError("somebody's")

    for name in ("check_ledger", "check_files", "check_stages", "check_versions", "run_replay"):
        monkeypatch.setattr(verify, name, unforeseen)
    monkeypatch.setattr(rows, "_uncounted", unforeseen)
    found = problems(root, replay="all")
    for what in ("ledger", "files", "shard 0", "shard 1, holdout", "shard 1, slice 2", "versions", "replay"):
        assert f"{what}: can't be checked: ValueError" in found
    assert not any("somebody's" in problem for problem in found)


SLICES: dict[str, str] = {
    "one is missing": "DELETE FROM partitions WHERE shard = 1 AND slice = 2",
    "one too many": "INSERT INTO partitions (shard, slice, records, subjects, membership) VALUES (1, 3, 0, 0, '')",
    "one far away": "INSERT INTO partitions (shard, slice, records, subjects, membership) VALUES (1, 1000000000000, 0, 0, '')",
    "one elsewhere": "UPDATE partitions SET slice = 7 WHERE shard = 1 AND slice = 0",
    "all are missing": "DELETE FROM partitions WHERE shard = 1",
}  # fmt: skip


@pytest.mark.parametrize("name", SLICES)
def test_slices_that_the_ledger_does_not_list(
    world: World, root: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    edit(root, SLICES[name])
    found = problems(root, replay="all")
    assert any(problem.startswith("ledger: shard 1, ") for problem in found)
    assert "replay of shard 1: the ledger doesn't list exactly slices 1 to 2 of shard 1" in found
    recipe = root.parent / "recipe.json"  # JSON is YAML
    recipe.write_text(json.dumps(world.recipe))
    for words in (["repair"], ["train", str(recipe)], ["delete", "--subject", world.people[1, 1][0]]):
        assert run([*words, "--store", str(root), "--executor", "inline", "--json"]) == 3
        assert "internal" not in capsys.readouterr().out


# --- what nobody edited -----------------------------------------------------------------------------

UNFINISHED = re.compile(
    r"^request del-\w+: state (accepted|rows_erased): "
    r"|no version was ever published"
    r"|the ledger says that the ingest has not ended"
    r"|: stages \[.*\] are not trained"
    r"|\(orphan\)"
    r"|(^|/)(tmp-\w+|scratch/\w+): left by a command that was killed"
    r"|unfinished file among the records"
    r"|: stops training for a deletion that has ended"
    r"|: tainted by a deletion and not purged"
    r"|: \d+ rows of deleted people"
)
"""What may be said of a store in which somebody was killed: that something is unfinished."""


def assert_only_unfinished(root: Path, *, where: str) -> None:
    if (root / "recipe.yaml").exists():
        wrong = [problem for problem in problems(root) if not UNFINISHED.search(problem)]
        assert not wrong, f"killed before {where}: {wrong}"


def check_killed(function: Callable[..., Any], *arguments: Any, template: Path | None, folder: Path) -> None:
    """Kill it before every fourth operation, and before each of the journal's; look before anybody mends anything."""

    def fresh(name: str) -> Path:
        return kit.copy_store(template, folder / name) if template else folder / name

    root = fresh("whole")
    names = kit.operations(function, root, *arguments, root=root)
    points = [n for n, name in enumerate(names) if n % 4 == 0 or name.startswith("COMMIT")]
    for number in points:
        root = fresh(f"killed-{number}")
        where = kit.killed_before(function, root, *arguments, root=root, stop_at=number)
        assert_only_unfinished(root, where=where)
        shutil.rmtree(root)


def train_at(root: Path, recipe: dict[str, Any]) -> None:
    kit.trained(recipe, root)


def test_a_killed_deletion_is_unfinished_and_nothing_else(world: World) -> None:
    leavers = [world.people[1, 1][0], *world.people[0, 2], world.people[1, 0][0]]
    check_killed(delete, *leavers, template=world.template, folder=world.folder / "deletions")


def test_a_killed_training_is_unfinished_and_nothing_else(world: World) -> None:
    (world.folder / "trainings").mkdir()
    check_killed(train_at, world.recipe, template=None, folder=world.folder / "trainings")


def test_a_killed_repair_is_unfinished_and_nothing_else(world: World) -> None:
    broken = kit.copy_store(world.template, world.folder / "broken")
    delete(broken, world.people[1, 1][0], defer=True)
    delete(broken, world.people[0, 2][0], world.people[1, 2][1], defer=True)
    check_killed(repair, template=broken, folder=world.folder / "repairs")


def verify_all(root: Path) -> None:
    problems(root, replay="all")


LEFT = r": left by a command that was killed; `sisa repair` removes it$"


@pytest.mark.parametrize(("function", "place"), [(verify_all, "scratch/"), (repair, "checkpoints/shard-0001/tmp-")])
def test_repair_removes_what_a_killed_command_left(
    world: World, root: Path, function: Callable[..., Any], place: str
) -> None:
    delete(root, world.people[1, 1][0], defer=True)
    kit.killed_before(function, root, root=root, stop_at="rename in checkpoints.stage.publish")
    (problem,) = problems(root)
    assert problem.startswith(place)
    assert re.search(LEFT, problem)
    repair(root)
    assert problems(root) == []


def test_repair_removes_what_somebody_was_killed_removing(root: Path) -> None:
    (root / "tmp-0123456789abcdef" / "deep").mkdir(parents=True)
    (problem,) = problems(root)
    assert re.search(LEFT, problem)
    repair(root)
    assert problems(root) == []


@pytest.mark.parametrize("name", ["keys/tmp-x", "checkpoints/tmp-x", "checkpoints/shard-0009/tmp-x", "scratch/tmp-x"])
def test_an_unfinished_file_that_no_repair_removes_is_a_strangers(root: Path, name: str) -> None:
    (root / name).parent.mkdir(exist_ok=True)
    (root / name).touch()
    assert problems(root) == [f"{name}: nobody answers for this file"]


def test_what_a_killed_ingest_left_is_removed_by_the_next(world: World) -> None:
    root = world.folder / "ingested"
    (stop,) = {name for name in kit.operations(train_at, world.folder / "whole-ingest", world.recipe, root=world.folder / "whole-ingest") if name.endswith("write._publish") and name.startswith("re")}  # fmt: skip
    kit.killed_before(train_at, root, world.recipe, root=root, stop_at=stop)
    assert "tmp-records: left by a command that was killed; `sisa train` removes it" in problems(root)
    train_at(root, world.recipe)
    assert problems(root) == []


def test_a_deletion_that_is_not_repaired_yet_is_no_tampering(world: World, root: Path) -> None:
    for person in (world.people[1, 1][0], world.people[1, 1][1], world.people[0, 2][0], world.people[0, 0][0]):
        delete(root, person, defer=True)
        assert problems(root) == []
    repair(root)
    assert problems(root, replay="all") == []


def test_everybody_of_a_shard_deleted_one_by_one_is_no_tampering(world: World, root: Path) -> None:
    for person in [*world.people[0, 1], *world.people[0, 2]]:
        delete(root, person)
    assert problems(root, replay="all") == []
    assert served(root)[0] == 0


def test_a_person_deleted_unseen_is_no_tampering(world: World, root: Path) -> None:
    """The slice could not be read when the deletion was accepted; then the file was restored."""
    whole = (root / ROWS).read_bytes()
    (root / ROWS).write_bytes(whole[:60] + bytes([whole[60] ^ 255]) + whole[61:])
    with pytest.raises(DamagedError):
        delete(root, world.people[1, 1][0])
    (root / ROWS).write_bytes(whole)
    repair(root)
    assert problems(root, replay="all") == []


def test_a_person_deleted_unseen_from_one_of_two_sources_is_no_tampering(tmp_path: Path) -> None:
    """Of somebody who lies in both, only one slice could be read."""
    table = tables.mixed()
    second = write(table.slice(30), tmp_path / "second.parquet")
    recipe = tables.mixed_recipe()
    recipe["data"] = {**recipe["data"], "holdout": {"source": str(second)}}
    store = train(tmp_path, recipe, table.slice(0, 30))
    root = store.opened.layout.root
    both = set(table.slice(0, 30)["person"].to_pylist()) & set(table.slice(30)["person"].to_pylist())
    for person in sorted(both):
        shard, _ = store.opened.router.route_one(person)
        path = root / f"records/holdout/shard={shard:04d}/part-00000.parquet"
        whole = path.read_bytes()
        path.write_bytes(whole[:60] + bytes([whole[60] ^ 255]) + whole[61:])
        with pytest.raises(DamagedError):
            store.delete(subjects=[person], executor="inline")
        path.write_bytes(whole)
        store.repair(executor="inline")
        assert store.verify(executor="inline").problems == []


def test_a_store_that_was_trained_twice_and_copied_is_no_tampering(world: World, tmp_path: Path, root: Path) -> None:
    assert kit.trained(world.recipe, root).training.stages_trained == 0
    shutil.copytree(root, tmp_path / "elsewhere" / "copy", symlinks=True)
    assert problems(tmp_path / "elsewhere" / "copy", replay="all") == []
    assert kit.trained(world.recipe, tmp_path / "elsewhere" / "copy").training.stages_trained == 0
    assert problems(tmp_path / "elsewhere" / "copy") == []


SHAPES: dict[str, dict[str, Any]] = {
    "one slice": {"sisa": {"shards": 3, "slices": 1}},
    "one shard": {"sisa": {"shards": 1, "slices": 2}},
    "more slices than people": {"sisa": {"shards": 9, "slices": 7}},
    "a holdout": {"data": {"holdout": {"fraction": 0.4}}},
}


@pytest.mark.parametrize("name", SHAPES)
def test_a_store_of_any_shape_is_no_tampering(tmp_path: Path, name: str) -> None:
    recipe = tables.mixed_recipe()
    changes = SHAPES[name]
    recipe = {**recipe, **{section: {**recipe[section], **fields} for section, fields in changes.items()}}
    store = train(tmp_path, recipe, tables.mixed())
    assert store.verify(executor="inline").problems == []
    store.delete(subjects=tables.mixed()["person"].unique().to_pylist()[:7], executor="inline")
    assert store.verify(replay="all", executor="inline").problems == []


def test_a_holdout_of_a_second_source_is_no_tampering(tmp_path: Path) -> None:
    table = tables.mixed()
    second = write(table.slice(30), tmp_path / "second.parquet")  # people of both sources among them
    recipe = tables.mixed_recipe()
    recipe["data"] = {**recipe["data"], "holdout": {"source": str(second)}}
    store = train(tmp_path, recipe, table.slice(0, 30))
    assert store.verify(replay="all", executor="inline").problems == []
    both = set(table.slice(0, 30)["person"].to_pylist()) & set(table.slice(30)["person"].to_pylist())
    store.delete(subjects=[min(both), min(set(table.slice(30)["person"].to_pylist()) - both)], defer=True)
    assert store.verify(executor="inline").problems == []
    store.repair(executor="inline")
    assert store.verify(replay="all", executor="inline").problems == []


def test_an_empty_source_is_no_tampering(tmp_path: Path) -> None:
    store = train(tmp_path, tables.mixed_recipe(), tables.mixed().slice(0, 0))
    assert store.verify(replay="all", executor="inline").problems == []


def test_an_upgrade_that_failed_half_way_is_unfinished_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table, recipe = tables.binary(), tables.binary_recipe()
    store = train(tmp_path, recipe, table)
    from sisa.training import chain, platform

    process, real = platform._process, chain.train_stage
    monkeypatch.setattr(platform, "_process", lambda: {**process(), "torch": "9.9.9"})

    def failing(**arguments: Any) -> Any:
        if arguments["shard"] == 1:
            raise RuntimeError("out of luck")
        return real(**arguments)

    def upgrade() -> sisa.store.store.Store:
        source = tmp_path / "store.parquet"
        return sisa.train(at(tmp_path, recipe, source), store=tmp_path / "store", executor="inline", upgrade=True)

    store.delete(records=["0"], defer=True)
    assert store.verify(executor="inline").problems == []
    monkeypatch.setattr(chain, "train_stage", failing)
    with pytest.raises(sisa.errors.UserError):
        upgrade()
    found = store.verify(executor="inline").problems
    assert len(found) == 3
    assert all("left by an unfinished upgrade" in problem for problem in found)
    monkeypatch.setattr(chain, "train_stage", real)
    assert upgrade().verify(replay="all", executor="inline").problems == []


def test_the_table_that_tampering_is_tried_on_has_everything(world: World) -> None:
    """A deletion, its quarantine, a purged stage and people held out: else half of the above would prove nothing."""
    assert ask(world.template, "SELECT count(*) FROM requests") == [(1,)]
    assert ask(world.template, "SELECT count(*) FROM past_stages") == [(1,)]
    assert [cause for (cause,) in ask(world.template, "SELECT cause FROM versions")] == [
        "train",
        "quarantine",
        "repair",
    ]
    assert all(world.people[place] for place in [(0, 0), (1, 0), (0, 1), (0, 2), (1, 1), (1, 2)])
    assert isinstance(papq.read_table(world.template / ROWS, partitioning=None), pa.Table)
    assert problems(world.template, replay="all") == []
