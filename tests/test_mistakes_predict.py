"""Answers with somebody's influence after it was to end, and answers that depend on more than the weights."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import numpy as np
import pyarrow.parquet as papq
import pytest
import tables
from store_kit import at, copied, places, slices, train, write

import sisa
from sisa.cli.main import run
from sisa.deletion.accept import accept
from sisa.ensemble.live import LiveEnsemble
from sisa.ensemble.stacked import Panel
from sisa.errors import NoConstituentError
from sisa.learners.columns import columns_from_table
from sisa.ledger import Member
from sisa.records.features import feature_table
from sisa.store import store as store_module
from sisa.store.predict import predict_table
from sisa.training import chain

RECIPE = tables.binary_recipe()
TABLE = tables.binary()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return train(tmp_path_factory.mktemp("trained"), RECIPE, TABLE)


@pytest.fixture
def store(trained, tmp_path):
    return copied(trained, tmp_path)


def members(store):
    """{shard: stage} of the live version, absent shards left out."""
    return {m.shard: m.stage for m in store.opened.ledger.versions.live().members if m.stage}


def alone(store, tmp_path, shard, stage):
    """What the model of one stage answers, by way of a copy of the store in which nobody else votes."""
    shutil.rmtree(tmp_path / "alone", ignore_errors=True)
    only = copied(store, tmp_path, name="alone")
    ledger = only.opened.ledger
    (row,) = [row for row in ledger.stages.all(shard) if row.stage == stage]
    absent = [Member(k, 0, "", "") for k in range(only.opened.shards) if k != shard]
    voter = Member(shard, stage, row.key, row.platform)
    ledger.versions.publish(sorted([*absent, voter], key=lambda member: member.shard), cause="train")
    return only.predict_proba(TABLE)


# --- 7 ---------------------------------------------------------------------------------------------


def test_7_a_model_that_predicts_in_training_mode(store):
    """Dropout would draw again and BatchNorm would look at the rows beside: neither may happen."""
    together = store.predict_proba(TABLE)
    assert np.array_equal(together, store.predict_proba(TABLE))
    assert np.array_equal(together, sisa.open_store(store.opened.layout.root).predict_proba(TABLE))
    one_by_one = np.concatenate([store.predict_proba(TABLE.slice(row, 1)) for row in range(TABLE.num_rows)])
    np.testing.assert_allclose(together, one_by_one, rtol=0, atol=1e-6)
    backwards = store.predict_proba(TABLE.take(list(range(TABLE.num_rows))[::-1]))[::-1]
    np.testing.assert_allclose(together, backwards, rtol=0, atol=1e-6)


def test_7_answering_changes_no_state(store):
    before = store.status()["constituents"]
    loaded = LiveEnsemble(store.opened)
    columns = columns_from_table(feature_table(TABLE, store.opened.recipe), store.opened.recipe)
    first = loaded.answer(columns).scores_BC
    for _ in range(3):
        assert np.array_equal(loaded.answer(columns).scores_BC, first)
    assert store.status()["constituents"] == before
    assert store.verify(executor="inline").ok


@pytest.mark.parametrize("rule", ["mean", "vote"])
def test_7_weights_by_shard_size_that_ignore_deletions(tmp_path, rule):
    """Each constituent has one voice, before and after most of its shard went."""
    recipe = tables.binary_recipe(sisa={"aggregation": rule})
    store = train(tmp_path, recipe, TABLE)

    def expected():
        posteriors = [alone(store, tmp_path, shard, 3) for shard in (0, 1)]
        assert not np.array_equal(*posteriors)
        return np.mean(posteriors, axis=0)

    np.testing.assert_allclose(store.predict_proba(TABLE), expected(), rtol=0, atol=1e-6)
    shard_0 = [record for place, records in slices(store).items() if place[0] == 0 for record in records]
    store.delete(records=shard_0[:-3], executor="inline")
    np.testing.assert_allclose(store.predict_proba(TABLE), expected(), rtol=0, atol=1e-6)


def test_7_vocabularies_and_scalers_are_those_of_the_shards_first_slice(tmp_path):
    table, recipe = tables.mixed(), tables.mixed_recipe()
    store = train(tmp_path, recipe, table)
    where = places(store)
    for shard in (0, 1):
        rows = [row for row in table.to_pylist() if where[str(row["record"])] == (shard, 1)]
        for stage in (1, 2, 3):
            (row,) = [row for row in store.opened.ledger.stages.all(shard) if row.stage == stage]
            identity = next(i for i in store.opened.checkpoints.list_shard(shard) if i.key == row.key)
            state = store.opened.checkpoints.load(identity)[1]
            jobs = sorted({row["job"] for row in rows} - {None})
            assert state.scalars["preprocess.vocabularies"] == [jobs, sorted({str(row["grade"]) for row in rows})]
            means, stds = state.tensors["preprocess.numeric_scale"]
            for index, name in enumerate(["age", "hours"]):
                values = np.array([row[name] for row in rows if row[name] is not None], np.float64)
                np.testing.assert_allclose([means[index], stds[index]], [values.mean(), values.std()], rtol=1e-12)
            assert state.tensors["model.2.weight"].shape[0] == len(recipe["data"]["classes"])


def test_7_classes_are_those_that_were_declared_whatever_the_table_holds(tmp_path):
    recipe = tables.binary_recipe(data={"classes": [3, 1, 0, 2]})
    store = train(tmp_path, recipe, TABLE)
    assert store.classes == [3, 1, 0, 2]
    assert store.predict_proba(TABLE).shape == (TABLE.num_rows, 4)


# --- 15 --------------------------------------------------------------------------------------------

OTHER = """
import json, sys
import pyarrow.parquet as papq
import sisa
store = sisa.open_store(sys.argv[1])
table = papq.read_table(sys.argv[2])
for line in sys.stdin:
    try:
        scores = store.predict_proba(table).tolist()
    except sisa.errors.NoConstituentError:
        scores = None
    print(json.dumps([store.version, scores, len(store.ensemble._loaded)]), flush=True)
