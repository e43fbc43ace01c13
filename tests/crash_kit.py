"""What the tests of crashes and races share: tiny stores, a hook before every durable operation, real processes."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as papq

from sisa.ledger import postgres
from sisa.ledger.sqlite import SqliteDatabase as Database
from sisa.store.launch import train
from sisa.store.store import Store, open_store

PATIENCE_S = 120.0
"""After this a process that should have spoken is taken for dead: a test that waits so long has failed."""

_PRELOADED = ["torch", "zarr", "sisa.checkpoints.group", "sisa.store.launch", "sisa.store.predict"]

PROCESSES = multiprocessing.get_context("forkserver")
"""Children come from a process that has imported everything and holds no threads."""
PROCESSES.set_forkserver_preload(_PRELOADED)


@contextlib.contextmanager
def fast_folder() -> Iterator[Path]:
    """A folder in memory where there is one: thousands of fsyncs on a disk would take minutes."""
    memory = "/dev/shm"
    folder = tempfile.mkdtemp(prefix="sisa-test-", dir=memory if os.access(memory, os.W_OK) else None)
    try:
        yield Path(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def people(count: int, *, seed: int = 0) -> pa.Table:
    """A table in which a person owns one to three records."""
    rng = np.random.default_rng(seed)
    owners = np.sort(np.concatenate([np.arange(count), rng.integers(0, count, count // 2)]))
    labels = rng.integers(0, 2, len(owners))
    return pa.table(
        {
            "record": pa.array([f"r{i:03d}" for i in range(len(owners))]),
            "person": pa.array([f"p{i:02d}" for i in owners]),
            "x": pa.array(rng.normal(size=len(owners)) + labels),
            "z": pa.array(rng.normal(size=len(owners))),
            "label": pa.array([["no", "yes"][i] for i in labels]),
        }
    )


def more_people(count: int, *, generation: int) -> pa.Table:
    """New rows, one for each person: half of them were there, some come with every generation."""
    rng = np.random.default_rng(100 + generation)
    labels = rng.integers(0, 2, count)
    return pa.table(
        {
            "record": [f"g{generation}{i:02d}" for i in range(count)],
            "person": [f"p{i:02d}" if i % 2 else f"n{i + generation:02d}" for i in range(count)],
            "x": rng.normal(size=count) + labels,
            "z": rng.normal(size=count),
            "label": [["no", "yes"][i] for i in labels],
        }
    )


def make_recipe(
    folder: Path, table: pa.Table, *, shards: int = 2, slices: int = 2, holdout: float = 0.15, **training: Any
) -> dict[str, Any]:
    """Write the table and the routing key, and return a recipe for them."""
    folder.mkdir(parents=True, exist_ok=True)
    papq.write_table(table, folder / "people.parquet")
    (folder / "routing.key").write_text("00" * 32)  # of 12 people it leaves no slice of 2 x 2 or 2 x 3 empty
    return {
        "data": {
            "source": str(folder / "people.parquet"),
            "record_id": "record",
            "subject_id": "person",
            "label": "label",
            "classes": ["no", "yes"],
            "features": ["x", "z"],
            "holdout": {"fraction": holdout},
        },
        "model": {"name": "logistic"},
        "training": {
            "epochs": slices,
            "batch_size": 4,
            "optimizer": {"name": "sgd", "lr": 0.1, "momentum": 0.9},
            "seed": 7,
            **training,
        },
        "sisa": {"shards": shards, "slices": slices},
        "routing": {"key_file": str(folder / "routing.key")},
    }


def trained(recipe: dict[str, Any], root: Path | str) -> Store:
    """Train a store in this process."""
    return train(recipe, store=root, executor="inline")


def copy_store(template: Path, target: Path) -> Path:
    """Copy a store that nobody has open."""
    shutil.copytree(template, target)
    return target


def places(store: Store, table: pa.Table) -> dict[str, tuple[int, int]]:
    """(shard, slice) of each person, by the router; slice 0 is the holdout."""
    return {person: store.opened.router.route_one(person) for person in table["person"].unique().to_pylist()}


def rows_on_disk(root: Path) -> dict[str, list[str]]:
    """Record ids by partition, read by a way that bypasses the code under test."""
    found: dict[str, list[str]] = {}
    for path in sorted((root / "records").rglob("*")):
        if path.is_file() and not path.name.startswith("tmp-"):
            table = papq.read_table(path, columns=["_sisa_record"], partitioning=None)
            found[str(path.relative_to(root))] = sorted(table["_sisa_record"].to_pylist())
    return found


def owners_on_disk(root: Path) -> dict[str, set[str]]:
    """Ids of people by partition, read by a way that bypasses the code under test."""
    paths = sorted((root / "records").rglob("*.parquet"))
    return {str(path): set(papq.read_table(path, partitioning=None)["_sisa_subject"].to_pylist()) for path in paths}


def files_of(root: Path) -> set[str]:
    """Every file of a store, but for locks and SQLite's journal, which come and go."""
    names = {str(path.relative_to(root)) for path in root.rglob("*") if not path.is_dir()}
    return {name for name in names if not name.endswith(".lock") and name != "ledger.db-journal"}


