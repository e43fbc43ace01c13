"""How a constituent answers: in evaluation mode, under the flags it was trained with, without a gradient.

A constituent is built from a state alone. It reads its scalers, vocabularies and statistics from there and changes
none of them, so answers depend on the state and the rows they are asked about. The last bits of a row's scores may
depend on the rows beside it (matrix products are cut by size); batches are cut from the top.

Shape suffixes: N rows, B batch, C classes.
"""

from __future__ import annotations

import traceback
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from sisa.errors import UserError
from sisa.learners.columns import Array, Columns
from sisa.learners.flags import FLAGS, device_of, seed_everything, training_flags
from sisa.learners.models import build_model
from sisa.learners.modules import init_seed, restore_module
from sisa.learners.preprocess import Preprocessor
from sisa.learners.resident import Resident
from sisa.learners.stacked_rows import same_rows
from sisa.recipe import Recipe
from sisa.state import StageState

BATCH_SIZE = 1024


class Constituent:
    """The model of one shard, ready to answer."""

    def __init__(
        self, recipe: Recipe, preprocessor: Preprocessor, module: torch.nn.Module, *, seed: int, class_count: int
    ) -> None:
        self._recipe = recipe
        self.preprocessor = preprocessor
        self.module = module
        self._seed = seed
        self.class_count = class_count

    @classmethod
    def from_state(cls, recipe: Recipe, class_count: int, state: StageState) -> Constituent:
        """Build the model of a stage.

        Raises:
            ValueError: The state is that of a shard without records, or of another model.
            UserError: The model can't be built here.
        """
        if state.empty:
            raise ValueError("a shard without records has no model")
        with FLAGS, training_flags(recipe):
            preprocessor, seed = Preprocessor.from_state(recipe, state), init_seed(state)
            seed_everything(seed)
            module = build_model(recipe, preprocessor.feature_shape, class_count)
            restore_module(module, state)
            module.to(device_of(recipe)).eval()
        return cls(recipe, preprocessor, module, seed=seed, class_count=class_count)

    def posteriors(self, columns: Columns, *, batch_size: int = BATCH_SIZE) -> Array:
        """Return the probability of each class for each row: scores (N, C), float64."""
        with FLAGS, training_flags(self._recipe), torch.no_grad():
            return self._answer(columns, batch_size=batch_size)

    def _answer(self, columns: Columns, *, batch_size: int) -> Array:
        seed_everything(self._seed)
        device = device_of(self._recipe)
        scores: list[Array] = []
        for start in range(0, columns.count, batch_size):
            rows = columns.rows(slice(start, start + batch_size))
            resident = Resident.of(rows, self.preprocessor, recipe=self._recipe, device=device)
            try:
                logits_BC = self.module(resident.all())
            except Exception as error:
                raise model_failed(error) from error
            scores.append(torch.softmax(logits_BC.double(), 1).cpu().numpy())
        return np.concatenate(scores) if scores else np.zeros((0, self.class_count))


def one_by_one(recipe: Recipe, constituents: Sequence[Constituent], columns: Columns) -> Array:
    """Return the posteriors (S, N, C) of several constituents, each with the bits of its own ``posteriors``.

    What doesn't depend on the constituent is done once: the flags are set, numbers are laid out row by row, and rows
    are preprocessed where the next constituent sees the same. (A user's module may change the rows that it is given,
    and may draw random numbers: it gets rows and seeds of its own.)
    """
    with FLAGS, training_flags(recipe), torch.no_grad():
        if recipe.model.factory is None and constituents:
            return _built_in(recipe, constituents, columns)
        columns = _row_by_row(columns)
        return np.stack([constituent._answer(columns, batch_size=BATCH_SIZE) for constituent in constituents])


def model_failed(error: Exception) -> UserError:
    """Return what a user's model raised, as a message without values, which may be somebody's."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return UserError(
        f"the model fails on these rows: {type(error).__name__} at {Path(frame.filename).name}:{frame.lineno}",
        hint="Check the rows against what the model was trained on, and the source of model.factory.",
    )


def _built_in(recipe: Recipe, constituents: Sequence[Constituent], columns: Columns) -> Array:
    device = device_of(recipe)
    scores_SNC = np.empty((len(constituents), columns.count, constituents[0].class_count))
    for start in range(0, columns.count, BATCH_SIZE):
        which = slice(start, start + BATCH_SIZE)
        rows, before = _row_by_row(columns.rows(which)), constituents[0].preprocessor
        resident = Resident.of(rows, before, recipe=recipe, device=device)
        for scores_NC, constituent in zip(scores_SNC, constituents, strict=True):
            if not same_rows(before, constituent.preprocessor):
                before = constituent.preprocessor
                resident = Resident.of(rows, before, recipe=recipe, device=device)
            scores_NC[which] = torch.softmax(constituent.module(resident.all()).double(), 1).cpu().numpy()
    return scores_SNC


def _row_by_row(columns: Columns) -> Columns:
    """Lay numbers out as rows are: scaling them is what large batches spend their time on."""
    return replace(columns, numeric_NP=np.ascontiguousarray(columns.numeric_NP))


def posteriors(state: StageState, recipe: Recipe, columns: Columns, *, batch_size: int = BATCH_SIZE) -> Array:
    """Return the probabilities, (N, C) float64, that the model of ``state`` gives to each class.

    Raises:
        ValueError: The state is that of a shard without records, or of another model.
        UserError: The model can't be built here.
    """
    constituent = Constituent.from_state(recipe, len(recipe.data.classes or []), state)
    return constituent.posteriors(columns, batch_size=batch_size)
