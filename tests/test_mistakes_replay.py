"""A replay that secretly uses the cache, and retraining more than was due."""

from __future__ import annotations

import sqlite3

import numpy as np
import pytest
import tables
import torch
from independent_trainer import train_shard
from store_kit import KEY, again, copied, digests, files, scratch, slices, stage_folder, state_digests, train, write
from torch import nn

import sisa
from sisa.checkpoints import StageId
from sisa.state import StageState, full_digest, state_digest
from sisa.training import chain


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("replay")


@pytest.fixture(scope="module")
def trained(home):
    return train(home, tables.mixed_recipe(), tables.mixed(), name="trained")


@pytest.fixture
def store(trained, tmp_path):
    return copied(trained, tmp_path)


@pytest.fixture
def stages_run(monkeypatch):
    """(shard, stage) of each training that really ran in this process."""
    ran = []
    real = chain.train_stage

    def counted(**arguments):
        ran.append((arguments["shard"], arguments["stage"]))
        return real(**arguments)

    monkeypatch.setattr(chain, "train_stage", counted)
    return ran


def held(store, shard, stage):
    """A stage as it lies in the store."""
    (row,) = [row for row in store.opened.ledger.stages.all(shard) if row.stage == stage]
    identity = StageId(shard, stage, row.key, row.platform)
    return row, identity, store.opened.checkpoints.load(identity)[1]


# --- 12: the trainer that shares nothing with ours -------------------------------------------------


def mlp(width):
    model = nn.Sequential(nn.Linear(width, 6), nn.Tanh(), nn.Linear(6, 3))
    return model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def with_statistics_and_dropout(width):
    model = nn.Sequential(nn.Linear(width, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.3), nn.Linear(6, 2))
    return model, torch.optim.Adam(model.parameters(), lr=0.01)


class Images(nn.Sequential):
    def forward(self, X):
        return super().forward(X.view(-1, 6, 6, 2).permute(0, 3, 1, 2))


