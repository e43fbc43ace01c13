"""The sceptic's command: recompute what can be recomputed, retrain what can't, and list what differs.

Nothing that the ledger says is believed where the disk can say it: memberships and lineage keys come
from the rows, digests from the bytes. A replay retrains constituents from nothing in a scratch place,
reading no checkpoint, and compares every stage bit for bit. Problems name places, never people.
"""

from __future__ import annotations

import secrets
import stat
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

from sisa.checkpoints import StageId
from sisa.errors import BusyError, SisaError
from sisa.execution.build import Plan, build
from sisa.execution.options import Execution
from sisa.files import make_folder, remove
from sisa.learners.source import code_version
from sisa.ledger import STATES, StageRow
from sisa.lineage import stage_key
from sisa.opening import PARTS, OpenStore
from sisa.progress import Reporter
from sisa.proof.rows import check_rows
from sisa.state import JSON
from sisa.training.platform import fingerprint, platform_id

Replay = Literal["none", "all"] | int
NOT_BITWISE = "distributional, not bitwise"


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
    checks = [_check_ledger, _check_files, _check_requests]
    reporter.begin("verifying", len(checks) + 2 * store.shards)
    try:
        for check in checks:
            result.problems += _guarded(partial(check, store))
            reporter.advance(1)
        expected: dict[tuple[int, int], str] = {}
        for shard in range(store.shards):
            problems, memberships = check_rows(store, shard)
            result.problems += problems
            expected |= _expected_keys(store, shard, memberships)
            reporter.advance(1)
        for shard in range(store.shards):
            result.problems += _guarded(partial(_check_stages, store, shard, expected, result))
            reporter.advance(1)
    finally:
        reporter.end()
    result.problems += _guarded(partial(_check_version, store))
    if replay != "none":
        result.problems += _guarded(partial(_replay, store, replay, result, execution, reporter))
    result.open_requests = [request.id for request in store.ledger.requests.open()]
    result.ok = not result.problems
    if result.problems and store.ledger.last_event() != before:
        raise BusyError(
            "the store changed while it was being verified (a deletion came in)", hint="Run the command again."
        )
    return result


def _guarded(check: Callable[[], list[str]]) -> list[str]:
    """Run a check; an error of ours, or a file that can't be read (any more), is what it found."""
    try:
        return check()
    except SisaError as error:
        return [error.message]
    except OSError as error:
        return [f"{error.filename}: {error.strerror}"]


def _check_ledger(store: OpenStore) -> list[str]:
    store.ledger.check()
    return [] if store.ledger.ingested else ["the ledger says that the ingest has not ended"]


def _check_files(store: OpenStore) -> list[str]:
    """Files that nobody answers for, and secrets that others can read."""
    layout = store.layout
    strays = [path for path in layout.root.iterdir() if path.name not in PARTS]
    strays += [path for folder in (layout.locks, layout.keys) for path in folder.rglob("tmp-*")]
    strays += list(layout.scratch.iterdir()) if layout.scratch.exists() else []
    strays += store.checkpoints.strays()
    problems = [f"{_short(store, path)}: nobody answers for this file" for path in sorted(strays)]
    marks = [path for folder in layout.locks.glob("stop-*") for path in folder.iterdir()]
    wanted = {request.id for request in store.ledger.requests.open()}
    problems += [
        f"{_short(store, path)}: stops training for a deletion that has ended; `sisa repair` removes it"
        for path in sorted(marks)
        if path.name not in wanted
    ]
    for path in (layout.routing_key, layout.exclusion_key):
        mode = stat.S_IMODE(path.stat().st_mode)
        if mode & 0o077:
            problems.append(f"{_short(store, path)}: mode is {mode:04o}, expected 0600: others can read the secret")
    return problems


def _check_requests(store: OpenStore) -> list[str]:
    purged = STATES.index("stages_purged")
    return [
        f"request {r.id}: state {r.state}: rows or weights of deleted people may still be there; `sisa repair` goes on"
        for r in store.ledger.requests.open()
        if STATES.index(r.state) < purged
    ]


def _expected_keys(store: OpenStore, shard: int, memberships: list[str | None]) -> dict[tuple[int, int], str]:
    """Recompute the chain's keys from the rows; stop at the first slice whose rows are unreadable."""
    footing = store.ledger.footing()
    keys: dict[tuple[int, int], str] = {}
    parent = ""
    for stage, membership in enumerate(memberships, start=1):
        if membership is None or footing is None:
            break
        parent = stage_key(
            recipe_digest=store.recipe_digest,
            code_version=footing[0],
            shard=shard,
            stage=stage,
            parent_key=parent,
            membership=membership,
        )
        keys[shard, stage] = parent
    return keys


