"""Try a recipe's model on made-up rows before anything is written.

What would otherwise fail, or quietly train something else, hours into a run: a model whose output has the wrong shape,
that has nothing to train, that keeps state where we don't see it, or that isn't the same twice.
"""

from __future__ import annotations

import math
from typing import NoReturn

import numpy as np
import torch

from sisa.errors import SisaError, UserError
from sisa.learners.columns import Array, feature_specs
from sisa.learners.flags import device_of, seed_everything, training_flags
from sisa.learners.gradients import AutogradGradients, trainable
from sisa.learners.models import build_model
from sisa.learners.modules import dump_module, restore_module
from sisa.learners.optimizers import build_optimizer
from sisa.learners.preprocess import FIRST_CODE
from sisa.learners.resident import Resident
from sisa.learners.schedules import build_schedule
from sisa.learners.shared import ALONE, require_shareable
from sisa.recipe import Recipe
from sisa.state import StageState, full_digest

ROWS = 4
SEED = 20
BUFFER = "buffer."
GUESSED_VOCABULARY = 2
"""Values that a categorical feature is taken to have where the recipe doesn't say: a shard's own slice will."""


def check_model(recipe: Recipe) -> None:
    """Build the model, train it for two steps on made-up rows, and see that its state can be kept.

    Args:
        recipe: A resolved recipe.

    Raises:
        UserError: The model, optimiser or schedule can't be used; the message names the field.
    """
    shape = probe_shape(recipe)
    class_count = len(recipe.data.classes or [])
    with training_flags(recipe):
        try:
            middle, end = _train(recipe, shape, class_count, start=None, steps=(0, 1))
            _, resumed = _train(recipe, shape, class_count, start=middle, steps=(1,))
            _, again = _train(recipe, shape, class_count, start=None, steps=(0, 1))
        except SisaError:
            raise
        except Exception as error:  # noqa: BLE001 - it is the user's code: anything may come
            _refuse(recipe, f"a step of training failed with {type(error).__name__}: {error}")
    if recipe.workers.devices_per_shard > 1:
        _require_shareable(recipe, middle, end)
    if full_digest(end) != full_digest(again):
        _refuse(
            recipe,
            "two trainings from one seed gave different weights",
            hint="Draw random numbers from torch's, numpy's or Python's global generators only: they are seeded.",
        )
    if full_digest(end) != full_digest(resumed):
        _refuse(
            recipe,
            "training on from a stored state differs from training straight through",
            hint="Keep what changes during training in parameters or in buffers (register_buffer).",
        )


def _require_shareable(recipe: Recipe, middle: StageState, end: StageState) -> None:
    """Refuse a model of which each process would have its own."""
    seed_everything(SEED)
    require_shareable(build_model(recipe, probe_shape(recipe), len(recipe.data.classes or [])))
    for name in sorted(name for name in end.tensors if name.startswith(BUFFER)):
        if not np.array_equal(middle.tensors[name], end.tensors[name]):
            _refuse(
                recipe,
                f"its buffer {name.removeprefix(BUFFER)!r} changes while it trains, and each of the "
                "workers.devices_per_shard processes would have its own; that is not supported yet",
                hint=ALONE,
            )


def probe_shape(recipe: Recipe) -> tuple[int, ...]:
    """Return a feature shape like those that the recipe's shards will have."""
    image = recipe.data.image
    if image is not None:
        return (image.channels, image.height, image.width)
    width = 0
    for _, spec in feature_specs(recipe):
        values = GUESSED_VOCABULARY if spec.values is None else len(spec.values)
        width += FIRST_CODE + values if spec.type == "categorical" else spec.size or 1
    return (width,)


def _train(
    recipe: Recipe, shape: tuple[int, ...], class_count: int, *, start: StageState | None, steps: tuple[int, ...]
) -> tuple[StageState, StageState]:
    """Return the states after the first and after the last of ``steps``."""
    seed_everything(SEED)
    module = build_model(recipe, shape, class_count)
    named = trainable(module)
    if not named:
        _refuse(recipe, "it has no parameters to train")
    if start is not None:
        restore_module(module, start)
    device = device_of(recipe)
    module.to(device)
    optimizer = build_optimizer(recipe, named)
    schedule = build_schedule(recipe, optimizer)
    if start is not None:
        schedule.restore(start)
        optimizer.restore(start)
    rows_BD = torch.rand((ROWS, math.prod(shape)), generator=torch.Generator().manual_seed(SEED))
    resident = Resident.place(rows_BD, recipe=recipe, feature_shape=shape, device=device)
    labels_B = torch.arange(ROWS, device=device) % class_count
    states: list[StageState] = []
    for step in steps:
        seed_everything(SEED + 1 + step)
        module.train()
        _check_scores(recipe, module(resident.all()), class_count)
        seed_everything(SEED + 1 + step)
        schedule.begin_epoch()
        optimizer.step(AutogradGradients(module, resident)(torch.arange(ROWS, device=device), labels_B))
        schedule.end_epoch()
        states.append(_copied(dump_module(module), optimizer.dump(), schedule.dump()))
    return states[0], states[-1]


def _copied(tensors: dict[str, Array], *parts: StageState) -> StageState:
    state = StageState(dict(tensors))
    for part in parts:
        state.tensors.update(part.tensors)
        state.scalars.update(part.scalars)
    return StageState({name: array.copy() for name, array in state.tensors.items()}, state.scalars)


def _check_scores(recipe: Recipe, scores: object, class_count: int) -> None:
    if not isinstance(scores, torch.Tensor):
        _refuse(recipe, f"it returned {type(scores).__name__}, expected a tensor of shape (batch, {class_count})")
    if tuple(scores.shape) != (ROWS, class_count):
        _refuse(
            recipe, f"it returned scores of shape {tuple(scores.shape)} for {ROWS} rows, expected {(ROWS, class_count)}"
        )
    if not scores.is_floating_point():
        _refuse(recipe, f"it returned scores of type {scores.dtype}, expected floating point")


def _refuse(recipe: Recipe, reason: str, *, hint: str = "") -> NoReturn:
    field = "model.factory" if recipe.model.factory is not None else "model.name"
    raise UserError(f"{field}: {recipe.model.factory or recipe.model.name}: {reason}", hint=hint)
