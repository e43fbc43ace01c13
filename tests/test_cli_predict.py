"""``sisa predict``: what it adds to a table, and what it refuses."""

from __future__ import annotations

import os
import shutil
import sys

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as papq
import pytest
from cli_kit import CLASSES, Cli, assert_fields, changed, documented, households, one_object, people, process, trained

import sisa

TABLE = people()


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stores")
    numbers = changed(TABLE, income=[i % 3 for i in range(60)])
    truths = changed(TABLE, income=[i % 2 == 0 for i in range(60)])
    data = {"source": "people.parquet", "record_id": "person", "label": "income", "features": ["age", "job"]}
    return {
        "people": trained(folder / "people"),
        "numbers": trained(folder / "numbers", numbers, data={**data, "classes": [2, 0, 1]}),
        "truths": trained(folder / "truths", truths, data={**data, "classes": [False, True]}),
    }


@pytest.fixture
def cli(capsys, monkeypatch, tmp_path, stores):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    shutil.copytree(stores["people"], tmp_path / "people")
    papq.write_table(TABLE, tmp_path / "input.parquet")
    return Cli(capsys)


def refused(cli, *words, code=2):
    """Predict; nothing may be left where the answer would be."""
    before = sorted(cli.folder.iterdir())
    failure = cli.refused("predict", "--store", "people", *words, code=code)
    assert sorted(cli.folder.iterdir()) == before
    return failure


def test_an_answer_has_these_fields_and_columns(cli):
    answer = cli.json("predict", "--store", "people", "input.parquet", "--output", "out.parquet")
    assert_fields(answer, {"output": str, "rows": int, "version": int, "voters": int, "classes": [str]})
    assert answer.keys() == documented("predict")
    assert answer == {"output": "out.parquet", "rows": 60, "version": 1, "voters": 3, "classes": CLASSES}
    out = papq.read_table(cli.folder / "out.parquet")
    assert out.column_names == [*TABLE.column_names, "prediction", "scores", "version"]
    assert out.select(TABLE.column_names) == TABLE
    assert [str(out.schema.field(name).type) for name in ("prediction", "scores", "version")] == [
        "string", "list<element: double>", "int64",
    ]  # fmt: skip
    scores = np.array(out["scores"].to_pylist())
    assert scores.shape == (60, 2)
    assert np.allclose(scores.sum(axis=1), 1)
    assert out["prediction"].to_pylist() == [CLASSES[i] for i in scores.argmax(axis=1)]
    assert set(out["version"].to_pylist()) == {1}
    expected = sisa.open_store(cli.folder / "people").predict_proba(TABLE)
    assert np.array_equal(scores, expected)
    said = cli("predict", "--store", "people", "input.parquet", "--output", "out.parquet")
    assert said.out == "out.parquet: 60 rows answered by version 1 (3 voters)\n"


@pytest.mark.parametrize(
    ("name", "classes", "kind"), [("numbers", [2, 0, 1], "int64"), ("truths", [False, True], "bool")]
)
def test_predictions_have_the_type_of_the_classes(cli, stores, name, classes, kind):
    answer = cli.json("predict", "--store", stores[name], "input.parquet", "--output", "out.parquet")
    assert answer["classes"] == classes
    out = papq.read_table(cli.folder / "out.parquet")
    assert str(out.schema.field("prediction").type) == kind
    assert set(out["prediction"].to_pylist()) <= set(classes)


def test_features_are_enough(cli):
    papq.write_table(TABLE.select(["job", "hours", "age"]), cli.folder / "input.parquet")
    assert cli.json("predict", "--store", "people", "input.parquet", "--output", "out.parquet")["rows"] == 60


def test_missing_values_and_new_categories_are_answered(cli):
    odd = changed(TABLE, age=[None, float("nan"), *[1.0] * 58], job=[None, "astronaut", *["cook"] * 58])
    papq.write_table(odd, cli.folder / "input.parquet")
    cli.json("predict", "--store", "people", "input.parquet", "--output", "out.parquet")
    scores = np.array(papq.read_table(cli.folder / "out.parquet")["scores"].to_pylist())
    assert np.isfinite(scores).all()


def test_csv_gives_the_same_scores(cli):
    pacsv.write_csv(TABLE, cli.folder / "input.csv")
    for name in ("input.parquet", "input.csv"):
        cli.json("predict", "--store", "people", name, "--output", f"{name}.out")
    one, two = (papq.read_table(cli.folder / f"{name}.out")["scores"] for name in ("input.parquet", "input.csv"))
    assert one == two


def test_an_empty_input_is_answered_with_no_rows(cli):
    papq.write_table(TABLE.slice(0, 0), cli.folder / "input.parquet")
    answer = cli.json("predict", "--store", "people", "input.parquet", "--output", "out.parquet")
    assert (answer["rows"], answer["version"], answer["voters"]) == (0, 1, 3)
    out = papq.read_table(cli.folder / "out.parquet")
    assert (len(out), out.column_names[-3:]) == (0, ["prediction", "scores", "version"])


