"""Answers come from clean constituents of one version, with one voice each."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from store_kit import train
from tables import binary, binary_recipe

from sisa.errors import DamagedError, NoConstituentError, UserError
from sisa.store.store import Store


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """A small trained store."""
    return train(tmp_path, binary_recipe(), binary())


def test_scores_are_the_mean_of_the_constituents_in_evaluation_mode(store: Store) -> None:
    rows = binary().select(["x"])
    twice = [store.predict_proba(rows) for _ in range(2)]
    np.testing.assert_array_equal(*twice)  # dropout is off and batch statistics are frozen
    np.testing.assert_allclose(twice[0].sum(axis=1), 1.0)
    one_by_one = np.concatenate([store.predict_proba(rows.slice(i, 1)) for i in range(rows.num_rows)])
    np.testing.assert_allclose(one_by_one, twice[0], atol=1e-6)  # a row's scores don't depend on its neighbours


def test_an_array_and_a_dict_are_rows_too(store: Store) -> None:
    rows = binary().select(["x"])
    bits = np.array(rows["x"].to_pylist())
    np.testing.assert_array_equal(store.predict_proba(bits), store.predict_proba(rows))
    np.testing.assert_array_equal(store.predict_proba({"x": bits}), store.predict_proba(rows))
    assert set(store.predict(rows)) <= {0, 1}


def test_an_answer_that_a_quarantine_overtakes_is_computed_again(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    other = type(store)(store.opened)
    answers = []
    real = store.ensemble._current

    def overtaken() -> object:
        found = real()
        if not answers:
            answers.append(found[0].number)
            other.delete(subjects=[leaver], defer=True)  # acknowledged while the batch is being computed
        return found

    from sisa.records.partition import present_ids

    leaver = present_ids(store.opened.layout, 0, 1)[1][0].as_py()
    monkeypatch.setattr(store.ensemble, "_current", overtaken)
    from sisa.learners.columns import columns_from_table
    from sisa.records.features import feature_table

    columns = columns_from_table(feature_table(binary().select(["x"]), store.opened.recipe), store.opened.recipe)
    answer = store.ensemble.answer(columns)
    assert answer.version > answers[0]
    assert answer.voters == store.opened.shards - 1


def test_nobody_left_is_said_and_not_guessed(store: Store) -> None:
    from sisa.records.partition import present_ids

    leavers = [present_ids(store.opened.layout, shard, 1)[1][0].as_py() for shard in range(store.opened.shards)]
    store.delete(subjects=leavers, defer=True)
    with pytest.raises(NoConstituentError, match="no clean constituent"):
        store.predict_proba(binary().select(["x"]))
    assert store.measure() is None


def test_a_damaged_constituent_is_an_error_with_a_name(store: Store) -> None:
    member = store.opened.ledger.versions.live().members[0]
    folder = next(store.opened.layout.checkpoints.glob(f"shard-0000/stage-{member.stage:02d}-*"))
    chunk = next(path for path in folder.rglob("*") if path.is_file() and path.name != "zarr.json")
    chunk.unlink()
    with pytest.raises(DamagedError, match="stage"):
        store.predict_proba(binary().select(["x"]))


def test_a_text_is_no_list_of_ids(store: Store) -> None:
    with pytest.raises(UserError, match="expected a list of ids"):
        store.delete(subjects="17")
    assert store.status()["requests"] == []


def test_a_lost_recipe_forgets_nobody(tmp_path: Path, store: Store) -> None:
    store.delete(subjects=["3"], defer=True)
    store.opened.layout.recipe.unlink()
    with pytest.raises(DamagedError, match=r"recipe\.yaml"):
        train(tmp_path, binary_recipe(), binary())
    assert store.opened.ledger.requests.exclusions()
