"""A recipe that is wrong: everything that is, at once, with the field's path and what would have been right."""

from __future__ import annotations

import sys

import pytest
import yaml
from cli_kit import Cli, prepare, recipe

from sisa.recipe.wording import number_hint


@pytest.fixture
def cli(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    prepare(tmp_path)
    return Cli(capsys)


def problems(failure):
    """What a message lists."""
    return [line.removeprefix("  - ") for line in failure.message.splitlines()[1:]]


def refused(cli, tmp_path, *words):
    """Train; nothing may be written."""
    failure = cli.refused("train", "recipe.yaml", *words)
    assert not (tmp_path / "store").exists()
    return failure


def test_many_mistakes_are_one_message(cli, tmp_path):
    wrong = recipe(
        model={"hiden": [3], "activation": "tahn", "hidden": [4, -1]},
        training={"batch_size": "16", "optimizer": {"name": "sgdd", "lr": 0.05}},
        sisa={"shards": 0, "slices": 9},
    )
    wrong["stor"] = wrong.pop("store")
    wrong["data"]["recordid"] = wrong["data"].pop("record_id")
    wrong["data"]["holdout"] = {"fraction": 1.5}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(wrong))
    failure = refused(cli, tmp_path, "--store", "store")
    assert failure.message.splitlines()[0] == "recipe.yaml has 11 problems:"
    assert problems(failure) == [
        "data.holdout.fraction: expected less than 1.0, got 1.5",
        "data.record_id: missing; it has no default",
        "data.recordid: no such field; did you mean 'record_id'?",
        "model.activation: expected 'relu', 'tanh', 'gelu' or 'silu', got 'tahn'",
        "model.hidden.1: expected at least 1, got -1",
        "model.hiden: no such field; did you mean 'hidden'?",
        "sisa.shards: expected at least 1, got 0",
        "sisa.slices: 9 slices need more than 2 epochs (2 * epochs / (slices + 1) must be at least 1); the largest number for 2 epochs is 3",
        "stor: no such field; did you mean 'store'?",
        "training.batch_size: expected a whole number, got '16'",
        "training.optimizer.name: expected one of sgd, adam, adamw or torch.optim.CLASS, got 'sgdd'",
    ]


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("training.epoch=3", ["training.epoch: no such field; did you mean 'epochs'?"]),
        ("training.epochs=", ["training.epochs: expected a whole number, got nothing"]),
        ("training.epochs=true", ["training.epochs: expected a whole number, got true"]),
        ("training.epochs=2.5", ["training.epochs: expected a whole number, got 2.5"]),
        ("training.epochs=0", ["training.epochs: expected at least 1, got 0"]),
        ("training.optimizer=sgd", ["training.optimizer: expected a mapping of fields, got 'sgd'"]),
        ("training.optimizer.lr=-1", ["training.optimizer.lr: expected more than 0.0, got -1.0"]),
        ("training.optimizer.lr=.inf", ["training.optimizer.lr: expected a finite number, got inf"]),
        (
            "training.optimizer.lr=1e-3",
            ["training.optimizer.lr: expected a number, got the text '1e-3' (YAML reads 1e-3 as text: write 0.001)"],
        ),
        (
            "training.optimizer.lr=1.0e30",
            ["training.optimizer.lr: expected a number, got the text '1.0e30' (YAML reads 1.0e30 as text: write 1.0e+30)"],
        ),
        (
            "training.optimizer.lr='0.1'",
            ["training.optimizer.lr: expected a number, got the text '0.1' (in quotes it is a text: write 0.1)"],
        ),
        ("training.optimizer.lr=small", ["training.optimizer.lr: expected a number, got the text 'small'"]),
        (
            "training.optimizer={name: adam, lr: 0.1, eps: 1e-8, betas: [0.9, -.5e3]}",
            [
                "training.optimizer.betas: expected a number, got the text '-.5e3' (YAML reads -.5e3 as text: write -500.0)",
                "training.optimizer.eps: expected a number, got the text '1e-8' (YAML reads 1e-8 as text: write 1.0e-08)",
            ],
        ),
        (
            "training.optimizer={name: torch.optim.Adagrad, lr: 0.1, eps: 1e-10}",
            ["training.optimizer.eps: expected a number, got the text '1e-10' (YAML reads 1e-10 as text: write 1.0e-10)"],
        ),
        (
            "training.schedule={name: exponential, gamma: 9e-1}",
            ["training.schedule.gamma: expected a number, got the text '9e-1' (YAML reads 9e-1 as text: write 0.9)"],
        ),
        (
            "data.columns={age: {mean: 4e1, std: wide}}",
            [
                "data.columns.age.mean: expected a number, got the text '4e1' (YAML reads 4e1 as text: write 40.0)",
                "data.columns.age.std: expected a number, got the text 'wide'",
            ],
        ),
        (
            "training.optimizer.momentun=0.9",
            ["training.optimizer.momentun: not an argument of sgd; expected dampening, lr, momentum, nesterov, weight_decay"],
        ),
        (
            "training.schedule.name=stp",
            ["training.schedule.name: expected one of step, exponential, cosine or torch.optim.lr_scheduler.CLASS, got 'stp'"],
        ),
        ("model.name=mpl", ["model.name: expected 'mlp', 'cnn' or 'logistic', got 'mpl'"]),
        ("model={}", ["model: expected either name (mlp, cnn, logistic) or factory (package.module:function)"]),
        ("model.factory=a:b", ["model: expected either name or factory, got both (name: null takes the name away)"]),
        ("model={factory: a-b}", ["model.factory: expected package.module:function, got 'a-b'"]),
        ("model={name: logistic, hidden: [3]}", ["model.hidden: not a setting of logistic"]),
        ("model={name: cnn}", ["model.name: cnn needs data.image: {height: ..., width: ..., channels: ...}"]),
        ("sisa.aggregation=mode", ["sisa.aggregation: expected one of mean, vote, trimmed_mean, median, calibrated, weighted, got 'mode'"]),
        ("data=3", ["data: expected a mapping of fields, got 3"]),
        ("data.holdout=0.2", ["data.holdout: expected a mapping of fields, got 0.2"]),
        ("data.classes=[a]", ["data.classes: expected at least 2 entries, got 1"]),
        ("data.classes=[a, a]", ["data.classes: 'a' is listed twice"]),
        ("data.classes=[1, '1']", ["data.classes: '1' is listed twice"]),
        (
            "data.classes=[1.5, 2020-01-01]",
            [
                "data.classes.0: expected true or false or a whole number or a text, got 1.5",
                "data.classes.1: expected true or false or a whole number or a text, got 2020-01-01 (a date)",
            ],
        ),
        ("data.features=age", ["data.features: expected a list or '*', got 'age'"]),
        ("data.features=[1]", ["data.features.0: expected a text, got 1"]),
        ("data.features=[]", ['data.features: expected at least one column, or "*"']),
        (
            "data.features=[age, income, age]",
            [
                "data.features: 'age' is listed twice",
                "data.features: 'income' is the label; a model must not be trained on it",
            ],
        ),
        ("data.label=person", ["data.label: 'person' is also an id column"]),
        ("data.columns={hour: {type: numeric}}", ["data.columns.hour: no such feature; expected one of age, hours, job"]),
        (
            "data.columns={age: numeric, hours: {type: text}, job: {typ: categorical}}",
            [
                "data.columns.age: expected a mapping of fields, got 'numeric'",
                "data.columns.hours.type: 'text' is not supported yet; expected numeric, categorical or vector",
                "data.columns.job.typ: no such field; did you mean 'type'?",
            ],
        ),
        ("data.image={height: 2, width: 2}", ["data.image: expected exactly one feature, the image; got 3"]),
        ("nonsense=1", ["nonsense: no such field; expected one of store, ledger, data, model, training, sisa, routing"]),
        ("a..b=1", ["a: no such field; expected one of store, ledger, data, model, training, sisa, routing"]),
    ],
)  # fmt: skip
def test_an_override_that_makes_the_recipe_wrong(cli, tmp_path, override, expected):
    assert problems(refused(cli, tmp_path, "--set", override)) == expected


