"""Help that teaches by example and costs nothing, and words that aren't understood."""

from __future__ import annotations

import json
import re
import shlex
import signal
import subprocess
import sys
import time

import click
import pytest
from cli_kit import ROOT, Cli, command, one_object, prepare, process, surroundings

from sisa.cli import main
from sisa.cli.options import spread_ids

VERBS = ["train", "add", "correct", "delete", "repair", "status", "predict", "verify", "submit", "migrate"]
HEAVY = ["torch", "ray", "numpy", "pyarrow", "zarr", "pydantic", "sqlite3", "sqlalchemy", "alembic", "psycopg"]
OPTIONS = {
    "train": ["CONFIG.yaml", "--store", "--set", "--executor", "--address", "--workers", "--json"],
    "add": ["--store", "--source", "--defer", "--executor", "--address", "--workers", "--json"],
    "correct": ["--store", "--source", "--reason", "--defer", "--executor", "--address", "--workers", "--json"],
    "delete": [
        "--store", "--subject", "--record", "--from", "--reason", "--defer", "--ignore-missing", "--no-ids", "--executor",
        "--address", "--workers", "--json",
    ],
    "repair": ["--store", "--executor", "--address", "--workers", "--json"],
    "status": ["--store", "[REQUEST]", "--json"],
    "predict": ["--store", "INPUT.parquet", "--output", "--json"],
    "migrate": ["--store", "--json"],
    "verify": ["--store", "--replay none|all|N", "--executor", "--address", "--workers", "--json"],
    "submit": [
        "--address", "--env", "--include", "--package this|installed|WHEEL", "--python", "--cpus", "--no-wait", "--attach",
        "--stop", "--json", "COMMAND...",
    ],
}  # fmt: skip


