"""The ledger's own promises, below the handler that uses it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from postgres_kit import Server

from sisa.errors import BusyError, DamagedError, LostLockError, StaleError, StoreError, UserError
from sisa.ledger import Ledger, Member, Partition, Place, PostgresPlace, StageRow, Target, migrate, schema

SHARDS, SLICES = 2, 3


def stage(shard: int, number: int, **changes: object) -> StageRow:
    """A stage as a worker reports it."""
    values: dict[str, object] = {
        "key": f"key-{shard}-{number}",
        "platform": "platform",
        "code": "code",
        "shard": shard,
        "stage": number,
        "parent_key": f"key-{shard}-{number - 1}" if number > 1 else "",
        "records": 10 * number,
        "state_digest": f"state-{shard}-{number}",
        "full_digest": f"full-{shard}-{number}",
        "worker": "host:1",
        "seconds": 1.0,
        "created_at": "2026-01-01T00:00:00+00:00",
    }
    return StageRow(**{**values, **changes})  # type: ignore[arg-type]


def held() -> None:
    """The lock is held."""


def lost() -> None:
    """The lock is not."""
    raise LostLockError("lost")


BytesOf = Callable[[], bytes]


@pytest.fixture
def bytes_of(place: Place, request: pytest.FixtureRequest) -> BytesOf:
    """All bytes in the files of the tables, read past the engine."""
    if isinstance(place, Path):
        return lambda: b"".join(path.read_bytes() for path in place.parent.iterdir() if path.is_file())
    server: Server = request.getfixturevalue("postgres")

    def read() -> bytes:
        server.ask("CHECKPOINT")
        return b"".join(path.read_bytes() for path in (server.data / "base").rglob("*") if path.is_file())

    return read


@pytest.fixture
def ledger(place: Place) -> Iterator[Ledger]:
    """A ledger of a trained store, version 1 live."""
    made = Ledger.create(place)
    made.partitions.replace_all(
        [Partition(k, s, 10, 10, f"m-{k}-{s}") for k in range(SHARDS) for s in range(SLICES + 1)]
    )
    made.stand_on(code="code", platform="platform", fingerprint={})
    for shard in range(SHARDS):
        for number in range(1, SLICES + 1):
            assert made.stages.enter(stage(shard, number), changes={})
    assert made.versions.publish_newest(cause="train", shards=SHARDS, code="code", platform="platform") == 1
    yield made
    made.close()


def everything(ledger: Ledger) -> dict[str, list[tuple[object, ...]]]:
    """Every row of every table, but for how often somebody had a turn to write."""
    tables = {each[1] for each in ledger.database.form() if each[0] == "table" or each[2].startswith("r ")}
    assert {"requests", "exclusions", "stages", "versions", "events"} <= tables
    rows = {table: [tuple(row) for row in ledger.database.rows(f"SELECT * FROM {table}")] for table in tables}
    return {table: sorted(found, key=repr) for table, found in rows.items()} | {
        "counters": sorted(row for row in rows["counters"] if row[0] != "turns")
    }


def serving(ledger: Ledger) -> dict[int, int]:
    """Shard -> stage of the live version."""
    return {member.shard: member.stage for member in ledger.versions.live().members}


def test_acceptance_falls_back_below_the_first_stage_that_saw_the_record(ledger: Ledger) -> None:
    accepted = ledger.requests.accept([Target("subject", b"a" * 16, ((1, 2),))], reason="")
    assert serving(ledger) == {0: 3, 1: 1}
    assert (accepted.request.version_before, accepted.request.version_quarantine) == (1, 2)
    assert [(row.shard, row.stage) for row in ledger.stages.tainted()] == [(1, 2), (1, 3)]
    ledger.requests.accept([Target("subject", b"b" * 16, ((0, 1), (1, 1)))], reason="")
    assert serving(ledger) == {0: 0, 1: 0}


def test_a_constituent_without_records_does_not_vote(ledger: Ledger) -> None:
    empty = stage(0, 3, key="empty", records=0, full_digest="other")
    ledger.requests.accept([Target("subject", b"a" * 16, ((0, 1),))], reason="")
    for row in ledger.stages.tainted():
        ledger.stages.forget(row)
    assert ledger.stages.enter(empty, changes={1: 1})
    ledger.versions.publish_newest(cause="repair", shards=SHARDS, code="code", platform="platform")
    assert serving(ledger) == {0: 0, 1: 3}


def test_a_stage_planned_before_a_deletion_is_not_entered(ledger: Ledger) -> None:
    ledger.requests.accept([Target("subject", b"a" * 16, ((0, 2),))], reason="")
    assert not ledger.stages.enter(stage(0, 2, key="late"), changes={})
    assert not ledger.stages.enter(stage(0, 3, key="later"), changes={2: 0})
    assert ledger.stages.enter(stage(0, 1, key="untouched"), changes={})
    assert ledger.stages.enter(stage(0, 2, key="after"), changes={2: 1})


def test_other_bits_under_the_same_key_are_refused(ledger: Ledger) -> None:
    with pytest.raises(DamagedError, match="other bits"):
        ledger.stages.enter(stage(0, 1, full_digest="else"), changes={})


def test_the_same_request_is_answered_with_the_first(ledger: Ledger) -> None:
    target = Target("subject", b"a" * 16, ((0, 1),))
    first = ledger.requests.accept([target], reason="one")
    version = ledger.versions.live_number()
    again = ledger.requests.accept([target], reason="two")
    gone = ledger.requests.accept([Target("subject", b"a" * 16)], reason="three")
    assert again.repeated
    assert gone.repeated
    assert {first.request.id, again.request.id, gone.request.id} == {first.request.id}
    assert ledger.versions.live_number() == version
    with pytest.raises(UserError, match="nothing to delete"):
        ledger.requests.accept([Target("subject", b"never" * 3 + b"!")], reason="")


def test_a_second_request_keeps_the_first_ones_exclusions(ledger: Ledger) -> None:
    ledger.requests.accept([Target("subject", b"a" * 16, ((0, 1),), (b"r" * 16,))], reason="")
    ledger.requests.accept([Target("subject", b"b" * 16, ((0, 1),), (b"s" * 16,))], reason="")
    assert set(ledger.requests.exclusions()) == {
        ("subject", b"a" * 16),
        ("record", b"r" * 16),
        ("subject", b"b" * 16),
        ("record", b"s" * 16),
    }


def test_records_that_are_found_later_are_excluded_and_counted_once(ledger: Ledger) -> None:
    request = ledger.requests.accept([Target("subject", b"unseen", ((0, 1),), unseen=True)], reason="").request
    assert (request.records, len(ledger.requests.exclusions())) == (0, 1)
    for _ in range(2):
        ledger.requests.found({b"one": request.id, b"two": request.id})
    assert ledger.requests.get(request.id).records == 2
    assert ledger.requests.exclusions() == dict.fromkeys(
        [("subject", b"unseen"), ("record", b"one"), ("record", b"two")], request.id
    )
    assert [event["kind"] for event in ledger.events()].count("records_found") == 1


@pytest.mark.parametrize("changed", ["a generation", "a request", "the key"])
def test_a_correction_of_rows_that_were_looked_up_before_something_else_came_is_refused(
    ledger: Ledger, changed: str
) -> None:
    ledger.remember(exclusion_key="old")
    seen: dict[str, Any] = {"key_check": "old", "newest_request": 0, "generations": 0}
    if changed == "a generation":
        new = [Partition(k, s, 1, 1, f"m-{k}-{s}") for k in range(SHARDS) for s in (SLICES + 1, -1)]
        ledger.generations.publish(1, new, newest_request=0, check=lambda: None)
    elif changed == "a request":
        ledger.requests.accept([Target("subject", b"a" * 16, ((0, 1),))], reason="")
    else:
        ledger.remember(exclusion_key="new")
    before = everything(ledger)
    targets = [Target("content", b"c" * 16, ((1, 1),))]
    with pytest.raises(StaleError):
        ledger.requests.accept_correction("cor-1", targets, reason="", waiting=[], check=lambda: None, **seen)
    assert everything(ledger) == before


def test_a_failed_acceptance_changes_nothing(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    before = everything(ledger)

    def broken(*_: object, **__: object) -> int:
        raise RuntimeError("power cut")

    monkeypatch.setattr(ledger.versions, "publish_fallback", broken)
    with pytest.raises(RuntimeError):
        ledger.requests.accept([Target("subject", b"a" * 16, ((0, 1),))], reason="")
    assert everything(ledger) == before


def test_keys_and_digests_of_a_purged_stage_leave_the_files(ledger: Ledger, bytes_of: BytesOf) -> None:
    ledger.requests.accept([Target("subject", b"a" * 16, ((1, 2),))], reason="")
    assert b"full-1-3" in bytes_of()
    for row in ledger.stages.tainted():
        ledger.stages.forget(row)
    ledger.shed()
    left = bytes_of()
    for trace in (b"key-1-2", b"key-1-3", b"full-1-3", b"state-1-2"):
        assert trace not in left
    assert b"key-1-1" in left
    assert [(r["shard"], r["stage"]) for r in ledger.database.rows("SELECT * FROM past_stages ORDER BY stage")] == [
        (1, 2),
        (1, 3),
    ]


def test_digests_of_erased_rows_leave_the_files(ledger: Ledger, bytes_of: BytesOf) -> None:
    """Whoever has the key and the other rows could test a guess about the deleted against them."""
    ledger.requests.accept([Target("subject", b"a" * 16, ((1, 2),))], reason="")
    seen = ledger.partitions.get(1, 2).changes
    ledger.partitions.prepare_erasure(1, 2, records=9, subjects=9, membership="m-without-a", check=held)
    assert ledger.partitions.finish_erasure(1, 2, changes=seen, membership="m-without-a", check=held)
    ledger.shed()
    left = bytes_of()
    assert b"m-1-2" not in left
    assert b"m-without-a" in left
    assert b"m-1-1" in left


def test_what_somebody_still_sees_is_not_called_gone(postgres: Server, postgres_place: PostgresPlace) -> None:
    """A dump, or a session that was forgotten: the server carries along what it may still ask for."""
    made = Ledger.create(postgres_place)
    made.stages.enter(stage(0, 1), changes={})
    with psycopg.connect(postgres.dsn, dbname="sisa") as dump:
        dump.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
        dump.execute("SELECT 1")
        made.stages.forget(stage(0, 1))
        made.database.be_patient(0.1)
        with pytest.raises(BusyError, match="keeps what was deleted from stages"):
            made.shed()
    made.database.be_patient(30.0)
    made.shed()
    made.close()


def test_states_move_forward_only(ledger: Ledger) -> None:
    request = ledger.requests.accept([Target("subject", b"a" * 16, ((1, 2),))], reason="").request.id
    ledger.requests.advance(request, "stages_purged")
    ledger.requests.advance(request, "rows_erased")
    assert ledger.requests.get(request).state == "stages_purged"
    assert [r.id for r in ledger.requests.open()] == [request]
    ledger.requests.advance(request, "repaired", version_after=3)
    assert ledger.requests.open() == []


def test_a_slice_deleted_from_twice_stays_dirty_until_both_are_erased(ledger: Ledger) -> None:
    ledger.requests.accept([Target("subject", b"a" * 16, ((1, 2),))], reason="")
    seen = ledger.partitions.get(1, 2).changes
    ledger.partitions.prepare_erasure(1, 2, records=9, subjects=9, membership="without a", check=held)
    ledger.requests.accept([Target("subject", b"b" * 16, ((1, 2),))], reason="")
    assert not ledger.partitions.finish_erasure(1, 2, changes=seen, membership="without a", check=held)
    ledger.partitions.prepare_erasure(1, 2, records=8, subjects=8, membership="without both", check=held)
    assert ledger.partitions.finish_erasure(
        1, 2, changes=ledger.partitions.get(1, 2).changes, membership="without both", check=held
    )
    partition = ledger.partitions.get(1, 2)
    assert (partition.records, partition.membership, partition.dirty) == (8, "without both", False)


def test_who_lost_the_rows_lock_changes_nothing_that_is_expected_of_them(ledger: Ledger) -> None:
    ledger.partitions.prepare_erasure(1, 2, records=8, subjects=8, membership="without both", check=held)
    before, late = everything(ledger), ledger.partitions
    for attempt in (
        lambda: late.prepare_erasure(1, 2, records=9, subjects=9, membership="without a", check=lost),
        lambda: late.adopt_prepared(1, 2, membership="without both", check=lost),
        lambda: late.adopt_files(1, 2, [0], check=lost),
        lambda: late.finish_erasure(1, 2, changes=0, membership="without both", check=lost),
    ):
        with pytest.raises(LostLockError):
            attempt()
    for attempt in (
        lambda: late.adopt_prepared(1, 2, membership="without a", check=held),
        lambda: late.finish_erasure(1, 2, changes=0, membership="without a", check=held),
    ):
        with pytest.raises(StaleError, match="something else was prepared"):
            attempt()
    assert everything(ledger) == before
    late.finish_erasure(1, 2, changes=0, membership="without both", check=held)
    with pytest.raises(StaleError):  # nothing is prepared any more
        late.adopt_prepared(1, 2, membership="without both", check=held)
    assert late.get(1, 2).membership == "without both"


def test_publishing_the_same_members_makes_no_new_version(ledger: Ledger) -> None:
    assert ledger.versions.publish_newest(cause="train", shards=SHARDS, code="code", platform="platform") == 1


def test_history_counts_without_gaps_whatever_failed(ledger: Ledger) -> None:
    last = ledger.last_event()
    with contextlib.suppress(RuntimeError), ledger.database.transaction():
        ledger.database.note("never", what=1)
        raise RuntimeError
    ledger.database.note("then", what=2)
    assert [event["number"] for event in ledger.events()] == list(range(1, last + 2))
    assert ledger.events()[-1]["kind"] == "then"


def test_what_was_trained_after_a_request_is_counted(ledger: Ledger) -> None:
    request = ledger.requests.accept([Target("subject", b"a" * 16, ((1, 2),))], reason="").request.id
    assert ledger.stages.trained_since(request, [1]) == 0
    ledger.stages.enter(stage(1, 2, key="again"), changes={2: 1})
    ledger.stages.enter(stage(0, 3, key="another shard's"), changes={})
    assert (ledger.stages.trained_since(request, [1]), ledger.stages.trained_since(request, [0, 1])) == (1, 2)
    assert ledger.stages.trained_since("del-never", [1]) == 0


def test_two_connections_see_each_others_commits_and_one_moment_in_a_snapshot(ledger: Ledger, place: Place) -> None:
    with contextlib.closing(Ledger.open(place)) as other:
        with other.database.snapshot():
            version = other.versions.live_number()
            if not isinstance(place, Path):  # SQLite has a writer wait for whoever reads
                ledger.versions.publish([Member(0, 0, "", "")], cause="train")
            assert other.versions.live_number() == version
        number = ledger.versions.publish([Member(0, 1, "", "")], cause="train")
        assert other.versions.live_number() == number


def test_nobody_commits_while_another_holds_the_ledger(ledger: Ledger, place: Place) -> None:
    with contextlib.closing(Ledger.open(place)) as other:
        other.database.be_patient(0.1)
        with ledger.database.hold():
            version = ledger.versions.live_number()
            with pytest.raises(BusyError):
                other.versions.publish([Member(0, 0, "", "")], cause="train")
            assert ledger.versions.live_number() == version
        other.versions.publish([Member(0, 0, "", "")], cause="train")


def test_a_ledger_has_the_form_of_a_new_one_and_a_strangers_table_shows(ledger: Ledger) -> None:
    database = ledger.database
    assert database.form() == database.expected_form()
    database.rows("CREATE TABLE somebodys (x TEXT)")
    assert "somebodys" in {each[1] for each in database.form() ^ database.expected_form()}


def test_a_ledger_of_another_release_is_refused_with_what_to_do(ledger: Ledger, place: Place) -> None:
    ledger.database.rows("UPDATE alembic_version SET version_num = '0999'")
    with pytest.raises(StoreError, match="newer release") as newer:
        Ledger.open(place)
    ledger.database.rows("UPDATE alembic_version SET version_num = '0000'")
    with pytest.raises(StoreError, match="older release") as older:
        Ledger.open(place)
    assert ("the release that" in newer.value.hint, "`sisa migrate`" in older.value.hint) == (True, True)
    ledger.database.rows("UPDATE alembic_version SET version_num = 'x'")
    with pytest.raises(DamagedError, match="found none"):
        Ledger.open(place)


def test_migrating_a_ledger_of_a_newer_release_changes_nothing(ledger: Ledger, place: Place) -> None:
    ledger.database.rows("UPDATE alembic_version SET version_num = '0999'")
    ledger.close()
    with pytest.raises(StoreError, match="newer release"):
        Ledger.migrate(place)


SECOND = """
import sqlalchemy as sa
from alembic import op

