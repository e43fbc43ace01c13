"""Constituents that answer together give the labels that each gives alone, on every path."""

from __future__ import annotations

import itertools
import math
import threading

import numpy as np
import pytest
import torch
import training_models
from training_kit import category, images, numbers, recipe

from sisa.ensemble import stacked
from sisa.ensemble.aggregation import PLAIN, Fitted, Mean, Vote, aggregator
from sisa.ensemble.fitting import fit, fit_temperatures, fit_weights
from sisa.ensemble.stacked import Panel
from sisa.errors import RecipeError
from sisa.learners.alike import alike
from sisa.learners.columns import Columns
from sisa.learners.models import build_model
from sisa.learners.predict import Constituent, one_by_one
from sisa.learners.preprocess import Preprocessor
from sisa.learners.stacked_models import DenseStack, RefusedError, VmapStack
from sisa.learners.stacked_rows import RowStack
from sisa.recipe import ColumnSpec, parse_recipe
from sisa.recipe.identity import difference, recipe_digest
from sisa.recipe.loading import dump_recipe

PIXELS = {"pixels": ColumnSpec(type="vector", size=192)}
IMAGE = {"height": 8, "width": 8, "channels": 3}
MIXED = {
    "job": ColumnSpec(type="categorical"),
    "age": ColumnSpec(type="numeric"),
    "code": ColumnSpec(type="vector", size=3),
    "hours": ColumnSpec(type="numeric"),
}
JOBS = ("baker", "smith", "weaver", "miner", None)


def constituents(spec, tables, *, seed=0):
    """A constituent fitted on each table, with drawn weights and statistics that are no defaults."""
    found = []
    for index, table in enumerate(tables):
        torch.manual_seed(seed + index)
        preprocessor = Preprocessor.fit(spec, table)
        module = build_model(spec, preprocessor.feature_shape, 3)
        with torch.no_grad():
            for name, buffer in module.named_buffers():
                if buffer.is_floating_point():
                    buffer.copy_(torch.rand_like(buffer) + (0.5 if name.endswith("var") else 0))
            for parameter in module.parameters():
                parameter.mul_(2)
        found.append(Constituent(spec, preprocessor, module.eval(), seed=seed + index, class_count=3))
    return found


def mixed(count, *, seed, jobs=JOBS, odd=False):
    rng = np.random.default_rng(seed)
    numeric = rng.normal(40, 9, (2, count)).T
    codes = rng.normal(0, 2, (count, 3)).astype(np.float32)
    if odd:
        numeric[:3, 0] = [np.nan, np.inf, 1e308]
        codes[1] = np.nan
    texts = [jobs[i] for i in rng.integers(0, len(jobs), count)]
    plain = numbers([count], seed=seed)
    return Columns(numeric, (category(*texts),), (codes,), plain.labels_N, plain.uids_N, plain.slices_N)


def cases():
    own = {"factory": "training_models:small"}
    mlp = {"name": "mlp", "hidden": [9, 7], "activation": "gelu", "dropout": 0.4, "batch_norm": True}
    yield "mlp", recipe(model=mlp), lambda s, n: numbers([n], seed=s), "stacked"
    declared = {f"n{i}": ColumnSpec(type="numeric", mean=1.0, std=2.0) for i in range(6)}
    yield "declared scalers", recipe(model=mlp, columns=declared), lambda s, n: numbers([n], seed=s), "stacked"
    yield "logistic", recipe(model={"name": "logistic"}), lambda s, n: numbers([n], seed=s), "stacked"
    yield "a user's chain", recipe(model=own), lambda s, n: numbers([n], seed=s), "stacked"
    flat = recipe(model={"name": "mlp"}, columns=PIXELS, image=IMAGE)
    yield "images, flat", flat, lambda s, n: images([n], size=192, seed=s), "stacked"
    floats = lambda s, n: images([n], size=192, seed=s, dtype=np.float32)  # noqa: E731
    yield "float images, flat", flat, floats, "stacked"
    yield "mixed", recipe(columns=MIXED), lambda s, n: mixed(n, seed=s, odd=s == 99), "stacked"
    odd = recipe(model={"factory": "training_models:odd"})
    yield "shared parameters", odd, lambda s, n: numbers([n], seed=s), "vmap"
    cnn = recipe(model={"name": "cnn", "channels": [4], "hidden": [6]}, columns=PIXELS, image=IMAGE)
    yield "cnn", cnn, lambda s, n: images([n], size=192, seed=s), "sequential"
    drawing = recipe(model={"factory": "training_models:random_all_over"})
    yield "a constant of its own", drawing, lambda s, n: numbers([n], seed=s), "sequential"