@pytest.mark.parametrize(
    ("override", "message", "hint"),
    [
        ("epochs", "--set 'epochs': expected a.b=value", "--set training.epochs=10"),
        ("=3", "--set '=3': expected a.b=value", "--set training.epochs=10"),
        ("data.features=*", "--set 'data.features=*': the value is not valid YAML", "--set 'data.features=\"*\"'"),
        ("model.hidden=[3", "--set 'model.hidden=[3': the value is not valid YAML", "Quote"),
    ],
)
def test_an_override_that_is_none(cli, tmp_path, override, message, hint):
    failure = refused(cli, tmp_path, "--set", override)
    assert failure.message == message
    assert hint in failure.hint


def test_an_override_reaches_into_a_section_that_was_null(cli):
    words = [
        "--set",
        "training.schedule.name=step",
        "--set",
        "training.schedule.step_size=1",
        "--set",
        "model.hidden=[3, 2]",
    ]
    assert cli.json("train", "recipe.yaml", *words)["stages_trained"] == 6
    frozen = yaml.safe_load((cli.folder / "store" / "recipe.yaml").read_text())
    assert frozen["training"]["schedule"] == {"name": "step", "step_size": 1}
    assert frozen["model"]["hidden"] == [3, 2]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "x.yaml has 1 problem:\n  - expected a mapping with data, model, training and sisa; got nothing"),
        (b"- a\n", "x.yaml has 1 problem:\n  - expected a mapping with data, model, training and sisa; got a list"),
        (b"a: b: c\n", "config 'x.yaml' is not valid YAML: mapping values are not allowed here (line 1, column 5)"),
        (b"a:\n  b: 1\n  b: 2\n", "config 'x.yaml' is not valid YAML: field 'b' is given twice (line 3, column 3)"),
        (b"{[a]: b}", "config 'x.yaml' is not valid YAML: found unhashable key (line 1, column 2)"),
        (b"\xff\xfe\x00", "config 'x.yaml' can't be read: not a text file"),
        (b"a: !!python/object/apply:os.getcwd []\n", "config 'x.yaml' is not valid YAML: could not determine a constructor"),
    ],
)  # fmt: skip
def test_a_file_that_is_no_recipe(cli, tmp_path, content, message):
    (tmp_path / "x.yaml").write_bytes(content)
    assert cli.refused("train", "x.yaml").message.startswith(message)


