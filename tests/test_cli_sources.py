"""Tables that can't be trained on, or not yet: refused with what is wrong and what to do, before anything is written."""

from __future__ import annotations

import datetime as dt
import sys

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.ipc as paipc
import pyarrow.parquet as papq
import pytest
import yaml
from cli_kit import CLASSES, Cli, changed, people, prepare

TABLE = people()
COUNT = len(TABLE)
TRICKY = [
    "a: b, 'c' \"d\" #e",
    "yes",
    "no",
    "1",
    "null",
    "~",
    "ünï [x]",
    "- x",
    "tab\there",
    "two\nlines",
    "0x1F",
    "\\",
]


@pytest.fixture
def cli(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    prepare(tmp_path)
    return Cli(capsys)


def refused(cli, *words):
    """Train; nothing may be written."""
    failure = cli.refused("train", "recipe.yaml", *words)
    assert not (cli.folder / "store").exists()
    return failure


def source(cli, table):
    papq.write_table(table, cli.folder / "people.parquet")


def first(values, *, of):
    """A column of the table with other values at its start."""
    return [*values, *TABLE[of].to_pylist()[len(values) :]]


SCHEMAS = {
    "float label": (
        {"income": np.linspace(0, 1, COUNT)},
        "data.label: 'income': it is of type double: regression targets are not supported yet",
    ),
    "decimal label": ({"income": pa.array([1] * COUNT).cast(pa.decimal128(30, 2))}, "regression targets are not supported yet"),
    "date as label": ({"income": [dt.date(2020, 1, 1)] * COUNT}, "can't be a class label; expected integers, text or booleans"),
    "float ids": ({"person": np.arange(COUNT) / 2}, "data.record_id: 'person': an id can't be of type double"),
    "dates as subjects": ({"household": [dt.date(2020, 1, 1)] * COUNT}, "data.subject_id: 'household': an id can't be"),
    "ids that are all missing": ({"person": pa.nulls(COUNT)}, "data.record_id: 'person': all ids are missing"),
    "lists of variable length": (
        {"age": [[1.0] * (i % 3) for i in range(COUNT)]},
        "data.features: 'age': a list of variable length is not supported yet",
    ),
    "timestamps": ({"age": pa.array([0] * COUNT, pa.timestamp("us"))}, "data.features: 'age': a time (timestamp[us]) is not supported yet"),
    "dates": ({"age": [dt.date(2020, 1, 1)] * COUNT}, "data.features: 'age': a time (date32[day]) is not supported yet"),
    "nested": ({"age": [{"a": 1}] * COUNT}, "data.features: 'age': a nested column is not supported yet"),
    "bytes": ({"age": [b"x"] * COUNT}, "data.features: 'age': a column of type binary is not supported yet"),
    "no values at all": ({"age": pa.nulls(COUNT)}, "data.features: 'age': all values are missing; declare its type"),
}  # fmt: skip


@pytest.mark.parametrize("name", SCHEMAS)
def test_a_column_of_a_type_that_does_not_fit(cli, name):
    columns, message = SCHEMAS[name]
    source(cli, changed(TABLE, **columns))
    assert message in refused(cli).message


VALUES = {
    "ids that repeat": (
        {"person": first(["p000", "p000", "p007"], of="person")},
        "'person' must not repeat, but 2 record ids occur more than once: 'p000', 'p007'",
        "data.subject_id",
    ),
    "ids that are missing": ({"person": first([None], of="person")}, "column 'person': 1 of 60 ids are missing", "leave them out"),
    "subjects that are missing": ({"household": first([None], of="household")}, "column 'household': 1 of 60 ids are missing", ""),
    "ids that are empty": ({"person": first([""], of="person")}, "column 'person': 1 of 60 ids are empty", "leave them out"),
    "labels outside": (
        {"income": first(["huh", "hm"], of="income")},
        "label 'income': 2 of 60 records read so far have a label outside data.classes: 'hm', 'huh'",
        "Declared are '<=50K', '>50K'.",
    ),
    "labels that are missing": ({"income": first([None], of="income")}, "label 'income': 1 of 60 records read so far have no label", ""),
    "infinite numbers": ({"age": first([float("inf")], of="age")}, "column 'age' has 1 infinite values", "missing value"),
    "prose": (
        {"job": [f"I am person {i} and this is all that I have to say" for i in range(COUNT)]},
        "feature 'job' looks like free text (its values have 13 words on average), which is not supported yet",
        "declare columns.job.type: categorical",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", VALUES)
def test_a_value_that_can_not_be_used(cli, name):
    columns, message, hint = VALUES[name]
    source(cli, changed(TABLE, **columns))
    failure = refused(cli)
    assert message in failure.message
    assert hint in failure.hint


DECLARED = "data.columns={age: {type: numeric}, hours: {type: numeric}, job: {type: categorical}}"


def latin1(name):
    """A column whose second value is text, but not in UTF-8."""
    values = [str(value).encode() for value in TABLE[name].to_pylist()]
    return pa.array([values[0], "Jürgen".encode("latin-1"), *values[2:]]).view(pa.string())


def saved_as(cli, table, kind):
    """Save a table whose texts may be none; return its name."""
    where = f"broken.{kind}"
    if kind == "parquet":
        papq.write_table(table, cli.folder / where)
    elif kind == "arrow":
        with paipc.new_file(cli.folder / where, table.schema) as writer:
            writer.write_table(table)
    else:
        rows = zip(*(column.cast(pa.string()).cast(pa.binary()).to_pylist() for column in table.columns), strict=True)
        lines = [",".join(table.column_names).encode(), *map(b",".join, rows)]
        (cli.folder / where).write_bytes(b"\n".join(lines))
    return where


@pytest.mark.parametrize("kind", ["parquet", "arrow", "csv"])
@pytest.mark.parametrize("name", ["person", "household", "job", "income"])
def test_text_that_is_not_utf_8(cli, name, kind):
    where = saved_as(cli, changed(TABLE, **{name: latin1(name)}), kind)
    failure = refused(cli, "--set", f"data.source={where}", "--set", DECLARED)
    assert failure.message == f"column {name!r}: 1 of 60 texts read so far are not valid UTF-8"
    assert "iconv" in failure.hint
    assert "Jürgen" not in failure.message


@pytest.mark.parametrize("encoded", ["ids", "job", "missing classes"])
def test_encoded_text_that_is_not_utf_8(cli, encoded):
    name = {"ids": "person", "job": "job", "missing classes": "income"}[encoded]
    source(cli, changed(TABLE, **{name: latin1(name).dictionary_encode()}))
    failure = refused(cli, *(["--set", "data.classes="] * (encoded == "missing classes")))
    assert failure.message == f"column {name!r}: 1 of 60 texts read so far are not valid UTF-8"


@pytest.mark.parametrize("kind", ["parquet", "arrow", "csv"])
def test_an_input_that_is_not_utf_8(cli, kind):
    cli.json("train", "recipe.yaml")
    answered = ("predict", "--store", "store", "--output", "out.parquet")
    where = saved_as(cli, changed(TABLE, job=latin1("job")), kind)
    failure = cli.refused(*answered, where)
    assert failure.message == "column 'job': 1 of 60 texts read so far are not valid UTF-8"
    assert not (cli.folder / "out.parquet").exists()
    where = saved_as(cli, changed(TABLE, household=latin1("household")), kind)  # which isn't asked for
    assert cli.json(*answered, where)["rows"] == COUNT


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_a_list_of_no_numbers_is_no_feature(cli, kind):
    nothing = pa.array([[]] * COUNT, pa.list_(pa.float32(), 0))
    where = saved_as(cli, changed(TABLE, age=nothing), kind)
    failure = refused(cli, "--set", f"data.source={where}")
    assert "data.features: 'age': a list of 0 numbers says nothing; expected a fixed-size list" in failure.message


def test_columns_that_are_not_there_are_all_named_with_the_nearest(cli):
    source(cli, TABLE.rename_columns(["Person", "household", "Age", "hours", "job", "incomes"]))
    assert refused(cli).message.splitlines() == [
        "the recipe for the table 'people.parquet' has 3 problems:",
        "  - data.record_id: the table has no column 'person' (did you mean 'Person'?)",
        "  - data.label: the table has no column 'income' (did you mean 'incomes'?)",
        "  - data.features: the table has no column 'age' (did you mean 'Age'?)",
    ]


def test_prose_that_was_declared_to_be_categories_is_trained_on(cli):
    source(cli, changed(TABLE, job=[f"the one and only job number {i} there is" for i in range(COUNT)]))
    assert "free text" in refused(cli).message
    assert cli.json("train", "recipe.yaml", "--set", "data.columns.job.type=categorical")["stages_trained"] == 6


@pytest.mark.parametrize(
    ("where", "message", "hint"),
    [
        ("absent.parquet", "data.source 'absent.parquet': there is no such file", "relative to the current folder"),
        ("no/*.parquet", "data.source 'no/*.parquet': no file matches", "relative to the current folder"),
        ("parts", "data.source 'parts' is a folder; expected a file or a glob", "parts/*.parquet"),
        ("text.parquet", "data.source 'text.parquet' is no table that can be read; expected Parquet", "Parquet"),
        ("zero.parquet", "data.source 'zero.parquet' is an empty file", "Write the file again"),
        ("zero.csv", "data.source 'zero.csv' is an empty file", "Write the file again"),
        ("half.parquet", "data.source 'half.parquet' can't be read: it is damaged", "Write the file again"),
        ("ragged.csv", "data.source 'ragged.csv': a row has 2 fields where the header has 6", "Quote"),
        ("parts/*.parquet", "'parts/b.parquet' has other columns or types than 'parts/a.parquet': column 'age' is absent here, double there", "same columns"),
        ("types/*.parquet", "column 'hours' is text here, int64 there", "same columns"),
        ("both/*", "data.source 'both/*' mixes CSV and typed files", "one format"),
        ("s3://bucket/people.parquet", "object storage is not supported yet", "Copy the table"),
        ("builtin:iris", "data.source 'builtin:iris': no such built-in table", "builtin:digits"),
    ],
)  # fmt: skip
def test_a_source_that_is_no_table(cli, where, message, hint):
    folder = cli.folder
    for name in ("parts", "types", "both"):
        (folder / name).mkdir()
        papq.write_table(TABLE.slice(0, 20), folder / name / "a.parquet")
    papq.write_table(TABLE.slice(20).drop_columns(["age"]), folder / "parts" / "b.parquet")
    papq.write_table(changed(TABLE, hours=["x"] * COUNT), folder / "types" / "b.parquet")
    pacsv.write_csv(people(), folder / "both" / "b.csv")
    (folder / "text.parquet").write_text("hello")
    (folder / "zero.parquet").touch()
    (folder / "zero.csv").touch()
    (folder / "half.parquet").write_bytes((folder / "people.parquet").read_bytes()[:500])
    (folder / "ragged.csv").write_text("person,household,age,hours,job,income\np1,h1\n")
    declared = "data.columns={age: {type: numeric}, hours: {type: numeric}, job: {type: categorical}}"
    failure = refused(cli, "--set", f"data.source={where}", *(["--set", declared] * (where == "ragged.csv")))
    assert message in failure.message
    assert hint in failure.hint


def test_a_table_without_rows_is_told(cli):
    source(cli, TABLE.slice(0, 0))
    said = cli("train", "recipe.yaml")
    assert said.code == 0
    assert "data.source has no records" in said.err
    assert cli.json("status", "--store", "store")["constituents"][0]["stage"] == 0
    failure = cli.refused("predict", "--store", "store", "people.parquet", "--output", "out.parquet", code=3)
    assert "no clean constituent is left" in failure.message


def paste(cli, hint):
    """Put the lines of a hint where it says: under ``data``."""
    head, *lines = hint.splitlines()
    assert head == "Under data, add:"
    text = (cli.folder / "recipe.yaml").read_text()
    (cli.folder / "recipe.yaml").write_text(text.replace("data:\n", "\n".join(["data:", *lines, ""]), 1))


@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        (CLASSES, CLASSES),
        ([10, -2, 3], [-2, 3, 10]),
        ([True, False], [False, True]),
        (TRICKY, sorted(TRICKY)),
    ],
    ids=["text", "integers", "booleans", "text that YAML reads otherwise"],
)
def test_the_line_of_missing_classes_can_be_pasted(cli, labels, classes):
    source(cli, changed(TABLE, income=[labels[i % len(labels)] for i in range(COUNT)]))
    content = yaml.safe_load((cli.folder / "recipe.yaml").read_text())
    del content["data"]["classes"]
    (cli.folder / "recipe.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    failure = refused(cli)
    assert "data.classes: missing; classes are declared, never inferred from the table" in failure.message
    paste(cli, failure.hint)
    assert cli.json("train", "recipe.yaml")["records"] > 0
    assert yaml.safe_load((cli.folder / "store" / "recipe.yaml").read_text())["data"]["classes"] == classes


def test_the_lines_of_csv_columns_can_be_pasted_and_give_the_same_weights(cli):
    cli.json("train", "recipe.yaml", "--store", "typed")
    named = TABLE.rename_columns(["person", "household", "age", "hours", "job", "income"])
    pacsv.write_csv(named, cli.folder / "people.csv")
    text = (cli.folder / "recipe.yaml").read_text().replace("people.parquet", "people.csv")
    (cli.folder / "recipe.yaml").write_text(text)
    failure = refused(cli)
    assert "data.columns: CSV has no types; declare those of 'age', 'hours', 'job'" in failure.message
    paste(cli, failure.hint)
    assert cli.json("train", "recipe.yaml")["stages_trained"] == 6
    one, other = (cli.json("status", "--store", name)["constituents"] for name in ("typed", "store"))
    assert [c["state_digest"] for c in one] == [c["state_digest"] for c in other]


@pytest.mark.parametrize("kind", ["glob", "file://", "arrow", "shuffled"])
def test_other_ways_to_give_the_same_rows_train_nothing_again(cli, kind):
    cli.json("train", "recipe.yaml")
    where = "other/*.parquet"
    (cli.folder / "other").mkdir()
    if kind == "glob":
        papq.write_table(TABLE.slice(0, 7), cli.folder / "other" / "a.parquet")
        papq.write_table(TABLE.slice(7), cli.folder / "other" / "b.parquet")
    elif kind == "file://":
        where = f"file://{cli.folder / 'people.parquet'}"
    elif kind == "arrow":
        where = "other/people.arrow"
        with paipc.new_file(cli.folder / where, TABLE.schema) as writer:
            writer.write_table(TABLE)
    else:
        papq.write_table(TABLE.take(np.random.default_rng(0).permutation(COUNT)), cli.folder / "other" / "a.parquet")
    again = cli.json("train", "recipe.yaml", "--set", f"data.source={where}")
    assert (again["stages_trained"], again["stages_reused"], again["missing_from_source"]) == (0, 6, 0)
