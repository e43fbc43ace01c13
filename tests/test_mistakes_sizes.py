"""Numbers that are small, odd or zero, and tables that say the same in another way."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.ipc as paipc
import pytest
import tables
from store_kit import assert_same, at, digests, places, scratch, slices, train, write

import sisa
from sisa.checkpoints import StageId
from sisa.cli.main import run
from sisa.errors import RecipeError

# --- 9 ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 5])
def test_9_more_slices_than_records(tmp_path, count):
    """S x R = 20 places for a handful of records: most slices and some shards are empty, and that is no error."""
    recipe = tables.binary_recipe(sisa={"shards": 4, "slices": 5})
    table = tables.binary(count, seed=6)
    store = train(tmp_path, recipe, table)
    assert store.training.stages_trained == 20
    occupied = {place[0] for place in slices(store)}
    assert {c["shard"] for c in store.status()["constituents"] if c["stage"]} == occupied
    assert np.isfinite(store.predict_proba(table)).all()
    found = store.verify(replay="all", executor="inline")
    assert (found.ok, found.stages_replayed) == (True, 20)
    for number in range(count):
        store.delete(records=[str(number)], executor="inline")
        table = table.slice(1)
        scratch(store, tmp_path, recipe, table, name=f"scratch-{number}")


def test_9_a_class_that_a_shard_has_never_seen(tmp_path):
    """Scores have a column for every declared class, from every constituent."""
    recipe = tables.mixed_recipe()
    table = tables.mixed()
    whole = train(tmp_path, recipe, table, name="whole")
    where = places(whole)
    others = [r for r, c in zip(table["record"].to_pylist(), table["income"].to_pylist(), strict=True) if c == "mid"]
    victims = [str(record) for record in others if where[str(record)][0] == 0]
    whole.delete(records=victims, executor="inline")
    scratch(whole, tmp_path, recipe, tables.without(table, records=victims))
    scores = whole.predict_proba(table)
    assert scores.shape == (table.num_rows, 3)
    np.testing.assert_allclose(scores.sum(1), 1.0)


# --- 11 --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 4])
def test_11_a_last_batch_of_one_record_with_batch_norm(tmp_path, batch_size):
    """From nine records to none, one by one: 9 and 5 leave one over, 1 is all there is."""
    recipe = tables.binary_recipe(training={"batch_size": batch_size}, sisa={"shards": 1, "slices": 1})
    table = tables.binary(9, seed=8)
    store = train(tmp_path, recipe, table)
    steps = {}
    for left in range(9, 0, -1):
        (row,) = store.opened.ledger.stages.all()
        manifest, state = store.opened.checkpoints.load(StageId(0, 1, row.key, row.platform))
        steps[left] = manifest.steps // manifest.epochs
        assert state.tensors["optimizer.0.weight.step"] == manifest.steps
        assert all(np.isfinite(array).all() for array in state.tensors.values())
        store.delete(records=[str(9 - left)], executor="inline")
        table = table.slice(1)
        if left in (9, 6, 2, 1):
            scratch(store, tmp_path, recipe, table, name=f"scratch-{left}")
    whole = {left: left for left in range(1, 10)}
    fours = {9: 2, 8: 2, 7: 2, 6: 2, 5: 1, 4: 1, 3: 1, 2: 1, 1: 1}
    assert steps == (whole if batch_size == 1 else fours)


@pytest.mark.parametrize("model", ["mlp", "cnn"])
def test_11_a_shard_of_one_record(tmp_path, model):
    if model == "mlp":
        table, recipe = tables.binary(3, seed=4), tables.binary_recipe(sisa={"shards": 5})
    else:
        table = tables.images(3)
        recipe = tables.images_recipe(model={"batch_norm": True, "dropout": 0.2}, sisa={"shards": 5})
    store = train(tmp_path, recipe, table)
    sizes = {shard: sum(len(r) for p, r in slices(store).items() if p[0] == shard) for shard in range(5)}
    assert 1 in sizes.values()
    assert np.isfinite(store.predict_proba(table)).all()
    assert store.verify(replay="all", executor="inline").ok


MIXED = tables.mixed()
BINARY = tables.binary(24)


def written(folder: Path, *parts: pa.Table, **options) -> str:
    for number, part in enumerate(parts):
        write(part, folder / f"part-{number}.parquet", **options)
    return str(folder / "part-*.parquet")


def as_csv(table: pa.Table, folder: Path) -> str:
    folder.mkdir(exist_ok=True)
    pacsv.write_csv(table, folder / "all.csv")
    return str(folder / "all.csv")


def as_ipc(table: pa.Table, folder: Path, *, stream: bool) -> str:
    folder.mkdir(exist_ok=True)
    path = folder / "all.arrow"
    with paipc.new_stream(path, table.schema) if stream else paipc.new_file(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=7)
    return str(path)


def shuffled(table: pa.Table) -> pa.Table:
    return table.take(np.random.default_rng(4).permutation(table.num_rows))


def cast(table: pa.Table, **types: pa.DataType) -> pa.Table:
    for name, type_ in types.items():
        index = table.column_names.index(name)
        column = table[name]
        if pa.types.is_floating(type_) and column.null_count:
            values = column.cast(pa.float64()).to_numpy()  # NaN where there is none
            column = pa.chunked_array([pa.array(values, from_pandas=False)])
        table = table.set_column(index, name, column.cast(type_))
    return table


FORMS = {
    "shuffled": lambda t, f: written(f, shuffled(t)),
    "backwards": lambda t, f: written(f, t.take(list(range(t.num_rows))[::-1])),
    "split in files": lambda t, f: written(f, t.slice(20), t.slice(0, 3), t.slice(3, 17)),
    "small row groups, no compression": lambda t, f: written(f, t, row_group_size=5, compression="none"),
    "int32, and float where whole numbers were": lambda t, f: written(
        f, cast(t, record=pa.int32(), hours=pa.float64(), grade=pa.int8())
    ),
    "float32 and unsigned": lambda t, f: written(f, cast(t, record=pa.uint16(), hours=pa.float32(), grade=pa.uint64())),
    "decimals": lambda t, f: written(f, cast(t, hours=pa.decimal128(25, 3))),
    "dictionaries": lambda t, f: written(
        f, cast(t, job=pa.dictionary(pa.int32(), pa.string()), person=pa.dictionary(pa.int8(), pa.string()))
    ),
    "large and viewed texts": lambda t, f: written(
        f, cast(t, job=pa.large_string(), person=pa.large_string(), income=pa.dictionary(pa.int8(), pa.string()))
    ),
    "ids as text": lambda t, f: written(f, cast(t, record=pa.string())),
    "columns in another order, and more of them": lambda t, f: written(
        f, t.select(sorted(t.column_names)).append_column("more", pa.array(range(t.num_rows)))
    ),
    "an Arrow file": lambda t, f: as_ipc(t, f, stream=False),
    "an Arrow stream": lambda t, f: as_ipc(shuffled(t), f, stream=True),
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return train(tmp_path_factory.mktemp("trained"), tables.mixed_recipe(), MIXED)


@pytest.mark.parametrize("form", FORMS)
def test_11_a_source_that_says_the_same_in_another_way(trained, tmp_path, form):
    source = FORMS[form](MIXED, tmp_path / "source")
    store = sisa.train(at(tmp_path, tables.mixed_recipe(), source), store=tmp_path / "store", executor="inline")
    assert_same(store, trained)
    again = sisa.train(at(tmp_path, tables.mixed_recipe(), source), store=trained.opened.layout.root)
    assert (again.training.stages_trained, again.training.missing_from_source) == (0, 0)


def test_11_csv_of_the_same_values(tmp_path):
    """CSV knows texts only: with the types that Parquet has, declared, it is the same recipe and the same store."""
    kinds = {"age": "numeric", "hours": "numeric", "job": "categorical", "grade": "categorical"}
    features = {
        "features": ["age", "job", "hours", "grade"],
        "columns": {name: {"type": kinds[name]} for name in kinds},
    }
    recipe = tables.mixed_recipe(data=features)
    table = MIXED.drop_columns(["code"])
    parquet = train(tmp_path, recipe, table, name="parquet")
    source = as_csv(shuffled(table), tmp_path / "csv")
    csv = sisa.train(at(tmp_path, recipe, source), store=tmp_path / "store", executor="inline")
    assert_same(csv, parquet)


@pytest.mark.parametrize("kind", [pa.bool_(), pa.int32(), pa.int64(), pa.float32(), pa.float64()], ids=str)
def test_11_vectors_of_another_type(tmp_path, kind):
    recipe = tables.binary_recipe(training={"epochs": 2})
    gaps = tables.with_value(BINARY, row=3, column="x", value=[None, *BINARY["x"][3].as_py()[1:]])
    one = train(tmp_path, recipe, gaps, name="one")
    values = pa.concat_arrays(gaps["x"].chunks).values.cast(kind)
    other = gaps.set_column(1, "x", pa.FixedSizeListArray.from_arrays(values, 12))
    assert_same(train(tmp_path, recipe, other, name="other"), one)


def test_11_a_missing_element_that_leaves_makes_its_column_whole_again(tmp_path):
    """Bytes with a gap are kept as numbers with a gap; which of both a slice has must not be seen in weights."""
    recipe = tables.binary_recipe()
    holder = slices(train(tmp_path, recipe, BINARY, name="probe"))[0, 2][0]
    row = BINARY["x"].to_pylist()[int(holder)]
    table = tables.with_value(BINARY, row=int(holder), column="x", value=[None, *row[1:]])
    store = train(tmp_path, recipe, table, name="store")
    store.delete(records=[holder], executor="inline")
    scratch(store, tmp_path, recipe, tables.without(table, records=[holder]))


def test_11_a_texts_two_unicode_forms_are_one(trained, tmp_path):
    def apart(name):
        return pa.array([None if t is None else unicodedata.normalize("NFD", t) for t in MIXED[name].to_pylist()])

    table = MIXED.set_column(1, "person", apart("person")).set_column(4, "job", apart("job"))
    assert table["person"][0].as_py() != MIXED["person"][0].as_py()
    assert not table["job"].equals(MIXED["job"])
    store = train(tmp_path, tables.mixed_recipe(), table)
    assert_same(store, trained)
    done = store.delete(subjects=[table["person"][0].as_py()], executor="inline")
    assert store.delete(subjects=[MIXED["person"][0].as_py()], executor="inline").request == done.request


# --- 16 --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("epochs", [1, 2, 3, 10])
def test_16_fewer_epochs_than_slices_allow(tmp_path, capsys, epochs):
    """e = 2e'/(R+1) < 1 is an error that names the largest R, before anything is written."""
    largest = 2 * epochs - 1
    table = tables.binary(6)
    if epochs < 10:
        good = train(tmp_path, tables.binary_recipe(training={"epochs": epochs}, sisa={"slices": largest}), table)
        assert {m.epochs for m, _ in held(good)} == {1}
    bad = tables.binary_recipe(training={"epochs": epochs}, sisa={"slices": largest + 1})
    with pytest.raises(RecipeError, match=rf"sisa\.slices: {largest + 1} .*largest number .* is {largest}"):
        train(tmp_path, bad, table, name="bad")
    config = tmp_path / "config.yaml"
    config.write_text(json.dumps(at(tmp_path, bad, tmp_path / "bad.parquet")))
    assert run(["train", str(config), "--store", str(tmp_path / "bad"), "--json"]) == 2
    message = json.loads(capsys.readouterr().out)["error"]["message"]
    assert "sisa.slices" in message
    assert f"is {largest}" in message
    assert not (tmp_path / "bad").exists()


def held(store):
    """Manifest and state of each stage."""
    return [
        store.opened.checkpoints.load(StageId(row.shard, row.stage, row.key, row.platform))
        for row in store.opened.ledger.stages.all()
    ]


@pytest.mark.parametrize(("epochs", "number"), [(7, 3), (5, 4), (20, 3), (9, 6)])
def test_16_epochs_are_those_of_the_budget_in_whole_numbers(tmp_path, epochs, number):
    """e_r = floor(2e'r/(R+1)) - floor(2e'(r-1)/(R+1)), and all of them together are floor(2e'R/(R+1))."""
    recipe = tables.binary_recipe(training={"epochs": epochs}, sisa={"shards": 1, "slices": number})
    store = train(tmp_path, recipe, tables.binary(8))
    ends = [int(2 * epochs * stage / (number + 1) + 1e-9) for stage in range(number + 1)]
    assert [m.epochs for m, _ in held(store)] == [end - start for start, end in zip(ends, ends[1:], strict=False)]
    assert sum(m.epochs for m, _ in held(store)) == 2 * epochs * number // (number + 1)
    assert len(digests(store)) == number
