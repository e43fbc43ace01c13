"""The ledger's own promises, below the handler that uses it."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from sisa.errors import DamagedError, UserError
from sisa.ledger import Ledger, Partition, StageRow, Target

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


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    """A ledger of a trained store, version 1 live."""
    made = Ledger.create(tmp_path / "ledger.db")
    made.partitions.replace_all(
        [Partition(k, s, 10, 10, f"m-{k}-{s}") for k in range(SHARDS) for s in range(SLICES + 1)]
    )
    made.stand_on(code="code", platform="platform", fingerprint={})
    for shard in range(SHARDS):
        for number in range(1, SLICES + 1):
            assert made.stages.enter(stage(shard, number), changes={})
    assert made.versions.publish_newest(cause="train", shards=SHARDS, code="code", platform="platform") == 1
    return made


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


def test_a_failed_acceptance_changes_nothing(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    before = list(sqlite3.connect(ledger.database.path).iterdump())

    def broken(*_: object, **__: object) -> int:
        raise RuntimeError("power cut")

    monkeypatch.setattr(ledger.versions, "publish_fallback", broken)
    with pytest.raises(RuntimeError):
        ledger.requests.accept([Target("subject", b"a" * 16, ((0, 1),))], reason="")
    assert list(sqlite3.connect(ledger.database.path).iterdump()) == before


def test_keys_and_digests_of_a_purged_stage_leave_the_file(ledger: Ledger) -> None:
    ledger.requests.accept([Target("subject", b"a" * 16, ((1, 2),))], reason="")
    path = ledger.database.path
    assert b"full-1-3" in path.read_bytes()
    for row in ledger.stages.tainted():
        ledger.stages.forget(row)
    left = b"".join(p.read_bytes() for p in path.parent.iterdir())
    for trace in (b"key-1-2", b"key-1-3", b"full-1-3", b"state-1-2"):
        assert trace not in left
    assert b"key-1-1" in left
    assert [(r["shard"], r["stage"]) for r in ledger.database.rows("SELECT * FROM past_stages ORDER BY stage")] == [
        (1, 2),
        (1, 3),
    ]


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
    ledger.partitions.prepare_erasure(1, 2, records=9, subjects=9, membership="without a")
    ledger.requests.accept([Target("subject", b"b" * 16, ((1, 2),))], reason="")
    assert not ledger.partitions.finish_erasure(1, 2, changes=seen)
    ledger.partitions.prepare_erasure(1, 2, records=8, subjects=8, membership="without both")
    assert ledger.partitions.finish_erasure(1, 2, changes=ledger.partitions.get(1, 2).changes)
    partition = ledger.partitions.get(1, 2)
    assert (partition.records, partition.membership, partition.dirty) == (8, "without both", False)


def test_publishing_the_same_members_makes_no_new_version(ledger: Ledger) -> None:
    assert ledger.versions.publish_newest(cause="train", shards=SHARDS, code="code", platform="platform") == 1


@pytest.mark.parametrize(
    "damage", [lambda p: p.unlink(), lambda p: p.write_bytes(b"no database"), lambda p: p.write_bytes(b"")]
)
def test_a_ledger_that_is_none_is_damage(ledger: Ledger, damage: object) -> None:
    ledger.close()
    damage(ledger.database.path)  # type: ignore[operator]
    with pytest.raises(DamagedError, match=r"ledger\.db"):
        Ledger.open(ledger.database.path)