def test_a_file_that_holds_itself(cli, tmp_path):
    (tmp_path / "x.yaml").write_text("a: &a [*a]\ndata: *a\n1: 2\n")
    assert "data: expected a mapping of fields, got a list" in problems(cli.refused("train", "x.yaml"))


@pytest.mark.parametrize(
    ("path", "reason"),
    [("absent.yaml", "No such file or directory"), (".", "Is a directory"), ("people.parquet", "not a text file")],
)
def test_a_recipe_that_can_not_be_read(cli, path, reason):
    failure = cli.refused("train", path)
    assert (failure.message, failure.hint) == (
        f"config '{path}' can't be read: {reason}",
        "Give the path of a YAML file.",
    )


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("{factory: 'absent_module:build'}", "model.factory: 'absent_module' can't be imported: ModuleNotFoundError"),
        ("{factory: 'cli_models_a:absent'}", "model.factory: 'cli_models_a' has no function 'absent'"),
        ("{factory: 'cli_models_a:fails'}", "model.factory: cli_models_a:fails failed with ValueError: no"),
        ("{factory: 'cli_models_a:nothing'}", "model.factory: cli_models_a:nothing returned NoneType, expected a torch.nn.Module"),
        ("{factory: 'cli_models_a:narrow'}", "model.factory: cli_models_a:narrow: it returned scores of shape (4, 1)"),
        ("{factory: 'cli_models_a:narrow', options: {depth: 3}}", "failed with TypeError"),
        ("{factory: 'cli_models_b:build'}", "model.factory: 'cli_models_b' can't be imported: SyntaxError"),
    ],
)  # fmt: skip
def test_a_model_that_can_not_be_used(cli, tmp_path, model, message):
    (tmp_path / "cli_models_a.py").write_text(
        "from torch import nn\n"
        "def fails(shape, classes):\n    raise ValueError('no')\n"
        "def nothing(shape, classes):\n    return None\n"
        "def narrow(shape, classes):\n    return nn.Linear(shape[0], 1)\n"
    )
    (tmp_path / "cli_models_b.py").write_text("def build(:\n")
    assert message in refused(cli, tmp_path, "--set", f"model={model}").message


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.optimizer.name=torch.optim.Foo", "training.optimizer.name: there is no torch.optim.Foo"),
        ("training.optimizer.name=torch.optim.LBFGS", "not supported yet"),
        ("routing.key_file=absent.key", "routing.key_file 'absent.key' can't be read: No such file or directory"),
        (
            "routing.key_file=short.key",
            "routing.key_file: expected at least 16 bytes or 32 hexadecimal digits, got 5 bytes",
        ),
        ("data.holdout={source: absent.parquet}", "data.holdout.source 'absent.parquet': there is no such file"),
    ],
)
def test_what_only_a_trial_shows(cli, tmp_path, override, message):
    (tmp_path / "short.key").write_text("short")
    assert message in refused(cli, tmp_path, "--set", override).message


@pytest.mark.parametrize(
    "text", ["1e-3", "1.0e30", "1e30", "1E5", "1.e5", "-.5", "-.5e-7", "+1e9", "1e0", "123456789e3", "5e-324", "1_0e3"]
)
def test_numbers_are_spelled_as_yaml_reads_them(text):
    assert isinstance(yaml.safe_load(text), str)
    advice = number_hint(text)
    assert advice.startswith(f" (YAML reads {text} as text: write ")
    written = yaml.safe_load(advice.rpartition(" ")[2].removesuffix(")"))
    assert type(written) is float
    assert written == float(text)


@pytest.mark.parametrize("text", ["small", "", "nan", "inf", "1e999", "0x1F", "{", "1,5"])
def test_no_spelling_is_offered_for_what_is_no_number(text):
    assert number_hint(text) == ""
