"""The fields of a recipe. Frozen, no unknown fields, checked on construction.

Field names are the YAML's. A recipe as a user writes it may say ``features: "*"`` and leave column types
to the table's schema; :meth:`Recipe.resolved` gives the recipe with both spelled out, which is what a
store keeps and what its digest is taken over.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Collection
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, StrictStr, field_validator, model_validator

from sisa.planning.epochs import largest_slices
from sisa.recipe.section import Section
from sisa.recipe.wording import number_hint, repeated, some_of
from sisa.recipe.workers import WorkersSpec

BUILTIN_MODELS = ("mlp", "cnn", "logistic")
RESERVED_PREFIX = "_sisa_"
"""Column names that start like this are ours."""

Positive = Annotated[StrictInt, Field(ge=1)]
Label = StrictBool | StrictInt | StrictStr


class HoldoutSpec(Section):
    """Rows that are never trained on and measure accuracy; people's rows all the same."""

    fraction: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Share of *subjects* to hold out, chosen by keyed hash."""
    source: str | None = None
    """A second table to measure on, instead of a fraction of the first."""

    @field_validator("fraction", mode="before")
    @classmethod
    def _whole_numbers_too(cls, value: object) -> object:
        return float(value) if isinstance(value, int) and not isinstance(value, bool) else value

    @model_validator(mode="after")
    def _one_way_only(self) -> HoldoutSpec:
        if self.source is not None and self.fraction > 0:
            raise ValueError("give either fraction or source, not both")
        return self


class ImageSpec(Section):
    """Shape of the one fixed-size-list feature that is an image, stored row by row, channels last."""

    height: Positive
    width: Positive
    channels: Positive = 1


class ColumnSpec(Section):
    """What one feature column is, where the table's schema doesn't say or something else is wanted."""

    type: Literal["numeric", "categorical", "vector"] | None = None
    """How to read it; by default from the schema. CSV has no schema: there it must be given."""
    size: Positive | None = None
    """Length of a vector; taken from the schema."""
    mean: float | None = None
    """With ``std``: scale as (x - mean) / std. By default both are fitted on the shard's first
    non-empty slice and frozen for its chain. ``mean: 0, std: 1`` leaves the numbers as they are."""
    std: float | None = Field(default=None, gt=0.0)
    values: list[StrictStr] | None = None
    """Categories; by default those of the shard's first non-empty slice, frozen for its chain."""

    @field_validator("mean", "std", mode="before")
    @classmethod
    def _whole_numbers_too(cls, value: object) -> object:
        return float(value) if isinstance(value, int) and not isinstance(value, bool) else value

    @field_validator("type", mode="before")
    @classmethod
    def _not_yet(cls, value: object) -> object:
        if value in {"text", "list", "timestamp", "date", "string"}:
            raise ValueError(f"{value!r} is not supported yet; expected numeric, categorical or vector")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> ColumnSpec:
        if (self.mean is None) != (self.std is None):
            raise ValueError("mean and std go together: give both, or neither")
        if self.values is not None and (self.mean is not None or self.type in {"numeric", "vector"}):
            raise ValueError("values are for categorical columns, mean and std for numbers: not both")
        if self.mean is not None and self.type == "categorical":
            raise ValueError("mean and std are for numeric and vector columns, not for categorical ones")
        if self.values is not None and len(set(self.values)) != len(self.values):
            raise ValueError("values are listed twice")
        return self


