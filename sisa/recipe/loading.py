"""Recipes in and out of YAML, with every problem of a file in one message."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from sisa.errors import RecipeError, UserError
from sisa.recipe import schema
from sisa.recipe.schema import Recipe
from sisa.recipe.wording import number_hint
from sisa.recipe.workers import WorkersSpec

SECTIONS: dict[tuple[str, ...], type[BaseModel]] = {
    (): schema.Recipe,
    ("data",): schema.DataSpec,
    ("data", "holdout"): schema.HoldoutSpec,
    ("data", "image"): schema.ImageSpec,
    ("model",): schema.ModelSpec,
    ("training",): schema.TrainingSpec,
    ("training", "optimizer"): schema.OptimizerSpec,
    ("training", "schedule"): schema.ScheduleSpec,
    ("sisa",): schema.SisaSpec,
    ("routing",): schema.RoutingSpec,
    ("workers",): WorkersSpec,
}


KINDS = {
    "model_type": "a mapping of fields",
    "dict_type": "a mapping of fields",
    "int_type": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "string_type": "a text",
    "bool_type": "true or false",
    "list_type": "a list",
}
"""What pydantic's error types ask for."""

MOST_PASSES = 8
STAND_INS: dict[tuple[str, ...], object] = {
    ("data",): {"source": "-", "record_id": "-", "label": "--", "features": "*"},
    ("data", "source"): "-",
    ("data", "record_id"): "-",
    ("data", "label"): "--",
    ("data", "features"): "*",
    ("model",): {"name": "logistic"},
    ("training",): {"epochs": 10**6, "batch_size": 1, "optimizer": {"name": "sgd", "lr": 1.0}},
    ("training", "epochs"): 10**6,
    ("training", "batch_size"): 1,
    ("training", "optimizer"): {"name": "sgd", "lr": 1.0},
    ("training", "optimizer", "name"): "sgd",
    ("training", "optimizer", "lr"): 1.0,
    ("sisa",): {"shards": 1, "slices": 1},
    ("sisa", "shards"): 1,
    ("sisa", "slices"): 1,
}
"""Valid values that take the place of wrong ones, so that the checks which span fields can run too and
one message lists everything. They are never used for anything else."""


class _UniqueKeyLoader(yaml.SafeLoader):
    """A safe loader that refuses a key given twice, of which YAML would silently keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            key = str(key_node.value)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"field {key!r} is given twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


def load_recipe(path: str | Path, *, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe from a YAML file and apply ``a.b=value`` overrides to it.

    Raises:
        RecipeError: Fields are wrong; all of them are listed.
        UserError: The file can't be read, or isn't YAML.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not a text file"
        raise UserError(
            f"config {str(path)!r} can't be read: {reason}", hint="Give the path of a YAML file."
        ) from error
    return read_recipe(text, overrides=overrides, source=str(path))


def read_recipe(text: str, *, overrides: Sequence[str] = (), source: str) -> Recipe:
    """Read a recipe from YAML.

    Raises:
        RecipeError: Fields are wrong; all of them are listed.
        UserError: It isn't YAML.
    """
    try:
        content = yaml.load(text, Loader=_UniqueKeyLoader)  # noqa: S506 - a SafeLoader
    except yaml.YAMLError as error:
        raise UserError(f"config {source!r} is not valid YAML: {_yaml_reason(error)}") from error
    return parse_recipe(content, overrides=overrides, source=source)


def parse_recipe(content: object, *, overrides: Sequence[str] = (), source: str = "the recipe") -> Recipe:
    """Check plain data (nested dicts, as YAML gives them) and make a recipe of it.

    Raises:
        RecipeError: Fields are wrong; all of them are listed with their path.
    """
    if not isinstance(content, dict):
        raise RecipeError(
            [f"expected a mapping with data, model, training and sisa; got {_kind(content)}"], source=source
        )
    merged = _with_overrides(content, overrides)
    problems: dict[str, None] = {}
    for _ in range(MOST_PASSES):
        try:
            recipe = Recipe.model_validate(merged)
        except ValidationError as error:
            problems.update(dict.fromkeys(_problems(error)))
            merged = _mended(merged, error)
        else:
            break
    if problems:
        raise RecipeError(sorted(problems), source=source)
    return recipe


def dump_recipe(recipe: Recipe) -> str:
    """Write a recipe as YAML that :func:`load_recipe` reads back to an equal one."""
    content = recipe.model_dump(mode="json", exclude_none=True)
    if recipe.workers.snapshot_every_s is None:
        content["workers"]["snapshot_every_s"] = None  # it means something: left out it would be the default
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True)


def _with_overrides(content: dict[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    merged = dict(content)
    for override in overrides:
        dotted, equals, text = override.partition("=")
        if not equals or not dotted:
            raise UserError(f"--set {override!r}: expected a.b=value", hint="For example --set training.epochs=10.")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise UserError(
                f"--set {override!r}: the value is not valid YAML",
                hint="Quote texts with signs in them, inside the shell's quotes: --set 'data.features=\"*\"'.",
            ) from error
        *folders, name = dotted.split(".")
        place = merged
        for folder in folders:
            child = place.get(folder)
            place[folder] = dict(child) if isinstance(child, dict) else {}
            place = place[folder]
        place[name] = value
    return merged


def _problems(error: ValidationError) -> list[str]:
    problems: list[str] = []
    expected: dict[tuple[str, str], list[str]] = {}
    for item in error.errors():
        location = [str(part) for part in item["loc"] if part not in {"bool", "int", "str", "list[str]"}]
        location = [part for part in location if not part.startswith(("list[", "literal[", "constrained"))]
        path = ".".join(location)
        if item["type"] == "extra_forbidden":
            problems.append(f"{path}: no such field{_nearest(location)}")
        elif item["type"] == "missing":
            problems.append(f"{path}: missing; it has no default")
        elif item["type"] == "value_error":
            problems += [_placed(path, part) for part in item["msg"].removeprefix("Value error, ").split("\n")]
        elif item["type"] != "literal_error" or not isinstance(item["input"], list):
            # (A list whose entries are wrong needn't be told that "*" would do as well.)
            # What may be one of several kinds has an error for each: they become one.
            expected.setdefault((path, _shown(item)), []).append(_expected(item))
    problems += [f"{path}: {_either(wanted)}, got {got}" for (path, got), wanted in expected.items()]
    return problems


def _placed(path: str, reason: str) -> str:
    """Join the path of a section and a reason that begins with a field of it."""
    field, colon, _ = reason.partition(": ")
    if path and colon and all(part.isidentifier() for part in field.split(".")):
        return f"{path}.{reason}"
    return f"{path}: {reason}" if path else reason


def _expected(item: ErrorDetails) -> str:
    """Say what would have been right, without the checker's own words."""
    limits = item.get("ctx", {})
    kind = item["type"]
    if kind in KINDS:
        return f"expected {KINDS[kind]}"
    if kind == "literal_error":
        return f"expected {limits['expected']}"
    if kind == "too_short":
        return f"expected at least {limits['min_length']} entries"
    for limit, words in (("ge", "at least"), ("gt", "more than"), ("le", "at most"), ("lt", "less than")):
        if limit in limits:
            return f"expected {words} {limits[limit]}"
    return f"{item['msg'][:1].lower()}{item['msg'][1:]}"


