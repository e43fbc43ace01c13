"""The canonical form: one value, one form, one digest, whatever the encoding; and what is refused."""

from __future__ import annotations

import decimal
import struct
from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.ipc as paipc
import pyarrow.parquet as papq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from records_tools import KEY, SHARDS, SLICES, memberships, people, resolved, saved, stored, written

from sisa.errors import RecipeError, SourceError
from sisa.recipe import ColumnSpec, Recipe
from sisa.records import encode
from sisa.records.digest import content_digests, id_digests
from sisa.records.encode import canonical_batch, check_columns, features_batch
from sisa.records.schema import resolve
from sisa.records.source import open_source
from sisa.routing import shard_keys

KEYS = shard_keys(KEY, 1)
COLUMNS = {"age": "numeric", "pay": "numeric", "city": "categorical"}
DECLARED = {name: {"type": kind} for name, kind in COLUMNS.items()}


def recipe_for(kind: str, size: int | None = None) -> Recipe:
    recipe = written("-", subject_id=None, features=["x"], holdout=None)
    return recipe.resolved({"x": ColumnSpec(type=kind, size=size)})  # type: ignore[arg-type]


def batch_of(array: pa.Array, labels: list[str] | None = None) -> pa.RecordBatch:
    count = len(array)
    return pa.record_batch(
        [pa.array(range(count)), array, pa.array(labels or ["no"] * count)], names=["rid", "x", "label"]
    )


def encoded(array: pa.Array, kind: str, size: int | None = None) -> pa.Array:
    return canonical_batch(batch_of(array), recipe_for(kind, size)).column("x")


def digest_of(array: pa.Array, kind: str, size: int | None = None) -> list[bytes]:
    recipe = recipe_for(kind, size)
    return [row.tobytes() for row in content_digests(KEYS, canonical_batch(batch_of(array), recipe), recipe)]


@pytest.mark.parametrize(
    "array",
    [
        pa.array([0, 1, None], pa.int8()),
        pa.array([0, 1, None], pa.uint64()),
        pa.array([0.0, 1.0, None], pa.float16()),
        pa.array([-0.0, 1.0, float("nan")], pa.float32()),
        pa.array([-0.0, 1.0, struct.unpack("<d", b"\x01\0\0\0\0\0\xf8\xff")[0]], pa.float64()),
        pa.array([False, True, None], pa.bool_()),
        pa.array([decimal.Decimal("0.00"), decimal.Decimal("1.00"), None], pa.decimal128(5, 2)),
        pa.array([0, 1, None]).dictionary_encode(),
        pa.array(["0", " 1.0 ", None]),
        pa.array(["false", "True", "nan"], pa.large_string()),
        pa.array([9.0, 0.0, 1.0, None]).slice(1),
    ],
    ids=lambda array: str(array.type),
)
def test_equal_numbers_have_equal_digests(array: pa.Array) -> None:
    values = encoded(array, "numeric")
    assert values.type == pa.float64()
    assert values.null_count == 0
    assert values.to_numpy().tobytes() == np.array([0.0, 1.0, np.nan]).tobytes()
    assert digest_of(array, "numeric") == digest_of(pa.array([0.0, 1.0, None]), "numeric")


def test_decimals_are_rounded_as_text_is() -> None:
    texts = ["0.1", "1000.00000", "12345678901234567.12345", "-7.3"]
    exact = pa.array([decimal.Decimal(text) for text in texts], pa.decimal128(30, 5))
    assert encoded(exact, "numeric").to_pylist() == [float(text) for text in texts]


@pytest.mark.parametrize(
    "array",
    [
        pa.array(["Köln", "a", None], pa.string()),
        pa.array(["Ko\u0308ln", "a", None], pa.large_string()),
        pa.array(["Köln", "a", None], pa.string_view()),
        pa.array(["Köln", "a", None]).dictionary_encode(),
        pa.DictionaryArray.from_arrays([1, 0, 2], pa.array(["a", "Ko\u0308ln", None])),
    ],
    ids=lambda array: str(array.type),
)
def test_equal_categories_have_equal_digests(array: pa.Array) -> None:
    assert encoded(array, "categorical").to_pylist() == ["Köln", "a", None]
    assert digest_of(array, "categorical") == digest_of(pa.array(["Köln", "a", None]), "categorical")