class DataSpec(Section):
    """The table of records and what its columns are."""

    source: str
    """Path, glob or ``builtin:digits``. Parquet, CSV or Arrow IPC."""
    record_id: StrictStr
    """Column that names a row; each value occurs once."""
    subject_id: StrictStr | None = None
    """Column that names the person; by default the record itself."""
    label: StrictStr
    classes: list[Label] | None = Field(default=None, min_length=2)
    """The classes, declared. Never inferred: the only member of a class may ask to be deleted."""
    features: list[StrictStr] | Literal["*"]
    holdout: HoldoutSpec = HoldoutSpec()
    image: ImageSpec | None = None
    columns: dict[StrictStr, ColumnSpec] = Field(default_factory=dict)

    @property
    def subject_column(self) -> str:
        """The column that names the person."""
        return self.subject_id or self.record_id

    @property
    def class_names(self) -> list[str]:
        """The classes as text, in declared order."""
        return [label_text(value) for value in self.classes or []]

    @model_validator(mode="after")
    def _consistent(self) -> DataSpec:
        problems: list[str] = []
        names = self.class_names
        problems += [f"classes: {name!r} is listed twice" for name in repeated(names)]
        if self.features != "*":
            listed = list(self.features)
            if not listed:
                problems.append('features: expected at least one column, or "*"')
            problems += [f"features: {n!r} is listed twice" for n in repeated(listed)]
            for field, column in [
                ("record_id", self.record_id),
                ("subject_id", self.subject_id),
                ("label", self.label),
            ]:
                if column in listed:
                    problems.append(f"features: {column!r} is the {field}; a model must not be trained on it")
            problems += [
                f"columns.{name}: no such feature; expected one of {some_of(listed)}"
                for name in sorted(self.columns.keys() - set(listed))
            ]
            if self.image is not None and len(listed) != 1:
                problems.append(f"image: expected exactly one feature, the image; got {len(listed)}")
        if self.label in {self.record_id, self.subject_id}:
            problems.append(f"label: {self.label!r} is also an id column")
        problems += [
            f"features: {n!r}: names starting with {RESERVED_PREFIX!r} are reserved"
            for n in (self.features if self.features != "*" else [])
            if n.startswith(RESERVED_PREFIX)
        ]
        if problems:
            raise ValueError("\n".join(problems))
        return self


class ModelSpec(Section):
    """A built-in model by name, or a factory that the user brings."""

    name: Literal["mlp", "cnn", "logistic"] | None = None
    factory: str | None = None
    """``my_package.models:build``, called as ``build(feature_shape, class_count, **options)``."""
    options: dict[StrictStr, Any] = Field(default_factory=dict)
    """Keyword arguments for the factory."""
    hidden: list[Positive] | None = None
    """Widths of hidden layers (mlp: default [128]; cnn: default [64])."""
    channels: list[Positive] | None = None
    """Channels of the convolutions (cnn; default [16, 32])."""
    activation: Literal["relu", "tanh", "gelu", "silu"] | None = None
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    batch_norm: bool = False

    @field_validator("dropout", mode="before")
    @classmethod
    def _whole_numbers_too(cls, value: object) -> object:
        return float(value) if isinstance(value, int) and not isinstance(value, bool) else value

    @model_validator(mode="after")
    def _consistent(self) -> ModelSpec:
        problems: list[str] = []
        if self.name is None and self.factory is None:
            problems.append("expected either name (mlp, cnn, logistic) or factory (package.module:function)")
        if self.name is not None and self.factory is not None:
            problems.append("expected either name or factory, got both (name: null takes the name away)")
        if self.factory is not None:
            module, _, function = self.factory.partition(":")
            if not all(part.isidentifier() for part in [*module.split("."), function]):
                problems.append(f"factory: expected package.module:function, got {self.factory!r}")
        allowed: dict[str | None, set[str]] = {
            "mlp": {"hidden", "activation", "dropout", "batch_norm"},
            "cnn": {"hidden", "channels", "activation", "dropout", "batch_norm"},
            "logistic": set(),
            None: {"options"},
        }
        settings = {"hidden", "channels", "activation", "dropout", "batch_norm", "options"}
        given = {field for field in self.model_fields_set & settings if getattr(self, field)}
        unused = sorted(given - allowed[self.name])
        if unused and (self.name is None) != (self.factory is None):
            problems.append(f"{', '.join(unused)}: not a setting of {self.name or 'a factory (use options)'}")
        if problems:
            raise ValueError("\n".join(problems))
        return self


class OptimizerSpec(BaseModel):
    """``sgd``, ``adam``, ``adamw`` or a ``torch.optim`` class by dotted name; other fields are its arguments."""

    model_config = ConfigDict(frozen=True, extra="allow", strict=True, allow_inf_nan=False)

    name: StrictStr
    lr: float = Field(gt=0.0)

    @field_validator("lr", mode="before")
    @classmethod
    def _number(cls, value: object) -> object:
        if isinstance(value, str):
            raise ValueError(f"expected a number, got the text {value!r}{number_hint(value)}")
        return float(value) if isinstance(value, int) and not isinstance(value, bool) else value

    @model_validator(mode="after")
    def _known(self) -> OptimizerSpec:
        _check_arguments(self.name, self.arguments, KNOWN_OPTIMIZERS, "torch.optim.")
        _check_numbers(self.name, self.arguments, KNOWN_OPTIMIZERS)
        return self

    @property
    def arguments(self) -> dict[str, Any]:
        """Arguments besides ``lr``."""
        return dict(self.model_extra or {})


