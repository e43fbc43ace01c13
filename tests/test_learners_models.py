"""Models: what is built, what is refused before a run, and which source counts."""

import sys
from textwrap import dedent

import numpy as np
import pytest
import torch
from training_kit import images, numbers, recipe, stage

from sisa.errors import UserError
from sisa.learners.check import check_model
from sisa.learners.models import build_model
from sisa.learners.predict import Constituent, posteriors
from sisa.learners.source import code_version, model_source_digest
from sisa.recipe import ColumnSpec
from sisa.state import StageState

IMAGE = {"height": 8, "width": 8, "channels": 3}
PIXELS = {"pixels": ColumnSpec(type="vector", size=192)}


def shapes(module):
    return {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}


def test_default_models():
    logistic = build_model(recipe(model={"name": "logistic"}), (6,), 3)
    assert shapes(logistic) == {"0.weight": (3, 6), "0.bias": (3,)}
    mlp = build_model(recipe(model={"name": "mlp"}), (6,), 3)
    assert shapes(mlp)["0.weight"] == (128, 6)
    assert isinstance(mlp[1], torch.nn.ReLU)
    cnn = build_model(recipe(model={"name": "cnn"}, columns=PIXELS, image=IMAGE), (3, 8, 8), 3)
    assert [shape for name, shape in shapes(cnn).items() if "weight" in name] == [
        (16, 3, 3, 3),
        (32, 16, 3, 3),
        (64, 128),
        (3, 64),
    ]


def test_parameters_of_an_mlp_have_the_same_names_for_images():
    assert shapes(build_model(recipe(), (192,), 3)) == shapes(
        build_model(recipe(image=IMAGE, columns=PIXELS), (3, 8, 8), 3)
    )


def test_a_cnn_for_which_the_image_is_too_small_is_refused():
    spec = recipe(model={"name": "cnn", "channels": [4, 4, 4, 4]}, columns=PIXELS, image=IMAGE)
    with pytest.raises(UserError, match=r"model\.channels"):
        check_model(spec)


@pytest.mark.parametrize(
    "model",
    [
        {"name": "mlp"},
        {"name": "logistic"},
        {"name": "mlp", "batch_norm": True, "dropout": 0.5},
        {"factory": "training_models:small", "options": {"width": 3}},
        {"factory": "training_models:odd"},
        {"factory": "training_models:random_all_over"},
    ],
    ids=str,
)
def test_models_that_can_be_used(model):
    check_model(recipe(model=model))


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        ("training_models:wide", r"shape \(4, 4\) for 4 rows, expected \(4, 3\)"),
        ("training_models:constant", "no parameters to train"),
        ("training_models:entropic", "two trainings from one seed gave different weights"),
        ("training_models:forgetful", "differs from training straight through"),
        ("training_models:lazy", "lazy modules, which are not supported yet"),
        ("training_models:half", "bfloat16, which is not supported yet"),
        ("training_models:extra", "extra state"),
        ("training_models:failing", r"failed with ValueError: no idea what to do with \(6,\)"),
        ("training_models:nothing", "returned NoneType, expected a torch.nn.Module"),
        ("training_models:absent", "has no function 'absent'"),
        ("training_models:PLACE", "has no function 'PLACE'"),
        ("no_such_package:build", "'no_such_package' can't be imported"),
    ],
)
def test_models_that_are_refused_before_anything_is_written(factory, message):
    with pytest.raises(UserError, match=message) as caught:
        check_model(recipe(model={"factory": factory}))
    assert "model.factory" in caught.value.message


@pytest.mark.parametrize(
    ("training", "message"),
    [
        ({"optimizer": {"name": "torch.optim.LBFGS", "lr": 0.1}}, "not supported yet"),
        ({"optimizer": {"name": "torch.optim.Nonsense", "lr": 0.1}}, "there is no torch.optim.Nonsense"),
        ({"optimizer": {"name": "torch.optim.Optimizer", "lr": 0.1}}, "is not an optimiser"),
        ({"optimizer": {"name": "torch.optim.RMSprop", "lr": 0.1, "betas": 3}}, "refused its arguments"),
        ({"optimizer": {"name": "adam", "lr": 0.1, "betas": [0.9, 2.0]}}, "refused its arguments"),
        ({"optimizer": {"name": "sgd", "lr": 0.1, "momentum": -1.0}}, r"training\.optimizer\.momentum"),
        ({"optimizer": {"name": "sgd", "lr": 0.1, "nesterov": True}}, r"training\.optimizer\.nesterov"),
        ({"schedule": {"name": "step"}}, r"training\.schedule\.step_size: expected a number, got nothing"),
        ({"schedule": {"name": "exponential"}}, r"training\.schedule\.gamma"),
        ({"schedule": {"name": "torch.optim.lr_scheduler.Nonsense"}}, "there is no"),
        ({"schedule": {"name": "torch.optim.lr_scheduler.StepLR"}}, "refused its arguments"),
        ({"device": "cuda"}, "sees no GPU"),
    ],
    ids=str,
)
def test_settings_that_are_refused_before_anything_is_written(training, message):
    if "device" in training and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(UserError, match=message):
        check_model(recipe(training=training))


