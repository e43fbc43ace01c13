"""One shard's chain: make the stages that its current records call for.

Training, resuming, retraining after a deletion and replaying are this one walk. Stage r is named by its
lineage key; if the checkpoints hold it, it is reused, else it is trained from stage r-1, or from a recovery snapshot
that a lost worker left in the middle of it. In order:

1. take the shard's lock, and stop if a deletion asked for it (a stop mark);
2. refuse a worker whose code or platform is not the chain's;
3. keys of stages 1..R follow from the memberships that the ledger expects;
4. before a stage trains, the rows of its slices are read back and must be exactly those.

A worker needs the store's folder (or its URI, and credentials of its own), its shard's derived keys and its shard's
lock, and nothing else: no table of the ledger, no other shard.

A lock on a server can be lost. Then the stage that is being trained is not written, and one that was just written is
not reported: whoever holds the lock by now decides what stays.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sisa.checkpoints import Manifest, SnapshotId, StageId, checkpoints_at
from sisa.coordination import Held, HeldElsewhere, coordination_at
from sisa.errors import DamagedError, FootingError, SisaError
from sisa.layout import Layout
from sisa.learners.feed import Rows
from sisa.learners.source import code_version
from sisa.ledger import StageRow, place_of
from sisa.lineage import stage_key
from sisa.planning.epochs import epoch_budget
from sisa.recipe import Recipe
from sisa.routing.keys import ShardKeys
from sisa.state import StageState, full_digest
from sisa.training.events import Report, StageDone, Trained
from sisa.training.order import batch_count
from sisa.training.platform import fingerprint, platform_id
from sisa.training.recovery import Provenance, Recovery
from sisa.training.rows import ShardRows
from sisa.training.stage import Stopped, TrainingError, train_stage
from sisa.training.together import Together, task_data
from sisa.training.waiting import sweep_waiting


@dataclass(frozen=True)
class ChainTask:
    """Everything that a worker is told."""

    layout: Layout
    """Where the store lies: names alone; credentials for object storage are the worker's own."""
    checkpoints: str
    """Below which prefix stages are looked for and written: the store's own, or a scratch place for a replay."""
    recipe: Recipe
    recipe_digest: str
    keys: ShardKeys
    code: str
    platform: str
    memberships: tuple[str, ...]
    """Digest of the rows that slices 1..R, and after them one for each generation, are expected to hold."""
    records: tuple[int, ...]
    """How many rows those are."""
    known: dict[str, str]
    """Full digest of each stage that the ledger knows, by key."""
    read_reused: bool
    """Verify every byte of the stages that are reused, instead of the last one's only."""
    heal: bool
    """Retrain a damaged stage instead of reporting it."""
    snapshot_every_s: float | None = None
    """Seconds of training between two recovery snapshots of a stage; None for none."""
    rows_in_memory: str = "auto"
    """Whether rows are held in memory: ``auto``, ``always`` or ``never``. It decides no bit."""
    memory_bytes: int | None = None
    """Memory of this worker, if anybody said."""
    ledger: str | None = None
    """Where locks and marks are, if not in the store's folder: what the store's recipe says of its ledger."""

    @property
    def shard(self) -> int:
        """The shard."""
        return self.keys.shard


def chain_keys(task: ChainTask) -> list[str]:
    """Return the lineage keys of stages 1..R."""
    keys: list[str] = []
    for stage, membership in enumerate(task.memberships, start=1):
        keys.append(
            stage_key(
                recipe_digest=task.recipe_digest,
                code_version=task.code,
                shard=task.shard,
                stage=stage,
                parent_key=keys[-1] if keys else "",
                membership=membership,
            )
        )
    return keys


def run_chain(task: ChainTask, report: Report) -> None:
    """Make the stages that the shard's records call for, and report each.

    Raises:
        Stopped: A deletion asked this shard to stop.
        StaleError: The rows are not those that the task was planned with.
        DamagedError: A stage or a partition is damaged.
        FootingError: This process runs other code or another platform than the chain's.
        LostLockError: Somebody else may be at this shard by now.
    """
    layout = task.layout.here()
    coordination = coordination_at(layout, place_of(task.ledger, layout.ledger))
    with contextlib.closing(coordination), coordination.shard(task.shard).held() as lock:

        def stopped() -> bool:
            lock.check()
            return coordination.marks.any(task.shard)

        if stopped():
            raise Stopped(f"training of shard {task.shard} was stopped by a deletion")
        _check_footing(task)
        sweep_waiting(layout, task.shard)
        try:
            _Chain(task, layout, stopped, report, lock).walk()
        finally:
            sweep_waiting(layout, task.shard)


