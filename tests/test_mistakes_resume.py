"""Checkpoints that hold weights only, and recoveries that repeat, restart or leave something behind."""

from __future__ import annotations

import json

import numpy as np
import pytest
import tables
from store_kit import assert_same, at, copied, digests, files, scratch, slices, stage_folder, train, write

import sisa
from sisa.cli.main import run
from sisa.state import StageState
from sisa.training import chain
from sisa.training import stage as stage_module
from sisa.training.order import batch_sizes

TABLE = tables.binary()
RECIPES = {
    "adam, statistics, dropout, a schedule": tables.binary_recipe(),
    "adamw that remembers maxima, cosine": tables.binary_recipe(
        training={"optimizer": {"name": "adamw", "lr": 0.01, "amsgrad": True}, "schedule": {"name": "cosine"}}
    ),
    "momentum after nesterov, steps": tables.binary_recipe(
        training={
            "optimizer": {"name": "sgd", "lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01},
            "schedule": {"name": "step", "step_size": 2, "gamma": 0.5},
        }
    ),
    "classes of torch": tables.binary_recipe(
        training={
            "optimizer": {"name": "torch.optim.RMSprop", "lr": 0.01, "momentum": 0.5, "centered": True},
            "schedule": {"name": "torch.optim.lr_scheduler.CosineAnnealingWarmRestarts", "T_0": 3},
        }
    ),
}


@pytest.fixture(scope="module", params=RECIPES)
def task(request, tmp_path_factory):
    """A recipe, and the store that was trained with it without a stop."""
    recipe = RECIPES[request.param]
    return recipe, train(tmp_path_factory.mktemp("trained"), recipe, TABLE)


def killed_at(monkeypatch, shard, stage, *, after_epochs=None):
    """End the process, as far as a test can, when a stage begins or in the middle of it."""
    real, real_epoch, begun = chain.train_stage, stage_module._Run.epoch, []

    def begin(**arguments):
        begun[:] = [(arguments["shard"], arguments["stage"]), 0]
        if begun[0] == (shard, stage) and after_epochs is None:
            raise KeyboardInterrupt
        return real(**arguments)

    def epoch(self, *arguments):
        if begun[0] == (shard, stage) and begun[1] == after_epochs:
            raise KeyboardInterrupt
        begun[1] += 1
        real_epoch(self, *arguments)

    monkeypatch.setattr(chain, "train_stage", begin)
    monkeypatch.setattr(stage_module._Run, "epoch", epoch)


def held(store, shard, stage):
    (row,) = [row for row in store.opened.ledger.stages.all(shard) if row.stage == stage]
    identity = next(i for i in store.opened.checkpoints.list_shard(shard) if i.key == row.key)
    return store.opened.checkpoints.load(identity)


# --- 4 ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", [2, 3])
def test_4_weights_only_checkpoints_resume_elsewhere(task, tmp_path, monkeypatch, stage):
    """Killed before a stage, gone on later: bit for bit what never stopping gives."""
    recipe, straight = task
    asked = at(tmp_path, recipe, write(TABLE, tmp_path / "all.parquet"))
    killed_at(monkeypatch, 0, stage)
    with pytest.raises(KeyboardInterrupt):
        sisa.train(asked, store=tmp_path / "store", executor="inline")
    monkeypatch.undo()
    resumed = sisa.train(asked, store=tmp_path / "store", executor="inline")
    assert 0 < resumed.training.stages_reused < 6
    assert resumed.training.stages_trained + resumed.training.stages_reused == 6
    assert_same(resumed, straight)


@pytest.mark.parametrize("slice_", [2, 3])
def test_4_a_deletion_resumes_from_the_whole_state_of_the_stage_before(task, tmp_path, slice_):
    recipe, straight = task
    store = copied(straight, tmp_path)
    victim = slices(store)[1, slice_][0]
    store.delete(records=[victim], executor="inline")
    scratch(store, tmp_path, recipe, tables.without(TABLE, records=[victim]))


@pytest.mark.parametrize("part", ["optimizer.", "buffer.", "schedule.", "preprocess.", "model."])
def test_4_every_part_of_a_state_is_used_by_the_next_stage(tmp_path, monkeypatch, part):
    """Whatever a stage keeps is not kept in vain: with another value the next one gives other bits."""
    recipe = RECIPES["adam, statistics, dropout, a schedule"]
    straight = train(tmp_path, recipe, TABLE, name="straight")
    real = chain.train_stage

    def altered(**arguments):
        parent = arguments["parent"]
        if (arguments["shard"], arguments["stage"]) == (1, 3):
            tensors, scalars = dict(parent.tensors), dict(parent.scalars)
            for name, array in parent.tensors.items():
                if name.startswith(part) and array.dtype.kind == "f":
                    tensors[name] = array * np.array(1.25, array.dtype)
            if part == "schedule.":
                scalars["schedule.epoch"] += 1
            arguments["parent"] = StageState(tensors, scalars)
        return real(**arguments)

    monkeypatch.setattr(chain, "train_stage", altered)
    other = train(tmp_path, recipe, TABLE, name="other")
    differing = {place for place, row in digests(other).items() if row != digests(straight)[place]}
    assert differing == {(1, 3)}


def test_4_no_stream_of_random_numbers_runs_on_from_stage_to_stage(tmp_path, monkeypatch):
    """Dropout draws from what its epoch was seeded with: draws before, after or between change nothing."""
    import torch

    recipe = RECIPES["adam, statistics, dropout, a schedule"]
    straight = train(tmp_path, recipe, TABLE, name="straight")
    real = chain.train_stage

    def disturbed(**arguments):
        torch.rand(arguments["stage"] * 17)
        np.random.rand(3)  # noqa: NPY002
        return real(**arguments)

    monkeypatch.setattr(chain, "train_stage", disturbed)
    torch.manual_seed(123)
    assert_same(train(tmp_path, recipe, TABLE, name="disturbed"), straight)


# --- 6 ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("after_epochs", [0, 1])
def test_6_a_recovery_that_repeats_a_finished_epoch(tmp_path, monkeypatch, after_epochs):
    """Killed within a stage: it begins again from the stage before, so that no record is seen once too often."""
    recipe = tables.binary_recipe(training={"epochs": 5})
    asked = at(tmp_path, recipe, write(TABLE, tmp_path / "all.parquet"))
    killed_at(monkeypatch, 1, 2, after_epochs=after_epochs)
    with pytest.raises(KeyboardInterrupt):
        sisa.train(asked, store=tmp_path / "store", executor="inline")
    monkeypatch.undo()
    store = sisa.train(asked, store=tmp_path / "store", executor="inline")
    assert_same(store, train(tmp_path, recipe, TABLE, name="straight"))
    sizes = {place: len(records) for place, records in slices(store).items()}
    for shard in (0, 1):
        steps = 0
        for stage, epochs in enumerate([2, 3, 2], start=1):
            records = sum(sizes[shard, slice_] for slice_ in range(1, stage + 1))
            steps += epochs * len(batch_sizes(records=records, batch_size=4))
            manifest, state = held(store, shard, stage)
            assert (manifest.epochs, manifest.records) == (epochs, records)
            assert state.tensors["optimizer.0.weight.step"] == steps
            assert state.tensors["buffer.1.num_batches_tracked"] == steps
            assert state.scalars["schedule.epoch"] == sum([2, 3, 2][:stage])


@pytest.mark.parametrize("where", ["begin", "middle", "publish"])
def test_6_recovery_files_that_are_left_behind(tmp_path, monkeypatch, where):
    """After a kill nothing lies beside the finished stages that a later command doesn't take away."""
    recipe = RECIPES["adam, statistics, dropout, a schedule"]
    asked = at(tmp_path, recipe, write(TABLE, tmp_path / "all.parquet"))
    if where == "publish":
        from sisa.checkpoints import stage as writing

        def killed(*_):
            raise SystemExit  # what a stage left so far stays, as after a kill

        monkeypatch.setattr(writing, "publish_folder", killed)
        monkeypatch.setattr(writing, "remove", lambda _: None)
        with pytest.raises(SystemExit):
            sisa.train(asked, store=tmp_path / "store", executor="inline")
        assert list((tmp_path / "store" / "checkpoints").rglob("tmp-*"))
    else:
        killed_at(monkeypatch, 0, 2, after_epochs=None if where == "begin" else 1)
        with pytest.raises(KeyboardInterrupt):
            sisa.train(asked, store=tmp_path / "store", executor="inline")
    monkeypatch.undo()
    store = sisa.train(asked, store=tmp_path / "store", executor="inline")
    assert not list((tmp_path / "store").rglob("tmp-*"))
    assert not store.opened.checkpoints.strays()
    found = store.verify(replay="all", executor="inline")
    assert found.ok, found.problems


def test_6_a_stage_that_was_published_but_not_entered_is_verified_before_it_is_used(tmp_path, monkeypatch, capsys):
    """Killed between the two: the next training takes it if it is whole, and says so if it isn't."""
    recipe = RECIPES["adam, statistics, dropout, a schedule"]
    straight = train(tmp_path, recipe, TABLE, name="straight")
    asked = at(tmp_path, recipe, tmp_path / "straight.parquet")
    from sisa.ledger.stages import Stages

    def killed(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(Stages, "enter_all", killed)
    with pytest.raises(KeyboardInterrupt):
        sisa.train(asked, store=tmp_path / "store", executor="inline")
    monkeypatch.undo()
    store = sisa.open_store(tmp_path / "store")
    assert not store.opened.ledger.stages.all()
    (orphan,) = store.opened.checkpoints.all_stages()
    whole = files(store.opened.checkpoints.path(orphan))
    other = copied(store, tmp_path, name="truncated")
    (chunk,) = other.opened.checkpoints.path(orphan).rglob("c.*")
    chunk.write_bytes(chunk.read_bytes()[:-8])

    resumed = sisa.train(asked, store=tmp_path / "store", executor="inline")
    assert files(store.opened.checkpoints.path(orphan)) == whole
    assert_same(resumed, straight)

    config = tmp_path / "config.yaml"
    config.write_text(json.dumps(asked))
    words = ["--store", str(tmp_path / "truncated"), "--executor", "inline"]
    assert run(["train", str(config), *words]) == 3
    assert f"stage {orphan.stage} of shard {orphan.shard}" in capsys.readouterr().err
    assert run(["repair", *words]) == 0
    assert run(["train", str(config), *words]) == 0
    assert_same(sisa.open_store(tmp_path / "truncated"), straight)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_6_a_missing_checkpoint_restarts_from_random_weights(tmp_path, stage):
    """Only a repair retrains it, from the last good stage, to the bits it had; a training refuses."""
    recipe = RECIPES["adam, statistics, dropout, a schedule"]
    straight = train(tmp_path, recipe, TABLE, name="straight")
    store = copied(straight, tmp_path)
    sisa.files.remove(stage_folder(store, 1, stage))
    asked = at(tmp_path, recipe, tmp_path / "straight.parquet")
    with pytest.raises(sisa.errors.DamagedError, match=f"stage {stage} of shard 1 is missing"):
        sisa.train(asked, store=tmp_path / "copy", executor="inline")
    victim = slices(store)[1, 3][0]
    if stage < 3:
        with pytest.raises(sisa.errors.DamagedError):
            store.delete(records=[victim], executor="inline")
    else:
        store.delete(records=[victim], executor="inline")  # it was to go anyway
    done = store.repair(executor="inline")
    assert done.stages_retrained == (2 if stage < 3 else 0)
    scratch(store, tmp_path, recipe, tables.without(TABLE, records=[victim]))
    assert store.verify(replay="all", executor="inline").ok