def test_whole_numbers_and_booleans_as_categories() -> None:
    assert encoded(pa.array([7, None], pa.int16()), "categorical").to_pylist() == ["7", None]
    assert encoded(pa.array([True, False]), "categorical").to_pylist() == ["true", "false"]
    assert digest_of(pa.array([7, None]), "categorical") == digest_of(pa.array(["7", None]), "categorical")


def test_empty_text_is_a_value_and_missing_is_not() -> None:
    one, two = digest_of(pa.array(["", None]), "categorical")
    assert one != two


def lists(values: list[list[float | None] | None], type_: pa.DataType) -> pa.Array:
    return pa.array(values, pa.list_(type_, 2))


@pytest.mark.parametrize("type_", [pa.uint8(), pa.int64(), pa.float16(), pa.float32(), pa.float64()], ids=str)
@pytest.mark.parametrize(
    "values", [[[0, 1], [2, 255]], [[0, None], [2, 255]], [[0, 1], None], [None, [None, None]]], ids=str
)
def test_equal_vectors_have_equal_digests(type_: pa.DataType, values: Any) -> None:
    array = lists(values, type_)
    vector = encoded(array, "vector", 2)
    assert vector.null_count == 0
    assert vector.type == pa.list_(pa.uint8() if type_ == pa.uint8() else pa.float32(), 2)
    assert digest_of(array, "vector", 2) == digest_of(lists(values, pa.float32()), "vector", 2)
    doubled = pa.concat_arrays([array, array])
    assert digest_of(pa.concat_arrays([array.slice(1), array]).slice(1), "vector", 2) == digest_of(array, "vector", 2)
    cut = str(encoded(doubled.slice(1, 2), "vector", 2).to_pylist()[1])
    assert cut == str(encoded(array, "vector", 2).to_pylist()[0])


def test_a_missing_vector_keeps_its_neighbours_in_place() -> None:
    values = encoded(lists([[1, 2], None, [3, 4]], pa.int32()), "vector", 2).values.to_numpy()
    assert values.tobytes() == np.array([1, 2, np.nan, np.nan, 3, 4], np.float32).tobytes()
    bytes_ = encoded(lists([[1, 2], None, [3, 4]], pa.uint8()).slice(1), "vector", 2)
    assert bytes_.values.to_pylist()[-4:] == [None, None, 3, 4]


@pytest.mark.parametrize("type_", [pa.uint8(), pa.float32(), pa.int64()], ids=str)
def test_what_lies_behind_a_missing_vector_means_nothing(type_: pa.DataType) -> None:
    """A missing list keeps room for elements, and some writers leave old values there."""
    behind = pa.FixedSizeListArray.from_arrays(pa.array([1, 2, 9, 9], type_), 2, mask=pa.array([False, True]))
    assert behind.values.null_count == 0
    assert digest_of(behind, "vector", 2) == digest_of(lists([[1, 2], None], type_), "vector", 2)


@given(st.lists(st.floats(width=32, allow_infinity=False), min_size=1, max_size=20))
def test_numbers_survive_bit_for_bit(values: list[float]) -> None:
    out = encoded(pa.array(values, pa.float32()), "numeric").to_numpy()
    expected = np.array(values, np.float32).astype(np.float64) + 0.0
    assert np.array_equal(out, expected, equal_nan=True)
    assert not (np.signbit(out) & (out == 0)).any()


def test_content_digest_notices_everything() -> None:
    recipe = recipe_for("numeric")
    base = digest_of(pa.array([1.0]), "numeric")[0]
    assert digest_of(pa.array([np.nextafter(1.0, 2.0)]), "numeric")[0] != base
    other_label = canonical_batch(batch_of(pa.array([1.0]), ["yes"]), recipe)
    assert content_digests(KEYS, other_label, recipe)[0].tobytes() != base
    other_owner = canonical_batch(batch_of(pa.array([1.0])), recipe).set_column(1, "_sisa_subject", pa.array(["9"]))
    assert content_digests(KEYS, other_owner, recipe)[0].tobytes() != base
    assert (
        content_digests(shard_keys(KEY, 2), canonical_batch(batch_of(pa.array([1.0])), recipe), recipe)[0].tobytes()
        != base
    )