def end_state(store: Store) -> dict[str, Any]:
    """All that has to be the same whatever happened on the way."""
    root = store.opened.layout.root
    stages = store.opened.ledger.stages.all()
    requests = store.opened.ledger.requests.all()
    return {
        "constituents": store.status()["constituents"],
        "stages": sorted((r.shard, r.stage, r.key, r.state_digest, r.full_digest, r.tainted) for r in stages),
        "requests": sorted((r.state, r.subjects, r.records, tuple(r.shards)) for r in requests),
        "rows": rows_on_disk(root),
        "files": files_of(root),
    }


# --- every durable operation ------------------------------------------------------------------------


class Crash(BaseException):
    """The process died here; nothing that it does afterwards reaches the disk."""


Hook = Callable[[str], None]


@contextlib.contextmanager
def before_durable_operations(root: Path, hook: Hook) -> Iterator[None]:
    """Call ``hook`` with a name before each operation below ``root`` that others could see after a crash.

    A ledger on a server is nobody's folder: each of its commits counts.
    """
    base = os.path.realpath(root)

    def wrapped(name: str) -> Callable[..., Any]:
        operation = getattr(os, name)

        def call(path: Any, *args: Any, **options: Any) -> Any:
            if _absolute(path, options).startswith(base):
                hook(f"{name} in {_caller()}")
            return operation(path, *args, **options)

        return call

    rows = Database.rows

    def rows_or_commit(self: Database, statement: str, parameters: Sequence[Any] = ()) -> Any:
        if statement == "COMMIT" and str(self.path).startswith(base):
            hook(f"COMMIT in {_caller()}")
        return rows(self, statement, parameters)

    commit = postgres._commit

    def commit_there(session: Any) -> None:
        hook(f"COMMIT in {_caller()}")
        commit(session)

    with contextlib.ExitStack() as patches:
        patches.enter_context(mock.patch.object(postgres, "_commit", commit_there))
        for name in ("replace", "rename", "fsync", "unlink", "rmdir"):
            patches.enter_context(mock.patch.object(os, name, wrapped(name)))
        patches.enter_context(mock.patch.object(Database, "rows", rows_or_commit))
        yield


_EVERYBODYS = {
    "sisa.files", "sisa.storage.local", "sisa.storage.objects", "sisa.storage.versions", "sisa.ledger.sqlite",
    "sisa.ledger.postgres",
}  # fmt: skip


def _absolute(path: Any, options: dict[str, Any]) -> str:
    """Where an operation happens: a path, one relative to a folder's descriptor, or a descriptor."""
    descriptors = Path("/proc/self/fd")
    if isinstance(path, int):
        return str((descriptors / str(path)).readlink())
    folder = options.get("dir_fd", options.get("src_dir_fd"))
    around = (descriptors / str(folder)).readlink() if folder is not None else Path.cwd()
    return str(around / os.fsdecode(path))


def _caller() -> str:
    """The innermost function of the package that is not one of the helpers that everybody uses."""
    frame = sys._getframe(2)
    while frame is not None:
        name = frame.f_globals.get("__name__", "")
        if name.startswith("sisa.") and name not in _EVERYBODYS:
            return f"{name.removeprefix('sisa.')}.{frame.f_code.co_name}"
        frame = frame.f_back
    return "?"


class Countdown:
    """A hook that lets some operations pass, then dies for good: what cleans up afterwards doesn't any more.

    It dies after a number of operations, or at the first one of a name.
    """

    def __init__(self, stop_at: int | str) -> None:
        self._stop_at = stop_at
        self._passed = 0
        self._dead = False

    def __call__(self, name: str) -> None:
        self._dead |= self._stop_at in {self._passed, name}
        if self._dead:
            raise Crash(name)
        self._passed += 1


