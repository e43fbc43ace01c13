"""Where answers are written, and when they get their name: never over the store, never after a quarantine."""

from __future__ import annotations

import os
import shutil
import sys
import threading
from pathlib import Path

import numpy as np
import pyarrow.parquet as papq
import pytest
import tables
from cli_kit import Cli, content
from store_kit import copied, slices, train, write

import sisa
from sisa import files
from sisa.deletion.accept import accept
from sisa.store.predict import predict_table

RECIPE = tables.binary_recipe()
TABLE = tables.binary()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return train(tmp_path_factory.mktemp("trained"), RECIPE, TABLE)


@pytest.fixture
def store(trained, tmp_path):
    return copied(trained, tmp_path)


def accepted(store):
    """Somebody else's deletion, up to the acknowledgement; returns the quarantine's version."""
    other = sisa.open_store(store.opened.layout.root)
    accept(other.opened, records=[slices(store)[0, 1][0]])
    return other.version


@pytest.mark.parametrize("name", ["answers.parquet", "asked.parquet"])
def test_a_quarantine_while_answers_are_made_durable_voids_them(store, tmp_path, monkeypatch, name):
    """Nothing of them is left, whether they were to replace their own input or something else."""
    source = write(TABLE, tmp_path / "asked.parquet")
    real, quarantine = files.fsync_path, []

    def overtaken(path):
        real(path)
        if path.parent == tmp_path and path.name.startswith("tmp-") and not quarantine:
            quarantine.append(accepted(store))

    monkeypatch.setattr(files, "fsync_path", overtaken)
    said = predict_table(store, str(source), tmp_path / name)
    answers = papq.read_table(tmp_path / name)
    assert quarantine == [store.version]
    assert set(answers["version"].to_pylist()) == {said.version} == {store.version}
    assert said.voters == 1
    assert np.array_equal(np.array(answers["scores"].to_pylist()), store.predict_proba(TABLE))
    assert not list(tmp_path.glob("tmp-*"))


def test_no_deletion_is_acknowledged_between_the_last_look_and_the_name(store, tmp_path, monkeypatch):
    source, target = write(TABLE, tmp_path / "asked.parquet"), tmp_path / "answers.parquet"
    real, there = os.replace, []

    def accepting():
        accepted(store)
        there.append(target.exists())

    deletion = threading.Thread(target=accepting)

    def slow(scratch, path):
        if Path(path) == target:
            deletion.start()
            deletion.join(timeout=0.5)
        real(scratch, path)

    monkeypatch.setattr(os, "replace", slow)
    assert predict_table(store, str(source), target).version == 1
    deletion.join(timeout=30)
    assert there == [True]


@pytest.fixture
def cli(capsys, monkeypatch, tmp_path, store):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    store.close()
    shutil.move(tmp_path / "copy", tmp_path / "store")
    write(TABLE, tmp_path / "input.parquet")
    (tmp_path / "link").symlink_to("store")
    (tmp_path / "inner").symlink_to("store/records")
    return Cli(capsys)


@pytest.mark.parametrize("named", ["store", "link"])
@pytest.mark.parametrize(
    "output",
    [
        "store/ledger.db",
        "store/answers.parquet",
        "store/records/answers.parquet",
        "store/keys/routing.key",
        "store/../store/recipe.yaml",
        "link/ledger.db",
        "inner/answers.parquet",
    ],
)
def test_an_output_in_the_store_is_refused_whatever_way_leads_there(cli, output, named):
    before = content(cli.folder)
    failure = cli.refused("predict", "--store", named, "input.parquet", "--output", output)
    assert failure.message == f"--output {output!r}: lies in the store, whose files are its own"
    assert content(cli.folder) == before


def test_an_output_beside_the_store_or_through_it_is_none_in_it(cli):
    for output in ("store-answers.parquet", "store/../answers.parquet"):
        assert cli.json("predict", "--store", "store", "input.parquet", "--output", output)["rows"] == TABLE.num_rows


def test_a_link_to_a_file_of_the_store_is_replaced_and_not_what_it_names(cli):
    (cli.folder / "out.parquet").symlink_to("store/ledger.db")
    before = content(cli.folder / "store")
    cli.json("predict", "--store", "store", "input.parquet", "--output", "out.parquet")
    assert not (cli.folder / "out.parquet").is_symlink()
    assert content(cli.folder / "store") == before
