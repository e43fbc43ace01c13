"""What may run as a job: nobody's id, no password, and no path that means something else on the cluster."""

from __future__ import annotations

import sys
import zipfile

import pytest
import yaml
from cli_kit import Cli, changed, people, prepare
from cli_kit import recipe as plain_recipe

from sisa.cli import jobmain
from sisa.cli.jobwords import job_words
from sisa.cli.submit import LeftError, _package, _sent, _watched
from sisa.errors import UserError
from sisa.execution.jobs import _end

NOWHERE = "http://127.0.0.1:9"


@pytest.fixture
def cli(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "0" * 64)
    return Cli(capsys)


def shared_recipe(folder, **changes):
    """A recipe whose paths mean the same everywhere."""
    prepare(folder)
    content = plain_recipe(
        data={"source": "/shared/people.parquet"}, routing={"key_file": "/secrets/routing.key"}, **changes
    )
    content["store"] = "/shared/store"
    (folder / "recipe.yaml").write_text(yaml.safe_dump(content))


def submitted(*words, needs=(), as_json=False):
    return job_words(list(words), needs=list(needs), as_json=as_json)


def test_a_training_takes_its_recipe_along_and_attaches_to_the_cluster_it_runs_on(tmp_path):
    shared_recipe(tmp_path)
    asked = submitted("train", str(tmp_path / "recipe.yaml"), "--set", "training.epochs=3", needs=["PGPASSWORD"])
    assert asked.entrypoint("python") == (
        "python -m sisa.cli.jobmain --need PGPASSWORD -- train recipe.yaml --set training.epochs=3 --address auto"
    )
    assert asked.recipe == tmp_path / "recipe.yaml"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["repair", "--store", "/shared/s"], ["repair", "--store", "/shared/s", "--address", "auto"]),
        (["verify", "--store", "s3://b/p", "--executor", "inline"], ["verify", "--store", "s3://b/p", "--executor", "inline"]),
        (
            ["delete", "--store", "/s", "--from", "/s/leavers.txt"],
            ["delete", "--store", "/s", "--from", "/s/leavers.txt", "--address", "auto"],
        ),
    ],
)  # fmt: skip
def test_a_command_is_told_where_it_runs(words, told):
    assert submitted(*words).words == told
    assert submitted(*words, as_json=True).words == [*told, "--json"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "expected exactly one of a command, --attach and --stop"),
        (["predict", "--store", "/s", "x", "--output", "y"], "expected a command to run as a job"),
        (["delete", "--store", "/s", "--subject", "p017"], "so it must not hold anybody's id"),
        (["delete", "--store", "/s", "--record", "p017"], "so it must not hold anybody's id"),
        (["delete", "--store", "/s"], "expected --from FILE"),
        (["delete", "--store", "/s", "--from", "leavers.txt"], "expected a file on the cluster's shared storage"),
        (["repair", "--store", "runs/adult"], "expected absolute paths that every node sees"),
        (["repair", "--store", "/s", "--address", "auto"], "a job runs on the cluster that it is submitted to"),
        (["repair", "--store", "postgresql://me:hunter2@db/x"], "holds a password"),
        (["repair", "--stroe", "/s"], "No such option '--stroe'"),
        (["verify", "--store", "/s", "--replay", "-1"], "expected none, all or a positive number"),
        (["train", "absent.yaml"], "config 'absent.yaml' can't be read"),
        (["--env", "TOKEN=hunter2", "repair", "--store", "/s"], "expected the name of a variable"),
        (["--package", "absent.whl", "repair", "--store", "/s"], "expected this, installed or a wheel"),
        (["--include", "absent.py", "repair", "--store", "/s"], "there is no such file"),
        (["repair", "--store", "/s"], "no job server lets us in there"),
    ],
)
def test_what_cannot_run_as_a_job_is_refused_in_one_message(cli, words, message):
    failure = cli.refused("submit", "--address", NOWHERE, *words)
    assert message in failure.message
    assert "hunter2" not in failure.message + failure.hint
    assert "p017" not in failure.message + failure.hint


@pytest.mark.parametrize("address", ["head:6379", "ray://head:10001", "auto"])
def test_an_address_that_is_no_dashboards_is_refused(cli, address):
    failure = cli.refused("submit", "--address", address, "repair", "--store", "/s")
    assert "expected the cluster's dashboard" in failure.message


