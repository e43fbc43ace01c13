"""How the learning rate falls along a chain, epoch by epoch.

The position in a schedule is a number of epochs of this chain, kept in the state: it depends on no other shard and on
no later slice. The built-in schedules are closed formulas of it; ``cosine`` ends with the epochs that the recipe
gives a chain, and starts again for the stage of each generation that is added later: a rate that had fallen to nothing
would leave the new rows unlearned. Classes of ``torch.optim.lr_scheduler`` are stepped once per epoch.
"""

from __future__ import annotations

import importlib
import json
import math
from typing import TYPE_CHECKING, Any, Protocol, cast

from sisa.errors import UserError
from sisa.learners.optimizers import Optimizer, TorchOptimizer
from sisa.planning.epochs import epoch_budget
from sisa.recipe import Recipe, ScheduleSpec
from sisa.state import JSON, StageState

if TYPE_CHECKING:
    from torch.optim.lr_scheduler import LRScheduler

EPOCH = "schedule.epoch"
INNER = "schedule.inner"
DEFAULT_STEP_GAMMA = 0.1


class Schedule(Protocol):
    """What a training loop needs of a schedule."""

    def begin_epoch(self) -> None:
        """Set the optimiser's learning rate for the epoch that starts."""

    def end_epoch(self) -> None:
        """Move on by one epoch."""

    def dump(self) -> StageState:
        """Return the position."""

    def restore(self, state: StageState) -> None:
        """Take over the position of a stage."""


def build_schedule(recipe: Recipe, optimizer: Optimizer) -> Schedule:
    """Build the recipe's schedule; without one the learning rate stays.

    Raises:
        UserError: The class doesn't exist, its arguments are wrong, or its state can't be kept.
    """
    spec = recipe.training.schedule
    if spec is not None and spec.name.startswith("torch."):
        return TorchSchedule(spec, cast("TorchOptimizer", optimizer))
    return ClosedSchedule(
        spec,
        optimizer,
        base=recipe.training.optimizer.lr,
        epochs=recipe.training.epochs,
        slices=recipe.sisa.slices,
    )


def annealing(epoch: int, *, epochs: int, slices: int) -> tuple[int, int]:
    """Return how many epochs of the current descent are behind, and how many it has.

    The stages of the recipe's slices share one descent; the stage of each generation has one of its own.

    >>> [annealing(e, epochs=4, slices=3) for e in (0, 5, 6, 7, 8)]
    [(0, 6), (5, 6), (0, 2), (1, 2), (0, 2)]
    """
    start, end, generations = 0, sum(epoch_budget(epochs=epochs, slices=slices)), 0
    while epoch >= end:
        generations += 1
        budget = epoch_budget(epochs=epochs, slices=slices, generations=generations)
        start, end = end, end + budget[-1]
    return epoch - start, end - start


