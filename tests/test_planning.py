"""The arithmetic of budgets and costs, against sums written out."""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tables import binary_recipe

from sisa.execution.options import Execution
from sisa.planning.cost import chain_record_epochs, expected_fraction
from sisa.planning.epochs import epoch_budget, largest_slices
from sisa.recipe import ColumnSpec, parse_recipe


@given(st.integers(1, 200), st.integers(1, 40))
def test_the_budget_is_the_papers_in_integers(epochs: int, slices: int) -> None:
    if slices > largest_slices(epochs):
        with pytest.raises(ValueError, match=f"at most {largest_slices(epochs)} slices"):
            epoch_budget(epochs=epochs, slices=slices)
        return
    budget = epoch_budget(epochs=epochs, slices=slices)
    assert len(budget) == slices
    assert all(stage >= 1 for stage in budget)
    assert sum(budget) == 2 * epochs * slices // (slices + 1)
    assert max(budget) - min(budget) <= 1
    assert epoch_budget(epochs=epochs, slices=1) == (epochs,)


@given(st.lists(st.integers(0, 50), min_size=1, max_size=6), st.integers(4, 20))
def test_record_epochs_are_the_sum_over_stages_epochs_and_slices(slices: list[int], epochs: int) -> None:
    budget = epoch_budget(epochs=epochs, slices=len(slices))
    for first in range(1, len(slices) + 1):
        by_hand = sum(
            slices[s] for stage in range(first, len(slices) + 1) for _ in range(budget[stage - 1]) for s in range(stage)
        )
        assert chain_record_epochs(slices, budget, first_stage=first) == by_hand


@pytest.mark.parametrize(("shards", "slices", "deletions"), [(4, 3, 1), (5, 4, 3), (2, 2, 8)])
def test_the_expected_share_is_what_drawing_requests_gives(shards: int, slices: int, deletions: int) -> None:
    drawn, rng = 4000, random.Random(5)
    total = 0.0
    for _ in range(drawn):
        first = [slices + 1] * shards
        for _ in range(deletions):
            shard, slice_ = rng.randrange(shards), rng.randrange(1, slices + 1)
            first[shard] = min(first[shard], slice_)
        work = sum(stage for start in first for stage in range(start, slices + 1))
        total += work / (shards * slices * (slices + 1) / 2)
    assert expected_fraction(shards=shards, slices=slices, deletions=deletions) == pytest.approx(
        total / drawn, abs=0.02
    )


def test_the_share_grows_to_everything() -> None:
    shares = [expected_fraction(shards=20, slices=50, deletions=k) for k in (0, 1, 8, 39, 10_000)]
    assert shares == sorted(shares)
    assert shares[0] == 0.0
    assert shares[-1] == pytest.approx(1.0)
    assert expected_fraction(shards=20, slices=50, deletions=39) == pytest.approx(0.704, abs=0.001)


def test_auto_runs_small_work_here_and_long_work_on_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1})
    recipe = parse_recipe(binary_recipe()).resolved({"x": ColumnSpec(type="vector", size=12)})
    auto = Execution()
    assert not auto.uses_ray(recipe, chains=4, record_epochs=1_000)
    assert auto.uses_ray(recipe, chains=4, record_epochs=10**7)
    assert not auto.uses_ray(recipe, chains=1, record_epochs=10**7)  # one chain has one worker
    for executor, address in itertools.product(("ray", "inline"), (None, "auto")):
        chosen = Execution(executor=executor, address=address)  # type: ignore[arg-type]
        assert chosen.uses_ray(recipe, chains=1, record_epochs=1) == (executor == "ray")
    assert Execution(address="auto").uses_ray(recipe, chains=1, record_epochs=1)
