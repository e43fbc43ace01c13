"""Nominal Ray: one process that does everything, and people's rows in Ray's own folders.

One local cluster serves the whole module, started and stopped by the very code that a command uses.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import tables
from store_kit import again, assert_same, at, copied, scratch, slices, train, write

import sisa
from sisa.errors import FootingError, UserError
from sisa.execution import cluster

FACTORY = """
from torch import nn

class Net(nn.Module):
    def __init__(self, width, classes):
        super().__init__()
        self.out = nn.Linear(width, classes)

    def forward(self, X):
        if len(X) > 4:
            raise ValueError(f"cannot digest {X.tolist()}")
        return self.out(X)

def build(feature_shape, class_count):
    return Net(feature_shape[0], class_count)
"""


def telling_table():
    """People, jobs and numbers that can't be anywhere by accident, however they are written."""
    table = tables.mixed(20, seed=9)
    ages = [None if age is None else age + 0.123456789 for age in table["age"].to_pylist()]
    jobs = [None if job is None else f"occupation-of-{job}-qzx" for job in table["job"].to_pylist()]
    table = table.set_column(0, "record", pa.array([f"record-{r}-qzx" for r in table["record"].to_pylist()]))
    table = table.set_column(2, "age", pa.array(ages, pa.float64()))
    return table.set_column(4, "job", pa.array(jobs))


TABLE = telling_table()
RECIPE = tables.mixed_recipe()


def traces():
    """What a row leaves behind: ids and categories as text, numbers as text and as they lie in memory."""
    texts = {value for name in ("record", "person", "job") for value in TABLE[name].to_pylist() if value}
    found = [text.encode(coding) for text in texts for coding in ("utf-8", "utf-16-le")]
    for age in TABLE["age"].drop_null().to_pylist():
        found += [np.float64(age).tobytes(), repr(age).encode()]
    return sorted(set(found))


def holding_traces(*folders):
    """Regular files that contain a trace."""
    wanted = traces()
    assert len(wanted) > 100
    found, seen = [], 0
    for path in (path for folder in folders for path in sorted(folder.rglob("*"))):
        if path.is_file() and not path.is_symlink():
            seen += 1
            content = path.read_bytes()
            found += [path.name for trace in wanted if trace in content][:1]
    assert seen
    return found