class ClosedSchedule:
    """A learning rate that is a formula of the number of epochs behind."""

    def __init__(
        self, spec: ScheduleSpec | None, optimizer: Optimizer, *, base: float, epochs: int, slices: int
    ) -> None:
        arguments = spec.arguments if spec is not None else {}
        self._name = spec.name if spec is not None else None
        self._optimizer = optimizer
        self._base = base
        self._epochs = epochs
        self._slices = slices
        self._gamma = _number(arguments, "gamma", None if self._name == "exponential" else DEFAULT_STEP_GAMMA)
        self._step_size = _number(arguments, "step_size", None if self._name == "step" else 1)
        self._eta_min = _number(arguments, "eta_min", 0.0)
        if self._step_size != int(self._step_size) or self._step_size < 1:
            raise UserError(f"training.schedule.step_size: expected a whole number of epochs, got {self._step_size}")
        self._epoch = 0

    def rate(self, epoch: int) -> float:
        """Return the learning rate after ``epoch`` epochs."""
        if self._name == "step":
            return self._base * self._gamma ** (epoch // int(self._step_size))
        if self._name == "exponential":
            return self._base * self._gamma**epoch
        if self._name == "cosine":
            position, length = annealing(epoch, epochs=self._epochs, slices=self._slices)
            share = (1 + math.cos(math.pi * position / length)) / 2
            return self._eta_min + (self._base - self._eta_min) * share
        return self._base

    def begin_epoch(self) -> None:
        """Set the optimiser's learning rate."""
        self._optimizer.lr = self.rate(self._epoch)

    def end_epoch(self) -> None:
        """Move on by one epoch."""
        self._epoch += 1

    def dump(self) -> StageState:
        """Return the number of epochs behind."""
        return StageState({}, {EPOCH: self._epoch})

    def restore(self, state: StageState) -> None:
        """Take over the number of epochs behind."""
        self._epoch = cast("int", state.scalars[EPOCH])


class TorchSchedule:
    """A class of ``torch.optim.lr_scheduler`` behind our interface."""

    def __init__(self, spec: ScheduleSpec, optimizer: TorchOptimizer) -> None:
        self._spec = spec
        self._epoch = 0
        kind = _torch_class(spec.name)
        try:
            self._inner: LRScheduler = kind(optimizer.inner, **spec.arguments)
        except (TypeError, ValueError, RuntimeError) as error:
            raise UserError(f"training.schedule: {spec.name} refused its arguments: {error}") from error
        self._fresh = dict(self._inner.state_dict())
        self.dump()  # refuse now what couldn't be kept later

    def begin_epoch(self) -> None:
        """Nothing to do: torch's schedulers set the next epoch's rate when they are stepped."""

    def end_epoch(self) -> None:
        """Step the scheduler."""
        self._epoch += 1
        self._inner.step()

    def dump(self) -> StageState:
        """Return what changes in torch's ``state_dict``."""
        kept: dict[str, JSON] = {}
        for key, value in self._inner.state_dict().items():
            if _is_plain(value):
                kept[key] = value
            elif key not in self._fresh or not _same(value, self._fresh[key]):
                raise UserError(
                    f"training.schedule.name: {self._spec.name} keeps {key!r} as {type(value).__name__}; a state of "
                    "anything but numbers and texts is not supported yet"
                )
        return StageState({}, {EPOCH: self._epoch, INNER: kept})

    def restore(self, state: StageState) -> None:
        """Give torch's ``load_state_dict`` what :meth:`dump` took from it."""
        self._epoch = cast("int", state.scalars[EPOCH])
        self._inner.load_state_dict({**self._fresh, **cast("dict[str, Any]", state.scalars[INNER])})


def _torch_class(name: str) -> type[LRScheduler]:
    from torch.optim.lr_scheduler import LRScheduler as Base  # slow, and rarely needed

    module_name, _, class_name = name.rpartition(".")
    try:
        found = getattr(importlib.import_module(module_name), class_name)
    except (ImportError, AttributeError) as error:
        raise UserError(
            f"training.schedule.name: there is no {name}", hint="See torch.optim.lr_scheduler for what is."
        ) from error
    if not (isinstance(found, type) and issubclass(found, Base)) or found is Base:
        raise UserError(f"training.schedule.name: {name} is not a schedule that is stepped once per epoch")
    return found


def _number(arguments: dict[str, Any], name: str, default: float | None) -> float:
    value = arguments.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int | float):
        got = "nothing" if value is None else repr(value)
        raise UserError(f"training.schedule.{name}: expected a number, got {got}")
    return float(value)


def _is_plain(value: object) -> bool:
    """Whether JSON gives the value back as it was."""
    try:
        return bool(json.loads(json.dumps(value, allow_nan=False)) == value)
    except (TypeError, ValueError):
        return False


def _same(value: object, other: object) -> bool:
    try:
        return type(value) is type(other) and bool(value == other)
    except (TypeError, ValueError, RuntimeError):
        return False