def test_features_do_not_run_into_each_other() -> None:
    recipe = written("-", subject_id=None, features=["x", "y"], holdout=None)
    recipe = recipe.resolved({"x": ColumnSpec(type="categorical"), "y": ColumnSpec(type="categorical")})

    def digest(x: str | None, y: str | None) -> bytes:
        batch = pa.record_batch(
            [pa.array([1]), pa.array([x], pa.string()), pa.array([y], pa.string()), pa.array(["no"])],
            names=["rid", "x", "y", "label"],
        )
        return content_digests(KEYS, canonical_batch(batch, recipe), recipe)[0].tobytes()

    assert len({digest("ab", "c"), digest("a", "bc"), digest("c", "ab"), digest(None, "abc"), digest("abc", None)}) == 5


def test_golden_digests() -> None:
    """A release that moves these takes every stored record for damaged."""
    recipe = written("-", features=["age", "city", "vector"])
    recipe = recipe.resolved(
        {
            "age": ColumnSpec(type="numeric"),
            "city": ColumnSpec(type="categorical"),
            "vector": ColumnSpec(type="vector", size=2),
        }
    )
    batch = pa.record_batch(
        [
            pa.array([1, 2]),
            pa.array(["p", "q"]),
            pa.array([3.5, None]),
            pa.array(["Ulm", None]),
            lists([[1, 2], [3, None]], pa.float32()),
            pa.array(["no", "yes"]),
        ],
        names=["rid", "owner", "age", "city", "vector", "label"],
    )
    canonical = canonical_batch(batch, recipe)
    assert [row.tobytes().hex() for row in id_digests(KEYS, canonical["_sisa_record"])] == [
        "974a0029987b29a3d02d33fc2809861f",
        "cc3cccd599ebdde3bede2c80fbfc5110",
    ]
    assert [row.tobytes().hex() for row in content_digests(KEYS, canonical, recipe)] == [
        "cc965761bdaa23ac2aeb3a94d173e779",
        "be5b81da7901c22ccfd0050c36ecf6e8",
    ]


def in_order(table: pa.Table, path: Path) -> Path:
    papq.write_table(table, path / "t.parquet")
    return path / "t.parquet"


def shuffled(table: pa.Table, path: Path) -> Path:
    papq.write_table(table.take(pa.array(np.random.default_rng(5).permutation(len(table)))), path / "t.parquet")
    return path / "t.parquet"


def split(table: pa.Table, path: Path) -> Path:
    for i, start in enumerate([0, 20, 90]):
        papq.write_table(table.slice(start, [20, 70, 1000][i]), path / f"part{2 - i}.parquet", row_group_size=7)
    return path / "*.parquet"


def dictionaries(table: pa.Table, path: Path) -> Path:
    for name in ["city", "owner", "label", "age", "rid"]:
        table = table.set_column(table.schema.get_field_index(name), name, table[name].dictionary_encode())
    with paipc.new_file(path / "t.arrow", table.schema) as writer:
        writer.write_table(table)
    return path / "t.arrow"


def mixed_encodings(table: pa.Table, path: Path) -> Path:
    large = table.set_column(1, "owner", table["owner"].cast(pa.large_string()))
    papq.write_table(large.slice(0, 50), path / "a.parquet")
    papq.write_table(table.slice(50), path / "b.parquet")
    return path / "*.parquet"


def wider_types(table: pa.Table, path: Path) -> Path:
    for name, type_ in [
        ("age", pa.float64()),
        ("rid", pa.uint16()),
        ("owner", pa.string_view()),
        ("label", pa.large_string()),
    ]:
        table = table.set_column(table.schema.get_field_index(name), name, table[name].cast(type_))
    for name in ["vector", "pixels"]:
        size = table.schema.field(name).type.list_size
        table = table.set_column(
            table.schema.get_field_index(name), name, table[name].cast(pa.list_(pa.float64(), size))
        )
    with paipc.new_stream(path / "t.stream", table.schema) as writer:
        writer.write_table(table, max_chunksize=13)
    return path / "t.stream"


@pytest.mark.parametrize("rewritten", [shuffled, split, dictionaries, mixed_encodings, wider_types])
def test_order_split_and_encoding_of_the_source_mean_nothing(
    rewritten: Callable[[pa.Table, Path], Path], tmp_path: Path
) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    one = resolved(in_order(people(), tmp_path / "one"))
    two = resolved(rewritten(people(), tmp_path / "two"))
    assert one.data.columns == two.data.columns
    left = memberships(stored(tmp_path / "s1", one)[1])
    right = memberships(stored(tmp_path / "s2", two)[1])
    assert left == right
    assert len(left) == SHARDS * (SLICES + 1)


