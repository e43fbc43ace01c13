"""Holding a recipe against a table's schema, before anything is read or written.

The result is the recipe with its features listed and each column's kind and size spelled out: what a store
keeps, and what its digest is taken over. Types come from the schema or the recipe, never from values: the
only record with a decimal point may ask to be deleted. Every problem is found before any is reported.
"""

from __future__ import annotations

import json
import unicodedata

import pyarrow as pa
import pyarrow.compute as pc

from sisa.errors import RecipeError
from sisa.recipe import ColumnSpec, Recipe
from sisa.recipe.schema import RESERVED_PREFIX
from sisa.recipe.wording import NAMED, some_of
from sisa.records.encode import label_texts, nearest
from sisa.records.kinds import Kind, default_kind, is_number, kind_problem, label_problem, plain_type
from sisa.records.source import Source
from sisa.routing.ids import id_type_problem

MOST_CLASSES = 1000
"""More distinct labels than this are no classes; the line to paste isn't offered."""
GUESSED_ROWS = 1000


def resolve(recipe: Recipe, source: Source) -> Recipe:
    """Return the recipe with its features listed and every column's kind and size spelled out.

    Args:
        recipe: As the user wrote it.
        source: The table. Only its schema counts; rows are read to suggest lines that are missing.

    Raises:
        RecipeError: The recipe and the table don't fit; every problem is listed, and the hint holds the
            lines to paste where classes or column types are missing.
        SourceError: The table can't be read.
    """
    there = set(source.schema.names)
    problems = _column_problems(recipe, source.schema)
    features = _features(recipe, source.schema)
    paste: list[str] = []
    columns: dict[str, ColumnSpec] = {}
    undeclared: list[str] = []
    for name in features:
        if name not in there:
            continue
        declared = recipe.data.columns.get(name, ColumnSpec())
        if source.csv and _declared_kind(declared) is None:
            undeclared.append(name)
            continue
        problem, columns[name] = _resolved(name, declared, source)
        problems += [f"data.features: {name!r}: {problem}"] * bool(problem)
    if undeclared:
        problems.append(f"data.columns: CSV has no types; declare those of {', '.join(map(repr, undeclared))}")
    problems += _declaration_problems(recipe, features)
    problems += _image_problems(recipe, columns, features)
    if recipe.data.classes is None:
        problems.append("data.classes: missing; classes are declared, never inferred from the table")
        if recipe.data.label in there and not label_problem(source.schema.field(recipe.data.label).type):
            paste += _classes_line(source, recipe.data.label)
    paste += _types_lines(source, undeclared)
    if problems:
        hint = "\n".join(["Under data, add:", *(f"  {line}" for line in paste)]) if paste else ""
        raise RecipeError(problems, source=f"the recipe for the table {source.uri!r}", hint=hint)
    return recipe.resolved(columns)


def check_fits(recipe: Recipe, source: Source) -> None:
    """Make sure that another table (a second source for the holdout) has the columns of a resolved recipe.

    Raises:
        RecipeError: It hasn't; every problem is listed.
    """
    there = set(source.schema.names)
    problems = _column_problems(recipe, source.schema)
    for name, spec in recipe.data.columns.items():
        if name in there:
            problem = kind_problem(source.schema.field(name).type, spec.type, csv=source.csv)
            size = _list_size(source.schema.field(name).type)
            if not problem and spec.type == "vector" and size != spec.size:
                problem = f"a list of {size} numbers, expected {spec.size}"
            problems += [f"data.features: {name!r}: {problem}"] * bool(problem)
    if problems:
        raise RecipeError(problems, source=f"the recipe for the table {source.uri!r}")


def undeclared_text(written: Recipe, resolved: Recipe) -> list[str]:
    """Name the features that count as categories only because they are text: they may be free text.

    Args:
        written: The recipe as the user wrote it.
        resolved: The same, resolved.
    """
    return [
        name
        for name, spec in resolved.data.columns.items()
        if spec.type == "categorical" and _declared_kind(written.data.columns.get(name, ColumnSpec())) is None
    ]


def _declared_kind(spec: ColumnSpec) -> Kind | None:
    if spec.type is None and spec.values is not None:
        return "categorical"
    return spec.type


def _features(recipe: Recipe, schema: pa.Schema) -> list[str]:
    data = recipe.data
    if data.features != "*":
        return list(data.features)
    return sorted(set(schema.names) - {data.record_id, data.subject_column, data.label})