def test_predictions_are_made_in_evaluation_mode_and_change_nothing():
    spec = recipe(model={"name": "mlp", "hidden": [6], "batch_norm": True, "dropout": 0.5})
    columns = numbers([30])
    state = stage(spec, columns)
    before = {name: array.copy() for name, array in state.tensors.items()}
    constituent = Constituent.from_state(spec, 3, state)
    scores = constituent.posteriors(columns)
    assert scores.shape == (30, 3)
    assert scores.dtype == np.float64
    np.testing.assert_allclose(scores.sum(1), 1)
    assert constituent.posteriors(columns).tobytes() == scores.tobytes()
    one_by_one = np.concatenate([constituent.posteriors(columns.rows(slice(i, i + 1))) for i in range(30)])
    np.testing.assert_allclose(one_by_one, scores, atol=1e-6)
    np.testing.assert_allclose(posteriors(state, spec, columns, batch_size=7), scores, atol=1e-6)
    assert all(state.tensors[name].tobytes() == array.tobytes() for name, array in before.items())
    assert constituent.posteriors(columns.rows(slice(0, 0))).shape == (0, 3)


def test_predictions_are_those_of_the_module():
    spec = recipe(model={"name": "cnn", "channels": [4], "hidden": [6]}, columns=PIXELS, image=IMAGE)
    columns = images([10], size=192)
    state = stage(spec, columns)
    module = build_model(spec, (3, 8, 8), 3).eval()
    module.load_state_dict(
        {n.removeprefix("model."): torch.tensor(a) for n, a in state.tensors.items() if n.startswith("model.")}
    )
    mean, std = state.tensors["preprocess.vector_scale"][:, 0]
    X = torch.tensor((columns.vectors[0] - mean) / std, dtype=torch.float32).view(-1, 8, 8, 3).permute(0, 3, 1, 2)
    with torch.no_grad():
        expected = module(X).double().softmax(1).numpy()
    np.testing.assert_allclose(posteriors(state, spec, columns), expected, atol=1e-6)


def test_a_constant_that_a_module_draws_but_does_not_register_is_the_same_when_it_answers():
    spec = recipe(model={"factory": "training_models:random_all_over"})
    state = stage(spec, numbers([9]))
    first = posteriors(state, spec, numbers([5], seed=1))
    torch.rand(3)
    assert posteriors(state, spec, numbers([5], seed=1)).tobytes() == first.tobytes()


def test_a_state_of_another_model_is_refused():
    state = stage(recipe(), numbers([9]))
    with pytest.raises(ValueError, match=r"model\.0\.weight"):
        Constituent.from_state(recipe(model={"name": "mlp", "hidden": [7]}), 3, state)
    with pytest.raises(ValueError, match="differ in"):
        Constituent.from_state(recipe(model={"name": "logistic"}), 3, state)
    with pytest.raises(ValueError, match="without records"):
        Constituent.from_state(recipe(), 3, StageState())


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A user's package of several modules that import each other."""
    files = {
        "mine_pkg/__init__.py": "",
        "mine_pkg/models.py": "from . import layers\nfrom mine_pkg.sub.deep import build_layer\nimport json\n\n"
        "def build(shape, classes):\n    import mine_late\n    return layers.make(shape, classes)\n",
        "mine_pkg/layers.py": "import torch\nfrom mine_pkg import models\n\ndef make(shape, classes):\n    return torch.nn.Linear(shape[0], classes)\n",
        "mine_pkg/sub/__init__.py": "",
        "mine_pkg/sub/deep.py": "import yaml\nbuild_layer = None\n",
        "mine_pkg/unrelated.py": "",
        "mine_late.py": "x = 1\n",
        "mine_pkg/sub/alone.py": "def build(shape, classes):\n    return None\n",
    }
    for name, content in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(dedent(content))
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    forget()


def forget():
    """Know no more of the package than a new process does."""
    for name in [name for name in sys.modules if name.startswith(("mine_pkg", "mine_late"))]:
        del sys.modules[name]


def mine():
    return recipe(model={"factory": "mine_pkg.models:build"})


@pytest.mark.parametrize("changed", ["models", "layers", "sub/deep", "sub/__init__", "__init__", "../mine_late"])
def test_any_change_of_a_models_source_changes_the_code_version(package, changed):
    before = code_version(mine())
    assert code_version(mine()) == before
    path = package / "mine_pkg" / f"{changed}.py"
    path.write_text(path.read_text() + "# other\n")
    forget()
    assert code_version(mine()) != before


def test_packages_around_a_factory_count_although_nothing_imports_them(package):
    spec = recipe(model={"factory": "mine_pkg.sub.alone:build"})
    versions = [code_version(spec)]
    for name in ("mine_pkg/sub/__init__.py", "mine_pkg/__init__.py"):
        (package / name).write_text("x = 1\n")
        forget()
        versions.append(code_version(spec))
    assert len(set(versions)) == 3


def test_other_files_do_not_change_the_code_version(package):
    before = code_version(mine())
    (package / "mine_pkg" / "unrelated.py").write_text("x = 2")
    assert code_version(mine()) == before


@pytest.mark.usefixtures("package")
def test_the_version_of_an_installed_package_counts(monkeypatch):
    before = code_version(mine())
    monkeypatch.setattr("importlib.metadata.version", lambda _: "99.0")
    assert code_version(mine()) != before


def test_built_in_models_have_no_source_and_a_missing_one_is_an_error():
    assert model_source_digest(recipe()) == ""
    assert len(code_version(recipe())) == 64
    assert code_version(recipe()) == code_version(recipe(model={"name": "logistic"}))
    with pytest.raises(UserError, match=r"'no_such_package\.models' can't be found"):
        code_version(recipe(model={"factory": "no_such_package.models:build"}))


def test_the_semantics_number_is_part_of_the_code_version(monkeypatch):
    before = code_version(recipe())
    monkeypatch.setattr("sisa.learners.source.SEMANTICS", 2)
    assert code_version(recipe()) != before


def test_a_model_with_a_syntax_error_is_an_error_that_says_where(package):
    (package / "mine_pkg" / "layers.py").write_text("x = (\n")
    with pytest.raises(UserError, match=r"layers\.py, line 1"):
        code_version(mine())