def _check_stages(
    store: OpenStore, shard: int, expected: dict[tuple[int, int], str], result: Verification
) -> list[str]:
    """Keys against the rows, bytes against digests, the disk against the ledger."""
    problems: list[str] = []
    rows = store.ledger.stages.all(shard)
    footing = store.ledger.footing()
    entered = {(row.key, row.platform) for row in rows}
    problems += [
        f"shard {shard}, stage {identity.stage}: a checkpoint that the ledger doesn't know (orphan)"
        for identity in store.checkpoints.list_shard(shard)
        if (identity.key, identity.platform) not in entered
    ]
    present: set[int] = set()
    for row in rows:
        where = f"shard {shard}, stage {row.stage}"
        if row.tainted:
            problems.append(f"{where}: tainted by a deletion and not purged")
            continue
        if footing != (row.code, row.platform):
            problems.append(f"{where}: left by an unfinished upgrade; `sisa train CONFIG --upgrade` goes on")
            continue
        present.add(row.stage)
        if (shard, row.stage) in expected and row.key != expected[shard, row.stage]:
            problems.append(f"{where}: its key is not the one that the rows on disk call for")
        problems += _guarded(partial(_check_bytes, store, row))
        result.stages_checked += 1
    waiting = any(shard in request.shards for request in store.ledger.requests.open())
    absent = sorted(set(range(1, store.slices + 1)) - present)
    if absent and not waiting:
        problems.append(f"shard {shard}: stages {absent} are not trained; `sisa repair` or `sisa train` does it")
    return problems


def _check_bytes(store: OpenStore, row: StageRow) -> list[str]:
    identity = StageId(row.shard, row.stage, row.key, row.platform)
    manifest, _ = store.checkpoints.load(identity, expect_full_digest=row.full_digest)
    if manifest.state_digest != row.state_digest:
        return [f"shard {row.shard}, stage {row.stage}: state digest differs from the ledger's"]
    return []


def _check_version(store: OpenStore) -> list[str]:
    """The live version serves clean stages, and the newest ones unless a repair is due."""
    version = store.ledger.versions.live()
    if version.number == 0:
        return ["no version was ever published: the training has not ended"]
    problems: list[str] = []
    for member in version.members:
        if member.stage == 0:
            continue
        row = store.ledger.stages.get(member.key, member.platform)
        if row is None or row.tainted:
            problems.append(
                f"version {version.number}: shard {member.shard} is served from a stage that is gone or tainted"
            )
        elif row.records == 0:
            problems.append(f"version {version.number}: shard {member.shard} votes without having seen a record")
    if not store.ledger.requests.open():
        serving = {member.shard: member.stage for member in version.members}
        for shard in range(store.shards):
            newest = max((r.stage for r in store.ledger.stages.all(shard) if not r.tainted and r.records), default=0)
            if serving.get(shard, 0) != newest:
                problems.append(
                    f"version {version.number}: shard {shard} is served from stage {serving.get(shard, 0)}, not {newest}"
                )
    return problems


def _replay(
    store: OpenStore, replay: Replay, result: Verification, execution: Execution, reporter: Reporter
) -> list[str]:
    """Retrain constituents from nothing and compare every stage that the ledger has."""
    footing = store.ledger.footing()
    code, platform = code_version(store.recipe), platform_id(result.fingerprint)
    if footing is None:
        return ["replay: nothing was ever trained"]
    if footing != (code, platform):
        result.comparison = NOT_BITWISE
        differing = sorted(
            name
            for name in result.fingerprint.keys() | store.ledger.fingerprint().keys()
            if result.fingerprint.get(name) != store.ledger.fingerprint().get(name)
        )
        what = ", ".join(differing) if differing else "the training code or the model's source"
        return [f"replay: {NOT_BITWISE}: this process differs from the one that trained in {what}"]
    result.comparison = "bitwise"
    result.replayed_shards = _chosen(store, replay)
    scratch = store.layout.scratch / secrets.token_hex(8)
    make_folder(scratch)
    try:
        plan = Plan(shards=result.replayed_shards, code=code, platform=platform, checkpoints=scratch, enter=False)
        done = build(store, plan, execution=execution, reporter=reporter, what="replaying")
    finally:
        _remove_scratch(store.layout.scratch)
    problems = [f"replay of shard {shard}: {error.message}" for shard, error in sorted(done.failures.items())]
    problems += [f"replay of shard {shard}: stopped by a deletion" for shard in sorted(done.interrupted)]
    problems += [
        f"replay of shard {r.shard}, stage {r.stage}: took a stage instead of training it" for r in done.reused
    ]
    result.stages_replayed = len(done.trained)
    result.workers = sorted({row.worker for row in done.trained})
    return problems + _compare(store, done.trained)


def _compare(store: OpenStore, replayed: list[StageRow]) -> list[str]:
    problems: list[str] = []
    again = {(row.shard, row.stage): row for row in replayed}
    for row in store.ledger.stages.all():
        fresh = again.get((row.shard, row.stage))
        if fresh is None or row.tainted or row.platform != fresh.platform:
            continue
        where = f"shard {row.shard}, stage {row.stage}"
        if fresh.key != row.key:
            problems.append(f"replay of {where}: the rows on disk call for another key")
        elif fresh.full_digest != row.full_digest:
            problems.append(f"replay of {where}: retrained from nothing it gives other bits")
    return problems


def _chosen(store: OpenStore, replay: Replay) -> list[int]:
    shards = list(range(store.shards))
    if isinstance(replay, int):
        shards = sorted(secrets.SystemRandom().sample(shards, min(replay, len(shards))))
    return shards


def _remove_scratch(scratch: Path) -> None:
    if scratch.exists():
        remove(scratch)


def _short(store: OpenStore, path: Path) -> str:
    return str(path.relative_to(store.layout.root))
