"""A user's own model from the current folder, and the same bits wherever a chain runs."""

from __future__ import annotations

import json
import shutil
import sys

import pytest
from cli_kit import Cli, one_object, prepare, process

FACTORY = '''
"""A model of somebody's own."""

from shopfloor_layers import head
from torch import nn


def build(feature_shape, class_count, width=8):
    return nn.Sequential(nn.Linear(feature_shape[0], width), nn.BatchNorm1d(width), nn.Dropout(0.2), head(width, class_count))
'''
LAYERS = '''
"""What that model imports."""

from torch import nn


def head(width, class_count):
    return nn.Linear(width, class_count)
'''
MODEL = {"name": None, "hidden": None, "activation": None, "factory": "shopfloor:build", "options": {"width": 5}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a recipe, a model and a store that was trained by a process of its own."""
    folder = tmp_path_factory.mktemp("shop")
    (folder / "shopfloor.py").write_text(FACTORY)
    (folder / "shopfloor_layers.py").write_text(LAYERS)
    prepare(folder, model=MODEL)
    done = process("train", "recipe.yaml", "--executor", "inline", "--json", folder=folder)
    assert done.returncode == 0, done.stderr
    assert one_object(done.stdout)["stages_trained"] == 6
    return folder


@pytest.fixture
def cli(capsys, monkeypatch, tmp_path, folder):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    yield Cli(capsys)
    for name in ("shopfloor", "shopfloor_layers"):
        sys.modules.pop(name, None)


def digests(answer):
    return [(c["shard"], c["key"], c["state_digest"]) for c in answer["constituents"]]


def test_a_model_from_the_current_folder_does_everything(cli):
    assert cli.json("train", "recipe.yaml")["stages_trained"] == 0
    answer = cli.json("delete", "--store", "store", "--record", "p000", "p031", "p042")
    assert answer["state"] == "repaired"
    assert cli.json("predict", "--store", "store", "people.parquet", "--output", "out.parquet")["rows"] == 60
    assert cli.json("verify", "--store", "store", "--replay", "all")["stages_replayed"] == 6


@pytest.mark.parametrize("name", ["shopfloor.py", "shopfloor_layers.py"])
def test_a_model_that_changed_is_refused_and_upgraded(cli, name):
    source = cli.folder / name
    source.write_text(source.read_text() + "\n# another thought\n")
    failure = cli.refused("train", "recipe.yaml")
    assert "the training code or the source of model.factory changed" in failure.message
    assert "--upgrade" in failure.hint
    answer = cli.json("delete", "--store", "store", "--subject", "h001", "h002", "h003", "h004")
    assert (answer["state"], answer["version_after"]) == ("stages_purged", None)
    assert "model.factory changed" in answer["note"]
    found = cli.json("verify", "--store", "store", "--replay", "1", code=1)
    assert found["comparison"] == "distributional, not bitwise"
    assert any("distributional, not bitwise" in problem for problem in found["problems"])
    assert cli.json("train", "recipe.yaml", "--upgrade")["stages_trained"] == 6
    assert cli.json("verify", "--store", "store", "--replay", "all")["ok"]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (None, "model.factory: the source of 'shopfloor' can't be found"),
        ("def build(:\n", "model.factory: shopfloor.py, line 1: invalid syntax"),
    ],
)
def test_a_model_that_is_gone_or_broken_stops_no_deletion(cli, source, message):
    if source is None:
        (cli.folder / "shopfloor.py").unlink()
    else:
        (cli.folder / "shopfloor.py").write_text(source)
    for verb, words in (("repair", []), ("predict", ["people.parquet", "--output", "out.parquet"])):
        assert message in cli.refused(verb, "--store", "store", *words).message
    answer = cli.json("delete", "--store", "store", "--subject", "h001", "h002", "h003", "h004")
    assert (answer["state"], answer["version_after"]) == ("stages_purged", None)
    assert message in answer["note"]
    assert cli.json("status", "--store", "store")["state"] == "repair due"
    found = cli.json("verify", "--store", "store", "--replay", "all", code=1)
    assert [message in problem for problem in found["problems"]] == [True]


@pytest.mark.ray
def test_a_model_from_the_current_folder_trains_on_ray_to_the_same_bits(folder, tmp_path):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("store"))
    done = process("train", "recipe.yaml", "--executor", "ray", "--workers", "2", "--json", folder=tmp_path)
    assert (done.returncode, "Traceback" in done.stderr) == (0, False), done.stderr
    answer = one_object(done.stdout)
    assert (answer["stages_trained"], answer["records"]) == (
        6,
        sum(c["records"] for c in status(tmp_path)["constituents"]),
    )
    assert digests(status(tmp_path)) == digests(status(folder))


def status(folder):
    return json.loads(process("status", "--store", "store", "--json", folder=folder).stdout)
