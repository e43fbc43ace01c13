"""``sisa train`` and ``sisa status``: what they answer, where a store may lie, and what a second training refuses."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path
from types import NoneType

import pyarrow as pa
import pyarrow.parquet as papq
import pytest
from cli_kit import (
    CLASSES,
    DELETION,
    Cli,
    assert_fields,
    changed,
    content,
    documented,
    households,
    one_object,
    people,
    prepare,
    process,
)

from sisa.cli.reporting import Bar, Lines

TRAINING = {
    "store": str, "version": int, "records": int, "subjects": int, "holdout_records": int, "shards": int,
    "slices": int, "stages_trained": int, "stages_reused": int, "seconds": float, "metrics": (dict, NoneType),
}  # fmt: skip
STATUS = {
    "version": int, "state": str, "records": int, "subjects": int, "shards": int, "slices": int,
    "requests": [dict], "constituents": [dict],
}  # fmt: skip
CONSTITUENT = {"shard": int, "stage": int, "key": str, "state_digest": str, "records": int, "quarantined": bool}
HEX64 = re.compile(r"[0-9a-f]{64}")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    prepare(folder)
    done = process("train", "recipe.yaml", "--json", folder=folder)
    assert done.returncode == 0, done.stderr
    return folder, one_object(done.stdout)


@pytest.fixture
def cli(capsys, monkeypatch, tmp_path, trained):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    prepare(tmp_path)
    shutil.copytree(trained[0] / "store", tmp_path / "store")
    return Cli(capsys)


def test_training_answers_with_these_fields(trained):
    folder, answer = trained
    assert_fields(answer, TRAINING)
    assert answer.keys() == documented("train")
    assert Path(answer["store"]) == folder / "store"
    assert (answer["version"], answer["shards"], answer["slices"]) == (1, 3, 2)
    assert (answer["stages_trained"], answer["stages_reused"]) == (6, 0)
    out = 2 * len(households(folder / "store", held_out=True))
    assert (answer["records"], answer["subjects"], answer["holdout_records"]) == (60 - out, 30 - out // 2, out)
    assert_fields(answer["metrics"], {"accuracy": float, "log_loss": float, "records": int, "voters": int})
    assert answer["metrics"]["records"] == out
    assert 0 <= answer["metrics"]["accuracy"] <= 1


def test_without_a_holdout_there_are_no_metrics(cli):
    answer = cli.json("train", "recipe.yaml", "--store", "other", "--set", "data.holdout={}")
    assert (answer["metrics"], answer["holdout_records"], answer["records"]) == (None, 0, 60)


def test_training_twice_trains_nothing(cli):
    before = content(cli.folder / "store")
    answer = cli.json("train", "recipe.yaml")
    assert (answer["stages_trained"], answer["stages_reused"], answer["version"]) == (0, 6, 1)
    after = content(cli.folder / "store")
    assert {path for path in before.keys() | after.keys() if before.get(path) != after.get(path)} <= {
        str(cli.folder / "store" / "ledger.db")  # what was looked at is committed once more
    }
    said = cli("train", "recipe.yaml")
    assert said.code == 0
    assert said.out.startswith("nothing to train, 6 were there already")
    assert said.err == ""


def test_words_of_a_first_training(cli):
    said = cli("train", "recipe.yaml", "--store", "file://" + str(cli.folder / "new"))
    assert said.code == 0
    first, second, third = said.out.splitlines()
    assert first.startswith("trained 6 stages, 0 were there already")
    assert re.fullmatch(r".*/new: version 1, \d+ records of \d+ subjects in 3 shards x 2 slices, \d+ held out", second)
    assert re.fullmatch(r"accuracy 0\.\d{4}, log loss \d\.\d{4} on \d+ held-out records \(3 voters\)", third)


def test_status_answers_with_these_fields(cli, trained):
    answer = cli.json("status", "--store", "store")
    assert_fields(answer, STATUS)
    assert answer.keys() == documented("status")
    assert {name: answer[name] for name in ("version", "records", "subjects", "shards", "slices")} == {
        name: trained[1][name] for name in ("version", "records", "subjects", "shards", "slices")
    }
    assert (answer["state"], answer["requests"]) == ("ready", [])
    assert [c["shard"] for c in answer["constituents"]] == [0, 1, 2]
    for constituent in answer["constituents"]:
        assert_fields(constituent, CONSTITUENT)
        assert constituent.keys() == CONSTITUENT.keys()
        assert HEX64.fullmatch(constituent["key"])
        assert HEX64.fullmatch(constituent["state_digest"])
        assert (constituent["stage"], constituent["quarantined"]) == (2, False)
    assert sum(c["records"] for c in answer["constituents"]) == answer["records"]


def test_status_of_one_request_and_of_one_that_is_not_there(cli):
    kept, *_ = households(cli.folder / "store", held_out=False)
    request = cli.json("delete", "--store", "store", "--subject", kept, "--defer", "--reason", "ticket ü 1")["request"]
    answer = cli.json("status", "--store", "store", request)
    assert [r["request"] for r in answer["requests"]] == [request]
    assert_fields(answer["requests"][0], {n: k for n, k in DELETION.items() if n not in {"missing", "seconds"}})
    assert answer["requests"][0]["reason"] == "ticket ü 1"
    assert (answer["state"], [c["quarantined"] for c in answer["constituents"]].count(True)) == ("repair due", 1)
    words = cli("status", "--store", "store", request).out
    assert f"request  {request}\n" in words
    assert "reason  ticket ü 1\n" in words
    assert request in cli("status", "--store", "store").out
    failure = cli.refused("status", "--store", "store", "del-0")
    assert failure.message == "request 'del-0': the store has no such request"
    assert "sisa status" in failure.hint
    assert "not valid Unicode text" in cli.refused("status", "--store", "store", "\udcff").message


def test_status_in_words(cli):
    said = cli("status", "--store", "store")
    assert re.match(r"version 1, ready: \d+ records of \d+ subjects, \d+ held out\n", said.out)
    assert len(re.findall(r"^[012] +## +stage 2 ", said.out, re.MULTILINE)) == 3
    assert said.out.endswith("no deletion requests\n")


@pytest.mark.parametrize(
    ("verb", "more"),
    [("status", []), ("repair", []), ("verify", []), ("delete", ["--subject", "h001"]), ("predict", ["people.parquet", "--output", "o"])],
)  # fmt: skip
@pytest.mark.parametrize(
    ("store", "message"),
    [
        ("absent", "no store there (expected a folder with recipe.yaml)"),
        ("people.parquet", "no store there (expected a folder with recipe.yaml)"),
        (".", "no store there (expected a folder with recipe.yaml)"),
        ("gs://bucket/store", "expected a path, file:// or s3://; other kinds of storage are not supported yet"),
        ("s3://bucket/../store", "'..' can't be part of a prefix"),
        ("s3://", "with the name of a bucket"),
        ("", "store: expected a path, got an empty text"),
    ],
)
def test_there_is_no_store(cli, verb, more, store, message):
    # recipe.yaml lies in the current folder: a folder that holds nothing of a store but that.
    (cli.folder / "recipe.yaml").rename(cli.folder / "my.yaml")
    failure = cli.refused(verb, "--store", store, *more)
    assert message in failure.message
    assert failure.hint


@pytest.mark.parametrize(
    ("store", "message"),
    [
        ("people.parquet", "expected a folder, found a file"),
        ("people.parquet/deep/er", "people.parquet' is a file, expected a folder"),
        ("foreign", "the folder is not empty and not a store (it holds 'thesis.doc')"),
        ("gs://bucket/store", "other kinds of storage are not supported yet"),
        ("s3://bucket/store", "ledger: missing; a store in object storage needs it"),
        ("", "store: expected a path, got an empty text"),
    ],
)
def test_a_store_can_not_be_made_there(cli, store, message):
    (cli.folder / "foreign").mkdir()
    (cli.folder / "foreign" / "thesis.doc").write_text("years of work")
    before = content(cli.folder)
    failure = cli.refused("train", "recipe.yaml", "--store", store)
    assert message in failure.message
    assert failure.hint
    assert content(cli.folder) == before


def test_a_folder_that_can_not_be_written_to_is_the_callers_mistake(cli):
    # A file system that takes no folders refuses root as well, whom modes don't stop.
    failure = cli.refused("train", "recipe.yaml", "--store", "/proc/sisa-store")
    assert failure.message.startswith("store '/proc/sisa-store': the folder can't be made: ")
    assert failure.hint == "Choose a place that you may write to."


def test_an_empty_folder_may_become_a_store(cli):
    (cli.folder / "empty").mkdir()
    assert cli.json("train", "recipe.yaml", "--store", "empty")["version"] == 1


def test_no_store_is_named(cli):
    failure = cli.refused("train", "recipe.yaml", "--set", "store=null")
    assert failure.message == "store: missing"
    assert "--store" in failure.hint


@pytest.mark.parametrize(
    ("overrides", "differences"),
    [
        (["training.epochs=3"], ["training.epochs: the store has 2, asked for 3"]),
        (
            ["training.optimizer.lr=0.1", "model.dropout=0.5", "sisa.shards=4"],
            [
                "model.dropout: the store has 0.0, asked for 0.5",
                "sisa.shards: the store has 3, asked for 4",
                "training.optimizer.lr: the store has 0.05, asked for 0.1",
            ],
        ),
        (["sisa.aggregation=vote"], ["sisa.aggregation: the store has 'mean', asked for 'vote'"]),
        (["data.subject_id=person"], ["data.subject_id: the store has 'household', asked for 'person'"]),
        (
            ["training.schedule={name: cosine}"],
            ["training.schedule.name: the store has nothing, asked for 'cosine'"],
        ),
        (
            ["data.features=[age, hours]"],
            [
                "data.columns.job.type: the store has 'categorical', asked for nothing",
                "data.features: the store has ['age', 'hours', 'job'], asked for ['age', 'hours']",
            ],
        ),
        (["data.classes=['>50K', '<=50K']"], [f"data.classes: the store has {CLASSES}, asked for {CLASSES[::-1]}"]),
    ],
)  # fmt: skip
def test_another_recipe_than_the_stores_is_refused_with_the_difference(cli, overrides, differences):
    before = content(cli.folder / "store")
    failure = cli.refused("train", "recipe.yaml", *(word for o in overrides for word in ("--set", o)))
    head, *listed = failure.message.splitlines()
    assert "was trained under another recipe" in head
    assert [line.removeprefix("  - ") for line in listed] == differences
    assert "recipe.yaml in the store" in failure.hint
    assert content(cli.folder / "store") == before


def test_another_routing_key_than_the_stores_is_refused(cli):
    (cli.folder / "routing.key").write_text("ab" * 32)
    failure = cli.refused("train", "recipe.yaml")
    assert "is not the key that this store was made with" in failure.message


def test_what_does_not_determine_training_may_differ(cli):
    papq.write_table(people(), cli.folder / "elsewhere.parquet")
    words = ["--set", "data.source=elsewhere.parquet", "--set", "routing.key_file=null", "--workers", "1"]
    assert cli.json("train", "recipe.yaml", *words)["stages_trained"] == 0


def test_new_and_changed_rows_are_refused_with_their_counts(cli):
    table = changed(people(), age=[age + 1 if i < 3 else age for i, age in enumerate(people()["age"].to_pylist())])
    more = changed(people().slice(0, 2), person=["new1", "new2"])
    papq.write_table(pa.concat_tables([table, more]), cli.folder / "people.parquet")
    before = content(cli.folder / "store")
    failure = cli.refused("train", "recipe.yaml")
    assert "2 new and 3 changed records" in failure.message
    assert "training neither adds nor corrects; nothing was changed" in failure.message
    assert "sisa add" in failure.hint
    assert content(cli.folder / "store") == before


def test_a_row_that_came_twice_is_refused(cli):
    papq.write_table(pa.concat_tables([people(), people().slice(5, 1)]), cli.folder / "people.parquet")
    assert "'person' must not repeat" in cli.refused("train", "recipe.yaml").message


def test_missing_rows_are_reported_and_kept(cli, trained):
    papq.write_table(people().slice(7), cli.folder / "people.parquet")
    said = cli("train", "recipe.yaml", "--json")
    answer = one_object(said.out)
    assert (said.code, answer["records"], answer["missing_from_source"]) == (0, trained[1]["records"], 7)
    assert said.err == "7 records of the store are missing from the source; they are kept: only `sisa delete` deletes\n"


def test_rows_of_deleted_people_are_neither_new_nor_brought_back(cli):
    kept, *_ = households(cli.folder / "store", held_out=False)
    cli.json("delete", "--store", "store", "--subject", kept)
    records = cli.json("status", "--store", "store")["records"]
    answer = cli.json("train", "recipe.yaml")
    assert (answer["stages_trained"], answer["records"]) == (0, records)


def test_a_bar_for_a_terminal_leaves_stdout_alone(cli, monkeypatch):
    monkeypatch.setattr("sisa.cli.train.reporter", Bar)
    papq.write_table(people().slice(3), cli.folder / "people.parquet")
    assert cli.json("train", "recipe.yaml", "--store", "new")["stages_trained"] == 6
    said = cli("train", "recipe.yaml", "--json")
    assert one_object(said.out)["missing_from_source"] == 3
    assert "3 records of the store are missing" in said.err


def test_long_work_is_told_line_by_line_where_there_is_no_terminal(capsys, monkeypatch):
    clock = iter(range(0, 1000, 6))
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    lines = Lines()
    lines.begin("training", 200)
    for _ in range(4):
        lines.advance(50)
    lines.end()
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines()[0].startswith("training: 25 %, ")
    assert re.fullmatch(r"training: done in \d+\.0 s", err.splitlines()[-1])