@pytest.fixture
def cli(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    return Cli(capsys)


def examples(text):
    return [line.strip() for line in text.splitlines() if line.startswith("    sisa ")]


@pytest.mark.parametrize("words", [[], ["train"], ["add"], ["correct"], ["delete"], ["verify"], ["status"]])
def test_help_imports_nothing_heavy(words):
    code = f"import sys; from sisa.cli.main import run; c = run({[*words, '--help']}); "
    code += f"print([m for m in {HEAVY} if m in sys.modules], file=sys.stderr); sys.exit(c)"
    done = subprocess.run(
        [sys.executable, "-c", code], env=surroundings(), cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr.strip()) == (0, "[]")
    assert done.stdout.startswith("Usage: sisa")


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_a_command_names_its_options_and_shows_examples_that_parse(cli, verb):
    said = cli(verb, "--help")
    assert (said.code, said.err) == (0, "")
    assert all(option in said.out for option in OPTIONS[verb])
    assert "\\b" not in said.out
    lines = examples(said.out)
    assert any(line.startswith(f"sisa {verb} ") for line in lines)
    for line in lines:
        called, *words = shlex.split(line)[1:]
        parent = click.Context(main.cli, info_name="sisa", **main.cli.context_settings)
        with main.cli.commands[called].make_context(called, spread_ids(words), parent=parent) as context:
            assert context.params


def test_help_lists_every_command_with_a_whole_sentence(cli):
    said = cli("--help")
    assert all(re.search(rf"^  {verb} +[A-Z][^\n]*[^.]\.$", said.out, re.MULTILINE) for verb in VERBS)
    assert {line.split()[1] for line in examples(said.out)} == {"train", "status", "delete", "verify"}
    assert "Exit codes" in said.out


@pytest.mark.parametrize("verb", VERBS)
def test_both_spellings_of_help_say_the_same(cli, verb):
    assert cli(verb, "-h") == cli(verb, "--help")


def test_version(cli):
    assert cli("--version").out == "sisa, version 0.1.0\n"


def test_no_words_at_all_show_the_help_and_count_as_a_mistake(cli):
    said = cli()
    assert (said.code, said.out) == (2, "")
    assert said.err.startswith("Usage: sisa")
    assert cli.json(code=2) == {"error": {"message": "no command was given", "hint": "See sisa --help."}}


@pytest.mark.parametrize(
    ("words", "message", "hint"),
    [
        (["trian", "x.yaml"], "No such command 'trian'. Did you mean 'train'?", "See sisa --help."),
        (["train"], "Missing argument 'CONFIG.yaml'.", "See sisa train --help."),
        (["train", "x.yaml", "--exec", "ray"], "No such option '--exec'. Did you mean '--executor'?", "See sisa train --help."),
        (["train", "x.yaml", "--executor", "dask"], "'dask' is not one of 'auto', 'ray', 'inline'", "See sisa train"),
        (["train", "x.yaml", "--workers", "0"], "Invalid value for '--workers'", "See sisa train"),
        (["train", "x.yaml", "y.yaml"], "unexpected extra argument (y.yaml)", "See sisa train"),
        (["status"], "Missing option '--store'.", "See sisa status --help."),
        (["repair"], "Missing option '--store'.", "See sisa repair --help."),
        (["predict", "--store", "s", "x.parquet"], "Missing option '--output'.", "See sisa predict"),
        (["predict", "--store", "s", "--output", "y"], "Missing argument 'INPUT.parquet'.", "See sisa predict"),
        (["verify", "--store", "s", "--replay", "some"], "expected none, all or a positive number", "See sisa verify"),
        (["verify", "--store", "s", "--replay", "0"], "expected none, all or a positive number", "See sisa verify"),
        (["verify", "--store", "s", "--replay", "-1"], "expected none, all or a positive number", "See sisa verify"),
        (["verify", "--store", "s", "--replay", "1.5"], "expected none, all or a positive number", "See sisa verify"),
        (["delete", "--store"], "'--store' requires an argument", "See sisa delete --help."),
        (["delete", "--subject", "--json"], "--subject: expected an id, got the option --json", "See sisa delete"),
    ],
)  # fmt: skip
def test_words_that_are_not_understood(cli, words, message, hint):
    said = cli(*words, *([] if words[-1] in {"--store", "--json"} else ["--json"]))
    assert said.code == 2
    text = one_object(said.out)["error"] if "--json" in words or said.out else {"message": said.err, "hint": said.err}
    assert message in text["message"]
    assert hint in text["hint"]


def test_json_may_stand_before_the_command(cli):
    prepare_missing = ["status", "--store", "nowhere"]
    before, after = cli("--json", *prepare_missing), cli(*prepare_missing, "--json")
    assert before == after
    assert "no store there" in one_object(before.out)["error"]["message"]


@pytest.mark.usefixtures("cli")
def test_a_mistake_of_ours_answers_programs_and_shows_its_traceback_to_people(monkeypatch, capsys):
    def broken(**_):
        raise RuntimeError("oops")

    monkeypatch.setattr(main.status, "callback", broken)
    assert main.run(["status", "--store", "x", "--json"]) == 70
    out, err = capsys.readouterr()
    assert one_object(out)["error"]["message"] == "internal error: RuntimeError"
    assert "Traceback" in err


@pytest.mark.parametrize("error", [KeyboardInterrupt, click.Abort])
def test_an_interruption_is_no_traceback(cli, monkeypatch, error):
    def interrupted(**_):
        raise error

    monkeypatch.setattr(main.status, "callback", interrupted)
    failure = cli.refused("status", "--store", "x", code=130)
    assert failure.message == "interrupted"
    assert "goes on where it stopped" in failure.hint


def test_a_full_disk_is_told_in_words(cli, monkeypatch):
    def full(**_):
        raise OSError(28, "No space left on device", "store/records")

    monkeypatch.setattr(main.status, "callback", full)
    failure = cli.refused("status", "--store", "x", code=3)
    assert failure.message == "the file system refused: No space left on device (store/records)"


def test_ctrl_c_stops_a_training_and_leaves_a_store_that_says_so(tmp_path):
    prepare(tmp_path, training={"epochs": 4000, "batch_size": 1})
    words = ["train", "recipe.yaml", "--executor", "inline", "--json"]
    running = subprocess.Popen(
        command(*words), cwd=tmp_path, env=surroundings(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 60
    while not (tmp_path / "store" / "recipe.yaml").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.5)
    running.send_signal(signal.SIGINT)
    out, err = running.communicate(timeout=60)
    assert running.returncode == 130
    assert json.loads(out)["error"]["message"] == "interrupted"
    assert "Traceback" not in err
    status = json.loads(process("status", "--store", "store", "--json", folder=tmp_path).stdout)
    assert (status["version"], status["state"]) == (0, "training")