class ScheduleSpec(BaseModel):
    """How the learning rate falls, epoch by epoch along the chain; other fields are its arguments.

    ``step``, ``exponential``, ``cosine`` (over the recipe's own number of epochs), or a class of
    ``torch.optim.lr_scheduler`` by dotted name that needs no metric.
    """

    model_config = ConfigDict(frozen=True, extra="allow", strict=True, allow_inf_nan=False)

    name: StrictStr

    @model_validator(mode="after")
    def _known(self) -> ScheduleSpec:
        if self.name.endswith("ReduceLROnPlateau"):
            raise ValueError("a schedule that follows a validation metric would let held-out records steer training")
        _check_arguments(self.name, self.arguments, KNOWN_SCHEDULES, "torch.optim.lr_scheduler.")
        _check_numbers(self.name, self.arguments, KNOWN_SCHEDULES)
        return self

    @property
    def arguments(self) -> dict[str, Any]:
        """The schedule's own settings."""
        return dict(self.model_extra or {})


KNOWN_OPTIMIZERS: dict[str, frozenset[str]] = {
    "sgd": frozenset({"momentum", "dampening", "weight_decay", "nesterov"}),
    "adam": frozenset({"betas", "eps", "weight_decay", "amsgrad"}),
    "adamw": frozenset({"betas", "eps", "weight_decay", "amsgrad"}),
}
KNOWN_SCHEDULES: dict[str, frozenset[str]] = {
    "step": frozenset({"step_size", "gamma"}),
    "exponential": frozenset({"gamma"}),
    "cosine": frozenset({"eta_min"}),
}


def _check_arguments(name: str, arguments: dict[str, Any], known: dict[str, frozenset[str]], prefix: str) -> None:
    if name not in known:
        if not name.startswith(prefix):
            raise ValueError(f"name: expected one of {', '.join(known)} or {prefix}CLASS, got {name!r}")
        return
    unknown = sorted(set(arguments) - known[name])
    if unknown:
        expected = ", ".join(sorted(known[name] | ({"lr"} if prefix == "torch.optim." else set())))
        raise ValueError(f"{', '.join(unknown)}: not an argument of {name}; expected {expected}")


def _check_numbers(name: str, arguments: dict[str, Any], known: Collection[str]) -> None:
    """Refuse texts among arguments; of a class that isn't ``known``, only those that spell a number."""
    texts = [
        (key, text)
        for key, value in arguments.items()
        for text in (value if isinstance(value, list) else [value])
        if isinstance(text, str)
    ]
    problems = [
        f"{key}: expected a number, got the text {text!r}{number_hint(text)}"
        for key, text in texts
        if name in known or number_hint(text)
    ]
    if problems:
        raise ValueError("\n".join(problems))


class TrainingSpec(Section):
    """The budget and the optimiser of every constituent."""

    epochs: Positive
    """Passes over all the data that an unsliced training would make (the paper's e')."""
    batch_size: Positive
    optimizer: OptimizerSpec
    schedule: ScheduleSpec | None = None
    seed: Annotated[StrictInt, Field(ge=0, lt=2**63)] = 0
    device: Literal["cpu", "cuda"] = "cpu"
    threads: Positive = 1
    """Threads of one worker. Another number gives other bits, so it belongs to the recipe."""


PLAIN_AGGREGATIONS = ("mean", "vote", "trimmed_mean", "median")
FITTED_AGGREGATIONS = ("calibrated", "weighted")


class AggregationSpec(Section):
    """An aggregation with parameters, and the table that they are fitted on."""

    name: Literal["calibrated", "weighted"]
    table: StrictStr = Field(min_length=1)
    """Rows with the recipe's features and label that are nobody's: nobody can ask for their deletion."""


def _aggregation_problems(fields: dict[str, object]) -> list[str]:
    """Say what is wrong with an aggregation that is written out."""
    name = fields.get("name")
    known = [*PLAIN_AGGREGATIONS, *FITTED_AGGREGATIONS]
    if name not in known:
        return [f"name: expected one of {', '.join(known)}, got {'nothing' if name is None else repr(name)}"]
    problems = [
        f"{field}: no such field; expected name and table" for field in sorted(fields.keys() - {"name", "table"})
    ]
    table = fields.get("table")
    if name in PLAIN_AGGREGATIONS and table is not None:
        problems.append(f"table: {name} has no parameters that could be fitted on one")
    if name in FITTED_AGGREGATIONS and not (isinstance(table, str) and table):
        problems.append(f"table: {name} is fitted on rows that are nobody's; expected {{name: {name}, table: PATH}}")
    return problems


