"""A cluster that loses workers, machines, drivers and its head: the same bits, and no stage trained twice."""

from __future__ import annotations

import json
import os
import signal
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cluster_kit
import crash_kit as kit
import pytest

pytestmark = pytest.mark.ray

TABLE = kit.people(120)
SHARDS, SLICES = 3, 2


class World:
    """A training of some seconds a stage, and how it ends if nobody disturbs it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.recipe = kit.make_recipe(folder, TABLE, shards=SHARDS, slices=SLICES, epochs=1200, batch_size=2)
        self.recipe["workers"] = {"snapshot_every_s": 0.2}
        store = kit.trained(self.recipe, folder / "straight")
        self.straight = kit.end_state(store)
        store.close()


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with kit.fast_folder() as folder:
        yield World(folder)


@pytest.fixture(scope="module")
def machines() -> Iterator[cluster_kit.Machines]:
    with cluster_kit.machines(2) as made:
        yield made


def drive(world: World, machines: cluster_kit.Machines, name: str, *words: str) -> cluster_kit.Driver:
    return cluster_kit.Driver(world.recipe, world.folder / name, machines, *words)


def check(world: World, driver: cluster_kit.Driver, *, trained: int | None = SHARDS * SLICES) -> str:
    """The training ended well, as if undisturbed, and every stage was trained once; return what it said."""
    code, out, err = driver.ended()
    assert code == 0, err
    answer: dict[str, Any] = json.loads(out)
    assert trained is None or answer["stages_trained"] == trained
    store = kit.reopened(driver.root)
    assert kit.end_state(store) == world.straight
    assert not [path for path in driver.root.rglob("*") if path.name.startswith(("tmp-", "snapshot-"))]
    entered = Counter((e["shard"], e["stage"]) for e in store.opened.ledger.events() if e["kind"] == "stage_trained")
    assert entered == {(shard, stage): 1 for shard in range(SHARDS) for stage in range(1, SLICES + 1)}
    assert store.verify(replay="none", executor="inline").problems == []
    store.close()
    return err


def test_a_worker_and_then_a_machine_are_lost_in_mid_stage(world, machines):
    driver = drive(world, machines, "lossy")
    place = driver.snapshot(*first_place(driver))
    shard, stage = int(place.parent.name[6:]), int(place.name[9:11])
    worker = driver.worker(shard)
    assert worker not in {os.getpid(), driver.process.pid}
    os.kill(worker, signal.SIGKILL)
    cluster_kit.wait_for(lambda: driver.worker(shard) != worker, what="another worker")
    running = next(s for s in range(SHARDS) if list(driver.root.glob(f"checkpoints/shard-{s:04d}/snapshot-*")))
    place = driver.snapshot(
        running, int(next(driver.root.glob(f"checkpoints/shard-{running:04d}/snapshot-*")).name[9:11])
    )
    machines.lose()
    machines.join()
    err = check(world, driver)
    assert f"the worker that trained shard {shard} is gone; its chain goes on elsewhere" in err
    assert f"stage {stage} of shard {shard} goes on from a recovery snapshot" in err


def first_place(driver: cluster_kit.Driver) -> tuple[int, int]:
    """(shard, stage) of the first snapshot that appears."""

    def there() -> list[Path]:
        assert driver.process.poll() is None, driver.process.communicate()
        return sorted(driver.root.glob("checkpoints/shard-*/snapshot-*"))

    found = cluster_kit.wait_for(there, what="a snapshot")[0]
    return int(found.parent.name[6:]), int(found.name[9:11])


def test_what_no_machine_can_hold_is_told_in_seconds(world, machines):
    began = time.monotonic()
    driver = drive(world, machines, "impossible", "--set", "workers.gpus=4")
    code, out, _ = driver.ended()
    assert code == 2
    message = json.loads(out)["error"]["message"]
    assert message.startswith(
        "no machine of the Ray cluster can ever hold a worker that needs 1 CPUs, 4 GPUs; there are "
    )
    assert time.monotonic() - began < 60  # most of it is the start of Python and the ingest, on a busy machine
    assert stages(driver) == []


@pytest.mark.slow
def test_a_driver_is_killed_and_started_again(world, machines):
    driver = drive(world, machines, "driverless")
    first_place(driver)
    cluster_kit.wait_for(lambda: stages(driver), what="a stage")
    first_place(driver)
    workers = {
        driver.worker(shard) for shard in range(SHARDS) if (driver.root / f"locks/shard-{shard:04d}.lock").exists()
    }
    driver.kill()
    there = len(stages(driver))
    assert 0 < there < SHARDS * SLICES
    again = cluster_kit.Driver(world.recipe, driver.root, machines)
    err = check(world, again, trained=None)
    assert "goes on from a recovery snapshot" in err
    cluster_kit.wait_for(lambda: not any(Path(f"/proc/{worker}").exists() for worker in workers), what="workers' end")


@pytest.mark.slow
def test_the_head_is_lost_and_another_takes_its_place(world, monkeypatch):
    monkeypatch.setenv("RAY_gcs_rpc_server_reconnect_timeout_s", "5")
    with cluster_kit.machines(2) as lost:
        driver = drive(world, lost, "headless")
        cluster_kit.wait_for(lambda: stages(driver), what="a stage")
        first_place(driver)
        lost.kill_head()
        code, out, _ = driver.ended()
        assert (code != 0, out) == (True, "")
    there = len(stages(driver))
    assert 0 < there < SHARDS * SLICES
    with cluster_kit.machines(2) as found:
        again = cluster_kit.Driver(world.recipe, driver.root, found)
        check(world, again, trained=None)


def stages(driver: cluster_kit.Driver) -> list[Any]:
    """The stages that are entered by now."""
    if not (driver.root / "recipe.yaml").exists():
        return []
    store = kit.reopened(driver.root)
    try:
        return list(store.opened.ledger.stages.all())
    finally:
        store.close()
