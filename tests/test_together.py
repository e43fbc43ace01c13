"""A shard that several processes train together: one state in all of them, the same on every run, and all the promises."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import pytest
import tables
import torch
import yaml
from cli_kit import command, surroundings
from store_kit import assert_same, at, copied, places, scratch, state_digests, train, write
from torch import nn

import sisa
from sisa.errors import FootingError, RecipeError, StoreError, UserError
from sisa.execution import build as building
from sisa.execution.build import Plan
from sisa.execution.options import Execution
from sisa.layout import CHECKPOINTS_KEY
from sisa.learners.shared import SharedGradients, part_of, require_shareable
from sisa.progress import Silent
from sisa.recipe import parse_recipe, recipe_digest
from sisa.training.group import PATIENCE, Group
from sisa.training.meeting import meeting_folder
from sisa.training.platform import fingerprint
from sisa.training.stage import Stopped
from sisa.training.together import Together, task_data

TOGETHER = {"devices_per_shard": 2}
COUNTS = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, width, classes):
        super().__init__()
        self.out = nn.Linear(width, classes)
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, X):
        if self.training:
            self.seen += X.sum()
        return self.out(X)

def build(feature_shape, class_count):
    return Net(feature_shape[0], class_count)
"""


def recipe(**changes):
    """A small training by two processes; with dropout, so that random numbers matter."""
    plain = tables.mixed_recipe(
        model={"dropout": 0.2}, sisa={"shards": 1, "slices": 2}, training={"epochs": 3, "batch_size": 5}
    )
    content = {**plain, "workers": TOGETHER}
    return {**content, **{name: {**content[name], **fields} for name, fields in changes.items()}}


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    """A table and a store that was trained together."""
    folder = tmp_path_factory.mktemp("together")
    table = tables.mixed(40, seed=3)
    return folder, table, train(folder, recipe(), table)


def is_following(pid):
    """Whether a process is one that trains with a first one."""
    try:
        return b"sisa.training.peer" in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False


def following(first=None):
    """Those that train with a process, by default ours."""
    children = Path(f"/proc/{first or os.getpid()}/task").glob("*/children")
    return [int(pid) for path in children for pid in path.read_text().split() if is_following(pid)]


def wait_until(true, seconds=60):
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)


class Both:
    """What a process among several would get, from gradients computed here, one after the other."""

    def __init__(self, rank, size, given):
        self.rank, self.size, self._given = rank, size, given

    def gather(self, mine):
        self._given[self.rank] = mine.clone()
        return [self._given.get(rank, torch.zeros_like(mine)) for rank in range(self.size)]


class Quadratic:
    """Gradients whose mean over a batch is known."""

    def __call__(self, rows_B, _):
        return [rows_B.float().mean().reshape(1), None]

    def loss(self):
        return 0.0


@pytest.mark.parametrize(("count", "size"), [(8, 2), (7, 2), (7, 3), (2, 3), (1, 2)])
def test_parts_add_up_to_the_batch(count, size):
    rows = torch.arange(count) * 3.0
    parameters = [nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(4))]
    given = {}
    for rank in range(size):
        shared = SharedGradients(Quadratic(), parameters, Both(rank, size, given))
        reached, never = shared(rows, rows)
    assert never is None
    assert reached.item() == pytest.approx(rows.mean().item(), rel=1e-6)
    ranges = [part_of(count, rank=rank, size=size) for rank in range(size)]
    assert [i for part in ranges for i in range(count)[part]] == list(range(count))


def test_every_process_sums_in_the_same_order():
    rows = torch.tensor([3e8, 3.0, -3e8])  # whose sum depends on the order
    parameters, given = [nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(4))], {}
    for _ in range(2):  # in the second round everything is there
        sums = [SharedGradients(Quadratic(), parameters, Both(rank, 3, given))(rows, rows)[0] for rank in range(3)]
    assert not torch.equal((given[0] + given[1]) + given[2], (given[0] + given[2]) + given[1])
    assert all(torch.equal(found, ((given[0] + given[1]) + given[2])[:1]) for found in sums)