class SisaSpec(Section):
    """Sharding, slicing and how the constituents' posteriors become one answer."""

    shards: Annotated[StrictInt, Field(ge=1, le=9999)]
    slices: Annotated[StrictInt, Field(ge=1, le=99)]
    aggregation: Literal["mean", "vote", "trimmed_mean", "median"] | AggregationSpec = "mean"

    @field_validator("aggregation", mode="before")
    @classmethod
    def _by_name(cls, value: object) -> object:
        """Take ``{name: mean}`` for ``mean``, and say in one message what an aggregation is missing."""
        if isinstance(value, AggregationSpec):
            return value
        fields = {str(field): given for field, given in value.items()} if isinstance(value, dict) else {"name": value}
        problems = _aggregation_problems(fields)
        if problems:
            raise ValueError("\n".join(problems) if isinstance(value, dict) else problems[0].partition(": ")[2])
        return fields["name"] if fields["name"] in PLAIN_AGGREGATIONS else fields

    @property
    def aggregation_name(self) -> str:
        """The rule, whether it has parameters or not."""
        return self.aggregation if isinstance(self.aggregation, str) else self.aggregation.name


class RoutingSpec(Section):
    """Where the secret behind the routing comes from."""

    key_file: str | None = None
    """File with the key; if null one is made at STORE/keys/routing.key. A store in object storage keeps no secret: it
    needs a file, which stays where it is."""
    exclusion_key_file: str | None = None
    """File with the key behind the memory of who was deleted; if null one is made at STORE/keys/exclusion.key. Only for a
    store in object storage, which needs it."""


class Recipe(Section):
    """Everything that a training is asked to be."""

    store: str | None = None
    """Where the trained ensemble lies: a folder, or s3://BUCKET/PREFIX; no part of its identity."""
    ledger: str | None = None
    """Where the store remembers what happened: a ``postgresql://`` URL without a password; or, for a store in object
    storage, a file on a local disk, in a folder of its own. By default a file in the store, which only a folder can have.
    No part of the training's identity; kept in the store's recipe, with the name of the store's schema."""
    data: DataSpec
    model: ModelSpec
    training: TrainingSpec
    sisa: SisaSpec
    routing: RoutingSpec = RoutingSpec()
    workers: WorkersSpec = WorkersSpec()
    """What a worker gets; of it only several devices for one shard are part of the identity."""

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        problems: list[str] = []
        most = largest_slices(self.training.epochs)
        if self.sisa.slices > most:
            problems.append(
                f"sisa.slices: {self.sisa.slices} slices need more than {self.training.epochs} epochs "
                f"(2 * epochs / (slices + 1) must be at least 1); the largest number for "
                f"{self.training.epochs} epochs is {most}"
            )
        if self.model.name == "cnn" and self.data.image is None:
            problems.append("model.name: cnn needs data.image: {height: ..., width: ..., channels: ...}")
        if self.workers.devices_per_shard > 1 and self.model.batch_norm:
            problems.append("model.batch_norm: not supported yet with workers.devices_per_shard above 1")
        if self.workers.devices_per_shard > self.training.batch_size:
            problems.append(
                f"workers.devices_per_shard: {self.workers.devices_per_shard} processes can't share a batch of "
                f"{self.training.batch_size}; expected at most training.batch_size"
            )
        if problems:
            raise ValueError("\n".join(problems))
        return self

    def resolved(self, columns: dict[str, ColumnSpec]) -> Recipe:
        """Return this recipe with its features listed and every column's type and size spelled out.

        Args:
            columns: One entry per feature, in order, ``type`` set (and ``size`` of a vector).
        """
        data = self.data.model_copy(update={"features": list(columns), "columns": dict(columns)})
        return self.model_copy(update={"data": data})


def label_text(value: bool | int | str) -> str:
    """The one text form of a class label: what a label column's values are compared with."""
    if isinstance(value, bool):
        return "true" if value else "false"
    return unicodedata.normalize("NFC", str(value))