def test_csv_of_the_same_values_has_the_same_digests(tmp_path: Path) -> None:
    table = people().drop_columns(["vector", "pixels"])
    one = resolved(saved(tmp_path, table))
    pacsv.write_csv(table, tmp_path / "people.csv")
    two = resolved(tmp_path / "people.csv", columns=DECLARED)
    assert one.data.columns == two.data.columns
    assert memberships(stored(tmp_path / "s1", one)[1]) == memberships(stored(tmp_path / "s2", two)[1])


@pytest.mark.parametrize(
    ("array", "kind", "size", "message"),
    [
        (pa.array(["1", "x", None, "y"]), "numeric", None, "'x' is numeric in the recipe, but 2 of 4 values"),
        (pa.array([1.0, float("inf")]), "numeric", None, "'x' has 1 infinite"),
        (pa.array([["a"]]), "numeric", None, "numeric in the recipe, but of type list"),
        (pa.array([1.5]), "categorical", None, "categorical in the recipe, but of type double"),
        (pa.array([1.0]), "vector", 2, "a vector of 2 numbers in the recipe, but of type double"),
        (lists([[1, 2]], pa.int8()), "vector", 3, "a vector of 3 numbers in the recipe"),
        (lists([[1, 1e39]], pa.float64()), "vector", 2, "infinite values"),
    ],
)
def test_values_of_another_kind_are_refused(array: pa.Array, kind: str, size: int | None, message: str) -> None:
    with pytest.raises(SourceError, match=message):
        encoded(array, kind, size)


BROKEN = pa.array([b"a", b"K\xf6ln", None, b"\xff"]).view(pa.string())


@pytest.mark.parametrize(
    ("array", "kind", "size"),
    [
        (BROKEN, "categorical", None),
        (BROKEN.cast(pa.large_string()), "categorical", None),
        (BROKEN.cast(pa.string_view()), "categorical", None),
        (pa.DictionaryArray.from_arrays([0, 1, 2, 3], BROKEN), "categorical", None),
        (BROKEN, "numeric", None),
        (pa.FixedSizeListArray.from_arrays(BROKEN, 1), "vector", 1),
    ],
    ids=["text", "large text", "text view", "dictionary", "numbers as text", "vector of texts"],
)
def test_texts_that_are_none_are_refused(array: pa.Array, kind: str, size: int | None) -> None:
    with pytest.raises(SourceError, match="column 'x': 2 of 4 texts read so far are not valid UTF-8") as caught:
        encoded(array, kind, size)
    assert "leave these rows out" in caught.value.hint


def test_labels_that_are_no_texts_are_refused() -> None:
    labels = pa.array([b"no", b"\xff"]).view(pa.string())
    batch = pa.record_batch([pa.array([1, 2]), pa.array([1, 2]), labels], names=["rid", "x", "label"])
    with pytest.raises(SourceError, match="column 'label': 1 of 2 texts"):
        canonical_batch(batch, recipe_for("numeric"))


def test_refusals_show_no_value() -> None:
    with pytest.raises(SourceError) as caught:
        encoded(pa.array(["secret"]), "numeric")
    assert "secret" not in caught.value.message + caught.value.hint


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (pa.array(["no", "maybe", "maybe"]), "2 of 3 records read so far have a label outside data.classes: 'maybe'"),
        (pa.array(["no", None, "no"]), "1 of 3 records read so far have no label"),
        (pa.array([1.0, 2.0, 3.0]), "of type double"),
    ],
)
def test_labels_outside_the_classes_are_refused(labels: pa.Array, message: str) -> None:
    batch = pa.record_batch([pa.array([1, 2, 3]), pa.array([1, 2, 3]), labels], names=["rid", "x", "label"])
    with pytest.raises(SourceError, match=message):
        canonical_batch(batch, recipe_for("numeric"))


def test_labels_are_compared_as_text() -> None:
    recipe = written("-", subject_id=None, features=["x"], classes=[1, 0]).resolved({"x": ColumnSpec(type="numeric")})
    for labels in [pa.array([0, 1], pa.uint8()), pa.array(["0", "1"]), pa.array([0, 1]).dictionary_encode()]:
        batch = pa.record_batch([pa.array([1, 2]), pa.array([1, 2]), labels], names=["rid", "x", "label"])
        assert canonical_batch(batch, recipe)["_sisa_label"].to_pylist() == [1, 0]