def test_one_process_is_what_there_was_before_there_were_several():
    one, two = recipe(workers={"devices_per_shard": 1}), recipe()
    plain = {name: fields for name, fields in two.items() if name != "workers"}
    parsed = [parse_recipe(content) for content in (plain, one, two)]
    assert recipe_digest(parsed[0]) == recipe_digest(parsed[1]) != recipe_digest(parsed[2])
    assert fingerprint(parsed[0]) == fingerprint(parsed[1])
    assert fingerprint(parsed[2]) == {**fingerprint(parsed[0]), "processes": 2, "exchange": "gloo"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"batch_norm": True}}, "model.batch_norm: not supported yet with workers.devices_per_shard above 1"),
        ({"training": {"batch_size": 1}}, "2 processes can't share a batch of 1"),
        ({"workers": {"devices_per_shard": 0}}, "workers.devices_per_shard: expected at least 1"),
        ({"workers": {"devices": 2}}, "workers.devices: no such field; did you mean 'devices_per_shard'?"),
    ],
)
def test_what_cannot_be_trained_together_is_refused(changes, message):
    with pytest.raises(RecipeError, match=message.replace("(", "\\(").replace("?", "\\?")):
        parse_recipe(recipe(**changes))


def test_batchnorm_of_somebodys_own_is_refused():
    with pytest.raises(UserError, match="not supported yet with several processes"):
        require_shareable(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)))


def test_a_model_that_keeps_what_it_sees_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    (tmp_path / "countsrows.py").write_text(COUNTS)
    monkeypatch.syspath_prepend(str(tmp_path))
    content = recipe()
    content["model"] = {"factory": "countsrows:build"}
    with pytest.raises(UserError, match="its buffer 'seen' changes while it trains"):
        train(tmp_path, content, tables.mixed(20, seed=3))
    assert not (tmp_path / "store").exists()


