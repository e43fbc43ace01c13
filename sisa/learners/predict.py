"""How a constituent answers: in evaluation mode, under the flags it was trained with, without a gradient.

A constituent is built from a state alone. It reads its scalers, vocabularies and statistics from there and changes
none of them, so answers depend on the state and the rows they are asked about. The last bits of a row's scores may
depend on the rows beside it (matrix products are cut by size); batches are cut from the top.

Shape suffixes: N rows, B batch, C classes.
"""

from __future__ import annotations

import numpy as np
import torch

from sisa.learners.columns import Array, Columns
from sisa.learners.flags import device_of, seed_everything, training_flags
from sisa.learners.models import build_model
from sisa.learners.modules import init_seed, restore_module
from sisa.learners.preprocess import Preprocessor
from sisa.learners.resident import Resident
from sisa.recipe import Recipe
from sisa.state import StageState

BATCH_SIZE = 1024


class Constituent:
    """The model of one shard, ready to answer."""

    def __init__(
        self, recipe: Recipe, preprocessor: Preprocessor, module: torch.nn.Module, *, seed: int, class_count: int
    ) -> None:
        self._recipe = recipe
        self._preprocessor = preprocessor
        self._module = module
        self._seed = seed
        self._class_count = class_count

    @classmethod
    def from_state(cls, recipe: Recipe, class_count: int, state: StageState) -> Constituent:
        """Build the model of a stage.

        Raises:
            ValueError: The state is that of a shard without records, or of another model.
            UserError: The model can't be built here.
        """
        if state.empty:
            raise ValueError("a shard without records has no model")
        with training_flags(recipe):
            preprocessor, seed = Preprocessor.from_state(recipe, state), init_seed(state)
            seed_everything(seed)
            module = build_model(recipe, preprocessor.feature_shape, class_count)
            restore_module(module, state)
            module.to(device_of(recipe)).eval()
        return cls(recipe, preprocessor, module, seed=seed, class_count=class_count)

    def posteriors(self, columns: Columns, *, batch_size: int = BATCH_SIZE) -> Array:
        """Return the probability of each class for each row: scores (N, C), float64."""
        with training_flags(self._recipe), torch.no_grad():
            seed_everything(self._seed)
            device = device_of(self._recipe)
            scores: list[Array] = []
            for start in range(0, columns.count, batch_size):
                rows = columns.rows(slice(start, start + batch_size))
                resident = Resident.of(rows, self._preprocessor, recipe=self._recipe, device=device)
                logits_BC = self._module(resident.all())
                scores.append(torch.softmax(logits_BC.double(), 1).cpu().numpy())
        return np.concatenate(scores) if scores else np.zeros((0, self._class_count))


def posteriors(state: StageState, recipe: Recipe, columns: Columns, *, batch_size: int = BATCH_SIZE) -> Array:
    """Return the probabilities, (N, C) float64, that the model of ``state`` gives to each class.

    Raises:
        ValueError: The state is that of a shard without records, or of another model.
        UserError: The model can't be built here.
    """
    constituent = Constituent.from_state(recipe, len(recipe.data.classes or []), state)
    return constituent.posteriors(columns, batch_size=batch_size)
