"""Keys that omit what determines the weights: any change of recipe, code, order or content must change them."""

from __future__ import annotations

import importlib
import sys
from typing import Any, get_args

import pytest
import tables
from pydantic import BaseModel
from store_kit import again, at, digests, places, state_digests, train, write

import sisa
from sisa.errors import FootingError
from sisa.recipe import Recipe, parse_recipe, recipe_digest
from sisa.records.schema import resolve
from sisa.records.source import open_source

TABLE = tables.mixed()
RECIPE = tables.mixed_recipe(training={"epochs": 2})

FACTORY = {"factory": "some_package.models:build", "options": {"width": 3}}
CHANGES: dict[str, list[dict[str, Any]]] = {
    "data.record_id": [{"data": {"record_id": "other"}}],
    "data.subject_id": [{"data": {"subject_id": None}}],
    "data.label": [{"data": {"label": "secret"}}],
    "data.classes": [{"data": {"classes": ["mid", "low", "high"]}}, {"data": {"classes": ["low", "mid", "high", "x"]}}],
    "data.features": [
        {"data": {"features": ["age", "job", "hours", "grade"]}},
        {"data": {"features": ["job", "age", "hours", "code", "grade"]}},
    ],
    "data.holdout.fraction": [{"data": {"holdout": {"fraction": 0.25}}}],
    "data.holdout.source": [{"data": {"holdout": {"source": "second.parquet"}}}],
    "data.columns.type": [{"data": {"columns": {"grade": {"type": "numeric"}}}}],
    "data.columns.mean": [{"data": {"columns": {"grade": {"type": "categorical"}, "age": {"mean": 1, "std": 1}}}}],
    "data.columns.std": [{"data": {"columns": {"grade": {"type": "categorical"}, "age": {"mean": 0, "std": 2}}}}],
    "data.columns.values": [{"data": {"columns": {"grade": {"type": "categorical", "values": ["1", "2"]}}}}],
    "model.name": [{"model": {"name": "logistic", "hidden": None, "activation": None}}],
    "model.hidden": [{"model": {"hidden": [7]}}, {"model": {"hidden": [6, 6]}}],
    "model.activation": [{"model": {"activation": "relu"}}],
    "model.dropout": [{"model": {"dropout": 0.1}}],
    "model.batch_norm": [{"model": {"batch_norm": True}}],
    "model.factory": [{"model": {"name": None, "hidden": None, "activation": None, **FACTORY}}],
    "model.options": [
        {"model": {"name": None, "hidden": None, "activation": None, **FACTORY, "options": {"width": 4}}}
    ],
    "training.epochs": [{"training": {"epochs": 3}}],
    "training.batch_size": [{"training": {"batch_size": 5}}],
    "training.optimizer.name": [{"training": {"optimizer": {"name": "torch.optim.SGD", "lr": 0.1, "momentum": 0.9}}}],
    "training.optimizer.lr": [{"training": {"optimizer": {"name": "sgd", "lr": 0.11, "momentum": 0.9}}}],
    "training.optimizer.*": [
        {"training": {"optimizer": {"name": "sgd", "lr": 0.1, "momentum": 0.8}}},
        {"training": {"optimizer": {"name": "sgd", "lr": 0.1, "momentum": 0.9, "weight_decay": 0.001}}},
    ],
    "training.schedule.name": [
        {"training": {"schedule": {"name": "cosine"}}},
        {"training": {"schedule": {"name": "exponential", "gamma": 0.5}}},
    ],
    "training.schedule.*": [{"training": {"schedule": {"name": "exponential", "gamma": 0.6}}}],
    "training.seed": [{"training": {"seed": 8}}],
    "training.device": [{"training": {"device": "cuda"}}],
    "training.threads": [{"training": {"threads": 2}}],
    "workers.devices_per_shard": [{"workers": {"devices_per_shard": 2}}],
    "sisa.shards": [{"sisa": {"shards": 3}}],
    "sisa.slices": [{"sisa": {"slices": 2}}],
}
IMAGES = {
    "data.columns.size": {"data": {"columns": {"pixels": {"size": 36}}}},
    "data.image.height": {"data": {"image": {"height": 12, "width": 6, "channels": 1}}},
    "data.image.width": {"data": {"image": {"height": 6, "width": 12, "channels": 1}}},
    "data.image.channels": {"data": {"image": {"height": 6, "width": 4, "channels": 3}}},
    "model.channels": {"model": {"channels": [4, 4]}},
}
OF_NO_CONSEQUENCE: dict[str, dict[str, Any]] = {
    "store": {"store": "elsewhere"},
    "ledger": {"ledger": "postgresql://db.example/sisa"},
    "data.source": {"data": {"source": "other.parquet"}},
    "sisa.aggregation.name": {"sisa": {"aggregation": "vote"}},
    "sisa.aggregation.table": {"sisa": {"aggregation": {"name": "weighted", "table": "b.parquet"}}},
    "routing.key_file": {"routing": {"key_file": "some.key"}},
    "routing.exclusion_key_file": {"routing": {"exclusion_key_file": "another.key"}},
    "workers.cpus": {"workers": {"cpus": 0.5}},
    "workers.gpus": {"workers": {"gpus": 1}},
    "workers.memory": {"workers": {"memory": "4GiB"}},
    "workers.rows_in_memory": {"workers": {"rows_in_memory": "never"}},
    "workers.snapshot_every_s": {"workers": {"snapshot_every_s": 1}},
}