@pytest.mark.parametrize(("spec", "make", "path"), [pytest.param(*case[1:], id=case[0]) for case in cases()])
@pytest.mark.parametrize("rule", sorted(PLAIN))
def test_every_path_gives_the_same_labels(spec, make, path, rule, monkeypatch):
    monkeypatch.setattr(stacked, "slower_together", lambda *_: False)
    members = constituents(spec, [make(seed, 40) for seed in range(6)])
    panel, aggregate = Panel(spec, members), aggregator(rule)
    taken = set()
    for count in (1, 2, 30, 300):
        columns = make(99, 300).rows(slice(0, count))
        reference = np.stack([member.posteriors(columns) for member in members])
        assert one_by_one(spec, members, columns).tobytes() == reference.tobytes()
        scores, used = panel.scores(columns, aggregate)
        taken.add(used)
        np.testing.assert_allclose(scores, aggregate.scores(reference), rtol=0, atol=1e-6)
        np.testing.assert_array_equal(scores.argmax(1), aggregate.scores(reference).argmax(1))
        np.testing.assert_allclose(scores.sum(1), 1)
        if used == "sequential":
            assert scores.tobytes() == aggregate.scores(reference).tobytes()
    assert taken == {path, "sequential"}  # 300 rows are too many


@pytest.mark.parametrize("odd", [False, True])
def test_stacked_rows_have_the_bits_of_each_preprocessor(odd):
    spec = recipe(columns=MIXED)
    preprocessors = [Preprocessor.fit(spec, mixed(30, seed=s, jobs=JOBS[: 2 + s])) for s in range(3)]
    assert len({p.feature_shape for p in preprocessors}) == 3  # vocabularies of different sizes
    rows, columns = RowStack(preprocessors), mixed(17, seed=5, odd=odd)
    together = rows.rows(columns).numpy()
    for index, preprocessor in enumerate(preprocessors):
        own = preprocessor.transform(columns)
        assert together[index][:, rows.places[index]].tobytes() == own.tobytes()
        assert together[index].sum() == pytest.approx(own.sum(), abs=1e-3)  # nothing lies in other places


def test_vocabularies_of_other_sizes_are_stacked_all_the_same():
    spec = recipe(columns=MIXED)
    members = constituents(spec, [mixed(30, seed=s, jobs=JOBS[: 2 + s]) for s in range(3)])
    columns = mixed(8, seed=4)
    scores, path = Panel(spec, members).scores(columns, Mean())
    assert path == "stacked"
    np.testing.assert_allclose(scores, np.mean([m.posteriors(columns) for m in members], axis=0), rtol=0, atol=1e-6)


def test_rows_that_are_too_close_to_call_are_answered_by_the_reference():
    spec, columns = recipe(), numbers([9])
    members = constituents(spec, [numbers([30], seed=s) for s in range(4)])
    for member in members:  # two classes that are the same
        with torch.no_grad():
            last = list(member.module.parameters())
            for tensor in last[-2:]:
                tensor[1:] = tensor[0]
    scores, path = Panel(spec, members).scores(columns, Mean())
    assert path == "sequential"
    assert scores.tobytes() == Mean().scores(np.stack([m.posteriors(columns) for m in members])).tobytes()


def test_one_close_vote_is_enough_for_the_reference():
    """The votes 2:1 stand, but who cast them may change with the last bit."""
    close = np.array([[[0.5 + 1e-9, 0.5 - 1e-9]], [[0.9, 0.1]], [[0.2, 0.8]]])
    vote, mean = (rule.with_margins(close)[1][0] for rule in (Vote(), Mean()))
    assert vote < stacked.UNCERTAIN < mean


def test_numbers_that_are_none_are_left_to_the_reference():
    spec = recipe()
    members = constituents(spec, [numbers([30], seed=s) for s in range(2)])
    with torch.no_grad():
        next(members[0].module.parameters()).fill_(float("nan"))
    assert Panel(spec, members).scores(numbers([3]), Mean())[1] == "sequential"


