"""The sceptic's command: recompute what can be recomputed, retrain what can't, and list what differs.

Nothing that the ledger says is believed where the disk can say it: memberships and lineage keys come
from the rows, digests from the bytes, and what the ledger counts is counted again. What only the ledger
knows is held against its own history. Problems name places, never people.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import partial

from sisa.errors import BusyError
from sisa.execution.options import Execution
from sisa.opening import OpenStore
from sisa.progress import Reporter
from sisa.proof.chain import ExpectedStage, check_stages, expected_chain
from sisa.proof.files import check_files
from sisa.proof.history import check_history
from sisa.proof.ledger import check_ledger
from sisa.proof.problems import guarded
from sisa.proof.replay import Replay, run_replay
from sisa.proof.requests import waiting_faults
from sisa.proof.rows import SliceRows, check_rows
from sisa.proof.versions import check_versions
from sisa.state import JSON
from sisa.training.platform import fingerprint

__all__ = ["Replay", "Verification", "verify"]


@dataclass
class Verification:
    """What was found."""

    ok: bool = True
    problems: list[str] = field(default_factory=list)
    stages_checked: int = 0
    stages_replayed: int = 0
    replayed_shards: list[int] = field(default_factory=list)
    workers: list[str] = field(default_factory=list)
    """Processes (host:pid) that replayed."""
    comparison: str = "none"
    """``bitwise``, ``none`` without a replay, or that bits can't be compared on this platform."""
    fingerprint: dict[str, JSON] = field(default_factory=dict)
    """Of this process."""
    open_requests: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, object]:
        """Return plain data."""
        return asdict(self)


def verify(store: OpenStore, *, replay: Replay, execution: Execution, reporter: Reporter) -> Verification:
    """Check a whole store; the caller holds the operation lock.

    Args:
        store: The store.
        replay: ``none``, ``all``, or how many constituents to retrain, chosen at random.
        execution: Where a replay runs.
        reporter: Who wants to know.

    Raises:
        BusyError: A deletion changed the store meanwhile, so that what was found means nothing.
    """
    before = store.ledger.last_event()
    result = Verification(fingerprint=fingerprint(store.recipe))
    reporter.begin("verifying", 2 + 2 * store.shards)
    try:
        _check(store, result, reporter)
    finally:
        reporter.end()
    if replay != "none":
        result.problems += guarded(partial(_replay, store, replay, result, execution, reporter), "replay")
    result.open_requests = [request.id for request in store.ledger.requests.open()]
    result.ok = not result.problems
    if result.problems and store.ledger.last_event() != before:
        raise BusyError(
            "the store changed while it was being verified (a deletion came in)", hint="Run the command again."
        )
    return result


def _check(store: OpenStore, result: Verification, reporter: Reporter) -> None:
    """Everything but the replay: the ledger and the files, then rows, stages, versions and history."""
    for check, what in ((check_ledger, "ledger"), (check_files, "files")):
        result.problems += guarded(partial(check, store), what)
        reporter.advance(1)
    if not store.ledger.ingested:
        return  # said by then: the ledger expects no rows yet, whatever a killed ingest left
    expected: dict[tuple[int, int], ExpectedStage] = {}
    rows: dict[tuple[int, int], SliceRows | None] = {}
    result.problems += guarded(partial(waiting_faults, store), "corrections")
    for shard in range(store.shards):
        problems, found = check_rows(store, shard)
        result.problems += problems
        rows |= {(shard, slice_): held for slice_, held in found.items()}
        expected |= expected_chain(store, shard, found)
        reporter.advance(1)
    for shard in range(store.shards):
        result.problems += guarded(partial(_check_stages, store, shard, expected, result), f"shard {shard}")
        reporter.advance(1)
    result.problems += guarded(partial(check_versions, store, expected), "versions")
    lacking = {place: held.lacking for place, held in rows.items() if held is not None and held.lacking}
    result.problems += check_history(store, survivors=_survivors(list(rows.values())), lacking=lacking)


def _check_stages(
    store: OpenStore, shard: int, expected: dict[tuple[int, int], ExpectedStage], result: Verification
) -> list[str]:
    problems, checked = check_stages(store, shard, expected)
    result.stages_checked += checked
    return problems


def _survivors(rows: Sequence[SliceRows | None]) -> int | None:
    """Count the rows on disk that nobody asked to delete; None if some can't be read."""
    readable = [slice_ for slice_ in rows if slice_ is not None]
    return sum(s.records - s.excluded for s in readable) if len(readable) == len(rows) else None


def _replay(
    store: OpenStore, replay: Replay, result: Verification, execution: Execution, reporter: Reporter
) -> list[str]:
    done = run_replay(store, replay, here=result.fingerprint, execution=execution, reporter=reporter)
    result.comparison, result.stages_replayed = done.comparison, done.stages
    result.replayed_shards, result.workers = done.shards, done.workers
    return done.problems