def cnn(_):
    convolutions = [nn.Conv2d(2, 3, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    convolutions += [nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    model = Images(*convolutions, nn.Flatten(), nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 10))
    model = model.to(memory_format=torch.channels_last)
    return model, torch.optim.SGD(model.parameters(), lr=0.05)


TASKS = {
    "mixed": (tables.mixed_recipe(), tables.mixed(), mlp, 1.0),
    "binary": (tables.binary_recipe(), tables.binary(), with_statistics_and_dropout, 0.8),
    "images": (tables.images_recipe(), tables.images(), cnn, 1.0),
}


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", TASKS)
def test_12_a_from_scratch_that_shares_code_with_what_it_checks(tmp_path, name):
    recipe, table, build, gamma = TASKS[name]
    store = train(tmp_path, recipe, table)
    everybody = slices(store)
    victims = [*everybody[0, 1], everybody[1, 1][0]]  # one shard begins with its second slice
    store.delete(records=victims, executor="inline")
    source = write(tables.without(table, records=victims), tmp_path / "rest.parquet")
    for shard in range(2):
        theirs = list(train_shard(source, recipe, KEY, shard, build=build, gamma=gamma))
        assert len(theirs) == recipe["sisa"]["slices"]
        for stage, weights in enumerate(theirs, start=1):
            ours = held(store, shard, stage)[2].tensors
            assert weights.keys() == {n for n in ours if n.startswith(("model.", "buffer."))}
            for tensor, values in weights.items():
                assert values.dtype == ours[tensor].dtype
                assert np.ascontiguousarray(values).tobytes() == ours[tensor].tobytes(), (shard, stage, tensor)


# --- 12: replay ------------------------------------------------------------------------------------


def test_12_a_replay_trains_every_stage_of_every_shard(store, stages_run):
    found = store.verify(replay="all", executor="inline")
    assert (found.ok, found.stages_replayed, found.comparison) == (True, 6, "bitwise")
    assert sorted(stages_run) == [(shard, stage) for shard in (0, 1) for stage in (1, 2, 3)]


def test_12_a_replay_of_some_trains_these_from_their_first_stage(store, stages_run):
    found = store.verify(replay=1, executor="inline")
    assert (found.ok, found.stages_replayed) == (True, 3)
    assert stages_run == [(found.replayed_shards[0], stage) for stage in (1, 2, 3)]


def test_12_a_replay_reads_no_checkpoint(store, monkeypatch):
    """Every stage of the store is made unreadable while the replay trains."""
    from sisa.proof import replay as proof

    real = proof.build

    def blind(opened, plan, **options):
        hidden = opened.layout.checkpoints.rename(opened.layout.root / "away")
        try:
            return real(opened, plan, **options)
        finally:
            hidden.rename(opened.layout.checkpoints)

    monkeypatch.setattr(proof, "build", blind)
    found = store.verify(replay="all", executor="inline")
    assert (found.ok, found.stages_replayed) == (True, 6)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_12_a_replay_finds_weights_that_nobody_trained(store, stage):
    """Consistently forged: bytes, manifest and ledger agree, only the training would have given others."""
    row, identity, state = held(store, 1, stage)
    weight = state.tensors["model.0.bias"].copy()
    weight[0] += 1e-3
    manifest = store.opened.checkpoints.manifest(identity)
    forged = StageState({**state.tensors, "model.0.bias": weight}, state.scalars)
    store.opened.checkpoints.remove(identity)
    told = {name: getattr(manifest, name) for name in ("parent_key", "records", "fingerprint", "epochs", "steps")}
    store.opened.checkpoints.write(identity, forged, **told, seconds=1.0, worker="host:1")
    with sqlite3.connect(store.opened.layout.ledger) as ledger:
        values = (state_digest(forged), full_digest(forged), row.key)
        ledger.execute("UPDATE stages SET state_digest = ?, full_digest = ? WHERE key = ?", values)
    ledger.close()
    assert store.verify(executor="inline").ok
    found = store.verify(replay="all", executor="inline")
    assert not found.ok
    assert found.problems == [f"replay of shard 1, stage {stage}: retrained from nothing it gives other bits"]


def test_12_a_replay_leaves_nothing_behind_and_changes_nothing(store):
    before = files(store.opened.layout.checkpoints), digests(store), store.version
    assert store.verify(replay="all", executor="inline").ok
    assert (files(store.opened.layout.checkpoints), digests(store), store.version) == before
    assert not store.opened.layout.scratch.exists()


# --- 13: the suffix, and nothing but the suffix ----------------------------------------------------


@pytest.mark.parametrize("place", [(shard, slice_) for shard in (0, 1) for slice_ in (1, 2, 3)])
def test_13_the_whole_shard_retrained_where_the_suffix_was_due(store, stages_run, place):
    shard, slice_ = place
    root = store.opened.layout.checkpoints
    kept = [stage_folder(store, shard, stage) for stage in range(1, slice_)]
    kept += [stage_folder(store, 1 - shard, stage) for stage in (1, 2, 3)]
    doomed = [stage_folder(store, shard, stage) for stage in range(slice_, 4)]
    before = {folder: files(folder) for folder in kept}
    keys = digests(store)
    victim = slices(store)[place][0]
    done = store.delete(records=[victim], executor="inline")
    assert stages_run == [(shard, stage) for stage in range(slice_, 4)]
    assert (done.stages_retrained, done.shards) == (3 - slice_ + 1, [shard])
    assert {folder: files(folder) for folder in kept} == before
    assert not any(folder.exists() for folder in doomed)
    assert sum(1 for _ in root.glob("shard-*/stage-*")) == 6
    changed = {at for at, row in digests(store).items() if row != keys[at]}
    assert changed == {(shard, stage) for stage in range(slice_, 4)}


def test_13_a_batch_is_retrained_once_from_its_earliest_slice(store, tmp_path, stages_run):
    everybody = slices(store)
    victims = [everybody[0, 3][0], everybody[0, 2][0], everybody[0, 2][-1], everybody[1, 3][0]]
    done = store.delete(records=victims, executor="inline")
    assert sorted(stages_run) == [(0, 2), (0, 3), (1, 3)]
    assert (done.stages_retrained, done.shards) == (3, [0, 1])
    scratch(store, tmp_path, tables.mixed_recipe(), tables.without(tables.mixed(), records=victims))


def test_13_requests_that_touch_one_shard_are_repaired_together_once(store, tmp_path, stages_run):
    everybody = slices(store)
    victims = [everybody[1, 3][0], everybody[1, 2][0], everybody[1, 2][1]]
    requests = [store.delete(records=[victim], defer=True).request for victim in victims]
    assert stages_run == []
    done = store.repair(executor="inline")
    assert sorted(done.requests) == sorted(requests)
    assert stages_run == [(1, 2), (1, 3)]
    scratch(store, tmp_path, tables.mixed_recipe(), tables.without(tables.mixed(), records=victims))


def test_13_training_twice_trains_nothing_the_second_time(store, home, stages_run):
    before = files(store.opened.layout.checkpoints)
    once_more = again(store, home, tables.mixed_recipe(), home / "trained.parquet")
    assert (once_more.training.stages_trained, once_more.training.stages_reused) == (0, 6)
    assert stages_run == []
    assert files(store.opened.layout.checkpoints) == before


def test_13_what_determines_training_is_neither_the_path_nor_the_executor(trained, tmp_path):
    elsewhere = train(tmp_path / "other" / "place", tables.mixed_recipe(), tables.mixed(), name="deep", workers=1)
    assert state_digests(elsewhere) == state_digests(trained)
    assert sisa.open_store(elsewhere.opened.layout.root).verify(executor="inline").ok