def _column_problems(recipe: Recipe, schema: pa.Schema) -> list[str]:
    """Problems of columns that are missing, and of ids and label."""
    data = recipe.data
    there = set(schema.names)
    wanted = [("record_id", data.record_id)]
    if data.subject_column != data.record_id:
        wanted.append(("subject_id", data.subject_column))
    wanted.append(("label", data.label))
    problems = []
    for field, name in wanted:
        if name not in there:
            problems.append(f"data.{field}: the table has no column {name!r}{_suggestion(name, schema)}")
            continue
        type_ = schema.field(name).type
        problem = label_problem(type_) if field == "label" else id_type_problem(type_)
        problems += [f"data.{field}: {name!r}: {problem}"] * bool(problem)
    features = _features(recipe, schema)
    missing = [name for name in features if name not in there]
    # A search for near names takes a moment, and the wrong table may lack thousands of columns.
    suggestions = [_suggestion(name, schema) for name in missing[:NAMED]] + [""] * len(missing[NAMED:])
    problems += [
        f"data.features: the table has no column {name!r}{suggestion}"
        for name, suggestion in zip(missing, suggestions, strict=True)
    ]
    if not features:
        problems.append("data.features: the table has no column besides ids and label")
    return problems


def _suggestion(name: str, schema: pa.Schema) -> str:
    return nearest(name, schema.names) or f"; it has {some_of(schema.names)}"


def _declaration_problems(recipe: Recipe, features: list[str]) -> list[str]:
    known = set(features)
    problems = [
        f"data.columns.{name}: no such feature; expected one of {some_of(features)}"
        for name in recipe.data.columns
        if name not in known
    ]
    problems += [
        f"data.features: {name!r}: names starting with {RESERVED_PREFIX!r} are reserved"
        for name in features
        if name.startswith(RESERVED_PREFIX)
    ]
    return problems


def _resolved(name: str, declared: ColumnSpec, source: Source) -> tuple[str, ColumnSpec]:
    """Return what is wrong with a declaration (or nothing), and the column's full description."""
    type_ = source.schema.field(name).type
    kind = _declared_kind(declared)
    problem = kind_problem(type_, kind, csv=source.csv)
    kind = kind or default_kind(type_)
    size = _list_size(type_)
    if not problem and declared.size not in {None, size}:
        problem = f"declared as a vector of {declared.size} numbers, the table has {size or 'no list'}"
    if not problem and declared.mean is not None and kind == "categorical":
        problem = "mean and std are for numbers; this column is text"
    values = None if declared.values is None else [unicodedata.normalize("NFC", value) for value in declared.values]
    return problem, declared.model_copy(update={"type": kind, "size": size, "values": values})


def _list_size(type_: pa.DataType) -> int | None:
    inner = plain_type(type_)
    return int(inner.list_size) if pa.types.is_fixed_size_list(inner) else None


def _image_problems(recipe: Recipe, columns: dict[str, ColumnSpec], features: list[str]) -> list[str]:
    image = recipe.data.image
    if image is None or len(columns) < len(features):
        return []
    if len(features) != 1:
        return [f"data.image: expected exactly one feature, the image; got {len(features)}"]
    name, spec = next(iter(columns.items()))
    expected = image.height * image.width * image.channels
    if spec.type != "vector":
        return [f"data.image: {name!r} is {spec.type}; an image is a fixed-size list of {expected} numbers"]
    if spec.size != expected:
        return [
            f"data.image: {image.height} x {image.width} x {image.channels} is {expected} numbers; {name!r} has {spec.size}"
        ]
    return []


def _classes_line(source: Source, label: str) -> list[str]:
    """The line of classes to paste: every label value that occurs, in order."""
    type_ = plain_type(source.schema.field(label).type)
    values: set[str] = set()
    for batch in source.batches([label]):
        values.update(pc.unique(label_texts(batch.column(0), label)).drop_null().to_pylist())
        if len(values) > MOST_CLASSES:
            return []
    if is_number(type_) and not pa.types.is_boolean(type_):
        shown = sorted(values, key=int)
    elif pa.types.is_boolean(type_):
        shown = sorted(values)
    else:
        shown = [json.dumps(value, ensure_ascii=False) for value in sorted(values)]
    return [f"classes: [{', '.join(shown)}]"]


def _types_lines(source: Source, names: list[str]) -> list[str]:
    """The lines of column types to paste, with a guess from the first rows for the user to check."""
    if not names:
        return []
    first = next(source.batches(names), None)
    lines = ["columns:"]
    for name in names:
        texts = (
            first.column(name).slice(0, GUESSED_ROWS).drop_null() if first is not None else pa.array([], pa.string())
        )
        kind = "numeric" if len(texts) and _looks_numeric(texts) else "categorical"
        lines.append(f"  {json.dumps(name, ensure_ascii=False)}: {{type: {kind}}}")
    return lines


def _looks_numeric(texts: pa.StringArray) -> bool:
    try:
        texts.cast(pa.float64())
    except pa.ArrowInvalid:
        return False
    return True
