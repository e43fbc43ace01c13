"""JSON rows become the columns that the same values become by way of an Arrow table."""

from __future__ import annotations

import json
import math
import unicodedata

import numpy as np
import pyarrow as pa
import pytest
import tables
from hypothesis import given
from hypothesis import strategies as st

from sisa.errors import UserError
from sisa.learners.columns import MISSING, Columns, columns_from_table
from sisa.recipe import Recipe, parse_recipe
from sisa.records.features import feature_table
from sisa.serving.rows import RowReader

SINGLE_MAX = float(np.finfo(np.float32).max)
KINDS = {"age": "numeric", "job": "categorical", "hours": "numeric", "grade": "categorical"}


def recipe() -> Recipe:
    columns = {**{name: {"type": kind} for name, kind in KINDS.items()}, "code": {"type": "vector", "size": 3}}
    return parse_recipe(tables.mixed_recipe(data={"source": "unused.parquet", "columns": columns}))


READER = RowReader(recipe())

texts = st.text(st.characters(codec="utf-8"), max_size=6) | st.sampled_from(
    ["caf\u00e9", "cafe\u0301", "\u212b", "\u1e9b\u0323", ""]
)
finite = st.floats(allow_nan=False, allow_infinity=False)
numbers = st.none() | finite | st.integers(-(2**53), 2**53) | st.just(-0.0) | st.booleans()
singles = st.none() | st.floats(-SINGLE_MAX, SINGLE_MAX) | st.integers(-(2**24), 2**24) | st.just(-0.0)
vectors = st.none() | st.lists(singles, min_size=3, max_size=3)
rows_of_any = st.lists(
    st.fixed_dictionaries(
        {"age": numbers, "hours": numbers, "job": st.none() | texts, "grade": st.none() | texts, "code": vectors}
    ),
    max_size=8,
)
# A column of a table has one type; a JSON column of that type has to come out alike.
whole = st.lists(st.none() | st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=8)
truths = st.lists(st.none() | st.booleans(), min_size=1, max_size=8)


def by_table(rows: list[dict[str, object]], **types: pa.DataType) -> Columns:
    """The same by way of Arrow. Numbers become float64 first, in Python, since a column of a table has one type."""
    kinds = {"age": pa.float64(), "hours": pa.float64(), "job": pa.string(), "grade": pa.string(), "code": pa.list_(pa.float64(), 3)} | types  # fmt: skip

    def plain(name: str, value: object) -> object:
        if value is None or name in types or KINDS.get(name) == "categorical":
            return value
        return [None if v is None else float(v) for v in value] if isinstance(value, list) else float(value)

    table = pa.table({name: pa.array([plain(name, row[name]) for row in rows], kind) for name, kind in kinds.items()})
    return columns_from_table(feature_table(table, recipe()), recipe())


def decoded(columns: Columns) -> list[list[str | None]]:
    return [[None if code == MISSING else c.values[code] for code in c.codes_N] for c in columns.categories]


def bits(values: np.ndarray) -> bytes:
    """The values' bits, every NaN alike."""
    return np.where(np.isnan(values), values.dtype.type(np.nan), values).astype(values.dtype).tobytes()


def assert_alike(one: Columns, other: Columns) -> None:
    assert one.numeric_NP.shape == other.numeric_NP.shape
    assert one.numeric_NP.dtype == other.numeric_NP.dtype
    assert bits(np.ascontiguousarray(one.numeric_NP)) == bits(np.ascontiguousarray(other.numeric_NP))
    assert decoded(one) == decoded(other)
    for mine, theirs in zip(one.vectors, other.vectors, strict=True):
        assert (mine.shape, mine.dtype) == (theirs.shape, theirs.dtype)
        assert bits(mine) == bits(theirs)
    for name in ("labels_N", "uids_N", "slices_N"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))


@given(rows_of_any)
def test_rows_become_the_columns_of_their_table(rows: list[dict[str, object]]) -> None:
    assert_alike(READER.read(rows), by_table(rows))


@given(rows_of_any)
def test_rows_survive_the_way_through_json(rows: list[dict[str, object]]) -> None:
    assert_alike(READER.read(json.loads(json.dumps(rows))), by_table(rows))


@given(whole)
def test_integers_of_a_category_have_their_text_form(values: list[int | None]) -> None:
    rows = [{"age": None, "hours": None, "job": None, "code": None, "grade": value} for value in values]
    assert_alike(READER.read(rows), by_table(rows, grade=pa.int64()))


@given(truths)
def test_booleans_of_a_category_have_their_text_form(values: list[bool | None]) -> None:
    rows = [{"age": None, "hours": None, "job": None, "code": None, "grade": value} for value in values]
    assert_alike(READER.read(rows), by_table(rows, grade=pa.bool_()))


@given(whole)
def test_integers_become_the_nearest_number(values: list[int | None]) -> None:
    rows = [{"age": value, "hours": None, "job": None, "code": None, "grade": None} for value in values]
    assert_alike(READER.read(rows), by_table(rows, age=pa.int64()))


@given(texts)
def test_a_category_is_normal_text(text: str) -> None:
    columns = READER.read([{"age": 1, "hours": 2, "job": text, "code": None, "grade": None}])
    assert decoded(columns)[0] == [unicodedata.normalize("NFC", text)]


GOOD = {"age": 1.5, "hours": 2, "job": "baker", "code": [1, 2.5, None], "grade": 1}


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("age", "1.5", "rows[1].age: expected a number, got a text"),
        ("age", [1], "rows[1].age: expected a number, got a list"),
        ("age", {}, "rows[1].age: expected a number, got an object"),
        ("age", math.nan, "rows[1].age: expected a finite number"),
        ("age", -math.inf, "rows[1].age: expected a finite number"),
        ("age", 10**400, "rows[1].age: "),
        ("job", 1.5, "rows[1].job: expected a text, got a number"),
        ("job", ["a"], "rows[1].job: expected a text, got a list"),
        ("job", "\ud800", "rows[1].job: the text is not valid Unicode"),
        ("code", [1, 2], "rows[1].code: expected a list of 3 numbers, got a list of 2"),
        ("code", 7, "rows[1].code: expected a list of 3 numbers, got a number"),
        ("code", True, "rows[1].code: expected a list of 3 numbers, got true or false"),
        ("code", [1, 2, "3"], "rows[1].code: expected a number, got a text"),
        ("code", [1, 2, 1e39], "rows[1].code: expected a number that single precision can hold"),
        ("code", [1, [2], 3], "rows[1].code: expected a number, got a list"),
    ],
)
def test_a_value_of_another_kind_is_refused_by_its_place(field: str, value: object, expected: str) -> None:
    with pytest.raises(UserError) as caught:
        READER.read([GOOD, {**GOOD, field: value}])
    assert caught.value.message.startswith(expected)
    assert caught.value.hint


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (7, "rows[1]: expected an object with a value for each feature, got a number"),
        (None, "rows[1]: expected an object with a value for each feature, got null"),
        ([], "rows[1]: expected an object with a value for each feature, got a list"),
        ({}, "rows[1] has no column 'age'"),
        ({**GOOD, "salary": 1}, "rows[1]: 'salary' is no feature of this model"),
        (
            {**{k: v for k, v in GOOD.items() if k != "hours"}, "hour": 1},
            "rows[1] has no column 'hours' (did you mean 'hour'?)",
        ),
    ],
)
def test_a_row_of_another_shape_is_refused_by_its_place(row: object, expected: str) -> None:
    with pytest.raises(UserError) as caught:
        READER.read([GOOD, row])
    assert caught.value.message.startswith(expected)
    assert caught.value.hint
