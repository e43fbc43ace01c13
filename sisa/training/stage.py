"""One stage of one shard: a pure function of recipe, shard, stage, surviving records, shard keys and parent state.

In order: take the preprocessing from the parent (or fit it on the first non-empty slice); build the model from the
chain's seed and give it the parent's parameters, buffers, moments and schedule; then, epoch by epoch, seed every
generator, order the records by key, cut batches, step. Nothing else gets in: no clock decides anything but when to
look whether somebody asked us to stop.

Every stage starts from a state, so a training that was interrupted between stages and one that was not are the same
code path. Within a stage the state can be kept now and then, with the position and where the generators stand; a
training that goes on from there makes the same steps. Bits are the same on one platform fingerprint only.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import numpy as np

from sisa.errors import SisaError, UserError
from sisa.learners.alike import alike
from sisa.learners.columns import Array, Columns
from sisa.learners.feed import Feed, Rows, feed_of
from sisa.learners.flags import derived_seed, device_of, seed_everything, training_flags
from sisa.learners.generators import dump_generators, restore_generators
from sisa.learners.gradients import Gradients, build_gradients, trainable
from sisa.learners.models import build_model
from sisa.learners.modules import INIT_SEED, dump_module, init_seed, restore_module
from sisa.learners.optimizers import Optimizer, build_optimizer
from sisa.learners.preprocess import Preprocessor
from sisa.learners.schedules import Schedule, build_schedule
from sisa.learners.shared import Exchange, SharedGradients, require_shareable
from sisa.recipe import Recipe
from sisa.routing.keys import ShardKeys
from sisa.state import JSON, StageState
from sisa.training.order import batch_sizes, epoch_order

LOOK_UP_S = 0.1
"""How often a training looks whether it should stop, and says how far it is."""


EPOCH, BATCH = "snapshot.epoch", "snapshot.batch"
"""Scalars of a state in the middle of a stage: the epoch that it is in, and how many of its batches lie behind."""


class Stopped(SisaError):
    """Somebody asked the training to stop; nothing of the stage is kept."""


class TrainingError(UserError):
    """The recipe doesn't lead to a model: its numbers grew beyond all bounds."""


@dataclass(frozen=True, kw_only=True)
class Keeping:
    """That a stage's state is kept while it trains."""

    every_s: float
    """Seconds between the end of one and the next."""
    keep: Callable[[StageState, int], None]
    """Is given the whole state, and the number of steps that lie behind it."""
    unfit: Callable[[], None]
    """Is told if no state says all: the model keeps something else."""


def train_stage(
    *,
    recipe: Recipe,
    class_count: int,
    shard: int,
    stage: int,
    epochs: int,
    parent: StageState,
    columns: Rows,
    keys: ShardKeys,
    should_stop: Callable[[], bool],
    on_progress: Callable[[int], None],
    group: Exchange | None = None,
    amid: StageState | None = None,
    keeping: Keeping | None = None,
) -> StageState:
    """Train one stage and return its full state.

    Args:
        recipe: A resolved recipe.
        class_count: Number of declared classes.
        shard: 0..S-1.
        stage: 1..R.
        epochs: Passes over ``columns``.
        parent: State of stage - 1; empty for the first stage, or if slices before this one had no records.
        columns: Records of slices 1..stage, in canonical order, in memory or streamed: bits are the same.
        keys: The shard's keys.
        should_stop: Asked several times a second.
        on_progress: Told, several times a second, how many records *more* went through the model.
        group: This process's place among those that train the stage together, each on its part of every batch.
        amid: A state of this very stage from which its training goes on, as ``keeping`` was given it.
        keeping: Who keeps such states, and how often; by default nobody does.

    Returns:
        The state; an empty one if there are no records.

    Raises:
        Stopped: ``should_stop`` said so.
        TrainingError: The loss isn't a finite number at the end.
        UserError: The model or the optimiser can't be built or run.
    """
    if not columns.count:
        return StageState()
    with training_flags(recipe):
        run = _Run(recipe, class_count=class_count, shard=shard, parent=amid or parent, columns=columns, group=group)
        watch = _Watch(should_stop, on_progress, what=f"stage {stage} of shard {shard}")
        if keeping is not None:
            watch.keep_every(keeping.every_s, lambda: _keep(run, keeping, last_step=epochs * run.batches))
        seed = recipe.training.seed
        # Each process draws its own random numbers for its part (dropout); the first one those of a process alone.
        own = () if group is None or group.rank == 0 else (group.rank,)
        for epoch in range(position(amid)[0], epochs):
            seed_everything(derived_seed("sisa-epoch", seed, shard, stage, epoch, *own))
            run.begin(epoch, amid)
            run.epoch(epoch_order(keys.order, columns.uids_N, seed=seed, stage=stage, epoch=epoch), watch)
            amid = None
        watch.look()
        run.check(shard=shard, stage=stage)
        return run.dump()


def position(amid: StageState | None) -> tuple[int, int]:
    """Return the epoch that a state is in, and how many of its batches lie behind it."""
    if amid is None:
        return 0, 0
    return cast("int", amid.scalars[EPOCH]), cast("int", amid.scalars[BATCH])


def _keep(run: _Run, keeping: Keeping, *, last_step: int) -> None:
    """Have the state kept, unless the stage is at its end: then it is about to be kept as what it is."""
    if run.step >= last_step:
        return
    if run.is_all_in_the_state():
        keeping.keep(run.dump_amid(), run.step)
    else:
        keeping.unfit()


def _fitted(recipe: Recipe, rows: Rows) -> Preprocessor:
    return Preprocessor.fit(recipe, rows.first_slice()) if isinstance(rows, Columns) else rows.fit(recipe)