def running():
    """{process: (its parent, its command line)} of what runs and isn't a zombie."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            state, parent = (path / "stat").read_text().rpartition(")")[2].split()[:2]
            if state != "Z":
                found[int(path.name)] = int(parent), (path / "cmdline").read_bytes().decode(errors="replace")
        except OSError:
            continue
    return found


def family(folder):
    """The processes that were told of a folder, and their children; workers hide their command line."""
    processes = running()
    found = {pid for pid, (_, said) in processes.items() if str(folder) in said}
    while more := {pid for pid, (parent, _) in processes.items() if parent in found} - found:
        found |= more
    return found - {os.getpid()}


@pytest.fixture(scope="module")
def session():
    """A running cluster of two cores and its folder; what it leaves is looked at when it was stopped."""
    made, real = [], tempfile.mkdtemp

    def noted(*arguments, **options):
        made.append(Path(real(*arguments, **options)))
        return str(made[-1])

    patch = pytest.MonkeyPatch()
    patch.setattr(tempfile, "mkdtemp", noted)
    bystanders = [
        subprocess.Popen(["bash", "-c", f"exec -a {name} sleep 600"]) for name in ("raylet", "gcs_server", "ray::IDLE")
    ]
    try:
        with cluster.connected(None, cores=2):
            patch.undo()
            (folder,) = [path for path in made if path.name.startswith("sisa-ray-")]
            yield folder
            ours = family(folder)
            assert len(ours) > 2
        assert not folder.exists()
        deadline = time.monotonic() + 20
        while (alive := ours & running().keys()) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not alive
        assert [process.poll() for process in bystanders] == [None] * 3
    finally:
        patch.undo()
        for process in bystanders:
            process.kill()
            process.wait()


@pytest.fixture(scope="module")
def inline(tmp_path_factory):
    return train(tmp_path_factory.mktemp("inline"), RECIPE, TABLE)


@pytest.fixture(scope="module")
def trained(session, tmp_path_factory):
    assert session.exists()
    return train(tmp_path_factory.mktemp("ray"), RECIPE, TABLE, executor="ray", workers=2)


def workers(store, stages):
    return {row.worker for row in store.opened.ledger.stages.all() if (row.shard, row.stage) in stages}


ALL = {(shard, stage) for shard in (0, 1) for stage in (1, 2, 3)}


def test_14_a_training_on_ray_that_runs_in_one_process(trained, inline):
    assert len(workers(trained, ALL)) >= 2
    assert not any(worker.endswith(f":{os.getpid()}") for worker in workers(trained, ALL))
    assert_same(trained, inline)


def test_14_a_repair_on_ray_that_runs_in_one_process(trained, tmp_path):
    store = copied(trained, tmp_path)
    victims = [slices(store)[shard, 2][0] for shard in (0, 1)]
    done = store.delete(records=victims, executor="ray", workers=2)
    assert (done.state, done.shards, done.stages_retrained) == ("repaired", [0, 1], 4)
    retrained = workers(store, {(shard, stage) for shard in (0, 1) for stage in (2, 3)})
    assert len(retrained) >= 2
    assert not any(worker.endswith(f":{os.getpid()}") for worker in retrained)
    scratch(store, tmp_path, RECIPE, tables.without(TABLE, records=victims))


def test_14_a_replay_on_ray_that_runs_in_one_process(trained):
    found = trained.verify(replay="all", executor="ray", workers=2)
    assert (found.ok, found.stages_replayed, found.comparison) == (True, 6, "bitwise")
    assert len(found.workers) >= 2
    assert not any(worker.endswith(f":{os.getpid()}") for worker in found.workers)


def test_14_a_worker_that_is_killed(session, tmp_path):
    """Its chain is begun again by another worker, which finds the stages that are whole."""
    recipe = tables.mixed_recipe(training={"epochs": 400})
    killed = []

    def kill_the_first(root):
        while not killed:
            time.sleep(0.02)
            try:
                rows = sisa.open_store(root).opened.ledger.stages.all()
            except sisa.errors.SisaError:
                continue
            if rows:
                worker = int(rows[0].worker.rpartition(":")[2])
                killed.append(worker in family(session))
                if killed[0]:  # nobody else's
                    os.kill(worker, signal.SIGKILL)

    watch = threading.Thread(target=kill_the_first, args=(tmp_path / "store",), daemon=True)
    watch.start()
    store = train(tmp_path, recipe, TABLE, executor="ray", workers=2)
    watch.join(timeout=10)
    assert killed == [True]
    assert store.training.stages_trained == 6
    assert not list((tmp_path / "store").rglob("tmp-*"))
    assert_same(store, train(tmp_path, recipe, TABLE, name="inline"))


def test_14_a_model_that_fails_on_a_worker_says_no_values(session, tmp_path, monkeypatch):
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "failing_model.py").write_text(FACTORY)
    monkeypatch.syspath_prepend(str(tmp_path / "package"))
    recipe = {**tables.mixed_recipe(training={"batch_size": 7}), "model": {"factory": "failing_model:build"}}
    with pytest.raises(UserError, match=r"ValueError at failing_model\.py:11") as caught:
        train(tmp_path, recipe, TABLE, executor="ray", workers=2)
    assert "[" not in caught.value.message
    assert not holding_traces(session)


@pytest.mark.usefixtures("session")
def test_14_a_worker_that_imports_another_model_than_the_driver(tmp_path, monkeypatch):
    """The source is edited after the keys were made, and before a worker imports it."""
    source = tmp_path / "package" / "edited_model.py"
    source.parent.mkdir()
    source.write_text(FACTORY)
    monkeypatch.syspath_prepend(str(source.parent))
    real = cluster._import_paths

    def overtaken():
        source.write_text(FACTORY + "# other\n")
        return real()

    monkeypatch.setattr(cluster, "_import_paths", overtaken)
    recipe = {**RECIPE, "model": {"factory": "edited_model:build"}}
    with pytest.raises(FootingError, match="not the one that the chain was trained with"):
        train(tmp_path, recipe, TABLE, executor="ray", workers=2)
    assert not sisa.open_store(tmp_path / "store").opened.ledger.stages.all()


def test_14_rows_and_ids_are_left_in_rays_folders(session, trained, tmp_path):
    """After trainings, repairs, replays, killed workers and failures, while the cluster still runs."""
    store = copied(trained, tmp_path)
    store.delete(subjects=[TABLE["person"][0].as_py()], executor="ray", workers=2)
    again(store, tmp_path, RECIPE, write(TABLE, tmp_path / "again.parquet"))
    time.sleep(1.0)  # what workers say reaches the logs a little later
    assert (session / "session_latest" / "logs").is_dir()
    assert not holding_traces(session)
    assert holding_traces(trained.opened.layout.records.parent)  # the eye that sees nothing there isn't blind
    asked = at(tmp_path, RECIPE, tmp_path / "again.parquet")
    assert sisa.train(asked, store=store.opened.layout.root, executor="ray").training.stages_trained == 0


@pytest.mark.ray
def test_14_a_caller_that_has_imported_ray_before(tmp_path):
    """Ray reads its variables at its import: a cluster with a token, and a driver that knows of none."""
    script = (
        "import ray, sys; sys.path[:0] = sys.argv[1:2]\n"
        "import crash_kit as kit; from pathlib import Path; import sisa\n"
        "folder = Path(sys.argv[2]); recipe = kit.make_recipe(folder, kit.people(12))\n"
        "store = sisa.train(recipe, store=folder / 'store', executor='ray')\n"
        "print(store.training.stages_trained)\n"
    )
    words = [sys.executable, "-c", script, str(Path(__file__).parent), str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=240, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "4"), done.stderr
