"""``sisa correct`` as a stranger uses it: answers, exit codes, refusals."""

from __future__ import annotations

import shutil
import sys
from types import NoneType

import pyarrow.parquet as papq
import pytest
from cli_kit import Cli, assert_fields, changed, content, documented, households, people, trained

CORRECTION = {
    "request": str, "state": str, "records": int, "subjects": int, "unchanged": int, "shards": [int],
    "stages_retrained": int, "version_before": int, "version_quarantine": (int, NoneType),
    "version_after": (int, NoneType), "seconds_to_quarantine": float, "seconds": float, "repeated": bool, "note": str,
}  # fmt: skip


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    folder = tmp_path_factory.mktemp("correct")
    trained(folder)
    return folder


@pytest.fixture
def cli(capsys, monkeypatch, tmp_path, template):
    shutil.copytree(template, tmp_path / "work")
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setattr(sys, "path", [*sys.path])
    household = households(tmp_path / "work" / "store", held_out=False)[0]
    owners = people()["household"].to_pylist()
    jobs = [
        "astronaut" if owner == household else job
        for owner, job in zip(owners, people()["job"].to_pylist(), strict=True)
    ]
    papq.write_table(changed(people(), job=jobs), "right.parquet")
    return Cli(capsys)


def test_correcting_answers_with_these_fields(cli):
    words = ["correct", "--store", "store", "--source", "right.parquet", "--executor", "inline"]
    answer = cli.json(*words, "--reason", "ticket 4712")
    assert_fields(answer, CORRECTION)
    assert answer.keys() == documented("correct")
    assert (answer["state"], answer["records"], answer["subjects"], answer["unchanged"]) == ("repaired", 2, 1, 58)
    (request,) = cli.json("status", "--store", "store")["requests"]
    assert (request["request"], request["kind"], request["reason"]) == (answer["request"], "correction", "ticket 4712")
    assert cli("verify", "--store", "store", "--replay", "all", "--executor", "inline").code == 0
    assert cli.json(*words)["request"] == ""


def test_correcting_says_what_it_did(cli):
    words = ["correct", "--store", "store", "--source", "right.parquet"]
    first, same, quarantine = cli(*words, "--defer").out.splitlines()
    assert first.endswith(": 2 records of 1 subject replaced; not retrained yet")
    assert same == "58 rows of the table say what the store has"
    assert quarantine.startswith("out of service after ")
    assert cli.json("status", "--store", "store")["state"] == "repair due"
    assert "live again as version 3" in cli(*words, "--executor", "inline").out  # the same command goes on
    assert cli(*words).out.startswith(
        "nothing to correct: 60 rows of the table say what the store has; nothing was changed"
    )


def test_the_source_that_was_wrong_still_trains_and_says_so(cli):
    cli("correct", "--store", "store", "--source", "right.parquet", "--executor", "inline")
    said = cli("train", "recipe.yaml", "--executor", "inline")
    assert said.code == 0
    assert "2 records of the source say what a correction superseded" in said.err


REFUSED = [
    ("unknown", changed(people().slice(0, 1), person=["stranger"]), "have a record id that is not in the store"),
    ("another owner", changed(people().slice(0, 1), household=["h999"]), "have another owner"),
    ("a label that nobody declared", changed(people(), income=["?"] * 60), "income"),
]


@pytest.mark.parametrize(("table", "message"), [case[1:] for case in REFUSED], ids=[case[0] for case in REFUSED])
def test_what_can_not_be_corrected_is_refused_and_the_store_is_as_it_was(cli, table, message):
    papq.write_table(table, "bad.parquet")
    before = content(cli.folder / "store")
    assert message in cli.refused("correct", "--store", "store", "--source", "bad.parquet").message
    assert content(cli.folder / "store") == before


MISUSED = [
    ([], "Missing option '--store'"),
    (["--store", "store"], "Missing option '--source'"),
    (["--store", "store", "--source", "nowhere.parquet"], "--source"),
    (["--store", "nowhere", "--source", "right.parquet"], "no store there"),
]


@pytest.mark.parametrize(("words", "message"), MISUSED)
def test_misuse_is_explained(cli, words, message):
    assert message in cli.refused("correct", *words).message