def test_one_constituent_and_no_rows_are_the_references():
    spec = recipe()
    members = constituents(spec, [numbers([30], seed=s) for s in range(2)])
    assert Panel(spec, members[:1]).scores(numbers([3]), Mean())[1] == "sequential"
    scores, path = Panel(spec, members).scores(numbers([3]).rows(slice(0, 0)), Mean())
    assert (scores.shape, path) == ((0, 3), "sequential")


def test_whoever_is_of_another_shape_answers_alone():
    spec, columns = recipe(), numbers([5])
    members = constituents(spec, [numbers([30], seed=s) for s in range(5)])
    wide = recipe(model={"name": "mlp", "hidden": [8], "activation": "tanh"})
    members[1] = constituents(wide, [numbers([30], seed=9)])[0]
    scores, path = Panel(spec, members).scores(columns, Mean())
    assert path == "stacked"
    np.testing.assert_allclose(scores, np.mean([m.posteriors(columns) for m in members], axis=0), rtol=0, atol=1e-6)


def test_a_panel_answers_in_several_threads():
    spec, columns = recipe(), numbers([300])
    members = constituents(spec, [numbers([30], seed=s) for s in range(4)])
    panel = Panel(spec, members)
    few = columns.rows(slice(0, 3))
    expected = {n: panel.scores(c, Mean())[0].tobytes() for n, c in (("all", columns), ("few", few))}
    threads, wrong = torch.get_num_threads(), []

    def ask():
        for _ in range(20):
            for name, rows in (("all", columns), ("few", few)):
                if panel.scores(rows, Mean())[0].tobytes() != expected[name]:
                    wrong.append(name)

    workers = [threading.Thread(target=ask) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong
    assert torch.get_num_threads() == threads


def test_answering_together_leaves_the_callers_settings_alone():
    spec = recipe()
    members = constituents(spec, [numbers([30], seed=s) for s in range(2)])
    before = (torch.get_num_threads(), torch.get_float32_matmul_precision(), bytes(torch.get_rng_state().numpy()))
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu"):
            scores, path = Panel(spec, members).scores(numbers([3]), Mean())
            assert torch.is_autocast_enabled("cpu")
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert path == "stacked"
    assert before == (
        torch.get_num_threads(), torch.get_float32_matmul_precision(), bytes(torch.get_rng_state().numpy())
    )  # fmt: skip
    expected = np.mean([m.posteriors(numbers([3])) for m in members], axis=0)
    np.testing.assert_allclose(scores, expected, rtol=0, atol=1e-6)


# --- which modules may stand for each other ----------------------------------------------------------


@pytest.mark.parametrize("name", ["small", "evaluating", "convolution", "odd", "threaded", "forgetful"])
def test_modules_of_one_factory_are_alike(name):
    shape = (2, 6, 6) if name == "convolution" else (6,)
    assert alike(*(getattr(training_models, name)(shape, 3) for _ in range(2)))


def test_modules_that_keep_something_else_are_not():
    def closing_over(value):
        class Net(torch.nn.Linear):
            def forward(self, x):
                return super().forward(x) * value

        return Net(6, 3)

    assert alike(closing_over(2.0), closing_over(2.0))
    assert not alike(closing_over(2.0), closing_over(3.0))
    assert not alike(closing_over(torch.ones(1)), closing_over(torch.zeros(1)))
    assert not alike(closing_over(object()), closing_over(object()))
    assert not alike(training_models.random_all_over((6,), 3), training_models.random_all_over((6,), 3))
    assert not alike(training_models.small((6,), 3), training_models.small((6,), 3, width=6))
    assert not alike(torch.nn.Dropout(0.1), torch.nn.Dropout(0.2))


def test_a_module_that_draws_or_branches_is_not_stacked():
    class Drawing(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x) + float(np.random.random())  # noqa: NPY002

    class Branching(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x) * (2 if x.sum() > 0 else 1)

    spec = recipe()
    fitted = [Preprocessor.fit(spec, numbers([30], seed=s)) for s in range(2)]
    for kind in (Drawing, Branching):
        members = [Constituent(spec, fitted[s], kind(6, 3).eval(), seed=s, class_count=3) for s in range(2)]
        with pytest.raises(RefusedError):
            VmapStack(spec, members).logits(numbers([4]))
        assert Panel(spec, members).scores(numbers([4]), Mean())[1] == "sequential"


def test_a_module_that_answers_otherwise_together_is_not_stacked():
    class Noticing(torch.nn.Linear):
        def forward(self, x):
            together = torch._C._functorch.is_batchedtensor(self.weight)
            return super().forward(x) + torch.tensor([0.1 if together else 0.0, 0.0, 0.0])

    spec = recipe()
    fitted = [Preprocessor.fit(spec, numbers([30], seed=s)) for s in range(2)]
    members = [Constituent(spec, fitted[s], Noticing(6, 3).eval(), seed=s, class_count=3) for s in range(2)]
    columns = numbers([4])
    scores, path = Panel(spec, members).scores(columns, Mean())
    assert path == "sequential"
    assert scores.tobytes() == Mean().scores(np.stack([m.posteriors(columns) for m in members])).tobytes()


def test_a_hook_keeps_a_chain_from_being_taken_apart():
    spec = recipe()
    members = constituents(spec, [numbers([30], seed=s) for s in range(2)])
    members[0].module.register_forward_hook(lambda _module, _inputs, logits: logits * 2)
    columns = numbers([4])
    scores, path = Panel(spec, members).scores(columns, Mean())
    assert path == "sequential"
    assert scores.tobytes() == Mean().scores(np.stack([m.posteriors(columns) for m in members])).tobytes()
    assert isinstance(DenseStack(spec, members[1:]), DenseStack)


# --- rules -------------------------------------------------------------------------------------------

POSTERIORS = np.array([[[0.9, 0.1]], [[0.4, 0.6]], [[0.3, 0.7]]])


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("mean", [1.6 / 3, 1.4 / 3]),
        ("vote", [1 / 3, 2 / 3]),
        ("trimmed_mean", [0.4, 0.6]),
        ("median", [0.4, 0.6]),
    ],
)
def test_rules(rule, expected):
    np.testing.assert_allclose(aggregator(rule).scores(POSTERIORS), [expected])
    assert aggregator(rule).name == rule


