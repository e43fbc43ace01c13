"""``sisa add`` as a stranger uses it: answers, exit codes, refusals."""

from __future__ import annotations

import sys
from types import NoneType

import pyarrow as pa
import pyarrow.parquet as papq
import pytest
from cli_kit import Cli, assert_fields, changed, content, documented, people, trained

ADDITION = {
    "generation": int, "slice": int, "records": int, "holdout_records": int, "excluded_records": int, "repeated": bool,
    "stages_trained": int, "version_before": int, "version": int, "metrics": (dict, NoneType), "seconds": float,
}  # fmt: skip


def newcomers(count: int = 12) -> pa.Table:
    """New rows; half of the households were there."""
    table = people(count, seed=9)
    return changed(
        table,
        person=[f"n{i:03d}" for i in range(count)],
        household=[f"h{i:03d}" if i % 2 else f"k{i:03d}" for i in range(count)],
    )


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    folder = tmp_path_factory.mktemp("add")
    trained(folder)
    return folder


@pytest.fixture
def cli(capsys, monkeypatch, tmp_path, template):
    import shutil

    shutil.copytree(template, tmp_path / "work")
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setattr(sys, "path", [*sys.path])
    papq.write_table(newcomers(), "new.parquet")
    return Cli(capsys)


def test_adding_answers_with_these_fields(cli):
    answer = cli.json("add", "--store", "store", "--source", "new.parquet", "--executor", "inline")
    assert_fields(answer, ADDITION)
    assert answer.keys() == documented("add")
    assert (answer["generation"], answer["slice"], answer["stages_trained"]) == (1, 3, 3)
    assert answer["records"] + answer["holdout_records"] == 12
    status = cli.json("status", "--store", "store")
    assert (status["slices"], status["generations"], status["version"]) == (3, 1, answer["version"])
    assert cli("verify", "--store", "store", "--replay", "all", "--executor", "inline").code == 0


def test_adding_says_what_it_did(cli):
    said = cli("add", "--store", "store", "--source", "new.parquet", "--executor", "inline")
    first, second, third = said.out.splitlines()
    assert first.startswith("generation 1 added: ")
    assert "in slice 3 of the shards" in first
    assert second.startswith("trained 3 stages (")
    assert third.startswith("accuracy ")
    again = cli("add", "--store", "store", "--source", "new.parquet", "--executor", "inline").out
    assert again.startswith("generation 1 was there already: ")
    assert "##+#" in cli("status", "--store", "store").out


def test_csv_takes_the_types_of_the_recipe(cli):
    import pyarrow.csv as pacsv

    pacsv.write_csv(newcomers(), "new.csv")
    answer = cli.json("add", "--store", "store", "--source", "new.csv", "--defer")
    assert (answer["stages_trained"], answer["metrics"]) == (0, None)
    assert cli.json("status", "--store", "store")["state"] == "training due"
    assert cli.json("add", "--store", "store", "--source", "new.parquet", "--executor", "inline")["repeated"]


def test_rows_of_deleted_people_are_left_out_and_counted(cli):
    cli("delete", "--store", "store", "--subject", "h001", "--defer")
    said = cli("add", "--store", "store", "--source", "new.parquet", "--executor", "inline")
    assert "left out: 1 row of deleted people" in said.out


REFUSED = [
    ("rows that are there", people().slice(0, 2), "2 of 2 rows have a record id that is in the store already"),
    ("nothing", newcomers().slice(0, 0), "has no row to add"),
    ("a label that nobody declared", changed(newcomers(), income=["?"] * 12), "income"),
    ("no such column", newcomers().drop_columns(["age"]), "the table has no column 'age'"),
]


@pytest.mark.parametrize(("table", "message"), [case[1:] for case in REFUSED], ids=[case[0] for case in REFUSED])
def test_what_can_not_be_added_is_refused_and_the_store_is_as_it_was(cli, table, message):
    papq.write_table(table, "bad.parquet")
    before = content(cli.folder / "store")
    assert message in cli.refused("add", "--store", "store", "--source", "bad.parquet").message
    assert content(cli.folder / "store") == before


MISUSED = [
    ([], "Missing option '--store'"),
    (["--store", "store"], "Missing option '--source'"),
    (["--store", "store", "--source", "nowhere.parquet"], "--source"),
    (["--store", "nowhere", "--source", "new.parquet"], "no store there"),
    (["--store", "store", "--source", "new.parquet", "--executor", "dask"], "'dask' is not one of"),
]


@pytest.mark.parametrize(("words", "message"), MISUSED)
def test_misuse_is_explained(cli, words, message):
    assert message in cli.refused("add", *words).message