@contextlib.contextmanager
def stage_inputs(task: ChainTask, stage: int) -> Iterator[tuple[StageState, Rows]]:
    """Read what a stage starts from, for a process that trains it with the one that walks the chain.

    What it reads stays for the length of a ``with`` block.

    Raises:
        StaleError: The rows are not those that the task was planned with.
        DamagedError: A stage or a partition is damaged.
        FootingError: This process runs other code or another platform than the chain's.
    """
    _check_footing(task)
    chain = _Chain(task, task.layout.here(), lambda: False, lambda _: None, HeldElsewhere())
    with contextlib.closing(chain.rows):
        yield chain.inputs(stage)


class _Chain:
    """The walk along one chain, with what it has read so far."""

    def __init__(
        self, task: ChainTask, layout: Layout, stopped: Callable[[], bool], report: Report, lock: Held
    ) -> None:
        self._task = task
        self._stopped = stopped
        self._report = report
        self._lock = lock
        self._checkpoints = checkpoints_at(task.layout.uri, task.checkpoints)
        self._keys = chain_keys(task)
        self._together = Together(task.recipe)
        self.rows = ShardRows(task, layout)
        self._newest: tuple[int, StageState] = (0, StageState({}, {}))

    def walk(self) -> None:
        """Reuse what is there, train what isn't."""
        # What a killed worker left unfinished, and snapshots from which no stage can go on.
        self._checkpoints.sweep(self._task.shard, keep=self._kept, keep_snapshot=self._resumable)
        with contextlib.closing(self.rows), contextlib.closing(self._together):
            for stage in range(1, len(self._keys) + 1):
                manifest = self._found(stage)
                reused = manifest is not None
                if manifest is None:
                    manifest = self._train(stage)
                self._lock.check()
                self._report(StageDone(_row(self._task, manifest), reused=reused))

    def _kept(self, identity: StageId) -> bool:
        """Healing removes stages that nobody entered and no record calls for: a restored backup's, for instance."""
        task = self._task
        return not task.heal or identity.platform != task.platform or identity.key in {*self._keys, *task.known}

    def _resumable(self, snapshot_id: SnapshotId) -> bool:
        identity = snapshot_id.stage_id
        called_for = identity.stage <= len(self._keys) and identity == self._identity(identity.stage)
        return called_for and not self._checkpoints.exists(identity)

    def _identity(self, stage: int) -> StageId:
        return StageId(self._task.shard, stage, self._keys[stage - 1], self._task.platform)

    def _found(self, stage: int) -> Manifest | None:
        """Return the manifest of a stage that is there and whole; None if it has to be trained."""
        task, identity = self._task, self._identity(stage)
        digest = task.known.get(identity.key)
        if not self._checkpoints.exists(identity):
            if digest is not None and not task.heal:
                raise DamagedError(
                    f"the checkpoint of stage {stage} of shard {task.shard} is missing",
                    hint="`sisa repair` retrains it from the last good stage.",
                )
            return None
        try:
            if digest is not None and not task.read_reused:
                return self._checkpoints.manifest(identity)
            manifest, state = self._checkpoints.load(identity, expect_full_digest=digest)
        except DamagedError:
            if not task.heal:
                raise
            self._checkpoints.remove(identity)
            return None
        self._newest = (stage, state)
        return manifest

    def _parent(self, stage: int) -> StageState:
        if self._newest[0] == stage - 1:
            return self._newest[1]
        identity = self._identity(stage - 1)
        return self._checkpoints.load(identity, expect_full_digest=self._task.known.get(identity.key))[1]

    def _train(self, stage: int) -> Manifest:
        task = self._task
        slices = task.recipe.sisa.slices
        budget = epoch_budget(epochs=task.recipe.training.epochs, slices=slices, generations=len(self._keys) - slices)
        epochs = budget[stage - 1]
        records = sum(task.records[:stage])
        parent, columns = self.inputs(stage)
        said = Provenance(
            parent_key=self._keys[stage - 2] if stage > 1 else "",
            records=records,
            worker=f"{socket.gethostname()}:{os.getpid()}",
            fingerprint=fingerprint(task.recipe),
        )
        recovery = Recovery(self._checkpoints.snapshots, self._identity(stage), self._report)
        every_s = task.snapshot_every_s if task.recipe.workers.devices_per_shard == 1 else None
        amid = recovery.find(records=records, batch_size=task.recipe.training.batch_size)
        started = time.monotonic()
        state = self._guarded(
            stage,
            recipe=task.recipe,
            class_count=len(task.recipe.data.classes or []),
            shard=task.shard,
            epochs=epochs,
            parent=parent,
            columns=columns,
            keys=task.keys,
            should_stop=self._stopped,
            on_progress=lambda done: self._report(Trained(task.shard, done)),
            amid=amid,
            keeping=recovery.keeping(every_s, said, stopped=self._stopped),
        )
        seconds = recovery.seconds_before + time.monotonic() - started
        if self._stopped():  # what was read may be about to be erased: don't let these weights reach the disk
            raise Stopped(f"training of shard {task.shard} was stopped by a deletion")
        self._lock.check()
        self._newest = (stage, state)
        manifest = self._checkpoints.write(
            self._identity(stage),
            state,
            parent_key=said.parent_key,
            records=records,
            seconds=seconds,
            worker=said.worker,
            fingerprint=said.fingerprint,
            epochs=epochs,
            steps=epochs * batch_count(records=records, batch_size=task.recipe.training.batch_size),
        )
        recovery.discard()
        return manifest

    def _guarded(self, stage: int, **arguments: Any) -> StageState:
        """Train; what a user's model raises becomes a message without values, which may be somebody's."""
        try:
            if self._task.recipe.workers.devices_per_shard > 1 and arguments["columns"].count:
                return self._together.train(self._told(**arguments, stage=stage), stage=stage, **arguments)
            return train_stage(stage=stage, **arguments)
        except SisaError:
            raise
        except Exception as error:
            frame = traceback.extract_tb(error.__traceback__)[-1]
            raise TrainingError(
                f"training stage {stage} of shard {arguments['shard']} failed: "
                f"{type(error).__name__} at {Path(frame.filename).name}:{frame.lineno}",
                hint="Check the model and the size of the batches against the memory; what was trained is kept.",
            ) from error

    def _told(self, *, stage: int, epochs: int, parent: StageState, **_: Any) -> dict[str, Any]:
        """What the processes that train a stage with us are told; they read the inputs themselves."""
        known = {self._keys[stage - 2]: full_digest(parent)} if stage > 1 else {}
        return {"task": task_data(replace(self._task, known=known)), "epochs": epochs}

    def inputs(self, stage: int) -> tuple[StageState, Rows]:
        """Read what a stage starts from: the state before it, and the rows of slices 1..stage."""
        parent = self._parent(stage)
        return parent, self.rows.through(stage, parent)


def _check_footing(task: ChainTask) -> None:
    ours = platform_id(fingerprint(task.recipe))
    if ours != task.platform:
        raise FootingError(
            f"this worker's platform ({ours}) is not the one that the chain was trained on ({task.platform}): "
            "library versions, instruction set, device or threads differ, so bits would too",
            hint="Run on the old platform, or rebuild everything on this one with `sisa train CONFIG --upgrade`.",
        )
    if code_version(task.recipe) != task.code:
        raise FootingError(
            "the training code or the source of model.factory is not the one that the chain was trained with",
            hint="Run with the old code, or rebuild everything with `sisa train CONFIG --upgrade`.",
        )


def _row(task: ChainTask, manifest: Manifest) -> StageRow:
    return StageRow(
        key=manifest.stage_id.key,
        platform=manifest.stage_id.platform,
        code=task.code,
        shard=task.shard,
        stage=manifest.stage_id.stage,
        parent_key=manifest.parent_key,
        records=manifest.records,
        state_digest=manifest.state_digest,
        full_digest=manifest.full_digest,
        worker=manifest.worker,
        seconds=manifest.seconds,
        created_at=manifest.created_at,
    )
