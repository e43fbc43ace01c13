"""The frozen description of a training: what the user writes, validated all at once."""

from sisa.recipe.identity import difference, recipe_digest, training_identity
from sisa.recipe.loading import dump_recipe, load_recipe, parse_recipe, read_recipe
from sisa.recipe.schema import (
    BUILTIN_MODELS,
    AggregationSpec,
    ColumnSpec,
    DataSpec,
    HoldoutSpec,
    ImageSpec,
    ModelSpec,
    OptimizerSpec,
    Recipe,
    RoutingSpec,
    ScheduleSpec,
    SisaSpec,
    TrainingSpec,
    label_text,
)
from sisa.recipe.workers import WorkersSpec

__all__ = [
    "BUILTIN_MODELS",
    "AggregationSpec",
    "ColumnSpec",
    "DataSpec",
    "HoldoutSpec",
    "ImageSpec",
    "ModelSpec",
    "OptimizerSpec",
    "Recipe",
    "RoutingSpec",
    "ScheduleSpec",
    "SisaSpec",
    "TrainingSpec",
    "WorkersSpec",
    "difference",
    "dump_recipe",
    "label_text",
    "load_recipe",
    "parse_recipe",
    "read_recipe",
    "recipe_digest",
    "training_identity",
]