class _Watch:
    """Looks up from the work now and then."""

    def __init__(self, should_stop: Callable[[], bool], on_progress: Callable[[int], None], *, what: str) -> None:
        self._should_stop = should_stop
        self._on_progress = on_progress
        self._what = what
        self._done = 0
        self._keep: Callable[[], None] | None = None
        self._keep_every_s = 0.0
        self._keep_due = 0.0
        self.due = 0.0

    def keep_every(self, seconds: float, keep: Callable[[], None]) -> None:
        """Have something kept that often."""
        self._keep, self._keep_every_s = keep, seconds
        self._keep_due = time.monotonic() + seconds

    def add(self, records: int) -> None:
        """Count records; look up if it is time to."""
        self._done += records
        if time.monotonic() >= self.due:
            self.look()
            if self._keep is not None and time.monotonic() >= self._keep_due:
                self._keep()
                self._keep_due = time.monotonic() + self._keep_every_s

    def look(self) -> None:
        """Stop if asked to, and report."""
        if self._should_stop():
            raise Stopped(f"{self._what} was stopped while it trained")
        if self._done:
            self._on_progress(self._done)
            self._done = 0
        self.due = time.monotonic() + LOOK_UP_S


class _Run:
    """Everything that a stage holds while it trains."""

    def __init__(
        self,
        recipe: Recipe,
        *,
        class_count: int,
        shard: int,
        parent: StageState,
        columns: Rows,
        group: Exchange | None,
    ) -> None:
        device = device_of(recipe)
        self._recipe, self._class_count = recipe, class_count
        if parent.empty:
            self._seed = derived_seed("sisa-init", recipe.training.seed, shard)
            self._preprocessor = _fitted(recipe, columns)
        else:
            self._seed = init_seed(parent)
            self._preprocessor = Preprocessor.from_state(recipe, parent)
        shape = self._preprocessor.feature_shape
        seed_everything(self._seed)
        self._module = build_model(recipe, shape, class_count)
        if not parent.empty:
            restore_module(self._module, parent)
        self._module.to(device)
        self._optimizer: Optimizer = build_optimizer(recipe, trainable(self._module))
        self._schedule: Schedule = build_schedule(recipe, self._optimizer)
        if not parent.empty:
            self._schedule.restore(parent)
            self._optimizer.restore(parent)  # after the schedule, which sets a learning rate when it is built
        self._feed: Feed = feed_of(columns, self._preprocessor, recipe=recipe, device=device)
        self._gradients: Gradients = build_gradients(recipe, self._module, self._feed.resident)
        if group is not None:
            require_shareable(self._module)
            self._gradients = SharedGradients(self._gradients, list(trainable(self._module).values()), group)
        self._sizes = batch_sizes(records=columns.count, batch_size=recipe.training.batch_size)
        self._epoch, self._batch = 0, 0

    @property
    def batches(self) -> int:
        """Batches of an epoch."""
        return len(self._sizes)

    @property
    def step(self) -> int:
        """Steps of this stage that lie behind."""
        return self._epoch * self.batches + self._batch

    def begin(self, epoch: int, amid: StageState | None) -> None:
        """Stand at the beginning of an epoch, or where a kept state stands in it; every generator is seeded by now."""
        self._epoch, self._batch = epoch, position(amid)[1]
        if amid is not None:
            restore_generators(amid)

    def epoch(self, order_N: Array, watch: _Watch) -> None:
        """Train one pass over the records in the given order, without the batches that lie behind."""
        self._module.train()
        self._schedule.begin_epoch()
        gradients, optimizer = self._gradients, self._optimizer
        with contextlib.closing(self._feed.epoch(order_N, self._sizes, first=self._batch)) as batches:
            for rows_B, labels_B in batches:
                optimizer.step(gradients(rows_B, labels_B))
                self._batch += 1
                watch.add(len(rows_B))
        self._schedule.end_epoch()

    def check(self, *, shard: int, stage: int) -> None:
        """Refuse a model that has left the finite numbers."""
        loss = self._gradients.loss()
        finite = all(bool(parameter.isfinite().all()) for parameter in self._module.parameters())
        if not (np.isfinite(loss) and finite):
            raise TrainingError(
                f"shard {shard}, stage {stage}: the loss is not a finite number any more (the last was {loss})",
                hint="Lower training.optimizer.lr, in a new store.",
            )

    def dump(self) -> StageState:
        """Return the full state."""
        parts = [self._preprocessor.to_state(), self._optimizer.dump(), self._schedule.dump()]
        tensors = dump_module(self._module)
        scalars: dict[str, JSON] = {INIT_SEED: f"{self._seed:016x}"}
        for part in parts:
            tensors |= part.tensors
            scalars |= part.scalars
        return StageState(tensors, scalars)

    def is_all_in_the_state(self) -> bool:
        """Say whether a fresh model with this state would go on as this one does.

        A user's module may count, or remember, in attributes that are no buffers. A stage begins with a fresh module,
        so that is the same on every run; going on in the middle with one would not be.
        """
        if self._recipe.model.factory is None:
            return True
        generators = dump_generators()
        seed_everything(self._seed)
        fresh = build_model(self._recipe, self._preprocessor.feature_shape, self._class_count)
        fresh.train(self._module.training)
        restore_generators(generators)
        return alike(fresh, self._module)

    def dump_amid(self) -> StageState:
        """Return the full state in the middle of the stage: where it is and where the generators stand besides."""
        state, generators = self.dump(), dump_generators()
        scalars = state.scalars | generators.scalars | {EPOCH: self._epoch, BATCH: self._batch}
        return StageState(state.tensors | generators.tensors, scalars)