def drawn(count=7, rows=50, classes=3, *, seed=0, sharpness=1.0):
    logits = np.random.default_rng(seed).normal(0, 2, (count, rows, classes)) * sharpness
    exp = np.exp(logits - logits.max(2, keepdims=True))
    return exp / exp.sum(2, keepdims=True), logits


@pytest.mark.parametrize("count", [1, 2, 3, 20, 21])
def test_trimmed_mean_and_median_are_those_of_a_loop(count):
    posteriors, _ = drawn(count)
    cut = max(1, count // 10) if count >= 3 else 0
    for rule, middle in (
        ("trimmed_mean", lambda v: np.mean(sorted(v)[cut : count - cut])),
        ("median", lambda v: (sorted(v)[(count - 1) // 2] + sorted(v)[count // 2]) / 2),
    ):
        for row, scores in enumerate(aggregator(rule).scores(posteriors)):
            left = [middle(posteriors[:, row, c].tolist()) for c in range(3)]
            np.testing.assert_allclose(scores, np.array(left) / sum(left))


@pytest.mark.parametrize("rule", ["trimmed_mean", "median"])
def test_when_everybody_is_sure_of_another_class_nothing_is_left_but_the_mean(rule):
    scores = aggregator(rule).scores(np.eye(3)[:, None, :])
    np.testing.assert_allclose(scores, np.full((1, 3), 1 / 3))


@pytest.mark.parametrize("rule", [*PLAIN, "calibrated", "weighted"])
@pytest.mark.parametrize("seed", range(5))
def test_no_label_changes_within_the_margin(rule, seed):
    """Numbers before the softmax are moved by almost as much as a margin says."""
    posteriors, logits = drawn(seed=seed, rows=200)
    parameters = tuple(np.random.default_rng(seed).dirichlet(np.ones(7)))
    names = tuple("abcdefg")
    one = aggregator(rule, members=names, fitted=Fitted(rule, parameters, names) if rule not in PLAIN else None)
    scores, margins = one.with_margins(posteriors)
    labels = scores.argmax(1)
    assert np.array_equal(scores, one.scores(posteriors))
    assert (margins > 0).any()
    for attempt in range(20):
        signs = np.random.default_rng(attempt).choice([-1.0, 1.0], logits.shape)
        moved = np.exp(logits + 0.99 * margins[:, None] * signs)
        np.testing.assert_array_equal(one.scores(moved / moved.sum(2, keepdims=True)).argmax(1), labels)


def test_parameters_belong_to_the_members_that_they_were_fitted_for():
    fitted = Fitted("weighted", (0.2, 0.8), ("a", "b"))
    two = POSTERIORS[:2]
    used = aggregator("weighted", members=["a", "b"], fitted=fitted)
    np.testing.assert_allclose(used.scores(two), 0.2 * two[0] + 0.8 * two[1])
    for members in (["a"], ["b", "a"], ["a", "c"], ["a", "b", "c"]):
        assert aggregator("weighted", members=members, fitted=fitted).name == "mean"
    assert aggregator("calibrated", members=["a", "b"], fitted=fitted).name == "mean"
    assert aggregator("weighted", members=["a", "b"]).name == "mean"
    assert aggregator("mean", members=["a", "b"], fitted=fitted).name == "mean"
    assert Fitted.from_json(fitted.to_json()) == fitted


@pytest.mark.parametrize(
    ("name", "parameters", "members", "message"),
    [
        ("mean", (1.0,), ("a",), "calibrated, weighted"),
        ("weighted", (1.0,), ("a", "b"), "each of 2 members"),
        ("weighted", (1.5, -0.5), ("a", "b"), "sum to one"),
        ("weighted", (0.5, 0.4), ("a", "b"), "sum to one"),
        ("calibrated", (0.0, 1.0), ("a", "b"), "above 0"),
        ("calibrated", (math.nan, 1.0), ("a", "b"), "finite"),
        ("calibrated", (), (), "0 members"),
    ],
)
def test_parameters_that_can_not_be(name, parameters, members, message):
    with pytest.raises(ValueError, match=message):
        Fitted(name, parameters, members)


def nll(posteriors, labels):
    return -np.log(posteriors[np.arange(len(labels)), labels]).mean()


def labels_of(logits, *, seed=3):
    """Labels that posteriors of these logits would be right about."""
    exp = np.exp(logits - logits.max(1, keepdims=True))
    return np.array(
        [np.random.default_rng(seed + i).choice(3, p=row) for i, row in enumerate(exp / exp.sum(1)[:, None])]
    )


@pytest.mark.parametrize("factor", [0.3, 1.0, 4.0])
def test_temperatures_are_those_of_a_search_over_all(factor):
    posteriors, logits = drawn(3, 300)
    labels = labels_of(logits[0])
    sharper, _ = drawn(3, 300, sharpness=factor)
    found = fit_temperatures(sharper, labels)
    grid = np.geomspace(0.05, 20, 4001)
    for member, temperature in zip(sharper, found, strict=True):
        losses = [nll(np.exp(np.log(member) / t) / np.exp(np.log(member) / t).sum(1)[:, None], labels) for t in grid]
        assert temperature == pytest.approx(grid[int(np.argmin(losses))], rel=3e-3)
    assert found[0] == pytest.approx(factor, rel=0.3)
    np.testing.assert_array_equal(found, fit_temperatures(sharper, labels))
    assert posteriors.shape == sharper.shape


def test_temperatures_end_where_the_search_ends():
    right = np.array([[[0.9, 0.1], [0.2, 0.8]], [[0.1, 0.9], [0.9, 0.1]], [[1.0, 0.0], [0.0, 1.0]]])
    found = fit_temperatures(right, np.array([0, 1]))
    np.testing.assert_allclose(found[:2], [0.05, 20.0])
    assert np.isfinite(found).all()


@pytest.mark.parametrize("seed", range(3))
def test_weights_are_those_of_a_search_over_all(seed):
    posteriors, logits = drawn(3, 120, seed=seed)
    labels = labels_of(logits[0] * 0.7 + logits[1] * 0.3)
    found = fit_weights(posteriors, labels)
    assert found.min() >= 0
    assert found.sum() == pytest.approx(1, abs=1e-12)
    grid = [(a / 100, b / 100, (100 - a - b) / 100) for a, b in itertools.product(range(101), repeat=2) if a + b <= 100]
    best = min(nll(np.tensordot(np.array(w), posteriors, axes=1), labels) for w in grid)
    assert nll(np.tensordot(found, posteriors, axes=1), labels) <= best + 1e-6
    np.testing.assert_array_equal(found, fit_weights(posteriors, labels))


def test_a_row_that_everybody_has_wrong_has_a_loss():
    posteriors = np.array([[[1.0, 0.0], [1.0, 0.0]], [[1.0, 0.0], [0.4, 0.6]]])
    np.testing.assert_allclose(fit_weights(posteriors, np.array([1, 1])), [0, 1], atol=1e-5)


def test_a_fit_improves_on_the_mean_and_names_its_members():
    posteriors, logits = drawn(4, 200, seed=8)
    labels = labels_of(logits[2])
    plain = nll(Mean().scores(posteriors), labels)
    for name in ("calibrated", "weighted"):
        fitted = fit(name, posteriors, labels, ["a", "b", "c", "d"])
        rule = aggregator(name, members=["a", "b", "c", "d"], fitted=fitted)
        assert rule.name == name
        assert nll(rule.scores(posteriors), labels) < plain
        np.testing.assert_allclose(rule.scores(posteriors).sum(1), 1)


@pytest.mark.parametrize(
    ("posteriors", "labels", "message"),
    [
        (np.zeros((0, 2, 2)), [0, 1], "at least one"),
        (np.zeros((2, 0, 2)), [], "at least one"),
        (np.full((2, 2, 2), 0.5), [0], "2 labels"),
        (np.full((2, 2, 2), 0.5), [0, 2], "classes 0..1"),
        (np.full((2, 2, 2), 0.5), [-1, 0], "classes 0..1"),
        (np.full((2, 2, 2), math.nan), [0, 1], "finite"),
    ],
)
def test_what_can_not_be_fitted_on(posteriors, labels, message):
    for name in ("calibrated", "weighted"):
        with pytest.raises(ValueError, match=message):
            fit(name, posteriors, np.array(labels, np.int64), ["a", "b"])
    with pytest.raises(ValueError, match="expected one of"):
        fit("mean", posteriors, np.array(labels, np.int64), ["a", "b"])


# --- in the recipe -----------------------------------------------------------------------------------


def asking(aggregation):
    content = recipe().model_dump(mode="json", exclude_none=True)
    return parse_recipe({**content, "sisa": {"shards": 2, "slices": 3, "aggregation": aggregation}})


@pytest.mark.parametrize("aggregation", [*PLAIN, {"name": "calibrated", "table": "a.parquet"}])
def test_an_aggregation_is_no_part_of_a_trainings_identity(aggregation):
    asked = asking(aggregation)
    assert recipe_digest(asked) == recipe_digest(recipe())
    name = aggregation if isinstance(aggregation, str) else aggregation["name"]
    assert asked.sisa.aggregation_name == name
    expected = [] if name == "mean" else [f"sisa.aggregation: the store has 'mean', asked for {name!r}"]
    assert difference(recipe(), asked)[:1] == expected
    import yaml

    assert parse_recipe(yaml.safe_load(dump_recipe(asked))) == asked


def test_another_table_is_named_in_the_difference():
    one, other = (asking({"name": "weighted", "table": table}) for table in ("a.parquet", "b.parquet"))
    expected = "sisa.aggregation.table: the store has 'a.parquet', asked for 'b.parquet'"
    assert difference(one, other) == [expected]


@pytest.mark.parametrize(
    ("aggregation", "message"),
    [
        (
            "mode",
            "sisa.aggregation: expected one of mean, vote, trimmed_mean, median, calibrated, weighted, got 'mode'",
        ),
        ("weighted", "sisa.aggregation: weighted is fitted on rows that are nobody's"),
        ({"name": "weighted"}, "sisa.aggregation.table: weighted is fitted on rows that are nobody's"),
        ({"name": "mean", "table": "x"}, "sisa.aggregation.table: mean has no parameters"),
        ({"name": "weighted", "tabel": "x", "table": "x"}, "sisa.aggregation.tabel: no such field"),
        (3, "sisa.aggregation: expected one of .* got 3"),
    ],
)
def test_an_aggregation_that_is_refused(aggregation, message):
    with pytest.raises(RecipeError, match=message):
        asking(aggregation)


def test_a_rule_without_parameters_may_be_written_either_way():
    assert asking({"name": "median"}) == asking("median")


@pytest.mark.parametrize("rows", [1, 3, 21, 22, 400])
def test_a_mean_adds_one_constituent_after_another_whatever_the_number_of_rows(rows):
    posteriors_CSB = np.random.default_rng(rows).dirichlet(np.ones(3), (20, rows)).transpose(2, 0, 1).copy()
    posteriors_SBC = posteriors_CSB.transpose(1, 2, 0)  # as they come of a stack
    total_BC = np.zeros((rows, 3))
    for posteriors_BC in posteriors_SBC:
        total_BC = total_BC + posteriors_BC
    assert Mean().scores(posteriors_SBC).tobytes() == (total_BC / 20).tobytes()