def test_prediction_input_needs_features_only() -> None:
    batch = pa.record_batch([pa.array([1])], names=["x"])
    assert features_batch(batch, recipe_for("numeric")).schema.names == ["x"]
    with pytest.raises(SourceError, match=r"no column 'x' \(did you mean 'xx'\?\)"):
        features_batch(pa.record_batch([pa.array([1])], names=["xx"]), recipe_for("numeric"))


def test_a_wide_table_is_looked_through_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A look takes time for each column: one for each column would be slow with thousands of them."""
    names = [f"c{i}" for i in range(50)]
    recipe = written("-", subject_id=None, features=names, holdout=None)
    recipe = recipe.resolved({name: ColumnSpec(type="numeric") for name in names})
    batch = pa.record_batch([pa.array([1])] * 51 + [pa.array(["no"])], names=["rid", *names, "label"])
    looks: list[str] = []

    def counted(present: Any, wanted: Any, *, what: str) -> None:
        looks.append(what)
        check_columns(present, wanted, what=what)

    monkeypatch.setattr(encode, "check_columns", counted)
    assert canonical_batch(batch, recipe).num_columns == 53
    assert looks == ["the input"]


def test_the_wrong_table_is_told_in_few_words(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """To look for near names of thousands of columns among thousands would take hours."""
    names = [f"column {i}" for i in range(200)]
    searched: list[str] = []

    def counted(name: str, *others: Any, **more: Any) -> list[str]:
        searched.append(name)
        return get_close_matches(name, *others, **more)

    monkeypatch.setattr("difflib.get_close_matches", counted)
    with pytest.raises(SourceError) as caught:
        check_columns(["column 1x", "y"], names, what="the input")
    assert "no column 'column 1' (did you mean 'column 1x'?)" in caught.value.message
    assert caught.value.message.endswith(", and 180 more")
    table = pa.table({name: [1] for name in ["rid", "label", *(f"other {i}" for i in range(200))]})
    error = problems_of(table, tmp_path, subject_id=None, features=names)
    assert len(error.problems) == 200
    assert "it has rid, label, other 0" in error.message
    assert "and 182 more" in error.message
    assert len(searched) == 40


# --- holding a recipe against a schema -----------------------------------------------------------


def problems_of(table: pa.Table, folder: Path, **data: Any) -> RecipeError:
    recipe = written(saved(folder, table), **data)
    with pytest.raises(RecipeError) as caught:
        resolve(recipe, open_source(recipe.data.source))
    return caught.value


def test_star_means_all_but_ids_and_label_sorted(tmp_path: Path) -> None:
    recipe = resolved(saved(tmp_path, people()), columns={"age": {"mean": 40.0, "std": 10.0}})
    assert recipe.data.features == ["age", "city", "pay", "pixels", "vector"]
    assert recipe.data.columns["age"] == ColumnSpec(type="numeric", mean=40.0, std=10.0)
    assert recipe.data.columns["pixels"] == ColumnSpec(type="vector", size=4)
    assert recipe.data.columns["city"] == ColumnSpec(type="categorical")


def test_declared_categories_are_normalised(tmp_path: Path) -> None:
    recipe = resolved(saved(tmp_path, people()), columns={"city": {"values": ["Ko\u0308ln", "Ulm"]}})
    assert recipe.data.columns["city"] == ColumnSpec(type="categorical", values=["Köln", "Ulm"])
    assert (
        resolved(saved(tmp_path, people()), columns={"age": {"values": ["1"]}}).data.columns["age"].type
        == "categorical"
    )


def test_all_problems_are_reported_together(tmp_path: Path) -> None:
    error = problems_of(
        people(), tmp_path, record_id="ridd", label="labl", features=["agee", "city", "nothing like it"]
    )
    text = error.message
    assert "data.record_id: the table has no column 'ridd' (did you mean 'rid'?)" in text
    assert "data.label: the table has no column 'labl' (did you mean 'label'?)" in text
    assert "data.features: the table has no column 'agee' (did you mean 'age'?)" in text
    assert "'nothing like it'; it has rid, owner," in text
    assert len(error.problems) == 4


ODD = {
    "list": pa.array([[1.0], [1.0, 2.0]]),
    "when": pa.array([1, 2], pa.timestamp("s")),
    "nested": pa.array([{"a": 1}, {"a": 2}]),
    "raw": pa.array([b"a", b"b"]),
    "texts": pa.array([["a"], ["b"]], pa.list_(pa.string(), 1)),
    "empty": pa.nulls(2),
    "nothing": pa.array([[], []], pa.list_(pa.float32(), 0)),
    "target": pa.array([1.5, 2.5]),
    "word": pa.array(["a", "b"]),
    "ok": pa.array([1, 2]),
}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"features": ["list"]}, "'list': a list of variable length is not supported yet"),
        ({"features": ["when"]}, "'when': a time .* is not supported yet"),
        ({"features": ["nested"]}, "'nested': a nested column is not supported yet"),
        ({"features": ["raw"]}, "'raw': a column of type binary is not supported yet"),
        ({"features": ["texts"]}, "'texts': a list of string is not supported yet"),
        ({"features": ["nothing"]}, "'nothing': a list of 0 numbers says nothing; expected .* at least 1 number"),
        ({"features": ["empty"]}, "'empty': all values are missing; declare its type"),
        ({"label": "target"}, "regression targets are not supported yet"),
        ({"label": "when"}, "can't be a class label"),
        ({"record_id": "target"}, "data.record_id: 'target': an id can't be of type double"),
        ({"subject_id": "when"}, "data.subject_id: 'when': an id can't be of type timestamp"),
        ({"features": ["word"], "columns": {"word": {"type": "numeric"}}}, "text can't be numeric"),
        ({"features": ["word"], "columns": {"word": {"mean": 0.0, "std": 1.0}}}, "mean and std are for numbers"),
        ({"features": ["target"], "columns": {"target": {"type": "categorical"}}}, "double can't be categorical"),
        ({"features": ["ok"], "columns": {"ok": {"type": "vector"}}}, "int64 can't be a vector"),
        ({"features": ["ok"], "columns": {"ok": {"size": 3}}}, "vector of 3 numbers, the table has no list"),
        ({"features": "*", "columns": {"okk": {"type": "numeric"}}}, "data.columns.okk: no such feature"),
        (
            {"features": ["ok"], "image": {"height": 2, "width": 2}},
            "'ok' is numeric; an image is a fixed-size list of 4",
        ),
    ],
)
def test_what_does_not_fit_is_named(data: dict[str, Any], message: str, tmp_path: Path) -> None:
    table = pa.table({"rid": [1, 2], "label": ["no", "yes"], **ODD})
    with pytest.raises(RecipeError, match=message):
        raise problems_of(table, tmp_path, **{"subject_id": None, "features": ["ok"], **data})


def test_image_size_must_fit(tmp_path: Path) -> None:
    image = {"height": 2, "width": 3, "channels": 1}
    error = problems_of(people(), tmp_path, features=["pixels"], image=image)
    assert "data.image: 2 x 3 x 1 is 6 numbers; 'pixels' has 4" in error.message
    assert (
        resolved(saved(tmp_path, people()), features=["pixels"], image={"height": 2, "width": 2}).data.image is not None
    )


@pytest.mark.parametrize(
    ("labels", "line"),
    [
        (pa.array(["yes", "no", 'q"u', None]), 'classes: ["no", "q\\"u", "yes"]'),
        (pa.array([10, 9, -1, None], pa.int8()), "classes: [-1, 9, 10]"),
        (pa.array([True, False, None, True]), "classes: [false, true]"),
        (pa.array(["b", "a", "b", "a"]).dictionary_encode(), 'classes: ["a", "b"]'),
    ],
)
def test_missing_classes_come_with_the_line_to_paste(labels: pa.Array, line: str, tmp_path: Path) -> None:
    table = pa.table({"rid": range(4), "x": range(4), "label": labels})
    error = problems_of(table, tmp_path, subject_id=None, classes=None)
    assert "data.classes: missing" in error.message
    assert line in error.hint.splitlines()[1]


def test_csv_without_types_comes_with_the_lines_to_paste(tmp_path: Path) -> None:
    pacsv.write_csv(people().drop_columns(["vector", "pixels"]), tmp_path / "t.csv")
    recipe = written(tmp_path / "t.csv", columns={"pay": {"type": "numeric"}})
    with pytest.raises(RecipeError, match="CSV has no types; declare those of 'age', 'city'") as caught:
        resolve(recipe, open_source(recipe.data.source))
    assert '    "age": {type: numeric}\n    "city": {type: categorical}' in caught.value.hint