def _either(wanted: list[str]) -> str:
    return " or ".join([wanted[0], *(text.removeprefix("expected ") for text in wanted[1:])])


def _mended(content: dict[str, Any], error: ValidationError) -> dict[str, Any]:
    """Return ``content`` with every field that ``error`` names removed or replaced by a stand-in."""
    mended: dict[str, Any] = copy.deepcopy(content)
    for item in error.errors():
        place: Any = mended
        path: list[str] = []
        for part in item["loc"]:
            if not isinstance(place, dict) or part not in place:
                break
            path.append(str(part))
            parent, place = place, place[part]
        if item["type"] == "missing":
            path.append(str(item["loc"][-1]))
            parent = place
        if not path or (item["type"] == "extra_forbidden" and len(path) < len(item["loc"])):
            continue  # nothing to mend, or its section has been replaced by now
        if path == ["model", "name"]:
            path, parent = path[:1], mended  # what other fields may be depends on the name
        stand_in = STAND_INS.get(tuple(path))
        if stand_in is None or item["type"] == "extra_forbidden":
            parent.pop(path[-1], None)
        else:
            parent[path[-1]] = copy.deepcopy(stand_in)
    return mended


def _nearest(location: list[str]) -> str:
    section = SECTIONS.get(tuple(location[:-1]))
    if section is None and tuple(location[:2]) == ("data", "columns"):
        section = schema.ColumnSpec
    if section is None:
        return ""
    names = list(section.model_fields)
    near = difflib.get_close_matches(location[-1], names, n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else f"; expected one of {', '.join(names)}"


def _kind(value: object) -> str:
    return {type(None): "nothing", list: "a list", str: "a text"}.get(type(value), f"a {type(value).__name__}")


def _shown(item: ErrorDetails) -> str:
    value = item["input"]
    if item["type"] == "too_short":
        return str(item.get("ctx", {})["actual_length"])
    if isinstance(value, dict | list):
        return "a list" if isinstance(value, list) else "a mapping"
    if isinstance(value, bool):
        return str(value).lower()
    if value is None:
        return "nothing"
    if isinstance(value, str) and item["type"] == "float_type":
        return f"the text {value!r}{number_hint(value)}"
    return repr(value) if isinstance(value, str | int | float) else f"{value} (a {type(value).__name__})"


def _yaml_reason(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    where = f" (line {mark.line + 1}, column {mark.column + 1})" if mark is not None else ""
    return f"{getattr(error, 'problem', None) or 'it can not be parsed'}{where}"