revision, down_revision = "0002", "0001"
branch_labels = depends_on = None


def upgrade() -> None:
    op.add_column("facts", sa.Column("why", sa.Text()))
    if {fails}:
        raise ValueError("no room")
"""


@pytest.mark.parametrize("fails", [False, True])
def test_an_older_ledger_is_brought_forward_whole_or_not_at_all(
    ledger: Ledger, place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, fails: bool
) -> None:
    revisions = tmp_path / "revisions"
    revisions.mkdir()
    (revisions / "second.py").write_text(SECOND.format(fails=fails))
    monkeypatch.setattr(migrate, "VERSIONS", [*migrate.VERSIONS, revisions])
    monkeypatch.setattr(schema, "REVISION", "0002")
    before = everything(ledger)
    ledger.close()
    with pytest.raises(StoreError, match="older release"):
        Ledger.open(place)
    if fails:
        with pytest.raises(ValueError, match="no room"):
            Ledger.migrate(place)
        monkeypatch.setattr(schema, "REVISION", "0001")
        with contextlib.closing(Ledger.open(place)) as again:
            assert everything(again) == before
        return
    Ledger.migrate(place)
    Ledger.migrate(place)  # nothing is left to do
    with contextlib.closing(Ledger.open(place)) as again:
        assert again.fact("ingested") == "yes"
        assert again.database.rows("SELECT why FROM facts")[0][0] is None


@pytest.mark.parametrize(
    "damage", [lambda p: p.unlink(), lambda p: p.write_bytes(b"no database"), lambda p: p.write_bytes(b"")]
)
def test_a_ledger_that_is_none_is_damage(tmp_path: Path, damage: object) -> None:
    path = tmp_path / "ledger.db"
    Ledger.create(path).close()
    damage(path)  # type: ignore[operator]
    with pytest.raises(DamagedError, match=r"ledger\.db"):
        Ledger.open(path)


def test_a_schema_that_is_none_is_damage(postgres_place: PostgresPlace) -> None:
    with pytest.raises(DamagedError, match="missing"):
        Ledger.open(postgres_place)
