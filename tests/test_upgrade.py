"""Code, model source or platform changed since the training: forgetting goes on, retraining waits for an upgrade."""

from __future__ import annotations

from pathlib import Path

import pyarrow.compute as pc
import pytest
from store_kit import at, scratch, train, write
from tables import binary, binary_recipe

import sisa
from sisa.errors import FootingError
from sisa.store.store import Store

MODEL = """
import torch

def build(shape, classes):
    return torch.nn.Sequential(torch.nn.Linear(shape[0], {width}), torch.nn.Tanh(), torch.nn.Linear({width}, classes))
"""


@pytest.fixture
def factory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A user's model in a module of its own; `edit` changes its source."""
    name = f"model_of_{tmp_path.name}".replace("-", "_")
    (tmp_path / f"{name}.py").write_text(MODEL.format(width=5))
    monkeypatch.syspath_prepend(str(tmp_path))
    return name


def edit(tmp_path: Path, factory: str, *, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Change the model's source, as a release between training and repair would."""
    (tmp_path / f"{factory}.py").write_text(MODEL.format(width=width))
    monkeypatch.delitem(__import__("sys").modules, factory, raising=False)
    __import__("importlib").invalidate_caches()


def recipe_of(factory: str) -> dict[str, object]:
    """The usual recipe with the user's model."""
    return {**binary_recipe(), "model": {"factory": f"{factory}:build"}}


def somebody(store: Store) -> str:
    """A person whose rows were trained on in the first slice of shard 0."""
    from sisa.records.partition import present_ids

    return str(present_ids(store.opened.layout, 0, 1)[1][0].as_py())


def test_a_changed_model_defers_the_repair_and_never_the_forgetting(
    tmp_path: Path, factory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, table = recipe_of(factory), binary()
    store = train(tmp_path, recipe, table)
    old = {row.key for row in store.opened.ledger.stages.all()}
    leaver = somebody(store)
    edit(tmp_path, factory, width=7, monkeypatch=monkeypatch)

    deleted = store.delete(subjects=[leaver], executor="inline")
    assert deleted.state == "stages_purged"
    assert deleted.version_after is None
    assert "model.factory changed" in deleted.note
    assert store.status()["constituents"][0]["stage"] == 0
    with pytest.raises(FootingError, match=r"model\.factory changed"):
        store.repair(executor="inline")
    source = write(table, tmp_path / "store.parquet")
    with pytest.raises(FootingError):
        sisa.train(at(tmp_path, recipe, source), store=tmp_path / "store", executor="inline")

    upgraded = sisa.train(at(tmp_path, recipe, source), store=tmp_path / "store", executor="inline", upgrade=True)
    assert upgraded.training is not None
    assert upgraded.training.stages_trained == store.opened.shards * store.opened.slices
    assert upgraded.request(deleted.request).state == "repaired"
    assert not old & {row.key for row in upgraded.opened.ledger.stages.all()}
    assert not old & {stage.key for stage in upgraded.opened.checkpoints.all_stages()}
    assert upgraded.verify(replay="all", executor="inline").problems == []
    survivors = table.filter(pc.not_equal(table["record"], int(leaver)))
    scratch(upgraded, tmp_path, recipe, survivors)


def test_another_platform_is_told_apart_and_bits_are_not_claimed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = train(tmp_path, binary_recipe(), binary())
    leaver = somebody(store)
    from sisa.training import platform

    real = platform._process
    monkeypatch.setattr(platform, "_process", lambda: {**real(), "torch": "9.9.9"})
    found = store.verify(replay="all", executor="inline")
    assert not found.ok
    assert found.stages_replayed == 0
    assert any("distributional, not bitwise" in problem and "torch" in problem for problem in found.problems)
    assert store.verify(executor="inline").problems == []  # digests and rows are checked all the same

    deleted = store.delete(subjects=[leaver], executor="inline")
    assert (deleted.state, deleted.version_after) == ("stages_purged", None)
    assert "torch was" in deleted.note
    source = tmp_path / "store.parquet"
    upgraded = sisa.train(
        at(tmp_path, binary_recipe(), source), store=tmp_path / "store", executor="inline", upgrade=True
    )
    assert upgraded.verify(replay="all", executor="inline").problems == []
    assert {row.platform for row in upgraded.opened.ledger.stages.all()} == {upgraded.opened.ledger.footing()[1]}


def test_an_upgrade_that_fails_half_way_leaves_the_old_ensemble_live(
    tmp_path: Path, factory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, table = recipe_of(factory), binary()
    store = train(tmp_path, recipe, table)
    before = store.status()["constituents"]
    edit(tmp_path, factory, width=7, monkeypatch=monkeypatch)
    from sisa.training import chain

    real = chain.train_stage

    def failing(**arguments: object) -> object:
        if arguments["shard"] == 1:
            raise RuntimeError("out of luck")
        return real(**arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(chain, "train_stage", failing)
    source = write(table, tmp_path / "store.parquet")
    with pytest.raises(sisa.errors.UserError, match="RuntimeError at"):
        sisa.train(at(tmp_path, recipe, source), store=tmp_path / "store", executor="inline", upgrade=True)
    assert sisa.open_store(tmp_path / "store").status()["constituents"] == before
    monkeypatch.setattr(chain, "train_stage", real)
    upgraded = sisa.train(at(tmp_path, recipe, source), store=tmp_path / "store", executor="inline", upgrade=True)
    assert upgraded.training is not None
    assert upgraded.training.stages_reused > 0  # what the first try had finished
    assert upgraded.verify(replay="all", executor="inline").problems == []


def test_weights_are_not_put_into_another_model(tmp_path: Path, factory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    train(tmp_path, recipe_of(factory), binary())
    edit(tmp_path, factory, width=5, monkeypatch=monkeypatch)
    sisa.open_store(tmp_path / "store").predict_proba(binary().select(["x"]))  # the same source again
    source = (tmp_path / f"{factory}.py").read_text().replace("Tanh", "ReLU")
    (tmp_path / f"{factory}.py").write_text(source)
    with pytest.raises(FootingError, match=r"model\.factory"):
        sisa.open_store(tmp_path / "store").predict_proba(binary().select(["x"]))


def test_a_training_killed_before_its_footing_was_written_is_repaired(tmp_path: Path) -> None:
    store = train(tmp_path, binary_recipe(), binary())
    database = store.opened.ledger.database
    with database.transaction():  # as it is between the end of the ingest and the first stage
        for statement in (
            "DELETE FROM facts WHERE name IN ('code', 'platform', 'fingerprint')",
            "DELETE FROM stages",
            "DELETE FROM versions",
            "DELETE FROM members",
            "DELETE FROM events WHERE kind <> 'ingested'",
            "UPDATE counters SET last = 1 WHERE name = 'events'",
        ):
            database.rows(statement)
    store.opened.checkpoints.sweep(0, keep=lambda _: False)
    store.opened.checkpoints.sweep(1, keep=lambda _: False)
    store.repair(executor="inline")
    assert store.verify(replay="all", executor="inline").problems == []
