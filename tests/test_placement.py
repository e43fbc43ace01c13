"""Which chain goes first, what a worker gets, and that it reads its own shard's rows and nothing else."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import struct
import time
from pathlib import Path

import pytest
import store_kit
import tables

from sisa.errors import RecipeError, UserError
from sisa.execution import machines
from sisa.execution.build import Plan, _task
from sisa.execution.machines import require_place, room
from sisa.execution.options import Execution
from sisa.planning.placement import Need, capacity, longest_first, places
from sisa.recipe import dump_recipe, load_recipe, parse_recipe, recipe_digest
from sisa.training.chain import run_chain
from sisa.training.events import StageDone
from sisa.training.footing import footing_here

TABLE = tables.mixed(20, seed=9)


def recipe(**workers):
    content = tables.mixed_recipe()
    content["data"]["source"] = "-"
    return parse_recipe({**content, "workers": workers})


# --- the order of chains ----------------------------------------------------------------------------


def test_the_longest_chain_goes_first_and_equal_ones_by_number():
    assert longest_first({4: 1, 2: 7, 0: 7, 3: 0, 1: 90}) == [1, 0, 2, 4, 3]
    assert longest_first({}) == []


# --- what a worker gets -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("machine", "need", "expected"),
    [
        ({"CPU": 8.0}, Need(cpus=1), 8),
        ({"CPU": 1.0}, Need(cpus=0.1), 10),
        ({"CPU": 8.0, "GPU": 1.0}, Need(cpus=1, gpus=0.25), 4),
        ({"CPU": 8.0}, Need(cpus=1, gpus=1), 0),
        ({"CPU": 8.0, "memory": 3.0e9}, Need(cpus=1, memory_bytes=10**9), 3),
        ({}, Need(cpus=1), 0),
    ],
)
def test_how_many_workers_a_machine_holds(machine, need, expected):
    assert places(machine, need) == expected
    assert capacity([machine, machine], need) == 2 * expected


def test_a_recipe_that_says_nothing_asks_for_its_threads_and_a_gpu_only_if_it_trains_on_one():
    assert Execution().need(recipe()) == Need(cpus=1)
    content = {**tables.mixed_recipe(training={"threads": 3, "device": "cuda"})}
    content["data"] = {**content["data"], "source": "-"}
    assert Execution().need(parse_recipe(content)) == Need(cpus=3, gpus=1)
    asked = recipe(cpus=0.5, gpus=0.25, memory="1.5GiB")
    assert Execution().need(asked) == Need(cpus=0.5, gpus=0.25, memory_bytes=3 * 2**29)
    # what a run asks for goes before what the store remembers
    assert Execution(resources=asked.workers).need(recipe(cpus=7)) == Execution().need(asked)


@pytest.mark.parametrize(
    ("workers", "message"),
    [
        ({"cpus": 0}, "workers.cpus: expected more than 0"),
        ({"gpus": 1.5}, "workers.gpus: expected a whole number, or a fraction of one GPU; got 1.5"),
        ({"memory": "4 gigs"}, "workers.memory: expected bytes, or a size such as 4GiB or 500MB; got '4 gigs'"),
        ({"memory": 0}, "workers.memory: expected at least one byte"),
        ({"cpu": 1}, "workers.cpu: no such field; did you mean 'cpus'?"),
        ({"snapshot_every_s": -1}, "workers.snapshot_every_s: expected at least 0"),
    ],
    ids=str,
)
def test_what_is_no_resource_is_refused(workers, message):
    with pytest.raises(RecipeError) as caught:
        recipe(**workers)
    assert message in str(caught.value)


def test_resources_and_snapshots_are_no_part_of_what_determines_bits(tmp_path):
    plain, other = recipe(), recipe(cpus=2, gpus=1, memory=10**9, snapshot_every_s=None)
    assert recipe_digest(plain) == recipe_digest(other)
    for asked in (plain, other):
        (tmp_path / "recipe.yaml").write_text(dump_recipe(asked))
        assert load_recipe(tmp_path / "recipe.yaml") == asked


class Cluster:
    """What Ray says of a cluster, for the part that asks it."""

    def __init__(self, *nodes, groups=None):
        self._nodes, self.asked = nodes, 0
        self._private = self
        self.state = self
        self.ray_constants = self
        self.groups = groups

    def nodes(self):
        self.asked += 1
        return [{"Alive": True, "Resources": node} for node in self._nodes] + [
            {"Alive": False, "Resources": {"CPU": 99}}
        ]

    def get_cluster_config(self):
        return self.groups and type("Config", (), {"node_group_configs": self.groups})


def group(count, **resources):
    return type("Group", (), {"max_count": count, "resources": resources})


def test_a_cluster_that_can_never_hold_a_worker_is_told_in_one_message(monkeypatch):
    monkeypatch.setattr(machines, "JOINING_S", 0.3)
    monkeypatch.setattr(machines, "_scales_itself", lambda _: False)
    began = time.monotonic()
    with pytest.raises(UserError) as caught:
        require_place(Cluster({"CPU": 4.0}, {"CPU": 4.0}, {"CPU": 16.0, "GPU": 2.0}), Need(cpus=1, gpus=4))
    assert time.monotonic() - began < 5
    assert caught.value.message == (
        "no machine of the Ray cluster can ever hold a worker that needs 1 CPUs, 4 GPUs; there are "
        "1 with 16 CPUs, 2 GPUs, 0 GiB of memory; 2 with 4 CPUs, 0 GiB of memory"
    )
    assert "workers.gpus" in caught.value.hint


def test_a_machine_that_may_still_be_started_is_waited_for(monkeypatch):
    monkeypatch.setattr(machines, "JOINING_S", 0.0)
    monkeypatch.setattr(machines, "_scales_itself", lambda _: False)
    need = Need(cpus=1, gpus=1)
    require_place(Cluster({"CPU": 4.0}, groups=[group(3, CPU=8, GPU=2)]), need)
    assert room(Cluster({"CPU": 4.0, "GPU": 1.0}, groups=[group(3, CPU=8, GPU=2), group(9, CPU=1)]), need) == 6
    assert room(Cluster(groups=[group(-1, CPU=8, GPU=2)]), need) == machines.UNLIMITED
    with pytest.raises(UserError):
        require_place(Cluster({"CPU": 4.0}, groups=[group(3, CPU=8)]), need)


@pytest.mark.parametrize(
    ("report", "expected"),
    [
        ({"active_nodes": {"node_0123ab": 1, "node_4567cd": 1}}, False),
        ({"active_nodes": {"head-group": 1}, "idle_nodes": None}, True),
        ({"active_nodes": {}, "idle_nodes": {"small": 2}}, True),
        (None, False),
    ],
    ids=str,
)
def test_a_head_that_only_watches_is_no_autoscaler(report, expected):
    assert machines.names_types(json.dumps({"autoscaler_report": report}).encode()) is expected


# --- what a worker reads ----------------------------------------------------------------------------

IN_OPEN, IN_ISDIR, HEADER = 0x20, 0x40000000, struct.Struct("iIII")


class Watch:
    """Names every file below a folder that any process opens, whatever library does it: the kernel tells."""

    def __init__(self, root):
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._descriptor = self._libc.inotify_init1(os.O_NONBLOCK)
        self._root = root
        self._folders = {}
        for folder in [root, *(path for path in root.rglob("*") if path.is_dir())]:
            watch = self._libc.inotify_add_watch(self._descriptor, os.fsencode(folder), IN_OPEN)
            assert watch > 0
            self._folders[watch] = folder

    def opened(self):
        found = set()
        while True:
            try:
                content = os.read(self._descriptor, 2**16)
            except BlockingIOError:
                os.close(self._descriptor)
                return {str(path.relative_to(self._root)) for path in found}
            while content:
                watch, mask, _, length = HEADER.unpack_from(content)
                name = content[HEADER.size : HEADER.size + length].rstrip(b"\0").decode()
                if not mask & IN_ISDIR:
                    found.add(self._folders[watch] / name)
                content = content[HEADER.size + length :]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return store_kit.train(tmp_path_factory.mktemp("placement"), tables.mixed_recipe(), TABLE)


def chain_of(store, shard, checkpoints):
    """The task of one shard's chain, to be trained from nothing."""
    opened = store.opened
    footing = footing_here(opened.recipe)
    plan = Plan(shards=[shard], code=footing.code, platform=footing.platform, checkpoints=checkpoints, enter=False)
    slices = [p for p in opened.ledger.partitions.all(shard) if p.slice]
    return _task(opened, plan, Execution(), slices)