def changed(change, base=RECIPE):
    merged = {name: dict(section) for name, section in base.items()}
    for section, fields in change.items():
        merged[section] = {**merged.get(section, {}), **fields} if isinstance(fields, dict) else fields
    return merged


def digest(recipe):
    """The digest of a recipe with its features listed."""
    parsed = parse_recipe(recipe)
    columns = {name: parsed.data.columns.get(name, sisa.recipe.ColumnSpec()) for name in parsed.data.features}
    return recipe_digest(parsed.resolved(columns))


def leaves(model: type[BaseModel], path: str = "") -> set[str]:
    found = {f"{path}*"} if model.model_config.get("extra") == "allow" else set()
    for name, field in model.model_fields.items():
        inner = [field.annotation, *get_args(field.annotation)]
        sections = [kind for kind in inner if isinstance(kind, type) and issubclass(kind, BaseModel)]
        found |= leaves(sections[0], f"{path}{name}.") if sections else {f"{path}{name}"}
    return found


def test_3_every_field_of_a_recipe_has_its_say_here():
    """A field that is added must be listed: either it changes keys, or somebody decided that it needn't."""
    assert leaves(Recipe) == CHANGES.keys() | IMAGES.keys() | OF_NO_CONSEQUENCE.keys()


def test_3_keys_that_omit_a_field_of_the_recipe():
    seen = {digest(RECIPE): "the recipe"}
    for path, changes in CHANGES.items():
        for change in changes:
            found = digest(changed(change))
            assert found not in seen, f"{path} changes no key ({seen.get(found)})"
            seen[found] = path
    for path, change in IMAGES.items():
        found = digest(changed(change, tables.images_recipe()))
        assert found not in {*seen, digest(tables.images_recipe())}, f"{path} changes no key"
        seen[found] = path


@pytest.mark.parametrize("path", OF_NO_CONSEQUENCE)
def test_3_what_does_not_determine_training_changes_no_key(path):
    assert digest(changed(OF_NO_CONSEQUENCE[path])) == digest(RECIPE)


def test_3_the_digest_of_the_recipe_is_part_of_every_key(tmp_path):
    one = train(tmp_path, RECIPE, TABLE, name="one")
    other = train(tmp_path, changed({"training": {"seed": 8}}), TABLE, name="other")
    assert not {row[0] for row in digests(one).values()} & {row[0] for row in digests(other).values()}
    assert not set(state_digests(one).values()) & set(state_digests(other).values())


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return train(tmp_path_factory.mktemp("trained"), RECIPE, TABLE)


