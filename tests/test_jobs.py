"""Commands as jobs on a real cluster, and commands that attach to one that runs already."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import urllib.request
import zipfile
from pathlib import Path

import pytest
import ray_kit
import yaml
from cli_kit import ROOT, documented, households, one_object, place_of, prepare, process, recipe, trained
from race_kit import serving, wait_until

pytestmark = pytest.mark.ray
SECRET = "hunter2-never-to-be-seen"
UNKNOWN = "nobody-by-this-name"
LEAVER = "h007"


@pytest.fixture(scope="module")
def ray():
    with ray_kit.cluster(SISA_TEST_SECRET=SECRET) as running:
        yield running


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A folder that every node sees, with a recipe for it."""
    folder = tmp_path_factory.mktemp("shared")
    prepare(folder)
    write_recipe(folder)
    return folder


def write_recipe(folder, **changes):
    content = recipe(sisa={"shards": 2, "slices": 1}, data={"source": str(folder / "people.parquet")}, **changes)
    content |= {"store": str(folder / "store"), "routing": {"key_file": str(folder / "routing.key")}}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(content))


def digests(store):
    answer = one_object(process("status", "--store", store, "--json", folder=store.parent).stdout)
    return [(c["shard"], c["key"], c["state_digest"]) for c in answer["constituents"]]


def states(store):
    answer = one_object(process("status", "--store", store, "--json", folder=store.parent).stdout)
    return [request["state"] for request in answer["requests"]]


def told(ray):
    """Everything that Ray keeps: logs, sessions, packages; and what its job server shows."""
    token = Path(ray.environment["RAY_AUTH_TOKEN_PATH"]).read_text()
    request = urllib.request.Request(f"{ray.dashboard}/api/jobs/", headers={"Authorization": f"Bearer {token}"})
    with urllib.request.urlopen(request, timeout=10) as answer:
        shown = answer.read()
    paths = [path for path in ray.folder.rglob("*") if path.is_file() and not path.is_symlink()]
    return shown, shown + b"".join(path.read_bytes() for path in paths)


def drivers(ray):
    """How many programs have attached to the cluster."""
    shown, _ = told(ray)
    return sum(job["type"] == "DRIVER" for job in json.loads(shown))


def test_a_training_as_a_job_gives_the_bits_that_it_gives_here(ray, shared, tmp_path):
    done = ray.submit("--json", "--env", "SISA_TEST_SECRET", "train", "recipe.yaml", "--workers", 1, folder=shared)
    assert done.returncode == 0, done.stderr
    answer = one_object(done.stdout)
    assert answer.keys() == documented("submit")
    assert (answer["status"], answer["exit_code"], answer["answer"]["stages_trained"]) == ("SUCCEEDED", 0, 2)
    assert "running 2 chains on Ray" in done.stderr
    here = process("train", shared / "recipe.yaml", "--store", tmp_path / "here", "--executor", "inline", folder=shared)
    assert here.returncode == 0, here.stderr
    assert digests(shared / "store") == digests(tmp_path / "here")
    shown, everything = told(ray)
    assert b"SISA_TEST_SECRET" in shown
    assert SECRET.encode() not in everything


def test_a_deletion_as_a_job_names_nobody(ray, shared):
    assert place_of(shared / "store", LEAVER)[1] > 0
    leavers = shared / "leavers.txt"
    leavers.write_text(f"{LEAVER}\n{UNKNOWN}\n")
    words = ("delete", "--store", shared / "store", "--from", leavers, "--ignore-missing", "--defer")
    done = ray.submit("--json", *words, folder=shared)
    assert done.returncode == 0, done.stderr
    answer = one_object(done.stdout)["answer"]
    assert (answer["subjects"], answer["missing"], answer["state"]) == (1, None, "stages_purged")
    _, everything = told(ray)
    for name in (LEAVER, UNKNOWN):
        assert name.encode() not in everything
        assert name not in done.stdout + done.stderr


def test_a_repair_attaches_to_the_cluster_that_runs(ray, shared):
    before = drivers(ray)
    done = ray.run("repair", "--store", shared / "store", "--address", ray.address, "--json", folder=shared)
    assert done.returncode == 0, done.stderr
    assert one_object(done.stdout)["stages_retrained"] == 1
    assert "on Ray" in done.stderr
    assert drivers(ray) == before + 1


@pytest.mark.slow
def test_ctrl_c_ends_the_watching_and_not_the_job(ray, tmp_path):
    prepare(tmp_path)
    write_recipe(tmp_path, training={"epochs": 200_000})
    words = [str(ROOT / "scripts" / "submit"), "--address", ray.dashboard, "train", "recipe.yaml"]
    watching = subprocess.Popen(
        words, cwd=tmp_path, env={**os.environ, **ray.environment}, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    for line in watching.stdout:  # not before it trains
        if "on Ray" in line:
            break
    watching.send_signal(signal.SIGINT)
    _, said = watching.communicate(timeout=30)
    assert watching.returncode == 130, said
    job = said.split("job ")[1].split(" ")[0]
    assert f"error: job {job} goes on" in said
    assert f"--stop {job}" in said
    assert "Traceback" not in said
    again = ray.submit("--no-wait", "--json", "--attach", job, folder=tmp_path)
    assert one_object(again.stdout)["job"] == job
    assert ray.submit("--stop", job, folder=tmp_path).returncode == 0
    ended = ray.submit("--json", "--attach", job, folder=tmp_path)
    assert ended.returncode == 130, ended.stderr
    assert one_object(ended.stdout)["status"] == "STOPPED"


@pytest.mark.slow
def test_every_command_that_trains_attaches(ray, tmp_path):
    prepare(tmp_path)
    write_recipe(tmp_path)
    (tmp_path / "leavers.txt").write_text(f"{LEAVER}\n")
    before = drivers(ray)
    store = tmp_path / "store"
    for count, words in enumerate(
        (
            ["train", "recipe.yaml"],
            ["delete", "--store", store, "--from", "leavers.txt"],
            ["verify", "--store", store, "--replay", "all"],
        ),
        start=1,
    ):
        done = ray.run(*words, "--address", ray.address, folder=tmp_path)
        assert done.returncode == 0, done.stderr
        assert "on Ray" in done.stderr
        assert drivers(ray) == before + count


@pytest.mark.slow
def test_a_server_repairs_on_the_cluster(ray, tmp_path, monkeypatch):
    store = trained(tmp_path)
    person = households(store, held_out=False)[0]
    deferred = process("delete", "--store", store, "--subject", person, "--defer", folder=tmp_path)
    assert deferred.returncode == 0, deferred.stderr
    for name, value in ray.environment.items():
        monkeypatch.setenv(name, value)
    before = drivers(ray)
    with serving(store, "--address", ray.address):
        wait_until(lambda: states(store) == ["repaired"], "it is repaired")
    assert drivers(ray) == before + 1


@pytest.mark.slow
def test_a_wheel_runs_as_a_job(ray, tmp_path):
    prepare(tmp_path)
    write_recipe(tmp_path)
    wheel = tmp_path / "sisa-0.1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for path in [path for path in (ROOT / "sisa").rglob("*") if path.is_file() and path.suffix != ".pyc"]:
            more = b'print("this is the wheel")' if path == ROOT / "sisa/execution/__init__.py" else b""
            archive.writestr(str(path.relative_to(ROOT)), path.read_bytes() + more)
    done = ray.submit("--package", wheel, "train", "recipe.yaml", folder=tmp_path)
    assert done.returncode == 0, done.stdout
    assert "this is the wheel" in done.stdout