def digests_of(task):
    events = []
    run_chain(task, events.append)
    return {event.row.stage: event.row.full_digest for event in events if isinstance(event, StageDone)}


@pytest.mark.parametrize("shard", [0, 1])
def test_a_worker_opens_its_own_shards_rows_and_lock_and_nothing_else(trained, tmp_path, shard):
    store = store_kit.copied(trained, tmp_path)
    task = chain_of(store, shard, tmp_path / "elsewhere")
    store.close()
    watch = Watch(tmp_path / "copy")
    made = digests_of(task)
    opened = watch.opened()
    rows = {name for name in opened if name.endswith(".parquet")}
    assert len(rows) == 3
    assert all(name.startswith(f"records/shard={shard:04d}/slice=") for name in rows)
    assert opened - rows == {f"locks/shard-{shard:04d}.lock"}
    expected = {row.stage: row.full_digest for row in trained.opened.ledger.stages.all(shard)}
    assert made == expected


def test_a_worker_needs_nothing_of_the_store_but_its_own_shards_rows(trained, tmp_path):
    """Neither keys nor ledger nor recipe nor another shard: they are not even there."""
    store = store_kit.copied(trained, tmp_path)
    task = chain_of(store, 1, tmp_path / "elsewhere")
    store.close()
    root = tmp_path / "copy"
    for path in [*root.iterdir(), *(root / "records").iterdir()]:
        if path.name not in {"records", "shard=0001"}:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert {Path(path).name for path in root.iterdir()} == {"records"}
    assert digests_of(task) == {row.stage: row.full_digest for row in trained.opened.ledger.stages.all(1)}