@pytest.mark.parametrize("slice_", [1, 2, 3])
@pytest.mark.parametrize(
    ("column", "value"),
    [("age", 33.25), ("hours", 61), ("job", "pilot"), ("grade", 9), ("code", [0.5, None, 1.0]), ("income", "high")],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_3_keys_that_omit_content(trained, tmp_path, column, value, slice_):
    """One value of one record: keys change from its slice on, in its shard, and nowhere else."""
    where = places(trained)
    row = next(i for i, r in enumerate(TABLE["record"].to_pylist()) if where[str(r)] == (1, slice_))
    other = train(tmp_path, RECIPE, tables.with_value(TABLE, row=row, column=column, value=value))
    before, after = digests(trained), digests(other)
    assert {place for place in before if before[place][0] != after[place][0]} == {(1, s) for s in range(slice_, 4)}


def test_3_keys_that_omit_the_owner(trained, tmp_path):
    """Another owner in the same slice: the rows read alike, but they are somebody else's."""
    where = places(trained)
    rows = [i for i, r in enumerate(TABLE["record"].to_pylist()) if where[str(r)] == (0, 2)]
    people = TABLE["person"].to_pylist()
    row, owner = next((i, people[j]) for i in rows for j in rows if people[i] != people[j])
    other = train(tmp_path, RECIPE, tables.with_value(TABLE, row=row, column="person", value=owner))
    before, after = digests(trained), digests(other)
    assert {place for place in before if before[place][0] != after[place][0]} == {(0, 2), (0, 3)}


def test_3_a_column_that_the_recipe_does_not_name_changes_no_key_and_is_not_copied(trained, tmp_path):
    other = train(tmp_path, RECIPE, tables.with_value(TABLE, row=3, column="secret", value="changed"))
    assert digests(other) == digests(trained)
    assert not any(b"never-copied" in path.read_bytes() for path in tmp_path.rglob("store/**/*") if path.is_file())


def test_3_keys_that_omit_the_order(tmp_path):
    """The order follows from the routing key: where it can change nothing else, it still changes keys and weights."""
    recipe = tables.mixed_recipe(training={"epochs": 2}, sisa={"shards": 1, "slices": 1})
    one = train(tmp_path, recipe, TABLE, name="one")
    (tmp_path / "other.key").write_text("0f" * 32)
    asked = {**at(tmp_path, recipe, tmp_path / "one.parquet"), "routing": {"key_file": str(tmp_path / "other.key")}}
    other = sisa.train(asked, store=tmp_path / "other", executor="inline")
    assert digests(one)[0, 1][0] != digests(other)[0, 1][0]
    assert state_digests(one) != state_digests(other)


MODEL = """
from torch import nn
def build(feature_shape, class_count, width=4):
    return nn.Sequential(nn.Linear(feature_shape[0], width), nn.{activation}(), nn.Linear(width, class_count))
"""


def test_3_keys_that_omit_the_code(tmp_path, monkeypatch):
    """A model's source changes: training and repair stop until everything stands on one footing; forgetting doesn't."""
    source = tmp_path / "package" / "model_of_a_user.py"
    source.parent.mkdir()
    monkeypatch.syspath_prepend(str(source.parent))

    def written(activation):
        source.write_text(MODEL.format(activation=activation))
        sys.modules.pop("model_of_a_user", None)
        importlib.invalidate_caches()

    written("Tanh")
    recipe = {**RECIPE, "model": {"factory": "model_of_a_user:build"}}
    store = train(tmp_path, recipe, TABLE)
    before = digests(store)
    written("ReLU")
    with pytest.raises(FootingError, match=r"source of model\.factory"):
        again(store, tmp_path, recipe, tmp_path / "store.parquet")
    person = TABLE["person"][0].as_py()
    done = store.delete(subjects=[person], executor="inline")
    assert (done.state, done.version_after) == ("stages_purged", None)
    assert "--upgrade" in done.note
    rest = write(tables.without(TABLE, people=[person]), tmp_path / "rest.parquet")
    asked = at(tmp_path, recipe, tmp_path / "store.parquet")
    upgraded = sisa.train(asked, store=tmp_path / "store", executor="inline", upgrade=True)
    assert upgraded.training.stages_trained == 6
    assert not {row[0] for row in before.values()} & {row[0] for row in digests(upgraded).values()}
    fresh = sisa.train(at(tmp_path, recipe, rest), store=tmp_path / "fresh", executor="inline")
    assert digests(fresh) == digests(upgraded)
    written("Tanh")
    with pytest.raises(FootingError):
        again(store, tmp_path, recipe, tmp_path / "store.parquet")


def test_3_keys_of_new_code_for_weights_of_the_old(tmp_path, monkeypatch):
    """A process that goes on with the old source under the file's new digest: it trains nothing more, and forgets."""
    source = tmp_path / "package" / "model_of_another_user.py"
    source.parent.mkdir()
    monkeypatch.syspath_prepend(str(source.parent))
    source.write_text(MODEL.format(activation="Tanh"))
    recipe = {**RECIPE, "model": {"factory": "model_of_another_user:build"}}
    store = train(tmp_path, recipe, TABLE)
    before = digests(store)
    source.write_text(MODEL.format(activation="ReLU"))
    refused = r"the source of 'model_of_another_user' changed since this process imported it"
    asked = at(tmp_path, recipe, tmp_path / "store.parquet")
    for upgrade in (False, True):
        with pytest.raises(FootingError, match=refused) as caught:
            sisa.train(asked, store=tmp_path / "store", executor="inline", upgrade=upgrade)
        assert "Restart Python" in caught.value.hint
    with pytest.raises(FootingError, match=refused):
        sisa.train(asked, store=tmp_path / "fresh", executor="inline")
    assert digests(store) == before
    done = store.delete(subjects=[TABLE["person"][0].as_py()], executor="inline")
    assert (done.state, done.version_after) == ("stages_purged", None)
    assert "changed since this process imported it" in done.note
    source.write_text(MODEL.format(activation="Tanh"))
    assert store.repair(executor="inline").state == "repaired"


def test_3_a_recipe_that_was_changed_after_training_is_refused_with_the_difference(trained, tmp_path):
    asked = at(tmp_path, changed({"training": {"batch_size": 8}}), write(TABLE, tmp_path / "all.parquet"))
    with pytest.raises(sisa.errors.UserError, match=r"training\.batch_size: the store has 4, asked for 8"):
        sisa.train(asked, store=trained.opened.layout.root, executor="inline")


def test_3_resolving_writes_down_what_the_table_decides(tmp_path):
    """A type that the schema decides is in the digest: the same table with another type is another recipe."""
    one = resolve(parse_recipe(at(tmp_path, RECIPE, "x")), open_source(str(write(TABLE, tmp_path / "a.parquet"))))
    place = TABLE.column_names.index("hours")
    text = TABLE.set_column(place, "hours", TABLE["hours"].cast(tables.pa.string()))
    other = resolve(parse_recipe(at(tmp_path, RECIPE, "x")), open_source(str(write(text, tmp_path / "b.parquet"))))
    assert (one.data.columns["hours"].type, other.data.columns["hours"].type) == ("numeric", "categorical")
    assert recipe_digest(one) != recipe_digest(other)