# --- real processes ---------------------------------------------------------------------------------


class Child:
    """A process that runs a function of this module's users; it may be killed at any operation."""

    _alive: ClassVar[list[Child]] = []

    def __init__(
        self, function: Callable[..., Any], *arguments: Any, root: Path | None = None, stop_at: int | str = -1
    ):
        self._ours, theirs = PROCESSES.Pipe()
        surroundings = dict(os.environ)  # as they are now: the server that it comes from was started with others
        self.process = PROCESSES.Process(
            target=_child, args=((theirs, surroundings), root, stop_at, function, arguments), daemon=True
        )
        self.process.start()
        theirs.close()
        self._alive.append(self)

    @classmethod
    def kill_all(cls) -> None:
        """End those that a failed test has left behind, stopped ones too."""
        while cls._alive:
            cls._alive.pop().kill()

    def hear(self) -> tuple[str, Any]:
        """Wait for what it says next: ("stopped", where), ("told", anything), ("done", result) or ("failed", why)."""
        if not self._ours.poll(PATIENCE_S):
            self.kill()
            raise AssertionError("the process says nothing")
        try:
            return self._ours.recv()
        except EOFError:
            self.process.join(PATIENCE_S)
            return "failed", f"exit code {self.process.exitcode}"

    def heard(self) -> bool:
        """Whether it has said something that we haven't taken yet."""
        return bool(self._ours.poll(0))

    def tell(self, word: Any) -> None:
        """Say something to a function that listens to ``to_parent``."""
        self._ours.send(word)

    def go_on(self) -> None:
        """Let it go on after it said that it stops itself."""
        status = Path(f"/proc/{self.process.pid}/stat")
        while status.read_text().rpartition(")")[2].split()[0] != "T":
            time.sleep(0.001)  # it has said so and is about to
        os.kill(self.process.pid, signal.SIGCONT)

    def result(self) -> Any:
        """Wait for its end and return what the function returned."""
        kind, value = self.hear()
        self.process.join(PATIENCE_S)
        assert kind == "done", f"{kind}: {value}"
        return value

    def kill(self) -> None:
        """End it as the kernel ends a process, and wait until it is gone."""
        if self.process.pid is not None and self.process.is_alive():
            os.kill(self.process.pid, signal.SIGKILL)
        self.process.join(PATIENCE_S)
        assert not self.process.is_alive()


to_parent: Any = None
"""In a child: the pipe to its parent."""


def _child(
    parent: tuple[Any, dict[str, str]],
    root: Path | None,
    stop_at: int | str,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    global to_parent  # noqa: PLW0603 - one per process
    pipe, surroundings = parent
    to_parent = pipe
    os.environ.clear()
    os.environ.update(surroundings)
    names: list[str] = []

    def hook(name: str) -> None:
        if stop_at in {len(names), name}:
            pipe.send(("stopped", name))
            os.kill(os.getpid(), signal.SIGSTOP)
        names.append(name)

    watched = before_durable_operations(root, hook) if root is not None else contextlib.nullcontext()
    try:
        with watched:
            value = function(*arguments)
    except BaseException:  # noqa: BLE001 - the parent is told
        pipe.send(("failed", traceback.format_exc()))
    else:
        pipe.send(("done", names if root is not None else value))


def operations(function: Callable[..., Any], *arguments: Any, root: Path) -> list[str]:
    """Run it to the end in a process of its own and return its durable operations."""
    names: list[str] = Child(function, *arguments, root=root).result()
    return names


def killed_before(function: Callable[..., Any], *arguments: Any, root: Path, stop_at: int | str) -> str:
    """Run it in a process of its own, SIGKILL it right before an operation, and return which that was.

    The operation is given by its number, or by its name: then it is the first of that name.
    """
    child = Child(function, *arguments, root=root, stop_at=stop_at)
    kind, where = child.hear()
    child.kill()
    assert kind == "stopped", f"{kind}: {where}"
    assert child.process.exitcode == -signal.SIGKILL
    return str(where)


def sampled(names: Sequence[str], *, most: int) -> list[int]:
    """The first operation of each kind, and others between, evenly spread."""
    first = {name: number for number, name in reversed(list(enumerate(names)))}
    spread = range(0, len(names), max(1, len(names) // max(1, most - len(first))))
    return sorted({*first.values(), *spread})


def reopened(root: Path | str) -> Store:
    """Open a store as a process does that has just started."""
    return open_store(root)
