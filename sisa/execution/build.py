"""The build system for weights: make the stages that the records call for, wherever chains run.

Each stage that a worker reports is entered into the ledger only if no deletion touched its slices since
the chain was planned. A shard that a deletion overtook is reported as interrupted: the caller settles
the deletion and builds again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from sisa.errors import DamagedError, SisaError, StaleError
from sisa.execution.inline import run_inline
from sisa.execution.options import Execution
from sisa.layout import HOLDOUT_SLICE
from sisa.ledger import Partition, StageRow
from sisa.opening import OpenStore
from sisa.planning.cost import chain_record_epochs
from sisa.planning.epochs import epoch_budget
from sisa.progress import Reporter
from sisa.routing.keys import shard_keys
from sisa.training.chain import ChainTask
from sisa.training.events import Event, Trained
from sisa.training.stage import Stopped


@dataclass
class Build:
    """What a build did."""

    trained: list[StageRow] = field(default_factory=list)
    reused: list[StageRow] = field(default_factory=list)
    interrupted: set[int] = field(default_factory=set)
    """Shards that a deletion overtook."""
    failures: dict[int, SisaError] = field(default_factory=dict)
    used_ray: bool = False


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
    tasks = [_task(store, plan, shard, slices) for shard, slices in partitions.items() if shard not in dirty]
    work = {task.shard: _work_left(store, plan, task) for task in tasks}
    tasks.sort(key=lambda task: -work[task.shard])  # longest first
    done = Build(interrupted=dirty, failures=failures)  # a slice with rows of deleted people is settled first
    collect = _Collector(store, plan, partitions, done, reporter)
    total = sum(work.values())
    reporter.begin(what, total)
    try:
        done.used_ray = execution.uses_ray(store.recipe, chains=len(tasks), record_epochs=total)
        if done.used_ray:
            from sisa.execution.cluster import run_on_ray

            workers = execution.worker_count(len(tasks))
            reporter.note(f"running {len(tasks)} chains on Ray, {workers} at a time")
            run_on_ray(tasks, collect.event, collect.failure, address=execution.address, workers=workers)
        else:
            run_inline(tasks, collect.event, collect.failure)
    finally:
        reporter.end()
    return done


class _Collector:
    """Takes the chains' events on the driver's side."""

    def __init__(
        self, store: OpenStore, plan: Plan, partitions: dict[int, list[Partition]], done: Build, reporter: Reporter
    ) -> None:
        self._store = store
        self._plan = plan
        self._changes = {shard: {p.slice: p.changes for p in slices} for shard, slices in partitions.items()}
        self._done = done
        self._reporter = reporter

    def event(self, event: Event) -> None:
        """Enter a stage, or pass progress on."""
        if isinstance(event, Trained):
            self._reporter.advance(event.record_epochs)
            return
        row = event.row
        if self._plan.enter and not self._store.ledger.stages.enter(row, changes=self._changes[row.shard]):
            self._done.interrupted.add(row.shard)
            return
        (self._done.reused if event.reused else self._done.trained).append(row)

    def failure(self, shard: int, error: SisaError) -> None:
        """Sort what ended a chain: a deletion that overtook it, or a fault."""
        slices = self._store.slices
        overtaken = self._store.ledger.stages.overtaken(shard, slices, changes=self._changes[shard])
        if isinstance(error, Stopped) or overtaken:
            self._done.interrupted.add(shard)
        elif isinstance(error, StaleError):
            self._done.failures[shard] = DamagedError(error.message, hint=error.hint)
        else:
            self._done.failures[shard] = error


def _trained_slices(store: OpenStore, shards: Sequence[int]) -> tuple[dict[int, list[Partition]], dict[int, SisaError]]:
    """Return slices 1..R of each shard; and, of shards for which the ledger lists others, what is wrong."""
    partitions: dict[int, list[Partition]] = {}
    failures: dict[int, SisaError] = {}
    for shard in shards:
        slices = [p for p in store.ledger.partitions.all(shard) if p.slice != HOLDOUT_SLICE]
        if [p.slice for p in slices] == list(range(1, store.slices + 1)):
            partitions[shard] = slices
        else:
            failures[shard] = DamagedError(
                f"the ledger doesn't list exactly slices 1 to {store.slices} of shard {shard}",
                hint="Restore the ledger from a copy that was made while no command ran; `sisa verify` lists what is wrong.",
            )
    return partitions, failures


def _task(store: OpenStore, plan: Plan, shard: int, slices: list[Partition]) -> ChainTask:
    clean = [row for row in store.ledger.stages.all(shard) if not row.tainted and row.platform == plan.platform]
    known = {row.key: row.full_digest for row in clean}
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
    )


def _work_left(store: OpenStore, plan: Plan, task: ChainTask) -> int:
    """Record-epochs from the first stage that the ledger doesn't know."""
    rows = store.ledger.stages.all(task.shard) if plan.enter else []
    there = {r.stage for r in rows if not r.tainted and (r.code, r.platform) == (plan.code, plan.platform)}
    first = next((s for s in range(1, store.slices + 1) if s not in there), store.slices + 1)
    budget = epoch_budget(epochs=store.recipe.training.epochs, slices=store.slices)
    return chain_record_epochs(task.records, budget, first_stage=first)