def test_processes_that_end_in_different_states_are_noticed(tmp_path, monkeypatch):
    source = COUNTS.replace("if self.training:", "if self.training and len(X) != 4:")  # unseen on the rows that try it
    (tmp_path / "hidescounts.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(UserError, match="stage 1 of shard 0 ended in different states"):
        train(tmp_path, {**recipe(), "model": {"factory": "hidescounts:build"}}, tables.mixed(20, seed=3))
    assert not list((tmp_path / "store" / "checkpoints").glob("*/stage-*"))


def test_the_same_bits_on_every_run_and_others_than_alone(shop, tmp_path):
    _, table, store = shop
    assert_same(train(tmp_path, recipe(), table, name="again"), store)
    alone = train(tmp_path, recipe(workers={"devices_per_shard": 1}), table, name="alone")
    assert alone.status()["records"] == store.status()["records"]
    assert not state_digests(alone).items() & state_digests(store).items()
    assert not following()


def test_a_replay_uses_as_many_processes_and_finds_the_same_bits(shop):
    _, _, store = shop
    found = store.verify(replay="all", executor="inline")
    assert (found.ok, found.problems, found.comparison, found.stages_replayed) == (True, [], "bitwise", 2)


def test_a_deletion_gives_what_a_training_without_the_person_gives(shop, tmp_path):
    _, table, store = shop
    mine = copied(store, tmp_path)
    record = next(record for record, (_, slice_) in places(mine).items() if slice_ == 2)
    person = table["person"][table["record"].to_pylist().index(int(record))].as_py()
    done = mine.delete(subjects=[person], executor="inline")
    assert (done.state, done.stages_retrained) == ("repaired", 1)
    rest = table.filter([name != person for name in table["person"].to_pylist()])
    scratch(mine, tmp_path, recipe(), rest)


LONG = {"training": {"epochs": 30_000}}


class Killer(Silent):
    """Kills a process of ours as soon as records have gone through the model."""

    def advance(self, amount):
        for pid in following() if amount else ():
            os.kill(pid, signal.SIGKILL)


def test_a_process_that_dies_ends_the_stage_and_leaves_nothing(shop, tmp_path):
    _, table, _ = shop
    with pytest.raises(StoreError, match="died"):
        train(tmp_path, recipe(**LONG), table, reporter=Killer())
    assert not following()
    assert not list((tmp_path / "store" / "checkpoints").glob("*/stage-*"))


@pytest.fixture
def first(shop, tmp_path):
    """A process that is training a long stage with another one."""
    _, table, _ = shop
    source = write(table, tmp_path / "t.parquet")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(at(tmp_path, recipe(**LONG), source)))
    (tmp_path / "temporary").mkdir()
    first = subprocess.Popen(
        command("train", "recipe.yaml", "--store", "store", "--executor", "inline"),
        cwd=tmp_path, env=surroundings(TMPDIR=str(tmp_path / "temporary")),
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        wait_until(lambda: following(first.pid))
        yield first
    finally:
        first.kill()
        first.wait()


def test_the_others_end_when_the_first_one_is_killed(first, tmp_path):
    others = following(first.pid)
    time.sleep(1.0)
    first.kill()
    first.wait()
    wait_until(lambda: not any(is_following(pid) for pid in others))
    assert not list((tmp_path / "store" / "checkpoints").glob("*/stage-*"))


def test_nothing_is_left_of_where_they_met_when_the_first_one_is_terminated(first, tmp_path):
    wait_until(lambda: list(tmp_path.glob("temporary/sisa-*")))
    wait_until(lambda: not list(tmp_path.glob("temporary/*")))  # they have met, and train on
    assert first.poll() is None
    first.terminate()
    first.wait()
    assert not list((tmp_path / "temporary").iterdir())


def test_where_the_processes_of_a_killed_one_would_have_met_is_swept_by_the_next_one(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    killed = "from sisa.training.meeting import *\nimport os\nwith meeting_folder(): os.kill(os.getpid(), 9)"
    subprocess.run([sys.executable, "-c", killed], env=surroundings(TMPDIR=str(tmp_path)), check=False)
    (left,) = tmp_path.iterdir()
    with meeting_folder() as mine:
        assert list(tmp_path.iterdir()) == [mine] != [left]
        with meeting_folder() as another:
            assert sorted(tmp_path.iterdir()) == sorted([mine, another])  # whose processes live
        assert list(tmp_path.iterdir()) == [mine]


def with_one_more(told, *, should_stop):
    """Train a stage of which there is nothing."""
    with contextlib.closing(Together(parse_recipe(recipe()))) as together:
        together.train(told, recipe=parse_recipe(recipe()), should_stop=should_stop, stage=1, shard=0)


def test_a_stop_is_heard_while_the_processes_get_ready():
    began = time.monotonic()
    with pytest.raises(Stopped):
        with_one_more({"task": {}, "epochs": 1}, should_stop=lambda: True)
    assert time.monotonic() - began < 20
    assert not following()


def test_a_stop_is_heard_while_the_others_are_waited_for(tmp_path):
    with pytest.raises(Stopped):
        Group(tmp_path / "meeting", rank=0, size=2, device="cpu", should_stop=lambda: True)


class Freezer(Silent):
    """Freezes the other process in mid-stage, and deletes somebody meanwhile; is done when training goes on."""

    def __init__(self, delete):
        self._delete = delete
        self.frozen = []
        self.deletion = None

    def advance(self, amount):
        others = following() if amount else []
        if self.frozen and others and others != self.frozen:
            raise KeyboardInterrupt
        if others and not self.frozen:
            self.frozen = others
            for pid in others:
                os.kill(pid, signal.SIGSTOP)
            self.deletion = self._delete()


def test_a_frozen_process_does_not_keep_a_deletion_waiting(shop, tmp_path):
    _, table, store = shop
    record = next(record for record, (_, slice_) in places(store).items() if slice_ == 1)
    person = table["person"][table["record"].to_pylist().index(int(record))].as_py()

    def delete():
        words = command("delete", "--store", "store", "--subject", person, "--defer")
        return subprocess.Popen(words, cwd=tmp_path, env=surroundings(), stdout=subprocess.DEVNULL)

    freezer, began = Freezer(delete), time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, recipe(**LONG), table, reporter=freezer)
    assert freezer.deletion.wait() == 0
    assert time.monotonic() - began < PATIENCE.total_seconds() / 2
    assert [request["state"] for request in sisa.open_store(tmp_path / "store").status()["requests"]] == ["repairing"]
    assert not any(map(is_following, freezer.frozen))


def test_what_a_process_cannot_read_is_said_by_the_first_one():
    with pytest.raises(UserError, match="training a shard together failed: KeyError"):
        with_one_more({"task": {"root": "/nowhere"}, "epochs": 1}, should_stop=lambda: False)


@pytest.mark.parametrize("other", [{"platform": "0" * 12}, {"code": "0" * 64}])
def test_a_process_on_another_footing_does_not_train_with_us(shop, other):
    """Its environment may be another, and a source that was edited since the first one had imported it."""
    opened = shop[2].opened
    code, platform = opened.ledger.footing()
    plan = Plan(shards=[0], code=code, platform=platform, checkpoints=CHECKPOINTS_KEY)
    slices = [each for each in opened.ledger.partitions.all(0) if each.slice]
    task = building._task(opened, plan, Execution(), slices)
    with pytest.raises(FootingError, match="the one that the chain was trained"):
        with_one_more({"task": task_data(replace(task, **other)), "epochs": 1}, should_stop=lambda: False)


@pytest.mark.ray
@pytest.mark.slow
def test_the_same_bits_as_tasks_of_ray(shop, tmp_path):
    _, table, store = shop
    on_ray = train(tmp_path, recipe(), table, executor="ray", workers=1)
    assert_same(on_ray, store)
    assert on_ray.verify(replay="all", executor="inline").ok