def test_an_output_is_replaced_whole(cli):
    (cli.folder / "out.parquet").write_text("old")
    cli.json("predict", "--store", "people", "input.parquet", "--output", "out.parquet")
    assert len(papq.read_table(cli.folder / "out.parquet")) == 60
    cli.json("predict", "--store", "people", "input.parquet", "--output", "input.parquet")
    assert len(papq.read_table(cli.folder / "input.parquet")) == 60


def test_a_deletion_moves_the_answers_on(cli):
    kept, *_ = households(cli.folder / "people", held_out=False)
    cli.json("delete", "--store", "people", "--subject", kept, "--defer")
    answer = cli.json("predict", "--store", "people", "input.parquet", "--output", "out.parquet")
    assert answer["version"] == 2
    cli.json("repair", "--store", "people")
    assert cli.json("predict", "--store", "people", "input.parquet", "--output", "out.parquet")["version"] == 3


def test_without_a_clean_constituent_nobody_answers(cli):
    for household in households(cli.folder / "people", held_out=False):
        cli.json("delete", "--store", "people", "--subject", household, "--defer")
    failure = refused(cli, "input.parquet", "--output", "out.parquet", code=3)
    assert "no clean constituent is left in version" in failure.message
    assert "sisa repair" in failure.hint


TYPES = {
    "a missing column": (TABLE.drop_columns(["age", "job"]), "the input 'input.parquet' has no column 'age', no column 'job'"),
    "a misspelt column": (TABLE.rename_columns(["person", "household", "Age", "hours", "job", "income"]), "has no column 'age' (did you mean 'Age'?)"),
    "a list": (changed(TABLE, age=[[1.0]] * 60), "column 'age' is numeric in the recipe, but of type list"),
    "times": (changed(TABLE, age=pa.array([0] * 60, pa.timestamp("us"))), "column 'age' is numeric in the recipe, but of type timestamp[us] here"),
    "texts for numbers": (changed(TABLE, age=["old"] * 60), "column 'age' is numeric in the recipe, but 60 of 60 values read so far are no numbers"),
    "floats for categories": (changed(TABLE, job=[0.5] * 60), "column 'job' is categorical in the recipe, but of type double here"),
    "infinity": (changed(TABLE, age=[float("inf")] * 60), "column 'age' has 60 infinite values"),
    "an answer already": (TABLE.append_column("prediction", [["x"] * 60]).append_column("version", [[1] * 60]), "has a column 'prediction', 'version' already, which the answer adds"),
}  # fmt: skip


@pytest.mark.parametrize("name", TYPES)
def test_an_input_that_does_not_fit(cli, name):
    table, message = TYPES[name]
    papq.write_table(table, cli.folder / "input.parquet")
    assert message in refused(cli, "input.parquet", "--output", "out.parquet").message


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["absent.parquet", "--output", "o"], "the input 'absent.parquet': there is no such file"),
        (["people", "--output", "o"], "the input 'people' is a folder; expected a file or a glob"),
        (["text.parquet", "--output", "o"], "the input 'text.parquet' is no table that can be read"),
        (["zero.parquet", "--output", "o"], "the input 'zero.parquet' is an empty file"),
        (["half.parquet", "--output", "o"], "the input 'half.parquet' can't be read: it is damaged"),
        (["s3://bucket/x.parquet", "--output", "o"], "the input 's3://bucket/x.parquet': expected a local path or glob, object storage is not supported yet"),
        (["input.parquet", "--output", "absent/out.parquet"], "--output 'absent/out.parquet': its folder doesn't exist"),
        (["input.parquet", "--output", "text.parquet/out.parquet"], "--output 'text.parquet/out.parquet': its folder doesn't exist"),
        (["input.parquet", "--output", "people"], "--output 'people': expected a file, found a folder"),
        (["input.parquet", "--output", "/proc/out.parquet"], "the folder '/proc' can't be written to: No such file or directory"),
    ],
)  # fmt: skip
def test_paths_that_lead_nowhere(cli, words, message):
    (cli.folder / "text.parquet").write_text("hello")
    (cli.folder / "zero.parquet").touch()
    (cli.folder / "half.parquet").write_bytes((cli.folder / "input.parquet").read_bytes()[:300])
    assert message in refused(cli, *words).message


@pytest.mark.parametrize("name", ["\u00fc\U0001f642.parquet", os.fsdecode(b"\xff.parquet")])
def test_json_is_ascii_whatever_a_path_is_made_of(cli, name):
    done = process("predict", "--store", "people", "input.parquet", "--output", name, "--json", folder=cli.folder)
    assert done.returncode == 0, done.stderr
    assert done.stdout.isascii()
    assert one_object(done.stdout)["output"] == name
    assert (cli.folder / name).exists()
