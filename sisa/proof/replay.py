"""Retraining constituents from nothing, in a scratch place, and comparing every stage bit for bit.

No checkpoint is read: what a replay gives follows from the rows on disk, the keys and the recipe alone.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field
from typing import Literal

from sisa.execution.build import Plan, build
from sisa.execution.options import Execution
from sisa.layout import SCRATCH_KEY
from sisa.learners.source import code_version
from sisa.ledger import StageRow
from sisa.opening import OpenStore
from sisa.progress import Reporter
from sisa.proof.problems import stage_name
from sisa.state import JSON
from sisa.training.platform import platform_id

Replay = Literal["none", "all"] | int
NOT_BITWISE = "distributional, not bitwise"


@dataclass
class Replayed:
    """What a replay found."""

    comparison: str = "none"
    problems: list[str] = field(default_factory=list)
    shards: list[int] = field(default_factory=list)
    stages: int = 0
    workers: list[str] = field(default_factory=list)


def run_replay(
    store: OpenStore, replay: Replay, *, here: dict[str, JSON], execution: Execution, reporter: Reporter
) -> Replayed:
    """Retrain constituents and compare every stage that the ledger has.

    Args:
        store: The store.
        replay: ``all``, or how many constituents, chosen at random.
        here: The fingerprint of this process.
        execution: Where chains run.
        reporter: Who wants to know.

    Raises:
        SisaError: The chains can't be run here.
    """
    footing = store.ledger.footing()
    code, platform = code_version(store.recipe), platform_id(here)
    if footing is None:
        return Replayed(problems=["replay: nothing was ever trained"])
    if footing != (code, platform):
        what = ", ".join(_differing(store, here)) or "the training code or the model's source"
        problem = f"replay: {NOT_BITWISE}: this process differs from the one that trained in {what}"
        return Replayed(NOT_BITWISE, [problem])
    shards = _chosen(store, replay)
    scratch = f"{SCRATCH_KEY}/{secrets.token_hex(8)}"
    try:
        plan = Plan(shards=shards, code=code, platform=platform, checkpoints=scratch, enter=False)
        done = build(store, plan, execution=execution, reporter=reporter, what="replaying")
    finally:
        store.layout.storage.remove_all(SCRATCH_KEY)
    problems = [f"replay of shard {shard}: {error.message}" for shard, error in sorted(done.failures.items())]
    problems += [f"replay of shard {shard}: stopped by a deletion" for shard in sorted(done.interrupted)]
    problems += [
        f"replay of {stage_name(row.shard, row.stage)}: took a stage instead of training it" for row in done.reused
    ]
    problems += _compare(store, done.trained)
    workers = sorted({row.worker for row in done.trained})
    return Replayed("bitwise", problems, shards, len(done.trained), workers)


def _differing(store: OpenStore, here: dict[str, JSON]) -> list[str]:
    """Name what differs between this platform and the one that trained."""
    try:
        there = store.ledger.fingerprint()
    except (ValueError, TypeError, RecursionError):  # reported where the ledger is checked
        return ["what can't be read any more"]
    return sorted(name for name in here.keys() | there.keys() if here.get(name) != there.get(name))


def _chosen(store: OpenStore, replay: Replay) -> list[int]:
    shards = list(range(store.shards))
    if isinstance(replay, int):
        shards = sorted(secrets.SystemRandom().sample(shards, min(replay, len(shards))))
    return shards


def _compare(store: OpenStore, replayed: list[StageRow]) -> list[str]:
    problems: list[str] = []
    again = {(row.shard, row.stage): row for row in replayed}
    for row in store.ledger.stages.all():
        fresh = again.get((row.shard, row.stage))
        if fresh is None or row.tainted or row.platform != fresh.platform:
            continue
        where = stage_name(row.shard, row.stage)
        if fresh.key != row.key:
            problems.append(f"replay of {where}: the rows on disk call for another key")
        elif fresh.full_digest != row.full_digest:
            problems.append(f"replay of {where}: retrained from nothing it gives other bits")
    return problems