def test_relative_paths_of_a_recipe_are_all_named(cli, tmp_path):
    prepare(tmp_path)
    failure = cli.refused("submit", "--address", NOWHERE, "train", "recipe.yaml")
    assert all(name in failure.message for name in ("data.source", "routing.key_file", "store: 'store'"))


def test_only_what_was_named_is_sent(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shared_recipe(tmp_path)
    (tmp_path / "shop.py").write_text("x = 1\n")
    with _sent(tmp_path / "recipe.yaml", ("shop.py",)) as folder:
        assert sorted(path.name for path in folder.iterdir()) == ["recipe.yaml", "shop.py"]
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "ledger.db").touch()
    with pytest.raises(UserError, match="a store is never sent"), _sent(None, ("runs",)):
        pass
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "link").symlink_to(tmp_path / "runs")
    with pytest.raises(UserError, match="symbolic links aren't followed"), _sent(None, ("models",)):
        pass


def test_of_a_wheel_the_package_alone_is_taken(tmp_path):
    wheel = tmp_path / "sisa-0.1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name in ("sisa/__init__.py", "sisa-0.1.0.dist-info/METADATA", "other/evil.py"):
            archive.writestr(name, "")
    with _package(str(wheel)) as folder:
        assert folder is not None
        assert [path.name for path in folder.parent.iterdir()] == ["sisa"]


def test_a_job_without_its_variables_does_nothing(monkeypatch, capsys):
    monkeypatch.delenv("NOT_THERE", raising=False)
    monkeypatch.setattr(jobmain, "run", lambda words, **_: pytest.fail(f"it ran {words}"))
    assert jobmain.main(["--need", "PATH", "--need", "NOT_THERE", "--", "repair"]) == 2
    assert "not set on the node that runs the job: NOT_THERE\n" in capsys.readouterr().err


def test_a_job_with_them_runs_its_command(monkeypatch):
    ran = []
    monkeypatch.setattr(jobmain, "run", lambda words, **how: ran.append((words, how)) or 7)
    assert jobmain.main(["--need", "PATH", "--", "repair", "--need", "x"]) == 7
    assert jobmain.main(["--", "delete", "--from", "x"]) == 7
    assert ran == [
        (["repair", "--need", "x"], {"name_ids": False}),
        (["delete", "--from", "x", "--no-ids"], {"name_ids": False}),
    ]


def test_a_training_as_a_job_names_nobody_whose_rows_are_wrong(cli, capsys, tmp_path):
    table = people()
    prepare(tmp_path, changed(table, person=["p017", "p017", *table["person"].to_pylist()[2:]]))
    assert jobmain.main(["--", "train", "recipe.yaml"]) == 2
    said = capsys.readouterr().err
    assert "error: 'person' must not repeat, but 1 record ids occur more than once\n" in said
    assert "p017" not in said
    assert "p017" in cli.refused("train", "recipe.yaml").message


class Jobs:
    """A job server whose watcher loses patience."""

    address = NOWHERE

    def follow(self, _, write):
        write("training: 12 %\n")
        raise KeyboardInterrupt


def test_ctrl_c_ends_the_watching_and_says_that_the_job_goes_on(capsys):
    with pytest.raises(LeftError, match="job raysubmit_1 goes on") as caught:
        _watched(Jobs(), "raysubmit_1", as_json=False)
    assert caught.value.exit_code == 130
    assert "--attach raysubmit_1" in caught.value.hint
    assert "--stop raysubmit_1" in caught.value.hint
    assert capsys.readouterr().out == "training: 12 %\n"


class Info:
    """What Ray says of a job."""

    def __init__(self, status, code, message=""):
        from ray.job_submission import JobStatus

        self.status, self.driver_exit_code, self.message = JobStatus(status), code, message


@pytest.mark.parametrize(
    ("info", "code"),
    [
        (("SUCCEEDED", 0), 0),
        (("FAILED", 1), 1),
        (("FAILED", 2), 2),
        (("FAILED", -9), 137),
        (("FAILED", None, "the node died"), 3),
        (("STOPPED", None), 130),
    ],
)
def test_the_exit_code_is_the_jobs(info, code):
    assert _end(Info(*info)).exit_code == code
