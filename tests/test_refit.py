"""Aggregations with parameters: fitted on rows that are nobody's, for exactly the constituents that answer."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import crash_kit as kit
import numpy as np
import pyarrow as pa
import pyarrow.parquet as papq
import pytest

from sisa.deletion.accept import accept
from sisa.ensemble.live import member_names, rule_in_use
from sisa.errors import UserError
from sisa.store.store import Store

TABLE = kit.people(40)
PROBE = TABLE.select(["x", "z"])


@pytest.fixture
def folder() -> Iterator[Path]:
    with kit.fast_folder() as folder:
        yield folder


def recipe_for(folder: Path, table: pa.Table, *, name: str = "weighted") -> dict[str, Any]:
    recipe = copy.deepcopy(kit.make_recipe(folder, TABLE))
    papq.write_table(table, folder / "calibration.parquet")
    recipe["sisa"]["aggregation"] = {"name": name, "table": str(folder / "calibration.parquet")}
    return recipe


def nobody(count: int = 60) -> pa.Table:
    """Made-up rows: shard models disagree on them."""
    rng = np.random.default_rng(5)
    labels = rng.integers(0, 2, count)
    features = {"x": rng.normal(size=count) + 2 * labels, "z": rng.normal(size=count)}
    return pa.table({**features, "label": [["no", "yes"][i] for i in labels]})


def rule(store: Store) -> str:
    return store.ensemble.load().rule.name


def in_use(store: Store) -> str:
    ledger = store.opened.ledger
    return rule_in_use(store.opened.recipe, ledger, ledger.versions.live())


@pytest.mark.parametrize("name", ["weighted", "calibrated"])
def test_a_deletion_drops_the_parameters_at_once_and_the_repair_fits_them_again(folder: Path, name: str) -> None:
    store = kit.trained(recipe_for(folder, nobody(), name=name), folder / "store")
    versions = store.opened.ledger.versions
    assert rule(store) == name
    assert [cause for _, _, cause in versions.all()] == ["train", "fit"]
    assert store.training is not None
    assert store.training.version == store.version == 2
    person = next(p for p, (shard, slice_) in kit.places(store, TABLE).items() if (shard, slice_) == (1, 2))
    accepted = accept(store.opened, subjects=[person])
    assert accepted is not None
    assert store.opened.ledger.database.rows("SELECT * FROM fitted") == []
    assert rule(store) == in_use(store) == "mean"
    store.repair(executor="inline")
    assert rule(store) == in_use(store) == name
    assert [cause for _, _, cause in versions.all()] == ["train", "fit", "quarantine", "repair", "fit"]
    assert store.verify(replay="all", executor="inline").problems == []


def test_a_fit_that_a_deletion_overtakes_is_thrown_away(folder: Path) -> None:
    """Else it would publish, as live, the constituents from before the quarantine."""
    store = kit.trained(recipe_for(folder, nobody()), folder / "store")
    versions = store.opened.ledger.versions
    before = versions.live()
    content = versions.fit_of(member_names(before))
    assert content is not None
    accept(store.opened, subjects=[next(iter(kit.places(store, TABLE)))])
    assert versions.publish_fit(before, member_names(before), content) == before.number + 1
    assert versions.live().cause == "quarantine"
    assert store.opened.ledger.database.rows("SELECT * FROM fitted") == []


def test_the_same_rows_and_constituents_are_no_new_version_and_other_rows_are(folder: Path) -> None:
    recipe = recipe_for(folder, nobody())
    store = kit.trained(recipe, folder / "store")
    before = store.version
    assert kit.trained(recipe, folder / "store").version == before
    papq.write_table(nobody(90), folder / "calibration.parquet")
    assert kit.trained(recipe, folder / "store").version == before + 1


def test_an_upgrade_that_retires_stages_drops_their_parameters(folder: Path) -> None:
    store = kit.trained(recipe_for(folder, nobody()), folder / "store")
    store.opened.ledger.stages.retire_others(code="newer", platform="newer")
    assert store.opened.ledger.database.rows("SELECT * FROM fitted") == []


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (nobody().append_column("person", pa.array(["p"] * 60)), "so its rows are somebody's"),
        (nobody().append_column("record", pa.array(["r"] * 60)), "so its rows are somebody's"),
        (nobody().drop_columns(["label"]), "has no column 'label'"),
        (nobody().slice(0, 0), "has no rows"),
    ],
)
def test_a_table_that_can_not_be_fitted_on_is_refused_before_anything_is_written(
    folder: Path, table: pa.Table, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        kit.trained(recipe_for(folder, table), folder / "store")
    assert not (folder / "store").exists()
