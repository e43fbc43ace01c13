"""The build system for weights: make the stages that the records call for, wherever chains run.

Each stage that a worker reports is entered into the ledger only if no deletion touched its slices since
the chain was planned. A shard that a deletion overtook is reported as interrupted: the caller settles
the deletion and builds again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sisa.errors import DamagedError, SisaError
from sisa.execution.collect import Build, Collector
from sisa.execution.inline import run_inline
from sisa.execution.options import Execution
from sisa.layout import is_held_out
from sisa.ledger import Partition
from sisa.opening import OpenStore
from sisa.planning.cost import stage_record_epochs
from sisa.planning.epochs import epoch_budget
from sisa.planning.placement import longest_first
from sisa.planning.tally import Tally
from sisa.progress import Reporter
from sisa.routing.keys import shard_keys
from sisa.training.chain import ChainTask

__all__ = ["Build", "Plan", "build"]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What to build and how to treat what is there."""

    shards: Sequence[int]
    code: str
    platform: str
    checkpoints: str
    """Below which prefix of the store stages are looked for and written."""
    enter: bool = True
    """Enter stages into the ledger; a replay doesn't."""
    read_reused: bool = False
    heal: bool = False


def build(store: OpenStore, plan: Plan, *, execution: Execution, reporter: Reporter, what: str) -> Build:
    """Run the chains of the planned shards and enter their stages into the ledger.

    Args:
        store: The store.
        plan: What to build.
        execution: Where chains run.
        reporter: Who wants to know.
        what: What the progress bar says.
    """
    partitions, failures = _trained_slices(store, plan.shards)
    dirty = {shard for shard, slices in partitions.items() if any(p.dirty for p in slices)}
    planned = {k: _task(store, plan, execution, slices) for k, slices in partitions.items() if k not in dirty}
    costs = {shard: _costs_left(store, plan, task) for shard, task in planned.items()}
    tasks = [planned[shard] for shard in longest_first({k: sum(stages.values()) for k, stages in costs.items()})]
    done = Build(interrupted=dirty, failures=failures)  # a slice with rows of deleted people is settled first
    tally = Tally(costs)
    collect = Collector(store, done, tally, reporter, partitions=partitions, enter=plan.enter)
    reporter.begin(what, tally.total)
    reporter.stages(0, tally.stages)
    try:
        done.used_ray = execution.uses_ray(store.recipe, chains=len(tasks), record_epochs=tally.total)
        if done.used_ray:
            from sisa.execution.cluster import run_on_ray

            need, limit = execution.need(store.recipe), execution.limit(len(tasks))
            reporter.note(f"running {len(tasks)} chains on Ray, {limit or 'as many as it holds'} at a time")
            run_on_ray(tasks, collect, address=execution.address, need=need, limit=limit)
        else:
            run_inline(tasks, collect)
    finally:
        reporter.end()
    return done


def _trained_slices(store: OpenStore, shards: Sequence[int]) -> tuple[dict[int, list[Partition]], dict[int, SisaError]]:
    """Return slices 1..R of each shard, those of generations included; and, of shards for which the ledger lists others, what is wrong."""
    partitions: dict[int, list[Partition]] = {}
    failures: dict[int, SisaError] = {}
    for shard in shards:
        slices = [p for p in store.ledger.partitions.all(shard) if not is_held_out(p.slice)]
        if [p.slice for p in slices] == list(range(1, store.slices + 1)):
            partitions[shard] = slices
        else:
            failures[shard] = DamagedError(
                f"the ledger doesn't list exactly slices 1 to {store.slices} of shard {shard}",
                hint="Restore the ledger from a copy that was made while no command ran; `sisa verify` lists what is wrong.",
            )
    return partitions, failures


def _task(store: OpenStore, plan: Plan, execution: Execution, slices: list[Partition]) -> ChainTask:
    shard = slices[0].shard
    clean = [row for row in store.ledger.stages.all(shard) if not row.tainted and row.platform == plan.platform]
    known = {row.key: row.full_digest for row in clean}
    each = execution.each(store.recipe)
    return ChainTask(
        layout=store.layout,
        checkpoints=plan.checkpoints,
        recipe=store.recipe,
        recipe_digest=store.recipe_digest,
        keys=shard_keys(store.keys.routing, shard),
        code=plan.code,
        platform=plan.platform,
        memberships=tuple(p.membership for p in slices),
        records=tuple(p.records for p in slices),
        known=known if plan.enter else {},
        read_reused=plan.read_reused,
        heal=plan.heal,
        snapshot_every_s=each.snapshot_every_s if plan.enter else None,
        rows_in_memory=each.rows_in_memory,
        memory_bytes=each.memory_bytes,
        ledger=store.recipe.ledger,
    )


def _costs_left(store: OpenStore, plan: Plan, task: ChainTask) -> dict[int, int]:
    """Return the record-epochs of each stage from the first one on that the ledger doesn't know."""
    rows = store.ledger.stages.all(task.shard) if plan.enter else []
    there = {r.stage for r in rows if not r.tainted and (r.code, r.platform) == (plan.code, plan.platform)}
    first = next((s for s in range(1, store.slices + 1) if s not in there), store.slices + 1)
    budget = epoch_budget(
        epochs=store.recipe.training.epochs, slices=store.recipe.sisa.slices, generations=store.generations
    )
    return {stage: cost for stage, cost in stage_record_epochs(task.records, budget).items() if stage >= first}