"""


@pytest.fixture
def other_process(store, tmp_path):
    """Asks a process of its own, which holds the ensemble from its first answer on."""
    source = write(TABLE, tmp_path / "asked.parquet")
    command = [sys.executable, "-c", OTHER, str(store.opened.layout.root), str(source)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:

        def ask():
            process.stdin.write("\n")
            process.stdin.flush()
            version, scores, loaded = json.loads(process.stdout.readline())
            return version, None if scores is None else np.array(scores), loaded

        yield ask
        process.stdin.close()
        process.wait(timeout=30)


def test_15_a_quarantine_that_lives_in_one_process(store, tmp_path, other_process):
    version, before, loaded = other_process()
    assert (version, loaded) == (store.version, 2)
    assert np.array_equal(before, store.predict_proba(TABLE))
    shares = {(shard, stage): alone(store, tmp_path, shard, stage) for shard, stage in [(0, 1), (1, 3), (0, 3)]}

    done = store.delete(records=[slices(store)[0, 2][0]], defer=True)  # falls back to stage 1
    version, scores, loaded = other_process()
    assert version == done.version_quarantine == store.version
    assert members(store) == {0: 1, 1: 3}
    np.testing.assert_allclose(scores, (shares[0, 1] + shares[1, 3]) / 2, rtol=0, atol=1e-6)
    assert not np.allclose(scores, before)

    store.delete(records=[slices(store)[0, 1][0]], defer=True)  # no clean stage is left: the shard doesn't vote
    version, scores, loaded = other_process()
    assert (members(store), loaded) == ({1: 3}, 1)
    np.testing.assert_allclose(scores, shares[1, 3], rtol=0, atol=1e-6)

    store.repair(executor="inline")
    version, scores, loaded = other_process()
    assert (version, members(store), loaded) == (store.version, {0: 3, 1: 3}, 2)
    assert np.array_equal(scores, store.predict_proba(TABLE))
    assert not np.array_equal(scores, before)


def test_15_acceptance_alone_takes_the_tainted_out_of_service(store, other_process, monkeypatch):
    """Nothing was erased, purged or repaired yet: the acknowledgement is enough, everywhere."""
    other_process()
    answers = []

    def interrupted(*_):
        answers.append(other_process())
        raise KeyboardInterrupt

    monkeypatch.setattr(store_module, "settle", interrupted)
    for victim in [slices(store)[shard, 1][0] for shard in (0, 1)]:
        with pytest.raises(KeyboardInterrupt):
            store.delete(records=[victim], executor="inline")
        if len(answers) == 1:
            assert (store.version, members(store)) == (answers[0][0], {1: 3})
            assert np.array_equal(answers[0][1], store.predict_proba(TABLE))
    version, scores, _ = answers[1]
    assert (version, scores, members(store)) == (store.version, None, {})
    with pytest.raises(NoConstituentError):
        store.predict_proba(TABLE)


@pytest.mark.parametrize("ask", ["predict_proba", "predict_table"])
def test_15_an_answer_that_a_deletion_overtook_is_computed_again(store, tmp_path, monkeypatch, ask):
    """The acknowledgement comes while the tainted constituent computes: what it says is thrown away."""
    victim = slices(store)[0, 1][0]
    deleter = sisa.open_store(store.opened.layout.root)
    real = Panel.scores
    asked = []

    def slow(self, columns, rule):
        asked.append(1)
        answer = real(self, columns, rule)
        if len(asked) == 1:
            deleter.delete(records=[victim], defer=True)
        return answer

    monkeypatch.setattr(Panel, "scores", slow)
    if ask == "predict_proba":
        scores = store.predict_proba(TABLE)
    else:
        source = write(TABLE, tmp_path / "asked.parquet")
        said = predict_table(store, str(source), tmp_path / "answers.parquet")
        answers = papq.read_table(tmp_path / "answers.parquet")
        scores = np.array(answers["scores"].to_pylist())
        assert set(answers["version"].to_pylist()) == {said.version} == {store.version}
        assert said.voters == 1
    monkeypatch.undo()
    assert members(store) == {1: 3}
    assert np.array_equal(scores, alone(store, tmp_path, 1, 3))
    assert len(asked) == 2  # two voters, then the one that is left


def test_15_no_file_is_left_when_nobody_can_answer(store, tmp_path, capsys):
    victims = [slices(store)[shard, 1][0] for shard in (0, 1)]
    store.delete(records=victims, defer=True)
    source = write(TABLE, tmp_path / "asked.parquet")
    target = tmp_path / "answers.parquet"
    root = str(store.opened.layout.root)
    assert run(["predict", "--store", root, str(source), "--output", str(target), "--json"]) == 3
    assert json.loads(capsys.readouterr().out)["error"]["hint"] == "`sisa repair` retrains them."
    assert not target.exists()
    assert not list(tmp_path.glob("tmp-*"))
    assert run(["repair", "--store", root, "--executor", "inline"]) == 0
    assert run(["predict", "--store", root, str(source), "--output", str(target)]) == 0


def test_15_a_training_that_is_running_does_not_publish_what_saw_the_deleted(tmp_path, monkeypatch):
    """A deletion comes in while the last stage trains: its weights are thrown away and made again without them."""
    recipe = tables.binary_recipe(sisa={"shards": 1})
    finished = train(tmp_path, recipe, TABLE, name="finished")
    victim = slices(finished)[0, 2][0]
    real, ran = chain.train_stage, []

    def overtaken(**arguments):
        ran.append(arguments["stage"])
        state = real(**arguments)
        if ran == [1, 2, 3]:
            accept(sisa.open_store(tmp_path / "store").opened, records=[victim])
        return state

    monkeypatch.setattr(chain, "train_stage", overtaken)
    source = write(TABLE, tmp_path / "all.parquet")
    store = sisa.train(at(tmp_path, recipe, source), store=tmp_path / "store", executor="inline")
    monkeypatch.undo()
    assert ran == [1, 2, 3, 2, 3]
    assert victim not in places(store)
    assert store.verify(replay="all", executor="inline").ok
    assert {request["state"] for request in store.status()["requests"]} == {"repaired"}
