"""Bringing shards up to what their records call for, and publishing the result.

Training, resuming, repairing after deletions and healing damage are this one procedure. It holds the
operation lock; deletions are accepted, erased and purged while it runs, and a shard that one overtakes
is settled and built again. A failure leaves the shard at its clean stage, or absent, and is reported.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from sisa.coordination import Held
from sisa.deletion.incoming import sweep_incoming
from sisa.deletion.settle import erase_restored, purge_shard, remove_replays, settle_all
from sisa.errors import DamagedError, LostLockError, SisaError
from sisa.execution.build import Build, Plan, build
from sisa.execution.options import Execution
from sisa.layout import CHECKPOINTS_KEY
from sisa.ledger import STATES, Request, StageRow
from sisa.opening import OpenStore
from sisa.progress import Reporter
from sisa.training.footing import Footing


@dataclass
class Repair:
    """What was done."""

    version: int
    trained: list[StageRow] = field(default_factory=list)
    reused: int = 0
    requests: list[str] = field(default_factory=list)
    """Requests that reached ``repaired``."""
    failures: dict[int, SisaError] = field(default_factory=dict)
    damaged_rows: DamagedError | None = None
    """Rows that are not what they should be; looked for only when healing."""


def bring_up(
    store: OpenStore,
    *,
    shards: Iterable[int] | None,
    footing: Footing,
    execution: Execution,
    reporter: Reporter,
    cause: str,
    heal: bool = False,
    read_reused: bool = False,
    held: Held | None = None,
) -> Repair:
    """Settle open requests, build, publish and close the requests that are repaired.

    The caller holds the operation lock.

    Args:
        store: The store.
        shards: Which shards to build; None for those that open requests touched (not before the first version:
            what is trained of a first ensemble is no ensemble).
        footing: Code and platform of this process. If the store stands on another, it moves to this one: every
            stage is built again, and the old ones serve until all are there.
        execution: Where chains run.
        reporter: Who wants to know.
        cause: What the version is published for.
        heal: Retrain damaged and missing stages, and erase again what a restored file brought back.
        read_reused: Verify every byte of stages that are reused.
        held: The operation lock; nothing is published once it is lost.
    """
    remove_replays(store)  # killed ones: a running one would hold our lock
    sweep_incoming(store, reporter, thorough=heal)
    result = Repair(version=store.ledger.versions.live_number())
    if shards is None and not result.version:
        return result
    if heal:
        result.damaged_rows = erase_restored(store)
    code, platform = footing.code, footing.platform
    if store.ledger.footing() is None:
        store.ledger.stand_on(code=code, platform=platform, fingerprint=footing.fingerprint)
    moves = store.ledger.footing() != (code, platform)
    reused: set[tuple[str, str]] = set()
    asked = None if shards is None else set(shards)
    remaining = asked
    stopped: tuple[object, ...] = ()
    while True:
        result.failures |= settle_all(store, reporter)
        _purge_tainted(store, reporter)
        requests = _repairable(store)
        touched = {shard for request in requests for shard in request.shards}
        wanted = touched if remaining is None else remaining | touched
        for request in requests:
            store.ledger.requests.advance(request.id, "repairing")
        plan = Plan(
            shards=sorted(wanted - result.failures.keys()),
            code=code,
            platform=platform,
            checkpoints=CHECKPOINTS_KEY,
            heal=heal,
            read_reused=read_reused,
        )
        done = build(store, plan, execution=execution, reporter=reporter, what=_title(cause))
        result.trained += done.trained
        reused |= {(row.key, row.platform) for row in done.reused}
        result.failures |= done.failures
        stuck, stopped = stopped, (done.interrupted, *_deletions(store))
        if done.interrupted and stuck == stopped:
            raise DamagedError(
                f"shards {sorted(done.interrupted)} can't be built: a deletion that the ledger doesn't know stops them",
                hint="Run `sisa verify`: it lists what is wrong with the store.",
            )
        remaining = set(done.interrupted)
        _sweep_lost(store, done, reporter)
        ended = not done.interrupted and not _unsettled(store, result)
        if not moves:  # whoever goes on deleting must not keep from service what is repaired already
            _publish(store, result, footing, cause=cause, interrupted=remaining, held=held)
        if ended:
            break
    result.reused = len(reused - {(row.key, row.platform) for row in result.trained})
    if moves and result.failures:
        result.version = store.ledger.versions.live_number()  # half an upgrade is none: the old chains stay live
        return result
    if moves:
        _publish(store, result, footing, cause=cause, interrupted=remaining, held=held)
    _purge_tainted(store, reporter)
    return result


def _purge_tainted(store: OpenStore, reporter: Reporter) -> None:
    """Remove what an upgrade, finished or killed, took out of service: it must not be taken for what it replaces."""
    shards = sorted({row.shard for row in store.ledger.stages.tainted()})
    for shard in shards:
        purge_shard(store, shard, first_stage=store.slices + 1, reporter=reporter)
    if shards:
        store.ledger.shed()


def _sweep_lost(store: OpenStore, done: Build, reporter: Reporter) -> None:
    """Remove what a worker may have written after it had lost its lock, and nobody entered."""
    for shard, error in done.failures.items():
        if isinstance(error, LostLockError):
            purge_shard(store, shard, first_stage=1, reporter=reporter)


def _deletions(store: OpenStore) -> tuple[object, ...]:
    """Return what changes whenever a deletion is accepted or goes on."""
    ledger = store.ledger
    return sum(p.changes for p in ledger.partitions.all()), tuple((r.id, r.state) for r in ledger.requests.all())


def _repairable(store: OpenStore) -> list[Request]:
    return [r for r in store.ledger.requests.open() if STATES.index(r.state) >= STATES.index("stages_purged")]


def _unsettled(store: OpenStore, result: Repair) -> bool:
    """Whether a deletion came in while the last build ran, and something can be done about it."""
    return any(
        STATES.index(request.state) < STATES.index("repairing")
        and not result.failures.keys() & {shard for shard, _ in request.places}
        for request in store.ledger.requests.open()
    )


def _publish(
    store: OpenStore, result: Repair, footing: Footing, *, cause: str, interrupted: set[int], held: Held | None
) -> None:
    """Publish the newest clean stages and close the repaired requests, in one transaction.

    The first version is published only whole: half a training serves nobody.
    """
    ledger = store.ledger
    if not ledger.versions.live_number() and not _whole(store, footing, range(store.shards)):
        return
    with ledger.database.transaction():
        if held is not None:
            held.check()  # in here: whoever gets the lock after that, writes after us
        ledger.stand_on(code=footing.code, platform=footing.platform, fingerprint=footing.fingerprint)
        result.version = ledger.versions.publish_newest(
            cause=cause, shards=store.shards, code=footing.code, platform=footing.platform
        )
        ledger.stages.retire_others(code=footing.code, platform=footing.platform)
        for request in ledger.requests.open():
            if request.state != "repairing":
                continue
            failed = sorted(result.failures.keys() & set(request.shards))
            if failed:
                ledger.requests.advance(request.id, "repairing", note=f"repair failed for shards {failed}")
                continue
            if interrupted & set(request.shards) or not _whole(store, footing, request.shards):
                continue
            retrained = ledger.stages.trained_since(request.id, request.shards)
            ledger.requests.advance(
                request.id, "repaired", version_after=result.version, stages_retrained=retrained, note=""
            )
            result.requests.append(request.id)


def _whole(store: OpenStore, footing: Footing, shards: Iterable[int]) -> bool:
    """Whether every stage of these shards is there, clean."""
    return all(
        {row.stage for row in store.ledger.stages.all(shard)
         if not row.tainted and (row.code, row.platform) == (footing.code, footing.platform)}
        == set(range(1, store.slices + 1))
        for shard in shards
    )  # fmt: skip


def _title(cause: str) -> str:
    return {"train": "training", "add": "training", "repair": "retraining", "upgrade": "rebuilding"}.get(cause, cause)
